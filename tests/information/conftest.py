import pytest

from renyi_kd.information import products
from renyi_kd.information.routes import choice, frobenius, gaussian, powers, tiles


@pytest.fixture
def small_tiles(monkeypatch):
    """Seven samples are served as many are: in tiles of three, and products in strips."""
    monkeypatch.setattr(choice, "LARGE", 4)
    monkeypatch.setattr(choice, "_TILES", 4)
    for module in (tiles, frobenius, gaussian):
        monkeypatch.setattr(module, "_WIDTH", 3)
    monkeypatch.setattr(products, "_WIDTH", 2)
    monkeypatch.setattr(products, "_TRIANGLE", 4)
    monkeypatch.setattr(products, "_STRIPS", 3)
    monkeypatch.setattr(powers, "_ROWS", 2)
