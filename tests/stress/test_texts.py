"""Texts are stored as they came, in UTF-8, and made alike for scoring alone, by the models' own tokenizers."""

from __future__ import annotations

import json
import tarfile
import unicodedata
from pathlib import Path

import open_clip
import pytest
from transformers import BertTokenizerFast

from capfilt.curation.download import download
from capfilt.data.captions import clean_caption
from capfilt.data.commit import read_table
from capfilt.data.rundir import RunDir
from capfilt.settings import DownloadSettings
from capfilt.world.site import SiteSettings, WorldSite
from tests import factories
from tests.cli.conftest import capfilt
from tests.curation.downloads import rows_of
from tests.curation.test_import_shards import write_foreign
from tests.data import conftest as small
from tests.stress.conftest import Figure

DECOMPOSED = unicodedata.normalize("NFD", "Ein Café in Zürich, señor")
TEXTS = [
    DECOMPOSED, unicodedata.normalize("NFC", DECOMPOSED), "ＦＵＬＬ　ｗｉｄｔｈ", "ﬁve ligatures ①②③",
    "👩‍👩‍👧‍👦 family", "a\u202eb\u2066c", "two\r\nlines\tand a tab", "\u00a0blanks\u2003around\u00a0",
    "zero\u200bwidth \ufeff", "\x1b[31mred\x07", "한국어 텍스트", unicodedata.normalize("NFD", "한국어 텍스트"),
    "مرحبا", "a\u0301\u0301\u0301", "<b>bold &amp; brave</b>", "\ue000 private", "ſ K Å",
]  # fmt: skip


def test_downloaded_texts_are_stored_as_they_came(tmp_path: Path, figure: Figure) -> None:
    with WorldSite(SiteSettings(num_urls=len(TEXTS), behaviour_shares={"hang": 0.0})) as site:
        urls = [row.url for row in site.rows()]
        lines = [json.dumps({"url": url, "text": text}) for url, text in zip(urls, TEXTS, strict=True)]
        lines.append('{"url": "http://x/", "text": "half a pair: \\ud800"}')
        (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
        run = RunDir.create(tmp_path / "run")
        settings = DownloadSettings(allow_private_addresses=True, num_processes=1, timeout_seconds=5.0)
        download(str(tmp_path / "t.jsonl"), run, settings)
    rows = rows_of(run)
    assert [row["caption"] for row in rows[:-1]] == TEXTS
    assert rows[-1]["reason"] == "bad_row"
    with tarfile.open(run.tar_path("00000")) as tar:
        for row, text in zip(rows, TEXTS, strict=False):
            if row["status"] == "success":
                assert tar.extractfile(f"{row['key']}.txt").read() == text.encode("utf-8")  # type: ignore[union-attr]
    figure("texts", f"{len(TEXTS)} odd texts stored byte for byte; one that is no UTF-8 set aside")


def test_imported_texts_are_stored_as_they_came(tmp_path: Path) -> None:
    members = []
    for number, text in enumerate(TEXTS):
        members += [(f"{number:03d}.jpg", small.encoded_image(number)), (f"{number:03d}.txt", text.encode("utf-8"))]
    members += [("999.jpg", small.encoded_image(999)), ("999.txt", b"latin-1: caf\xe9")]
    write_foreign(tmp_path / "a.tar", members)
    assert capfilt("import", tmp_path / "a.tar", tmp_path / "run").code == 0
    rows = read_table(RunDir.open(tmp_path / "run").stage_file("shards", "00000")).to_pylist()
    by_key = {row["key"]: row for row in rows}
    found = [row["caption"] for row in rows if row["status"] == "success"]
    assert found == TEXTS
    assert [row["reason"] for row in by_key.values() if row["status"] != "success"] == ["bad_caption"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(factories.read_bert_vocabulary()), encoding="utf-8")
    return BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))


@pytest.mark.parametrize("text", [DECOMPOSED, "한국어 텍스트", "Å ñ ü"])
def test_two_spellings_of_a_text_score_alike(bert: BertTokenizerFast, text: str) -> None:
    """Composed and decomposed letters are the same tokens to BLIP's tokenizer and to CLIP's."""
    composed, decomposed = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    assert composed != decomposed
    assert bert(clean_caption(composed)).input_ids == bert(clean_caption(decomposed)).input_ids
    clip = open_clip.get_tokenizer("ViT-L-14")
    assert clip([composed]).tolist() == clip([decomposed]).tolist()
