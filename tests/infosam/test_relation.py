"""The folded relation against its textbook form: values, gradients, digits, memory."""

import pytest
import torch
import torch.nn.functional as F
from tensors import LAYOUTS, draw, relative_error
from torch import Tensor

from renyi_kd import DotProductRelation, InfoSAMDistiller, RelationModule
from renyi_kd.infosam.operators.batch_gram import batch_gram

over_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
over_residuals = pytest.mark.parametrize("residual", ["raw", "normalized"])
# Batch, pixels, channels, tokens.
over_sizes = pytest.mark.parametrize(
    "size", [(3, 30, 16, 1), (2, 1, 7, 8), (4, 50, 37, 3)], ids=str
)


def make_relation(dim: int, residual: str) -> RelationModule:
    """Of random parameters, layer norms and biases included."""
    module = RelationModule(dim, residual=residual).double()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter += 0.3 * draw(*parameter.shape, seed=seed)
    return module


def textbook_relation(module: RelationModule, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 8 and 9 as they stand, everything materialised."""
    normalized_pixels, normalized_tokens = (
        module.layer_norm_feat(pixels),
        module.layer_norm_mask(tokens),
    )
    query, key = module.query_proj(normalized_tokens), module.key_proj(normalized_pixels)
    result = query @ key.mT / module.dim**0.5
    if module.residual == "raw":
        result = result + tokens @ pixels.mT
    else:
        result = result + normalized_tokens @ normalized_pixels.mT
    return F.normalize(result.flatten(1)).view_as(result)


def results(module, relation, pixels: Tensor, tokens: Tensor) -> list[Tensor]:
    """The relation, and the gradients of map, tokens and parameters for a random cotangent."""
    pixels, tokens = pixels.detach().requires_grad_(), tokens.detach().requires_grad_()
    value = relation(pixels, tokens)
    cotangent = draw(*value.shape, seed=7).to(value.dtype)
    learners = [pixels, tokens, *module.parameters()]
    return [value, *torch.autograd.grad(value, learners, cotangent)]


@over_layouts
@over_residuals
@over_sizes
def test_relation_is_the_textbook_one(layout, residual, size):
    batch, places, dim, tokens = size
    module = make_relation(dim, residual)
    pixels, tokens = layout(draw(batch, places, dim)), draw(batch, tokens, dim, seed=1)
    expected = results(module, lambda *x: textbook_relation(module, *x), pixels, tokens)
    for value, reference in zip(results(module, module, pixels, tokens), expected, strict=True):
        assert (value - reference).norm() <= 1e-10 * reference.norm()


@over_layouts
@over_residuals
@pytest.mark.parametrize("mean", ["none", "of each pixel", "common"])
def test_float32_relation_keeps_its_digits(layout, residual, mean):
    batch, places, dim = 3, 400, 64
    module = make_relation(dim, residual)
    offset = {"none": 0, "of each pixel": 100 * draw(batch, places, 1, seed=2), "common": 100}[mean]
    pixels = layout((draw(batch, places, dim) + offset).float())
    tokens = draw(batch, 2, dim, seed=1).float()
    module.float()
    values = results(module, module, pixels, tokens)
    module.double()
    expected = results(
        module, lambda *x: textbook_relation(module, *x), pixels.double(), tokens.double()
    )
    for value, reference in zip(values, expected, strict=True):
        assert relative_error(value, reference) < (1e-5 if mean == "none" else 1e-4)


# One at a time: under reduced precision products are in float64, which autocast leaves alone.
@pytest.fixture(params=["autocast", "medium"])
def reduced_precision(request):
    before = torch.get_float32_matmul_precision()
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param == "autocast"):
        yield
    torch.set_float32_matmul_precision(before)


@over_residuals
@pytest.mark.usefixtures("reduced_precision")
def test_precision_is_kept_under_autocast_and_reduced_matmul_precision(residual):
    module = make_relation(64, residual)
    pixels, tokens = draw(3, 200, 64).float(), draw(3, 1, 64, seed=1).float()
    values = results(module.float(), module, pixels, tokens)
    with torch.autocast("cpu", enabled=False):
        module.double()
        expected = results(
            module, lambda *x: textbook_relation(module, *x), pixels.double(), tokens.double()
        )
        rows = F.normalize(draw(2, 2**18).float().double())
        reference = rows @ rows.mT
    for value, exact in zip(values, expected, strict=True):
        assert relative_error(value, exact) < 1e-6
    assert (batch_gram(rows.float()) - reference).abs().max() < 1e-8


def test_the_graph_holds_the_maps_and_nothing_of_their_size():
    batch, dim, side, tokens = 4, 32, 16, 1
    distiller = InfoSAMDistiller(dim)
    teacher = draw(batch, dim, side, side).float(), draw(batch, tokens, dim).float()
    student = tuple(draw(*x.shape, seed=1).float().requires_grad_() for x in teacher)
    given = {x.untyped_storage().data_ptr() for x in (*teacher, *student, *distiller.parameters())}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        distiller(teacher, student)
    of_scores, of_tokens = (batch * tokens * size * 4 for size in (side**2, dim))
    # Of each map: normalised scores, relation, relation in float64, mean and deviation of the
    # pixels, and four vectors a token; of both, some (B, B) matrices.
    assert max(held.values()) <= 2 * of_scores
    assert sum(held.values()) <= 2 * 6 * of_scores + 12 * of_tokens


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_pixel_shows_in_channels_last(bad):
    module = make_relation(6, "raw").float()
    pixels = draw(2, 9, 6).float()
    pixels[1, 3, 2] = bad
    values = results(module, module, pixels, draw(2, 1, 6, seed=1).float())
    assert all(not value.isfinite().all() for value in values)


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_overflow_is_not_hidden(layout):
    """Where squares leave float32, dividing by an infinite deviation would give zero."""
    module = make_relation(64, "normalized").float()
    pixels = LAYOUTS[layout](2e19 * draw(2, 9, 64).float())
    assert module(pixels, draw(2, 1, 64).float()).isnan().all()


def test_an_empty_batch():
    shapes = (0, 8, 4, 4), (0, 1, 8)
    for module in (RelationModule(8), DotProductRelation()):
        assert module(*map(torch.empty, shapes)).shape == (0, 1, 16)
