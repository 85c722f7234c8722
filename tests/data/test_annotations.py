"""Standard files of captioned images, written here in their published forms."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.curation.human_captions import write_human_manifest
from capfilt.curation.import_shards import import_shards
from capfilt.data.annotations import (
    CaptionedImage,
    read_captioned_images,
    read_coco,
    read_flickr8k,
    read_judgments,
    read_karpathy,
    read_run,
)
from capfilt.data.image_sources import ImageFile, find_image, join_name
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.errors import CorruptionError, UsageError
from tests.data.conftest import commit_captions, commit_clip, commit_itm, commit_manifest, commit_shard, encoded_image

COCO = {
    "info": {"year": 2014},
    "images": [
        {"id": 391895, "file_name": "COCO_val2014_000000391895.jpg", "license": 3, "height": 360, "width": 640},
        {"id": 522418, "file_name": "COCO_val2014_000000522418.jpg"},
        {"id": 7, "file_name": "COCO_val2014_000000000007.jpg"},
    ],
    "licenses": [],
    "annotations": [
        {"image_id": 522418, "id": 1, "caption": "A woman cutting a cake.\n"},
        {"image_id": 391895, "id": 2, "caption": "A man with a red helmet "},
        {"image_id": 391895, "id": 3, "caption": "Man riding a motor bike"},
        {"image_id": 7, "id": 4, "caption": " \n"},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "val2014", "filename": "a.jpg", "split": "test", "cocoid": 391895, "imgid": 0,
         "sentids": [1], "sentences": [{"tokens": ["a"], "raw": "A man.", "imgid": 0}, {"raw": "A bike"}]},
        {"filepath": "val2014", "filename": "b.jpg", "split": "restval", "cocoid": 2, "imgid": 1,
         "sentences": [{"raw": "b"}]},
        {"filename": "c.jpg", "split": "train", "imgid": 2, "sentences": []},
    ],
}  # fmt: skip


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_coco(tmp_path: Path) -> None:
    path = write(tmp_path / "captions.json", COCO)
    assert read_coco(path) == [
        CaptionedImage(391895, ("A man with a red helmet", "Man riding a motor bike")),
        CaptionedImage(522418, ("A woman cutting a cake.",)),
        CaptionedImage(7, ()),
    ]
    (tmp_path / "val2014").mkdir()
    first = read_captioned_images(path, tmp_path / "val2014")[0]
    assert first.image == ImageFile(tmp_path / "val2014" / "COCO_val2014_000000391895.jpg")


def test_coco_whose_annotations_come_first_or_are_not_published(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"annotations": COCO["annotations"], "images": COCO["images"]})
    assert read_coco(path) == read_coco(write(tmp_path / "b.json", COCO))
    without = read_coco(write(tmp_path / "c.json", {"images": COCO["images"]}))
    assert [image.captions for image in without] == [(), (), ()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": []}, "has no images"),
        ({"images": [*COCO["images"], {"id": "7", "file_name": "x"}]}, r"images\[3\] is a second image with the id 7"),
        ({"annotations": [{"image_id": 9, "caption": "x"}]}, r"annotations\[0\] is of image 9, which is not among"),
        ({"annotations": [{"image_id": 7, "caption": None}]}, r"annotations\[0\] has 'caption' None; expected a text"),
        ({"annotations": [{"image_id": 7.5, "caption": "x"}]}, r"has 'image_id' 7.5; expected a whole number"),
        ({"images": [{"id": 7}]}, r"images\[0\] has no 'file_name'; it has 'id'"),
        ({"images": [{"id": 7, "file_name": "../../etc/passwd"}]}, r"images\[0\] names the image '../../etc/passwd'"),
    ],
)
def test_coco_that_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_coco(write(tmp_path / "captions.json", COCO | change), tmp_path)


def test_karpathy(tmp_path: Path) -> None:
    path = write(tmp_path / "dataset_coco.json", KARPATHY)
    assert read_captioned_images(path) == [CaptionedImage(391895, ("A man.", "A bike"))]
    flickr = write(tmp_path / "dataset_flickr30k.json", {"images": KARPATHY["images"][2:]})
    assert read_karpathy(flickr, splits=("train",)) == [CaptionedImage(2, ())]  # imgid, as there is no cocoid


def test_karpathy_splits_and_folders(tmp_path: Path) -> None:
    images = [dict(image, cocoid=number) for number, image in enumerate(KARPATHY["images"])]
    path = write(tmp_path / "dataset_coco.json", {"images": images})
    both = read_captioned_images(path, tmp_path, splits=["train", "restval"])
    assert [(image.id, image.captions) for image in both] == [(1, ("b",)), (2, ())]
    assert both[0].image == ImageFile(tmp_path / "val2014" / "b.jpg")
    (tmp_path / "b.jpg").write_bytes(b"x")
    flat = read_karpathy(path, tmp_path, ("restval",))[0].image
    assert flat == ImageFile(tmp_path / "b.jpg")
    assert flat is not None
    assert flat.read() == b"x"
    with pytest.raises(UsageError, match=r"no image of the split val; it has: test \(1\), restval \(1\), train \(1\)"):
        read_karpathy(path, splits=("val",))
    with pytest.raises(UsageError, match=r"images\[0\].sentences\[0\] has no 'raw'"):
        read_karpathy(write(path, {"images": [dict(images[0], sentences=[{}])]}))


def test_flickr8k_and_judgments(tmp_path: Path) -> None:
    tokens = write(
        tmp_path / "Flickr8k.token.txt",
        "1_a.jpg#0\tA child in a pink dress .\n1_a.jpg#1\tA girl going in .\n\n2_b.jpg.1#0\tA #1 dog\truns\r\n",
    )
    assert read_captioned_images(tokens, tmp_path) == [
        CaptionedImage("1_a.jpg", ("A child in a pink dress .", "A girl going in ."), ImageFile(tmp_path / "1_a.jpg")),
        CaptionedImage("2_b.jpg.1", ("A #1 dog\truns",), ImageFile(tmp_path / "2_b.jpg.1")),
    ]
    judgments = write(tmp_path / "ExpertAnnotations.txt", "2_b.jpg\t1_a.jpg#1\t1\t2\t1\n1_a.jpg\t1_a.jpg#0\t4 4 3\n")
    first, second = read_judgments(judgments, tokens)
    assert (first.image_id, first.caption, first.scores) == ("2_b.jpg", "A girl going in .", (1, 2, 1))
    assert (second.caption_id, second.scores, second.image) == ("1_a.jpg#0", (4, 4, 3), None)
    for line, said in (
        ("1_a.jpg\t1_a.jpg#9\t1 1 1", "line 1 names the caption '1_a.jpg#9', which"),
        ("1_a.jpg\t1_a.jpg#0\t1 5 1", "line 1 is .* expected an image, the id of a caption, and scores 1 to 4"),
        ("1_a.jpg\t1_a.jpg#0", "expected an image"),
    ):
        with pytest.raises(UsageError, match=said):
            read_judgments(write(judgments, line), tokens)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a.jpg#0\tfine\na.jpg no number\n", "line 2 is 'a.jpg no number'; expected IMAGE.jpg#NUMBER, a tab"),
        ("", "is empty"),
        ("/a.jpg#0\tx\n", "line 1 names the image '/a.jpg'; expected a path below"),
        ("a.jpg#0\t" + "x" * 2_000_000, "line 1 has 1,048,576 characters or more"),
    ],
)
def test_token_files_that_are_refused(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_captioned_images(write(tmp_path / "tokens.txt", content), tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"a.jpg#0\tcaf\xe9\n")
    with pytest.raises(UsageError, match="not text in UTF-8"):
        read_flickr8k(tmp_path / "latin.txt")


def test_a_run(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    for number in range(2):
        commit_shard(run, f"{number:05d}", num_samples=4, num_shards=2)
        for commit in (commit_captions, commit_clip, commit_itm, commit_manifest):
            commit(run, f"{number:05d}")
    images = read_captioned_images(run.path)
    samples = [sample for shard in ("00000", "00001") for sample in read_samples(run, shard)]
    assert [str(image.id) for image in images] == [str(int(s.key)) if s.key[0] != "0" else s.key for s in samples]
    assert [image.image.read() for image in images if image.image] == [sample.image for sample in samples]
    assert any(image.captions for image in images)
    assert not images[3].captions  # no caption was written of the last sample
    tar = run.tar_path("00001")
    content = bytearray(tar.read_bytes())
    content[content.index(samples[-1].image) + 5] ^= 1
    tar.write_bytes(content)
    broken = list(read_run(run))[-1].image
    assert broken is not None
    with pytest.raises(CorruptionError):
        broken.read()


def test_a_runs_key_of_zero_is_the_number(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("0.png", encoded_image(0, "png")), ("0.txt", b"a dog")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    run = RunDir.create(tmp_path / "run")
    import_shards([str(tmp_path / "a.tar")], run)
    write_human_manifest(run)
    assert [image.id for image in read_captioned_images(run.path)] == [0]


def test_options_that_do_not_belong_to_the_file(tmp_path: Path) -> None:
    coco = write(tmp_path / "captions.json", COCO)
    with pytest.raises(UsageError, match="--split is given, but .* is a COCO file"):
        read_captioned_images(coco, splits=["test"])
    with pytest.raises(UsageError, match="--generation is given"):
        read_captioned_images(coco, generation="x")
    with pytest.raises(UsageError, match="is no folder"):
        read_captioned_images(coco, tmp_path / "none")
    with pytest.raises(UsageError, match="not a run"):
        read_captioned_images(tmp_path)


@given(name=st.text(st.sampled_from("ab./\\~\0"), max_size=8))
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    folder = Path("/data/images")
    try:
        path = join_name(folder, name, "here")
    except UsageError:
        return
    assert os.path.normpath(path) != str(folder)
    assert os.path.normpath(path).startswith(f"{folder}/")


def test_files_that_are_no_plain_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg", "none.jpg"):
        source = find_image(tmp_path, [name], "here")
        assert source is not None
        with pytest.raises(OSError, match=re.escape(name)):
            source.read()
    (tmp_path / "real.png").write_bytes(encoded_image(1, "png"))
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    linked = find_image(tmp_path, ["link.png"], "here")
    assert linked is not None
    assert linked.read() == encoded_image(1, "png")
