"""What is said of a file that holds no weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from capfilt.errors import UsageError
from capfilt.weights.foreign_files import describe_file
from capfilt.weights.model_files import read_safetensors

TENSORS = save({"a": torch.zeros(9)})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.bin", b"", "empty"),
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("a.bin", b"\n <!DOCTYPE html><html>", "a page of HTML or XML"),
        ("a.bin", b"PAR1....", "a Parquet file"),
        ("a.bin", b"hello", "no file of tensors"),
        ("a.bin", b"PK\x05\x06" + bytes(18), "an archive without tensors"),
        ("a.bin", TENSORS, "safetensors under another name"),
        ("a.safetensors", TENSORS[:-4], "damaged safetensors"),
    ],
)
def test_files_are_named_for_what_they_are(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert describe_file(tmp_path / name).startswith(said)
    if name.endswith(".safetensors"):
        with pytest.raises(UsageError, match=rf"the file is {said}\. Fetch them again"):
            read_safetensors(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert describe_file(tmp_path / "a.bin") == "no readable file"
