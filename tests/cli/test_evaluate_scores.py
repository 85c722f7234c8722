"""`capfilt evaluate retrieval` and `capfilt evaluate filter` on small models, files and runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from capfilt.data.manifest import read_manifest
from tests import factories
from tests.cli.conftest import Models, capfilt
from tests.train import small_models

CAPTIONS = {
    0: ["a red dog", "two cats"],
    1: ["a tree near a house"],
    2: ["the sky is blue", "a small ring", "five stars"],
    3: ["an old woman"],
}


@pytest.fixture
def images_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in CAPTIONS:
        factories.draw_picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in CAPTIONS],
        "annotations": [
            {"image_id": number, "caption": caption} for number, own in CAPTIONS.items() for caption in own
        ],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    return path


def test_retrieval_of_a_coco_file(coco: Path, images_dir: Path, models: Models, tmp_path: Path) -> None:
    scores = tmp_path / "scores.parquet"
    command = ("evaluate", "retrieval", models.filter, "--references", coco, "--images", images_dir, "--device", "cpu")
    arguments = (*command, "--k-test", 3)
    done = capfilt(*arguments, "--save-scores", scores, "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert (found["num_images"], found["num_texts"], found["k_test"]) == (4, 7, 3)
    assert 12 <= found["num_itm_pairs"] <= 28
    rows = pq.read_table(scores).to_pylist()
    assert len(rows) == found["num_itm_pairs"]
    assert {row["text"] for row in rows} <= {text for own in CAPTIONS.values() for text in own}
    assert {row["image"] for row in rows} == {"0", "1", "2", "3"}

    done = capfilt(*arguments)
    assert done.code == 0, done.err
    assert "4 images, 7 texts; float32 on cpu" in done.out
    assert "R@10" in done.out
    lines = [line.split() for line in done.out.splitlines() if line.startswith("  ITC ")]
    assert len(lines[0]) == 8
    assert float(lines[0][-1]) == pytest.approx(found["itc"]["mean"], abs=0.05)
    assert "matching" in done.err

    done = capfilt(*command, "--k-test", 0, "--json")
    assert done.code == 0, done.err
    assert done.json()["itm"] is None
    assert done.json()["itc"] == found["itc"]


def test_retrieval_of_a_run(tmp_path: Path, models: Models) -> None:
    small_models.save_run(tmp_path / "run", [4, 3], drop_every=4)
    done = capfilt("evaluate", "retrieval", models.filter, "--references", tmp_path / "run", "--k-test", 4, "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert (found["num_images"], found["num_texts"], found["num_images_without_text"]) == (7, 12, 1)


def test_retrieval_that_cannot_be(coco: Path, images_dir: Path, models: Models, tmp_path: Path) -> None:
    command = ("evaluate", "retrieval", models.filter, "--references", coco)
    for arguments, message in (
        ((), "Give their folder: --images DIR"),
        (("--images", images_dir, "--k-test", 0, "--save-scores", tmp_path / "s"), "--k-test 0 has none"),
        (("--images", images_dir, "--save-scores", coco), "it would be lost"),
        (("--images", images_dir, "--save-scores", tmp_path / "no" / "s"), "no is no folder"),
        (("--images", images_dir, "--dtype", "float64"), "dtype is 'float64'"),
        (("--images", images_dir, "--first-token", "dec"), "first_token is 'dec'"),
    ):
        done = capfilt(*command, *arguments)
        assert (done.code, message in done.err) == (2, True), done.err
    (images_dir / "3.png").unlink()
    done = capfilt(*command, "--images", images_dir)
    assert done.code == 2
    assert "1 image of 4 cannot be found" in done.err


def test_filter_with_labels_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small_models.save_run(run, [6])
    rows = read_manifest([run]).to_pylist()
    labels = tmp_path / "labels.csv"
    with open(labels, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "caption_index", "label"])
        writer.writerows([row["key"], row["caption_index"], int(n % 4 > 0)] for n, row in enumerate(rows))
    done = capfilt("evaluate", "filter", run, "--labels", labels, "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert list(found["figures"]) == ["all", "synthetic"]
    figures = found["figures"]["all"]
    assert (figures["num_pairs"], figures["num_true"], figures["auc"]) == (12, 9, 0.5)  # every score is 0.9
    assert figures["at_threshold"]["precision"] == 0.75
    assert figures["calibration"]["expected_error"] == pytest.approx(0.15, abs=1e-6)
    done = capfilt("evaluate", "filter", run, "--labels", labels, "--threshold", 0.95)
    assert done.code == 0, done.err
    assert "kept: a score of at least 0.95" in done.out
    assert "precision 0.95: no threshold reaches it" in done.out
    assert f"Next: capfilt select {run}" in done.err

    with open(labels, "a", newline="") as file:
        csv.writer(file).writerow(["7", 0, 1])
    done = capfilt("evaluate", "filter", run, "--labels", labels)
    assert (done.code, "1 of 13 labels belong to no pair" in done.err) == (2, True)
    assert "key '7', caption 0" in done.err
    done = capfilt("evaluate", "filter", run, "--labels", labels, "--allow-unjoined")
    assert done.code == 0, done.err
    assert "left out: 1 label of pairs that are not there" in done.out
    done = capfilt("evaluate", "filter", run, "--labels", labels, "--allow-unjoined", "--score", "clip")
    assert (done.code, "None of the labelled pairs has a clip score" in done.err) == (2, True)


@pytest.mark.parametrize("score", ["itm", "clip"])
def test_filter_of_a_model_with_pairs(score: str, images_dir: Path, models: Models) -> None:
    pairs = images_dir / "pairs.jsonl"
    rows = [
        {"image": f"{(number + shift) % 4}.png", "text": text, "label": int(not shift), "source": "web"}
        for number, own in CAPTIONS.items()
        for text in own
        for shift in (0, 1)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = models.filter if score == "itm" else models.clip
    done = capfilt("evaluate", "filter", model, "--pairs", pairs, "--score", score, "--json")
    assert done.code == 0, done.err
    figures = done.json()["figures"]["all"]
    assert (figures["num_pairs"], figures["num_true"]) == (14, 7)
    assert (figures["calibration"] is None) == (figures["at_threshold"] is None) == (score == "clip")
    done = capfilt("evaluate", "filter", model, "--pairs", pairs, "--score", score)
    assert done.code == 0, done.err
    assert ("Calibration" in done.out) == (score == "itm")
    assert "best F1" in done.out


def test_filter_with_experts_judgments(images_dir: Path, models: Models, tmp_path: Path) -> None:
    tokens, judgments = tmp_path / "Flickr8k.token.txt", tmp_path / "ExpertAnnotations.txt"
    tokens.write_text(
        "".join(f"{number}.png#{n}\t{text}\n" for number, own in CAPTIONS.items() for n, text in enumerate(own))
    )
    judgments.write_text(
        "0.png\t0.png#0\t4\t4\t3\n0.png\t2.png#1\t1\t1\t2\n1.png\t3.png#0\t2\t3\t3\n2.png\t0.png#1\t1\t1\t1\n"
    )
    command = ("evaluate", "filter", models.filter, "--judgments", judgments)
    done = capfilt(*command, "--captions", tokens, "--images", images_dir, "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert found["figures"]["all"]["num_true"] == 1
    assert (found["judgments"]["all"]["num_rows"], found["judgments"]["num_own_captions"]) == (12, 1)
    done = capfilt(*command, "--captions", tokens, "--images", images_dir)
    assert "tau-c" in done.out
    done = capfilt(*command)
    assert (done.code, "Add --captions TOKENFILE --images DIR" in done.err) == (2, True)


def test_filter_wants_one_thing_to_measure_against(tmp_path: Path) -> None:
    done = capfilt("evaluate", "filter", tmp_path)
    assert (done.code, "nothing to measure against; expected one of --labels" in done.err) == (2, True)
    done = capfilt("evaluate", "filter", tmp_path, "--world", "--pairs", "x")
    assert (done.code, "Given: --world, --pairs" in done.err) == (2, True)
    done = capfilt("evaluate", "filter", tmp_path, "--world", "--images", "x")
    assert (done.code, "--images does nothing with --world" in done.err) == (2, True)
    done = capfilt("evaluate", "filter", tmp_path, "--world", "--dtype", "float32", "--first-token", "cls")
    assert (done.code, "--dtype, --first-token do nothing with --world" in done.err) == (2, True)
