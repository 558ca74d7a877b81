"""A student, its teacher and the loss in one module, against the same loop by hand."""

import copy
import io

import pytest
import torch
from models import SIZE, segment, tiny_hf_sam, tiny_hf_sam2, tiny_sam, tiny_sam2
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from renyi_kd import DistilledModel, FeatureCollector, Features, InfoSAMDistiller, RelationModule

IMAGES = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[8.0, 8, 40, 50], [4, 10, 60, 44], [20, 6, 50, 30]])


class Segmenter(nn.Module):
    """Any SAM, from images and boxes to masks."""

    def __init__(self, sam):
        super().__init__()
        self.sam = sam

    def forward(self, images, boxes):
        return segment(self.sam, images, boxes)


def changed(model, seed=1):
    """The same model with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.05 * noise)
    return model


def make(build=tiny_hf_sam, distiller=None, **options):
    teacher = build()
    dim = 256 if build is tiny_sam2 else 32
    torch.manual_seed(2)
    distiller = InfoSAMDistiller(dim) if distiller is None else distiller
    student = changed(copy.deepcopy(teacher))
    return DistilledModel(Segmenter(student), Segmenter(teacher), distiller, **options).train()


@pytest.mark.parametrize("tokens", ["single", "all"])
@pytest.mark.parametrize("build", [tiny_sam, tiny_sam2, tiny_hf_sam, tiny_hf_sam2])
def test_output_loss_and_gradients_are_those_of_the_loop(build, tokens):
    model = make(build, tokens=tokens)
    student, teacher, distiller = map(
        copy.deepcopy, (model.student, model.teacher, model.distiller)
    )
    with (
        FeatureCollector(teacher, tokens=tokens) as from_teacher,
        FeatureCollector(student, tokens=tokens) as from_student,
    ):
        with torch.no_grad():
            teacher(IMAGES, BOXES)
        masks = student(IMAGES, BOXES)
        expected = distiller(from_teacher.pop(), from_student.pop())
        expected.backward()

    output, loss = model(IMAGES, BOXES)
    assert torch.equal(output, masks)
    assert torch.equal(loss, expected)
    loss.backward()
    for part, by_hand in ((model.student, student), (model.distiller, distiller)):
        pairs = [*zip(part.parameters(), by_hand.parameters(), strict=True)]
        assert any(p.grad is not None and p.grad.norm() > 0 for p, _ in pairs)
        for parameter, other in pairs:
            assert (parameter.grad is None) == (other.grad is None)
            if other.grad is not None:
                torch.testing.assert_close(parameter.grad, other.grad)
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_what_the_student_returns_is_passed_on():
    teacher = tiny_hf_sam()
    model = DistilledModel(tiny_hf_sam(), teacher, InfoSAMDistiller(32))
    output, _ = model(pixel_values=IMAGES, input_boxes=BOXES[:, None])
    expected = teacher(pixel_values=IMAGES, input_boxes=BOXES[:, None])
    assert type(output) is type(expected)
    torch.testing.assert_close(output.pred_masks, expected.pred_masks)


def test_default_distiller_has_the_channels_of_released_models():
    model = DistilledModel(*(Segmenter(tiny_sam2()) for _ in range(2)))
    assert model.distiller.dim == 256
    assert model.train()(IMAGES, BOXES).loss.isfinite()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, None])
def test_evaluation_runs_the_student_alone(context):
    model = make()
    ran = []
    model.teacher.register_forward_hook(lambda *_: ran.append("teacher"))
    if context is None:
        output, loss = model.eval()(IMAGES, BOXES)
    else:
        with context():
            output, loss = model(IMAGES, BOXES)
    assert loss is None
    assert not ran
    assert output.shape[0] == 3
    model.train()(IMAGES[:2], BOXES[:2]).loss.backward()  # of two samples, not of five
    assert ran == ["teacher"]


def test_teacher_is_neither_parameter_nor_state_nor_trained():
    model = make()
    parts = {"student", "distiller"}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == parts
    assert {name.split(".")[0] for name in model.state_dict()} == parts
    assert not any(module is model.teacher for module in model.modules())
    model.teacher.train()
    assert model.train() is model
    assert model.student.training
    assert not any(module.training for module in model.teacher.modules())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    model.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_teacher_moves_with_the_model():
    model = make().to(torch.float64)
    parameters = [*model.parameters(), *model.teacher.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float64}
    assert model(IMAGES.double(), BOXES).loss.dtype == torch.float64
    model.to("meta")
    assert {parameter.device.type for parameter in model.teacher.parameters()} == {"meta"}


def test_nothing_is_held_of_what_runs_outside():
    model = make()
    expected = model(IMAGES, BOXES).loss
    for _ in range(3):
        model.student(IMAGES, BOXES)
        model.teacher(IMAGES, BOXES)
    for collector in model._collectors:
        with pytest.raises(RuntimeError, match="No image embedding and no mask tokens"):
            collector.pop()
    assert torch.equal(model(IMAGES, BOXES).loss, expected)


def test_a_failed_step_leaves_nothing_behind():
    model = make()
    expected = model(IMAGES, BOXES).loss
    with pytest.raises(ValueError, match="one sample"):
        model(IMAGES[:1], BOXES[:1])
    with pytest.raises(ValueError, match="Input image size"):
        model(IMAGES[..., :-1], BOXES)
    assert torch.equal(model(IMAGES, BOXES).loss, expected)


def test_copies_and_files_collect_for_themselves():
    model = make()
    expected = model(IMAGES, BOXES).loss
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        changed(other.student, seed=3)
        found = other(IMAGES, BOXES).loss
        assert not torch.equal(found, expected)
        found.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(model(IMAGES, BOXES).loss, expected)


def test_state_dict_goes_on_where_it_was():
    model, other = make(), changed(make(), seed=4)
    assert not torch.equal(other(IMAGES, BOXES).loss, model(IMAGES, BOXES).loss)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGES, BOXES).loss, model(IMAGES, BOXES).loss)


def test_lora_is_added_before():
    teacher = tiny_hf_sam()
    student = copy.deepcopy(teacher).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["qkv"]), student.vision_encoder)
    model = DistilledModel(Segmenter(student), Segmenter(teacher), InfoSAMDistiller(32))
    model(IMAGES, BOXES).loss.backward()
    learned = {name for name, p in model.student.named_parameters() if p.grad is not None}
    assert learned
    assert all("lora" in name for name in learned)


@pytest.mark.slow
def test_compiled_model_has_the_same_loss():
    model = make()
    expected = model(IMAGES, BOXES).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(IMAGES, BOXES).loss, expected)
    with torch.no_grad():
        assert compiled(IMAGES, BOXES).loss is None
    torch.testing.assert_close(compiled(IMAGES, BOXES).loss, expected)
    torch._dynamo.reset()


def test_another_distiller():
    class Squares(nn.Module):
        def forward(self, teacher, student):
            assert isinstance(teacher, Features)
            return (teacher.mask_tokens - student.mask_tokens).square().mean()

    model = make(distiller=Squares())
    loss = model(IMAGES, BOXES).loss
    assert loss > 0
    loss.backward()
    with torch.no_grad():
        model.student.load_state_dict(model.teacher.state_dict())
    assert model(IMAGES, BOXES).loss < 1e-9 * loss  # images may be convolved in another order


class Queries(nn.Module):
    """A model that is no SAM: two queries, each asked of the places of a map."""

    def __init__(self):
        super().__init__()
        self.neck = nn.Conv2d(3, 8, 16, 16)
        self.head = nn.Linear(8, 16)

    def forward(self, images):
        embedding = self.neck(images)
        tokens = self.head(embedding.mean((2, 3))).unflatten(1, (2, 8))
        return torch.einsum("bnd,bdhw->bnhw", tokens, embedding)


def test_modules_are_named():
    torch.manual_seed(0)
    student, teacher, distiller = Queries(), Queries(), InfoSAMDistiller(8)
    tokens = "head", lambda output: output.unflatten(1, (2, 8))
    model = DistilledModel(student, teacher, distiller, image_embedding="neck", mask_tokens=tokens)
    output, loss = model.train()(IMAGES)
    with torch.no_grad():
        of_teacher, of_student = (
            Features(x.neck(IMAGES), x.head(x.neck(IMAGES).mean((2, 3))).unflatten(1, (2, 8)))
            for x in (teacher, student)
        )
    torch.testing.assert_close(loss.detach(), distiller(of_teacher, of_student).detach())
    assert output.shape == (3, 2, 4, 4)


SHARED = tiny_hf_sam()
WRONG = {
    "a path": ((tiny_hf_sam(), "teacher"), {}, TypeError, "`teacher` must be a torch.nn.Module"),
    "a class": ((tiny_hf_sam, SHARED), {}, TypeError, "`student` must be a torch.nn.Module"),
    "a function": (
        (tiny_hf_sam(), SHARED, lambda teacher, student: 0),
        {},
        TypeError,
        "`distiller` must be a torch.nn.Module, got function",
    ),
    "one model": ((SHARED, SHARED), {}, ValueError, "parameters of their own, got [0-9]+"),
    "one encoder": (
        (SHARED, nn.ModuleList([SHARED.vision_encoder, tiny_hf_sam()])),
        {},
        ValueError,
        "copy.deepcopy",
    ),
    "compiled": (
        (torch.compile(tiny_hf_sam()), SHARED),
        {},
        ValueError,
        "`student` must not be compiled yet",
    ),
    "no SAM": ((RelationModule(4), SHARED), {}, TypeError, "must be or contain a SAM"),
    "tokens": ((tiny_hf_sam(), SHARED), {"tokens": "some"}, ValueError, "`tokens` must be one of"),
}


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="torchrun"):
        make()._replicate_for_data_parallel()


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        DistilledModel(*arguments, **options)
