import copy
import io
import pickle
from contextlib import nullcontext
from functools import partial
from weakref import ref

import pytest
import torch
from models import SIZE, decode, encode, segment, tiny_hf_sam, tiny_hf_sam2, tiny_sam, tiny_sam2
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from renyi_kd import FeatureCollector, Features, InfoSAMDistiller

BUILDERS = {
    "sam": tiny_sam,
    "sam2": tiny_sam2,
    "sam2-without-object-scores": partial(tiny_sam2, object_scores=False),
    "hf-sam": tiny_hf_sam,
    "hf-sam2": tiny_hf_sam2,
}
IMAGES = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[5.0, 8.0, 40.0, 50.0], [10.0, 3.0, 60.0, 33.0], [1.0, 1.0, 30.0, 62.0]])
LORA = LoraConfig(
    r=4,
    target_modules=r".*\.attn\.qkv",
    modules_to_save=["mask_decoder", "sam_mask_decoder"],
    init_lora_weights=False,  # or the adapters would change nothing yet
)

# Passes over one image and over three take different kernels.
assert_features_close = partial(assert_close, rtol=1e-4, atol=1e-5, check_stride=False)


@pytest.fixture(scope="module")
def built():
    """Every model is built once; who changes one copies it."""
    return {}


@pytest.fixture(params=BUILDERS)
def model(request, built):
    if request.param not in built:
        built[request.param] = BUILDERS[request.param]()
    return built[request.param]


def collect(model, images=IMAGES, boxes=BOXES, **options):
    with FeatureCollector(model, **options) as collector:
        segment(model, images, boxes)
    return collector.pop()


