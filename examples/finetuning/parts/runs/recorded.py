"""What options.json holds, which may be damaged, edited, or of something else than a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parts import files
from parts.errors import InputError
from parts.options import DISTILLERS, METHODS, MODELS, MOST_POINTS, RELATIONS

FILE = "options.json"
# The values of options that are younger than some runs.
LATER: dict[str, Any] = {
    "checkpoint": None,
    "digests": {},
    "foreground": [],
    "ignore": [],
    "image_range": None,
    "distiller": "infosam",
    "distiller_weight": 1.0,
    "layers": None,
    "teacher_layers": None,
    "relation": "attention-1",
    "relation_from": None,
    "freeze_relation": False,
    "without_regularization": False,
    "hq_checkpoint": None,
    "point_loss": False,
    "teacher": None,
    "teacher_checkpoint": None,
    "start_weight": 0.0,
    "shuffled_teacher": False,
    "validate_every": 1,
    "augment": False,
    "coco": None,
}
Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, in words and as a test


def is_text(value: object) -> bool:
    """Return whether a value is a text that may be a path."""
    return isinstance(value, str) and value != "" and "\0" not in value


def is_number(value: object) -> bool:
    """Return whether a value is a number and not nan; True and False are none."""
    return type(value) in (int, float) and not math.isnan(value)


def is_span(value: object) -> bool:
    """Return whether a value is a pair of finite numbers that does not fall."""
    pair = isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
    return pair and -math.inf < value[0] <= value[1] < math.inf


def whole(least: int, most: int = 2**31 - 1) -> Rule:
    """Return the rule of whole numbers within these bounds."""
    words = f"a whole number from {least} to {most}"
    return words, lambda value: type(value) is int and least <= value <= most


def one_of(names: Sequence[str]) -> Rule:
    """Return the rule of a name among others."""
    return f"one of {', '.join(names)}", lambda value: value in names


def or_null(rule: Rule) -> Rule:
    """Return a rule that lets null pass as well."""
    return f"{rule[0]} or null", lambda value: value is None or rule[1](value)


TEXT: Rule = ("a text", is_text)
PLACE = or_null(("a path", is_text))
TRUTH: Rule = ("true or false", lambda value: isinstance(value, bool))
NUMBER: Rule = ("a number from 0", lambda value: is_number(value) and value >= 0)
BLOCKS: Rule = (
    "a list of whole numbers",
    lambda value: (
        isinstance(value, list) and len(value) > 0 and all(type(v) is int and v >= 0 for v in value)
    ),
)
SPANS: Rule = (
    "a list of pairs",
    lambda value: isinstance(value, list) and all(map(is_span, value)),
)
# What the programs use of the options. Without any of these, a run is of no use.
RULES: dict[str, Rule] = {
    "package": one_of((*MODELS, "huggingface")),
    "model": TEXT,
    "teacher": or_null(TEXT),
    "checkpoint": PLACE,
    "teacher_checkpoint": PLACE,
    "method": one_of(METHODS),
    "rank": whole(1),
    "targets": (
        "a list of names",
        lambda value: isinstance(value, list) and len(value) > 0 and all(map(is_text, value)),
    ),
    "data": PLACE,
    "images": PLACE,
    "masks": PLACE,
    "coco": PLACE,
    "test_table": TEXT,
    "foreground": SPANS,
    "ignore": SPANS,
    "image_range": or_null(
        ("a pair of numbers that rises", lambda value: is_span(value) and value[0] < value[1])
    ),
    "eval_prompts": one_of(("boxes", "points")),
    "eval_points": whole(1, MOST_POINTS),
    "alpha": ("a number above 0", lambda value: is_number(value) and value > 0),
    "distiller": one_of([*DISTILLERS]),
    "distiller_weight": NUMBER,
    "layers": or_null(BLOCKS),
    "teacher_layers": or_null(BLOCKS),
    "relation": one_of(RELATIONS),
    "relation_from": PLACE,
    "freeze_relation": TRUTH,
    "without_regularization": TRUTH,
    "hq_checkpoint": PLACE,
    "point_loss": TRUTH,
    "start_weight": NUMBER,
    "shuffled_teacher": TRUTH,
    "augment": TRUTH,
    "epochs": whole(1),
    "validate_every": whole(1),
    "batch_size": whole(1),
    "seed": whole(0, 2**32 - 1),
    "digests": (
        "texts by name",
        lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
    ),
}


def read_recorded(folder: Path) -> dict[str, Any]:
    """Return what options.json has of the options of a run.

    Raises:
        InputError: If it is no JSON, or not what a run has written.
    """
    path = folder / FILE
    content = files.read_json(path)
    needed = RULES.keys() - LATER.keys()
    if not isinstance(content, dict) or not content.keys() >= needed:
        raise InputError(f"{path} is damaged, it must have {', '.join(sorted(needed))}")
    if content.pop("no_infosam", False):  # what an older version called it
        content |= {"distiller": "none", "distiller_weight": DISTILLERS["none"]}
    content = LATER | content
    rules = RULES.copy()
    if content["package"] in [*MODELS]:
        rules["model"] = one_of(MODELS[content["package"]])
        rules["teacher"] = or_null(rules["model"])
    if content["images"] is None or (content["masks"] or content["coco"]) is None:
        rules["data"] = ("a path", is_text)
    for name, (words, is_right) in rules.items():
        if not is_right(content[name]):
            raise InputError(f"{path}: {name} must be {words}, got {content[name]!r}")
    return content
