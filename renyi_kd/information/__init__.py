"""Entropies and mutual information from Gram matrices, in bits.

This half of the library knows nothing of a loss. Its files, each of which imports only those before
it: products, distances, rbf, kernels, bandwidths, samples, routes (the ways to compute an entropy),
entropy, dependence, alignment, divergences, estimates.
"""

from renyi_kd.information.alignment import cka, hsic
from renyi_kd.information.bandwidths import (
    dimension_bandwidth,
    median_bandwidth,
    neighbor_bandwidth,
    scott_bandwidth,
    silverman_bandwidth,
)
from renyi_kd.information.dependence import (
    renyi_conditional_mutual_information,
    renyi_dual_total_correlation,
    renyi_normalized_mutual_information,
)
from renyi_kd.information.divergences import cauchy_schwarz_divergence, jensen_renyi_divergence
from renyi_kd.information.entropy import (
    renyi_conditional_entropy,
    renyi_entropy,
    renyi_joint_entropy,
    renyi_mutual_information,
    renyi_total_correlation,
)
from renyi_kd.information.estimates import Estimate, renyi_entropy_estimate
from renyi_kd.information.kernels import (
    label_kernel,
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
    "cauchy_schwarz_divergence",
    "cka",
    "dimension_bandwidth",
    "hsic",
    "jensen_renyi_divergence",
    "label_kernel",
    "laplacian_kernel",
    "linear_kernel",
    "median_bandwidth",
    "neighbor_bandwidth",
    "normalize_gram",
    "polynomial_kernel",
    "rbf_kernel",
    "renyi_conditional_entropy",
    "renyi_conditional_mutual_information",
    "renyi_dual_total_correlation",
    "renyi_entropy",
    "renyi_entropy_estimate",
    "renyi_joint_entropy",
    "renyi_mutual_information",
    "renyi_normalized_mutual_information",
    "renyi_total_correlation",
    "scott_bandwidth",
    "silverman_bandwidth",
]