def count_hooks(model):
    return sum(
        len(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if name.startswith("_forward") and "hooks" in name
    )


def sam_only(test):
    return pytest.mark.parametrize("model", ["sam"], indirect=True)(test)


# What is collected


@pytest.mark.parametrize(
    ("tokens", "multimask_output"), [("single", False), ("all", False), ("all", True)]
)
@torch.no_grad()
def test_tokens_are_those_that_become_masks(model, tokens, multimask_output):
    decoder = model.sam_mask_decoder if hasattr(model, "sam_mask_decoder") else model.mask_decoder
    last = decoder.activation if hasattr(decoder, "activation") else decoder.output_upscaling[-1]
    upscaled = []
    with last.register_forward_hook(lambda module, args, output: upscaled.append(output)):
        with FeatureCollector(model, tokens=tokens) as collector:
            logits = segment(model, IMAGES, BOXES, multimask_output=multimask_output)
        mask_tokens = collector.pop().mask_tokens

    assert mask_tokens.shape[:2] == (3, 1 if tokens == "single" else 4)
    hypernetworks = zip(decoder.output_hypernetworks_mlps, mask_tokens.unbind(1), strict=False)
    weights = torch.stack([mlp(token) for mlp, token in hypernetworks], dim=1)
    masks = torch.einsum("bnc,bchw->bnhw", weights, upscaled[-1])
    returned = masks[:, 1:] if multimask_output else masks[:, :1]
    assert_close(returned, logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_image_embedding_is_the_encoder_output(model):
    embedding = collect(model).image_embedding
    if hasattr(model, "sam_mask_decoder"):
        expected = model.image_encoder(IMAGES)["vision_features"]
    else:
        expected = encode(model, IMAGES)[-1]
    assert torch.equal(embedding, expected)
    assert embedding.shape[2:] == (SIZE // 16, SIZE // 16)


@pytest.mark.parametrize("half", ["image_embedding", "mask_tokens"])
def test_gradients_reach_the_encoder(model, half):
    weight = next(p for name, p in model.named_parameters() if "patch_embed" in name and p.ndim > 1)
    feature = getattr(collect(model), half)
    (gradient,) = torch.autograd.grad((feature * torch.randn_like(feature)).sum(), weight)
    assert gradient.norm() > 0


@torch.no_grad()
def test_outputs_are_unaltered(model):
    expected = segment(model, IMAGES, BOXES)
    with FeatureCollector(model):
        assert torch.equal(segment(model, IMAGES, BOXES), expected)


# How passes add up


def one_by_one(model):
    for i in range(3):
        segment(model, IMAGES[i : i + 1], BOXES[i : i + 1])


def in_two_batches(model):
    segment(model, IMAGES[:2], BOXES[:2])
    segment(model, IMAGES[2:], BOXES[2:])


def encoder_once(model, order=(0, 1, 2)):
    levels = encode(model, IMAGES)
    for i in order:
        decode(model, [level[i : i + 1] for level in levels], BOXES[i : i + 1])


@pytest.mark.parametrize("passes", [one_by_one, in_two_batches, encoder_once])
def test_passes_add_up_to_one_batch(model, passes):
    with FeatureCollector(model) as collector:
        passes(model)
        first = collector.pop()
        passes(model)
        second = collector.pop()
    for features in (first, second):
        assert_features_close(features, collect(model))
        assert all(feature.requires_grad for feature in features)


@sam_only
def test_image_embedding_follows_its_tokens(model):
    order = [2, 0, 1]
    with FeatureCollector(model) as collector:
        encoder_once(model, order)
    assert_features_close(collector.pop(), collect(model, IMAGES[order], BOXES[order]))


@sam_only
def test_forward_of_sam_is_collected(model):
    samples = zip(IMAGES, BOXES, strict=True)
    records = [{"image": x, "boxes": box[None], "original_size": x.shape[1:]} for x, box in samples]
    with FeatureCollector(model) as collector:
        model(records, multimask_output=False)
    images = torch.stack([model.preprocess(image) for image in IMAGES])
    with torch.no_grad():
        assert_features_close(collector.pop(), collect(model, images))


@sam_only
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_encoder_may_be_checkpointed(model, use_reentrant):
    model = copy.deepcopy(model)  # takes gradients
    images = IMAGES.clone().requires_grad_()  # without, a reentrant checkpoint has no gradient
    with FeatureCollector(model) as collector:
        for _ in range(2):  # the backward pass of the first runs the encoder again
            embedding = checkpoint(model.image_encoder, images, use_reentrant=use_reentrant)
            decode(model, [embedding], BOXES)
            features = collector.pop()
            features.image_embedding.square().sum().backward()
    assert_features_close(features, collect(model))


@sam_only
def test_decoding_a_batch_twice_is_refused(model):
    with FeatureCollector(model) as collector:
        levels = encode(model, IMAGES)
        decode(model, levels, BOXES)
        with pytest.raises(ValueError, match=r"All image embeddings .* have been decoded"):
            decode(model, levels, BOXES)
        with pytest.raises(RuntimeError, match="No image embedding and no mask tokens"):
            collector.pop()


def several_prompts(model):
    """Three boxes on one image."""
    if hasattr(model, "vision_encoder"):
        model(pixel_values=IMAGES[:1], input_boxes=BOXES[None])
    else:
        decode(model, encode(model, IMAGES[:1]), BOXES)


# peft, and one image encoder for teacher and student


def test_one_collector_serves_adapters_off_and_on(model):
    """Whole model in peft: without adapters it is the teacher, with its own frozen decoder."""
    student = get_peft_model(copy.deepcopy(model), copy.copy(LORA))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.1)  # as if trained

    with FeatureCollector(student) as collector:
        with torch.no_grad(), student.disable_adapter():
            segment(student, IMAGES, BOXES)
        of_teacher = collector.pop()
        segment(student, IMAGES, BOXES)
        of_student = collector.pop()
    assert_features_close(of_teacher, collect(model))
    for teacher_feature, student_feature in zip(of_teacher, of_student, strict=True):
        assert not teacher_feature.requires_grad
        assert student_feature.requires_grad
        assert (teacher_feature - student_feature).abs().max() > 0.01


@pytest.fixture
def shared(model):
    """The model as teacher and as student around one image encoder in peft, and that encoder."""
    name = "vision_encoder" if hasattr(model, "vision_encoder") else "image_encoder"
    teacher, student = copy.deepcopy(model), copy.deepcopy(model)
    encoder = get_peft_model(getattr(student, name), copy.copy(LORA))
    setattr(teacher, name, encoder)
    setattr(student, name, encoder)
    return teacher, student, encoder


def one_after_the_other(teacher, student, encoder):
    with torch.no_grad(), encoder.disable_adapter():
        segment(teacher, IMAGES, BOXES)
    segment(student, IMAGES, BOXES)


def one_after_the_other_by_image(teacher, student, encoder):
    with torch.no_grad(), encoder.disable_adapter():
        encoder_once(teacher)
    encoder_once(student)


def interleaved(teacher, student, encoder):
    with torch.no_grad(), encoder.disable_adapter():
        teacher_levels = encode(teacher, IMAGES)
    student_levels = encode(student, IMAGES)
    for i in range(3):
        with torch.no_grad():
            decode(teacher, [level[i : i + 1] for level in teacher_levels], BOXES[i : i + 1])
        decode(student, [level[i : i + 1] for level in student_levels], BOXES[i : i + 1])


def assert_not_mixed_up(model, shared, passes):
    teacher, student, encoder = shared
    with FeatureCollector(teacher) as from_teacher, FeatureCollector(student) as from_student:
        for _ in range(2):  # the second time, the teacher's collector has seen the student's pass
            passes(teacher, student, encoder)
            of_teacher, of_student = from_teacher.pop(), from_student.pop()

    with torch.no_grad():
        assert_features_close(of_teacher, collect(model))
    assert_features_close(of_student, collect(student))
    assert (of_teacher.image_embedding - of_student.image_embedding).abs().max() > 0.1
    assert not any(feature.requires_grad for feature in of_teacher)
    assert all(feature.requires_grad for feature in of_student)


@pytest.mark.parametrize("passes", [one_after_the_other, one_after_the_other_by_image])
def test_shared_encoder_one_after_the_other(model, shared, passes):
    assert_not_mixed_up(model, shared, passes)


@pytest.mark.parametrize("model", ["sam", "hf-sam", "hf-sam2"], indirect=True)
def test_shared_encoder_interleaved(model, shared):
    assert_not_mixed_up(model, shared, interleaved)


# Models that are evaluated inside of the block


def evaluate(model, batches=2):
    with torch.no_grad():
        for _ in range(batches):
            segment(model, IMAGES.flip(0), BOXES.flip(0))


def teacher_first(teacher, student, passes):
    passes(teacher)
    passes(student)


def student_first(teacher, student, passes):
    passes(student)
    passes(teacher)


def train(model):
    """A pass of the teacher, which is frozen, or of the student."""
    segment(model, IMAGES, BOXES)


@pytest.fixture(scope="module")
def pair(built):
    if "sam" not in built:
        built["sam"] = BUILDERS["sam"]()
    teacher = copy.deepcopy(built["sam"]).requires_grad_(False)
    return teacher, copy.deepcopy(built["sam"])


@pytest.mark.parametrize("evaluated", ["both", "student"])
@pytest.mark.parametrize("evaluation", [teacher_first, student_first])
@pytest.mark.parametrize("training", [teacher_first, student_first])
@pytest.mark.parametrize("popped", ["teacher first", "student first"])
def test_an_evaluation_changes_no_batch(pair, evaluated, evaluation, training, popped):
    """It comes before the first batch, as a sanity check does, and between two batches."""
    teacher, student = pair
    expected_of_teacher, expected_of_student = map(collect, pair)
    with FeatureCollector(teacher) as from_teacher, FeatureCollector(student) as from_student:
        for _ in range(2):
            if evaluated == "both":
                evaluation(teacher, student, evaluate)
            else:
                evaluate(student)
            training(teacher, student, train)
            collectors = [from_teacher, from_student]
            if popped == "student first":
                of_student, of_teacher = (c.pop() for c in reversed(collectors))
            else:
                of_teacher, of_student = (c.pop() for c in collectors)
            assert_features_close(of_student, expected_of_student)
            assert_features_close(of_teacher, expected_of_teacher)


def test_an_evaluation_in_other_batches(pair):
    """A batch of two passes after an evaluation image by image, with several prompts an image."""
    teacher, student = pair
    expected_of_teacher, expected_of_student = map(collect, pair)
    with FeatureCollector(teacher) as from_teacher, FeatureCollector(student) as from_student:
        with torch.no_grad():
            for model in pair:
                one_by_one(model)
                several_prompts(model)
        for model in pair:
            in_two_batches(model)
        assert_features_close(from_teacher.pop(), expected_of_teacher)
        assert_features_close(from_student.pop(), expected_of_student)


def test_an_evaluation_with_gradients_is_known_by_the_mode(pair):
    student = copy.deepcopy(pair[1])
    expected_of_student = collect(student.train())
    with FeatureCollector(student) as collector:
        segment(student.eval(), IMAGES[:1], BOXES[:1])
        segment(student.train(), IMAGES, BOXES)
        segment(student.eval(), IMAGES[:1], BOXES[:1])
        assert_features_close(collector.pop(), expected_of_student)


def test_what_cannot_be_told_is_an_error(pair):
    teacher, student = pair
    expected_of_student = collect(student)
    distiller = InfoSAMDistiller(32)
    with FeatureCollector(teacher) as from_teacher, FeatureCollector(student) as from_student:
        evaluate(teacher)  # alone, so that nothing tells that it was no batch
        teacher_first(teacher, student, train)
        with pytest.raises(ValueError, match=r"`teacher` 9, `student` 3\. Was a model evaluated"):
            distiller(from_teacher.pop(), from_student.pop())

        teacher_first(teacher, student, train)
        teacher_first(teacher, student, evaluate)  # between the passes of a batch and its pop
        with pytest.raises(RuntimeError, match=r"9 samples were collected beside a batch of 3"):
            from_teacher.pop()
        assert_features_close(from_student.pop(), expected_of_student)
        from_teacher.clear()

        from_student.clear()
        segment(teacher, IMAGES, BOXES)
        evaluate(student)
        segment(teacher, IMAGES, BOXES)
        segment(student, IMAGES[:2], BOXES[:2])
        with pytest.raises(RuntimeError, match=r"beside a batch of 2, .* collector\.paused\(\)"):
            from_teacher.pop()


def test_paused_and_clear(pair):
    _, student = pair
    expected_of_student = collect(student)
    with FeatureCollector(student) as collector:
        with collector.paused(), collector.paused():
            segment(student, IMAGES, BOXES)
        with pytest.raises(RuntimeError, match="No image embedding and no mask tokens"):
            collector.pop()
        with pytest.raises(ZeroDivisionError), collector.paused():
            1 / 0  # noqa: B018
        segment(student, IMAGES[:2], BOXES[:2])
        collector.clear()
        segment(student, IMAGES, BOXES)
        assert_features_close(collector.pop(), expected_of_student)


def test_what_is_held_is_bounded(pair):
    teacher, student = pair
    expected_of_teacher, expected_of_student = map(collect, pair)
    with (
        FeatureCollector(teacher, max_samples=6) as from_teacher,
        FeatureCollector(student, max_samples=6) as from_student,
    ):
        outputs = []
        teacher.image_encoder.register_forward_hook(lambda *args: outputs.append(ref(args[-1])))
        for _ in range(5):
            with torch.no_grad():
                segment(teacher, IMAGES, BOXES)
        assert sum(output() is not None for output in outputs) <= 2
        with pytest.raises(RuntimeError, match=r"15 samples without gradients .* 6 are held"):
            from_teacher.pop()
        evaluate(student, batches=5)
        teacher_first(teacher, student, train)
        assert_features_close(from_teacher.pop(), expected_of_teacher)
        assert_features_close(from_student.pop(), expected_of_student)
        for _ in range(2):
            segment(student, IMAGES, BOXES)
        with pytest.raises(RuntimeError, match="More than 6 samples with gradients"):
            segment(student, IMAGES, BOXES)
    with pytest.raises(ValueError, match="`max_samples` must be an integer >= 1, got 0"):
        FeatureCollector(teacher, max_samples=0)


# Copies of a model that is collected from


def reloaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, reloaded, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_are_inert_and_hold_nothing(model, copied):
    if hasattr(model, "sam_mask_decoder") and copied is not copy.deepcopy:
        pytest.skip("sam2's models hold a lambda")
    with FeatureCollector(model) as collector:
        segment(model, IMAGES, BOXES)
        copied_model = copied(model)
        segment(copied_model, IMAGES[:1], BOXES[:1])
        assert_features_close(collector.pop(), collect(model))
    outputs = []
    with (
        copied_model.mask_decoder.register_forward_hook(
            lambda module, args, output: outputs.append(ref(output[0]))
        )
        if hasattr(copied_model, "mask_decoder")
        else nullcontext()
    ):
        segment(copied_model, IMAGES[:1], BOXES[:1])
    assert all(output() is None for output in outputs)


def test_an_average_of_the_weights_is_not_collected(pair):
    student = copy.deepcopy(pair[1])
    with FeatureCollector(student) as collector:
        average = torch.optim.swa_utils.AveragedModel(student)
        segment(student, IMAGES, BOXES)
        average.update_parameters(student)
        segment(average.module, IMAGES, BOXES)
        assert_features_close(collector.pop(), collect(student))


def test_a_collector_that_is_dropped_is_freed(pair):
    _, student = pair
    collector = FeatureCollector(student)
    segment(student, IMAGES, BOXES)
    reference = ref(collector)
    del collector
    assert reference() is None
    segment(student, IMAGES, BOXES)


# Encoders that return more than the embedding


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda y: (y, [y]),
        lambda y: [y, y.mean((2, 3))],
        lambda y: {"embedding": y, "levels": [y, y]},
        lambda y: {"vision_features": y, "fine": torch.cat([y, y])},
    ],
)
def test_encoders_that_return_the_embedding_among_others(pair, wrapped):
    student = copy.deepcopy(pair[1])
    levels = []
    student.image_encoder.register_forward_hook(lambda module, args, y: wrapped(y))
    with FeatureCollector(student) as collector:
        output = student.image_encoder(IMAGES)
        first = output[0] if not isinstance(output, dict) else next(iter(output.values()))
        levels.append(first)
        decode(student, levels, BOXES)
        assert_features_close(collector.pop(), collect(pair[1]))


