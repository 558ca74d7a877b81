"""One rule for images and one for masks: what their files may hold, and how it is read.

A mask is two-valued, or it is refused with the values that were found. A label map that was read as
a soft mask would train on half of the objects without a word. Where the rule cannot know, the user
says which values are foreground, which are ignored, and which range an image has.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.ndimage import maximum_filter, minimum_filter

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
Values = NDArray[np.generic]
Mask = NDArray[np.bool_]

# Up to this many different values are listed, and taken for labels and not for the soft edge of a
# mask, except in a JPEG file.
FEW_VALUES = 8
# The share of the values of a soft edge that lie in areas of four equal pixels or more. In masks
# that were blurred, scaled, or saved as JPEG, at most 0.34 did; of labels nearly all do.
MOST_IN_AREAS = 0.6
JPEG_BLOCK = 8  # pixels, how far what JPEG leaves reaches
# A channel of a grey picture may differ from the others by so much in a JPEG file.
COLOUR_RESIDUE = 8
DEEP = 65535  # the largest value of 16 bits


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


class ReadImage(NamedTuple):
    """An image as it was read."""

    rgb: NDArray[np.uint8]  # (H, W, 3), upright
    kind: str  # what the file holds, in words
    largest: float | None  # of images with more than 8 bits, the largest value before scaling


class ReadMask(NamedTuple):
    """A mask as it was read."""

    object: Mask  # (H, W), upright
    known: Mask  # (H, W), False where the values are ignored
    kind: str  # what the file holds, in words


def read_image(path: Path, reading: Reading = TWO_VALUED) -> ReadImage:
    """Read a picture as RGB of 8 bits.

    Raises:
        ValueError: If it has several pages or frames, an alpha channel that varies, or values whose
            range is not known.
        OSError, SyntaxError: If Pillow cannot read it.
    """
    with Image.open(path) as file:
        # A camera keeps a preview behind the picture in a file of the format MPO.
        _refuse_frames(file, allowed=file.format == "MPO")
        upright = ImageOps.exif_transpose(file)
        if upright.mode.startswith("I") or upright.mode == "F":
            return _read_deep(np.asarray(upright), upright.mode, reading)
        if any(";16" in str(tile[-1]) for tile in getattr(file, "tile", ())):
            raise ValueError("colours of 16 bits cannot be read; save it with 8 bits a channel")
        if upright.has_transparency_data:
            alpha = np.asarray(upright.convert("RGBA").getchannel("A"))
            if (alpha != alpha.flat[0]).any():
                raise ValueError("an alpha channel that varies; put it on a background first")
        return ReadImage(np.array(upright.convert("RGB")), "8 bits", None)


def _read_deep(values: Values, mode: str, reading: Reading) -> ReadImage:
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    low, high = reading.image_range or (0, DEEP)
    if reading.image_range is None and not mode.startswith("I;16"):
        raise ValueError(
            f"values from {values.min():g} to {values.max():g} of unknown range; give --image-range"
        )
    if values.min() < low or values.max() > high:
        raise ValueError(
            f"values from {values.min():g} to {values.max():g}, outside of the range from {low:g} "
            f"to {high:g}; give another --image-range"
        )
    grey = ((values.astype(np.float64) - low) * (255 / (high - low))).round().astype(np.uint8)
    kind = f"range {low:g} to {high:g}"
    return ReadImage(np.stack([grey] * 3, axis=-1), kind, float(values.max()))


def read_mask(path: Path, reading: Reading = TWO_VALUED) -> ReadMask:
    """Read a mask.

    Without `foreground`, it must be two-valued: zero for the background and one other value for the
    object. Values in between may only be the remains of JPEG, or a soft edge.

    Raises:
        ValueError: If it is not two-valued, naming the values, or has several pages or frames.
        OSError, SyntaxError: If Pillow cannot read it.
    """
    with Image.open(path) as file:
        _refuse_frames(file)
        jpeg = file.format in ("JPEG", "MPO")
        values = _mask_values(ImageOps.exif_transpose(file))
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    known = ~_within(values, reading.ignore)
    if not known.any():
        raise ValueError("nothing but values that are ignored")
    if reading.foreground:
        return ReadMask(_within(values, reading.foreground) & known, known, _named(values[known]))
    found, kind = _two_valued(np.where(known, values, 0), np.unique(values[known]), jpeg)
    return ReadMask(found & known, known, kind)


def _refuse_frames(file: Image.Image, *, allowed: bool = False) -> None:
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and not allowed:
        raise ValueError(f"{frames} pages or frames; save each as a file of its own")


def _mask_values(image: Image.Image) -> Values:
    """Return the values that tell objects apart: numbers, or indices of colours, (H, W)."""
    if image.mode == "P":
        indices, colours = np.asarray(image), np.asarray(image.convert("RGB"))
        used = np.unique(colours.reshape(-1, 3), axis=0)
        # The order of greys in a palette means nothing. That of colours is the label.
        greys = (used == used[:, :1]).all() and len(used) == len(np.unique(indices))
        return colours[..., 0] if greys else indices
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        values = np.asarray(image)
        return values.astype(np.uint8) if values.dtype == bool else values
    rgba = np.asarray(image.convert("RGBA"))
    colours, alpha = rgba[..., :3], rgba[..., 3]
    if (alpha != alpha[0, 0]).any():
        if (colours != colours[0, 0]).any():
            raise ValueError("colours and an alpha channel that both vary; save one of them alone")
        return alpha
    spread = colours.max(axis=-1).astype(int) - colours.min(axis=-1)
    if spread.max() <= COLOUR_RESIDUE:
        return colours[..., 0]
    distinct = np.unique(colours.reshape(-1, 3), axis=0)
    if len(distinct) == 2 and not distinct[0].any():  # black, and the colour of the object
        return colours.any(axis=-1).astype(np.uint8)
    shown = ", ".join(str(tuple(int(x) for x in colour)) for colour in distinct[:4])
    more = ", ..." if len(distinct) > 4 else ""
    raise ValueError(
        f"{len(distinct)} colours: {shown}{more}; a mask must have two values, save the object as "
        "white on black"
    )


def _two_valued(values: Values, distinct: Values, jpeg: bool) -> tuple[Mask, str]:
    """Return where the larger of two values is, and the two in words."""
    kind, top = _named(distinct), distinct[-1]
    if len(distinct) == 1:
        if top in (0, 1, 255, DEEP):
            return values > 0, kind
        raise ValueError(f"{kind} alone; a mask must have the value 0 and one other. {ADVICE}")
    if distinct[0] != 0 or (len(distinct) == 2 and top < 0):
        raise ValueError(f"{kind}; a mask must have the value 0 and one other. {ADVICE}")
    if len(distinct) == 2:
        return values == top, kind
    if (jpeg or len(distinct) > FEW_VALUES) and _has_soft_edge(values, top):
        return values > top / 2, f"values from 0 to {top:g} with a soft edge"
    labels = ": a label map?" if values.dtype.kind in "iub" else ";"
    raise ValueError(f"{kind}{labels} A mask must have two. {ADVICE}")


def _has_soft_edge(values: Values, top: float) -> bool:
    """Return whether the values between 0 and the top are those of an edge, or remains of JPEG.

    They are not if they have areas of their own, as labels have. They must be few, and near to
    where object and background meet.
    """
    within = (values > 0) & (values < top)
    highest, lowest = maximum_filter(values, 2), minimum_filter(values, 2)
    area = maximum_filter(highest == lowest, 2, origin=-1)  # in a square of four equal pixels
    between, sure = (values > top / 8) & (values < top * (7 / 8)), values >= top * (7 / 8)
    found, size = values > top / 2, 2 * JPEG_BLOCK + 1
    meet = maximum_filter(found, size) & maximum_filter(~found, size)
    return bool(
        (within & area).sum() <= MOST_IN_AREAS * within.sum()
        and between.sum() <= 2 * sure.sum()
        and (between & ~meet).sum() <= 0.02 * between.sum()
    )


ADVICE = "Say which values are the object, and which to ignore, with --foreground and --ignore."


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
