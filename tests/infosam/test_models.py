"""What is collected of each kind of SAM, against calls of its parts by hand."""

import copy

import pytest
import torch
from models import (
    SIZE,
    decode,
    encode,
    tiny_hf_edgetam,
    tiny_hf_sam,
    tiny_hf_sam2,
    tiny_hf_sam3_tracker,
    tiny_hf_sam_hq,
    tiny_sam,
    tiny_sam2,
    tiny_sam3,
    tiny_sam_hq,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import EdgeTamModel

from renyi_kd import FeatureCollector

BUILDERS = {
    "sam": tiny_sam,
    "sam-hq": tiny_sam_hq,
    "sam2": tiny_sam2,
    "sam3": tiny_sam3,
    "hf-sam": tiny_hf_sam,
    "hf-sam-hq": tiny_hf_sam_hq,
    "hf-sam2": tiny_hf_sam2,
    "hf-edgetam": tiny_hf_edgetam,
    "hf-sam3-tracker": tiny_hf_sam3_tracker,
}
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor(
    [
        [[5.0, 8.0, 40.0, 50.0], [10.0, 3.0, 60.0, 33.0], [1.0, 1.0, 30.0, 62.0]],
        [[20.0, 8.0, 50.0, 20.0], [3.0, 3.0, 9.0, 33.0], [31.0, 31.0, 60.0, 62.0]],
    ]
)  # three for each image


@pytest.fixture(params=BUILDERS, scope="module")
def model(request):
    model = BUILDERS[request.param]()
    for name in ("no_memory_embedding", "no_mem_embed"):
        if hasattr(model, name):
            nn.init.normal_(getattr(model, name))  # zero in a new model of transformers
    return model


def in_transformers(model: nn.Module) -> bool:
    return hasattr(model, "vision_encoder")


def decoder_of(model: nn.Module) -> nn.Module:
    return model.sam_mask_decoder if hasattr(model, "sam_mask_decoder") else model.mask_decoder


def is_hq(model: nn.Module) -> bool:
    return hasattr(decoder_of(model), "hf_token") or hasattr(decoder_of(model), "hq_token")


def segment(model: nn.Module, images: Tensor, boxes: Tensor) -> Tensor:
    """Mask logits `(B * P, h, w)` of images, with boxes `(B, P, 4)`, as users run the model."""
    if in_transformers(model):
        only = {"hq_token_only": True} if is_hq(model) else {}
        output = model(pixel_values=images, input_boxes=boxes, multimask_output=False, **only)
        return output.pred_masks.flatten(0, 2)
    if not is_hq(model):
        levels = encode(model, images)
        masks = [
            decode(model, [level[i : i + 1] for level in levels], boxes[i])
            for i in range(len(images))
        ]
        return torch.cat(masks)[:, 0]
    embedding, early = model.image_encoder(images)
    masks = []
    for i in range(len(images)):
        sparse, dense = model.prompt_encoder(points=None, boxes=boxes[i], masks=None)
        image_pe, layer = model.prompt_encoder.get_dense_pe(), early[0][i : i + 1]
        masks += model.mask_decoder(
            embedding[i : i + 1], image_pe, sparse, dense, False, True, layer[None]
        )[0]
    return torch.cat(masks)


def by_hand(model: nn.Module, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The image embedding `(1, D, h, w)`, and mask tokens `(P, N, D)` from the transformer."""
    decoder = decoder_of(model)
    tokens = [decoder.iou_token, decoder.mask_tokens]
    if hasattr(decoder, "obj_score_token"):
        tokens.insert(0, decoder.obj_score_token)
    if is_hq(model):
        tokens.append(decoder.hq_token if in_transformers(model) else decoder.hf_token)
    first = sum(len(embedding.weight) for embedding in tokens[: tokens.index(decoder.mask_tokens)])
    tokens = torch.cat([embedding.weight for embedding in tokens])
    count = len(tokens) - first
    if in_transformers(model):
        if hasattr(model, "no_memory_embedding"):
            embedding = model.get_image_embeddings(image)[-1]
        else:
            embedding = model.vision_encoder(image).last_hidden_state
        sparse, dense = model.prompt_encoder(None, None, boxes[None], None)
        hidden, _ = decoder.transformer(
            point_embeddings=torch.cat([tokens.expand(1, len(boxes), -1, -1), sparse], 2),
            image_embeddings=(embedding + dense).expand(len(boxes), -1, -1, -1),
            image_positional_embeddings=model.get_image_wide_positional_embeddings().expand(
                len(boxes), -1, -1, -1
            ),
            attention_similarity=None,
        )
        return embedding, hidden[0, :, first : first + count]
    shift = 0
    if hasattr(model, "backbone"):
        embedding = model.forward_image(image)["vision_features"] + model.no_mem_embed.mT[..., None]
    elif hasattr(model, "sam_mask_decoder"):
        embedding = model.image_encoder(image)["vision_features"]
        shift = model.no_mem_embed.mT[..., None]
    else:
        output = model.image_encoder(image)
        embedding = output[0] if is_hq(model) else output
    encoder = getattr(model, "sam_prompt_encoder", None) or model.prompt_encoder
    sparse, dense = encoder(points=None, boxes=boxes, masks=None)
    source = embedding + shift + dense
    tokens = torch.cat([tokens.expand(len(boxes), -1, -1), sparse], 1)
    hidden, _ = decoder.transformer(source, encoder.get_dense_pe().expand_as(source), tokens)
    return embedding, hidden[:, first : first + count]


@pytest.mark.parametrize("tokens", ["single", "all"])
@torch.no_grad()
def test_features_are_those_of_the_parts_called_by_hand(model, tokens):
    """Each image and prompt is a sample, image by image."""
    with FeatureCollector(model, tokens=tokens) as collector:
        segment(model, IMAGES, BOXES)
    embedding, mask_tokens = collector.pop()
    assert len(embedding) == len(mask_tokens) == BOXES.shape[:2].numel()
    for i, (image, boxes) in enumerate(zip(IMAGES, BOXES, strict=True)):
        of_image = slice(3 * i, 3 * i + 3)
        expected, expected_tokens = by_hand(model, image[None], boxes)
        if tokens == "single":
            expected_tokens = expected_tokens[:, [-1 if is_hq(model) else 0]]
        for one in embedding[of_image]:
            assert_close(one, expected[0], rtol=1e-4, atol=1e-5)
        assert_close(mask_tokens[of_image], expected_tokens, rtol=1e-4, atol=1e-4)
    assert len(mask_tokens.unique(dim=0)) == len(mask_tokens)
    assert mask_tokens.shape[1] == {"single": 1, "all": 5 if is_hq(model) else 4}[tokens]


@torch.no_grad()
def test_the_mask_is_made_of_the_single_token(model):
    decoder = decoder_of(model)
    of_hq = getattr(decoder, "hf_mlp", None) or getattr(decoder, "hq_mask_mlp", None)
    own, *others = [*([of_hq] if is_hq(model) else []), *decoder.output_hypernetworks_mlps]
    seen = []
    with (
        own.register_forward_hook(lambda module, args, output: seen.append(args[0])),
        FeatureCollector(model) as collector,
    ):
        masks = segment(model, IMAGES, BOXES)
    tokens = collector.pop().mask_tokens[:, 0]
    assert torch.equal(torch.cat([token.reshape(-1, token.shape[-1]) for token in seen]), tokens)

    def zero(module, args, output):
        return torch.zeros_like(output)

    handles = [other.register_forward_hook(zero) for other in others]
    assert torch.equal(segment(model, IMAGES, BOXES), masks)  # no other has a part in it
    handles.append(own.register_forward_hook(zero))
    assert not segment(model, IMAGES, BOXES).any()
    for handle in handles:
        handle.remove()


def first_weight(model: nn.Module) -> Tensor:
    names = ("vision_encoder", "image_encoder", "backbone")
    encoder = next(getattr(model, name) for name in names if hasattr(model, name))
    return next(p for p in encoder.parameters() if p.requires_grad and p.ndim > 1)


def test_gradients_are_those_of_one_prompt_at_a_time(model):
    """That of an image's embedding is the sum over its prompts."""
    weight, scales = first_weight(model), torch.linspace(-1, 1, BOXES.shape[:2].numel())

    def gradient(features, scales):
        loss = sum((scales * feature.flatten(1).sin().sum(1)).sum() for feature in features)
        return torch.autograd.grad(loss, weight)[0]

    with FeatureCollector(model) as collector:
        segment(model, IMAGES, BOXES)
        found = gradient(collector.pop(), scales)
        expected = torch.zeros_like(found)
        for i in range(len(IMAGES)):
            for j in range(BOXES.shape[1]):
                segment(model, IMAGES[i : i + 1], BOXES[i : i + 1, j : j + 1])
                expected += gradient(collector.pop(), scales[3 * i + j])
    assert expected.norm() > 0
    assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_wrapped_by_peft(model):
    options = {"r": 2, "init_lora_weights": False}  # or the adapters would change nothing yet
    student = copy.deepcopy(model)
    if isinstance(model, EdgeTamModel):  # peft asks it for input embeddings, which it has not
        wrapped = get_peft_model(
            student.mask_decoder, LoraConfig(target_modules=["q_proj"], **options)
        )
        student.mask_decoder = wrapped
    else:
        targets = r".*(image_encoder|vision_encoder|backbone).*\.(qkv|q_proj)"
        saved = [name for name, _ in model.named_children() if name.endswith("mask_decoder")]
        lora = LoraConfig(target_modules=targets, modules_to_save=saved, **options)
        student = wrapped = get_peft_model(student, lora)
    with FeatureCollector(student) as collector:
        segment(student, IMAGES, BOXES)
        features = collector.pop()
        with torch.no_grad(), wrapped.disable_adapter():
            segment(student, IMAGES, BOXES)
        without = collector.pop()
    with FeatureCollector(model) as collector, torch.no_grad():
        segment(model, IMAGES, BOXES)
        for found, expected in zip(without, collector.pop(), strict=True):
            assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for i in range(len(IMAGES)):
        with torch.no_grad():
            embedding, tokens = by_hand(student, IMAGES[i : i + 1], BOXES[i])
        tokens = tokens[:, [-1 if is_hq(model) else 0]]
        assert_close(features.image_embedding[3 * i].detach(), embedding[0], rtol=1e-4, atol=1e-4)
        assert_close(features.mask_tokens[3 * i : 3 * i + 3].detach(), tokens, rtol=1e-4, atol=1e-4)
    assert features.mask_tokens.requires_grad
    assert (features.mask_tokens - without.mask_tokens).abs().max() > 0.01


# Several prompts an image, where it can be told of which image they are, and where not


def test_one_prompt_an_image_is_not_copied():
    model = tiny_hf_sam()
    with FeatureCollector(model) as collector:
        outputs = []
        model.vision_encoder.register_forward_hook(lambda *args: outputs.append(args[-1][0]))
        segment(model, IMAGES, BOXES[:, :1])
    assert collector.pop().image_embedding is outputs[0]


@pytest.mark.parametrize("build", [tiny_sam2, tiny_hf_sam], ids=["sam2", "hf-sam"])
def test_copies_of_the_embedding_image_by_image(build):
    """Passes over copies are matched in order, however many prompts an image has."""
    model = build()
    with torch.no_grad(), FeatureCollector(model) as collector:
        segment(model, IMAGES, BOXES)
        expected = collector.pop()
        levels = encode(model, IMAGES)
        for i, boxes in enumerate(BOXES):
            copies = [level[i : i + 1].clone() for level in levels]
            if in_transformers(model):
                model(image_embeddings=copies[0], input_boxes=boxes[None], multimask_output=False)
            else:
                decode(model, copies, boxes)
        for found, value in zip(collector.pop(), expected, strict=True):
            assert_close(found, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_sam, tiny_hf_sam2], ids=["sam", "hf-sam2"])
def test_an_evaluation_is_left_out_where_images_have_several_prompts(build):
    """It is before the batch, with fewer prompts an image, and its samples are counted."""
    teacher, student = build().requires_grad_(False), build()
    with torch.no_grad(), FeatureCollector(student) as collector:
        segment(student, IMAGES, BOXES)
        expected = collector.pop()
    with FeatureCollector(teacher) as from_teacher, FeatureCollector(student) as from_student:
        for _ in range(2):
            with torch.no_grad():
                for model in (teacher, student):
                    segment(model, IMAGES, BOXES[:, :2].flip(0))
            for model in (teacher, student):
                segment(model, IMAGES, BOXES)
            for collector in (from_teacher, from_student):
                for found, value in zip(collector.pop(), expected, strict=True):
                    assert_close(found.detach(), value, rtol=1e-4, atol=1e-5)


def encoded_one_by_one(model):
    """A batch of three gets into segment_anything's decoder by its dense prompts."""
    embedding = torch.cat([model.image_encoder(image[None]) for image in IMAGES])
    decode(model, [embedding], BOXES[:, 0])


def a_copy(model):
    decode(model, [model.image_encoder(IMAGES[:1]).clone()], BOXES[0])


def repeated_by_hand(model):
    levels = [level.repeat_interleave(3, 0) for level in encode(model, IMAGES)]
    decode(model, levels, BOXES.flatten(0, 1))


@pytest.mark.parametrize(
    ("build", "passes"),
    [(tiny_sam, encoded_one_by_one), (tiny_sam, a_copy), (tiny_sam2, repeated_by_hand)],
)
def test_prompts_whose_image_is_not_known_are_refused(build, passes):
    model = build()
    with FeatureCollector(model) as collector:
        with pytest.raises(ValueError, match=r"cannot be told which prompt .*\. Give"):
            passes(model)
        with pytest.raises(RuntimeError, match="No image embedding and no mask tokens"):
            collector.pop()
        with torch.no_grad():
            passes(model)
        with pytest.raises(ValueError, match="cannot be told which prompt"):
            collector.pop()