@pytest.mark.parametrize(
    ("wrapped", "found"),
    [
        (
            lambda y: (y, y),
            r"tuple(a tensor of shape (3, 32, 4, 4), a tensor of shape (3, 32, 4, 4",
        ),
        (lambda y: {"a": y.flatten(2)}, "dict(a: a tensor of shape (3, 32, 16))"),
        (lambda y: [[y]], "list(list(a tensor of shape (3, 32, 4, 4)))"),
        (lambda y: None, "NoneType"),
    ],
)
def test_encoders_whose_embedding_cannot_be_told(pair, wrapped, found):
    student = copy.deepcopy(pair[1])
    # A hook that returns None leaves the output as it is.
    student.image_encoder.forward = lambda x, run=student.image_encoder.forward: wrapped(run(x))
    with (
        FeatureCollector(student),
        pytest.raises(TypeError, match=r"The image encoder must return .* got ") as error,
    ):
        student.image_encoder(IMAGES)
    assert found in str(error.value)


# Embeddings of views and of copies


def test_views_and_copies_of_one_pass(pair):
    """The first image is decoded from a view of the encoder's output, the others from copies."""
    _, student = pair
    with FeatureCollector(student) as collector:
        (embedding,) = encode(student, IMAGES)
        for i, piece in enumerate((embedding[:1], embedding[1:2].clone(), embedding[2:].clone())):
            decode(student, [piece], BOXES[i : i + 1])
        assert_features_close(collector.pop(), collect(student))


