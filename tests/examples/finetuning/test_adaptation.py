"""What fine-tuning adds to the models, and what trains."""

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from finetuning_runs import BUILDS, IMPOSSIBLE, build, build_once, combinations
from torch import Tensor, nn

from parts.data.prompts import Prompts
from parts.errors import InputError
from parts.models import huggingface
from parts.models.adaptation import adapt, load_trainable_state, trainable_state
from parts.models.methods.adapters import PLACES, Adapter
from parts.models.methods.convlora import ConvLoRA, load_loss
from parts.options import METHODS
from parts.runs.trained import merge_lora

SIZE = 256
IN_THE_ENCODER = [method for method in METHODS if method != "hq-sam"]  # that has test_hqsam.py


def intended(method: str, encoder: nn.Module) -> set[str]:
    """What should train of an encoder, by the names of its layers before they are adapted."""
    layers = [name for name, _ in encoder.named_modules()]
    qkv = [name for name in layers if name.endswith(".qkv")]
    attentions = [name for name in layers if name.endswith(".attn")]
    blocks = [name.removesuffix(".attn") for name in attentions]
    parts = {f"{name}.parts.{factor}" for name in qkv for factor in ("down", "up")}
    bottleneck = [f"{factor}.{part}" for factor in ("down", "up") for part in ("weight", "bias")]
    convolutional = ["down.weight", "up.weight", "gate", "noise"]
    convolutional += [f"experts.{k}.{part}" for k in range(8) for part in ("weight", "bias")]
    at_both = {
        f"{block}.{layer}.adapter.{part}"
        for block in blocks
        for layer in ("attn", "mlp")
        for part in bottleneck
    }
    return {
        "lora": {f"{name}.lora_{factor}.default.weight" for name in qkv for factor in "AB"},
        "lora-heads": parts,
        "su-sam-lora": parts,
        "conv-lora": {f"{name}.conv_lora.{part}" for name in qkv for part in convolutional},
        "adaptformer": {f"{block}.adapter.{part}" for block in blocks for part in bottleneck},
        **dict.fromkeys(PLACES, at_both),
        "bitfit": {name for name, _ in encoder.named_parameters() if name.endswith(".bias")},
        "decoder": set(),
    }[method]


def first_or_mixed(family: str, method: str) -> bool:
    """Adapters are where the packages differ: their attention returns a tensor, or a tuple.

    A mixed one is behind the attention and beside the MLP; beside the attention there may be one in
    transformers' SAM, which calls it by the name of its argument.
    """
    beside_attention = (family, method) == ("transformers-sam", "su-sam-parallel")
    return family == "sam" or method == "su-sam-mixed" or beside_attention


