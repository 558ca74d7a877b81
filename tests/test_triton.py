"""The Triton kernels against the PyTorch forms in float64: in the interpreter, or on a GPU."""

import warnings

import pytest
import torch
from grids import over, over_cases
from torch import Tensor

from renyi_kd import InfoSAMDistiller
from renyi_kd.infosam.operators import batch_gram, folding, joint, scores

triton = pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

from renyi_kd import _triton as kernels  # noqa: E402

LAYOUTS = {
    "channels first": lambda x: x.mT.contiguous().mT,
    "channels last": lambda x: x,
    "strided": lambda x: torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0],
}
over_layouts = over_cases("layout", LAYOUTS, fast=["channels first", "strided"])
over_dtypes = over("dtype", [torch.float32, torch.bfloat16], slow=[torch.float16])
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def exact(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


# Batch, pixels, channels, tokens.
@over("size", [(2, 35, 20, 1), (3, 1, 7, 3)], slow=[(2, 70, 300, 2)])
@pytest.mark.parametrize("raw", [True, False])
@over_layouts
@over_dtypes
def test_scores(size, raw, layout, dtype, monkeypatch):
    for tile in ("_TILE", "_BACKWARD_TILE"):  # several tiles
        monkeypatch.setattr(kernels.scores, tile, 2048)
    monkeypatch.setattr(kernels.scores, "_MOST_SPLITS", 2)
    batch, places, dim, tokens = size
    pixels = layout((draw(batch, places, dim) + 3).to(dtype))
    query, offset = draw(batch, tokens, dim, seed=1), draw(batch, tokens, seed=2)
    residual = draw(batch, tokens, dim, seed=3) if raw else None

    forward = pixels, query, residual, offset, 1e-5
    values = kernels.scores.scores_by_kernel(*forward)
    expected = scores.scores_by_blocks(*map(exact, forward))
    for value, reference in zip(values, expected, strict=True):
        assert value.shape == reference.shape
        assert relative_error(value, reference) < 3e-6

    grad = draw(batch, tokens, places, seed=4)
    for wanted in [(True, raw), (False, raw), (True, False)]:
        backward = grad, pixels, query, residual, *values[1:], *wanted
        gradients = kernels.scores.scores_backward_by_kernel(*backward)
        references = scores.scores_backward_by_blocks(*map(exact, backward))
        for value, reference in zip(gradients, references, strict=True):
            assert value.shape == reference.shape
            # The interpreter cuts to bfloat16 where a GPU rounds.
            rounding = 2 * torch.finfo(value.dtype).eps if value.dtype.itemsize == 2 else 0
            assert relative_error(value, reference) < 3e-6 + rounding
        if wanted[0]:
            assert gradients[0].stride() == torch.empty_like(pixels).stride()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the overflow
def test_overflow_is_not_hidden():
    pixels, query, offset = 2e19 * draw(2, 9, 16), draw(2, 1, 16, seed=1), draw(2, 1, seed=2)
    assert kernels.scores.scores_by_kernel(pixels, query, None, offset, 1e-5)[0].isnan().all()


OF_ROWS = {
    "dense": lambda x: x,
    "batch last": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0],
    "one feature": lambda x: x[:, :1].expand_as(x),
    "one sample": lambda x: x[:1].expand_as(x),
}


# Batches that a program holds as sums by feature, and as one product of matrices.
@over_dtypes
@over("shape", [(20, 777)], slow=[(3, 777), (2, 64), (5, 10_007), (33, 100)])
@pytest.mark.parametrize("long", [False, True])
@over("layout", ["dense", "strided"], slow=["batch last", "one feature", "one sample"])
def test_batch_gram(shape, dtype, long, layout, monkeypatch):
    monkeypatch.setattr(batch_gram, "_LONG", 1 if long else 2**18)
    monkeypatch.setattr(kernels.batch_gram, "_SPLITS", 3)
    monkeypatch.setattr(kernels.batch_gram, "_EXACT_SUMS", 128)
    rows = OF_ROWS[layout](draw(*shape, dtype=dtype))
    gram = kernels.batch_gram.batch_gram_by_kernel(rows)
    assert gram.dtype == torch.float64
    expected = rows.double() @ rows.double().mT
    length = expected.diagonal().sqrt()
    # Of equal products the rounding errors do not average out.
    within = 1e-6 if long else 1e-14
    assert ((gram - expected).abs() / (length[:, None] * length)).max() < within

    grad = draw(shape[0], shape[0], seed=1, dtype=torch.float64)
    gradient = kernels.batch_gram.batch_gram_backward_by_kernel(grad, rows)
    assert gradient.stride() == batch_gram.dense_in_memory_order(rows).stride()
    rounding = torch.finfo(dtype).eps * (2 if dtype.itemsize == 2 else 1)
    assert relative_error(gradient, (grad + grad.mT) @ rows.double()) < rounding