# What pop gives


@sam_only
def test_missing_halves_are_named(model):
    levels = encode(model, IMAGES)
    expected = collect(model)
    with FeatureCollector(model) as collector:
        with pytest.raises(RuntimeError, match="No image embedding and no mask tokens collected"):
            collector.pop()
        encode(model, IMAGES)
        with pytest.raises(RuntimeError, match=r"No mask tokens collected .* run the mask decoder"):
            collector.pop()
        decode(model, levels, BOXES)
        assert_features_close(collector.pop(), expected)  # nothing was lost

        with pytest.raises(RuntimeError, match="No mask tokens collected"):
            collector.pop(levels[-1])
        decode(model, levels, BOXES)
        with pytest.raises(RuntimeError, match=r"No image embedding .* run the image encoder or"):
            collector.pop()
        assert_features_close(collector.pop(levels[-1]), expected)


@sam_only
def test_a_stray_decoder_pass_does_not_stick(model):
    levels = encode(model, IMAGES)
    with FeatureCollector(model) as collector:
        decode(model, levels, BOXES)
        segment(model, IMAGES, BOXES)
        with pytest.raises(RuntimeError, match=r"1 of 2 passes .* had no image embedding"):
            collector.pop()
        segment(model, IMAGES, BOXES)
        assert_features_close(collector.pop(), collect(model))


