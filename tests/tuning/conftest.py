import pictures
import pytest
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", pictures.small)
