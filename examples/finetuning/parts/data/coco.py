"""The rows of a data set that COCO's format describes, read by pycocotools."""

from __future__ import annotations

from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from parts.data.reading import ObjectMask
from parts.data.tables import FEWEST_PAIRS, DataError, Problem, Row, Splits, split_names
from parts.errors import InputError, first_line

SHORTEST = 6  # numbers of a polygon; pycocotools takes four for a box


def read_coco(file: Path, images: Path) -> Splits:
    """Make a row of each object of COCO's instances, and split the images 8 : 1 : 1.

    A row is an object and not a category, as a prompt asks for one object. What is marked as a
    crowd is many, and is left out, and so are images without an object. The split depends on
    nothing but the names of the images.

    Args:
        file: The JSON file.
        images: The folder that its file names are relative to.

    Raises:
        InputError: If the file is missing or is not of this format.
        DataError: If an object has no segmentation, or if there are fewer than 10 images.
    """
    if not file.is_file():
        raise InputError(f"--coco must be a file, got {file}")
    try:
        with redirect_stdout(None):  # it says how long it takes
            instances = COCO(file)
        names = {key: image["file_name"] for key, image in instances.imgs.items()}
        anns = [(ann, names[ann["image_id"]]) for ann in instances.anns.values()]
    except Exception as error:  # what is lacking or damaged raises an exception of its own type
        raise InputError(
            f"--coco must be a file of COCO's instances, got {file}: {type(error).__name__}, "
            f"{first_line(error)}"
        ) from error
    objects: dict[str, list[ObjectMask]] = defaultdict(list)
    problems = []
    crowds = 0
    for ann, name in anns:
        crowds += ann.get("iscrowd", 0)
        if ann.get("iscrowd", 0):
            continue
        source = f"{file.name} annotation {ann['id']}"
        try:
            objects[name].append(object_mask(instances, ann, source))
        except Exception as error:  # pycocotools says nothing of what it expects
            kind = "an annotation whose segmentation cannot be read"
            problems.append(Problem(kind, f"{source} of {name}: {kind}: {first_line(error)}"))
    if len(objects) < FEWEST_PAIRS:
        kind = f"{FEWEST_PAIRS} images with objects are needed, {len(objects)} were found"
        problems.append(Problem(kind, f"{file}: {kind}"))
    if problems:
        raise DataError(problems)
    if crowds:
        print(f"Warning: crowds are left out, {crowds} in all.")
    return {
        split: [
            Row(images / name, mask, f"{split} {mask}")
            for name in members
            for mask in objects[name]
        ]
        for split, members in split_names(sorted(objects)).items()
    }


def object_mask(instances: COCO, annotation: dict[str, Any], source: str) -> ObjectMask:
    """Return the mask of an object, whether it is given as polygons or as a run-length code."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list) and min(map(len, segmentation), default=0) < SHORTEST:
        raise ValueError(f"a polygon must have at least {SHORTEST} numbers, got {segmentation}")
    code = instances.annToRLE(annotation)
    return ObjectMask(source, tuple(code["size"]), code["counts"])
