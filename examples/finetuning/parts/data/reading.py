"""One rule for images and one for masks: what their files may hold, and how it is read.

A mask is two-valued, or it is refused with the values that were found. A label map that was read as
a soft mask would train on half of the objects without a word. Where the rule cannot know, the user
says which values are foreground, which are ignored, and which range an image has. No library that
reads images makes that promise, and Pillow, which opens the files here, loads some of them as less.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TiffImageFile,
)
from scipy.ndimage import maximum_filter, minimum_filter

from parts.errors import first_line

# Pillow would warn of pictures of half of this, and refuse those above without saying what to do.
MOST_PIXELS = 178_956_970
Image.MAX_IMAGE_PIXELS = None

Values = NDArray[np.generic]
Mask = NDArray[np.bool_]

# Up to this many different values are listed, and taken for labels and not for the soft edge of a
# mask, except in a JPEG file.
FEW_VALUES = 8
# The share of the values of a soft edge that lie in areas of four equal pixels or more. In masks
# that were blurred, scaled, or saved as JPEG, at most 0.34 did; of labels nearly all do.
MOST_IN_AREAS = 0.6
# The share of the values of a soft edge that are nearly the same, in areas of four nearly equal
# pixels. In masks that were blurred, scaled, or saved as JPEG, at most 0.23 were; in JPEG files of
# trimaps with a border of two pixels at least 0.24, of wider ones and of labels at least 0.30.
MOST_ON_A_PLATEAU = 0.24
NEAR = 1 / 32  # of the largest value, how far JPEG moves a value where the picture is flat
JPEG_BLOCK = 8  # pixels, how far what JPEG leaves reaches
# A channel of a grey picture may differ from the others by so much in a JPEG file.
COLOUR_RESIDUE = 8
DEEP = 65535  # the largest value of 16 bits
# Images that use less than this share of 16 bits have fewer, and would come out nearly black.
LEAST_SHARE = 0.25
UPRIGHT = 1  # how EXIF says that a picture needs no turning


@dataclass(frozen=True)
class Reading:
    """What the user says about the files.

    Args:
        foreground: Values, or ranges of them, that are the object. By default a mask must be
            two-valued, and the larger value is.
        ignore: Values, or ranges of them, that are neither object nor background.
        image_range: The smallest and the largest value of images with more than 8 bits. By default
            they are those of 16 bits.
    """

    foreground: Sequence[tuple[float, float]] = ()
    ignore: Sequence[tuple[float, float]] = ()
    image_range: tuple[float, float] | None = None


TWO_VALUED = Reading()


def reading_of(options: argparse.Namespace) -> Reading:
    """Return how the options of a run have its images and masks read."""
    return Reading(options.foreground, options.ignore, options.image_range)


class ContentError(ValueError):
    """A file holds what the rules do not allow; the message says what, and what to do."""


class ReadImage(NamedTuple):
    """An image as it was read."""

    rgb: NDArray[np.uint8]  # (H, W, 3), upright
    kind: str  # what the file holds, in words
    turned: int  # the orientation of EXIF, by which it was turned upright


class ReadMask(NamedTuple):
    """A mask as it was read."""

    object: Mask  # (H, W), upright
    known: Mask  # (H, W), False where the values are ignored
    kind: str  # what the file holds, in words
    turned: int  # the orientation of EXIF, by which it was turned upright


class ObjectMask(NamedTuple):
    """A mask that is one of many in a file of COCO, in its run-length code."""

    source: str  # which of them it is, in words
    size: tuple[int, int]  # height and width
    counts: bytes

    def __str__(self) -> str:
        """Return which mask it is."""
        return self.source


class _Loaded(NamedTuple):
    upright: Image.Image
    format: str | None
    turned: int


def read_image(path: Path, reading: Reading = TWO_VALUED) -> ReadImage:
    """Read a picture as RGB of 8 bits.

    Raises:
        ContentError: If it has several pages or frames, an alpha channel that varies, colours of 16
            bits, or values whose range is not known.
        OSError: If Pillow cannot read it.
    """
    upright, _, turned = _load(path)
    if _is_deep(upright.mode):
        return ReadImage(*_read_deep(np.asarray(upright), upright.mode, reading), turned)
    if upright.has_transparency_data:
        alpha = np.asarray(upright.convert("RGBA").getchannel("A"))
        if (alpha != alpha.flat[0]).any():
            raise ContentError("an alpha channel that varies; put it on a background first")
    return ReadImage(np.array(upright.convert("RGB")), "8 bits", turned)


def _load(path: Path) -> _Loaded:
    """Load a file of one picture, whose values are all there, and turn it upright."""
    try:
        # Of a TIFF that it opens by name, Pillow maps the file and ignores the orientation.
        with path.open("rb") as stream, Image.open(stream) as file:
            if file.width * file.height > MOST_PIXELS:
                raise ContentError(
                    f"{file.width} x {file.height} pixels, more than {MOST_PIXELS}; cut it into "
                    "smaller pictures"
                )
            frames = getattr(file, "n_frames", 1)
            # A camera keeps a preview behind the picture in a file of the format MPO.
            if frames > 1 and file.format != "MPO":
                raise ContentError(f"{frames} pages or frames; save each as a file of its own")
            tags = file.tag_v2 if isinstance(file, TiffImageFile) else {}
            deep = _is_deep(file.mode)
            # Pillow loads these as 8 bits. It forgets what it has read when it loads them.
            if not deep and (";16" in str(file.tile) or max(tags.get(BITSPERSAMPLE, [8])) > 8):
                raise ContentError("colours of 16 bits; save it with 8 bits a channel")
            if deep and tags.get(PHOTOMETRIC_INTERPRETATION) == 0:
                raise ContentError("values of which 0 is white; save it so that 0 is black")
            turned = file.getexif().get(ExifTags.Base.Orientation)
            turned = turned if turned in range(UPRIGHT, 9) else UPRIGHT  # others say nothing
            # Pillow takes the upper half of what 32 bits without a sign can hold for negative.
            signed = tags.get(SAMPLEFORMAT, [1])[0] != 1
            if file.mode == "I" and not signed and file.getextrema()[0] < 0:
                raise ContentError(f"values above {2**31 - 1}; save it with fewer bits")
            return _Loaded(ImageOps.exif_transpose(file), file.format, turned)
    except (ContentError, OSError):
        raise
    except Exception as error:  # of a damaged file, Pillow raises errors of many kinds
        raise OSError(first_line(error)) from error


def _is_deep(mode: str) -> bool:
    return mode.startswith("I") or mode == "F"


def _read_deep(values: Values, mode: str, reading: Reading) -> tuple[NDArray[np.uint8], str]:
    if not np.isfinite(values).all():
        raise ContentError("values that are not finite")
    low, high = reading.image_range or (0, DEEP)
    found = f"values from {values.min():g} to {values.max():g}"
    if reading.image_range is None and not mode.startswith("I;16"):
        raise ContentError(f"{found} of unknown range; give --image-range")
    if reading.image_range is None and values.max() < LEAST_SHARE * DEEP:
        fewer = 2 ** max(8, int(values.max()).bit_length()) - 1
        raise ContentError(
            f"{found} of {DEEP}: has it fewer bits? Give its range, such as --image-range 0 "
            f"{fewer}, or --image-range 0 {DEEP} if it is so dark"
        )
    if values.min() < low or values.max() > high:
        raise ContentError(
            f"{found}, outside of the range from {low:g} to {high:g}; give another --image-range"
        )
    grey = ((values.astype(np.float64) - low) * (255 / (high - low))).round().astype(np.uint8)
    return np.stack([grey] * 3, axis=-1), f"range {low:g} to {high:g}"


def read_mask(label: Path | ObjectMask, reading: Reading = TWO_VALUED) -> ReadMask:
    """Read a mask, from a file of its own or from its run-length code.

    Without `foreground`, it must be two-valued: zero for the background and one other value for the
    object. Values in between may only be the remains of JPEG, or a soft edge.

    Raises:
        ContentError: If it is not two-valued, naming the values, or has several pages or frames.
        OSError: If Pillow cannot read it.
    """
    if isinstance(label, ObjectMask):
        from pycocotools.mask import decode  # which the quickstart does without

        found = decode({"size": [*label.size], "counts": label.counts}).astype(bool)
        return ReadMask(found, np.ones_like(found), "objects of COCO", UPRIGHT)
    upright, kind_of_file, turned = _load(label)
    jpeg = kind_of_file in ("JPEG", "MPO")
    values = _mask_values(upright, jpeg, as_numbers=bool(reading.foreground or reading.ignore))
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ContentError("values that are not finite")
    known = ~_within(values, reading.ignore)
    if not known.any():
        raise ContentError("nothing but values that are ignored")
    if reading.foreground:
        found, kind = _within(values, reading.foreground), _named(values[known])
    else:
        found, kind = _two_valued(np.where(known, values, 0), np.unique(values[known]), jpeg)
    return ReadMask(found & known, known, kind, turned)


def _mask_values(image: Image.Image, jpeg: bool, *, as_numbers: bool) -> Values:
    """Return the values that tell objects apart: numbers, or indices of colours, (H, W)."""
    if image.mode == "P":
        return np.asarray(image) if as_numbers else _palette_values(image)
    if image.mode in ("1", "L") or _is_deep(image.mode):
        values = np.asarray(image)
        return values.astype(np.uint8) if values.dtype == bool else values
    rgba = np.asarray(image.convert("RGBA"))
    colours, alpha = rgba[..., :3], rgba[..., 3]
    if (alpha != alpha[0, 0]).any():
        if (colours != colours[0, 0]).any():
            raise ContentError("colours and an alpha channel that both vary; save one alone")
        return alpha
    spread = colours.max(axis=-1) - colours.min(axis=-1)
    if spread.max() <= (COLOUR_RESIDUE if jpeg else 0):
        return colours[..., 0]
    # Numbers sort a hundred times as fast as rows of three.
    packed = np.unique(colours.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32))
    if len(packed) == 2 and not packed[0]:  # black, and the colour of the object
        return colours.any(axis=-1).astype(np.uint8)
    raise _colours(np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=-1))


def _palette_values(image: Image.Image) -> Values:
    """Return grey values, or the indices of a palette whose black is the background."""
    indices = np.asarray(image)
    used = np.unique(indices)
    palette = np.zeros((256, 3), dtype=np.uint8)
    colours = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    palette[: len(colours)] = colours
    colours = palette[used]
    if (colours == colours[:, :1]).all() and len(np.unique(colours[:, 0])) == len(used):
        # The order of greys in a palette means nothing. That of colours is the label.
        return palette[indices, 0]
    if len(used) > 2:
        raise _labels(_named(used))
    black = used[~colours.any(axis=-1)]
    if len(used) == 2 and len(black) != 1:
        raise _colours(colours)
    # Pillow sorts a palette by how often a colour occurs, so that black may be anywhere.
    return np.where(indices == black, 0, np.maximum(indices, 1)) if len(black) else indices


def _colours(distinct: NDArray[np.generic]) -> ContentError:
    shown = ", ".join(str(tuple(int(x) for x in colour)) for colour in distinct[:4])
    more = ", ..." if len(distinct) > 4 else ""
    return ContentError(
        f"{len(distinct)} colours: {shown}{more}; a mask must have two values, save the object as "
        "white on black"
    )


def _two_valued(values: Values, distinct: Values, jpeg: bool) -> tuple[Mask, str]:
    """Return where the larger of two values is, and the two in words."""
    kind, top = _named(distinct), distinct[-1]
    if len(distinct) == 1:
        if top in (0, 1, 255, DEEP):
            return values > 0, kind
        raise ContentError(f"{kind} alone; a mask must have the value 0 and one other. {ADVICE}")
    if distinct[0] != 0 or (len(distinct) == 2 and top < 0):
        raise ContentError(f"{kind}; a mask must have the value 0 and one other. {ADVICE}")
    if len(distinct) == 2:
        return values == top, kind
    between, near = distinct[1:-1], top * NEAR
    low, high = between <= near, between >= top - near
    # Labels count from 0, so that few values beside both ends are what a lossy format left.
    lossy = jpeg or bool(low.any() and high.any() and (low | high).all())
    if (lossy or len(distinct) > FEW_VALUES) and _has_soft_edge(values, top, lossy):
        return values > top / 2, f"values from 0 to {top:g} with a soft edge"
    raise _labels(kind, sure=values.dtype.kind in "iub")


def _labels(kind: str, *, sure: bool = True) -> ContentError:
    question = ": a label map?" if sure else ";"
    return ContentError(f"{kind}{question} A mask must have two. {ADVICE}")


def _has_soft_edge(values: Values, top: float, lossy: bool) -> bool:
    """Return whether the values between 0 and the top are those of an edge, or remains of JPEG.

    They are not if they have areas of their own, as labels have. They must be few, and near to
    where object and background meet.
    """
    found, size = values > top / 2, 2 * JPEG_BLOCK + 1
    meet = maximum_filter(found, size) & maximum_filter(~found, size)
    within = (values > 0) & (values < top)
    if lossy:  # Along straight edges, JPEG leaves areas of nearly the value itself.
        within &= ~meet | ((values > top * NEAR) & (values < top * (1 - NEAR)))
    highest, lowest = maximum_filter(values, 2), minimum_filter(values, 2)
    area = maximum_filter(highest == lowest, 2, origin=-1)  # in a square of four equal pixels
    between, sure = (values > top / 8) & (values < top * (7 / 8)), values >= top * (7 / 8)
    return bool(
        (within & area).sum() <= MOST_IN_AREAS * within.sum()
        and between.sum() <= 2 * sure.sum()
        and (between & ~meet).sum() <= 0.02 * between.sum()
        and not _has_plateau(values, top)
    )


def _has_plateau(values: Values, top: float) -> bool:
    """Return whether many values between 0 and the top are nearly the same, in nearly flat areas.

    So are those of a third class after JPEG or scaling, however narrow it is, from two pixels on.
    """
    levels = (values * (255 / top)).astype(np.uint8)
    highest, lowest = maximum_filter(levels, 2), minimum_filter(levels, 2)
    flat = (highest - lowest <= 21) & (lowest > 31) & (highest < 224)
    flat = maximum_filter(flat, 2, origin=-1)
    counts = np.bincount(levels[flat], minlength=256)
    most_alike = np.convolve(counts, np.ones(15)).max()
    return bool(most_alike > MOST_ON_A_PLATEAU * ((levels > 31) & (levels < 224)).sum())


ADVICE = (
    "Say which values are the object, such as --foreground 128-255 for a soft edge, and which to "
    "ignore, with --ignore."
)


def _within(values: Values, ranges: Sequence[tuple[float, float]]) -> Mask:
    inside = np.zeros(values.shape, dtype=bool)
    for low, high in ranges:
        inside |= (values >= low) & (values <= high)
    return inside


def _named(values: Values) -> str:
    """Return the different values in words: all of a few, else how many from which to which."""
    distinct = np.unique(values).astype(float)
    if len(distinct) == 1:
        return f"value {distinct[0]:g}"
    if len(distinct) == 2:
        return f"values {distinct[0]:g} and {distinct[1]:g}"
    if len(distinct) <= FEW_VALUES:
        return f"values {', '.join(f'{value:g}' for value in distinct)}"
    return f"{len(distinct)} values from {distinct[0]:g} to {distinct[-1]:g}"
