"""Matrix-based Rényi information functionals and the InfoSAM distillation loss for PyTorch."""

from importlib import import_module
from importlib.util import find_spec

from renyi_kd.information.entropy import (
    renyi_conditional_entropy,
    renyi_entropy,
    renyi_joint_entropy,
    renyi_mutual_information,
    renyi_total_correlation,
)
from renyi_kd.information.kernels import (
    laplacian_kernel,
    linear_kernel,
    normalize_gram,
    polynomial_kernel,
    rbf_kernel,
)
from renyi_kd.information.routes.quadrature import Lanczos
from renyi_kd.information.samples import SampleGram
from renyi_kd.infosam.distiller import InfoSAMDistiller, InfoSAMTerms, infosam_terms
from renyi_kd.infosam.features import FeatureCollector, Features
from renyi_kd.infosam.relation import DotProductRelation, RelationModule

# Triton comes with PyTorch on Linux; without it the PyTorch path serves CUDA too. Whether there is
# a GPU is not asked: that would initialise CUDA, and children forked later could not.
if find_spec("triton") is not None:
    import_module("renyi_kd._triton")

__version__ = "0.1.0"

__all__ = [
    "DotProductRelation",
    "FeatureCollector",
    "Features",
    "InfoSAMDistiller",
    "InfoSAMTerms",
    "Lanczos",
    "RelationModule",
    "SampleGram",
    "infosam_terms",
    "laplacian_kernel",
    "linear_kernel",
    "normalize_gram",
    "polynomial_kernel",
    "rbf_kernel",
    "renyi_conditional_entropy",
    "renyi_entropy",
    "renyi_joint_entropy",
    "renyi_mutual_information",
    "renyi_total_correlation",
]
