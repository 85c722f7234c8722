"""Fuzzing: damaged, mutated and invented bytes for every parser of ours. What is wrong is refused in words.

Every parser has sound files to begin with; hypothesis changes, cuts, repeats and mixes them, or makes up its own.
Nothing but the errors that the command line turns into a message may come out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from capfilt.curation.addresses import FetchError, parse_redirect, parse_url
from capfilt.curation.fetch import Fetcher, find_disallowed
from capfilt.curation.import_samples import check_sample, group_members
from capfilt.curation.robots import RobotsRules
from capfilt.curation.url_table import open_url_table
from capfilt.data.annotations import read_captioned_images
from capfilt.data.captions import clean_caption, has_words
from capfilt.data.commit import read_commit_record, read_table
from capfilt.data.foreign_tars import read_foreign_tar
from capfilt.data.images import ImageRefused, decode_image
from capfilt.data.labels import read_labelled_texts, read_pair_labels
from capfilt.data.llm_texts import read_llm_texts
from capfilt.data.questions import read_questions
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import sealed_bytes
from capfilt.data.tars import index_tar, write_tar
from capfilt.data.texts import clean_for_terminal
from capfilt.errors import CapfiltError
from capfilt.recipes import bundled_recipes, read_recipe
from capfilt.settings import DownloadSettings
from capfilt.train.checkpoint import read_training_record
from capfilt.weights.foreign_files import describe_file
from capfilt.weights.model_files import read_json, read_safetensors
from tests.data import conftest as small
from tests.hostile_server import OK, HostileServer, raw
from tests.hostile_tars import GOOD, info, packed
from tests.hostile_texts import UNSAFE
from tests.stress.conftest import FULL, Figure

NUM_EXAMPLES = 2_000 if FULL else 60
MANY = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not FULL,
    database=None,
)
INTERESTING = (
    b"\0", b"\xff", b"\xff\xfe", b"\x1b[31m", b"\xed\xa0\x80", b'"', b"'", b",", b"\n", b"\r", b"{", b"}", b"[", b"]",
    b"null", b"NaN", b"1e999", b"-1", b"9" * 30, b"\\ud800", b"://", b"../", b"\xf0\x9f\x99\x82", b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff", b"=", b"#", b"\t", b"true",
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with some places overwritten, bytes put in or taken out, or the end cut off; or bytes of no kind."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        place = int(draw(st.floats(0, 1, exclude_max=True)) * max(len(data), 1))
        length = draw(st.integers(0, 12))
        piece = draw(st.one_of(st.sampled_from(INTERESTING), st.binary(min_size=1, max_size=6)))
        match draw(st.sampled_from(["overwrite", "insert", "delete", "repeat", "cut"])):
            case "overwrite":
                data[place : place + len(piece)] = piece
            case "insert":
                data[place:place] = piece
            case "delete":
                del data[place : place + length]
            case "repeat":
                data[place:place] = data[place : place + length] * 3
            case _:
                del data[max(place, 1) :]
    return bytes(data)


# --- files of tables, texts and settings --------------------------------------------------------------------

ROWS = {"url": ["http://a/1.jpg", None, "x"], "text": ["a dog", "", "ünïcode 🙂"], "n": [1.5, None, 2.0]}
CSV = b'url,text,n\nhttp://a/1.jpg,"a ""dog""\nhere",1\n,x,\n'
JSON_ROWS = [{"url": "http://a/1.jpg", "text": "a dog", "n": 1}, {"url": None, "text": ["odd"], "n": {"a": 1}}]


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def read_url_table(path: Path) -> None:
    staging = path.parent / "staging"
    staging.mkdir(exist_ok=True)
    table = open_url_table(str(path), "url", "text", staging)
    num_rows = sum(batch.num_rows for batch in table.batches())
    assert num_rows == table.num_rows


def read_stage(path: Path) -> None:
    read_commit_record(path)
    read_table(path)


RECORD = {
    "format_version": 1, "stage": "captions", "shard": "00000", "fingerprint": "x", "fields": {}, "input_digest": "",
    "rows_in": 1, "rows_kept": 1, "rows_rejected": 0, "rows_quarantined": 0, "extra": {"table_rows": 1}, "versions": {},
}  # fmt: skip
STAGE = sealed_bytes(pa.table({"key": ["a"], "caption_index": pa.array([0], pa.int16()), "text": ["b"]}), RECORD)
COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 5, "image_id": 1, "caption": "a dog"}]}
KARPATHY = {"images": [{"imgid": 0, "filename": "a.jpg", "split": "test", "sentences": [{"raw": "a dog"}]}]}
QUESTIONS = {"questions": [{"question_id": 1, "image_id": 2, "question": "what?"}], "data_subtype": "val2014"}
DESCRIBED = "a model file of another kind"
"""What it is is told whatever it is: nothing is refused."""
PARSERS: dict[str, tuple[str, list[bytes], Callable[[Path], Any]]] = {
    "URL table, Parquet": ("t.parquet", [
        parquet_bytes(pa.table(ROWS)), parquet_bytes(pa.table(ROWS), compression="zstd", use_dictionary=False)],
        read_url_table),
    "URL table, CSV": ("t.csv", [CSV], read_url_table),
    "URL table, TSV": ("t.tsv", [CSV.replace(b",", b"\t")], read_url_table),
    "URL table, JSONL": ("t.jsonl", ["\n".join(map(json.dumps, JSON_ROWS)).encode()], read_url_table),
    "URL table, JSON": ("t.json", [json.dumps(JSON_ROWS).encode()], read_url_table),
    "URL table, TXT": ("t.txt", [b"http://a/1.jpg\nhttp://b/\n"], read_url_table),
    "commit record": ("captions/00000.parquet", [STAGE], read_stage),
    "run.json": ("run.json", [b'{"format_version": 1, "created": "x", "capfilt": "0"}'],
                 lambda path: RunDir.open(path.parent)),
    "recipe": ("r.toml", [path.read_bytes() for path in bundled_recipes().values()],
               lambda path: read_recipe(str(path))),
    "COCO captions": ("c.json", [json.dumps(COCO).encode(), json.dumps(KARPATHY).encode()], read_captioned_images),
    "Flickr8k tokens": ("c.token.txt", [b"a.jpg#0\ta dog\na.jpg#1\ta cat\n"], read_captioned_images),
    "questions": ("q.json", [json.dumps(QUESTIONS).encode()], read_questions),
    "pair labels": ("l.csv", [b"key,caption_index,label\na,0,1\nb,-1,false\n"], read_pair_labels),
    "pair labels, JSONL": ("l.jsonl", [b'{"key": "a", "text": "b", "label": true}\n'], read_pair_labels),
    "pair labels, Parquet": ("l.parquet", [parquet_bytes(pa.table({"key": ["a"], "text": ["b"], "label": [True]}))],
                             read_pair_labels),
    "labelled texts": ("l.csv", [b"image,text,label\na.jpg,b,1\n"], read_labelled_texts),
    "texts of a language model": ("t.jsonl", [b'{"text": "a dog"}\n{"question": "a", "text": "b"}\n'], read_llm_texts),
    "training record": ("training.json", [b'{"fields": {"a": 1}, "sha256": {"m": "x"}, "summary": {"steps": 3}}'],
                        lambda path: read_training_record(path.parent)),
    "model configuration": ("config.json", [b'{"architectures": ["Blip"], "vision_config": {"hidden_size": 8}}'],
                            read_json),
    "safetensors": ("m.safetensors", [save_safetensors({"a": torch.zeros(3, 2), "b": torch.ones(4)})],
                    read_safetensors),
    DESCRIBED: ("m.bin", [b"\x80\x04\x95\x0c\0\0\0\0\0\0\0cos\nsystem\n.", b"PK\x03\x04" + bytes(40),
                                     b"\x93NUMPY\x01\0v\0{'descr': '<f4'}"], describe_file),
}  # fmt: skip


@pytest.mark.parametrize("name", PARSERS)
def test_files(tmp_path: Path, name: str, figure: Figure) -> None:
    file_name, seeds, parse = PARSERS[name]
    path = tmp_path / file_name
    path.parent.mkdir(exist_ok=True)
    for seed in seeds:
        path.write_bytes(seed)
        parse(path)  # the seeds are sound
    counts = {"read": 0, "refused": 0}

    @MANY
    @given(mutated(seeds))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        said: str | None = None
        try:
            parse(path)
            counts["read"] += 1
        except CapfiltError as refusal:
            counts["refused"] += 1
            said = str(refusal)
        if said is not None:
            assert said.strip()
            for line in said.splitlines():
                assert not UNSAFE.search(clean_for_terminal(line, 2000))

    check()
    assert counts["refused"] or name == DESCRIBED
    figure("fuzzing", f"{name}: {counts['read']:,} read, {counts['refused']:,} refused in words, 0 other errors")


# --- tars ---------------------------------------------------------------------------------------------------


def test_own_tars(tmp_path: Path, figure: Figure) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{n:03d}.{ext}", bytes([n]) * 90) for n in range(3) for ext in ("jpg", "txt")])
    seeds, counts = [path.read_bytes()], {"read": 0, "refused": 0}

    @MANY
    @given(mutated(seeds))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            for member in index_tar(path):
                assert 0 <= member.offset <= member.offset + member.length <= len(data)
            counts["read"] += 1
        except CapfiltError:
            counts["refused"] += 1

    check()
    figure("fuzzing", f"own tars: {counts['read']:,} read, {counts['refused']:,} refused in words, 0 other errors")


def test_foreign_tars_and_their_samples(figure: Figure) -> None:
    picture = small.encoded_image(3)
    members = [("a.jpg", picture), ("a.txt", b"a dog"), ("a.json", b'{"url": "http://x/", "caption": "y"}')]
    whole = packed(*[(info(name, len(content)), content) for name, content in members], GOOD)
    num = [0, 0]

    @MANY
    @given(mutated([whole]))
    def check(data: bytes) -> None:
        for sample in group_members(read_foreign_tar(io.BytesIO(data))):
            checked = check_sample(sample, DownloadSettings())
            num[checked.reason is not None] += 1

    check()
    assert all(num)
    figure("fuzzing", f"foreign tars: {num[0]:,} samples taken, {num[1]:,} set aside with a reason, 0 errors")


# --- pictures, addresses, answers of servers, texts ---------------------------------------------------------


def test_pictures(figure: Figure) -> None:
    seeds, counts = [small.encoded_image(n, ext) for n, ext in enumerate(small.EXTENSIONS)], {"read": 0, "refused": 0}

    @MANY
    @given(mutated(seeds))
    def check(data: bytes) -> None:
        try:
            assert decode_image(data).mode == "RGB"
            counts["read"] += 1
        except ImageRefused:
            counts["refused"] += 1

    check()
    figure("fuzzing", f"pictures: {counts['read']:,} read, {counts['refused']:,} refused with a reason, 0 other errors")


URLS = [b"http://example.com:80/a%20b?c=d#e", b"https://user@[::1]:443/", b"HTTP://EXAMPLE.COM/\xc3\xbc", b"//x/../y?z"]


def test_addresses(figure: Figure) -> None:
    num = [0, 0]

    @MANY
    @given(mutated(URLS), mutated(URLS))
    def check(data: bytes, other: bytes) -> None:
        text, location = data.decode("utf-8", "surrogateescape"), other.decode("utf-8", "surrogateescape")
        try:
            target = parse_url(text, (80, 443))
            hop = parse_redirect(target, location, (80, 443))
        except FetchError:
            num[1] += 1
            return
        num[0] += 1
        for one in (target, hop):
            assert one.scheme in ("http", "https")
            assert one.port in (80, 443)
            assert one.request_path.startswith("/")
            assert (one.request_path + one.host_header).isascii()
            assert not any(ord(char) <= 32 or ord(char) == 127 for char in one.request_path + one.host_header)
            assert parse_url(one.url, (80, 443)) == one

    check()
    assert all(num)
    figure("fuzzing", f"addresses and redirects: {num[0]:,} parsed, {num[1]:,} refused with a reason, 0 other errors")


ANSWERS = [
    OK + b"Content-Length: 7\r\n\r\npicture",
    OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\npic\r\n4\r\nture\r\n0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: /next?a=b\r\n\r\n", b"HTTP/1.1 429 Busy\r\nRetry-After: 3\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\nRetry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\nX-Robots-Tag: bot: noai, all\r\n\r\n",
    OK + b"Content-Encoding: gzip\r\nX-Robots-Tag: unavailable_after: 25 Jun 2010\r\n\r\n\x1f\x8b\x08\0",
]  # fmt: skip


def test_answers_of_servers(figure: Figure) -> None:
    answers: dict[str, Any] = {}
    fetcher = Fetcher(DownloadSettings(allow_private_addresses=True, timeout_seconds=2.0, robots_txt=True))
    num, limit = [0, 0], min(NUM_EXAMPLES, 600)
    with HostileServer(_EveryPath(answers)) as server:

        @settings(MANY, max_examples=limit)
        @given(mutated(ANSWERS))
        def check(data: bytes) -> None:
            answers["data"] = data
            seconds: float | None = None
            try:
                fetcher.fetch(server.url("/a.jpg"))
                num[0] += 1
            except FetchError as failure:
                num[1] += 1
                seconds = failure.retry_after_seconds
            assert seconds is None or seconds >= 0

        check()
    assert all(num)
    figure("fuzzing", f"answers of servers: {num[0]:,} bodies, {num[1]:,} failures with a reason, 0 other errors")


class _EveryPath(dict[str, Any]):
    """Every address gives the bytes of the moment."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers

    def __getitem__(self, path: str) -> Any:
        return raw(b"HTTP/1.1 404 No\r\n\r\n" if path == "/robots.txt" else self._answers["data"])


