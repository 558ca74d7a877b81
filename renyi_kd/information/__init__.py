"""Entropies and mutual information from Gram matrices, in bits.

This half of the library knows nothing of a loss. Its files, each of which imports only those before
it: products, distances, rbf, kernels, samples, routes (the ways to compute an entropy), entropy, estimates.
"""

from renyi_kd.information.entropy import (
    renyi_conditional_entropy,
    renyi_entropy,
    renyi_joint_entropy,
    renyi_mutual_information,
    renyi_total_correlation,
)
from renyi_kd.information.estimates import Estimate, renyi_entropy_estimate
from renyi_kd.information.kernels import (
    laplacian_kernel,
    linear_kernel,
    normalize_gram,
    polynomial_kernel,
    rbf_kernel,
)
from renyi_kd.information.samples import SampleGram

__all__ = [
    "Estimate",
    "SampleGram",
    "laplacian_kernel",
    "linear_kernel",
    "normalize_gram",
    "polynomial_kernel",
    "rbf_kernel",
    "renyi_conditional_entropy",
    "renyi_entropy",
    "renyi_entropy_estimate",
    "renyi_joint_entropy",
    "renyi_mutual_information",
    "renyi_total_correlation",
]