@over_dtypes
@over("shape", [(2, 1, 20), (3, 4, 16)], slow=[(5, 3, 300)])
@pytest.mark.parametrize("residual", [False, True])
def test_fold(shape, residual, dtype, monkeypatch):
    monkeypatch.setattr(kernels.folding, "_TILE", 2048)
    dim = shape[-1]
    tokens = draw(*shape, dtype=dtype).float()
    norm, bias = (1 + 0.3 * draw(dim, seed=k) for k in (1, 2))
    weights = draw(dim, dim, seed=3), draw(dim, seed=4), draw(dim, dim, seed=5), draw(dim, seed=6)
    pixel_norm = draw(dim, seed=7), draw(dim, seed=8)
    forward = tokens, norm, bias, *weights, *pixel_norm, residual, 1e-5
    values = kernels.folding.fold_by_kernel(*forward)
    expected = folding.fold_by_operators(*map(exact, forward))
    for value, reference in zip(values, expected, strict=True):
        assert value.shape == reference.shape
        assert relative_error(value, reference) < 3e-6
    query_weight, _, key_weight, key_bias = weights
    grads = draw(*shape, seed=9), draw(*shape[:2], seed=10)
    saved = tokens, norm, bias, query_weight, key_weight, key_bias, *pixel_norm, *values[2:]
    gradients = kernels.folding.fold_backward_by_kernel(*grads, *saved, residual)
    saved = *map(exact, saved[:8]), *expected[2:]
    references = folding.fold_backward_by_operators(*map(exact, grads), *saved, residual)
    for value, reference in zip(gradients, references, strict=True):
        assert value.shape == reference.shape
        assert relative_error(value, reference) < 3e-6


def test_an_empty_batch():
    """One of several processes may have no sample."""
    none, parameters = draw(0, 1, 20), [draw(20, 20), *draw(7, 20)]
    weight, *vectors = parameters
    scale, shift, query_bias, key_bias, pixel_scale, pixel_shift, _ = vectors
    of_pixels = pixel_scale, pixel_shift
    forward = none, scale, shift, weight, query_bias, weight, key_bias, *of_pixels, False, 1e-5
    query, offset, *saved = kernels.folding.fold_by_kernel(*forward)
    inputs = none, scale, shift, weight, weight, key_bias, *of_pixels
    gradients = kernels.folding.fold_backward_by_kernel(query, offset, *inputs, *saved, False)
    assert all((gradient == 0).all() for gradient in gradients)
    pixels = draw(0, 35, 20)
    values, *moments = kernels.scores.scores_by_kernel(pixels, query, none, offset, 1e-5)
    arguments = values, pixels, query, none, *moments, True, True
    gradients = kernels.scores.scores_backward_by_kernel(*arguments)
    assert [len(gradient) for gradient in gradients] == [0] * 4
    relation, length = kernels.scores.unit_length_by_kernel(values)
    assert kernels.scores.unit_length_backward_by_kernel(values, relation, length).shape == (
        0,
        1,
        35,
    )
    assert kernels.batch_gram.batch_gram_by_kernel(relation).shape == (0, 0)


@over("shape", [(3, 2, 35), (2, 1, 5000)], slow=[(2, 4, 4096)])
def test_unit_length(shape):
    values = draw(*shape[::-1]).permute(2, 1, 0)  # not in the order of memory
    values[0] = 0
    values[1] *= 1e30
    relation, length = kernels.scores.unit_length_by_kernel(values)
    assert relation.is_contiguous()
    expected = scores.unit_length_by_operators(values.double())
    assert relative_error(relation, expected[0]) < 1e-7
    assert relative_error(length, expected[1]) < 1e-13
    grad = draw(*shape, seed=1)
    gradient = kernels.scores.unit_length_backward_by_kernel(grad, relation, length)
    reference = scores.unit_length_backward_by_operators(grad.double(), *map(exact, expected))
    for value, of_sample in zip(gradient, reference, strict=True):
        assert relative_error(value, of_sample) < 1e-6


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # in what `where` drops
@over("n", [2, 3, 7], slow=[4, 16, 33])
@pytest.mark.parametrize("trains_relation", [True, False])
def test_joint_grams(n, trains_relation):
    samples = draw(4, n, 5, dtype=torch.float64) + 1
    samples[0, 1] = 0
    samples[2, :2] = 0
    grams = samples @ samples.mT
    value = kernels.joint.joint_by_kernel(grams)
    torch.testing.assert_close(value, joint.joint_by_operators(grams, trains_relation))
    grad = draw(5, n, n, seed=1, dtype=torch.float64)
    torch.testing.assert_close(
        kernels.joint.joint_backward_by_kernel(grad, grams, trains_relation),
        joint.joint_backward_by_operators(grad, grams, trains_relation),
    )


