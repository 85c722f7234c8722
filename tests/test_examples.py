"""Scripts of examples/: what they print, write and refuse, from pictures, tars and runs to figures and models."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.verify import verify_run
from capfilt.recipes import read_recipe
from capfilt.settings import BlipTrainSettings, Stage1Settings
from capfilt.train.blip import train_blip, train_captioner, train_filter
from capfilt.train.stage1 import train_stage1
from capfilt.weights.find import EMBEDDED_DIR, EMBEDDED_FOLDERS
from capfilt.world.language import judge
from capfilt.world.scenes import draw_scene, render
from tests import factories
from tests.cli.conftest import capfilt
from tests.curation.test_import_shards import write_foreign
from tests.train import small_models

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

needs_embedded = pytest.mark.skipif(
    not all((EMBEDDED_DIR / folder).is_dir() for folder in EMBEDDED_FOLDERS.values()),
    reason="the embedded models are not built (make assets)",
)


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module, num_threads = importlib.util.module_from_spec(spec), torch.get_num_threads()
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with loaded("bootstrapping") as module:
        yield module


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


def write_tar(path: Path, seeds: range) -> None:
    members: list[tuple[str, bytes]] = []
    for seed in seeds:
        picture = io.BytesIO()
        factories.draw_photograph(seed).save(picture, "JPEG")
        captions = {"captions": [f"a red square {seed}", "a blue square left"]}
        members += [(f"{seed}.jpg", picture.getvalue()), (f"{seed}.json", json.dumps(captions).encode())]
    write_foreign(path, members)


def test_photographs_from_tars_to_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "train.tar", range(12))
    write_tar(tmp_path / "unseen.tar", range(100, 106))
    bert, run = small_models.save_bert(tmp_path / "bert"), tmp_path / "run"
    command = [str(tmp_path / "train.tar"), str(tmp_path / "unseen.tar"), "--text-init", str(bert), "--run", str(run)]
    with loaded("photographs") as script:
        assert script.main([*command, "--smoke", "--steps", "3", "--threads", "1"]) == 0
        found = json.loads((run / "photographs.json").read_text())
        assert found["steps"] == 3
        assert set(found["losses"]) == {"itc", "itm", "lm", "loss"}
        recalls = expected_recalls(run)
        assert {name: found[name] for name in recalls} == recalls
        assert found["ITM AUC"] in [wins / 72 for wins in range(73)], "6 x 6 comparisons, ties counted half"
        trained = (run / "blip" / "training.json").stat().st_mtime_ns
        assert script.main([*command, "--smoke", "--steps", "3", "--threads", "1"]) == 0
        assert (run / "blip" / "training.json").stat().st_mtime_ns == trained, "what is done is not done again"
        assert json.loads((run / "photographs.json").read_text()) == found
        assert script.main([*command, "--smoke", "--steps", "4", "--threads", "1"]) == 3
    assert "photographs:" in capsys.readouterr().err


def expected_recalls(run: Path) -> dict[str, float]:
    """Of the photographs to judge by, by the command."""
    done = capfilt(
        "evaluate", "retrieval", run / "blip" / "filter", "--references", run / "unseen", "--k-test", 6, "--json"
    )
    assert done.code == 0, done.err
    found = done.json()
    return {
        f"{way} R@{k}, {by}": found[by.lower()][way.replace(" ", "_")][str(k)]
        for way in ("image to text", "text to image") for k in (1, 5, 10) for by in ("ITC", "ITM")
    }  # fmt: skip


def test_the_world_s_trainings_are_measured_as_far_as_they_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_models.save_run(tmp_path / "pairs", [8])
    settings = BlipTrainSettings(
        tokenizer=str(small_models.save_bert(tmp_path / "bert")), image_size_px=16, patch_size_px=8, vision_width=16,
        vision_depth=1, text_width=16, text_depth=1, head_width=8, embed_dim=8, max_positions=64, max_steps=1,
        batch_size=4, queue_size=4,
    )  # fmt: skip
    train_blip([tmp_path / "pairs"], settings, tmp_path / "blip")
    run, tuning = tmp_path / "run", replace(settings, init=str(tmp_path / "blip"), tokenizer="")
    with loaded("measure_world") as script:
        assert script.main([str(run), "--threads", "1"]) == 1
        assert "no training is done" in capsys.readouterr().err
        train_captioner([tmp_path / "pairs"], tuning, run / "captioner")
        train_filter([tmp_path / "pairs"], tuning, run / "filter")
        assert script.main([str(run), "--unseen", "6", "--threads", "1"]) == 0
    found = json.loads((run / "figures.json").read_text())
    assert list(found) == ["captioner", "filter"]
    assert found["captioner"]["captions true"] == 0, "after one step"
    hits = 6 * found["filter"]["text to image R@1, ITM"]
    assert hits == pytest.approx(round(hits)), "of six scenes"
    assert "| filter | AUC against one changed fact |" in capsys.readouterr().out


@needs_embedded
def test_stage_2_is_measured_with_and_without_stage_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_models.save_run(tmp_path / "run", [66])
    with loaded("measure_world") as script:
        command = [str(run.path), "--curve", "1", "--unseen", "2", "--threads", "1"]
        assert script.main(command) == 2, "stage 1 is not there yet"
        assert "measure_world:" in capsys.readouterr().err
        recipe = read_recipe("world-stage1")
        settings = replace(recipe.trainings[0].settings, max_steps=1)
        assert isinstance(settings, Stage1Settings)
        train_stage1([run], settings, run.path / "stage1")
        assert script.main(command) == 0
    found = json.loads((run.path / "figures.json").read_text())
    assert list(found) == ["stage1", "stage2-alone-1", "stage2-opt-1"]
    assert found["stage2-alone-1"]["captions_true"] == 0, "after one step"


@needs_embedded
def test_pictures_are_captioned_ranked_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = [draw_scene(seed, "test") for seed in range(3)]
    for number, scene in enumerate(scenes):
        Image.fromarray(render(scene)).save(tmp_path / f"{number}.png")
    with loaded("pictures") as script:
        assert script.main([str(tmp_path / f"{number}.png") for number in range(3)]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [Path(line["picture"]).name for line in lines] == ["0.png", "1.png", "2.png"]
        for line in lines:
            texts = {caption["text"] for caption in line["captions"]}
            assert len(texts) == len(line["captions"]) == 2
            assert all(0 <= caption["itm_score"] <= 1 for caption in line["captions"])
        judged = [
            (judge(caption["text"], scene).is_true, caption["itm_score"])
            for line, scene in zip(lines, scenes, strict=True) for caption in line["captions"]
        ]  # fmt: skip
        assert sum(true for true, _ in judged) >= 4, "the embedded captioner writes mostly what is so"
        assert script.main([str(tmp_path / "none.png")]) == 1
    assert "none.png cannot be used" in capsys.readouterr().err


@needs_embedded
def test_transformers_trainer_trains_on_the_kept_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_models.save_run(tmp_path / "run", [20, 13])
    with loaded("trainer") as script:
        assert script.main([str(run.path), "--output", str(tmp_path / "model"), "--steps", "3"]) == 0
        assert "'epoch': '1'" in capsys.readouterr().out, "three steps of 16 are the whole of 33 pictures"
        assert script.main([str(tmp_path), "--output", str(tmp_path / "none")]) == 1
        assert "trainer:" in capsys.readouterr().err
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (EMBEDDED_DIR / EMBEDDED_FOLDERS["captioner"], tmp_path / "model")
    )
    changed = [name for name in before if not torch.equal(before[name].float(), after[name])]
    assert len(changed) > len(before) / 2
    assert all(torch.isfinite(weight).all() for weight in after.values())
