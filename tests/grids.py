"""Parameters of tests, few by default and the rest of the grid with `-m slow`; where tests run."""

import pytest
import torch

small_tiles = pytest.mark.skipif(
    torch.get_default_device().type != "cpu", reason="needs the tiles of a CPU"
)


def over(names, fast, slow=(), ids=None):
    """`pytest.mark.parametrize` over both lists; the values of the second are marked as slow."""
    marked = [(value, ()) for value in fast] + [(value, pytest.mark.slow) for value in slow]
    return pytest.mark.parametrize(
        names, [_parameter(names, value, marks) for value, marks in marked], ids=ids
    )


def over_cases(names, table, fast):
    """`over` the values of a dictionary, named by its keys; all but those in `fast` are slow."""
    assert set(fast) <= set(table)
    return pytest.mark.parametrize(
        names,
        [
            _parameter(names, value, () if name in fast else pytest.mark.slow, id=name)
            for name, value in table.items()
        ],
    )


def _parameter(names, value, marks, **options):
    values = value if "," in names else (value,)
    return pytest.param(*values, marks=marks, **options)
