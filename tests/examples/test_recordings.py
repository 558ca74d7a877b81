"""The compared systems give what their official code gave: values, and gradients.

The recordings are in the folder that the variable RECORDINGS names, or in tests/data/baselines,
whose README says where they are from and what is in them. Under `pytest -s` the worst deviation of
each test is printed.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.image_encoder import Block, window_partition, window_unpartition
from torch import Tensor, nn

from parts.distillers.base import Pass
from parts.distillers.ibd import AttendedMaps
from parts.distillers.logit import divergence, two_classes
from parts.distillers.mobilesam import MobileSAM
from parts.distillers.pkd import PKD
from parts.distillers.pkt import neighbour_divergence
from parts.distillers.reviewkd import ReviewKD, pyramid_distance
from parts.distillers.semckd import SemCKD
from parts.distillers.tinysam import TinySAM, hardness, iou
from parts.distillers.vid import VID
from parts.models.methods.adapters import add_adapters, add_adaptformer, behind, beside, put
from parts.models.methods.convlora import ConvLoRA, load_loss, with_convolutions
from parts.models.methods.hqsam import NEW, add_hq_to_decoder, attach
from parts.models.methods.lora import add_part_lora
from parts.training.point_loss import bce_and_dice, draw_points, losses_at, sample

FOLDER = Path(os.environ.get("RECORDINGS", Path(__file__).parents[1] / "data" / "baselines"))
DOUBLE, SINGLE = 1e-9, 1e-5  # relative to the largest entry
HEADS = 2  # of every recorded attention
NO_MASKS = torch.zeros(1, 1, 1, dtype=torch.bool)
# Gradients that are zero in exact arithmetic were recorded as the rounding of others.
SMALLEST = 1e-7
WORST: dict[str, float] = {}


def recording(name: str) -> dict[str, Tensor]:
    """Return the arrays of a file."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}


