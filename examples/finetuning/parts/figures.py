"""One style for the figures of all programs: sizes, colours and files.

Figures are as wide as a column or a page of two columns, with letters of 8 points, so that they
need no scaling in a paper. In PDF and SVG, text is text, lines are lines, and pictures are pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from numpy.typing import NDArray

from parts.options import FORMATS

COLUMN, PAGE = 3.3, 6.9  # inches
LETTERS_PER_INCH = 16  # of 8 points, on average

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, BLACK, YELLOW = "#e69f00", "#56b4e9", "#000000", "#f0e442"
# Yellow lines are too pale on white.
CYCLE = cycler(linestyle=["-", "--", ":"]) * cycler(
    color=[BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK]
)
LINES = [*CYCLE]
BAND = "lines are means, bands are ± one standard error"
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "axes.prop_cycle": CYCLE,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.hspace": 0.0,
    "figure.constrained_layout.wspace": 0.0,
    "image.cmap": "viridis",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


@contextmanager
def figure_files(
    path: Path,
    formats: Sequence[str] = FORMATS,
    *,
    size: tuple[float, float],
    **panels: Any,
) -> Iterator[tuple[Figure, NDArray[np.object_]]]:
    """Yield a figure in the style of all, and write it at the end of the block.

    Args:
        path: The files without their endings.
        formats: The endings, such as `png`.
        size: Width and height in inches.
        panels: What `Figure.subplots` takes.

    Yields:
        The figure, and its panels in rows and columns.

    Example:
        ```
        with figure_files(Path("scores"), ["pdf"], size=(COLUMN, 2)) as (figure, axes):
            axes[0, 0].plot([1, 2], [3, 4])
        ```
    """
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(squeeze=False, **panels)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # what was found is the same in all files, and takes long
        for ending in formats:
            figure.savefig(path.with_name(f"{path.name}.{ending}"))


def shown(text: str, inches: float = PAGE) -> str:
    """Return text as it can be drawn: in lines of this width, with escapes if it is no UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode()
    width = int(LETTERS_PER_INCH * inches)
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def show_legend(figure: Figure, handles: Mapping[str, Artist], note: str | None = None) -> None:
    """Explain lines and colours above all panels, side by side as far as their names leave room."""
    wide = max(map(len, handles)) / LETTERS_PER_INCH + 0.4
    columns = min(len(handles), max(1, int(figure.get_figwidth() / wide)))
    names = handles.keys()
    figure.legend(
        handles.values(), names, loc="outside upper center", ncols=columns, title=note or ""
    )
