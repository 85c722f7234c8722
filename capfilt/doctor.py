"""What this machine has for capfilt: parts, devices, models, disks, and what to install for the rest.

In: nothing; the network is not asked. Out: a `Diagnosis`: findings, each in order, lacking or wrong. Wrong is what no
command can do without; what only some commands need is lacking, and the finding says which and how to get it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from capfilt import __version__
from capfilt.engines.local import num_cores
from capfilt.errors import CapfiltError
from capfilt.progress import as_bytes

FINE, LACKING, WRONG = "ok", "lacking", "wrong"

PARTS = (
    "torch", "torchvision", "transformers", "open_clip_torch", "img2dataset", "webdataset", "pyarrow", "accelerate",
    "typer",
)  # fmt: skip
"""Packages whose versions `capfilt --version` names."""

EXTRAS = {
    "ray": ("ray", "--engine ray"),
    "s3": ("s3fs", "runs and tables on s3://"),
    "gs": ("gcsfs", "runs and tables on gs://"),
    "eval": ("pycocoevalcap", "`evaluate captions`"),
    "sql": ("duckdb", "`show --where`"),
    "tensorboard": ("tensorboard", "`train --tensorboard`"),
}
"""Extra → the package that shows it is installed, and what needs it."""

_MIN_FREE_BYTES = 20 * 10**9
"""On the disk of the model cache: about what the released BLIP-large models and CLIP ViT-L/14 take, twice."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    section: str
    """python, packages, extras, devices, models or disk."""
    name: str
    state: str
    """`ok`, `lacking` or `wrong`."""
    found: str
    remedy: str = ""
    """What to do about it, where there is something."""


@dataclass(slots=True)
class Diagnosis:
    """All of it."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where something is wrong that every command needs, else 0."""
        return CapfiltError.exit_code if any(finding.state == WRONG for finding in self.findings) else 0

    def line(self) -> str:
        """The result in one line."""
        counts = {state: sum(finding.state == state for finding in self.findings) for state in (WRONG, LACKING)}
        if counts[WRONG]:
            return f"{counts[WRONG]} wrong, {counts[LACKING]} lacking: mend what is wrong first."
        lacking = f"; {counts[LACKING]} things that some need are not" if counts[LACKING] else ""
        return f"All that every command needs is here{lacking}."


def diagnose() -> Diagnosis:
    """Look at everything. What cannot be looked at is a finding, no error."""
    found = Diagnosis()
    for section, look in _SECTIONS.items():
        try:
            found.findings += look()
        except Exception as error:  # whatever a broken installation raises is what this is for
            text = f"{type(error).__name__}: {error}"
            found.findings.append(Finding(section, section, WRONG, text, "Install anew: `make install`."))
    return found


def version_lines() -> Iterator[str]:
    """`capfilt 0.1.0`, then the versions of what it is made of."""
    yield f"capfilt {__version__}"
    yield f"  python {platform.python_version()}"
    for name in PARTS:
        yield f"  {name} {installed_version(name) or '(not installed)'}"


def installed_version(package: str) -> str | None:
    """Of a package; None where it is not installed. Nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _look_at_python() -> Iterator[Finding]:
    is_known = (3, 11) <= sys.version_info[:2] < (3, 13)
    found = f"{platform.python_version()} at {sys.executable}"
    yield Finding("python", "python", FINE if is_known else WRONG, found, "" if is_known else "Take 3.11 or 3.12.")
    yield Finding("python", "capfilt", FINE, f"{__version__} at {Path(__file__).parent}")


def _look_at_packages() -> Iterator[Finding]:
    """Every requirement of capfilt's own, those of the extras left out."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("capfilt") or ():
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(need.name)
        is_fine = version is not None and need.specifier.contains(version, prereleases=True)
        remedy = "" if is_fine else f"pip install '{need.name}{need.specifier}'"
        yield Finding("packages", need.name, FINE if is_fine else WRONG, version or "not installed", remedy)


def _look_at_extras() -> Iterator[Finding]:
    for extra, (package, purpose) in EXTRAS.items():
        version = installed_version(package)
        found = f"{package} {version}" if version else f"not installed; {purpose} needs it"
        remedy = "" if version else f"pip install 'capfilt[{extra}]'"
        yield Finding("extras", extra, FINE if version else LACKING, found, remedy)
    java = shutil.which("java")
    yield Finding(
        "extras", "java", FINE if java else LACKING, java or "not found; `evaluate captions` needs it",
        "" if java else "Install a Java runtime: `apt install default-jre-headless`, or your system's.",
    )  # fmt: skip