def under(arrays: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the arrays whose names start with a prefix, by the rest of their names."""
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    assert found, prefix
    return found


def assert_near(found: Tensor | None, expected: Tensor, bound: float, name: str) -> None:
    """Assert that a tensor is the recorded one, relative to the largest entry of that."""
    assert found is not None, name
    assert found.shape == expected.shape, name
    scale = max(expected.abs().max().item(), SMALLEST)
    deviation = (found.double() - expected.double()).abs().max().item() / scale
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
    WORST[test] = max(WORST.get(test, 0.0), deviation)
    assert deviation <= bound, f"{name} deviates by {deviation:.1e}"


@pytest.fixture(scope="module", autouse=True)
def show_deviations() -> Iterator[None]:
    """Print the worst deviation of each test after the last one."""
    yield
    for name, deviation in WORST.items():
        print(f"\n{name}: {deviation:.1e}", end="")


class Recording:
    """The arrays of a file, in float64, and what was compared with them.

    A prefix of names, such as `pyramid_`, stands for a case of its own.
    """

    def __init__(self, name: str, prefix: str = "") -> None:
        arrays = recording(name)
        self.arrays = {
            key.removeprefix(prefix): array
            for key, array in arrays.items()
            if key.startswith(prefix)
        }

    def __getitem__(self, key: str) -> Tensor:
        """Return an array, those of floating point in float64."""
        array = self.arrays[key]
        return array.double() if array.is_floating_point() else array

    def input(self, key: str) -> Tensor:
        """Return an array as a leaf that learns."""
        return self[key].requires_grad_()

    def layers(self, kind: str) -> list[Tensor]:
        """Return the layers `s0`, `s1`, ... or `t0`, `t1`, ..."""
        count = len([key for key in self.arrays if re.fullmatch(rf"{kind}\d+", key)])
        return [self.input(f"{kind}{i}") for i in range(count)]

    def load(self, module: nn.Module, official: Callable[[str], str]) -> None:
        """Load the recorded parameters, all of them, by the official name of each of ours."""
        module.double()
        names = {name: official(name) for name, _ in module.named_parameters()}
        recorded = {key.removeprefix("p_") for key in self.arrays if key.startswith("p_")}
        assert set(names.values()) == recorded
        module.load_state_dict({name: self[f"p_{theirs}"] for name, theirs in names.items()})

    def same(self, found: Tensor, key: str) -> None:
        """Assert that a tensor is the recorded one."""
        assert_near(found, self[key], DOUBLE, key)

    def same_gradients(self, loss: Tensor, inputs: dict[str, Tensor]) -> None:
        """Assert that the gradients of a loss are the recorded ones, by the names of those."""
        found = torch.autograd.grad(loss, inputs.values(), materialize_grads=True)
        for gradient, key in zip(found, inputs, strict=True):
            self.same(gradient, key)

    def same_gradients_of(
        self, loss: Tensor, module: nn.Module, official: Callable[[str], str], layers: list[Tensor]
    ) -> None:
        """Do so for the parameters of a module and the student's layers."""
        parameters = {f"gp_{official(name)}": p for name, p in module.named_parameters()}
        self.same_gradients(loss, parameters | {f"g_s{i}": s for i, s in enumerate(layers)})


def renaming(*pairs: tuple[str, str]) -> Callable[[str], str]:
    """Return a function that replaces patterns in a name, one after the other."""

    def rename(name: str) -> str:
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


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


# --- distillers ----------------------------------------------------------------------------------


def test_logit() -> None:
    recording = Recording("logit")
    student = recording.input("mc_s")
    loss = divergence(student, recording["mc_t"], 3.0)
    recording.same(loss, "mc_loss")
    recording.same_gradients(loss, {"mc_g_s": student})
    student, teacher = recording.input("s"), recording["t"]
    loss = divergence(two_classes(student), two_classes(teacher), 3.0)
    recording.same(loss, "loss")
    recording.same_gradients(loss, {"g_s": student})
    equal = divergence(two_classes(teacher), two_classes(teacher), 3.0)
    torch.testing.assert_close(equal, recording["loss_equal"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("prefix", ["", "resized_"])
def test_pkd(prefix: str) -> None:
    recording = Recording("pkd", prefix)
    student = recording.input("s")
    loss = PKD()(Pass(embedding=recording["t"]), Pass(embedding=student), NO_MASKS)
    recording.same(loss, "loss")
    recording.same_gradients(loss, {"g_s": student})


@pytest.mark.parametrize("kind", ["flat", "pooled"])
def test_pkt(kind: str) -> None:
    recording = Recording("pkt")
    student, teacher = recording.input("s"), recording["t"]
    rows = [x.flatten(1) if kind == "flat" else x.mean((2, 3)) for x in (student, teacher)]
    loss = neighbour_divergence(*rows)
    recording.same(loss, f"{kind}_loss")
    recording.same_gradients(loss, {f"{kind}_g_s": student})


def test_vid() -> None:
    recording = Recording("vid")
    student, teacher = recording.layers("s"), recording.layers("t")
    module = VID([s.shape[1] for s in student], [t.shape[1] for t in teacher]).double()
    start = recording["log_scale_at_start"].item()
    for pair in module.pairs:
        assert pair.raw_variance.tolist() == pytest.approx([start] * len(pair.raw_variance))
    official = renaming(
        (r"pairs\.(\d+)\.", r"\1."), ("raw_variance", "log_scale"), ("mean", "regressor")
    )
    recording.load(module, official)
    each = zip(module.pairs, student, teacher, strict=True)
    recording.same(torch.stack([pair(s, t) for pair, s, t in each]), "losses")
    loss = module(Pass(layers=teacher), Pass(layers=student), NO_MASKS)
    recording.same(loss, "loss")
    recording.same_gradients_of(loss, module, official, student)


def test_ibd() -> None:
    recording = Recording("ibd")
    student, teacher = recording.layers("s"), recording.layers("t")
    channels = [[x.shape[1] for x in layers] for layers in (student, teacher)]
    module = AttendedMaps(*channels, width=recording["p_attention.p_s"].shape[1])
    official = renaming(
        ("student_places", "attention.p_s"),
        ("teacher_places", "attention.p_t"),
        (r"keys\.(\d+)", r"attention.linear_trans_s.key_layer.\1"),
        (r"queries\.(\d+)", r"attention.linear_trans_t.query_layer.\1"),
        ("for_each_query", "attention.linear_trans_s.bilinear"),
        (r"\.0\.(weight|bias)", r".linear.\1"),
        (r"\.1\.(weight|bias)", r".bn.\1"),
    )
    recording.load(module, official)
    recording.same(module.attention(student, teacher), "attention")
    losses = module(student, teacher)
    recording.same(losses, "losses")
    recording.same(losses.sum(), "loss")
    recording.same_gradients_of(losses.sum(), module, official, student)


@pytest.mark.parametrize("prefix", ["", "b4_"])
def test_semckd(prefix: str) -> None:
    recording = Recording("semckd", prefix)
    student, teacher = recording.layers("s"), recording.layers("t")
    channels = [[x.shape[1] for x in layers] for layers in (student, teacher)]
    module = SemCKD(*channels, batch=len(student[0]))
    official = renaming(
        (r"queries\.(\d+)", r"query_weight\1"),
        (r"keys\.(\d+)", r"key_weight\1"),
        (r"(weight\d+)\.1", r"\1.linear1"),
        (r"(weight\d+)\.3", r"\1.linear2"),
        (r"regressors\.(\d+)\.(\d+)", r"regressor\1\2.regressor"),
    )
    recording.load(module, official)
    recording.same(module.attention(student, teacher), "attention")
    loss = module(Pass(layers=teacher), Pass(layers=student), NO_MASKS)
    recording.same(loss, "loss")
    recording.same_gradients_of(loss, module, official, student)


@pytest.mark.parametrize("prefix", ["", "pyramid_"])
def test_reviewkd(prefix: str) -> None:
    recording = Recording("reviewkd", prefix)
    student, teacher = recording.layers("s"), recording.layers("t")
    channels = [[x.shape[1] for x in layers] for layers in (student, teacher)]
    module = ReviewKD(*channels, width=recording["p_abfs.0.conv1.0.weight"].shape[0])
    official = renaming(
        ("fusions", "abfs"), ("enter", "conv1"), ("leave", "conv2"), ("gate", "att_conv.0")
    )
    recording.load(module, official)
    fused = module.fused(student)
    recording.same(torch.stack([f.mean() for f in fused]), "fused_mean")
    recording.same(torch.stack([f.std() for f in fused]), "fused_std")
    pairs = zip(fused, teacher, strict=True)
    recording.same(torch.stack([pyramid_distance(*pair) for pair in pairs]), "losses")
    loss = module(Pass(layers=teacher), Pass(layers=student), NO_MASKS)
    recording.same(loss, "loss")
    recording.same_gradients_of(loss, module, official, student)


def test_mobilesam() -> None:
    recording = Recording("mobilesam")
    student = recording.input("s")
    loss = MobileSAM()(Pass(embedding=recording["t"]), Pass(embedding=student), NO_MASKS)
    recording.same(loss, "loss")
    recording.same_gradients(loss, {"g_s": student})


def test_tinysam() -> None:
    recording = Recording("tinysam")
    leaves = {f"g_{kind}_s": recording.input(f"{kind}_s") for kind in ("image", "token", "mask")}
    image, token, mask = leaves.values()
    of_student = Pass(embedding=image, tokens=token, logits=mask[:, 0])
    of_teacher = Pass(
        embedding=recording["image_t"],
        tokens=recording["token_t"],
        logits=recording["mask_t"][:, 0],
    )
    masks = recording["mask_true"][:, 0]
    for pass_, who in ((of_student, "s"), (of_teacher, "t")):
        recording.same(iou(pass_.logits > 0, masks), f"iou_{who}")
    recording.same(hardness(of_student.logits, of_teacher.logits, masks), "hardness")
    loss = TinySAM()(of_teacher, of_student, masks)
    recording.same(loss, "loss")
    recording.same_gradients(loss, leaves)


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
        assert_near(y, arrays[f"{prefix}_y"], DOUBLE, prefix)
        assert_near(given.grad, arrays[f"{prefix}_g_x"], DOUBLE, prefix)
        official.assert_gradients(under(arrays, f"{prefix}_gp_"), DOUBLE)


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
            assert_near(sam_block(Block, arrays, place)(x), arrays[case], DOUBLE, case)
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
        assert_near(y, arrays[case], DOUBLE, case)
        assert_near(x.grad, arrays[f"{place}_g_x_{variant}"], DOUBLE, case)
        gradients = under(arrays, f"{place}_gp_{variant}_")
        assert gradients.keys() == weights.keys()
        official.assert_gradients(gradients, DOUBLE)


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


# --- HQ-SAM --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """Return the arrays of HQ-SAM."""
    return recording("hqsam")


def decoder_of(recorded: dict[str, Tensor]) -> MaskDecoder:
    weights = {k.removeprefix("p_"): v.double() for k, v in recorded.items() if k[:2] == "p_"}
    dim = weights["iou_token.weight"].shape[1]
    depth = sum(k.startswith("transformer.") and k.endswith("norm4.weight") for k in weights)
    layers = [k for k in weights if k.startswith("iou_prediction_head.") and "weight" in k]
    decoder = MaskDecoder(
        transformer_dim=dim,
        transformer=TwoWayTransformer(
            depth=depth,
            embedding_dim=dim,
            num_heads=HEADS,
            mlp_dim=len(weights["transformer.layers.0.mlp.lin1.weight"]),
            attention_downsample_rate=dim
            // len(weights["transformer.final_attn_token_to_image.q_proj.weight"]),
        ),
        num_multimask_outputs=len(weights["mask_tokens.weight"]) - 1,
        iou_head_depth=len(layers),
        iou_head_hidden_dim=len(weights[layers[0]]),
    )
    add_hq_to_decoder(decoder, width=len(weights["compress_vit_feat.0.weight"]))
    decoder.double().load_state_dict(weights)
    return decoder.requires_grad_(False)


def together(
    decoder: nn.Module, recorded: dict[str, Tensor], multimask: bool
) -> tuple[Tensor, ...]:
    """Decode all images in one pass, as the training does."""
    embedding, pe, sparse, dense, early = inputs_of(recorded)
    attach(embedding, early)
    zeros = torch.zeros_like(embedding[:1])
    zeros.stands_for = embedding
    return decode(decoder, zeros, pe, sparse, dense + embedding, multimask)


def one_by_one(
    decoder: nn.Module, recorded: dict[str, Tensor], multimask: bool
) -> tuple[Tensor, ...]:
    """Decode each image by itself, as the official predictor does."""
    embedding, pe, sparse, dense, early = inputs_of(recorded)
    attach(embedding, early)
    parts = [
        decode(decoder, image[None], pe, *prompts, multimask)
        for image, *prompts in zip(embedding, sparse[:, None], dense[:, None], strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def inputs_of(recorded: dict[str, Tensor]) -> list[Tensor]:
    names = ("image_embeddings", "image_pe", "sparse", "dense", "interm")
    return [recorded[name].double() for name in names]


def decode(decoder: nn.Module, *given: object) -> tuple[Tensor, Tensor]:
    names = ("image_embeddings", "image_pe", "sparse_prompt_embeddings")
    names += ("dense_prompt_embeddings", "multimask_output")
    return decoder(**dict(zip(names, given, strict=True)))


@pytest.mark.parametrize("way", [together, one_by_one])
def test_hqsam(way, recorded: dict[str, Tensor]) -> None:
    decoder = decoder_of(recorded).train()
    new = {name: p for name, p in decoder.named_parameters() if name.startswith(NEW)}
    assert {f"gp_{name}" for name in new} == {name for name in recorded if name[:3] == "gp_"}
    for parameter in new.values():
        parameter.requires_grad_(True)
    masks, _ = way(decoder, recorded, False)
    assert_near(masks.detach(), recorded["masks_hq"], DOUBLE, "hq")
    (masks * recorded["c"].double()).sum().backward()
    for name, parameter in new.items():
        assert_near(parameter.grad, recorded[f"gp_{name}"], DOUBLE, "hq")

    decoder.eval()
    with torch.no_grad():
        masks, iou = way(decoder, recorded, False)
        assert_near(masks, recorded["masks_sum"], SINGLE, "hq")
        several, _ = way(decoder, recorded, True)
        assert_near(several, recorded["masks_multi"], SINGLE, "hq")
    assert_near(iou, recorded["iou"], DOUBLE, "hq")


def test_loss_of_hqsam_at_points(recorded: dict[str, Tensor]) -> None:
    logits = recorded["loss_logits"][:, 0].double().requires_grad_(True)
    masks, points = recorded["loss_target"][:, 0], recorded["loss_points"].double()
    # The recorded logits are those of the recording rounded to single precision, which shows in
    # what is sampled. Anything else is held to more, as sampling is linear.
    sampled = sample(logits, points)
    assert_near(sampled.detach(), recorded["point_logits"], SINGLE, "hq")
    assert_near(sample(masks.double(), points), recorded["point_targets"], DOUBLE, "hq")
    for found, name in zip(losses_at(points, logits, masks), ("bce", "dice"), strict=True):
        assert_near(found.detach(), recorded[f"point_{name}"], SINGLE, "hq")

    exact = recorded["point_logits"].requires_grad_(True)
    bce, dice = bce_and_dice(exact, recorded["point_targets"], torch.ones_like(exact))
    assert_near(bce.detach(), recorded["point_bce"], DOUBLE, "hq")
    assert_near(dice.detach(), recorded["point_dice"], DOUBLE, "hq")
    (bce + dice).backward()
    sampled.backward(exact.grad)
    assert_near(logits.grad, recorded["point_g_logits"][:, 0], DOUBLE, "hq")


def test_loss_of_hqsam_at_drawn_points(recorded: dict[str, Tensor]) -> None:
    logits = recorded["loss_logits"][:, 0]
    points = draw_points(logits, generator=torch.Generator().manual_seed(12345))
    bce, dice = losses_at(points, logits, recorded["loss_target"][:, 0])
    assert_near(bce, recorded["sampled_bce_seed12345_float32"], SINGLE, "hq")
    assert_near(dice, recorded["sampled_dice_seed12345_float32"], SINGLE, "hq")
