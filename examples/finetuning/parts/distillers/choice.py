"""The distiller that a run asks for, and whether it fits the models and the batch."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from parts.distillers.base import EMBEDDING, LAYERS, LOGITS, Distiller
from parts.distillers.ibd import IBD
from parts.distillers.infosam import InfoSAM, UnregularizedInfoSAM
from parts.distillers.logit import Logit
from parts.distillers.mobilesam import MobileSAM
from parts.distillers.on_relations import MobileSAMOnRelations, TinySAMOnRelations
from parts.distillers.pkd import PKD
from parts.distillers.pkt import PKT
from parts.distillers.relations import RELATIONS
from parts.distillers.reviewkd import ReviewKD
from parts.distillers.semckd import SemCKD
from parts.distillers.tinysam import TinySAM
from parts.distillers.vid import VID
from parts.errors import InputError
from parts.files import digest
from parts.models.segmenter import Segmenter, check_finite
from parts.runs.checkpoint import best_weights, read_tensors

KINDS: dict[str, type[Distiller] | type[InfoSAM]] = {
    "infosam": InfoSAM,
    "logit": Logit,
    "pkd": PKD,
    "pkt": PKT,
    "ibd": IBD,
    "vid": VID,
    "semckd": SemCKD,
    "reviewkd": ReviewKD,
    "tinysam": TinySAM,
    "mobilesam": MobileSAM,
    "tinysam-relation": TinySAMOnRelations,
    "mobilesam-relation": MobileSAMOnRelations,
}
PAIRED = ("vid", "reviewkd")  # they compare the first layer with the first, and so on
# Twice the 768 channels of ViT-B, as in the official code, would make 378 million weights.
SEMCKD_WIDTH = 256


def build_distiller(
    options: argparse.Namespace, teacher: Segmenter, student: Segmenter
) -> Distiller | InfoSAM | None:
    """Return the distiller that is asked for, or none for the plain student, which is adapted.

    Raises:
        InputError: If it does not fit the models, the batch or the other options.
    """
    name = options.distiller
    layers = compared_layers(options, teacher, student)
    if name == "none":
        return None
    check(options, teacher, *map(len, layers))
    kind = KINDS[name]
    encoder_trains = any(p.requires_grad for p in student.encoder.parameters())
    if not encoder_trains and {*kind.needs} <= {LAYERS, EMBEDDING}:
        raise InputError(
            f"--distiller {name} compares what the image encoder gives, which --method "
            f"{options.method} does not train; choose another of the two"
        )
    if name == "infosam":
        return infosam(options, student.dim)
    if name.endswith("-relation"):
        return kind(relation_module(options, student.dim))
    if LAYERS not in kind.needs:
        return kind.build(options, teacher, student)
    of_teacher, of_student = layers
    widths = [list(map(student.channels, of_student)), list(map(teacher.channels, of_teacher))]
    if name == "semckd":
        return SemCKD(*widths, options.batch_size, SEMCKD_WIDTH)
    return kind(*widths)


def compared_layers(
    options: argparse.Namespace, teacher: Segmenter, student: Segmenter
) -> tuple[list[int], list[int]]:
    """Return the numbers of the teacher's and of the student's blocks that are compared, if any."""
    compares = options.distiller != "none" and LAYERS in KINDS[options.distiller].needs
    if not compares and options.layers is None and options.teacher_layers is None:
        return [], []  # an image encoder may have no blocks
    found = (
        layers_of(teacher, "--teacher-layers", options.teacher_layers),
        layers_of(student, "--layers", options.layers),
    )
    return found if compares else ([], [])


def layers_of(model: Segmenter, option: str, asked: list[int] | None) -> list[int]:
    """Return the numbers of the blocks to compare, by default where the model mixes or narrows."""
    count = len(model.blocks)
    layers = model.stages if asked is None else asked
    if sorted(set(layers)) != layers or not 0 <= layers[0] <= layers[-1] < count:
        raise InputError(
            f"{option} must be numbers of blocks that rise, from 0 to {count - 1}, got "
            f"{' '.join(map(str, layers))}"
        )
    return layers


def check(
    options: argparse.Namespace, teacher: Segmenter, teacher_layers: int, student_layers: int
) -> None:
    """Raise `InputError` unless the batch, the layers and the cache are what a distiller needs."""
    name, kind = options.distiller, KINDS[options.distiller]
    # Only InfoSAM compares the images of all processes.
    batch = options.batch_size * (options.processes if name == "infosam" else 1)
    if batch < kind.least_batch:
        raise InputError(
            f"--distiller {name} needs a --batch-size of at least {kind.least_batch}, got "
            f"{options.batch_size}: it takes the images of a batch together"
        )
    if name in PAIRED and student_layers != teacher_layers:
        raise InputError(
            f"--distiller {name} compares layers one by one, but there are {student_layers} of the "
            f"student and {teacher_layers} of the teacher; choose as many by --layers and "
            "--teacher-layers"
        )
    if options.teacher_cache is None:
        return
    if LAYERS in kind.needs or (LOGITS in kind.needs and not teacher.decodes_embedding_alone):
        raise InputError(
            f"--teacher-cache holds image embeddings alone, and --distiller {name} needs more of "
            "the teacher; leave it out"
        )


def infosam(options: argparse.Namespace, dim: int) -> InfoSAM | UnregularizedInfoSAM:
    """Return the library's loss, or what Table 12 leaves of it."""
    relation = relation_module(options, dim)
    if not options.without_regularization:
        return InfoSAM(
            dim,
            alpha=options.alpha,
            compression_weight=options.compression_weight,
            distillation_weight=options.distillation_weight,
            relation=relation,
            process_group=torch.distributed.group.WORLD,  # None on one process
        )
    if options.processes > 1:
        raise InputError("--without-regularization needs a single process")
    return UnregularizedInfoSAM(relation, options.alpha, options.distillation_weight)


def relation_module(options: argparse.Namespace, dim: int) -> nn.Module:
    """Return the relation module, with the weights of another run if that is asked for."""
    relation = RELATIONS[options.relation](dim)
    if options.relation_from is not None:
        load_relation(options, relation)
    return relation.requires_grad_(not options.freeze_relation)


def load_relation(options: argparse.Namespace, relation: nn.Module) -> None:
    """Load the relation module of the best epoch of a run.

    Raises:
        InputError: If the run has none, or one of another kind or width.
    """
    prefix = "relation."
    try:
        path = best_weights(options.relation_from, "distiller")
    except InputError as error:
        raise InputError(f"--relation-from: {error}") from error
    saved = read_tensors(path) if path.exists() else {}
    found = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    expected = {name: tuple(value.shape) for name, value in relation.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if shapes != expected:
        wrong = sorted(name for name, _ in shapes.items() ^ expected.items())
        raise InputError(
            f"--relation-from must be a run that trained a relation module as --relation "
            f"{options.relation} of this width, got {options.relation_from}: "
            f"{len(wrong)} weights are others ({wrong[0]} is {shapes.get(wrong[0], 'missing')}, "
            f"must be {expected.get(wrong[0], 'left out')})"
        )
    check_finite(found, f"--relation-from must hold finite weights, got {path}")
    relation.load_state_dict(found)
    options.digests["relation_from"] = digest(path)  # a resumed run must find the same
