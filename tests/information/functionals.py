"""The information functionals and their routes, as the tests go through them."""

import math

import numpy as np
import reference
import torch
from grids import over, over_cases
from strategies import FAMILIES

import renyi_kd

FUNCTIONALS = {  # each as (library or reference, three Gram matrices, alpha=..., method=...)
    "entropy": lambda of, a, b, c, **how: of.renyi_entropy(a, **how),
    "joint": lambda of, a, b, c, **how: of.renyi_joint_entropy(a, b, c, **how),
    "conditional": lambda of, a, b, c, **how: of.renyi_conditional_entropy(a, b, **how),
    "mutual information": lambda of, a, b, c, **how: of.renyi_mutual_information(a, b, **how),
    "two to one": lambda of, a, b, c, **how: of.renyi_mutual_information([a, b], c, **how),
    "one to two": lambda of, a, b, c, **how: of.renyi_mutual_information(a, [b, c], **how),
    "total correlation": lambda of, a, b, c, **how: of.renyi_total_correlation(a, b, c, **how),
}
ALPHAS = [0.3, 0.5, 0.99, 1, 1.00001, 1.01, 1.5, 2, 3, 3.5, 5, 10, math.inf]
FAST_ALPHAS = [0.5, 1, 1.01, 2, 3, math.inf]


def routes(alpha):
    """The order with each method that serves it."""
    methods = ["frobenius"] * (alpha == 2) + ["power"] * (alpha in range(2, 33)) + ["eigvalsh"]
    return [(alpha, method) for method in methods]


ROUTES = [route for alpha in ALPHAS for route in routes(alpha)]
FAST_ROUTES = [route for alpha in FAST_ALPHAS for route in routes(alpha)]
_SLOW_ROUTES = [route for route in ROUTES if route not in FAST_ROUTES]

over_functionals = over_cases("functional", FUNCTIONALS, fast=FUNCTIONALS)
# Of the seven functionals, one entropy, one difference and one of many terms.
over_few_functionals = over_cases(
    "functional", FUNCTIONALS, fast=["entropy", "conditional", "two to one"]
)
over_routes = over("alpha, method", FAST_ROUTES, slow=_SLOW_ROUTES)
# One order for each way to compute: below order one, at one, by norms, by products, the largest
# eigenvalue.
_FEW_ROUTES = [
    (0.5, "eigvalsh"),
    (1, "eigvalsh"),
    (2, "frobenius"),
    (3, "power"),
    (math.inf, "eigvalsh"),
]
over_few_routes = over(
    "alpha, method", _FEW_ROUTES, slow=[route for route in ROUTES if route not in _FEW_ROUTES]
)


def draws(n, families=FAMILIES):
    """Three Gram matrices of each family, and one set of three families."""
    rng = np.random.default_rng(n)
    of_each = [[family(n, rng) for _ in range(3)] for family in families.values()]
    return [*of_each, [family(n, rng) for family in list(families.values())[-3:]]]


def tensors(arrays, dtype=torch.float64, *, requires_grad=False):
    return [torch.tensor(array, dtype=dtype, requires_grad=requires_grad) for array in arrays]


DRAWS = [grams for n in (1, 2, 7, 33, 64) for grams in draws(n)]


def deviation(functional, alpha, method, dtype, draws=DRAWS):
    """The largest |library - reference| in bits over the draws, both from the rounded matrices."""
    errors = []
    for grams in draws:
        rounded = tensors(grams, dtype)
        value = functional(renyi_kd, *rounded, alpha=alpha, method=method)
        expected = functional(reference, *[g.double().numpy() for g in rounded], alpha=alpha)
        errors.append(abs(value.item() - expected))
    return np.max(errors)


SAMPLE_KERNELS = {  # name: (kernel, options, the reference's)
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


def samples(n, d, count=3):
    return [np.random.default_rng(v).normal(size=(n, d)) for v in range(count)]
