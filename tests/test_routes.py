"""Every route of the entropy beside eigenvalues: from samples, by powers, by tiles, by estimate."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FAMILIES, gram_with_spectrum
from test_functionals import over_functionals, tensors

import renyi_kd
from renyi_kd import SampleGram
from renyi_kd.information.routes import choice as routes
from renyi_kd.information.routes import powers
from renyi_kd.information.routes import tiles as streaming

KERNELS = {  # name: (kernel, options, the reference's)
    "linear": (renyi_kd.linear_kernel, {}, reference.linear_kernel),
    "polynomial": (
        renyi_kd.polynomial_kernel,
        {"degree": 2, "offset": 0.5},
        reference.polynomial_kernel,
    ),
    "rbf": (renyi_kd.rbf_kernel, {"bandwidth": 2.0}, reference.rbf_kernel),
    "rbf, median": (renyi_kd.rbf_kernel, {}, reference.rbf_kernel),
    "laplacian": (renyi_kd.laplacian_kernel, {"bandwidth": 3.0}, reference.laplacian_kernel),
    "laplacian, median": (renyi_kd.laplacian_kernel, {}, reference.laplacian_kernel),
}
over_kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@pytest.fixture
def small_tiles(monkeypatch):
    """What many samples are served by serves seven: tiles of three, strips of one."""
    monkeypatch.setattr(routes, "LARGE", 4)
    monkeypatch.setattr(streaming, "_WIDTH", 3)
    monkeypatch.setattr("renyi_kd.information.routes.frobenius._WIDTH", 3)
    monkeypatch.setattr(powers, "_WIDTH", 3)
    monkeypatch.setattr(powers, "_TRIANGLE", 4)
    monkeypatch.setattr(powers, "_STRIPS", 3)
    monkeypatch.setattr(powers, "_ROWS", 2)


def samples(n, d, count=3, seed=0):
    return [np.random.default_rng(seed + v).normal(size=(n, d)) for v in range(count)]


# From samples


@over_functionals
@over_kernels
@pytest.mark.parametrize("alpha", [0.5, 1, 1.01, 1.5, 2, 3, 5, math.inf])
@pytest.mark.parametrize(("n", "d"), [(40, 3), (40, 7), (9, 12)])
def test_samples(functional, kernel, alpha, n, d):
    """Two dimensions of product 9 and 49: below and above n, and one above n itself."""
    of, options, of_reference = kernel
    x = samples(n, d)
    value = functional(renyi_kd, *[SampleGram(z, of, **options) for z in tensors(x)], alpha=alpha)
    expected = functional(reference, *[of_reference(z, **options) for z in x], alpha=alpha)
    assert value.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.usefixtures("small_tiles")
@over_functionals
@over_kernels
def test_streamed_samples(functional, kernel):
    of, options, of_reference = kernel
    x = samples(10, 12)
    grams = [SampleGram(z, of, **options) for z in tensors(x)]
    value = functional(renyi_kd, *grams, alpha=2)
    expected = functional(reference, *[of_reference(z, **options) for z in x], alpha=2)
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("small_tiles")
@over_functionals
@over_kernels
@pytest.mark.parametrize("d", [2, 8])
def test_gradient_from_samples(functional, kernel, d):
    """By the dual, and by tiles."""
    of, options, _ = kernel
    bandwidth = {"bandwidth": 2.0} if of in (renyi_kd.rbf_kernel, renyi_kd.laplacian_kernel) else {}
    options = options | bandwidth  # the median is a constant of the gradient, but not of numbers

    def value(*x):
        return functional(renyi_kd, *[SampleGram(z, of, **options) for z in x], alpha=2)

    x = tensors(samples(7, d), requires_grad=True)
    assert torch.autograd.gradcheck(value, x, atol=1e-8, rtol=1e-6)


@over_functionals
@pytest.mark.parametrize("alpha", [0.3, 0.5, 1, 1.5, 2, 3])
def test_gradient_of_the_dual(functional, alpha):
    x = tensors(samples(9, 2), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: functional(renyi_kd, *map(SampleGram, x), alpha=alpha), x, atol=1e-7, rtol=1e-6
    )


@pytest.mark.parametrize("kernel", ["rbf, median", "laplacian, median"])
def test_the_median_of_streamed_samples_is_detached(kernel):
    of, _, of_reference = KERNELS[kernel]
    (x,) = tensors(samples(600, 2, 1), requires_grad=True)
    value = renyi_kd.renyi_entropy(SampleGram(x, of))
    expected = renyi_kd.renyi_entropy(of(x))
    assert value.item() == pytest.approx(
        reference.renyi_entropy(of_reference(x.detach().numpy())), abs=1e-9
    )
    torch.testing.assert_close(*[torch.autograd.grad(y, x)[0] for y in (value, expected)])


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1, 1.5, 2, 3])
def test_float32_samples_are_taken_as_they_are(alpha):
    """The definition on the rounded samples in float64; at order 0.1 rounding still counts."""
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    expected = reference.renyi_entropy(reference.linear_kernel(x.double().numpy()), alpha)
    value = renyi_kd.renyi_entropy(SampleGram(x), alpha)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_samples_of_low_rank():
    """Fewer dimensions than they have; rounding counts as none of them, at any order."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 30))
    for alpha in (0.1, 0.5, 1, 2):
        expected = reference.renyi_entropy(reference.linear_kernel(x), alpha)
        value = renyi_kd.renyi_entropy(SampleGram(torch.tensor(x)), alpha)
        assert value.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("spread", [1e-3, 1e-6])
