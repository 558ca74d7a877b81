"""The rows of a data set that COCO's format describes, read by pycocotools."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from pycocotools.mask import decode, encode

from parts.data.reading import ObjectMask
from parts.data.tables import FEWEST_PAIRS, DataError, Problem, Row, Splits, split_names
from parts.errors import InputError, first_line

SHORTEST = 6  # numbers of a polygon; pycocotools takes four for a box
FARTHEST = 2  # how far a point may lie, in sides of the image


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
        check_unique(instances)
        names = {key: Path(image["file_name"]).as_posix() for key, image in instances.imgs.items()}
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
        source = f"{file.name} annotation {ann['id']}"
        crowd = ann.get("iscrowd")
        if crowd not in (None, 0, 1):
            kind = "an annotation whose iscrowd is neither 0 nor 1"
            problems.append(Problem(kind, f"{source} of {name}: {kind}: {crowd!r}"))
        elif crowd:
            crowds += 1
        if crowd:
            continue
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


def check_unique(instances: COCO) -> None:
    """Raise `ValueError` if two images or two annotations share an id: one would be lost."""
    for kind in ("images", "annotations"):
        ids = [entry["id"] for entry in instances.dataset[kind]]
        twice = next((key for key, count in Counter(ids).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"two {kind} have the id {twice}; number them anew")


def object_mask(instances: COCO, annotation: dict[str, Any], source: str) -> ObjectMask:
    """Return the mask of an object, whether it is given as polygons or as a run-length code.

    Raises:
        ValueError: If it is not whole. pycocotools would draw a polygon that is far too large until
            the memory ends, and would fill up a code that is too short with whatever is in memory.
    """
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        check_polygons(segmentation, instances.imgs[annotation["image_id"]])
    code = instances.annToRLE(annotation)
    mask = decode(code)
    if mask.max(initial=0) > 1 or encode(mask)["counts"] != code["counts"]:
        raise ValueError(f"a run-length code must be of {mask.size} pixels without empty runs")
    return ObjectMask(source, tuple(code["size"]), code["counts"])


def check_polygons(polygons: list[list[float]], image: dict[str, Any]) -> None:
    """Raise `ValueError` unless each is a list of pairs of numbers not far from the image."""
    if not polygons or any(len(p) < SHORTEST or len(p) % 2 for p in polygons):
        raise ValueError(
            f"a polygon must have at least {SHORTEST} numbers, and two for each point, "
            f"got {polygons}"
        )
    values = [value for polygon in polygons for value in polygon]
    farthest = FARTHEST * max(image["height"], image["width"])
    if not all(isinstance(value, (int, float)) and abs(value) <= farthest for value in values):
        raise ValueError(f"a polygon must have numbers of at most {farthest}, got {polygons}")
