"""The InfoSAM terms in float64: against the reference, and the authors' recorded figures."""

import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from grids import over

from renyi_kd import DotProductRelation, InfoSAMDistiller, RelationModule, infosam_terms

B, D = 5, 8
TEACHER_GRID, STUDENT_GRID = (3, 4), (2, 5)
RELEASE = np.load(Path(__file__).parents[1] / "data" / "authors_release.npz")

over_residuals = pytest.mark.parametrize("residual", ["raw", "normalized"])
over_alphas = over("alpha", [0.5, 1, 2, math.inf], slow=[1.01, 3])
over_tokens = pytest.mark.parametrize("tokens", [(1, 1), (4, 4), (4, 1)], ids=str)


def features(seed, grid=TEACHER_GRID, tokens=1):
    """Correlated samples, (B, P, D) and (B, N, D): entropies well inside of 0 and log2 B."""
    rng = np.random.default_rng(seed)
    shapes = (math.prod(grid), D), (tokens, D)
    return tuple(rng.normal(size=shape) + rng.normal(size=(B, *shape)) for shape in shapes)


def make_distiller(residual="raw", seed=0, **options):
    """A distiller of random parameters, layer norms and biases included."""
    torch.manual_seed(seed)
    distiller = InfoSAMDistiller(D, relation=RelationModule(D, residual=residual), **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in distiller.double().parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return distiller


def parameters_of(distiller):
    return {name: p.detach().numpy() for name, p in distiller.relation.named_parameters()}


def expected_terms(teacher, student, parameters, residual, **options):
    relations = [
        reference.attention_relation(*pair, parameters, residual) for pair in (teacher, student)
    ]
    return reference.infosam_terms(*relations, *teacher, **options)


def tensors(arrays, *, requires_grad=False):
    return tuple(torch.tensor(array, requires_grad=requires_grad) for array in arrays)


def assert_terms(terms, expected):
    assert list(terms._fields) == list(expected)
    for name, value in terms._asdict().items():
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name


@over_residuals
@over_alphas
@over_tokens
@pytest.mark.parametrize("grid", [TEACHER_GRID, STUDENT_GRID], ids=str)
def test_distiller(residual, alpha, tokens, grid):
    teacher, student = features(1, tokens=tokens[0]), features(2, grid, tokens[1])
    distiller = make_distiller(residual, alpha=alpha)
    expected = expected_terms(teacher, student, parameters_of(distiller), residual, alpha=alpha)
    teacher, student = tensors(teacher), tensors(student)
    assert_terms(distiller.terms(teacher, student), expected)
    assert distiller(teacher, student).item() == pytest.approx(expected["loss"], abs=1e-9)
    assert math.isnan(expected["relation_cosine"]) == (
        grid != TEACHER_GRID or tokens[0] != tokens[1]
    )


@over_alphas
@over_tokens
def test_functional_form(alpha, tokens):
    rng = np.random.default_rng(0)
    relations = [rng.normal(size=(B, n, 12)) + rng.normal(size=(n, 12)) for n in tokens]
    relations = [reference.unit_length(relation) for relation in relations]
    teacher = features(1, tokens=tokens[0])
    weights = {"compression_weight": 0.3, "distillation_weight": 2.0}
    expected = reference.infosam_terms(*relations, *teacher, alpha=alpha, **weights)
    value = infosam_terms(*tensors(relations), *tensors(teacher), alpha=alpha, **weights)
    assert_terms(value, expected)


@pytest.mark.parametrize(("compression", "distillation"), [(1, 0.5), (0.3, 2), (0, 1), (1, 0)])
def test_weights(compression, distillation):
    teacher, student = features(1), features(2)
    weights = {"compression_weight": compression, "distillation_weight": distillation}
    distiller = make_distiller(**weights)
    terms = distiller.terms(tensors(teacher), tensors(student, requires_grad=True))
    assert_terms(
        terms, expected_terms(teacher, student, parameters_of(distiller), "raw", **weights)
    )
    assert terms.loss.requires_grad
    assert not any(figure.requires_grad for figure in terms[3:])


def test_near_a_collapse_compression_is_of_lower_order_than_distillation():
    """Relations that are nearly alike are driven together, unless compression has no weight."""
    rng = np.random.default_rng(0)
    same, apart = rng.normal(size=(1, 1, 12)), rng.normal(size=(2, B, 1, 12))
    found = []
    for size in (0.01, 0.02):
        relations = tensors(reference.unit_length(same + size * one) for one in apart)
        found.append(infosam_terms(*relations, *tensors(features(1))))
    near, far = found
    assert near.compressed_information > 0
    assert far.compressed_information / near.compressed_information == pytest.approx(4, rel=0.01)
    assert far.distilled_information / near.distilled_information == pytest.approx(16, rel=0.01)


LAYOUTS = {
    "B,P,D": lambda x, grid: x,
    "B,H,W,D": lambda x, grid: x.reshape(B, *grid, D),
    "B,D,H,W": lambda x, grid: x.reshape(B, *grid, D).transpose(0, 3, 1, 2),
}


over_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@over_residuals
@over_layouts
@pytest.mark.parametrize("tokens", [1, 4])
def test_relation(residual, layout, tokens):
    """Entry by entry: the terms alone do not see the order of the pixels."""
    image, mask = features(1, tokens=tokens)
    distiller = make_distiller(residual)
    attention = reference.attention_relation(image, mask, parameters_of(distiller), residual)
    dot_product = reference.dot_product_relation(image, mask)
    laid_out = tensors([layout(image, TEACHER_GRID), mask])
    for relation, expected in [
        (distiller.relation, attention),
        (DotProductRelation(), dot_product),
    ]:
        value = relation(*laid_out).detach().numpy()
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)


