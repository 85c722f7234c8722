"""Names of models: embedded ones, folders; hub ids are tested with a BLIP of each layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from capfilt.errors import UsageError
from capfilt.weights import find
from capfilt.weights.find import EMBEDDED_FOLDERS, find_embedded, find_model_dir


def test_embedded_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(find, "EMBEDDED_DIR", tmp_path)
    for what, folder in EMBEDDED_FOLDERS.items():
        (tmp_path / folder).mkdir()
        assert find_model_dir(f"embedded-{what}", "model") == find_embedded(what) == tmp_path / folder
    assert find_model_dir("embedded", "model") == tmp_path / "blip-captioner"
    assert find_model_dir("embedded", "model", embedded="filter") == tmp_path / "blip-filter"


def test_missing_embedded_model_is_not_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(find, "EMBEDDED_DIR", tmp_path)
    for name in ("embedded", "embedded-opt"):
        with pytest.raises(UsageError, match="make assets"):
            find_model_dir(name, "model")


def test_a_folder_is_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_model_dir(str(tmp_path), "model") == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model_dir("~", "model") == tmp_path


def test_embedded_is_offered_only_where_one_fits() -> None:
    with pytest.raises(UsageError, match=r"Give a folder, a hub id \(owner/name\), or `embedded`\.$"):
        find_model_dir("", "model")
    for name in ("", "embedded"):
        with pytest.raises(UsageError, match=r"Give a folder, a hub id \(owner/name\)\.$"):
            find_model_dir(name, "model", embedded=None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"No image encoder is named\. Give a folder, a hub id"),
        ("{folder}/weights.bin", r"image encoder .*weights\.bin is no folder"),
        ("{folder}/nowhere", "There is no image encoder .*nowhere: it is no folder"),
        ("./nowhere", "it is no folder"),
        ("bert", "no hub id"),
        ("embedded-bert", "There is no image encoder embedded-bert"),
    ],
)
def test_name_that_means_nothing_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UsageError, match=message):
        find_model_dir(name.format(folder=tmp_path), "image encoder")
