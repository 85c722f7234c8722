"""A folder is there whole or not at all, and nothing of the user's is replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capfilt.data.whole_folders import whole_folder
from capfilt.errors import UsageError


def write(
    place: Path,
    *,
    overwrite: bool = False,
    text: str = "whole",
    meanwhile: Callable[[Path], object] = lambda folder: None,
) -> None:
    with whole_folder(place, "mark", overwrite=overwrite) as folder:
        assert list(folder.iterdir()) == []
        (folder / "mark").write_text(text)
        meanwhile(folder)


def test_it_has_its_name_at_the_end(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with whole_folder(place, "mark") as folder:
        (folder / "mark").touch()
        assert not place.exists()
    assert [path.name for path in place.iterdir()] == ["mark"]
    with pytest.raises(FileExistsError):
        write(tmp_path / "other", meanwhile=lambda folder: (folder / "mark").touch(exist_ok=False))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    write(tmp_path / "empty", overwrite=True, text="again")
    assert (tmp_path / "empty" / "mark").read_text() == "again"
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write(tmp_path / "link", overwrite=True, text="beside")
    assert [(tmp_path / name / "mark").read_text() for name in ("empty", "link")] == ["again", "beside"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_what_may_not_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place, overwrite, message in (
        (tmp_path / "file", True, "is a file"), (tmp_path / "mine", False, "is there already"),
        (tmp_path / "mine", True, "it has no mark"), (Path(), False, "the folder you are in"),
        (tmp_path / "no" / "where", False, "There is no directory"), (Path("s3://b/x"), False, "is an address"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            write(place, overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "file", "here", "mine"]


def test_what_came_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        write(tmp_path / "out", meanwhile=lambda _: (tmp_path / "out" / "theirs").mkdir(parents=True))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]
