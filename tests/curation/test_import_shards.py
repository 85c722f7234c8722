"""Shards that a user already has become shards of a run: nothing lost, trusted or done twice."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from capfilt.curation.import_shards import import_shards
from capfilt.curation.tar_patterns import expand_braces, expand_patterns
from capfilt.data.commit import file_sha256, read_commit_record, read_quarantine, read_table
from capfilt.data.images import decode_image
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.data.verify import verify_run
from capfilt.errors import CapfiltError, FingerprintMismatchError, RunLockedError, UsageError
from capfilt.settings import DownloadSettings

DATA_DIR = Path(os.environ.get("CAPFILT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def picture(seed: int = 0, kind: str = "JPEG", size: tuple[int, int] = (30, 20)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_foreign(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1700000000.5  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run")


def quarantined(run: RunDir, shard: str = "00000") -> dict[str, str]:
    return {row["key"]: row["reason"] for row in read_quarantine(run, "shards", shard).to_pylist()}


def test_what_webdataset_and_img2dataset_write(tmp_path: Path, run: RunDir) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "000000001", "jpg": picture(1), "txt": "a first one"})
        metadata = {
            "url": "http://x/2",
            "caption": "from the JSON",
            "original_width": 99,
            "original_height": 66,
        }
        writer.write({"__key__": "000000002", "png": picture(2, "PNG"), "json": metadata})
        writer.write({"__key__": "train/n01", "webp": picture(3, "WEBP"), "json": {"captions": ["one", "two"]}})
        writer.write({"__key__": "000000004", "jpg": picture(4), "cls": 7})
    summary = import_shards([str(tmp_path / "a.tar")], run)
    assert (summary.num_tars, summary.num_new_tars, summary.num_samples, summary.failures) == (1, 1, 4, {})
    samples = list(read_samples(run, "00000"))
    assert [(s.key, s.web_caption, s.url) for s in samples] == [
        ("000000001", "a first one", ""),
        ("000000002", "from the JSON", "http://x/2"),
        ("train/n01", "one", ""),
        ("000000004", "", ""),
    ]
    assert samples[0].image == picture(1)
    row = read_table(run.stage_file("shards", "00000")).to_pylist()[1]
    assert (row["width"], row["height"], row["original_width"], row["original_height"]) == (30, 20, 99, 66)
    assert verify_run(run, deep=True).exit_code == 0


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files to the garbage collector
def test_our_shards_open_in_webdataset_and_keep_the_metadata(tmp_path: Path, run: RunDir) -> None:
    metadata = {"caption": "x ä", "license": "CC0", "tags": [1, None, {"a": True}]}
    write_foreign(tmp_path / "a.tar", [("k 1.jpg", picture()), ("k 1.json", json.dumps(metadata).encode())])
    import_shards([str(tmp_path / "a.tar")], run)
    (sample,) = list(webdataset.WebDataset(str(run.tar_path("00000")), shardshuffle=False).decode("rgb8"))
    gc.collect()
    assert sample["jpg"].shape == (20, 30, 3)
    assert (sample["txt"], sample["json"]["caption"]) == ("x ä", "x ä")
    assert sample["json"]["original"] == metadata
    assert sample["json"]["original_key"] == "k 1"


def test_the_same_command_twice_and_more_tars_later(tmp_path: Path, run: RunDir) -> None:
    for number in range(3):
        write_foreign(tmp_path / f"{number}.tar", [("a.jpg", picture(number)), ("a.txt", b"x")])
    import_shards([str(tmp_path / "{0..1}.tar")], run)
    before = {path: file_sha256(path) for path in run.path.glob("shards/*")}
    again = import_shards([str(tmp_path / "{0..1}.tar")], run)
    assert (again.num_new_tars, again.line()) == (0, "Nothing to import: 2 tars are there already.")
    more = import_shards([str(tmp_path / "*.tar")], run)
    assert (more.num_tars, more.num_new_tars) == (3, 1)
    assert run.shard_names() == ["00000", "00001", "00002"]
    assert {path: file_sha256(path) for path in before} == before
    (tmp_path / "0.tar").rename(tmp_path / "renamed.tar")
    os.utime(tmp_path / "1.tar", ns=(1, 1))
    assert import_shards([str(tmp_path / "*.tar")], run).num_new_tars == 0
    assert verify_run(run, deep=True).exit_code == 0


@pytest.mark.parametrize("also_the_tar", [True, False])
def test_a_damaged_shard_that_was_removed_comes_back_as_it_was(tmp_path: Path, run: RunDir, also_the_tar: bool) -> None:
    tars = [
        write_foreign(tmp_path / f"{name}.tar", [("1.jpg", picture(seed)), ("1.txt", name.encode())])
        for seed, name in enumerate("abcd")
    ]
    import_shards([str(tar) for tar in tars[:3]], run)
    rows, images = read_table(run.stage_file("shards", "00001")), run.tar_path("00001").read_bytes()
    run.stage_file("shards", "00001").unlink()
    if also_the_tar:
        run.tar_path("00001").unlink()
    else:
        run.tar_path("00001").write_bytes(images[:-700])
    assert verify_run(run).exit_code != 0
    summary = import_shards([str(tar) for tar in tars], run)
    assert summary.num_new_tars == 2
    assert read_table(run.stage_file("shards", "00001")) == rows
    assert run.tar_path("00001").read_bytes() == images
    assert run.shard_names() == ["00000", "00001", "00002", "00003"]
    report = verify_run(run, deep=True)
    assert (report.findings, report.unfinished) == ([], [])


def test_keys_are_kept_where_unique_and_stable_where_not(tmp_path: Path) -> None:
    write_foreign(tmp_path / "0.tar", [("a.jpg", picture(1)), ("b.jpg", picture(2)), ("ä ö.jpg", picture(3))])
    write_foreign(tmp_path / "1.tar", [("b.jpg", picture(4)), ("c.jpg", picture(5)), ("ä ö.jpg", picture(6))])
    keys = []
    for name in ("one", "two"):
        run = RunDir.create(tmp_path / name)
        import_shards([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")], run)
        keys.append([s.key for shard in run.shard_names() for s in read_samples(run, shard)])
        assert verify_run(run, deep=True).exit_code == 0
    assert keys[0] == keys[1]
    assert keys[0][:2] == ["a", "b"]
    assert keys[0][4] == "c"
    assert keys[0][3].startswith("b~")
    assert keys[0][2].startswith("sample~")
    assert len(set(keys[0])) == 6


def test_bad_samples_are_quarantined_and_the_rest_goes_on(tmp_path: Path, run: RunDir) -> None:
    good = picture()
    bomb = picture(size=(300, 300))
    members = [
        ("ok.jpg", good), ("ok.txt", b"\xef\xbb\xbffine \n"),
        ("cut.jpg", picture(size=(200, 200))[:900]), ("cut.txt", b"x"),
        ("page.jpg", b"<html>"), ("page.txt", b"x"),
        ("large.jpg", bomb),
        ("text.txt", b"no picture"),
        ("both.jpg", good), ("both.png", picture(kind="PNG")),
        ("latin.jpg", good), ("latin.txt", b"\xe4\xf6"),
        ("long.jpg", good), ("long.txt", b"x" * 9000),
        ("list.jpg", good), ("list.json", b'{"captions": [[1]]}'),
        ("broken.jpg", good), ("broken.json", b'{"caption": '),
        ("half.jpg", good), ("half.json", b'{"caption": "\\ud800"}'),
        ("spare.jpg", good), ("spare.json", b"[NaN"), ("spare.txt", b"the text is enough"),
        ("ok.jpg", good), ("ok.txt", b"the key again"),
        (".DS_Store", b"x"), ("README", b"x"), ("__MACOSX/._ok.jpg", b"x"),
        ("../up.jpg", good),
    ]  # fmt: skip
    write_foreign(tmp_path / "a.tar", members)
    settings = DownloadSettings(max_pixels=60_000)
    summary = import_shards([str(tmp_path / "a.tar")], run, settings)
    assert [(s.key, s.web_caption) for s in read_samples(run, "00000")] == [
        ("ok", "fine "),
        ("spare", "the text is enough"),
    ]
    found = quarantined(run)
    again = next(key for key in found if key.startswith("ok~"))
    up = next(key for key in found if key.startswith("sample~"))
    assert found == {
        "cut": "truncated_image", "page": "not_an_image", "large": "too_many_pixels", "text": "missing_image",
        "both": "several_images", "latin": "bad_caption", "long": "caption_too_long", "list": "bad_caption",
        "broken": "bad_caption", "half": "bad_caption", again: "duplicate_key", up: "bad_member",
    }  # fmt: skip
    record = read_commit_record(run.stage_file("shards", "00000"))
    assert (record.rows_in, record.rows_kept, record.rows_quarantined) == (14, 2, 12)
    assert summary.failures["bad_caption"] == 4
    assert verify_run(run, deep=True).exit_code == 0


def test_formats_that_our_shards_lack_become_png(tmp_path: Path, run: RunDir) -> None:
    kinds = ("GIF", "BMP", "TIFF", "AVIF")
    write_foreign(tmp_path / "a.tar", [(f"{kind}.{kind.lower()}", picture(1, kind)) for kind in kinds])
    import_shards([str(tmp_path / "a.tar")], run)
    samples = list(read_samples(run, "00000"))
    assert [sample.key for sample in samples] == list(kinds)
    for sample, kind in zip(samples, kinds, strict=True):
        assert sample.image.startswith(b"\x89PNG")
        assert decode_image(sample.image).tobytes() == decode_image(picture(1, kind)).tobytes()


@pytest.mark.parametrize("at", [0.3, 0.8])
def test_a_damaged_tar_gives_what_stands_before_the_damage(tmp_path: Path, run: RunDir, at: float) -> None:
    path = write_foreign(tmp_path / "a.tar", [(f"{n}.jpg", picture(n)) for n in range(10)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(tarfile_end(path) * at)])
    summary = import_shards([str(path)], run)
    assert 0 < summary.num_samples < 9
    assert summary.failures == {"damaged_tar": 1}
    path.write_bytes(whole)
    assert verify_run(run, deep=True).exit_code == 0
    with pytest.raises(UsageError, match="no longer what was imported as shard 00000"):
        import_shards([str(path)], run)
    assert import_shards([str(path)], RunDir.create(tmp_path / "new")).num_samples == 10


def tarfile_end(path: Path) -> int:
    with tarfile.open(path) as tar:
        return max(member.offset_data + member.size for member in tar)


def test_a_tar_that_is_none_is_quarantined(tmp_path: Path, run: RunDir) -> None:
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    write_foreign(tmp_path / "b.tar", [("a.jpg", picture())])
    summary = import_shards([str(tmp_path / "*.tar")], run)
    assert (summary.num_samples, summary.failures) == (1, {"damaged_tar": 1})
    (row,) = read_quarantine(run, "shards", "00000").to_pylist()
    assert "it is compressed; expand it first" in row["detail"]
    assert verify_run(run, deep=True).exit_code == 0


def test_other_limits_and_downloaded_shards_are_refused(
    tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_foreign(tmp_path / "a.tar", [("a.jpg", picture())])
    import_shards([str(tmp_path / "a.tar")], run)
    with pytest.raises(FingerprintMismatchError, match="max_pixels 50000000 -> 9"):
        import_shards([str(tmp_path / "a.tar")], run, DownloadSettings(max_pixels=9))
    monkeypatch.setattr("capfilt.curation.import_shards._MAKER", "other")
    with pytest.raises(UsageError, match="holds downloaded shards"):
        import_shards([str(tmp_path / "a.tar")], run)


def test_an_interrupted_import_goes_on(tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_foreign(tmp_path / f"{number}.tar", [("a.jpg", picture(number)), ("b.jpg", picture(9))])
    whole = RunDir.create(tmp_path / "whole")
    import_shards([str(tmp_path / "?.tar")], whole)
    calls = iter(range(100))
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if next(calls) == 3:  # the commit record of the second shard; its tar is in place
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(CapfiltError, match="No space left"):
            import_shards([str(tmp_path / "?.tar")], run)
    assert run.shard_names() == ["00000"]
    import_shards([str(tmp_path / "?.tar")], run)
    assert [file_sha256(run.tar_path(s)) for s in run.shard_names()] == [
        file_sha256(whole.tar_path(s)) for s in whole.shard_names()
    ]
    assert verify_run(run, deep=True).exit_code == 0


def test_progress_counts_bytes_once(tmp_path: Path, run: RunDir) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.total, self.done, self.ended = 0, 0, False

        def start(self, name: str, total: int | None, unit: str, /) -> None:
            assert (name, unit) == ("import", "MB")
            self.total = total or 0

        def advance(self, n: int = 1, /, *, already: bool = False, **fields: object) -> None:
            self.done += n

        def finish(self) -> None:
            self.ended = True

    write_foreign(tmp_path / "a.tar", [(f"{n}.jpg", picture(n, size=(1500, 1500))) for n in range(3)])
    write_foreign(tmp_path / "b.tar", [("small.jpg", picture(9))])
    for names, least in (("a.tar",), 2), (("a.tar", "b.tar"), 2), (("b.tar",), 1):
        recorder = Recorder()
        import_shards([str(tmp_path / name) for name in names], run, progress=recorder)
        assert recorder.ended
        assert recorder.total == recorder.done >= least


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("x{,y}.tar", ["x.tar", "xy.tar"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert list(expand_braces(pattern)) == names


def test_patterns_name_existing_local_files_once(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "[1].tar", "{x}.tar"):
        (tmp_path / name).touch()
    found = expand_patterns(
        [f"{tmp_path}/b.tar", f"{tmp_path}/[ab].tar", f"{tmp_path}/[1].tar", f"{tmp_path}/{{x}}.tar"]
    )
    assert [path.name for path in found] == ["b.tar", "a.tar", "[1].tar", "{x}.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.tar", "missing.tar is not there"),
        ("*.tar", r"\*.tar is not there"),
        ("pipe:touch canary", "is an address"),
        ("s3://bucket/{0..3}.tar", "is an address"),
        ("{0..9999999999}.tar", "more than 1,000,000"),
        ("{0..9999}{0..9999}.tar", "not there"),
        ("{}.tar", "neither a range"),
    ],
)
def test_patterns_that_name_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        expand_patterns([pattern])
    assert not list(tmp_path.iterdir())


def test_no_pattern(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No tars were named"):
        expand_patterns([])


def test_a_locked_run_is_not_touched(tmp_path: Path, run: RunDir) -> None:
    write_foreign(tmp_path / "a.tar", [("a.jpg", picture())])
    script = "import sys; from capfilt.data.rundir import RunDir\n"
    script += "with RunDir.open(sys.argv[1]).lock(): print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, str(run.path)], text=True, **pipes) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=f"process {holder.pid}"):
            import_shards([str(tmp_path / "a.tar")], run)
        holder.communicate()
    assert run.shard_names() == []


@pytest.mark.skipif(
    not (DATA_DIR / "flickr8k-dev-000.tar").exists(),
    reason="flickr8k-dev-000.tar is not here; name its folder in CAPFILT_SHARED_DATA",
)
def test_a_thousand_photographs(run: RunDir) -> None:
    summary = import_shards([str(DATA_DIR / "flickr8k-dev-000.tar")], run)
    assert (summary.num_samples, summary.failures) == (1000, {})
    samples = list(read_samples(run, "00000"))
    assert samples[0].key == "1022454332_6af2c1449a"
    assert all(sample.web_caption and (sample.width, sample.height) == (224, 224) for sample in samples)
