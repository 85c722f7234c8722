"""The miniature world's web site: shares, truth, pictures, and what its server does over real HTTP."""

from __future__ import annotations

import csv
import json
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.data.images import ImageRefused, decode_image
from capfilt.errors import UsageError
from capfilt.world.language import judge
from capfilt.world.scenes import render
from capfilt.world.site import CAPTION_SHARES, SiteSettings, WorldSite
from capfilt.world.web_pictures import ODD_PICTURES
from capfilt.world.web_servers import BEHAVIOURS
from capfilt.world.web_texts import strip_markup

EVEN = SiteSettings(num_urls=105, seed=3, behaviour_shares=dict.fromkeys(BEHAVIOURS, 1 / 21))


@pytest.fixture(scope="module")
def site() -> Iterator[WorldSite]:
    with WorldSite(EVEN) as site:
        yield site


def _first(site: WorldSite, behaviour: str):
    return next(row for row in site.rows() if row.behaviour == behaviour)


def _get(url: str, timeout: float = 10.0) -> tuple[int, bytes, dict[str, str]]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def test_shares_are_dealt_exactly() -> None:
    site = WorldSite(SiteSettings(num_urls=1000), port=1)
    kinds = Counter(row.caption_kind for row in site.rows())
    assert kinds == {kind: round(share * 1000) for kind, share in CAPTION_SHARES.items()}
    behaviours = Counter(row.behaviour for row in site.rows())
    for name, (share, _) in BEHAVIOURS.items():
        assert behaviours[name] == round(share * 1000)


def test_half_of_the_web_captions_are_true_and_kinds_keep_their_word() -> None:
    site = WorldSite(SiteSettings(num_urls=600, seed=1), port=1)
    rows = list(site.rows())
    verdicts = Counter(row.verdict for row in rows)
    assert verdicts["true"] / len(rows) == pytest.approx(0.5, abs=0.02)
    for row in rows:
        if row.caption_kind in ("true", "paraphrased", "markup"):
            assert row.verdict == "true", row
        elif row.caption_kind == "one_fact_changed":
            assert (row.verdict, len(row.wrong_facts)) == ("false", 1), row
        elif row.caption_kind != "other_image":
            assert row.verdict != "true", row
        assert row.verdict == judge(strip_markup(row.web_caption or ""), row.scene).verdict
    texts = {kind: [row.web_caption for row in rows if row.caption_kind == kind] for kind in CAPTION_SHARES}
    assert {None, ""} == set(texts["empty"])
    assert max(len(text or "") for text in texts["overlong"]) > 8192
    assert len(set(texts["shop"])) > 20
    assert len(set(texts["other_language"])) > 12


def test_everything_follows_from_the_seed() -> None:
    first, again = WorldSite(EVEN, port=1), WorldSite(EVEN, port=1)
    assert list(first.rows()) == list(again.rows())
    assert first.picture(first.row(5)) == again.picture(again.row(5))
    other = WorldSite(SiteSettings(num_urls=105, seed=4), port=1)
    assert not {row.scene.seed for row in first.rows()} & {row.scene.seed for row in other.rows()}


def test_duplicates_show_another_rows_picture() -> None:
    site = WorldSite(SiteSettings(num_urls=60, behaviour_shares={"duplicate": 0.1}), port=1)
    duplicates = [row for row in site.rows() if row.behaviour == "duplicate"]
    assert len(duplicates) == 6
    pictures = {site.picture(row) for row in site.rows() if row.behaviour == "plain"}
    assert all(site.picture(row) in pictures for row in duplicates)


def test_sizes_and_formats_are_varied() -> None:
    rows = list(WorldSite(SiteSettings(num_urls=400), port=1).rows())
    assert {row.ending for row in rows} == {"jpg", "png", "webp"}
    edges = [edge for row in rows for edge in (row.width_px, row.height_px)]
    assert (min(edges), max(edges)) == (48, 256)
    assert len({round(row.width_px / row.height_px, 1) for row in rows}) > 6


