"""The pictures of a page: which images it shows, and each with all its captions, kept beside dropped.

In: a run with a manifest. Out: `Card`s, and their HTML. Shown are the images of the pairs nearest to the threshold,
kept and dropped, and of a few for every other reason to drop one, drawn by a digest of their keys. Memory is bounded by
one shard and by what is shown.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from capfilt.data.commit import read_commit_record, read_table
from capfilt.data.images import ImageRefused, decode_image
from capfilt.data.manifest import iterate_manifest
from capfilt.data.reasons import DROP_REASON_SENTENCES
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.progress import Progress
from capfilt.report.markup import escaped

PICTURE_PX, JPEG_QUALITY = 224, 80
OTHER_REASONS = 4
"""Of every other reason so many times fewer pairs are shown."""

Explain = Callable[[Image.Image, str], tuple[str, Image.Image]]
"""(picture, text) → (what it says, the map over the picture)."""


@dataclass
class Card:
    """An image of the gallery."""

    shard: str
    key: str
    rows: list[dict[str, Any]]
    """Its pairs, the web caption first, then by ITM and CLIP score."""
    distance: float
    """Of the nearest pair's ITM score to the threshold; infinite where none has a score."""
    nearest: str
    """That pair's text; the first one's where none has a score."""
    picture: str = ""
    """JPEG in base 64; empty where it cannot be shown."""
    maps: list[tuple[str, str]] = field(default_factory=list)
    """(what it says, JPEG in base 64)."""


def choose_cards(run: RunDir, num_pairs: int, progress: Progress) -> list[Card]:
    """The images to show, those nearest to their shard's threshold first; without pictures yet.

    Raises UsageError for a run without a manifest.
    """
    chosen, thresholds = _Chosen(num_pairs), dict[str, float]()
    progress.start("report", len(run.shard_names()), "shards")
    for opened, shard, table in iterate_manifest([run]):
        found = read_commit_record(opened.read_file("manifest", shard)).fields.get("threshold")
        thresholds[shard] = float(found) if isinstance(found, int | float) else 0.0
        chosen.add(shard, table, thresholds[shard])
        progress.advance()
    progress.finish()
    cards = [card for shard, keys in chosen.by_shard() for card in _cards_of(run, shard, keys, thresholds[shard])]
    return sorted(cards, key=lambda card: (card.distance, card.shard, card.key))