def spectra(n: int) -> Tensor:
    """Symmetric matrices: random, repeated, graded to 1e-14, of low rank, nearly all ones."""
    basis = torch.linalg.qr(draw(4, n, n, dtype=torch.float64)).Q
    eigenvalues = torch.stack(
        [
            torch.linspace(1, 2, n),
            (torch.arange(n) < (n + 1) // 2).double() + 1,
            torch.logspace(0, -14, n, dtype=torch.float64),
            (torch.arange(n) < 1).double(),
        ]
    ).to(basis)
    matrices = (basis * eigenvalues.unsqueeze(1)) @ basis.mT
    noise = 1e-9 * draw(n, n, seed=1, dtype=torch.float64)
    ones = torch.ones(2, n, n).to(basis)
    ones[1] += noise + noise.mT
    identity = torch.eye(n).to(basis)[None]
    return torch.cat([(matrices + matrices.mT) / 2, ones, identity])


@pytest.mark.skipif(not hasattr(triton.language, "gather"), reason="needs Triton 3.3")
@over("n", [1, 2, 3, 5, 8], slow=[4, 11, 16, 17, 32])
def test_eigh(n):
    matrices = spectra(n)
    values, vectors = kernels.eigenvalues.eigh_by_kernel(matrices)
    expected = torch.linalg.eigvalsh(matrices)
    largest = expected[:, -1:]
    assert ((values.sort().values - expected).abs() / largest).max() < 1e-13
    identity = torch.eye(n).to(vectors).expand_as(vectors)
    torch.testing.assert_close(vectors @ vectors.mT, identity, rtol=0, atol=1e-12)
    rebuilt = (vectors * values.unsqueeze(1)) @ vectors.mT
    assert ((rebuilt - matrices).abs().amax(dim=2) / largest).max() < 1e-12


# On a GPU


def features(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    common, own = draw(1, 64, 16, 16, dtype=dtype), draw(4, 64, 16, 16, seed=seed, dtype=dtype)
    return common + own, draw(4, 1, 64, seed=seed + 1, dtype=dtype)


def make_step(alpha: float, dtype: torch.dtype = torch.float32):
    """The arguments of `step`: a distiller, teacher and student."""
    torch.manual_seed(0)
    distiller = InfoSAMDistiller(64, alpha=alpha).to(DEVICE, dtype)
    return distiller, features(1, dtype), tuple(x.requires_grad_() for x in features(3, dtype))


def step(distiller: InfoSAMDistiller, teacher, student) -> tuple[Tensor, ...]:
    """The loss and all gradients."""
    loss = distiller(teacher, student)
    return loss.detach(), *torch.autograd.grad(loss, [*student, *distiller.parameters()])


over_alphas = pytest.mark.parametrize("alpha", [2, 3, 1.01])


@needs_cuda
@over_alphas
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_distiller_matches_the_cpu_in_float64(alpha, dtype, tolerance):
    distiller, *pairs = make_step(alpha, dtype)
    values = step(distiller, *pairs)
    teacher, student = ([x.detach().cpu().double() for x in pair] for pair in pairs)
    references = step(distiller.cpu().double(), teacher, [x.requires_grad_() for x in student])
    for value, reference in zip(values, references, strict=True):
        assert relative_error(value.cpu(), reference) < tolerance


@needs_cuda
@over_alphas
def test_nothing_waits_for_the_device(alpha):
    arguments = make_step(alpha)
    step(*arguments)
    try:
        with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@over_alphas
def test_deterministic(alpha):
    arguments = make_step(alpha)
    for first, second in zip(step(*arguments), step(*arguments), strict=True):
        assert torch.equal(first, second)


@needs_cuda
@over_alphas
def test_captured_in_a_graph(alpha):
    distiller, teacher, student = make_step(alpha)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(distiller, teacher, student)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(distiller, teacher, student)
    with torch.no_grad():
        student[0].copy_(features(5, torch.float32)[0])
    graph.replay()
    for value, reference in zip(captured, step(distiller, teacher, student), strict=True):
        assert relative_error(value, reference) < 1e-6