def _look_at_devices() -> Iterator[Finding]:
    import torch

    from capfilt.weights.devices import choose_device, choose_fast_dtype, describe_computing

    yield Finding("devices", "cpu", FINE, f"{num_cores()} cores, {_processor()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("devices", "memory", FINE, as_bytes(memory))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding("devices", f"cuda:{index}", FINE, f"{gpu.name}, {as_bytes(gpu.total_memory)}")
    if not torch.cuda.is_available() and (driver := shutil.which("nvidia-smi")):
        asked = subprocess.run([driver, "-L"], capture_output=True, text=True, timeout=30, check=False)
        if asked.returncode == 0 and asked.stdout.strip():
            built = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
            yield Finding(
                "devices", "cuda", LACKING, f"the driver has a GPU that torch cannot use ({built})",
                "Install a torch for this driver's CUDA: https://pytorch.org/get-started.",
            )  # fmt: skip
    device = choose_device("auto")
    yield Finding("devices", "auto", FINE, describe_computing(choose_fast_dtype("auto", device), device))


def _look_at_models() -> Iterator[Finding]:
    """The embedded ones, and those that the bundled recipes name: whether they are here without a network."""
    from capfilt.weights.find import EMBEDDED_FOLDERS, find_embedded, is_offline

    for name in EMBEDDED_FOLDERS:
        yield Finding("models", f"embedded {name}", FINE, str(find_embedded(name)))
    offline = is_offline()
    found = "HF_HUB_OFFLINE is set: models come from the cache and from folders" if offline else "the hub may be asked"
    yield Finding("models", "network", FINE, found)
    for name, recipes in sorted(_models_of_recipes().items()):
        folder, used = _cached(name), f"for {', '.join(recipes)}"
        if folder is not None:
            yield Finding("models", name, FINE, f"{folder}; {used}")
        else:
            remedy = f"With a network, `hf download {name}`." if offline else ""
            yield Finding("models", name, LACKING, f"not in the cache; {used}", remedy)


def _models_of_recipes() -> dict[str, list[str]]:
    """Hub id → the bundled recipes that name it. An open_clip tag stands for where open_clip finds its weights."""
    from capfilt.recipes import bundled_recipes, read_recipe
    from capfilt.trainings import MODEL_SETTINGS

    named: dict[str, list[str]] = {}
    for recipe_name, path in bundled_recipes().items():
        recipe = read_recipe(str(path))
        models = [recipe.caption and recipe.caption.captioner, recipe.filter and recipe.filter.filter_model]
        models += [getattr(section.settings, name, "") for section in recipe.trainings for name in MODEL_SETTINGS]
        if recipe.rank is not None:
            models.append(_hub_id_of_clip(recipe.rank.clip_model, recipe.rank.clip_weights))
        for name in dict.fromkeys(name for name in models if name and _is_hub_id(name)):
            named.setdefault(name, []).append(recipe_name)
    return named


def _hub_id_of_clip(model: str, tag: str | None) -> str:
    import open_clip

    if model not in open_clip.list_models():
        return ""
    return str((open_clip.get_pretrained_cfg(model, tag or "openai") or {}).get("hf_hub", "")).rstrip("/")


def _is_hub_id(name: str) -> bool:
    owner, slash, model = name.partition("/")
    return bool(slash and _NAME.fullmatch(owner) and _NAME.fullmatch(model))


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _look_at_disks() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from capfilt.data.tar_cache import cache_dir

    for name, folder in (("here", Path.cwd()), ("model cache", Path(HF_HUB_CACHE)), ("tar cache", cache_dir())):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free, can_write = shutil.disk_usage(there).free, os.access(there, os.W_OK)
        is_short = name == "model cache" and free < _MIN_FREE_BYTES
        remedy = "" if can_write else "Mend its rights."
        if is_short:
            remedy = f"Make room ({as_bytes(_MIN_FREE_BYTES)} for the released models), or move it: HF_HOME=…"
        found = f"{folder}, {as_bytes(free)} free" + ("" if can_write else ", not writable")
        yield Finding("disk", name, FINE if can_write and not is_short else LACKING, found, remedy)


def _processor() -> str:
    """Its name, and the instructions that matter here."""
    import torch

    try:
        said = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        said = None
    name = said[1] if said else platform.processor() or platform.machine()
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = [words for flag, words in _INSTRUCTIONS.items() if known.get(flag)]
    return f"{name} ({', '.join(fast) or 'no AVX-512'})"


_INSTRUCTIONS = {"avx512_f": "AVX-512", "avx512_bf16": "AVX512_BF16", "amx_bf16": "AMX"}

_SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": _look_at_python,
    "packages": _look_at_packages,
    "extras": _look_at_extras,
    "devices": _look_at_devices,
    "models": _look_at_models,
    "disk": _look_at_disks,
}