class _Chosen:
    """Keys of the pairs to show, the best of what came so far."""

    def __init__(self, num_pairs: int) -> None:
        self._num = num_pairs
        self._best: dict[str, list[tuple[float, str, str]]] = {}

    def add(self, shard: str, table: pa.Table, threshold: float) -> None:
        """Look at a shard's rows."""
        judged = table.filter(pc.is_valid(table["itm_score"]))
        is_kept = judged["kept"]
        for name, rows in (("kept", judged.filter(is_kept)), ("dropped", judged.filter(pc.invert(is_kept)))):
            distances = np.abs(rows["itm_score"].to_numpy() - threshold)
            first = np.argsort(distances, kind="stable")[: self._num]
            self._take(name, shard, distances[first].tolist(), rows["key"].take(first).to_pylist(), self._num)
        not_judged = pc.and_(table["kept"], pc.is_null(table["itm_score"]))  # people's captions, those alone
        self._draw("kept, not judged", shard, table.filter(not_judged), self._num)
        for reason in pc.unique(pc.drop_null(table["drop_reason"])).to_pylist():
            rows = table.filter(pc.equal(table["drop_reason"], reason))
            self._draw(f"reason {reason}", shard, rows, -(-self._num // OTHER_REASONS))

    def by_shard(self) -> Iterator[tuple[str, set[str]]]:
        """Shard and keys, in the order of the shards."""
        found: dict[str, set[str]] = {}
        for best in self._best.values():
            for _, shard, key in best:
                found.setdefault(shard, set()).add(key)
        yield from sorted(found.items())

    def _draw(self, name: str, shard: str, rows: pa.Table, num: int) -> None:
        """Some of these rows' images, by a digest of their keys."""
        keys = rows["key"].unique()
        drawn = keys.take(np.arange(len(keys))[:: max(1, len(keys) // max(num, 1))]).to_pylist()
        places = [float(zlib.crc32(f"{shard} {key}".encode("utf-8", "replace"))) for key in drawn]
        self._take(name, shard, places, drawn, num)

    def _take(self, name: str, shard: str, places: Sequence[float], keys: Sequence[str], num: int) -> None:
        found = [(place, shard, key) for place, key in zip(places, keys, strict=True)]
        self._best[name] = sorted([*self._best.get(name, []), *found], key=itemgetter(0))[:num]


def _cards_of(run: RunDir, shard: str, keys: set[str], threshold: float) -> Iterator[Card]:
    table = read_table(run.read_file("manifest", shard))
    rows = table.filter(pc.is_in(table["key"], pa.array(sorted(keys), pa.string()))).to_pylist()
    for key in sorted(keys):
        own = sorted((row for row in rows if row["key"] == key), key=_order)
        judged = [(abs(row["itm_score"] - threshold), row["text"]) for row in own if row["itm_score"] is not None]
        distance, text = min(judged, key=itemgetter(0), default=(float("inf"), own[0]["text"]))
        yield Card(shard, key, own, distance, text)


def _order(row: dict[str, Any]) -> tuple[bool, float, float, int]:
    itm, clip = (-2.0 if row[name] is None else row[name] for name in ("itm_score", "clip_score"))
    return (row["source"] != "web", -itm, -clip, row["caption_index"])


def add_pictures(
    run: RunDir, cards: Sequence[Card], progress: Progress, explain: Explain | None = None, num_explained: int = 0
) -> None:
    """Read the pictures of the cards; of the first `num_explained` whose text a model can read, maps too."""
    by_shard: dict[str, dict[str, Card]] = {}
    for card in cards:
        by_shard.setdefault(card.shard, {})[card.key] = card
    explained = {id(card) for card in cards[:num_explained]} if explain is not None else set()
    progress.start("report", len(cards), "pictures")
    for shard, wanted in by_shard.items():
        for sample in read_samples(run, shard, keys=wanted.keys()):
            card = wanted[sample.key]
            progress.advance()
            try:
                picture = decode_image(sample.image)
            except ImageRefused:
                continue
            card.picture = _thumbnail(picture)
            if explain is not None and id(card) in explained:
                card.maps = [(said, _thumbnail(drawn)) for said, drawn in [explain(picture, card.nearest)]]
    progress.finish()


def _thumbnail(picture: Image.Image) -> str:
    """A small JPEG made of the pixels alone: what else was in the file does not come along."""
    small = picture.copy()
    small.thumbnail((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def card_html(card: Card) -> str:
    """One image: picture, captions with scores and verdicts, key and address; facts for the filters as attributes."""
    scores = [row["itm_score"] for row in card.rows if row["itm_score"] is not None]
    best = max((row["clip_score"] for row in card.rows if row["clip_score"] is not None), default=-1.0)
    facts = f'data-distance="{min(card.distance, 9):.6f}" data-itm="{max(scores, default=-1.0):.6f}" '
    facts += f'data-clip="{best:.6f}" data-key="{escaped(card.key)}"'
    picture = _image_html(card.picture, f"image {card.key}") if card.picture else ""
    maps = "".join(
        f"<figure>{_image_html(data, f'where a model looks: {said}')}<figcaption>{escaped(said)}</figcaption></figure>"
        for said, data in card.maps
    )
    url = next((row["url"] for row in card.rows if row["url"]), "")
    captions = "\n".join(map(_caption_html, card.rows))
    return (
        f'<li class="card" {facts}>{picture}{maps}\n<ul class="captions">\n{captions}\n</ul>'
        f"<small>{escaped(card.key)} <bdi>{escaped(url)}</bdi></small></li>\n"
    )


def _image_html(data: str, said: str) -> str:
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escaped(said)}">'


def _caption_html(row: dict[str, Any]) -> str:
    reason = "" if row["kept"] else str(row["drop_reason"] or "")
    verdict = "Kept." if row["kept"] else DROP_REASON_SENTENCES.get(reason, "Dropped.")
    scores = [f"{name} {row[column]:.3f}" for name, column in (("ITM", "itm_score"), ("CLIP", "clip_score"))
              if row[column] is not None]  # fmt: skip
    itm = -1.0 if row["itm_score"] is None else row["itm_score"]
    facts = f'data-source="{escaped(row["source"])}" data-verdict="{escaped(reason or "kept")}" data-itm="{itm:.6f}"'
    said = ", ".join([str(row["source"]), *scores])
    return (
        f'<li class="{"kept" if row["kept"] else "dropped"}" {facts}><bdi>{escaped(row["text"])}</bdi>'
        f"<small>{escaped(said)}. {escaped(verdict)}</small></li>"
    )
