"""Features of models that are no SAM, by the names of their modules."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    SwinConfig,
)

from renyi_kd import FeatureCollector, InfoSAMDistiller

DIM, QUERIES = 32, 5
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LINEAR = {"image_embedding": "neck", "mask_tokens": ("head.norm", lambda output: output[0])}


class Norm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x), "beside"


class Head(nn.Module):
    """One norm after each of two layers, which returns a tuple."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)])
        self.norm = Norm(DIM)

    def forward(self, tokens):
        for layer in self.layers:
            tokens, _ = self.norm(layer(tokens))
        return tokens


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.neck, self.head, self.spare = nn.Conv2d(3, DIM, 16, 16), Head(), Head()

    def forward(self, images):
        embedding = self.neck(images)
        return torch.einsum("bnd,bdhw->bnhw", self.head(self.queries(embedding)), embedding)

    def queries(self, embedding):
        return embedding.mean((2, 3))[:, None] + torch.arange(QUERIES)[:, None]


def mask2former() -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=DIM,
        mask_feature_size=DIM,
        hidden_dim=DIM,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=QUERIES,
        num_labels=2,
    )
    return Mask2FormerForUniversalSegmentation(config).eval()


def detr() -> DetrForObjectDetection:
    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=DIM,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=QUERIES,
        num_labels=2,
    )
    return DetrForObjectDetection(config).eval()


def test_queries_of_mask2former():
    """Its decoder applies one norm after every layer, and works on (queries, images, D)."""
    model = mask2former()
    tokens = "decoder.layernorm", lambda output: output.transpose(0, 1)
    with FeatureCollector(model, image_embedding="mask_projection", mask_tokens=tokens) as of_model:
        output = model(pixel_values=IMAGES)
    embedding, queries = of_model.pop()
    assert queries.shape == (3, QUERIES, DIM)
    assert_close(model.class_predictor(queries), output.class_queries_logits)
    predictor = model.model.transformer_module.decoder.mask_predictor
    masks = torch.einsum("bnd,bdhw->bnhw", predictor.mask_embedder(queries), embedding)
    assert_close(masks, output.masks_queries_logits)


def test_queries_of_detr():
    model = detr()
    encoded = "model.encoder", lambda output: output.last_hidden_state
    names = {"image_embedding": encoded, "mask_tokens": "model.decoder.layernorm"}
    with FeatureCollector(model, **names) as collector:
        output = model(pixel_values=IMAGES)
        features = collector.pop()
        with torch.no_grad():
            model(pixel_values=IMAGES)
        of_teacher = collector.pop()
    assert torch.equal(features.image_embedding, output.encoder_last_hidden_state)
    assert_close(model.class_labels_classifier(features.mask_tokens), output.logits)

    distiller = InfoSAMDistiller(DIM)
    distiller(of_teacher, features).backward()
    assert model.model.input_projection.weight.grad.norm() > 0


# Passes


def features_of(model):
    """By hand: the neck, and the last norm of the head."""
    embedding = model.neck(IMAGES)
    tokens = model.queries(embedding)
    for layer in model.head.layers:
        tokens = nn.functional.layer_norm(layer(tokens), (DIM,))
    return embedding, tokens


def test_the_last_run_in_a_call_counts_and_calls_add_up():
    model = Segmenter()
    with FeatureCollector(model, **LINEAR) as collector:
        model(IMAGES[:1])
        model.neck(IMAGES.flip(0))  # not in a call of the model
        model(IMAGES[1:])
        model.head.norm(torch.zeros(7, DIM))
    for found, expected in zip(collector.pop(), features_of(model), strict=True):
        assert_close(found, expected)
        assert found.requires_grad


def test_an_evaluation_is_left_out():
    model = Segmenter().train()
    with FeatureCollector(model, **LINEAR) as collector:
        with torch.no_grad():
            model(IMAGES.flip(0))
        model(IMAGES)
        with collector.paused():
            model(IMAGES)
    for found, expected in zip(collector.pop(), features_of(model), strict=True):
        assert_close(found, expected)


def test_named_modules_may_be_checkpointed():
    class Checkpointed(Segmenter):
        def forward(self, images):
            embedding = checkpoint(self.neck, images, use_reentrant=False)
            return checkpoint(self.head, self.queries(embedding), use_reentrant=False)

    model = Checkpointed()
    with FeatureCollector(model, **LINEAR) as collector:
        for _ in range(2):  # the backward pass of the first runs both again
            model(IMAGES)
            features = collector.pop()
            sum(feature.square().sum() for feature in features).backward()
    assert model.neck.weight.grad.norm() > 0
    for found, expected in zip(features, features_of(model), strict=True):
        assert_close(found, expected)


