"""What the tests of the examples share: data sets and trained students, each made once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from finetuning_runs import make_data, run, training_options
from torch import Tensor


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of eight images, four of them for training."""
    return make_data(tmp_path_factory.mktemp("data"), train=4, val=2, test=2)


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a function from family and method to a finished run, which no test may change."""
    folder = tmp_path_factory.mktemp("trained")

    @cache
    def train(family: str, method: str) -> Path:
        output = folder / f"{family}-{method}"
        run(family, data, output, *training_options(family, method))
        return output

    return train


@pytest.fixture(scope="session")
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return two pictures, a box for each, a point for each, and the labels of the points."""
    torch.manual_seed(1)
    boxes = torch.tensor([[30.0, 40.0, 150.0, 200.0], [90.0, 20.0, 240.0, 100.0]])
    points, labels = torch.tensor([[[90.0, 90.0]], [[150.0, 60.0]]]), torch.ones(2, 1).int()
    return torch.randn(2, 3, 256, 256), boxes, points, labels
