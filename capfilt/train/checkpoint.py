"""Checkpoints of a training: safetensors + JSON, committed by rename, the last two kept, verified when read.

    OUTPUT/checkpoints/step-00000500/
      model.safetensors       the tensors that training changes
      optimizer.safetensors   the optimizer's moments
      state.json              step, cursor, settings, losses so far, sha256 of the two files; written last

In: live tensors and an optimizer. Out: the same, as they were at the step saved. A directory without a
readable state.json, or whose files do not match it, is none. Weights that are not finite are refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from capfilt.data.field_changes import field_changes
from capfilt.data.paths import refuse_address
from capfilt.data.texts import first_line
from capfilt.errors import CapfiltError, CorruptionError, FingerprintMismatchError, RunLockedError, UsageError
from capfilt.train.processes import fill_tensor, full_tensor
from capfilt.train.records import METRICS_FILE, PLOT_FILE
from capfilt.weights.foreign_files import describe_file

FORMAT_VERSION = 2
NUM_KEPT = 2
_DIGESTS = {
    "input": "input (other pairs or texts)", "tokenizer_sha256": "tokenizer",
    "origin_sha256": "model to start from", "image_encoder_sha256": "image encoder",
    "qformer_init_sha256": "start of the Q-Former", "init_sha256": "result of stage 1", "llm_sha256": "language model",
}  # fmt: skip
"""Field of a training that is a digest → what it is of."""
_OWN_FILES = (".lock", METRICS_FILE, PLOT_FILE, "tensorboard")
"""Of a training that has no checkpoint yet."""
_LOG_SUFFIXES = (".log", ".txt", ".out", ".err")
_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")


@contextmanager
def lock_output(output_dir: Path) -> Iterator[None]:
    """Keeps a second training out of `output_dir`; RunLockedError where one is at work, UsageError for a file.

    A folder that was not there is taken away again where an error leaves nothing in it.
    """
    refuse_address(output_dir, "A model")
    was_there = output_dir.exists()
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"--output {output_dir} is a file; expected a folder, new or of an earlier training.")
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".lock", "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockedError(
                f"Another training writes to {output_dir}. Wait for it, or give another --output."
            ) from None
        try:
            yield
        except BaseException:
            if not was_there:
                _remove_empty(output_dir)
            raise


def _remove_empty(output_dir: Path) -> None:
    """Remove a folder that holds the lock and no line of metrics."""
    left = [entry for entry in output_dir.iterdir() if entry.name != ".lock"]
    if all(entry.name == METRICS_FILE and not entry.stat().st_size for entry in left):
        with suppress(OSError):  # the error is what the user must read
            shutil.rmtree(output_dir)


def refuse_foreign_files(output_dir: Path) -> None:
    """UsageError where `output_dir` holds what no training put there, and what a finished one might replace.

    A log that the user keeps there stays.
    """
    if (output_dir / "training.json").exists() or (output_dir / "checkpoints").is_dir():
        return
    foreign = sorted(
        entry.name
        for entry in output_dir.iterdir()
        if entry.name not in _OWN_FILES
        and not entry.name.startswith(".staging-")
        and (entry.is_dir() or entry.suffix not in _LOG_SUFFIXES)
    )
    if foreign:
        raise UsageError(
            f"{output_dir} holds other files ({', '.join(foreign[:5])}{', …' if len(foreign) > 5 else ''}); expected a "
            "new folder, or one of an earlier training. Give another --output."
        )


def save_checkpoint(
    output_dir: Path,
    *,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    write: bool = True,
) -> None:
    """Commits the state after `state["step"]` steps, then drops all but the newest two checkpoints.

    Of several processes all call it, since each may have a share of the tensors, and one is to `write`.
    """
    whole, moments = _whole_tensors(tensors, write), _whole_tensors(_optimizer_tensors(optimizer), write)
    if not write:
        return
    _refuse_non_finite(whole, int(state["step"]))
    root = output_dir / "checkpoints"
    staging = root / f".staging-{os.getpid()}"
    for left in root.glob(".staging-*"):  # of processes that were killed: the output is locked
        shutil.rmtree(left, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        save_file(whole, staging / _TENSOR_FILES[0])
        save_file(moments, staging / _TENSOR_FILES[1])
        digests = {name: _sync_and_digest(staging / name) for name in _TENSOR_FILES}
        record = {"format_version": FORMAT_VERSION, **state, "sha256": digests}
        (staging / "state.json").write_text(json.dumps(record, indent=1))
        _sync_and_digest(staging / "state.json")
        sync_directory(staging)
        _read_state(staging)
        target = root / f"step-{int(state['step']):08d}"
        shutil.rmtree(target, ignore_errors=True)
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_directory(root)
    for old in _checkpoint_dirs(output_dir)[:-NUM_KEPT]:
        shutil.rmtree(old)


def find_checkpoint(output_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its state; None where there is none at all.

    A damaged newest one gives way to the one before it; CorruptionError where every one is damaged.
    """
    found = _checkpoint_dirs(output_dir)
    for path in reversed(found):
        try:
            return path, _read_state(path)
        except CorruptionError as error:
            if path == found[0]:
                raise CorruptionError(
                    f"{error} No other checkpoint is left: move {path.parent} away to start anew."
                ) from error
    return None


