"""Folders of an export: all of what is kept, the sizes asked for, whole or not there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import read_sealed, sealed_bytes
from capfilt.export.folders import FOLDERS, export_folder
from capfilt.settings.export import DEFAULT_CAPTIONS, FOLDER_FORMATS, UNCUT_FORMATS, ExportSettings
from tests.cli.conftest import capfilt
from tests.data import conftest as small
from tests.export.runs import kept_of, make_scored_run, pictures_of
from tests.hostile_texts import FORMULAS, PAYLOADS, TRICKS

CURATED = ("curated", "curated@strict")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_imported_again_it_is_the_same(run: RunDir, tmp_path: Path) -> None:
    """Through the command that takes tars of others: pictures, best captions; with --human all captions."""
    assert capfilt("export", run.path, "-o", tmp_path / "tars", "--format", "webdataset").code == 0
    for name, options in (("web", []), ("human", ["--human"])):
        done = capfilt("import", tmp_path / "tars" / "*.tar", tmp_path / name, *options)
        assert done.code == 0, done.err
    kept, pictures = kept_of(run), pictures_of(run)
    again = RunDir.open(tmp_path / "web")
    assert pictures_of(again) == {key: pictures[key] for key in kept}
    from capfilt.data.shards import read_samples

    found = {sample.key: sample for sample in read_samples(again, "00000")}
    assert {key: sample.web_caption for key, sample in found.items()} == {
        key: rows[0]["text"] for key, rows in kept.items()
    }
    assert {sample.url for sample in found.values()} == {f"http://x/{key}" for key in kept}
    human = read_manifest([tmp_path / "human"], kept_only=True).to_pylist()
    assert [(row["key"], row["text"]) for row in human] == [
        (key, row["text"]) for key, rows in kept.items() for row in rows
    ]


def test_settings_and_writers_know_the_same_formats() -> None:
    assert list(FOLDERS) == list(FOLDER_FORMATS)
    assert {*UNCUT_FORMATS, *DEFAULT_CAPTIONS} <= set(FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_same_run_gives_the_same_bytes(run: RunDir, tmp_path: Path, name: str) -> None:
    for place in ("one", "two"):
        export_folder(run, tmp_path / place, name, ExportSettings(samples_per_shard=5))
    files = files_of(tmp_path / "one")
    assert files == files_of(tmp_path / "two")
    about = json.loads(files["export.json"])
    assert (about["format"], about["num_images"]) == (name, len(kept_of(run)))
    assert {entry["name"] for entry in about["files"]} <= set(files)
    assert sum(entry["num_samples"] for entry in about["files"]) == about["num_samples"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_each_caption_with_its_image(run: RunDir, tmp_path: Path, name: str) -> None:
    summary = export_folder(run, tmp_path / "all", name, ExportSettings(captions="each"))
    kept = kept_of(run)
    assert summary.num_images == len(kept)
    assert summary.num_samples == sum(map(len, kept.values()))
    if name == "webdataset":
        with tarfile.open(tmp_path / "all" / "00000.tar") as tar:
            texts = {name: tar.extractfile(name).read().decode() for name in tar.getnames() if name.endswith(".txt")}
        expected = {f"{key}={n}.txt": row["text"] for key, rows in kept.items() for n, row in enumerate(rows)}
        assert texts == expected


def test_shards_of_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By samples and by bytes, whichever is reached first; in RUN/curated, which no other command minds."""
    draw = small.encoded_image
    monkeypatch.setattr(small, "encoded_image", lambda seed, _ext: draw(seed, "png", (400, 320)))
    run = make_scored_run(tmp_path / "run", num_shards=2, num_samples=7)
    assert 334_000 < min(map(len, pictures_of(run).values())) < 499_000, "two are in a megabyte, three are not"
    for options, sizes in (
        (["--samples-per-shard", 5], [5, 5, 2]), (["--shard-mb", 1], [2] * 6), (["--samples-per-shard", 1], [1] * 12),
    ):  # fmt: skip
        done = capfilt("export", run.path, "--overwrite", *options)
        assert done.code == 0, done.err
        found = json.loads((run.path / "curated" / "sizes.json").read_text())
        assert list(found.values()) == sizes
        assert list(found) == [f"{number:05d}.tar" for number in range(len(sizes))]
        index = json.loads((run.path / "curated" / "shardindex.json").read_text())["shardlist"]
        assert [entry["filesize"] for entry in index] == [
            (run.path / "curated" / name).stat().st_size for name in found
        ]
    assert RunDir.open(run.path).generations() == []