@pytest.mark.parametrize("oddity", sorted(ODD_PICTURES))
def test_odd_pictures_show_the_scene(site: WorldSite, oddity: str) -> None:
    row = _first(site, oddity)
    body = _get(row.url)[1]
    if oddity == "truncated":
        with pytest.raises(ImageRefused) as caught:
            decode_image(body)
        assert caught.value.reason == "truncated_image"
        return
    picture = decode_image(body)
    assert picture.size == (row.width_px, row.height_px)
    painted = Image.fromarray(render(row.scene, row.width_px, row.height_px))
    # coarse, so that what JPEG does to the grain does not count
    seen, meant = (np.asarray(image.resize((12, 12), Image.Resampling.BOX), dtype=int) for image in (picture, painted))
    assert np.abs(seen - meant).mean() < 5


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [("plain", 200), ("redirect", 200), ("duplicate", 200), ("not_found", 404), ("gone", 410),
     ("forbidden", 403), ("server_error", 500), ("too_many_requests", 429), ("wrong_type", 200)],
)  # fmt: skip
def test_server_answers_as_stated(behaviour: str, status: int) -> None:
    shares = {behaviour: 1.0} if behaviour != "plain" else {}
    with WorldSite(SiteSettings(num_urls=4, behaviour_shares=shares)) as site:
        for row in site.rows():
            assert row.behaviour == behaviour
            found, body, headers = _get(row.url)
            assert found == status
            if status == 200:
                assert decode_image(body).size == (row.width_px, row.height_px)
                expected = "text/plain" if behaviour == "wrong_type" else "image/"
                assert headers["Content-Type"].startswith(expected)
            assert site.truth(row.url) == row


def test_odd_answers(site: WorldSite) -> None:
    assert b"<html>" in _get(_first(site, "html").url)[1]
    assert _get(_first(site, "empty_body").url)[:2] == (200, b"")
    assert _get(_first(site, "disallowed").url)[2]["X-Robots-Tag"] == "noai, noimageai"
    assert _get(_first(site, "redirect_loop").url)[0] == 302  # urllib gives up on the circle
    with pytest.raises(TimeoutError):
        _get(_first(site, "hang").url, timeout=0.3)
    assert _get(site.base_url + "/nothing.jpg")[0] == 404
    assert _get(site.base_url + "/photos/x-999999.jpg")[0] == 404


def test_drip_never_goes_silent_and_stopping_does_not_wait_for_it() -> None:
    with WorldSite(SiteSettings(num_urls=1, behaviour_shares={"drip": 1.0})) as site:
        connection = socket.create_connection(("127.0.0.1", site.port), timeout=1.0)
        path = site.row(0).url.removeprefix(site.base_url)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        received = [connection.recv(4096) for _ in range(4)]
        assert all(received)
        started = time.monotonic()
    assert time.monotonic() - started < 3
    connection.close()


def test_tables_and_truth(site: WorldSite, tmp_path: Path) -> None:
    rows = list(site.rows())
    parquet = pq.read_table(site.write_table(tmp_path / "t.parquet")).to_pylist()
    assert parquet == [{"url": row.url, "text": row.web_caption} for row in rows]
    lines = site.write_table(tmp_path / "t.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == parquet
    with open(site.write_table(tmp_path / "t.csv"), newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == [row.web_caption or "" for row in rows]
    truth = pq.read_table(site.write_truth(tmp_path / "truth.parquet")).to_pylist()
    assert [entry["verdict"] for entry in truth] == [row.verdict for row in rows]
    with pytest.raises(UsageError, match=r"expected \.parquet, \.csv or \.jsonl"):
        site.write_table(tmp_path / "t.xlsx")
    with pytest.raises(UsageError, match="not an address of this site"):
        site.truth("http://elsewhere.example/a-7.gif")


def test_settings_that_make_no_sense() -> None:
    for settings in (
        {"num_urls": 0}, {"split": "dev"}, {"caption_shares": {"true": 0.4}},
        {"caption_shares": {"odd": 1.0}}, {"behaviour_shares": {"hang": 1.5}},
        {"behaviour_shares": {"hang": -0.5}},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            SiteSettings(**settings)
    with pytest.raises(UsageError, match="no address before it runs"):
        WorldSite(EVEN).row(0)


def test_port_is_kept_and_a_taken_one_is_refused(site: WorldSite) -> None:
    with pytest.raises(UsageError, match="cannot listen"), WorldSite(EVEN, port=site.port):
        pass
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with WorldSite(EVEN, port=port) as other:
        assert _get(other.row(0).url)[0] < 600
