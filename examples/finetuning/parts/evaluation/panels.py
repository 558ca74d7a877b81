"""Panels with images, and what is drawn over them: prompts, masks and relation maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from parts.data.prompts import Prompts
from parts.figures import COLUMN, PAGE, YELLOW, figure_files, shown

# Between these of all values, relation maps have different colours.
QUANTILES = 0.02, 0.98


@contextmanager
def picture_files(
    path: Path,
    formats: Sequence[str],
    images: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    titles: Sequence[str],
    *,
    bar: bool = False,
) -> Iterator[tuple[Figure, NDArray[np.object_]]]:
    """Yield as `figure_files` does, with a row of panels for each image, as high as the image.

    Three columns are as wide as a column of text, more are as wide as a page.

    Args:
        path: The files without their endings.
        formats: The endings.
        images: The image of each row, (H, W, 3).
        names: What stands beside each row.
        titles: What stands above each column.
        bar: Whether there is to be room for a colour bar.
    """
    page = COLUMN if len(titles) <= 3 else PAGE
    beside = 0.12 * max(name.count("\n") + 1 for name in names) + 0.1
    width = (page - beside - 0.75 * bar) / len(titles)
    # Of a strip, something is to be seen as well.
    heights = [width * min(max(image.shape[0] / image.shape[1], 0.4), 2.0) for image in images]
    titles = [shown(title, width) for title in titles]
    lines = max(title.count("\n") + 1 for title in titles)
    with figure_files(
        path,
        formats,
        size=(page, sum(heights) + 0.06 * len(images) + 0.13 * lines + 0.1),
        nrows=len(images),
        ncols=len(titles),
        gridspec_kw={"height_ratios": heights},
        subplot_kw={"xticks": [], "yticks": []},
    ) as (figure, axes):
        for axis in axes.flat:
            axis.spines[:].set_visible(False)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title)
        for axis, name, height in zip(axes[:, 0], names, heights, strict=True):
            axis.set_ylabel(shown(name, height), fontsize=7)
        yield figure, axes


def show_prompt(axis: Axes, rgb: NDArray[np.uint8], prompt: Prompts) -> None:
    """Draw an image with one prompt in its pixels: a box, or points as dots and crosses.

    Dots are on the object, crosses beside it.
    """
    axis.imshow(rgb)
    if prompt.boxes is not None:
        x0, y0, x1, y1 = prompt.boxes.tolist()
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, ec=YELLOW, fc="none", lw=1.2))
        return
    on = prompt.labels == 1
    for marker, some in (("o", prompt.points[on]), ("X", prompt.points[~on])):
        axis.scatter(*some.T, c=YELLOW, marker=marker, edgecolors="black", s=16, linewidths=0.5)


def show_mask(axis: Axes, rgb: NDArray[np.uint8], mask: Tensor, color: str) -> None:
    """Draw an image with a mask over it, bool (H, W)."""
    picture = torch.from_numpy(rgb).permute(2, 0, 1)
    picture = draw_segmentation_masks(picture, mask, alpha=0.55, colors=color)
    axis.imshow(picture.permute(1, 2, 0).numpy())


def show_outline(axis: Axes, truth: Tensor, color: str = "white") -> None:
    """Draw the outline of a mask (H, W)."""
    axis.contour(truth.numpy(), [0.5], colors=color, linewidths=0.8)


def show_note(axis: Axes, text: str) -> None:
    """Write into the lower left corner of a picture."""
    box = {"fc": "black", "ec": "none", "pad": 1.2}
    place = {"xytext": (3, 3), "xycoords": "axes fraction", "textcoords": "offset points"}
    axis.annotate(text, (0, 0), color="white", fontsize=7, bbox=box, **place)


def show_relation(
    axis: Axes,
    rgb: NDArray[np.uint8],
    relation: Tensor,
    cell: tuple[float, float],
    limits: tuple[float, float],
) -> AxesImage:
    """Draw a relation map (h, w) over the image in grey, and return what a colour bar needs.

    Args:
        axis: Where to draw.
        rgb: The image, (H, W, 3).
        relation: A value for each place of the embedding that sees some of the image.
        cell: Height and width of a place in pixels of the image. The last ones may reach beyond it.
        limits: The values that have the first and the last colour.
    """
    (height, width, _), (rows, columns) = rgb.shape, relation.shape
    # A pale image lets the colours over it be those of the colour bar.
    axis.imshow(rgb.mean(-1), cmap="gray", vmin=-255, vmax=255)
    extent = (0, columns * cell[1], rows * cell[0], 0)
    low, high = limits
    drawn = axis.imshow(relation.numpy(), vmin=low, vmax=high, extent=extent, alpha=0.7)
    axis.set(xlim=(0, width), ylim=(height, 0))
    return drawn


def limits_of(relations: Sequence[Tensor]) -> tuple[float, float]:
    """Return the `QUANTILES` of the values of all maps, between which the colours are."""
    values = torch.cat([relation.flatten() for relation in relations])
    low, high = np.quantile(values.numpy(), QUANTILES).tolist()
    return low, high


def colorbar(figure: Figure, drawn: AxesImage, axes: NDArray[np.object_]) -> None:
    """Draw the colours of relation maps beside them."""
    low, high = (f"{100 * part:g} %" for part in QUANTILES)
    height = figure.get_figheight()
    bar = figure.colorbar(drawn, ax=axes, extend="both", aspect=10 * height, pad=0.01)
    bar.set_label(shown(f"relation, {low} to {high} quantile", height))
