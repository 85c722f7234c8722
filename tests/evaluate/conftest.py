"""Small random models of every kind that writes texts, and pictures on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import factories
from tests.evaluate.small_blip2 import save_blip2

NUM_PICTURES = 5


@pytest.fixture(scope="session")
def writers_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `opt`, `t5` and `captioner`."""
    folder = tmp_path_factory.mktemp("writers")
    for family in ("opt", "t5"):
        save_blip2(folder / family, family)
    factories.save_captioner(folder / "captioner")
    return folder


@pytest.fixture(scope="session")
def pictures_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.png to 4.png, and broken.png, which is cut off."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(NUM_PICTURES):
        factories.draw_picture(number, width_px=40 + number, height_px=50).save(folder / f"{number}.png")
    content = (folder / "0.png").read_bytes()
    (folder / "broken.png").write_bytes(content[: len(content) // 2])
    return folder