def test_near_duplicate_samples_keep_digits(spread):
    """1 - |A|^2 as the sum of 1 - cos^2 of pairs, from the differences of float32 samples."""
    x = 1 + spread * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    exact = x.to(torch.float64).numpy().astype(np.longdouble)
    norms = (exact**2).sum(1)
    difference = exact[:, None] - exact[None]
    inner, square = (difference * exact[:, None]).sum(-1), (difference**2).sum(-1)
    # |x|^2 |y|^2 - (x.y)^2 = |x|^2 |d|^2 - (x.d)^2, d = x - y
    minors = norms[:, None] * square - inner**2
    expected = -np.log1p(-(minors.sum() / norms.sum() ** 2)) / np.log(2)
    value = renyi_kd.renyi_entropy(SampleGram(x), 2)
    assert value.item() == pytest.approx(float(expected), rel=1e-5)


@over_kernels
def test_batches_and_mixtures_of_samples_and_matrices(kernel):
    of, options, _ = kernel
    x = torch.randn(2, 1, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(3, 20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for alpha in (1, 2, 3):
        by_samples, mixed, by_matrices = (
            renyi_kd.renyi_mutual_information(a, b, alpha)
            for a, b in [
                (SampleGram(x, of, **options), SampleGram(y, of, **options)),
                (SampleGram(x, of, **options), of(y, **options)),
                (of(x, **options), of(y, **options)),
            ]
        )
        assert by_samples.shape == (2, 3)
        torch.testing.assert_close(by_samples, by_matrices, rtol=0, atol=1e-11)
        torch.testing.assert_close(mixed, by_matrices, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("small_tiles")
def test_streamed_batches():
    x = torch.randn(2, 1, 10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(3, 10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = [x.requires_grad_(), y.requires_grad_()]

    def value(x, y):
        return renyi_kd.renyi_mutual_information(
            *(SampleGram(z, renyi_kd.rbf_kernel, bandwidth=2.0) for z in (x, y))
        )

    expected = renyi_kd.renyi_mutual_information(
        *(renyi_kd.rbf_kernel(z, bandwidth=2.0) for z in arguments)
    )
    torch.testing.assert_close(value(*arguments), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(value, arguments)


def test_a_kernel_of_ones_own():
    def cauchy_kernel(x, y, *, width):
        return 1 / (1 + (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1) / width**2)

    (x,) = tensors(samples(600, 2, 1), requires_grad=True)
    matrix = cauchy_kernel(x, x, width=2.0)
    for alpha in (1.5, 2):
        gram = SampleGram(x, lambda x, y=None: cauchy_kernel(x, x if y is None else y, width=2.0))
        value = renyi_kd.renyi_entropy(gram, alpha)
        expected = renyi_kd.renyi_entropy(matrix, alpha, method="eigvalsh")
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            *[torch.autograd.grad(y, x, retain_graph=True)[0] for y in (value, expected)]
        )


def test_progress_sees_the_tiles_of_both_passes():
    seen = []

    def progress(tiles):
        for tile in tiles:
            seen.append(tile)
            yield tile

    (x,) = tensors(samples(1200, 2, 1), requires_grad=True)
    gram = SampleGram(x, renyi_kd.rbf_kernel, bandwidth=1.0)
    value = renyi_kd.renyi_entropy(gram, progress=progress)
    assert len(seen) == 6  # of three by three tiles those of the triangle
    value.backward()
    assert len(seen) == 12


def test_streaming_makes_no_matrix():
    """Nothing of more than a few tiles is allocated, of a matrix of 2 GB."""
    (x,) = tensors(samples(16384, 2, 1), torch.float32, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profiler:
        renyi_kd.renyi_entropy(SampleGram(x, renyi_kd.rbf_kernel, bandwidth=1.0)).backward()
    assert max(event.cpu_memory_usage for event in profiler.events()) < 2**24


@given(
    n=st.integers(2, 12),
    d=st.integers(1, 12),
    copies=st.integers(1, 3),
    alpha=st.sampled_from([0.5, 1, 1.5, 2, 3, math.inf]),
    kernel=st.sampled_from(sorted(KERNELS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_copies_order_and_orientation_of_samples_change_nothing(n, d, copies, alpha, kernel, seed):
    of, options, of_reference = KERNELS[kernel]
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    expected = reference.renyi_entropy(of_reference(x, **options), alpha)
    if options or kernel == "linear":  # the median depends on copies
        x = np.repeat(x, copies, axis=0)
    if not kernel.startswith("laplacian"):  # of the L1 distance
        x = x @ np.linalg.qr(rng.normal(size=(d, d)))[0]
    x = torch.tensor(rng.permutation(x))
    value = renyi_kd.renyi_entropy(SampleGram(x, of, **options), alpha)
    assert value.item() == pytest.approx(expected, abs=1e-7)


# Powers and tiles


GRAMS = {name: FAMILIES[name] for name in ("low rank", "full rank", "rbf", "linear", "rank one")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alpha", [2, 3, 4, 5, 8, 9, 32])
@pytest.mark.parametrize("family", GRAMS)
def test_large_matrices(family, alpha, dtype):
    rng = np.random.default_rng(0)
    grams = [torch.tensor(FAMILIES[family](520, rng)).to(dtype) for _ in range(2)]
    for arguments in ([grams[0]], grams):
        value = renyi_kd.renyi_joint_entropy(*(x.requires_grad_() for x in arguments), alpha=alpha)
        without_gradient = renyi_kd.renyi_joint_entropy(
            *(x.detach() for x in arguments), alpha=alpha
        )
        rounded = [x.detach().double().numpy() for x in arguments]
        expected = reference.renyi_joint_entropy(*rounded, alpha=alpha)
        within = 1e-11 if dtype == torch.float64 else 1e-6
        assert value.item() == pytest.approx(expected, abs=within)
        assert without_gradient.item() == pytest.approx(expected, abs=within)
    (gradient,) = torch.autograd.grad(renyi_kd.renyi_entropy(grams[0], alpha), grams[0])
    expected = reference.renyi_entropy_gradient(grams[0].detach().double().numpy(), alpha)
    within = 1e-11 if dtype == torch.float64 else 2e-6
    assert np.linalg.norm(gradient.numpy() - expected) < within * np.linalg.norm(expected)


@pytest.mark.usefixtures("small_tiles")
@over_functionals
@pytest.mark.parametrize("alpha", [2, 3, 4, 7])
def test_gradients_of_large_matrices(functional, alpha):
    """Not symmetric; once and twice differentiated."""
    rng = np.random.default_rng(0)
    grams = [
        gram_with_spectrum(rng.uniform(0.2, 1, 7), rng) + 0.01 * rng.normal(size=(7, 7))
        for _ in range(3)
    ]
    arguments = tensors(grams, requires_grad=True)

    def value(*grams):
        return functional(renyi_kd, *grams, alpha=alpha)

    assert torch.autograd.gradcheck(value, arguments, atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradgradcheck(value, arguments, atol=1e-6, rtol=1e-4)
    only_one = [arguments[0], *(x.detach() for x in arguments[1:])]
    torch.testing.assert_close(
        torch.autograd.grad(value(*only_one), arguments[0])[0],
        torch.autograd.grad(value(*arguments), arguments[0])[0],
    )


@pytest.mark.parametrize("alpha", [2, 3, 5])
@pytest.mark.parametrize("n", [6, 520])
def test_vmap_compile_and_half_types(alpha, n):
    x = torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grams = renyi_kd.rbf_kernel(x, bandwidth=1.0).requires_grad_()

    def value(gram):
        return renyi_kd.renyi_entropy(gram, alpha)

    expected = value(grams)
    (gradient,) = torch.autograd.grad(expected.sum(), grams)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")(grams)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), grams)[0], gradient)
    torch.testing.assert_close(torch.func.vmap(value)(grams), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(grams), gradient)
    half = grams.detach().half()
    torch.testing.assert_close(value(half), value(half.float()), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(value(half), value(half.float()), rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [2, 3, 5])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_a_large_matrix_does_not_matter(alpha, scale):
    gram = torch.tensor(FAMILIES["rbf"](520, np.random.default_rng(0))).float()
    scaled = (gram * scale).requires_grad_()
    value = renyi_kd.renyi_mutual_information(scaled, scaled, alpha)
    expected = renyi_kd.renyi_mutual_information(gram, gram, alpha)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(value * scale, scaled)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", [2, 3])
def test_large_matrices_of_zeros_and_of_nan(alpha):
    zero = torch.zeros(520, 520, requires_grad=True)
    other = renyi_kd.rbf_kernel(torch.randn(520, 2, generator=torch.Generator().manual_seed(0)))
    value = renyi_kd.renyi_entropy(zero, alpha)
    assert value == 0
    assert (torch.autograd.grad(value, zero)[0] == 0).all()
    # The limit of adding a constant: no information.
    joint = renyi_kd.renyi_joint_entropy(zero.detach(), other, alpha=alpha)
    expected = renyi_kd.renyi_entropy(other, alpha)
    assert joint.item() == pytest.approx(expected.item(), abs=1e-6)
    for bad in (math.nan, math.inf):
        gram = other.clone()
        gram[3, 5] = bad
        gram.requires_grad_()
        value = renyi_kd.renyi_entropy(gram, alpha)
        assert not value.isfinite()
        assert not torch.autograd.grad(value, gram)[0].isfinite().all()


@pytest.mark.parametrize("alpha", [2, 3])
@pytest.mark.parametrize("second", [lambda k: k, lambda k: k * k], ids=["twice", "dependent"])
def test_matrices_that_depend_on_each_other(second, alpha):
    """Their gradients are those of the sum, whether a graph of them is made or not."""
    x = torch.randn(513, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = renyi_kd.linear_kernel(x).requires_grad_()

    def value(method):
        return renyi_kd.renyi_mutual_information(gram, second(gram), alpha, method=method)

    (expected,) = torch.autograd.grad(value("eigvalsh"), gram)
    for create_graph in (False, True):
        (gradient,) = torch.autograd.grad(value(None), gram, create_graph=create_graph)
        assert (gradient - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("alpha", [2, 3])
def test_second_derivatives_of_large_matrices(alpha):
    """Hessian times a matrix, against a difference of gradients."""
    generator = torch.Generator().manual_seed(0)
    gram = renyi_kd.linear_kernel(torch.randn(520, 9, dtype=torch.float64, generator=generator))
    step = torch.randn(520, 520, dtype=torch.float64, generator=generator) * 1e-4

    def gradient(gram, *, create_graph=False):
        gram = gram.detach().requires_grad_()
        value = renyi_kd.renyi_entropy(gram, alpha)
        return gram, torch.autograd.grad(value, gram, create_graph=create_graph)[0]

    argument, of_value = gradient(gram, create_graph=True)
    (product,) = torch.autograd.grad((of_value * step).sum(), argument)
    expected = (gradient(gram + step)[1] - gradient(gram - step)[1]) / 2
    expected = (expected + expected.mT) / 2
    assert (product - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("alpha", [2, 3])
@pytest.mark.parametrize("n", [4, 520])
def test_transforms_of_functions(alpha, n):
    gram = renyi_kd.rbf_kernel(torch.arange(2.0 * n).view(n, 2) / n).double()
    leaf = gram.clone().requires_grad_()
    (expected,) = torch.autograd.grad(renyi_kd.renyi_entropy(leaf, alpha), leaf)
    for transform in (torch.func.grad, torch.func.jacrev):
        gradient = transform(lambda k: renyi_kd.renyi_entropy(k, alpha))(gram)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("alpha", [3, 5])
def test_autocast_leaves_products_alone(alpha):
    gram = renyi_kd.linear_kernel(torch.randn(600, 20, generator=torch.Generator().manual_seed(0)))
    gram.requires_grad_()
    expected = renyi_kd.renyi_entropy(gram, alpha)
    with torch.autocast("cpu", torch.bfloat16):
        value = renyi_kd.renyi_entropy(gram, alpha)
    assert value == expected
    gradients = [torch.autograd.grad(x, gram)[0] for x in (value, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("alpha", [2, 3])
@pytest.mark.parametrize("d", [3, 700])
@pytest.mark.parametrize("other", ["linear", "rbf"])
def test_a_variable_of_zeros_carries_no_information(other, d, alpha):
    """By the dual, tile by tile, and as a matrix."""
    of, options, _ = KERNELS[other]
    zero = torch.zeros(600, d, requires_grad=True)
    y = SampleGram(torch.randn(600, 4, generator=torch.Generator().manual_seed(0)), of, **options)
    value = renyi_kd.renyi_mutual_information(SampleGram(zero), y, alpha)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert (torch.autograd.grad(value, zero)[0] == 0).all()


@pytest.mark.parametrize("d", [3, 700])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_samples_does_not_matter(d, scale):
    x = torch.randn(600, d, generator=torch.Generator().manual_seed(0))
    for alpha in (2, 3):
        value, expected = (
            renyi_kd.renyi_joint_entropy(*[SampleGram(z)] * 3, alpha=alpha) for z in (x * scale, x)
        )
        assert value.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("bandwidth", [1e-9, 1e-7, 1e-2, 1e9])
@pytest.mark.parametrize("kernel", [renyi_kd.rbf_kernel, renyi_kd.laplacian_kernel])
def test_samples_far_apart_keep_their_distances(kernel, bandwidth):
    """Clusters a million apart, samples within them a hundredth."""
    rng = np.random.default_rng(0)
    x = np.repeat(1e6 * rng.normal(size=(6, 3)), 100, axis=0) + 1e-2 * rng.normal(size=(600, 3))
    x = torch.tensor(x)
    value = renyi_kd.renyi_entropy(SampleGram(x, kernel, bandwidth=bandwidth))
    expected = renyi_kd.renyi_entropy(kernel(x, bandwidth=bandwidth), method="eigvalsh")
    assert value.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)


def test_an_outlier_does_not_hide_the_others():
    x = torch.randn(600, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0] = 1e20
    for kernel in (renyi_kd.rbf_kernel, renyi_kd.laplacian_kernel):
        value = renyi_kd.renyi_entropy(SampleGram(x, kernel))
        expected = renyi_kd.renyi_entropy(kernel(x), method="eigvalsh")
        assert value.item() == pytest.approx(expected.item(), abs=1e-9)


def test_rounding_below_order_one():
    """Of half-precision samples it is float32's; of a matrix among samples it is the matrix's."""
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(600, 1, generator=generator), torch.randn(600, 8, generator=generator)
    x = (common + 1e-2 * own).bfloat16()
    values = [renyi_kd.renyi_entropy(SampleGram(z), 0.3).item() for z in (x, x.float())]
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    x, y = torch.randn(2, 300, 4, generator=generator)
    matrix, other = renyi_kd.linear_kernel(x), renyi_kd.linear_kernel(y)
    mixed = renyi_kd.renyi_joint_entropy(matrix, SampleGram(y), alpha=0.3)
    expected = renyi_kd.renyi_joint_entropy(matrix, other, alpha=0.3)
    assert mixed.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_samples_compile(alpha):
    x = torch.randn(600, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def value(x):
        return renyi_kd.renyi_entropy(SampleGram(x), alpha)

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, value(x))
    gradients = [torch.autograd.grad(y, x)[0] for y in (compiled, value(x))]
    torch.testing.assert_close(*gradients)


# Estimates


def spectra(n):
    k = np.arange(1, n + 1)
    rng = np.random.default_rng(0)
    return {
        "flat": np.ones(n),
        "uniform": rng.uniform(0.5, 1.5, n),
        "k^-0.5": k**-0.5,
        "k^-1": 1 / k,
        "k^-2": 1.0 / k**2,
        "exponential": np.exp(-k / 30),
        "low rank": (k <= 20) * 1.0,
        "spike": np.r_[9.0, np.full(n - 1, 1 / n)],
        "one spike": np.r_[1.0, np.full(n - 1, 1e-6 / n)],
        "spike and decay": np.r_[9.0, 1 / k[1:]],
        "rank one": np.eye(n)[0],
    }


@pytest.fixture(scope="module")
def matrices():
    rng = np.random.default_rng(0)
    return {name: gram_with_spectrum(p, rng) for name, p in spectra(256).items()}


@pytest.mark.parametrize("options", [{}, {"rank": 8, "probes": 8}], ids=["default", "few vectors"])
@pytest.mark.parametrize("alpha", [1.5, 2, 2.5, 3.5, 6])
@pytest.mark.parametrize("spectrum", spectra(2))
def test_error_estimates_are_honest(matrices, spectrum, alpha, options):
    """The true error is within three times the estimate in 190 of 200 draws."""
    gram = matrices[spectrum]
    expected = reference.renyi_entropy(gram, alpha)
    # One batch of 200: each matrix has random vectors of its own.
    batch = torch.tensor(gram).float().expand(200, -1, -1)
    generator = torch.Generator().manual_seed(1)
    value, error = renyi_kd.renyi_entropy_estimate(batch, alpha=alpha, **options, generator=generator)
    assert ((value.double() - expected).abs() <= 3 * error).sum() >= 190
    assert error.max() < 1  # not by claiming nothing


@pytest.mark.parametrize(("alpha", "within"), [(1.5, 5e-3), (2, 1e-5), (2.5, 1e-3), (3.5, 1e-3)])
@pytest.mark.parametrize("d", [2, 16, 64])
def test_estimates_of_rbf_kernels(d, alpha, within):
    x = torch.randn(1024, d, generator=torch.Generator().manual_seed(0))
    gram = renyi_kd.rbf_kernel(x)
    method = Lanczos(generator=torch.Generator().manual_seed(1))
    expected = renyi_kd.renyi_entropy(gram.double(), alpha, method="eigvalsh")
    estimates = {
        "matrix": renyi_kd.renyi_entropy(gram, alpha, method=method),
        "samples": renyi_kd.renyi_entropy(SampleGram(x, renyi_kd.rbf_kernel), alpha, method=method),
    }
    for value in estimates.values():
        assert value.item() == pytest.approx(expected.item(), abs=within)


@over_functionals
@pytest.mark.parametrize("alpha", [2, 2.5])
def test_functionals_by_estimate(functional, alpha):
    """Of three matrices, of samples, and of both; errors add up in squares."""
    x = tensors(samples(300, 2))
    kernel = renyi_kd.rbf_kernel
    grams = [kernel(z, bandwidth=1.0) for z in x]
    of_samples = [SampleGram(z, kernel, bandwidth=1.0) for z in x]
    expected = functional(renyi_kd, *grams, alpha=alpha)
    for arguments in (grams, of_samples, [of_samples[0], *grams[1:]]):
        method = Lanczos(generator=torch.Generator().manual_seed(1))
        value, error = functional(
            renyi_kd, *arguments, alpha=alpha, method=method, return_error=True
        )
        assert (value - expected).abs() <= 3 * error
        assert error < 0.02


@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_the_scale_of_an_estimated_matrix_does_not_matter(scale):
    gram = renyi_kd.linear_kernel(torch.randn(300, 3, generator=torch.Generator().manual_seed(0)))
    found = []
    for factor in (1, scale):
        method = Lanczos(generator=torch.Generator().manual_seed(1))
        found.append(renyi_kd.renyi_entropy(gram * factor, 2.5, method=method).item())
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_seed_repeats_an_estimate():
    gram = torch.tensor(FAMILIES["full rank"](200, np.random.default_rng(0)))
    values = []
    for seed in (0, 0, 1):
        method = Lanczos(generator=torch.Generator().manual_seed(seed))
        values.append(renyi_kd.renyi_entropy(gram, 2.5, method=method).item())
    assert values[0] == values[1] != values[2]
    torch.manual_seed(0)
    default = renyi_kd.renyi_entropy(gram, 2.5, method="lanczos").item()
    torch.manual_seed(0)
    assert renyi_kd.renyi_entropy(gram, 2.5, method="lanczos").item() == default


@pytest.mark.parametrize(
    ("alpha", "within"), [(1.5, 0.01), (2, 1e-6), (2.5, 1e-3), (3.5, 1e-3), (5, 1e-3)]
)
def test_gradients_of_estimates(alpha, within):
    (x,) = tensors(samples(400, 2, 1), requires_grad=True)
    gram = renyi_kd.rbf_kernel(x, bandwidth=1.5)
    expected = renyi_kd.renyi_entropy(gram, alpha, method="eigvalsh")
    method = Lanczos(generator=torch.Generator().manual_seed(1))
    of_matrix = renyi_kd.renyi_entropy(gram, alpha, method=method)
    sampled = SampleGram(x, renyi_kd.rbf_kernel, bandwidth=1.5)
    of_samples = renyi_kd.renyi_entropy(sampled, alpha, method=method)
    for argument in (gram, x):
        exact, *estimated = (
            torch.autograd.grad(value, argument, retain_graph=True, allow_unused=True)[0]
            for value in (expected, of_matrix, of_samples)
        )
        for gradient in estimated:
            if gradient is not None:  # of samples in a matrix made of them
                assert (gradient - exact).norm() < within * exact.norm()


def test_gradient_of_an_estimated_joint_of_samples():
    x, y = tensors(samples(300, 2, 2), requires_grad=True)
    kernel = renyi_kd.rbf_kernel
    grams = [kernel(z, bandwidth=1.5) for z in (x, y)]
    sampled = [SampleGram(z, kernel, bandwidth=1.5) for z in (x, y)]
    method = Lanczos(rank=48, generator=torch.Generator().manual_seed(1))
    expected = renyi_kd.renyi_joint_entropy(*grams, alpha=2.5)
    value = renyi_kd.renyi_joint_entropy(*sampled, alpha=2.5, method=method)
    gradients = (torch.autograd.grad(z, (x, y)) for z in (expected, value))
    for exact, estimate in zip(*gradients, strict=True):
        assert (estimate - exact).norm() < 0.01 * exact.norm()


def test_estimates_of_zeros_and_of_nan():
    zero = torch.zeros(100, 100, requires_grad=True)
    value, error = renyi_kd.renyi_entropy(zero, 3, method="lanczos", return_error=True)
    assert (value, error) == (0, 0)
    assert (torch.autograd.grad(value, zero)[0] == 0).all()
    for bad in (math.nan, math.inf):
        gram = torch.eye(100)
        gram[3, 5] = gram[5, 3] = bad
        gram.requires_grad_()
        value = renyi_kd.renyi_entropy(gram, 3, method="lanczos")
        assert not value.isfinite()
        assert not torch.autograd.grad(value, gram)[0].isfinite().all()


# What cannot be served


X = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
GRAM = torch.eye(100)
LINEAR, RBF = renyi_kd.linear_kernel, renyi_kd.rbf_kernel


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SampleGram(X.long()), TypeError, "`x` must have a floating-point dtype"),
        (lambda: SampleGram(X[0]), ValueError, "one sample a row"),
        (lambda: SampleGram(X, "rbf"), TypeError, "`kernel` must be callable, got str"),
        (lambda: SampleGram(X, RBF, bandwidth=0), ValueError, "`bandwidth` must be a number > 0"),
        (lambda: SampleGram(X, RBF, width=1), TypeError, "width"),
        (lambda: SampleGram(X, renyi_kd.polynomial_kernel), TypeError, "degree"),
        (
            lambda: SampleGram(X, lambda x, y: x),
            ValueError,
            r"of two single ones \(1, 1\), got \(1, 3\)",
        ),
        (
            lambda: renyi_kd.renyi_entropy(SampleGram(torch.zeros(8193, 1), RBF)),
            ValueError,
            "`bandwidth` must be given for more than 8192 samples, got 8193",
        ),
        (
            lambda: renyi_kd.renyi_joint_entropy(SampleGram(X), GRAM),
            ValueError,
            "over the same n samples",
        ),
        (
            lambda: renyi_kd.renyi_entropy(GRAM, 1.4, method="lanczos"),
            ValueError,
            r"needs a finite alpha >= 1.5, got alpha = 1.4.*Use 'eigvalsh'",
        ),
        (
            lambda: renyi_kd.renyi_entropy(GRAM, math.inf, method="lanczos"),
            ValueError,
            "needs a finite alpha",
        ),
        (
            lambda: renyi_kd.renyi_entropy(GRAM[:20, :20], 3, method="lanczos"),
            ValueError,
            r"needs n > rank \+ probes, got n = 20 and 16 \+ 8.*fewer",
        ),
        (lambda: Lanczos(rank=0), ValueError, "`rank` must be an integer >= 1"),
        (lambda: Lanczos(probes=1), ValueError, "`probes` must be an integer >= 2"),
        (lambda: Lanczos(rank=2.5), TypeError, "`rank` must be an integer"),
        (lambda: Lanczos(generator=3), TypeError, "`generator` must be a torch.Generator"),
        (lambda: renyi_kd.renyi_entropy(GRAM, progress=True), TypeError, "`progress` must be call"),
        (
            lambda: SampleGram(X, lambda x, y: x @ y.mT * torch.ones((), requires_grad=True)),
            ValueError,
            "`kernel` must not train parameters of its own",
        ),
        (
            lambda: renyi_kd.renyi_entropy(GRAM, return_error=True),
            ValueError,
            "`return_error` needs `method` 'lanczos', got None",
        ),
        (
            lambda: renyi_kd.renyi_entropy(SampleGram(X), 2.5, method="frobenius"),
            ValueError,
            "'frobenius' needs alpha = 2",
        ),
        (
            lambda: renyi_kd.renyi_entropy(SampleGram(X), 2.5, method="power"),
            ValueError,
            "'power' needs an integer alpha",
        ),
    ],
)
def test_what_cannot_be_served(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_streamed_samples_have_no_second_derivative():
    x = X.clone().requires_grad_()
    value = renyi_kd.renyi_entropy(SampleGram(x, RBF, bandwidth=1))
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative. Give the Gram matrix itself"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("alpha", [0.5, 1, 1.5, 2, 3, 5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_routes_on_cuda(kernel, alpha):
    """Samples and matrices, above the sizes of a tile on a GPU at order two."""
    of, options, _ = KERNELS[kernel]
    n = 5000 if alpha == 2 else 600
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        values = [
            renyi_kd.renyi_entropy(SampleGram(leaf, of, **options), alpha),
            renyi_kd.renyi_entropy(of(leaf, **options), alpha),
        ]
        gradients = [torch.autograd.grad(value, leaf)[0] for value in values]
        found.append([z.detach().cpu() for z in (*values, *gradients)])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("alpha", [1.5, 3.5])
def test_estimates_on_cuda(alpha):
    x = torch.randn(1024, 3, generator=torch.Generator().manual_seed(0)).cuda()
    method = Lanczos(generator=torch.Generator("cuda").manual_seed(1))
    expected = renyi_kd.renyi_entropy(renyi_kd.rbf_kernel(x), alpha)
    for gram in (renyi_kd.rbf_kernel(x), SampleGram(x, renyi_kd.rbf_kernel)):
        value, error = renyi_kd.renyi_entropy(gram, alpha, method=method, return_error=True)
        assert (value - expected).abs() <= 3 * error + 1e-6