DIE = """
import os, signal, sys
from pathlib import Path
from capfilt.data.rundir import RunDir
from capfilt.export import folders
folders.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
folders.export_folder(RunDir.open(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


def test_killed_before_its_end_it_is_not_there(run: RunDir, tmp_path: Path) -> None:
    place = tmp_path / "tars"
    dead = subprocess.run([sys.executable, "-c", DIE, str(run.path), str(place), "webdataset"], timeout=100)
    assert dead.returncode == -signal.SIGKILL
    left = list((tmp_path / ".tars.staging").rglob("*.tar"))
    assert (place.exists(), len(left)) == (False, 1)
    assert capfilt("export", run.path, "-o", place, "--format", "webdataset").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tars"]


DIE_AT_RENAME = """
import os, signal, sys
from pathlib import Path
from capfilt.data.rundir import RunDir
from capfilt.export.folders import export_folder
rename, left = os.rename, [int(sys.argv[3])]
def dying(*paths):
    left[0] -= 1
    return rename(*paths) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
os.rename = dying
export_folder(RunDir.open(sys.argv[1]), Path(sys.argv[2]), "coco", overwrite=True)
"""


@pytest.mark.parametrize("number", [1, 2])
def test_killed_while_it_replaces_it_is_the_old_one_or_none(run: RunDir, tmp_path: Path, number: int) -> None:
    place = tmp_path / "here"
    export_folder(run, place, "webdataset")
    before = files_of(place)
    words = [str(run.path), str(place), str(number)]
    assert subprocess.run([sys.executable, "-c", DIE_AT_RENAME, *words], timeout=100).returncode == -signal.SIGKILL
    assert (files_of(place) == before) if number == 1 else not place.exists()
    export_folder(run, place, "coco", overwrite=True)
    assert json.loads((place / "export.json").read_text())["format"] == "coco"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_generation_has_its_own(run: RunDir, tmp_path: Path) -> None:
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    strict = RunDir.open(path, "strict")
    for shard in run.shard_names():
        table, record, _ = read_sealed(run.stage_file("manifest", shard))
        rows = [row | {"kept": row["kept"] and row["source"] == "web"} for row in table.to_pylist()]
        strict.stage_file("manifest", shard).parent.mkdir(exist_ok=True)
        changed = sealed_bytes(pa.Table.from_pylist(rows, schema=table.schema), record)
        strict.stage_file("manifest", shard).write_bytes(changed)
    for options in ([], ["--generation", "strict"]):
        assert capfilt("export", path, *options).code == 0
    keys = {name: set(pq.read_table(path / name / "00000.parquet")["key"].to_pylist()) for name in CURATED}
    assert keys["curated"] == set(kept_of(run))
    webs = {key for key, rows in kept_of(run).items() if any(row["source"] == "web" for row in rows)}
    assert keys["curated@strict"] == webs < keys["curated"]


FILL = """
import resource, sys
from capfilt.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv[0] = "capfilt"
main()
"""


@pytest.mark.parametrize("name", FOLDERS)
def test_where_no_more_can_be_written_nothing_is_left(run: RunDir, tmp_path: Path, name: str) -> None:
    if name in UNCUT_FORMATS:
        run = make_scored_run(tmp_path / "run", change=lambda row: {"text": "long " * 300})
    words = ["export", str(run.path), "-o", str(tmp_path / "out" / "x"), "--format", name]
    (tmp_path / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", FILL, *words], timeout=100, capture_output=True, text=True)
    assert (done.returncode, "File too large" in done.stderr) == (1, True), done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_texts_of_any_kind_are_written_as_they_are(tmp_path: Path) -> None:
    texts = [text for text in [*TRICKS.values(), *PAYLOADS, *FORMULAS] if text]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    given = iter(texts)
    run = make_scored_run(tmp_path / "run", num_samples=30, change=lambda row: {"text": next(given, "the end")})
    kept, found = {key: rows[0]["text"] for key, rows in kept_of(run).items()}, {}
    assert next(given, None) is None, "all of them are captions"
    for name in FOLDERS:
        export_folder(run, tmp_path / name, name, ExportSettings(captions="best"))
    with tarfile.open(tmp_path / "webdataset" / "00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    found["txt"] = {name[:-4]: value.decode() for name, value in members.items() if name.endswith(".txt")}
    found["json"] = {
        name[:-5]: json.loads(value)["caption"] for name, value in members.items() if name.endswith("json")
    }
    for name, column in (("datasets/data/train-00000", "text"), ("img2dataset/00000", "caption")):
        table = pq.read_table(tmp_path / f"{name}.parquet")
        found[name] = dict(zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True))
    llava = json.loads((tmp_path / "llava" / "llava.json").read_text(encoding="utf-8"))
    found["llava"] = {entry["id"]: entry["conversations"][1]["value"] for entry in llava}
    coco = json.loads((tmp_path / "coco" / "annotations.json").read_text(encoding="utf-8"))
    keys = {image["id"]: image["key"] for image in coco["images"]}
    found["coco"] = {keys[entry["image_id"]]: entry["caption"] for entry in coco["annotations"]}
    for name, captions in found.items():
        assert captions == kept, name


def test_a_damaged_shard_gives_nothing(tmp_path: Path) -> None:
    """The last byte that matters is the tar's: what it vouches for is known at its end."""
    run = make_scored_run(tmp_path / "run")
    tar = run.tar_path("00001")
    data = bytearray(tar.read_bytes())
    data[-3000] ^= 1  # of metadata, which no export reads
    tar.write_bytes(data)
    (tmp_path / "tars").mkdir()
    done = capfilt("export", run.path, "-o", tmp_path / "tars", "--format", "webdataset")
    assert (done.code, "00001.tar is damaged" in done.err) == (5, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tars"]
    assert not list((tmp_path / "tars").iterdir())


def test_a_pair_without_its_picture_is_damage(tmp_path: Path) -> None:
    run = make_scored_run(tmp_path / "run", change=lambda row: {"key": "\x1b[31mgone"} if row["key"][-1] == "1" else {})
    done = capfilt("export", run.path, "-o", tmp_path / "x", "--format", "coco")
    assert (done.code, "lacks 1 samples of its manifest" in done.err) == (5, True), done.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_only_an_export_is_replaced(run: RunDir, tmp_path: Path) -> None:
    place = tmp_path / "here"
    export = ("export", run.path, "-o", place, "--format")
    assert capfilt(*export, "webdataset").code == 0
    done = capfilt(*export, "coco")
    assert (done.code, "give --overwrite" in done.err) == (2, True)
    assert (place / "00000.tar").exists()
    assert capfilt(*export, "coco", "--overwrite").code == 0
    assert sorted(path.name for path in place.iterdir()) == ["annotations.json", "export.json", "images"]
    (place / "export.json").rename(place / "mine.json")
    before = files_of(place)
    done = capfilt(*export, "webdataset", "--overwrite")
    assert (done.code, "holds other files" in done.err) == (2, True)
    assert files_of(place) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "x.json"), "may be LLaVA's or COCO's"),
        (("-o", "x"), "tells no format; expected one of .csv, .jsonl, .parquet, or a folder and --format webdataset"),
        (("-o", "x.tar"), "webdataset is a folder of them"),
        (("-o", "x", "--format", "tfrecord"), "expected one of csv, jsonl, parquet, webdataset"),
        (("-o", "x.json", "--format", "coco"), "Name a folder"),
        (("--format", "csv"), "Name it: --output FILE.csv"),
        (("-o", "x", "--format", "llava", "--shard-mb", "3"), "--shard-mb does nothing with llava"),
        (("-o", "x", "--format", "coco", "--dropped"), "--dropped does nothing with coco"),
        (("-o", "x", "--format", "coco", "--captions", "worst"), "expected one of best, each"),
        (("-o", "x.csv", "--captions", "each"), "--captions does nothing with a csv file"),
        (("-o", "x", "--format", "webdataset", "--engine", "ray"), "--engine does nothing with webdataset"),
        (("-o", "x.parquet", "--engine", "ray"), "--engine does nothing with parquet"),
        (("-o", "nowhere/x", "--format", "coco"), "There is no directory nowhere"),
        (("-o", "s3://bucket/x", "--format", "coco"), "is written to a disk of this machine"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = capfilt("export", run.path, *options)
    assert (done.code, message in done.err) == (2, True), done.err
    assert not list(tmp_path.iterdir())


def test_nothing_kept_is_nothing_written(tmp_path: Path) -> None:
    run = make_scored_run(tmp_path / "run", change=lambda row: {"kept": False, "drop_reason": "low_itm"})
    for name in FOLDERS:
        done = capfilt("export", run.path, "-o", tmp_path / "x", "--format", name)
        assert (done.code, "No kept pair" in done.err) == (2, True), done.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_best_caption_where_scores_lack(tmp_path: Path) -> None:
    """Captions of people, which nobody judged, stand as they came; one that was judged stands before them."""
    run = make_scored_run(tmp_path / "run", change=lambda row: {"itm_score": None, "clip_score": None})
    export_folder(run, tmp_path / "coco", "coco")
    found = json.loads((tmp_path / "coco" / "annotations.json").read_text(encoding="utf-8"))["annotations"]
    assert [entry["caption"] for entry in found] == read_manifest([run], kept_only=True)["text"].to_pylist()
    half = make_scored_run(
        tmp_path / "half",
        change=lambda row: {"itm_score": None} if row["source"] == "synthetic" else {"itm_score": 0.1},
    )
    export_folder(half, tmp_path / "best", "coco", ExportSettings(captions="best"))
    found = json.loads((tmp_path / "best" / "annotations.json").read_text(encoding="utf-8"))["annotations"]
    webs = {row["key"] for row in read_manifest([half], kept_only=True).to_pylist() if row["source"] == "web"}
    assert Counter(entry["source"] for entry in found) == {"web": len(webs), "synthetic": len(kept_of(run)) - len(webs)}
