"""The demo, made small: every section is there, and a second run finds everything done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from capfilt import demo
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run


def test_demo_then_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NUM_URLS", 60)
    monkeypatch.setattr(demo, "NUM_UNSEEN", 20)
    monkeypatch.setattr(demo, "WORLD_SEED", 5)
    monkeypatch.setattr(demo, "STAGE1", replace(demo.STAGE1, max_steps=4, batch_size=8, log_every_steps=2))
    monkeypatch.setattr(demo, "STAGE2", replace(demo.STAGE2, max_steps=4, batch_size=8, log_every_steps=2))
    run = tmp_path / "demo"
    first = "\n".join(demo.run_demo(run))
    for heading in ("1. A web site", "2. What the run holds", "3. The same, against", "stage 1", "stage 2", "Measured"):
        assert heading in first
    figures = json.loads((run / "demo.json").read_text())["figures"]
    assert figures["curation"]["kept pairs true, after"] > figures["curation"]["web pairs true, before"]
    assert figures["curation"]["filter recall, web"] > 0.5
    assert set(figures) == {"curation", "stage 1", "stage 2"}
    assert verify_run(RunDir.open(run)).exit_code == 0

    second = "\n".join(demo.run_demo(run))
    assert "Nothing to download" in second
    assert "Nothing to do" in second
    assert second.count("(done before)") == 2
    assert json.loads((run / "demo.json").read_text())["figures"] == figures
