"""Gram matrices to test on: of known spectrum, and of random data, as NumPy arrays.

Every one is positive semi-definite with its nonzero eigenvalues far above rounding, so that it has
a rank and its entropies are well-defined at every order.
"""

import numpy as np
from hypothesis import strategies as st
from reference import laplacian_kernel, linear_kernel, normalize_gram, rbf_kernel

SPECTRA = {  # n eigenvalues in sum one
    "flat": lambda n, rng: np.full(n, 1 / n),
    "spike": lambda n, rng: (
        np.r_[1 - 1e-3, np.full(n - 1, 1e-3 / (n - 1))] if n > 1 else np.ones(1)
    ),
    "rank one": lambda n, rng: np.eye(n)[0],
    "low rank": lambda n, rng: _of_sum_one(rng.uniform(0.1, 1, n) * (np.arange(n) < 1 + n // 3)),
    "full rank": lambda n, rng: _of_sum_one(rng.uniform(0.1, 1, n)),
    "repeated": lambda n, rng: _of_sum_one(1.0 + np.arange(n) // 3),
    "decaying": lambda n, rng: _of_sum_one(0.001 ** (np.arange(n) / n)),
}
CONSTANT_DIAGONAL = {  # kernel(n, rng) with K_ii = 1
    "rbf": lambda n, rng: rbf_kernel(rng.normal(size=(n, 8)), bandwidth=2.0),
    "narrow rbf": lambda n, rng: rbf_kernel(rng.normal(size=(n, 8)), bandwidth=1.0),
    "laplacian": lambda n, rng: laplacian_kernel(rng.normal(size=(n, 4)), bandwidth=4.0),
    "cosine": lambda n, rng: n * normalize_gram(linear_kernel(rng.normal(size=(n, 3)))),
    "labels": lambda n, rng: label_kernel(rng.integers(0, 3, size=n)),
    "ones": lambda n, rng: np.ones((n, n)),
    "identity": lambda n, rng: np.eye(n),
}
LINEAR = {  # kernel(n, rng) of unequal row norms
    "linear": lambda n, rng: linear_kernel(rng.normal(size=(n, 3))),
    "centred linear": lambda n, rng: linear_kernel(_centred(rng.normal(size=(n, 3)))),
}


def label_kernel(labels):
    return (labels[:, None] == labels[None]).astype(np.float64)


def gram_with_spectrum(eigenvalues, rng):
    """A matrix with these eigenvalues and a random orthogonal basis."""
    basis, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    gram = (basis * eigenvalues) @ basis.T
    return (gram + gram.T) / 2


FAMILIES = {
    **{
        name: lambda n, rng, of=spectrum: gram_with_spectrum(of(n, rng), rng)
        for name, spectrum in SPECTRA.items()
    },
    **CONSTANT_DIAGONAL,
    **LINEAR,
}

_sizes = st.integers(2, 13)
_generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def known_spectra(draw):
    """A trace-one matrix and its eigenvalues."""
    rng = draw(_generators)
    eigenvalues = SPECTRA[draw(st.sampled_from(sorted(SPECTRA)))](draw(_sizes), rng)
    return gram_with_spectrum(eigenvalues, rng), eigenvalues


@st.composite
def gram_matrices(draw, count=1, *, families=FAMILIES, same_size=True):
    """A tuple of `count` matrices, each of a family of its own."""
    rng, n = draw(_generators), draw(_sizes)
    return tuple(
        families[draw(st.sampled_from(sorted(families)))](n if same_size else draw(_sizes), rng)
        for _ in range(count)
    )


def _of_sum_one(p):
    return p / p.sum()


def _centred(x):
    return x - x.mean(0)
