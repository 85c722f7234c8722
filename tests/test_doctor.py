"""What `capfilt doctor` and `--version` find, of installations that are whole, poor and broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capfilt.doctor import FINE, LACKING, WRONG, Diagnosis, Finding, diagnose
from tests.cli.conftest import capfilt


def found_by(diagnosis: Diagnosis) -> dict[tuple[str, str], Finding]:
    return {(finding.section, finding.name): finding for finding in diagnosis.findings}


def test_a_whole_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java there, and no driver's program
    monkeypatch.chdir(tmp_path)
    diagnosis = diagnose()
    found = found_by(diagnosis)
    assert (diagnosis.exit_code, [one for one in diagnosis.findings if one.state == WRONG]) == (0, [])
    assert found["packages", "torch"].found == importlib.metadata.version("torch")
    assert found["extras", "ray"].state == FINE
    assert (found["extras", "java"].state, "apt install" in found["extras", "java"].remedy) == (LACKING, True)
    assert str(len(os.sched_getaffinity(0))) in found["devices", "cpu"].found
    assert found["models", "embedded captioner"].state == FINE
    assert "capfilt" in found["models", "Salesforce/blip-image-captioning-large"].found
    assert ("models", "timm/vit_large_patch14_clip_224.openai") in found, "open_clip's own name for ViT-L-14 / openai"
    assert found["disk", "here"].found.startswith(str(tmp_path))
    declared = set(importlib.metadata.metadata("capfilt").get_all("Provides-Extra") or ()) - {"dev"}
    assert {name for section, name in found if section == "extras"} == {*declared, "java"}


def test_a_cached_model_is_found_and_offline_says_how_to_get_the_others(tmp_path: Path) -> None:
    name = "Salesforce/blip-itm-large-coco"
    repo = tmp_path / "hub" / "models--Salesforce--blip-itm-large-coco"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repo / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    done = run_doctor(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0
    found = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    assert (found[name]["state"], str(tmp_path) in found[name]["found"]) == (FINE, True)
    assert "HF_HUB_OFFLINE is set" in found["network"]["found"]
    other = found["Salesforce/blip-image-captioning-large"]
    assert (other["state"], other["remedy"]) == (LACKING, f"With a network, `hf download {other['name']}`.")


def test_a_broken_package_is_wrong_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    """As where torchvision is of another torch: open_clip does not import."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms is unknown")')
    done = run_doctor(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    found = json.loads(done.stdout)["findings"]
    wrong = [one for one in found if one["state"] == WRONG]
    assert [(one["section"], "torchvision::nms" in one["found"]) for one in wrong] == [("models", True)]
    assert "make install" in wrong[0]["remedy"]
    assert found[-1]["section"] == "disk"


def run_doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "capfilt", "doctor", "--json"]
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(root)]))
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment, "PYTHONPATH": path}, check=False
    )


def test_what_people_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    shown = capfilt("doctor")
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert {"python", "packages", "extras", "devices", "models", "disk"} <= set(lines)
    java = next(number for number, line in enumerate(lines) if line.split()[:2] == ["lacking", "java"])
    assert "Install a Java runtime" in lines[java + 1]
    assert lines[-1].startswith("All that every command needs is here; ")
    version = capfilt("--version").out.splitlines()
    assert version[0] == f"capfilt {importlib.metadata.version('capfilt')}"
    assert f"  torch {importlib.metadata.version('torch')}" in version
    assert not [line for line in version if "not installed" in line]
