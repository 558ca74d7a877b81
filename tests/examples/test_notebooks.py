"""The notebooks run from their first cell to their last, and are kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_clean(path: Path) -> None:
    book = read(path)
    nbformat.validate(book)
    assert not any(cell.get("outputs") for cell in book.cells)
    assert f"blob/main/examples/notebooks/{path.name}" in book.cells[0].source  # of Colab


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # of the packages that run notebooks
def test_a_notebook_runs(path: Path) -> None:
    book = read(path)
    for cell in book.cells:
        cell.source = cell.source.replace("steps: int = 240", "steps: int = 24")
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    # On stderr are the warnings of packages that miss a part of a browser.
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    if path.stem == "functionals":
        assert "-0.0716 bits" in printed
        assert figures == 2
    else:
        assert printed.startswith("mean IoU")
        assert figures == 3
