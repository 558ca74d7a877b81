"""What fine-tuning adds to the models, and what trains."""

import copy
from pathlib import Path

import pytest
import torch
from finetuning_runs import BUILDS, build, combinations
from torch import Tensor, nn

from parts.data.prompts import Prompts
from parts.models import huggingface
from parts.models.adaptation import adapt, load_trainable_state, trainable_state
from parts.models.methods.adapters import add_adapters
from parts.options import METHODS
from parts.runs.trained import merge_lora

SIZE = 256


def intended(method: str, encoder: nn.Module) -> set[str]:
    """What should train of an encoder, by the names of its layers before they are adapted."""
    layers = [name for name, _ in encoder.named_modules()]
    qkv = [name for name in layers if name.endswith(".qkv")]
    behind = [f"{name}.adapter" for name in layers if name.endswith((".attn", ".mlp"))]
    return {
        "lora": {f"{name}.lora_{factor}.default.weight" for name in qkv for factor in "AB"},
        "lora-heads": {f"{name}.heads.{factor}" for name in qkv for factor in ("down", "up")},
        "adapter": {
            f"{name}.{layer}.{part}"
            for name in behind
            for layer in ("down", "up")
            for part in ("weight", "bias")
        },
        "bitfit": {name for name, _ in encoder.named_parameters() if name.endswith(".bias")},
        "decoder": set(),
    }[method]


def first_or_adapter(family: str, method: str) -> bool:
    """Adapters are where the packages differ: their attention returns a tensor, or a tuple."""
    return family == "sam" or method == "adapter"


@pytest.mark.parametrize(("family", "method"), combinations(METHODS, first_or_adapter))
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


@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_added_layers_follow_their_formulas(family: str) -> None:
    rank, students = 3, {}
    for method in METHODS:
        students[method] = build(family)
        adapt(students[method], method, rank=rank, targets=["qkv"])
    encoders = {method: student.encoder.double() for method, student in students.items()}
    for parameter in (p for e in encoders.values() for p in e.parameters() if p.requires_grad):
        parameter.normal_()
    blocks = {
        method: next(m for m in encoder.modules() if hasattr(m, "attn"))
        for method, encoder in encoders.items()
    }
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
    assert lora.heads.down.shape == (3 * count, rank, x.shape[-1])
    assert lora.heads.up.shape == (3 * count, width // count, rank)
    pairs = zip(lora.heads.down, lora.heads.up, strict=True)
    added = torch.cat([x @ down.T @ up.T for down, up in pairs], dim=-1)
    torch.testing.assert_close(lora(x), plain.attn.qkv(x) + added)

    adapter = blocks["adapter"].mlp.adapter
    x = torch.randn(2, 8, 8, adapter.down.in_features, dtype=torch.float64)
    assert adapter.down.out_features == x.shape[-1] // 4
    before = plain.mlp(x)
    after = before + adapter.up(nn.GELU()(adapter.down(before)))
    torch.testing.assert_close(blocks["adapter"].mlp(x), after)


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


@pytest.mark.parametrize("family", ["sam", "sam2"])
def test_merged_state_is_official(family: str) -> None:
    student, official = build(family), build(family).state_dict()
    adapt(student, "lora", targets=["qkv", "proj"])  # there is a convolution of the latter name
    merge_lora(student)
    assert student.state_dict().keys() == official.keys()


def test_adapters_are_where_the_model_is() -> None:
    encoder = build("sam").encoder.to("meta")
    assert add_adapters(encoder) > 0
    assert {p.device.type for p in encoder.parameters()} == {"meta"}


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
