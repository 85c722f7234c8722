"""The folder that a model's name means: an embedded model, a folder of the user's, or a snapshot from the hub.

In: the name a user gave. Out: a path. HF_HUB_OFFLINE is honoured: a hub id is then looked up in the cache alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import capfilt
from capfilt.errors import UsageError
from capfilt.settings import EMBEDDED

EMBEDDED_DIR = Path(capfilt.__file__).parent / "world" / "assets"
"""The models shipped in the package."""
EMBEDDED_FOLDERS = {"captioner": "blip-captioner", "filter": "blip-filter", "clip": "clip", "opt": "opt", "t5": "t5"}
"""Embedded model → its folder there. `embedded-opt` names one; plain `embedded` means what fits the place."""

SIDE_FILES = ("*.json", "*.txt", "*.model")
"""What lies beside the weights: configuration, image processor, tokenizer."""


def find_model_dir(
    name: str,
    what: str,
    *,
    embedded: str | None = "captioner",
    give: str = "a folder, a hub id (owner/name)",
    patterns: Iterable[str] | None = None,
) -> Path:
    """The folder that `name` means.

    Args:
        name: `embedded` or `embedded-…`, a folder, or a hub id.
        what: what is looked for, in messages ("image encoder").
        embedded: the embedded model that plain `embedded` means; None where none fits the place.
        give: what can be given, in messages.
        patterns: the files to take from the hub; None for configuration, tokenizer and weights.

    Raises UsageError where there is no such folder, and where the hub cannot be reached.
    """
    give = f"Give {give}." if embedded is None else f"Give {give}, or `{EMBEDDED}`."
    if not name:
        raise UsageError(f"No {what} is named. {give}")
    path = Path(name).expanduser()
    if (folder := find_local_dir(name, embedded)) is not None:
        return folder
    if path.exists():
        raise UsageError(f"The {what} {path} is no folder. {give}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"There is no {what} {name}: it is no folder here, and no hub id. {give}")
    return download_snapshot(name, patterns)


def find_local_dir(name: str, embedded: str | None) -> Path | None:
    """The folder that `name` means without a network; None where there is none. Errors as `find_embedded`."""
    names = {f"{EMBEDDED}-{which}": which for which in EMBEDDED_FOLDERS}
    if embedded is not None:
        names[EMBEDDED] = embedded
    if name in names:
        return find_embedded(names[name])
    path = Path(name).expanduser()
    return path if name and path.is_dir() else None


def find_embedded(what: str) -> Path:
    """The folder of an embedded model. Raises UsageError where the package came without it."""
    folder = EMBEDDED_DIR / EMBEDDED_FOLDERS[what]
    if not folder.is_dir():
        raise UsageError(f"This installation has no embedded {what} ({folder}). Build it: `make assets`.")
    return folder


def download_snapshot(
    name: str, patterns: Iterable[str] | None = None, remedy: str = "copy the folder and give its path"
) -> Path:
    """The hub's files of `name`, from the cache or the network: safetensors, else .bin, or those of `patterns`.

    Raises UsageError when they cannot be had; `remedy` says what to do with them once they are downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(patterns or (*SIDE_FILES, "*.safetensors"))))
        if patterns is None and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*SIDE_FILES, "pytorch_model*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"{name} is no folder here, and could not be had from the hub ({_hub_problem(error)}). With a network, run "
            f"`hf download {name}`, {remedy}."
        ) from error
    return folder


def _hub_problem(error: Exception) -> str:
    """What went wrong at the hub, in our words: its own texts run over many lines and name addresses."""
    response = getattr(error, "response", None)
    if is_offline():
        return "HF_HUB_OFFLINE is set and it is not in the cache"
    if response is not None:
        return {401: "it is private or does not exist", 403: "it is gated", 404: "it does not exist"}.get(
            response.status_code, f"HTTP status {response.status_code}"
        )
    if type(error).__name__ == "HFValidationError":
        return "that is no valid hub id"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"{error.strerror}: {error.filename}"
    return f"no answer, {type(error).__name__}"


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
