"""Pictures that scripts draw, made small: most of the time of small scripts goes into drawing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from gpt2.report import plots

savefig = Figure.savefig


def small(figure: Figure, file, **how) -> None:
    """Stands in for Figure.savefig: everything is drawn, on few pixels and once."""
    savefig(figure, file, **how | {"dpi": 20, "bbox_inches": None})


def is_drawn(path: Path) -> bool:
    """Whether a file is a whole picture with something in it."""
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(1 << 20)) > 20


@pytest.fixture(scope="module", autouse=True)
def small_pictures() -> Iterator[None]:
    """For a folder's conftest.py: all that its tests and their fixtures draw is small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", small)
        yield


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """For tests that look at no picture: whatever figure is drawn from now on is an empty one."""
    for name in plots.__all__:
        patch.setattr(plots, name, lambda *args, **how: Figure(figsize=(1, 1)))