def test_robots(figure: Figure) -> None:
    seeds = [
        b"User-agent: *\nDisallow: /a\n\nUser-agent: capfilt\nAllow: /\nCrawl-delay: 3\nSitemap: http://x/\n",
        b"User-agent: *\nDisallow: /a\n",
    ]
    target, num = parse_url("http://example.com/a/b.jpg", None), [0, 0]

    @MANY
    @given(mutated(seeds), st.text(max_size=60))
    @example(seeds[0], "")
    @example(seeds[1], "")
    def check(data: bytes, header: str) -> None:
        reason: str | None = None
        try:
            RobotsRules("capfilt").check(target, 1.0, lambda _: data)
            num[0] += 1
        except FetchError as failure:
            reason = failure.reason
            num[1] += 1
        assert reason in (None, "disallowed")
        find_disallowed([header, data.decode("latin-1")])

    check()
    assert all(num)
    figure("fuzzing", f"robots.txt: {num[0]:,} allow, {num[1]:,} forbid, 0 errors")


def test_captions(figure: Figure) -> None:
    alphabet = st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from(list('<>&;!-"()*#:~. \u00a0\u2003\x85'))
    )

    @MANY
    @given(
        st.lists(
            st.one_of(st.text(alphabet, max_size=20), st.sampled_from(["<b>", "&amp;", "&nbsp;", "<!--"])), max_size=6
        )
    )
    def check(pieces: list[str]) -> None:
        text = "".join(pieces)
        cleaned = clean_caption(text)
        assert len(cleaned.split()) <= 50
        assert cleaned == cleaned.strip()
        assert has_words(pa.chunked_array([[text]], pa.string())).to_pylist() == [bool(cleaned)]
        assert not UNSAFE.search(clean_for_terminal(text))

    check()
    figure("fuzzing", f"captions: {NUM_EXAMPLES:,} cleaned; a text has words where something of it is left")
