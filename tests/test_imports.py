"""The import rules, and what starting the command line costs."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests import factories

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "torch",
    "torchvision",
    "transformers",
    "open_clip",
    "pyarrow",
    "img2dataset",
    "pandas",
    "aiohttp",
    "PIL",
)
LIGHT = ("capfilt.cli.main", "capfilt.pipeline", "capfilt.recipes", "capfilt.settings", "capfilt.progress")
HELP_SECONDS = 0.5


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True)


def test_imports_go_one_way() -> None:
    """The contracts are in pyproject.toml, [tool.importlinter]."""
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*sys.modules)").stdout.split()
    assert sorted(set(HEAVY) & set(loaded)) == []


def test_data_imports_no_torch() -> None:
    names = [p.stem for p in (ROOT / "capfilt" / "data").glob("*.py") if p.stem != "__init__"]
    code = "import sys\n" + "\n".join(f"import capfilt.data.{name}" for name in names) + "\nprint(*sys.modules)"
    loaded = python(code).stdout.split()
    assert sorted({"torch", "transformers", "open_clip"} & set(loaded)) == []


def test_reading_a_captioner_and_a_filter_imports_no_compiler(tmp_path: Path) -> None:
    """Nor torchvision: each takes seconds, of every command and of every worker."""
    factories.save_captioner(tmp_path / "captioner")
    factories.save_filter(tmp_path / "filter")
    loaded = python(
        "import sys, torch\n"
        "from PIL import Image\n"
        "from capfilt.curation.pictures import to_square\n"
        "from capfilt.weights.blip import load_blip\n"
        "cpu, dtype = torch.device('cpu'), torch.float32\n"
        "for kind in ('captioner', 'filter'):\n"
        f"    found = load_blip({str(tmp_path)!r} + '/' + kind, kind, device=cpu, dtype=dtype)\n"
        "    to_square(Image.new('RGB', (40, 30)), found.preparation)\n"
        "print(*sys.modules)"
    ).stdout.split()
    assert "capfilt.models.med" in loaded
    assert sorted({"torchvision", "open_clip", "torch._dynamo"} & set(loaded)) == []


def test_help_is_immediate() -> None:
    """In seconds of processor time: the tests beside this one keep the cores busy."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "capfilt", "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "caption" in done.stdout
    assert min(times) < HELP_SECONDS, f"capfilt --help took {min(times):.2f} s"
