"""Derivatives of the loss beyond a gradient backwards, and relations whose layers were changed."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tensors import draw
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from renyi_kd import DotProductRelation, InfoSAMDistiller, RelationModule, infosam_terms

D = 8
TEACHER = draw(4, D, 3, 3), draw(4, 2, D, seed=1)
STUDENT = draw(4, D, 3, 2, seed=2), draw(4, 1, D, seed=3)
TANGENT = draw(4, D, 3, 2, seed=4), draw(4, 1, D, seed=5)
RELATIONS = {
    "raw": lambda: RelationModule(D),
    "normalized": lambda: RelationModule(D, residual="normalized"),
    "dot product": DotProductRelation,
}
over_relations = pytest.mark.parametrize("relation", RELATIONS)
over_alphas = pytest.mark.parametrize("alpha", [2, 3, 1.01, 0.5])
over_detached = pytest.mark.parametrize("trains_relation", [True, False])


def make_distiller(relation, alpha=2, trains_relation=True):
    torch.manual_seed(0)
    options = {"alpha": alpha, "distillation_trains_relation": trains_relation}
    return InfoSAMDistiller(D, relation=RELATIONS[relation](), **options).double()


def gradients(distiller, student=STUDENT):
    leaves = [x.clone().requires_grad_() for x in student]
    loss = distiller(TEACHER, leaves)
    return torch.autograd.grad(loss, [*leaves, *distiller.parameters()])


@over_relations
@over_alphas
@over_detached
def test_forward_mode(relation, alpha, trains_relation):
    distiller = make_distiller(relation, alpha, trains_relation)
    of_student = gradients(distiller)[:2]
    expected = sum((g * t).sum() for g, t in zip(of_student, TANGENT, strict=True))

    def loss(*student):
        return distiller(TEACHER, student)

    torch.testing.assert_close(torch.func.jvp(loss, STUDENT, TANGENT)[1], expected)
    with forward_ad.dual_level():
        student = [forward_ad.make_dual(*pair) for pair in zip(STUDENT, TANGENT, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(loss(*student)).tangent, expected)
        relations = distiller.relation(*TEACHER), distiller.relation(*student)
        terms = infosam_terms(*relations, *TEACHER, alpha=alpha)
        torch.testing.assert_close(forward_ad.unpack_dual(terms.loss).tangent, expected)


@over_relations
@over_alphas
@over_detached
def test_transforms_of_torch_func(relation, alpha, trains_relation):
    distiller = make_distiller(relation, alpha, trains_relation)
    expected = gradients(distiller)
    parameters = dict(distiller.named_parameters())

    def loss(parameters, image_embedding, mask_tokens):
        student = image_embedding, mask_tokens
        return functional_call(distiller, parameters, (TEACHER, student))

    of_parameters, *of_student = torch.func.grad(loss, argnums=(0, 1, 2))(parameters, *STUDENT)
    for value, reference in zip((*of_student, *of_parameters.values()), expected, strict=True):
        torch.testing.assert_close(value, reference)
    found = torch.func.jacrev(loss, argnums=1)(parameters, *STUDENT)
    torch.testing.assert_close(found, expected[0])
    pairs = [torch.stack([x, 2 * x]) for x in STUDENT]
    values = torch.vmap(loss, in_dims=(None, 0, 0))(parameters, *pairs)
    for k, value in enumerate(values):
        torch.testing.assert_close(value, distiller(TEACHER, [x[k] for x in pairs]))


def test_compiled_forward_mode_is_right():
    # Without layer norms. Where PyTorch fails to trace their forward mode, the traceback keeps
    # guards of its dispatcher alive, and when they go, autograd is off for the tests that follow.
    distiller = make_distiller("dot product")
    of_student = gradients(distiller)[:2]
    expected = sum((g * t).sum() for g, t in zip(of_student, TANGENT, strict=True))

    def slope(*student):
        return torch.func.jvp(lambda *x: distiller(TEACHER, x), student, TANGENT)[1]

    torch._dynamo.reset()
    found = torch.compile(slope, backend="aot_eager", fullgraph=True)(*STUDENT)
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_hessian_is_the_slope_of_the_gradient():
    distiller = make_distiller("raw")
    image_embedding, tokens = STUDENT
    h, tangent = 1e-5, TANGENT[1]
    slope = [gradients(distiller, (image_embedding, tokens + k * tangent))[1] for k in (h, -h)]
    hessian = torch.func.hessian(lambda x: distiller(TEACHER, (image_embedding, x)))(tokens)
    along = (hessian * tangent).sum(dim=(3, 4, 5))
    torch.testing.assert_close(along, (slope[0] - slope[1]) / (2 * h), rtol=1e-5, atol=1e-9)


# Layers that are not what they were


def with_lora(relation):
    config = LoraConfig(r=2, target_modules=["query_proj", "key_proj"], init_lora_weights=False)
    return inject_adapter_in_model(config, relation)


def with_spectral_norm(relation):
    nn.utils.spectral_norm(relation.query_proj)
    return relation


def with_parametrization(relation):
    nn.utils.parametrizations.spectral_norm(relation.key_proj)
    return relation


def with_hook(relation):
    relation.layer_norm_feat.register_forward_hook(lambda module, arguments, output: 2 * output)
    return relation


def with_sequential(relation):
    relation.key_proj = nn.Sequential(nn.Linear(D, 3), nn.GELU(), nn.Linear(3, D))
    return relation


def without_bias(relation):
    relation.query_proj = nn.Linear(D, D, bias=False)
    return relation


def without_affine(relation):
    relation.layer_norm_mask = nn.LayerNorm(D, elementwise_affine=False)
    return relation


def with_forward_of_its_own(relation):
    linear = relation.query_proj.forward
    relation.query_proj.forward = lambda x: 3 * linear(x)
    return relation


def with_narrow_projections(relation):
    relation.query_proj, relation.key_proj = nn.Linear(D, 1), nn.Linear(D, 1)
    return relation


CHANGES = [
    with_forward_of_its_own,
    with_narrow_projections,
    with_lora,
    with_spectral_norm,
    with_parametrization,
    with_hook,
    with_sequential,
    without_bias,
    without_affine,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("residual", ["raw", "normalized"])
def test_changed_layers_count(change, residual):
    torch.manual_seed(0)
    relation = change(RelationModule(D, residual=residual)).double().eval()
    image_embedding, tokens = TEACHER
    pixels = image_embedding.flatten(2).mT
    normalized = relation.layer_norm_mask(tokens), relation.layer_norm_feat(pixels)
    query, key = relation.query_proj(normalized[0]), relation.key_proj(normalized[1])
    left, right = (tokens, pixels) if residual == "raw" else normalized
    scores = (query @ key.mT / D**0.5 + left @ right.mT).flatten(1)
    expected = nn.functional.normalize(scores).view(4, 2, 9)
    torch.testing.assert_close(relation(image_embedding, tokens), expected)

    distiller = InfoSAMDistiller(D, relation=relation)
    distiller(TEACHER, STUDENT).backward()
    trained = [name for name, p in relation.named_parameters() if p.requires_grad]
    assert trained
    for name, parameter in relation.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning"
)  # PyTorch plans another one
def test_a_quantised_layer_counts():
    torch.manual_seed(0)
    relation = RelationModule(D)
    image_embedding, tokens = (x.float() for x in TEACHER)
    exact = relation(image_embedding, tokens)
    relation.query_proj = torch.ao.nn.quantized.dynamic.Linear.from_float(
        _with_config(relation.query_proj)
    )
    near = relation(image_embedding, tokens)
    assert 0 < (near - exact).abs().max() < 0.05


def _with_config(layer):
    layer = copy.deepcopy(layer)
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return layer


def test_a_module_of_a_half_type_keeps_the_digits_of_float32():
    torch.manual_seed(0)
    relation = without_bias(RelationModule(D)).bfloat16()
    image_embedding, tokens = (x.float() for x in TEACHER)
    value = relation(image_embedding, tokens)
    assert value.dtype == torch.float32
    reference = copy.deepcopy(relation).double()(*TEACHER)
    assert (value - reference).abs().max() < 1e-6


@pytest.mark.parametrize("change", [with_spectral_norm, with_parametrization])
def test_buffers_take_the_dtype_of_wider_features(change):
    values = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        values.append(change(RelationModule(D)).to(dtype).eval()(*TEACHER))
    torch.testing.assert_close(*values)
