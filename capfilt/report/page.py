"""A run as one page of HTML: the statistics, and pairs around the threshold with their pictures.

In: a run with a manifest. Out: a file that opens anywhere without a network: pictures are inside it, there is no
script, and its policy (CSP) lets the browser load nothing. Everything that came from the web, from a file or from a
model is shown as text: cleaned as for the terminal, then escaped; addresses are no links.
"""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from capfilt import __version__
from capfilt.data.commit import read_commit_record
from capfilt.data.images import ImageRefused, decode_image
from capfilt.data.manifest import iterate_manifest
from capfilt.data.reasons import DROP_REASON_SENTENCES
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.data.texts import clean_for_terminal
from capfilt.data.whole_files import refuse_existing, whole_file
from capfilt.progress import NullProgress, Progress, counted
from capfilt.report.stats import RunStats, compute_stats
from capfilt.report.stats_view import stats_lines

PICTURE_PX, JPEG_QUALITY = 224, 80
MAX_TEXT_CHARS = 500
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
pre { font: 13px/1.35 ui-monospace, monospace; overflow-x: auto; }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; padding: 0; }
li { list-style: none; border: 1px solid #8888; border-radius: 0.5rem; padding: 0.75rem; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; margin: 0 auto 0.5rem; }
small { display: block; opacity: 0.75; }
"""


@dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """What was written."""

    output: Path
    num_pairs: int
    """Pairs shown."""
    num_bytes: int
    seconds: float

    def line(self) -> str:
        """One line for people."""
        size = f"{self.num_bytes / 1e6:.1f} MB"
        return f"Wrote {self.output} ({size}, {counted(self.num_pairs, 'pair')} shown) in {self.seconds:.1f} s."


@dataclass(frozen=True, slots=True)
class _Shown:
    """A pair of the gallery."""

    row: dict[str, Any]
    picture: str = ""
    """JPEG in base 64; empty where it cannot be shown."""


def write_report(
    run: RunDir, output: Path, *, num_pairs: int = 24, overwrite: bool = False, progress: Progress | None = None
) -> ReportSummary:
    """Write the page; of the kept pairs and of the dropped ones `num_pairs` each are shown, nearest the threshold.

    Raises UsageError for a run without a manifest or a file that is there already.
    """
    started, progress = time.monotonic(), progress or NullProgress()
    refuse_existing(output, overwrite=overwrite)
    threshold, chosen = _choose(run, num_pairs, progress)
    stats = compute_stats(run)
    gallery = _with_pictures(run, chosen, progress)
    with whole_file(output) as file:
        for piece in _page(stats, threshold, gallery):
            file.write(piece)
    shown = sum(map(len, gallery.values()))
    return ReportSummary(
        output=output, num_pairs=shown, num_bytes=output.stat().st_size, seconds=time.monotonic() - started
    )


def _choose(run: RunDir, num_pairs: int, progress: Progress) -> tuple[float | None, dict[str, list[dict[str, Any]]]]:
    """The threshold, and the rows nearest to it: kept ones, and those that it drops."""
    nearest: dict[str, list[tuple[float, dict[str, Any]]]] = {"kept": [], "dropped": []}
    threshold = None
    progress.start("report", len(run.shard_names()), "shards")
    for opened, shard, table in iterate_manifest([run]):
        found = read_commit_record(opened.read_file("manifest", shard)).fields.get("threshold")
        threshold = float(found) if isinstance(found, int | float) else None
        judged = table.filter(pc.is_valid(table["itm_score"]))
        for name, rows in (
            ("kept", judged.filter(judged["kept"])),
            ("dropped", judged.filter(pc.invert(judged["kept"]))),
        ):
            distances = np.abs(rows["itm_score"].to_numpy() - (threshold or 0.0))
            first = np.argsort(distances, kind="stable")[:num_pairs]
            found_here = zip(distances[first].tolist(), rows.take(first).to_pylist(), strict=True)
            nearest[name] = sorted([*nearest[name], *found_here], key=itemgetter(0))[:num_pairs]
        progress.advance()
    progress.finish()
    return threshold, {name: [row for _, row in pairs] for name, pairs in nearest.items()}


def _with_pictures(run: RunDir, chosen: dict[str, list[dict[str, Any]]], progress: Progress) -> dict[str, list[_Shown]]:
    keys: dict[str, set[str]] = {}
    for row in (row for rows in chosen.values() for row in rows):
        keys.setdefault(row["shard"], set()).add(row["key"])
    pictures: dict[str, str] = {}
    progress.start("report", sum(map(len, keys.values())), "pictures")
    for shard, wanted in keys.items():
        for sample in read_samples(run, shard, keys=wanted):
            pictures[sample.key] = _thumbnail(sample.image)
            progress.advance()
    progress.finish()
    return {name: [_Shown(row, pictures.get(row["key"], "")) for row in rows] for name, rows in chosen.items()}


def _thumbnail(data: bytes) -> str:
    """A small JPEG made of the pixels alone: what else was in the file does not come along."""
    try:
        picture = decode_image(data)
    except ImageRefused:
        return ""
    picture.thumbnail((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _text(value: object) -> str:
    """Anything untrusted as HTML text, or inside a quoted attribute."""
    return html.escape(clean_for_terminal(str(value), MAX_TEXT_CHARS), quote=True)


def _page(stats: RunStats, threshold: float | None, gallery: dict[str, list[_Shown]]) -> Iterator[str]:
    title = _text(f"capfilt: {stats.run}" + (f", generation {stats.generation}" if stats.generation else ""))
    yield f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<pre>
"""
    for line in stats_lines(stats):
        yield html.escape(line) + "\n"
    yield "</pre>\n"
    nearest = f", nearest the threshold {threshold:g} first" if threshold is not None else ""
    for name, shown in gallery.items():
        if shown:
            yield f"<h2>Pairs {name}{nearest}</h2>\n<ul>\n"
            yield from map(_card, shown)
            yield "</ul>\n"
    yield f"<p><small>Written by capfilt {_text(__version__)}.</small></p>\n</body>\n</html>\n"


def _card(shown: _Shown) -> str:
    row = shown.row
    picture = f'<img src="data:image/jpeg;base64,{shown.picture}" alt="{_text(row["text"])}">' if shown.picture else ""
    clip = f", CLIP {row['clip_score']:.3f}" if row["clip_score"] is not None else ""
    verdict = DROP_REASON_SENTENCES.get(row["drop_reason"] or "", "") if not row["kept"] else "Kept."
    facts = f"{row['source']}, ITM {row['itm_score']:.3f}{clip}. {verdict}"
    return (
        f"<li>{picture}<p><bdi>{_text(row['text'])}</bdi></p><small>{_text(facts)}</small>"
        f"<small>{_text(row['key'])} <bdi>{_text(row['url'] or '')}</bdi></small></li>\n"
    )
