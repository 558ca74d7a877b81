"""The fine-tuning methods against values recorded from the official code of each.

The recordings are in the folder of the environment variable RECORDINGS, by default in
tests/data/baselines. Inputs and weights in them are float32 values. `c` is the gradient of outputs.
"""

import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Block, window_partition, window_unpartition
from torch import Tensor, nn

from parts.models.methods.adapters import add_adapters, add_adaptformer, behind, beside, put
from parts.models.methods.convlora import ConvLoRA, load_loss, with_convolutions
from parts.models.methods.lora import add_part_lora

RECORDINGS = Path(os.environ.get("RECORDINGS", Path(__file__).parents[1] / "data" / "baselines"))
EXACT, SINGLE = 1e-9, 1e-5  # relative to the largest entry
HEADS = 2  # of every recorded attention


def recording(name: str) -> dict[str, Tensor]:
    with np.load(RECORDINGS / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}


def under(arrays: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays whose names start with a prefix, by the rest of their names."""
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    assert found, prefix
    return found


def assert_near(found: Tensor | None, expected: Tensor, bound: float, name: str) -> None:
    assert found is not None, name
    assert found.shape == expected.shape, name
    deviation = (found - expected).abs().max() / expected.abs().max()
    assert deviation <= bound, f"{name} deviates by {deviation:.1e}"


class Official:
    """The parameters of a module under the names that they have in the official code.

    Args:
        module: The module.
        names: Pairs of a pattern of official names and what it is here. What follows a colon there
            is an index, as of LoRA's factors for query and value, which are two parameters there.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self.module, self.names = module, names

    def place(self, name: str) -> tuple[nn.Parameter, object]:
        """Where the parameter of an official name is."""
        for pattern, here in self.names.items():
            name = re.sub(pattern, here, name)
        name, _, index = name.partition(":")
        return self.module.get_parameter(name), int(index) if index else ...

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Give the parameters their recorded values."""
        for name, value in weights.items():
            parameter, index = self.place(name)
            assert parameter[index].shape == value.shape, name
            parameter[index] = value.to(parameter.dtype)

    def assert_gradients(self, expected: Mapping[str, Tensor], bound: float) -> None:
        """Assert recorded gradients."""
        for name, value in expected.items():
            parameter, index = self.place(name)
            assert_near(parameter.grad[index], value, bound, name)


# --- AdaptFormer ---------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention with separate projections, and no positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(-2, -3) for p in projections)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(-2, -3).flatten(-2))


class ViTBlock(nn.Module):
    """A plain block of a vision transformer."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim)
        self.fc1, self.fc2 = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


ADAPTFORMER = {r"^adaptmlp\.": "adapter.", r"\b(down|up)_proj\b": r"\1"}


def test_adaptformer() -> None:
    arrays = recording("adaptformer")
    x, c = arrays["x"].double(), arrays["c"].double()
    width, dim = arrays["block_p_adaptmlp.down_proj.weight"].shape
    block = ViTBlock(dim, len(arrays["block_p_fc1.weight"])).double().eval()
    assert add_adaptformer(block, width) == 1
    block.double().eval()
    assert max(p.abs().max() for p in block.adapter.up.parameters()) == arrays["up_at_start_max"]
    assert block.adapter.down.bias.abs().max() == arrays["down_bias_at_start_max"]
    for prefix, module in (("adapter", block.adapter), ("block", block)):
        official = Official(module, ADAPTFORMER)
        official.load(under(arrays, f"{prefix}_p_"))
        block.zero_grad()
        given = x.clone().requires_grad_()
        y = module(given)
        (y * c).sum().backward()
        assert_near(y, arrays[f"{prefix}_y"], EXACT, prefix)
        assert_near(given.grad, arrays[f"{prefix}_g_x"], EXACT, prefix)
        official.assert_gradients(under(arrays, f"{prefix}_gp_"), EXACT)


# --- adapters and LoRA in blocks of SAM ----------------------------------------------------------


class ReleasedBlock(Block):
    """SAM's block as the released code of SU-SAM has it, which none of the methods here has.

    Windows are cut before the first LayerNorm, so that padding is the LayerNorm's bias. The series
    variant lacks the output of the MLP, and the parallel one has the attention one and a half
    times. A call of `forward` leaves out hooks, and with them the adapter.
    """

    variant = ""

    def forward(self, x: Tensor) -> Tensor:
        windows, size = x, x.shape[1:3]
        if self.window_size:
            windows, padded = window_partition(x, self.window_size)
        n1 = self.norm1(windows)
        attention = self.attn(n1)
        if self.variant == "parallel":
            attention = attention + 0.5 * self.attn.forward(n1)
        if self.window_size:
            attention = window_unpartition(attention, self.window_size, padded, size)
        u = x + attention
        n2 = self.norm2(u)
        mlp = self.mlp(n2)
        if self.variant == "series":
            mlp = mlp - self.mlp.forward(n2)
        return u + mlp


# Adapters at attention and MLP; query and value have factors of LoRA.
IN_SAM = {
    r"^Space_Adapter\w*": "attn.adapter",
    r"^MLP_Adapter\w*": "mlp.adapter",
    r"\bD_fc1\b": "down",
    r"\bD_fc2\b": "up",
    r"^w_(a|b)_linear_(q|v).weight": r"attn.qkv.parts.\1:\2",
    r"parts\.a": "parts.down",
    r"parts\.b": "parts.up",
    r":q": ":0",
    r":v": ":1",
}


def add_variant(block: Block, name: str, variant: str, rank: int | None) -> None:
    """Add what a recorded variant has, by the method that it is if there is one."""
    at_attention, at_mlp = (block.attn, block.norm2), (block.mlp, block.norm2)
    methods = {
        ("susam", "series"): "su-sam-series",
        ("susam", "mixed"): "su-sam-mixed",
        ("infosam_adapters", "type0"): "adapter",
        ("infosam_adapters", "type1"): "su-sam-parallel",
        ("infosam_adapters", "type2"): "su-sam-mixed",
    }
    if (name, variant) in methods:
        add_adapters(block, methods[name, variant])
    elif (name, variant) == ("susam", "parallel"):
        put(*at_attention, behind, 0.5)
        put(*at_mlp, beside, 0.5)
    elif (name, variant) == ("infosam_adapters", "type5"):  # the authors' AdaptFormer
        put(*at_mlp, beside, 0.5)
    else:
        assert (name, variant) == ("susam", "lora")
        add_part_lora(block, rank, heads=False)


def sam_block(kind: type[Block], arrays: Mapping[str, Tensor], place: str) -> Block:
    """A block with its recorded weights."""
    weights = under(arrays, f"{place}_p_")
    width, dim = weights["mlp.lin1.weight"].shape
    block = kind(
        dim,
        HEADS,
        mlp_ratio=(width + 0.5) / dim,  # of which the whole part counts
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=int(arrays["window_size"]) if place.startswith("window") else 0,
        input_size=tuple(arrays["x"].shape[1:3]),
    )
    block.load_state_dict(weights)
    return block.double()


def variants(name: str) -> Iterator[tuple[dict[str, Tensor], str, str]]:
    """The arrays, and each pair of a recorded block and of what was added to it."""
    arrays = recording(name)
    outputs = [re.fullmatch(r"([^_]+)_y_(\w+)", key) for key in arrays]
    pairs = [match.groups() for match in outputs if match]
    assert pairs
    return ((arrays, *pair) for pair in pairs)


@pytest.mark.parametrize(("name", "kind"), [("susam", ReleasedBlock), ("infosam_adapters", Block)])
def test_blocks_of_sam(name: str, kind: type[Block]) -> None:
    for arrays, place, variant in variants(name):
        case, c = f"{place}_y_{variant}", arrays["c"].double()
        x = arrays["x"].double().requires_grad_()
        if variant == "sam":
            assert_near(sam_block(Block, arrays, place)(x), arrays[case], EXACT, case)
            continue
        block = sam_block(kind, arrays, place)
        block.variant = variant
        weights = under(arrays, f"a_{variant}_")
        rank = len(weights["w_a_linear_q.weight"]) if variant == "lora" else None
        add_variant(block, name, variant, rank)
        official = Official(block.double(), IN_SAM)
        official.load(weights)
        y = block(x)
        (y * c).sum().backward()
        assert_near(y, arrays[case], EXACT, case)
        assert_near(x.grad, arrays[f"{place}_g_x_{variant}"], EXACT, case)
        gradients = under(arrays, f"{place}_gp_{variant}_")
        assert gradients.keys() == weights.keys()
        official.assert_gradients(gradients, EXACT)


# --- Conv-LoRA -----------------------------------------------------------------------------------

CONV_LORA = {
    r"^lora_A": "conv_lora.down.weight",
    r"^lora_B": "conv_lora.up.weight",
    r"^lora_moe_gating\.w_": "conv_lora.",
    r"^lora_moe_experts\.(\d+)\.0": r"conv_lora.experts.\1",
}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_conv_lora(mode: str, monkeypatch) -> None:
    arrays = recording("convlora")
    monkeypatch.setattr(torch, "randn_like", lambda like: arrays["noise"])
    layer = nn.Linear(*arrays["p_weight"].T.shape)
    layer.conv_lora = ConvLoRA(layer, len(arrays["p_lora_A"]))
    assert layer.conv_lora.gate.abs().max() == arrays["gate_at_start_max"]
    layer.register_forward_hook(with_convolutions)
    layer.train(mode == "train")
    official = Official(layer, CONV_LORA)
    weights = under(arrays, "p_")
    # The other two are those of the standard normal distribution.
    assert weights.pop("lora_moe_gating.mean") == 0
    assert weights.pop("lora_moe_gating.std") == 1
    official.load(weights)

    x = arrays["x"].clone().requires_grad_()
    y = layer(x)
    objective = (y * arrays["c"]).sum()
    if mode == "train":
        objective = objective + 100 * load_loss(layer)
    objective.backward()
    assert_near(y, arrays[f"{mode}_y"], SINGLE, "output")
    assert_near(load_loss(layer), arrays[f"{mode}_moe_loss"], SINGLE, "load loss")
    assert_near(x.grad, arrays[f"{mode}_g_x"], SINGLE, "gradient of the input")
    gradients = under(arrays, f"{mode}_gp_")
    official.assert_gradients(gradients, SINGLE)
    # Experts that are not chosen, and the gate in evaluation, have none.
    for name in weights.keys() - gradients.keys() - {"weight"}:
        parameter, _ = official.place(name)
        assert parameter.grad is None or not parameter.grad.any(), name
    maps = layer.conv_lora.down(x).permute(0, 3, 1, 2)
    assert torch.equal(layer.conv_lora.choose(maps), arrays[f"{mode}_expert"])
