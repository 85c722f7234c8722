"""`examples/bootstrapping.py`: a rehearsal from the site to the tables, then again; and what the tables say."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.weights.find import EMBEDDED_DIR, EMBEDDED_FOLDERS

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "bootstrapping.py"

needs_embedded = pytest.mark.skipif(
    not all((EMBEDDED_DIR / folder).is_dir() for folder in EMBEDDED_FOLDERS.values()),
    reason="the embedded models are not built (make assets)",
)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bootstrapping", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module, num_threads = importlib.util.module_from_spec(spec), torch.get_num_threads()
    sys.modules["bootstrapping"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bootstrapping"]
    torch.set_num_threads(num_threads)


@pytest.mark.slow
@pytest.mark.network
@needs_embedded
def test_rehearsal_then_again(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    smoke = ["--smoke", "--run", str(run), "--only"]
    assert script.main([*smoke, "none,both"]) == 0
    first = json.loads((run / "bootstrapping.json").read_text())
    data, models = first["data"], first["as pre-trained"]["models"]
    assert list(models) == ["none", "both"]
    for figures in models.values():
        for figure in figures.values():
            assert set(figure["seeds"]) == {"0", "1"}
            assert figure["mean"] == pytest.approx(sum(figure["seeds"].values()) / 2)
            assert figure["spread"] is not None
    figures = set(models["none"])
    assert {f"{way} R@1, {by}" for by in ("ITC", "ITM") for way in ("image to text", "text to image")} < figures
    assert {"captions true", "ITM AUC, one changed fact"} < figures
    assert first["as pre-trained"]["order"] == {}, "no pair of the paper was trained"

    assert data["none"]["pairs true"] == pytest.approx(data["none"]["web captions true"], abs=0.05)  # empty ones apart
    assert data["filter"]["pairs true"] > data["none"]["pairs true"] + 0.2
    assert data["both"]["pairs true"] > data["captioner"]["pairs true"] > data["none"]["pairs true"]
    assert data["none"]["synthetic pairs"] == data["filter"]["synthetic pairs"] == 0
    assert data["both"]["web pairs"] == data["filter"]["web pairs"] < data["captioner"]["web pairs"]
    assert data["beam"]["web pairs"] == data["both"]["web pairs"]
    assert data["both"]["synthetic captions true"] > 0.8
    assert verify_run(RunDir.open(run), deep=True).exit_code == 0
    for name, chosen in script.DATA_SETS.items():
        kept = read_manifest([RunDir.open(run, name)], ["source", "itm_score"], kept_only=True)
        assert set(kept["source"].to_pylist()) == set(chosen.sources)
        assert min(kept["itm_score"].to_pylist()) >= chosen.threshold

    trained = {path: path.stat().st_mtime_ns for path in run.glob("models/*/*/training.json")}
    assert len(trained) == 4
    capsys.readouterr()
    assert script.main([*smoke, "both,beam", "--seeds", "1", "--fine-tune"]) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained, "what is done is not done again"
    again = json.loads((run / "bootstrapping.json").read_text())
    assert again["as pre-trained"]["models"]["both"]["captions true"]["seeds"] == {
        "0": models["both"]["captions true"]["seeds"]["0"]
    }
    assert list(again["fine-tuned"]["models"]) == ["both", "beam"]
    assert again["fine-tuned"]["order"]["CIDEr"]["beam < both"]["seeds"] == 1
    shown = capsys.readouterr().out
    assert "Nothing to download" in shown
    assert shown.rstrip().endswith((run / "bootstrapping.md").read_text().rstrip()[-200:])
    assert "## fine-tuned" in shown


def test_an_unknown_data_set_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--only", "none,all"])
    assert "--only: all; expected some of none, filter, captioner, both, beam" in capsys.readouterr().err


def test_the_order_is_told_as_it_is(script: ModuleType) -> None:
    def of_seeds(*values: float) -> dict[int, dict[str, float]]:
        return {seed: {"R": value} for seed, value in enumerate(values)}

    as_expected = {
        "none": of_seeds(0.1, 0.2), "filter": of_seeds(0.3, 0.3), "captioner": of_seeds(0.4, 0.4),
        "both": of_seeds(0.5, 0.6), "beam": of_seeds(0.4, 0.7),
    }  # fmt: skip
    *table1, table2 = script.compare(as_expected)["R"].values()
    assert [gain["gain"] for gain in table1] == pytest.approx([0.15, 0.1, 0.15])
    assert script.verdict(table1) == "holds in every seed"
    assert (table2["seeds_with_gain"], table2["seeds"]) == (1, 2)
    assert script.verdict([table2]) == "does not hold", "the mean gain is nothing"
    *table1, _ = script.compare(as_expected | {"captioner": of_seeds(0.2, 0.5)})["R"].values()
    assert script.verdict(table1) == "holds in the mean"
    *table1, _ = script.compare(as_expected | {"filter": of_seeds(0.5, 0.5)})["R"].values()
    assert script.verdict(table1) == "does not hold"

    summary = script.summarise(as_expected)["none"]["R"]
    assert summary["mean"] == pytest.approx(0.15)
    assert summary["spread"] == pytest.approx(0.05 * 2**0.5)
    partly = {"none": of_seeds(0.1), "both": of_seeds(0.5, 0.6), "beam": of_seeds(0.4, 0.5, 0.9)}
    assert list(script.compare(partly)["R"]) == ["beam < both"]
    lines = "\n".join(script.result_lines({"as pre-trained": partly}))
    assert "| none | 1 | 10.0 |" in lines
    assert "| both | 2 | 55.0 ± 7.1 |" in lines
    assert "| R | – | – | – | +10.0 (2 of 2) | – | holds in every seed |" in lines
