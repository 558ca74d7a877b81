import pytest

from renyi_kd.information.routes import choice, frobenius, powers, tiles


@pytest.fixture
def small_tiles(monkeypatch):
    """Seven samples are served as many are: in tiles of three, and products in strips."""
    monkeypatch.setattr(choice, "LARGE", 4)
    monkeypatch.setattr(tiles, "_WIDTH", 3)
    monkeypatch.setattr(frobenius, "_WIDTH", 3)
    monkeypatch.setattr(powers, "_WIDTH", 3)
    monkeypatch.setattr(powers, "_TRIANGLE", 4)
    monkeypatch.setattr(powers, "_STRIPS", 3)
    monkeypatch.setattr(powers, "_ROWS", 2)
