"""Checkpoints: what is committed is whole, what is damaged is seen, two are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from capfilt.errors import CapfiltError, CorruptionError, FingerprintMismatchError, RunLockedError, UsageError
from capfilt.train import checkpoint
from capfilt.train.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    lock_output,
    refuse_other_settings,
    save_checkpoint,
)


def trained(seed: int, steps: int = 2) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, seed: int = 0) -> tuple[nn.Linear, torch.optim.AdamW]:
    model, optimizer = trained(seed)
    save_checkpoint(folder, tensors=dict(model.named_parameters()), optimizer=optimizer, state={"step": step})
    return model, optimizer


def test_weights_and_moments_come_back(tmp_path: Path) -> None:
    model, optimizer = save(tmp_path, 5)
    fresh, fresh_optimizer = trained(9, steps=0)
    path, state = find_checkpoint(tmp_path) or pytest.fail("no checkpoint")
    load_checkpoint(path, tensors=dict(fresh.named_parameters()), optimizer=fresh_optimizer)
    assert state["step"] == 5
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), atol=0, rtol=0)
    moments, expected_moments = fresh_optimizer.state_dict()["state"], optimizer.state_dict()["state"]
    torch.testing.assert_close(moments, expected_moments, atol=0, rtol=0)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000015", "step-00000020"]
    assert (find_checkpoint(tmp_path) or pytest.fail("none"))[1]["step"] == 20


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    hurt(tmp_path / "checkpoints" / "step-00000010" / name, damage)
    assert (find_checkpoint(tmp_path) or pytest.fail("none"))[1]["step"] == 5
    hurt(tmp_path / "checkpoints" / "step-00000005" / name, damage)
    with pytest.raises(CorruptionError, match="move .*checkpoints away"):
        find_checkpoint(tmp_path)


def hurt(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    with torch.no_grad():
        model.bias[1] = float("nan")
    with pytest.raises(CapfiltError, match="After step 7 1 tensors are not finite, the first 'bias'"):
        save_checkpoint(tmp_path, tensors=dict(model.named_parameters()), optimizer=optimizer, state={"step": 7})
    assert find_checkpoint(tmp_path) is None


@pytest.mark.parametrize("failing", ["save_file", "_sync_and_digest", "sync_directory"])
def test_a_write_that_fails_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(tmp_path, 5)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, refuse)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 10)
    found = sorted(os.listdir(tmp_path / "checkpoints"))
    assert found[0] == "step-00000005"
    assert not [name for name in found if name.startswith(".")]
    assert (find_checkpoint(tmp_path) or pytest.fail("none"))[1]["step"] == 5


def test_other_settings_are_refused_by_name() -> None:
    state = {"fields": json.loads(json.dumps({"seed": 0, "losses": ("itc",)}))}
    refuse_other_settings(state, {"seed": 0, "losses": ("itc",)}, Path("out"))
    with pytest.raises(FingerprintMismatchError, match=r"seed 0 -> 1.*train beside it: --output"):
        refuse_other_settings(state, {"seed": 1, "losses": ("itc",)}, Path("out"))


def test_a_second_training_is_kept_out(tmp_path: Path) -> None:
    with (
        lock_output(tmp_path),
        pytest.raises(RunLockedError, match="Another training"),
        lock_output(tmp_path),
    ):
        pass


def refuse_training(output_dir: Path, metrics: str | None = None) -> None:
    with lock_output(output_dir):
        if metrics is not None:
            (output_dir / "metrics.jsonl").write_text(metrics)
        raise UsageError("a model that does not fit")


@pytest.mark.parametrize(("metrics", "is_gone"), [(None, True), ("", True), ('{"step": 1}\n', False)])
def test_a_refused_training_leaves_no_empty_folder(tmp_path: Path, metrics: str | None, is_gone: bool) -> None:
    with pytest.raises(UsageError):
        refuse_training(tmp_path / "new", metrics)
    assert (tmp_path / "new").exists() != is_gone
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError):
        refuse_training(tmp_path / "there", metrics)
    assert (tmp_path / "there").is_dir(), "the user's own"


def test_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    with (
        pytest.raises(UsageError, match=r"README\.md is a file; expected a folder"),
        lock_output(tmp_path / "README.md"),
    ):
        pass
