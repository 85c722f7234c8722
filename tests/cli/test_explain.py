"""`capfilt explain`: pictures and figures from the command line, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capfilt.curation.scorers import ItmScorer
from capfilt.settings import FilterSettings
from capfilt.world.scenes import draw_scene, render
from tests import factories
from tests.cli.conftest import Models, capfilt, capfilt_process


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture of the world (a white heart left of a blue cross, on cloth) in an own working directory."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(render(draw_scene(9, "test"), 200, 120)).save("scene.png")
    return Path("scene.png")


TEXT = "a white heart left of a blue cross"


def test_a_text_is_explained(scene: Path) -> None:
    done = capfilt("explain", "embedded", scene, TEXT, "--device", "cpu")
    assert done.code == 0, done.err
    probability, strongest, drawn = done.out.splitlines()
    assert probability.endswith(f"  {TEXT}")
    scorer = ItmScorer(FilterSettings(filter_model="embedded", device="cpu", dtype="float32"))
    with Image.open(scene) as picture:
        (expected,) = scorer.score([scorer.prepare(picture.convert("RGB"))], [[TEXT]])
    shown = float(probability.removeprefix("match probability ").split()[0])
    assert shown == pytest.approx(expected[0], abs=0.01)
    assert strongest.startswith("strongest words: ")
    assert strongest.count("%") == 5
    assert drawn == "explain-scene.png: the average and 8 words, layer 1"
    with Image.open("explain-scene.png") as sheet:
        assert sheet.width > 3 * 200
        assert sheet.height > 3 * 120
    again = capfilt("explain", "embedded", scene, TEXT, "--device", "cpu")
    assert again.code == 0, "its own drawing may be drawn again"
    Image.new("RGB", (9, 9)).save("holiday.png")
    refused = capfilt("explain", "embedded", scene, TEXT, "--output", "holiday.png")
    assert (refused.code, "was not drawn by capfilt" in refused.err) == (2, True)


def test_json_holds_the_raw_maps(scene: Path) -> None:
    texts = [TEXT, "a red ball"]
    options = ("--output", "out.png", "--layer", 0, "--image-size", 96, "--device", "cpu", "--json")
    done = capfilt("explain", "embedded", scene, *texts, *options)
    assert done.code == 0, done.err
    found = done.json()
    assert (found["kind"], found["layer"], found["layers"], found["image_size_px"]) == ("filter", 0, [0, 1], 96)
    assert [one["text"] for one in found["texts"]] == texts
    assert [one["output"] for one in found["texts"]] == ["out-1.png", "out-2.png"]
    assert all(Path(one["output"]).stat().st_size for one in found["texts"])
    first = found["texts"][0]
    assert [word["word"] for word in first["words"]] == TEXT.split()
    maps = np.array([word["map"] for word in first["words"]])
    assert maps.shape == (8, 12, 12)
    np.testing.assert_allclose(np.array(first["average"]), maps.mean(axis=0), rtol=1e-4, atol=1e-9)
    assert sum(word["share"] for word in first["words"]) == pytest.approx(1)


def test_a_captioner_is_explained(scene: Path) -> None:
    done = capfilt("explain", "embedded-captioner", scene, TEXT, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert found["kind"] == "captioner"
    words = found["texts"][0]["words"]
    assert all(0 <= word["probability"] <= 1 for word in words)
    assert capfilt("explain", "embedded-captioner", scene, TEXT).out.startswith("probability per token 0.")


def test_folders_and_long_texts(models: Models, scene: Path) -> None:
    done = capfilt("explain", models.filter, scene, "dog " * 40, "--device", "cpu")
    assert done.code == 0, done.err
    assert "The model reads 35 tokens at most; not read: dog dog dog dog dog dog dog" in done.err
    assert "33 words" in done.out


def test_hostile_texts(models: Models, scene: Path) -> None:
    hostile = "\x1b]0;owned\x07dog \u202e$x^{$ [SEP] %s {} 汉字 <script>cat</script>"
    done = capfilt("explain", models.filter, scene, hostile, "--device", "cpu")
    assert done.code == 0, done.err
    assert not set("\x1b\x07\u202e") & set(done.out + done.err)
    assert Path("explain-scene.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("embedded", "scene.png", "!!"), "holds no words that the model could read"),
        (("embedded", "scene.png", "a ball", "--layer", 2), "--layer is 2, counted from 0 to 2"),
        (("embedded", "scene.png", "a ball", "--image-size", 100), "expected a multiple of 8"),
        (("embedded", "text.png", "a ball"), "text.png cannot be used"),
        (("embedded", "nowhere.png", "a ball"), "No such file or directory"),
        (("embedded-opt", "scene.png", "a ball"), "holds OPTForCausalLM; expected one of"),
        (("nowhere", "scene.png", "a ball"), "There is no model to explain nowhere"),
        (("embedded", "scene.png", "a ball", "--output", "map.jpg"), "expected a name that ends in .png"),
        (("embedded", "scene.png", "a ball", "--output", "no/map.png"), "There is no folder no"),
        (("embedded", "scene.png", "a ball", "--output", "scene.png"), "is the picture itself"),
        (("embedded", "scene.png", "a ball", "--output", "folder.png"), "is a folder"),
        (("embedded", "scene.png", "a ball", "--device", "abacus"), "device is 'abacus'"),
    ],
)
def test_what_cannot_be_explained(scene: Path, arguments: tuple[object, ...], message: str) -> None:
    Path("text.png").write_text("no picture")
    Path("folder.png").mkdir()
    before = scene.read_bytes()
    done = capfilt("explain", *arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert scene.read_bytes() == before
    assert sorted(path.name for path in Path().glob("*.png")) == ["folder.png", "scene.png", "text.png"]


def test_the_command_as_a_process_needs_no_display(scene: Path) -> None:
    process = capfilt_process("explain", "embedded", scene, TEXT, "--device", "cpu", DISPLAY="", MPLBACKEND="TkAgg")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "strongest words" in out
    assert "Traceback" not in err


def test_a_photograph_keeps_its_resolution(models: Models, scene: Path) -> None:
    factories.draw_picture(1, width_px=900, height_px=500).save("large.jpg")
    done = capfilt("explain", models.filter, "large.jpg", "a dog", "--device", "cpu")
    assert done.code == 0, done.err
    with Image.open("explain-large.png") as sheet:
        assert 1800 < sheet.width < 1900
        assert 1000 < sheet.height < 1200
