"""The folded relation and the Gram matrix of maps against their textbook forms, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from renyi_kd import DotProductRelation, InfoSAMDistiller, RelationModule, infosam_terms
from renyi_kd._precision import ieee_dtype
from renyi_kd.infosam.operators.batch_gram import batch_gram as sample_gram
from renyi_kd.information.routes.eigenvalues import eigh
from renyi_kd.infosam.operators import scores
from renyi_kd.infosam.operators.folding import fold_query
from renyi_kd.infosam.operators.joint import joint_grams
from renyi_kd.infosam.operators.scores import relation_scores, unit_length

LAYOUTS = {
    "channels first": lambda x: x.mT.contiguous().mT,
    "channels last": lambda x: x,
    "strided": lambda x: torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}
over_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
over_residuals = pytest.mark.parametrize("residual", ["raw", "normalized"])
# Batch, pixels, channels, tokens.
over_sizes = pytest.mark.parametrize(
    "size", [(3, 30, 16, 1), (2, 1, 7, 8), (4, 50, 37, 3)], ids=str
)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.detach().double() - reference).norm() / reference.norm()).item()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


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


# The relation module


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


@pytest.mark.parametrize("block", [8, 64, 2**18])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 5])
def test_scores_of_any_dtype_block_by_block(block, layout, dtype, tokens, monkeypatch):
    """More blocks than one, a last one that is shorter, samples alone and together."""
    monkeypatch.setattr(scores, "BLOCK", block)
    compute = torch.promote_types(dtype, torch.float32)
    pixels = LAYOUTS[layout](draw(3, 13, 6, dtype=dtype)).requires_grad_()
    query, residual = (draw(3, tokens, 6, seed=s).to(compute).requires_grad_() for s in (1, 2))
    offset = draw(3, tokens, seed=3).to(compute).requires_grad_()
    inputs = pixels, query, residual, offset
    value = relation_scores(*inputs, 1e-5)
    cotangent = draw(*value.shape, seed=4).to(compute)
    gradients = torch.autograd.grad(value, inputs, cotangent)
    assert [x.dtype for x in (value, *gradients)] == [compute, *(x.dtype for x in inputs)]
    if layout != "strided":
        assert gradients[0].stride() == pixels.stride()

    f, w, v, c = exact = [x.detach().double().requires_grad_() for x in inputs]
    normalized = F.layer_norm(f, (6,), eps=1e-5)
    expected = w @ normalized.mT + v @ f.mT + c.unsqueeze(2)
    references = torch.autograd.grad(expected, exact, cotangent.double())
    tolerance = 1e-12 if compute == torch.float64 else 2e-6
    assert relative_error(value, expected) < tolerance
    for gradient, reference in zip(gradients, references, strict=True):
        rounding = torch.finfo(gradient.dtype).eps if gradient.dtype.itemsize == 2 else 0
        assert relative_error(gradient, reference) < tolerance + rounding


# The operators


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).requires_grad_()


def fold(tokens, *parameters, residual=True):
    pairs = [parameters[i : i + 2] for i in range(0, 8, 2)]
    return fold_query(tokens, *pairs, residual=residual, eps=1e-5)


def raw_grams() -> Tensor:
    samples = draw(4, 3, 5) + draw(4, 1, 5, seed=1)
    return samples @ samples.mT


FOLD_SHAPES = [(2, 2, 3), (3,), (3,), (3, 3), (3,), (3, 3), (3,), (3,), (3,)]
OPERATORS = {
    "scores": (
        lambda *x: relation_scores(*x, 1e-3),
        lambda: (leaf(2, 5, 3), leaf(2, 2, 3, seed=1), leaf(2, 2, 3, seed=2), leaf(2, 2, seed=3)),
    ),
    "scores without residual": (
        lambda f, w, c: relation_scores(f, w, None, c, 1e-3),
        lambda: (leaf(2, 3, 5).mT, leaf(2, 2, 3, seed=1), leaf(2, 2, seed=3)),
    ),
    "unit_length": (unit_length, lambda: (leaf(3, 2, 4),)),
    "fold": (fold, lambda: tuple(leaf(*s, seed=i) for i, s in enumerate(FOLD_SHAPES))),
    "fold without residual": (
        lambda *x: fold(*x, residual=False),
        lambda: tuple(leaf(*s, seed=i) for i, s in enumerate(FOLD_SHAPES)),
    ),
    "sample_gram": (sample_gram, lambda: (leaf(3, 4, 5),)),
    "joint_grams": (
        # Of a symmetric argument: the gradient is that of Gram matrices.
        lambda x: joint_grams(x @ x.mT, True),
        lambda: (leaf(4, 3, 5),),
    ),
    "joint_grams, detached": (
        lambda x: joint_grams(x @ x.mT, False)[:4],
        lambda: (leaf(4, 3, 5),),
    ),
    "eigenvalues": (
        lambda x: eigh(x + x.mT)[0],
        lambda: (leaf(2, 4, 4),),
    ),
}
over_operators = pytest.mark.parametrize(("function", "inputs"), OPERATORS.values(), ids=OPERATORS)


@over_operators
def test_gradcheck(function, inputs):
    assert torch.autograd.gradcheck(function, inputs())


@over_operators
def test_second_derivatives_are_refused(function, inputs):
    arguments = inputs()
    output = function(*arguments)
    output = output[0] if isinstance(output, tuple) else output
    (gradient,) = torch.autograd.grad(output.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), arguments[0])


def test_registration():
    """Schema, shapes without data, and autograd of each operator, as PyTorch checks them."""
    check = torch.library.opcheck
    pixels, query, offset = leaf(2, 5, 3), leaf(2, 2, 3, seed=1), leaf(2, 2, seed=2)
    for residual in (None, leaf(2, 2, 3, seed=3)):
        check(torch.ops.renyi_kd.scores.default, (pixels, query, residual, offset, 1e-5))
    # As of tokens (N, B, D): strides must be foreseen too.
    turned = leaf(2, 3, 4).transpose(0, 1)
    for residual in (None, turned):
        inputs = leaf(3, 5, 4), turned, residual, leaf(3, 2)
        check(torch.ops.renyi_kd.scores.default, (*inputs, 1e-5))
        _, normalized, mean, rstd = torch.ops.renyi_kd.scores(*inputs, 1e-5)
        saved = [x if x is None else x.detach() for x in (*inputs[:3], normalized, mean, rstd)]
        arguments = draw(3, 2, 5), *saved, True, residual is not None
        check(torch.ops.renyi_kd.scores_backward.default, arguments)
    check(torch.ops.renyi_kd.unit_length.default, (leaf(2, 3, 4),))
    check(torch.ops.renyi_kd.unit_length.default, (leaf(2, 3, 4).transpose(0, 1),))
    check(torch.ops.renyi_kd.sample_gram.default, (leaf(2, 3, 4),))
    check(torch.ops.renyi_kd.joint_grams.default, (raw_grams().requires_grad_(), True))
    check(torch.ops.renyi_kd.eigh.default, (raw_grams().requires_grad_(),))
    arguments = [leaf(*shape, seed=i) for i, shape in enumerate(FOLD_SHAPES)]
    check(torch.ops.renyi_kd.fold.default, (*arguments, True, 1e-5))
    arguments[0] = arguments[0].transpose(0, 1)
    check(torch.ops.renyi_kd.fold.default, (*arguments, True, 1e-5))


def test_moments_off_the_cpu():
    """As far as shapes go: elsewhere than on a CPU a map is one block, however long."""
    pixels = torch.empty(2, 4096, 256, device="meta")
    assert pixels[0].numel() > scores.BLOCK
    mean, variance = (torch.empty(2, 4096, device="meta") for _ in range(2))
    scores._fill_in_moments(pixels, mean, variance)


@pytest.mark.parametrize("trains_relation", [True, False])
def test_joint_grams(trains_relation):
    """With a zero sample in one variable and two in another."""
    samples = draw(4, 5, 6)
    samples[0, 1] = 0
    samples[2, :2] = 0
    grams = samples @ samples.mT
    cosines = F.normalize(samples, dim=2) @ F.normalize(samples, dim=2).mT
    cosines[0, 1, 1] = 1
    cosines[2, :2, :2] = 1
    t, s, i, m = cosines
    expected = torch.stack([t, s, i * m, i * m * t, t * s]) / 5
    torch.testing.assert_close(joint_grams(grams, trains_relation), expected)
    assert joint_grams(grams, trains_relation).diagonal(dim1=1, dim2=2).sum(1) == pytest.approx(1)


# Gram matrices of maps


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dense", [True, False])
def test_sample_gram(layout, dtype, dense):
    samples = draw(3, 5, 6, 7, dtype=dtype).permute(layout)
    samples = samples if dense else samples[:, ::2, 1:]
    rows = samples.double().flatten(1)
    torch.testing.assert_close(sample_gram(samples), rows @ rows.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("features", [2**18, 2**18 + 300, 700_001])
def test_sample_gram_of_long_maps(dtype, spread, features):
    samples = (draw(1, features) + spread * draw(4, features, seed=1)).to(dtype)
    rows = F.normalize(samples.double())
    gram = sample_gram(samples)
    length = gram.diagonal().sqrt()
    tolerance = 4e-9 if dtype == torch.float32 else 3e-8
    assert (gram / (length[:, None] * length) - rows @ rows.mT).abs().max() < tolerance


@pytest.mark.parametrize(
    "samples",
    [
        draw(3, 4, 300).mT,
        draw(4, 300, 3).permute(2, 0, 1),
        draw(300, 3, 4).transpose(0, 1),
        draw(3, 4, 1, 6).expand(3, 4, 5, 6),
        draw(3, 1, 5, 6).expand(3, 4, 5, 6),
        draw(1, 4, 5).expand(3, 4, 5),
    ],
    ids=["channels first", "batch last", "batch inside", "repeated", "repeated outside", "one"],
)
def test_sample_gram_passes_a_gradient(samples):
    samples = samples.float().requires_grad_()
    cotangent = draw(3, 3, seed=1)
    (gradient,) = torch.autograd.grad(sample_gram(samples), samples, cotangent)
    expected = (cotangent + cotangent.mT) @ samples.detach().double().flatten(1)
    assert relative_error(gradient.flatten(1), expected) < 1e-6
    if samples.mT.is_contiguous():
        assert gradient.stride() == samples.stride()
    torch.library.opcheck(torch.ops.renyi_kd.sample_gram.default, (samples,))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_rounding_of_long_maps_is_no_information(alpha):
    """Proportional samples, of entropy zero, are no more than that below order 1."""
    maps = draw(1, 2**18 + 256).float() * torch.tensor([[1.0], [0.3], [2.7], [1.9]])
    tokens, relation = torch.ones(4, 3), draw(4, 9, seed=1)
    terms = infosam_terms(relation, relation, maps, tokens, alpha=alpha)
    assert abs(terms.teacher_feature_entropy) < 1e-6


def test_image_embedding_may_train():
    relation, tokens = draw(4, 9), draw(4, 2, seed=2)
    assert torch.autograd.gradcheck(
        lambda embedding: infosam_terms(relation, relation, embedding, tokens).loss,
        leaf(4, 5, 3, seed=1),
    )


# Precision, memory, determinism


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
    assert (sample_gram(rows.float()) - reference).abs().max() < 1e-8


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_reduced_matmul_precision_calls_for_float64(device):
    """Many a CPU ignores the setting, so that no result there would show it."""
    before = torch.get_float32_matmul_precision()
    dtypes = []
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            dtypes.append(ieee_dtype(torch.float32, torch.device(device)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert dtypes == [torch.float32, torch.float64, torch.float64]


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


def test_deterministic():
    distiller = InfoSAMDistiller(16)
    teacher = draw(4, 16, 8, 8).float(), draw(4, 1, 16).float()
    student = tuple(draw(*x.shape, seed=1).float().requires_grad_() for x in teacher)
    learners = [*student, *distiller.parameters()]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad(distiller(teacher, student), learners) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


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