@torch.no_grad()
def test_cached_image_embedding(model):
    levels = encode(model, IMAGES)
    with FeatureCollector(model) as collector:
        decode(model, levels, BOXES)
        with pytest.raises(ValueError, match=r"`image_embedding` must have one row .* got \(2, "):
            collector.pop(levels[-1][:2])
        with pytest.raises(TypeError, match="`image_embedding` must be"):
            collector.pop(levels)
        features = collector.pop(levels[-1])
    assert features.image_embedding is levels[-1]
    assert_features_close(features.mask_tokens, collect(model).mask_tokens)


@pytest.mark.parametrize("pop_inside", [False, True])
@pytest.mark.parametrize("passes", [one_by_one, partial(segment, images=IMAGES, boxes=BOXES)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_teacher_without_graph_serves_the_loss(model, mode, passes, pop_inside):
    with FeatureCollector(model) as collector:
        with mode():
            passes(model)
            teacher = collector.pop() if pop_inside else None
        teacher = teacher or collector.pop()
    assert not any(feature.requires_grad or feature.is_inference() for feature in teacher)

    distiller = InfoSAMDistiller(dim=teacher.mask_tokens.shape[-1])
    distiller(teacher, collect(model)).backward(inputs=[*distiller.relation.parameters()])
    assert all(p.grad.isfinite().all() for p in distiller.relation.parameters())
    assert distiller.relation.query_proj.weight.grad.norm() > 0


@torch.no_grad()
def test_nothing_is_held_after_pop(model):
    with FeatureCollector(model) as collector:
        segment(model, IMAGES, BOXES)
        references = [ref(feature) for feature in collector.pop()]
        assert all(reference() is None for reference in references)


# Hooks and models


@pytest.mark.parametrize("tokens", ["single", "all"])
def test_every_hook_is_removed(model, tokens):
    before = count_hooks(model)
    with FeatureCollector(model, tokens=tokens):
        assert count_hooks(model) > before
    assert count_hooks(model) == before

    with pytest.raises(KeyboardInterrupt), FeatureCollector(model):
        raise KeyboardInterrupt
    assert count_hooks(model) == before


@sam_only
def test_collector_works_without_with(model):
    before = count_hooks(model)
    collector = FeatureCollector(model)
    segment(model, IMAGES, BOXES)
    collector.close()
    assert count_hooks(model) == before
    segment(model, IMAGES[:1], BOXES[:1])  # not collected any more
    assert_features_close(collector.pop(), collect(model))


def test_model_is_found_inside_another(model):
    with FeatureCollector(nn.Sequential(nn.Identity(), model)) as collector:
        segment(model, IMAGES, BOXES)
    assert_features_close(collector.pop(), collect(model))


@pytest.mark.parametrize("not_a_sam", [nn.Linear(2, 2), tiny_sam().mask_decoder, "sam", None])
def test_anything_but_a_sam_is_refused(not_a_sam):
    with pytest.raises(
        TypeError, match=f"must be or contain a SAM, got {type(not_a_sam).__name__}"
    ) as error:
        FeatureCollector(not_a_sam)
    for kind in ("Sam;", "SAM2Base", "tracker", "SamModel", "SamHQModel", "Sam2Model", "EdgeTam"):
        assert kind in str(error.value)
    assert "image_embedding=..., mask_tokens=..." in str(error.value)


@pytest.mark.parametrize(
    ("build", "part", "nearest"),
    [
        (tiny_sam, "image_encoder", "segment_anything's Sam, but Sam has no image_encoder"),
        (tiny_sam, "mask_decoder.transformer", "Sam, but Sam has no mask_decoder.transformer"),
        (tiny_hf_sam, "vision_encoder", "Sam, but SamModel has no image_encoder"),
        (tiny_hf_sam, "mask_decoder", "SamModel or SamHQModel, but SamModel has no mask_decoder"),
    ],
)
def test_of_what_is_refused_the_nearest_kind_is_named(build, part, nearest):
    model = build()
    *parent, name = part.split(".")
    delattr(model.get_submodule(".".join(parent)), name)
    with pytest.raises(TypeError, match=nearest):
        FeatureCollector(model)


@sam_only
def test_unknown_tokens_are_refused(model):
    before = count_hooks(model)
    with pytest.raises(ValueError, match="`tokens` must be one of 'single', 'all', got 'multi'"):
        FeatureCollector(model, tokens="multi")
    assert count_hooks(model) == before


def test_a_file_of_features_or_terms_loads_by_default():
    values = Features(torch.ones(2, 3, 4, 4), torch.ones(2, 1, 3))
    terms = InfoSAMDistiller(3).terms(values, values)
    file = io.BytesIO()
    torch.save([values, terms], file)
    file.seek(0)
    loaded, loaded_terms = torch.load(file)
    assert isinstance(loaded, Features)
    torch.testing.assert_close(loaded, values)
    torch.testing.assert_close(loaded_terms, terms, equal_nan=True)