@pytest.mark.parametrize(("family", "method"), combinations(IN_THE_ENCODER, first_or_mixed))
@torch.no_grad()
def test_adaptation(family: str, method: str, inputs) -> None:
    image, box, point, label = (part[:1] for part in inputs)

    def masks(model: nn.Module) -> Tensor:
        levels = model.encode(image)  # one pass for both prompts, as it takes most of the time
        prompts = Prompts(box), Prompts(points=point, labels=label)
        return torch.cat([model.decode(levels, prompt) for prompt in prompts])

    teacher = build(family)
    before = masks(teacher)
    assert before.shape == (2, SIZE // 4, SIZE // 4)
    assert not torch.equal(*before)
    student = copy.deepcopy(teacher)
    adapt(student, method, targets=["qkv"])
    student.eval()
    # The student starts as the teacher, to the bit.
    assert torch.equal(masks(student), before)

    trains = {name for name, p in student.encoder.named_parameters() if p.requires_grad}
    assert trains == intended(method, teacher.encoder)
    assert bool(trains) == (method != "decoder")
    heads = ("iou_prediction_head.", "pred_obj_score_head.")
    for name, parameter in student.decoder.named_parameters():
        assert parameter.requires_grad != name.startswith(heads), name
    others = set(student.model.parameters()) - {*student.encoder.parameters()}
    others -= {*student.decoder.parameters()}
    assert not any(p.requires_grad for p in others)

    # A copy has its own adapters, and takes over what was saved.
    other = copy.deepcopy(student)
    saved = trainable_state(other)
    for parameter in saved.values():
        parameter.add_(0.1 * torch.randn_like(parameter))
    changed = masks(other)
    assert not torch.equal(changed, before)
    assert torch.equal(masks(student), before)
    load_trainable_state(student, saved)
    assert torch.equal(masks(student), changed)
    assert torch.equal(masks(teacher), before)


def first_blocks(family: str, methods: Iterable[str], rank: int) -> dict[str, nn.Module]:
    """The first block of an encoder by method, in float64, with random values where it trains."""
    blocks = {}
    for method in methods:
        student = build(family)
        adapt(student, method, rank=rank, targets=["qkv"])
        encoder = student.encoder.double().eval()
        for parameter in (p for p in encoder.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter)
        blocks[method] = next(m for m in encoder.modules() if hasattr(m, "attn"))
    return blocks


@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_added_factors_follow_their_formulas(family: str) -> None:
    rank = 3
    blocks = first_blocks(family, ["lora", "lora-heads", "su-sam-lora", "decoder"], rank)
    plain = blocks["decoder"]
    x = torch.randn(2, 8, 8, plain.attn.qkv.in_features, dtype=torch.float64)
    width = plain.attn.qkv.out_features // 3

    lora = blocks["lora"].attn.qkv
    down, up = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    assert len(down) == rank
    torch.testing.assert_close(lora(x), plain.attn.qkv(x) + x @ down.T @ up.T)

    # Query, key and value of each head, each with its own pair of factors.
    lora = blocks["lora-heads"].attn.qkv
    count = getattr(plain.attn, "num_heads", None) or plain.attn.num_attention_heads
    assert lora.parts.down.shape == (3 * count, rank, x.shape[-1])
    assert lora.parts.up.shape == (3 * count, width // count, rank)
    pairs = zip(lora.parts.down, lora.parts.up, strict=True)
    added = torch.cat([x @ down.T @ up.T for down, up in pairs], dim=-1)
    torch.testing.assert_close(lora(x), plain.attn.qkv(x) + added)

    # Query and value, each of all heads.
    lora = blocks["su-sam-lora"].attn.qkv
    assert lora.parts.down.shape == (2, rank, x.shape[-1])
    assert lora.parts.up.shape == (2, width, rank)
    query, value = (x @ d.T @ u.T for d, u in zip(lora.parts.down, lora.parts.up, strict=True))
    added = torch.cat([query, torch.zeros_like(query), value], dim=-1)
    torch.testing.assert_close(lora(x), plain.attn.qkv(x) + added)


@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_blocks_with_adapters_follow_their_formulas(family: str) -> None:
    methods = [*PLACES, "adaptformer"]
    methods = [method for method in methods if (family, method) not in IMPOSSIBLE]
    blocks = first_blocks(family, ["decoder", *methods], rank=1)
    plain = blocks["decoder"]
    norm1, norm2 = (m for m in plain.children() if isinstance(m, nn.LayerNorm))
    # There is padding in windows of 7, 8 or 14 places.
    x = torch.randn(2, 10, 10, *norm1.normalized_shape, dtype=torch.float64)
    before_mlp = []
    with norm2.register_forward_pre_hook(lambda _, inputs: before_mlp.append(inputs[0])):
        plain(x)
    attention = before_mlp[0] - x

    def a(adapter: nn.Module, x: Tensor, activation: nn.Module, width: int) -> Tensor:
        assert adapter.down.weight.shape == (width, x.shape[-1])
        narrow = activation(x @ adapter.down.weight.T + adapter.down.bias)
        return narrow @ adapter.up.weight.T + adapter.up.bias

    for method in methods:
        block, quarter = blocks[method], x.shape[-1] // 4

        def at(name: str, x: Tensor, block=block, width=quarter) -> Tensor:
            return a(block.get_submodule(f"{name}.adapter"), x, nn.GELU(), width)

        if method == "adaptformer":
            u = x + attention
            expected = u + plain.mlp(norm2(u)) + 0.1 * a(block.adapter, u, nn.ReLU(), 64)
        else:
            parallel = method == "su-sam-parallel"
            beside = 0.5 * at("attn", norm1(x)) if parallel else at("attn", attention)
            u = x + attention + beside
            n, scale = norm2(u), 1 if method == "adapter" else 0.5
            series = method in ("adapter", "su-sam-series")
            v = plain.mlp(n)
            expected = u + v + scale * at("mlp", v if series else n)
        torch.testing.assert_close(block(x), expected, msg=method)


def conv_lora_by_hand(layer: nn.Module, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and load loss map by map, from the formulas."""
    h = (x @ layer.down.weight.T).permute(0, 3, 1, 2)
    g = h.mean((2, 3))
    clean, seen = g @ layer.gate, []
    deviation = torch.log1p(torch.exp(g @ layer.noise)) + 0.01
    logits = clean if noise is None else clean + noise * deviation
    importance, load = torch.zeros(2, 8, dtype=x.dtype)
    for one, row, center, spread in zip(h, logits, clean, deviation, strict=True):
        chosen = int(row.argmax())
        importance[chosen] += 1
        for k in range(8):
            others = torch.cat([row[:k], row[k + 1 :]]).max()
            load[k] += 0.5 * (1 + torch.erf((center[k] - others) / spread[k] / 2**0.5))
        larger = nn.Upsample(scale_factor=chosen + 1, mode="bicubic")
        back = nn.Upsample(size=one.shape[1:], mode="bicubic")
        seen.append(back(nn.GELU()(layer.experts[chosen](larger(one[None])))))
    output = (h + torch.cat(seen)).permute(0, 2, 3, 1) @ layer.up.weight.T
    loads = importance, importance if noise is None else load
    return output, sum(0.01 * v.var() / (v.mean() ** 2 + 1e-10) for v in loads)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_conv_lora_follows_its_formula(family: str, training: bool, monkeypatch) -> None:
    blocks = first_blocks(family, ["conv-lora", "decoder"], rank=3)
    qkv, plain = blocks["conv-lora"].attn.qkv, blocks["decoder"].attn.qkv
    x = torch.randn(12, 6, 9, plain.in_features, dtype=torch.float64)
    noise = torch.randn(12, 8, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    added, loss = conv_lora_by_hand(qkv.conv_lora, x, noise if training else None)
    torch.testing.assert_close(qkv.train(training)(x), plain(x) + added)
    torch.testing.assert_close(qkv.conv_lora.load_loss, loss)


def test_the_load_loss_trains_the_gates(inputs) -> None:
    student = build("sam")
    assert load_loss(student) is None
    adapt(student, "conv-lora", targets=["qkv"])
    assert load_loss(student) is None
    layers = [m for m in student.modules() if isinstance(m, ConvLoRA)]
    for layer in layers:
        torch.nn.init.normal_(layer.up.weight, std=0.1)
    images, boxes, *_ = inputs
    student.train()(images, Prompts(boxes)).mean().backward(retain_graph=True)
    assert all(layer.gate.grad is None and layer.noise.grad is None for layer in layers)
    loss = load_loss(student)
    torch.testing.assert_close(loss, sum(layer.load_loss for layer in layers))
    loss.backward()
    # Those of experts without a map as well, for DistributedDataParallel.
    assert all(p.grad is not None for p in student.encoder.parameters() if p.requires_grad)
    assert all(layer.gate.grad.any() for layer in layers)
    # It is no part of a copy, which could not have its graph.
    assert load_loss(copy.deepcopy(student)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conv_lora_in_half_precision(dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 12)
    add = ConvLoRA(layer, 4)
    torch.nn.init.normal_(add.up.weight)
    x = 30 * torch.randn(6, 5, 5, 8)  # exp of it would overflow
    exact, loss = add.eval()(x), add.load_loss
    with torch.autocast("cpu", dtype):
        rounded = add(x)
    assert rounded.dtype == dtype
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert error < 10 * torch.finfo(dtype).eps
    assert add.load_loss.dtype == torch.float32
    assert add.load_loss == loss


def test_dropout_of_adaptformer(inputs) -> None:
    student = build("sam")
    adapt(student, "adaptformer", targets=["qkv"])
    adapter = next(m for m in student.encoder.modules() if isinstance(m, Adapter))
    assert not adapter.down.bias.any()
    torch.nn.init.eye_(adapter.up.weight)
    torch.nn.init.zeros_(adapter.down.weight)
    torch.nn.init.ones_(adapter.down.bias)
    x = torch.zeros(10_000, adapter.down.in_features)
    torch.testing.assert_close(adapter.eval()(x)[:, :64], torch.full((10_000, 64), 0.1))
    kept, counts = adapter.train()(x)[:, :64].unique(return_counts=True)
    torch.testing.assert_close(kept, torch.tensor([0, 0.1 / 0.9]))
    assert counts[0] / counts.sum() == pytest.approx(0.1, abs=0.002)
    # A model that has just trained can be copied.
    student.train()(inputs[0], Prompts(inputs[1])).mean().backward()
    copy.deepcopy(student)


@pytest.mark.parametrize("family", sorted(family for family, _ in IMPOSSIBLE))
def test_methods_that_a_model_is_not_made_for(family: str) -> None:
    student = build(family)
    with pytest.raises(InputError, match=r"--method su-sam-parallel .* su-sam-mixed or adaptf"):
        adapt(student, "su-sam-parallel", targets=["qkv"])
    assert student.state_dict().keys() == build_once(family).state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_added_is_where_the_model_is(method: str) -> None:
    student = build("sam").to("meta")
    adapt(student, method, targets=["qkv"])
    assert {p.device.type for p in student.parameters()} == {"meta"}


@pytest.mark.parametrize("family", BUILDS)
def test_one_prompt_for_each_of_many_pictures(family: str, inputs) -> None:
    images, boxes, points, labels = inputs
    model = build(family)
    with torch.no_grad():
        for prompts in (Prompts(boxes), Prompts(points=points, labels=labels)):
            together = model(images, prompts)
            for i in range(2):
                own = Prompts(*(part if part is None else part[i : i + 1] for part in prompts))
                alone = model(images[i : i + 1], own)[0]
                torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["transformers-sam", "transformers-sam2"])
@torch.no_grad()
def test_logits_are_those_of_transformers(family: str, inputs) -> None:
    images, boxes, points, labels = inputs
    model = build(family)
    if family == "transformers-sam2":
        model.model.no_memory_embedding.normal_()  # zero in a new model
    asked = [
        (Prompts(boxes), {"input_boxes": boxes[:, None]}),
        (
            Prompts(points=points, labels=labels),
            {"input_points": points[:, None], "input_labels": labels[:, None]},
        ),
    ]
    for prompts, keywords in asked:
        output = model.model(pixel_values=images, multimask_output=False, **keywords)
        torch.testing.assert_close(model(images, prompts), output.pred_masks[:, 0, 0])


@pytest.mark.parametrize("method", ["lora", "su-sam-lora"])
@pytest.mark.parametrize("family", ["sam", "sam2"])
def test_merged_state_is_official(family: str, method: str) -> None:
    student, official = build(family), build(family).state_dict()
    adapt(student, method, targets=["qkv", "proj"])  # there is a convolution of the latter name
    merge_lora(student)
    assert student.state_dict().keys() == official.keys()


def test_half_precision_folder_trains_in_float32(tmp_path: Path) -> None:
    huggingface.tiny_sam().half().save_pretrained(tmp_path)
    student = huggingface.build(str(tmp_path))
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_wrong_state_is_refused() -> None:
    lora, decoder = build("sam"), build("sam")
    adapt(lora, "lora", targets=["qkv"])
    adapt(decoder, "decoder", targets=["qkv"])
    with pytest.raises(ValueError, match="adapted in the same way"):
        load_trainable_state(lora, trainable_state(decoder))


@pytest.mark.parametrize("family", BUILDS)
def test_targets_that_match_nothing(family: str) -> None:
    with pytest.raises(ValueError, match=r"no match\. Its linear layers are called .*qkv"):
        adapt(build(family), "lora", targets=["query", "value"])