@over_layouts
def test_layouts(layout):
    """Teacher and student each in a layout of their own; a single token as (B, D)."""
    teacher, student = features(1), features(2)
    distiller = make_distiller()
    expected = expected_terms(teacher, student, parameters_of(distiller), "raw")
    laid_out = tensors([layout(student[0], TEACHER_GRID), student[1][:, 0]])
    assert_terms(distiller.terms(tensors(teacher), laid_out), expected)


@over_residuals
@over_alphas
def test_zero_samples(residual, alpha):
    """Two zero samples of the teacher, one of them of the student too."""
    teacher, student = features(1), features(2)
    for array in teacher:
        array[[1, 3]] = 0
    for array in student:
        array[1] = 0
    distiller = make_distiller(residual, alpha=alpha)
    expected = expected_terms(teacher, student, parameters_of(distiller), residual, alpha=alpha)
    assert_terms(distiller.terms(tensors(teacher), tensors(student)), expected)


@over_alphas
def test_zero_relations(alpha):
    """The relation of a zero sample is zero: its row of the Gram matrix follows the zero rule."""
    teacher, student = features(1), features(2)
    teacher[0][[1, 3]] = 0
    student[0][[1, 2]] = 0
    relations = [reference.dot_product_relation(*pair) for pair in (teacher, student)]
    expected = reference.infosam_terms(*relations, *teacher, alpha=alpha)
    distiller = InfoSAMDistiller(D, alpha=alpha, relation=DotProductRelation())
    student = tensors(student, requires_grad=True)
    terms = distiller.terms(tensors(teacher), student)
    assert_terms(terms, expected)
    for gradient in torch.autograd.grad(terms.loss, student):
        assert gradient.isfinite().all()
        assert (gradient[[1, 2]] == 0).all()
        assert (gradient[[0, 3, 4]] != 0).any()


# Gradients


@over_residuals
@over_alphas
@over_tokens
def test_gradients_along_random_directions(residual, alpha, tokens):
    """Against differences of the reference loss, of fourth order in the step."""
    teacher, student = features(1, tokens=tokens[0]), features(2, STUDENT_GRID, tokens[1])
    distiller = make_distiller(residual, alpha=alpha)
    arguments = tensors(student, requires_grad=True)
    loss = distiller(tensors(teacher), arguments)
    parameters = parameters_of(distiller)
    inputs = [*student, *parameters.values()]
    gradients = torch.autograd.grad(loss, [*arguments, *distiller.relation.parameters()])
    rng = np.random.default_rng(0)

    def loss_at(index, step):
        image, mask, *values = (x + step if i == index else x for i, x in enumerate(inputs))
        named = dict(zip(parameters, values, strict=True))
        return expected_terms(teacher, (image, mask), named, residual, alpha=alpha)["loss"]

    for index, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        h = 1e-3 / np.linalg.norm(direction)
        step = [loss_at(index, k * h * direction) for k in (-2, -1, 1, 2)]
        slope = (step[0] - 8 * step[1] + 8 * step[2] - step[3]) / (12 * h)
        scale = np.linalg.norm(direction) * max(gradient.norm().item(), 1e-3)
        assert abs((gradient.numpy() * direction).sum() - slope) < 1e-8 * scale


@pytest.mark.parametrize("case", ["c0_", "c1_"])
def test_authors_release(case):
    """The release's losses and all its gradients, recorded in float64."""
    recorded = {
        name.removeprefix(case): torch.tensor(RELEASE[name]).double()
        for name in RELEASE
        if name.startswith(case)
    }
    dim = recorded["fs"].shape[-1]
    relation = RelationModule(dim, residual="normalized").double()
    relation.load_state_dict(
        {name[2:]: value for name, value in recorded.items() if name.startswith("p_")}
    )
    distiller = InfoSAMDistiller(dim, relation=relation)
    student = recorded["fs"].requires_grad_(), recorded["ms"].requires_grad_()
    terms = distiller.terms((recorded["ft"], recorded["mt"]), student)
    for value, name in zip(terms[:3], ["loss", "loss_r", "loss_d"], strict=True):
        assert value.item() == pytest.approx(recorded[name].item(), rel=1e-9)
    terms.loss.backward()
    learners = {"fs": student[0], "ms": student[1], **dict(relation.named_parameters())}
    assert {f"g_{name}" for name in learners} == {n for n in recorded if n.startswith("g_")}
    for name, learner in learners.items():
        expected = recorded[f"g_{name}"]
        assert (learner.grad - expected).norm() < 1e-9 * expected.norm(), name
