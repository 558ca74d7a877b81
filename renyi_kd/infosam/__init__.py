"""The InfoSAM loss: it compares the relations of teacher and student.

From `information`, the other half of the library, it takes entropies and inner products alone. Its
files, each of which imports only those before it: operators (fast forms), recognition, features,
hub, relation, processes, terms, distiller, distilled_model.
"""

from torch.serialization import add_safe_globals

from renyi_kd.infosam.distilled_model import DistilledModel, DistilledOutput
from renyi_kd.infosam.distiller import InfoSAMDistiller
from renyi_kd.infosam.features import FeatureCollector, Features
from renyi_kd.infosam.relation import DotProductRelation, RelationModule
from renyi_kd.infosam.terms import InfoSAMTerms, infosam_terms

__all__ = [
    "DistilledModel",
    "DistilledOutput",
    "DotProductRelation",
    "FeatureCollector",
    "Features",
    "InfoSAMDistiller",
    "InfoSAMTerms",
    "RelationModule",
    "infosam_terms",
]

# Tuples of tensors, which `torch.load` may make of a file by default: a cache of features, a log.
add_safe_globals([Features, InfoSAMTerms])