def newer_checkpoints(path: Path) -> list[Path]:
    """Those beside the checkpoint `path` that come after it."""
    return [other for other in _checkpoint_dirs(path.parents[1]) if other.name > path.name]


def refuse_damaged_model(output_dir: Path, digests: Mapping[str, str]) -> None:
    """CorruptionError where a finished model's file is gone, or its weights are not those written."""
    for name, digest in digests.items():
        path = output_dir / name
        if path.exists() and (path.suffix != ".safetensors" or _sync_and_digest(path) == digest):
            continue
        state = "is not what the training wrote" if path.exists() else "is gone"
        raise CorruptionError(
            f"{path} {state}. Remove {output_dir / 'training.json'} and repeat the command: the last checkpoint gives "
            "the model anew."
        )


def read_training_record(output_dir: Path) -> dict[str, Any] | None:
    """training.json, which a finished training leaves; None where there is none. CorruptionError for a damaged one."""
    path = output_dir / "training.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(record[name], dict) for name in ("fields", "sha256", "summary")):
            return record
        problem = "its entries are not what a training writes"
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
    raise CorruptionError(
        f"{path} cannot be read ({problem}). Remove it and repeat the command: the last checkpoint gives the model "
        "anew."
    )


def find_fields(output_dir: Path) -> dict[str, Any] | None:
    """What the training in `output_dir`, finished or under way, was started with; None where there is none."""
    record = read_training_record(output_dir)
    if record is not None:
        return record["fields"]
    found = find_checkpoint(output_dir)
    return None if found is None else found[1]["fields"]


def refuse_other_settings(state: Mapping[str, Any], fields: Mapping[str, Any], output_dir: Path) -> None:
    """FingerprintMismatchError naming each setting that differs from the training found in `output_dir`."""
    changes = setting_changes(state["fields"], fields)
    if changes:
        raise FingerprintMismatchError(
            f"{output_dir} holds a training with other settings ({changes}). Give the settings it was started "
            f"with, move it away, or train beside it: --output of `capfilt train`, --generation of `capfilt run`."
        )


def setting_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Each setting that differs, as `name old -> new`; of digests, only what they are of. Empty where none does.

    A precision `auto` is any: a training goes on in the one it was begun in.
    """
    begun = {"autocast": old["autocast"]} if new.get("autocast") == "auto" and "autocast" in old else {}
    new = json.loads(json.dumps({**new, **begun}))
    return ", ".join(field_changes(old, new, _DIGESTS))


def load_checkpoint(path: Path, *, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Copies a checkpoint into live tensors and the optimizer; names must agree."""
    stored = _read_tensors(path / _TENSOR_FILES[0])
    odd = sorted(stored.keys() ^ tensors.keys())
    if odd:
        raise CorruptionError(f"{path} and the model differ in {len(odd)} tensors, the first {odd[0]!r}.")
    for name, tensor in tensors.items():
        fill_tensor(tensor, stored[name])
    _restore_optimizer(optimizer, _read_tensors(path / _TENSOR_FILES[1]))


def file_digests(folder: Path) -> dict[str, str]:
    """Relative path → sha256 of every file of a folder; each file is synced to disk on the way."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _sync_and_digest(path) for path in files}


def publish_files(staging: Path, output_dir: Path, record: Mapping[str, Any]) -> None:
    """Moves a finished model's files into `output_dir`; training.json, the commit record, goes last."""
    for entry in sorted(staging.iterdir()):
        target = output_dir / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)
    (staging / "training.json").write_text(json.dumps(record, indent=1))
    _sync_and_digest(staging / "training.json")
    sync_directory(output_dir)
    os.replace(staging / "training.json", output_dir / "training.json")
    sync_directory(output_dir)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoint_dirs(output_dir: Path) -> list[Path]:
    return sorted((output_dir / "checkpoints").glob("step-*"))


def _refuse_non_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise CapfiltError(
            f"After step {step} {len(bad)} tensors are not finite, the first {bad[0]!r}; nothing was saved. "
            f"Go on from the last checkpoint with a lower --learning-rate in another --output."
        )


def _sync_and_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text())
        if (version := state["format_version"]) != FORMAT_VERSION:
            raise CorruptionError(
                f"{path} has format {version}, another capfilt's; expected {FORMAT_VERSION}. Go on with that one, "
                "or train into another --output."
            )
        digests = {name: _sync_and_digest(path / name) for name in _TENSOR_FILES}
        if state["sha256"] != digests:
            raise CorruptionError(f"{path} does not match its state.json.")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptionError(f"{path} cannot be read ({error}).") from error
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptionError(
            f"{path} is no safetensors file: it is {describe_file(path)}. Nothing in it was run. Move {path.parent} "
            "away to go on from the checkpoint before it."
        ) from error


def _whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """On the host, whole where processes have shares; nothing unless they are to be kept."""
    whole = ((name, full_tensor(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.contiguous().cpu() for name, tensor in whole if keep}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Fills the optimizer's state; what belongs to a weight is shared out as the weight is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, field = name.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            target = torch.zeros_like(parameter, requires_grad=False)
            fill_tensor(target, value)
            value = target
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
