"""Matrix-based Rényi information functionals and the InfoSAM distillation loss for PyTorch."""

import warnings
from importlib import import_module
from importlib.util import find_spec

with warnings.catch_warnings():
    # PyTorch warns where NumPy is absent, of which nothing here makes use.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch  # noqa: F401

from renyi_kd.information import (
    Estimate,
    SampleGram,
    cauchy_schwarz_divergence,
    cka,
    dimension_bandwidth,
    hsic,
    jensen_renyi_divergence,
    label_kernel,
    laplacian_kernel,
    linear_kernel,
    median_bandwidth,
    neighbor_bandwidth,
    normalize_gram,
    polynomial_kernel,
    rbf_kernel,
    renyi_conditional_entropy,
    renyi_conditional_mutual_information,
    renyi_dual_total_correlation,
    renyi_entropy,
    renyi_entropy_estimate,
    renyi_joint_entropy,
    renyi_mutual_information,
    renyi_normalized_mutual_information,
    renyi_total_correlation,
    scott_bandwidth,
    silverman_bandwidth,
)
from renyi_kd.infosam import (
    DistilledModel,
    DistilledOutput,
    DotProductRelation,
    FeatureCollector,
    Features,
    InfoSAMDistiller,
    InfoSAMTerms,
    RelationModule,
    infosam_terms,
)

# Triton comes with PyTorch on Linux. Without it the PyTorch forms serve CUDA too. Whether there is
# a GPU is not asked, since that would initialise CUDA, and processes forked later could not use it.
if find_spec("triton") is not None:
    try:
        import_module("renyi_kd._triton")
    except ModuleNotFoundError as error:
        # Triton 3.2 imports setuptools, which it does not ask for.
        if error.name != "setuptools":
            raise

__version__ = "0.1.0"

__all__ = [
    "DistilledModel",
    "DistilledOutput",
    "DotProductRelation",
    "Estimate",
    "FeatureCollector",
    "Features",
    "InfoSAMDistiller",
    "InfoSAMTerms",
    "RelationModule",
    "SampleGram",
    "cauchy_schwarz_divergence",
    "cka",
    "dimension_bandwidth",
    "hsic",
    "infosam_terms",
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