def test_a_call_that_fails_leaves_nothing():
    model = Segmenter()
    with FeatureCollector(model, **LINEAR) as collector:
        with pytest.raises(RuntimeError, match="channels"):
            model(IMAGES[:, :1])
        model(IMAGES)
    assert len(collector.pop().mask_tokens) == 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_missing_halves_are_named():
    model = Segmenter()
    with FeatureCollector(model, **LINEAR) as collector:
        model.neck(IMAGES)
        with pytest.raises(RuntimeError, match=r"No image embedding and .* call the very module"):
            collector.pop()
    with FeatureCollector(model, image_embedding="neck", mask_tokens="spare.layers.0") as collector:
        model(IMAGES)
        with pytest.raises(RuntimeError, match=r"No mask tokens .* call the very module"):
            collector.pop()
    names = {"image_embedding": "spare", "mask_tokens": "head.layers.1"}
    with FeatureCollector(model, **names) as collector:
        model(IMAGES)
        with pytest.raises(RuntimeError, match="No image embedding collected"):
            collector.pop()
        assert len(collector.pop(torch.zeros(3, DIM, 4, 4)).mask_tokens) == 3


# Names


def test_names_in_a_wrapped_model():
    model = Segmenter()
    lora = LoraConfig(target_modules=["head.layers.0"], modules_to_save=["norm"])
    student = get_peft_model(copy.deepcopy(model), lora)
    for wrapped in (nn.Sequential(model), student, nn.DataParallel(student)):
        with FeatureCollector(wrapped, **LINEAR) as collector:
            wrapped(IMAGES)
        for found, expected in zip(collector.pop(), features_of(model), strict=True):
            assert_close(found, expected)


def test_of_the_two_modules_that_peft_keeps_the_one_that_runs_is_collected():
    student = get_peft_model(
        Segmenter(), LoraConfig(target_modules=["neck"], modules_to_save=["head"])
    )
    head = student.base_model.model.head
    nn.init.constant_(head.modules_to_save["default"].norm.bias, 7)
    with FeatureCollector(student, **LINEAR) as collector:
        student(IMAGES)
        assert_close(collector.pop().mask_tokens.mean(2), torch.full((3, QUERIES), 7.0))
        with student.disable_adapter():
            student(IMAGES)
        expected = features_of(Segmenter())[1]
        assert_close(collector.pop().mask_tokens, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_embedding": "neck"}, r"given both or neither, got 'neck' and None"),
        ({"mask_tokens": "neck"}, r"given both or neither, got None and 'neck'"),
        (
            {"image_embedding": "nek", "mask_tokens": "neck"},
            r"must name a module of Segmenter, got 'nek'\. The nearest names are neck",
        ),
        (
            {"image_embedding": "neck", "mask_tokens": "decoder.norm"},
            r"`mask_tokens` must name a module .* nearest names are head\.norm",
        ),
        (
            {"image_embedding": "neck", "mask_tokens": "layers.0"},
            r"the end of 2 names: head\.layers\.0, spare\.layers\.0\.$",
        ),
        ({"image_embedding": "", "mask_tokens": "neck"}, "must name a module of Segmenter, got ''"),
    ],
)
def test_names_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureCollector(Segmenter(), **options)


@pytest.mark.parametrize("named", [3, ("neck",), ("neck", "head"), (abs, "neck")])
def test_what_is_no_name_is_refused(named):
    with pytest.raises(TypeError, match="`mask_tokens` must be the name of a module, or a pair"):
        FeatureCollector(Segmenter(), image_embedding="neck", mask_tokens=named)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got str"):
        FeatureCollector("model", image_embedding="a", mask_tokens="b")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"image_embedding": "neck", "mask_tokens": "head.norm"},
            TypeError,
            r"`mask_tokens` of head\.norm must be .* \(B, N, D\) or \(B, D\), got "
            r"tuple\(a tensor of shape \(3, 5, 32\), str\)\. Give mask_tokens=\('head\.norm', func",
        ),
        (
            LINEAR | {"image_embedding": ("neck", lambda x: x.mean((1, 2, 3)))},
            TypeError,
            r"`image_embedding` of neck must be .* got a tensor of shape \(3,\)",
        ),
        (
            LINEAR | {"image_embedding": ("neck", lambda x: x.int())},
            TypeError,
            "must be a tensor of floating point",
        ),
        (
            LINEAR | {"image_embedding": ("neck", lambda x: x[:1])},
            ValueError,
            r"must have as many rows, one a sample, got \(1, 32, 4, 4\) and \(3, 5, 32\)",
        ),
    ],
)
def test_outputs_that_are_refused(options, error, message):
    model = Segmenter()
    with FeatureCollector(model, **options), pytest.raises(error, match=message):
        model(IMAGES)
