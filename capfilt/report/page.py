"""A run as one page of HTML: its statistics as charts, a gallery to filter and sort, and what made it.

In: a run with a manifest. Out: a file that opens anywhere without a network: pictures, style and script are inside it,
and its policy (CSP) lets the browser load nothing and run nothing but that one script, known by its digest. Everything
that came from the web, from a file or from a model is shown as text: cleaned as for the terminal, then escaped;
addresses are no links. Without the script the whole gallery is there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from capfilt import __version__
from capfilt.data.commit import CommitRecord, read_commit_record
from capfilt.data.reasons import DROP_REASON_SENTENCES, REASON_SENTENCES
from capfilt.data.rundir import STAGES, RunDir
from capfilt.data.whole_files import refuse_existing, whole_file
from capfilt.progress import NullProgress, Progress, counted, format_bytes
from capfilt.report.charts import bar_table, curve, histogram
from capfilt.report.gallery import Card, Explain, add_pictures, card_html, choose_cards
from capfilt.report.markup import escaped
from capfilt.report.stats import LONGEST_WORDS, RunStats, compute_stats

NUM_EXPLAINED = 6
"""Images whose pair nearest the threshold is explained, unless another number is asked for."""
_ORDERS = {
    "nearest": "nearest the threshold first", "itm-up": "lowest ITM score first", "itm-down": "highest ITM score first",
    "clip-up": "lowest CLIP score first", "clip-down": "highest CLIP score first", "key": "by key",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """What was written."""

    output: Path
    num_pairs: int
    """Pairs shown."""
    num_images: int
    """Images shown, each with all its pairs."""
    num_bytes: int
    seconds: float

    def line(self) -> str:
        """One line for people."""
        shown = f"{counted(self.num_pairs, 'pair')} of {counted(self.num_images, 'image')} shown"
        return f"Wrote {self.output} ({format_bytes(self.num_bytes)}, {shown}) in {self.seconds:.1f} s."


def write_report(
    run: RunDir,
    output: Path,
    *,
    num_pairs: int = 24,
    overwrite: bool = False,
    progress: Progress | None = None,
    explain: Explain | None = None,
    num_explained: int = NUM_EXPLAINED,
) -> ReportSummary:
    """Write the page.

    Args:
        num_pairs: shown are the images of so many kept pairs and of so many dropped ones, nearest the threshold, and of
            a few for every other reason.
        explain: draws where a model looks for a text; used on the first `num_explained` images.

    Raises UsageError for a run without a manifest or a file that is there already.
    """
    started, progress = time.monotonic(), progress or NullProgress()
    refuse_existing(output, overwrite=overwrite)
    cards = choose_cards(run, num_pairs, progress)
    stats = compute_stats(run)
    add_pictures(run, cards, progress, explain, num_explained)
    with whole_file(output) as file:
        for piece in _page(run, stats, cards):
            file.write(piece)
    return ReportSummary(
        output=output, num_pairs=sum(len(card.rows) for card in cards), num_images=len(cards),
        num_bytes=output.stat().st_size, seconds=time.monotonic() - started,
    )  # fmt: skip


@cache
def style_and_script() -> tuple[str, str]:
    """What lies beside this file: page.css and gallery.js."""
    folder = files("capfilt.report")
    return tuple(folder.joinpath(name).read_text("utf-8") for name in ("page.css", "gallery.js"))  # type: ignore[return-value]


def policy() -> str:
    """The page's content security policy."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in style_and_script()]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _page(run: RunDir, stats: RunStats, cards: Sequence[Card]) -> Iterator[str]:
    title = escaped(f"capfilt: {stats.run}" + (f", generation {stats.generation}" if stats.generation else ""))
    style, script = style_and_script()
    yield f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy()}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
"""
    yield from _tiles(stats)
    yield '<h2>Download</h2>\n<div class="columns">\n'
    yield from _download(stats)
    yield '</div>\n<h2>Captions and scores</h2>\n<div class="columns">\n'
    yield from _scores(stats)
    yield "</div>\n"
    yield from _gallery(stats, cards)
    yield from _origin(run)
    yield f"</main>\n<p><small>Written by capfilt {escaped(__version__)}.</small></p>\n<script>{script}</script>\n"
    yield "</body>\n</html>\n"


def _tiles(stats: RunStats) -> Iterator[str]:
    download, top = stats.download, stats.top_caption
    facts = [("images", f"{download.num_images:,} of {download.num_rows:,} rows")]
    if stats.shards.tar_bytes is not None:
        size = format_bytes(stats.shards.tar_bytes.mean * stats.shards.num_shards)
        facts.append(("shards", f"{stats.shards.num_shards:,}, {size}"))
    for source, pairs in stats.pairs.items():
        facts.append((f"{source} pairs kept", f"{pairs.num_kept:,} of {pairs.num_pairs:,}"))
    facts.append(("images with a kept pair", f"{stats.num_images_kept:,}"))
    if top.num_images:
        facts.append(("best caption synthetic", f"{top.num_synthetic / top.num_images:.1%}"))
    if stats.diversity and stats.diversity.of_sample:
        sample = stats.diversity.of_sample
        facts.append(("distinct-1, distinct-2", f"{sample.distinct_1:.2f}, {sample.distinct_2:.2f}"))
        facts.append(("self-BLEU", f"{sample.self_bleu:.2f}"))
    yield '<dl class="tiles">\n'
    yield "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>\n" for name, value in facts)
    yield "</dl>\n"


def _download(stats: RunStats) -> Iterator[str]:
    found = stats.download
    reasons = [(name, number, REASON_SENTENCES.get(name, "")) for name, number in found.by_reason.items()]
    failed = found.num_rows - found.num_images
    share = failed / found.num_rows if found.num_rows else 0.0
    yield from _boxed(bar_table(f"Rows without an image ({share:.1%}), by reason", reasons, failed))
    hosts = [(one.host, one.num_failed, f"of {one.num_rows:,} rows") for one in found.worst_hosts]
    yield from _boxed(bar_table(f"Failures by host, of {counted(found.num_hosts, 'host')}", hosts, failed))
    for title, counts in (
        ("Shorter edge in pixels", found.shorter_edge_px), ("Width to height", found.aspect),
        ("Format", found.by_format),
    ):  # fmt: skip
        rows = [(name, number, "") for name, number in counts.items() if number]
        yield from _boxed(bar_table(title, rows, found.num_images))
    outliers = [(one.shard, one.num_images, format_bytes(one.num_bytes)) for one in stats.shards.outliers]
    yield from _boxed(bar_table("Shards far from the median, images", outliers, None))


def _scores(stats: RunStats) -> Iterator[str]:
    lengths = {source: pairs.lengths(LONGEST_WORDS) for source, pairs in stats.pairs.items()}
    yield from _boxed(histogram("Words of a caption", range(LONGEST_WORDS + 2), lengths, is_open=True))
    for title, name, mark in (("CLIP score", "clip_score", None), ("ITM score", "itm_score", stats.threshold)):
        scores = {source: getattr(pairs, name) for source, pairs in stats.pairs.items()}
        if scores:
            bounds = next(iter(scores.values())).bounds
            counts = {source: one.counts for source, one in scores.items()}
            yield from _boxed(histogram(title, bounds, counts, mark=mark))
    curves = {
        source: list(pairs.kept_by_threshold.values())
        for source, pairs in stats.pairs.items() if pairs.kept_by_threshold
    }  # fmt: skip
    places = [float(name) for pairs in stats.pairs.values() for name in pairs.kept_by_threshold][:101]
    yield from _boxed(curve("Kept rate against the ITM threshold, of pairs that nothing else drops", places, curves,
                            mark=stats.threshold))  # fmt: skip
    for source, pairs in stats.pairs.items():
        rows = [("kept", pairs.num_kept, "")]
        rows += [(name, number, DROP_REASON_SENTENCES.get(name, "")) for name, number in pairs.by_drop_reason.items()]
        yield from _boxed(bar_table(f"What became of the {source} pairs", rows, pairs.num_pairs))
        words = [(word, number, "") for word, number in list(pairs.top_words.items())[:12]]
        yield from _boxed(bar_table(f"Most frequent words of the kept {source} captions", words, pairs.num_kept))


def _boxed(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces as one cell of the grid; nothing of nothing."""
    first = next(pieces, None)
    if first is not None:
        yield f"<div>{first}"
        yield from pieces
        yield "</div>\n"


def _gallery(stats: RunStats, cards: Sequence[Card]) -> Iterator[str]:
    if not cards:
        return
    yield "<h2>Pairs, kept beside dropped</h2>\n"
    yield '<form id="filters" hidden>\n'
    yield from _choice("source", "Source", {"": "all", **{name: name for name in stats.pairs}})
    reasons = {str(row["drop_reason"]) for card in cards for row in card.rows if row["drop_reason"]}
    verdicts = {"": "all", "kept": "kept", "dropped": "dropped", **{name: name for name in sorted(reasons)}}
    yield from _choice("verdict", "Verdict", verdicts)
    for name, label in (("least", "ITM at least"), ("most", "ITM at most")):
        yield f'<label>{label}<input name="{name}" type="number" min="0" max="1" step="0.01"></label>\n'
    yield from _choice("order", "Order", _ORDERS)
    yield '<input type="reset" value="Show all">\n<output id="shown" role="status"></output>\n</form>\n'
    yield '<ul class="gallery" id="gallery">\n'
    yield from map(card_html, cards)
    yield "</ul>\n"


def _choice(name: str, label: str, options: dict[str, str]) -> Iterator[str]:
    yield f'<label>{escaped(label)}<select name="{name}">\n'
    yield "".join(f'<option value="{escaped(key)}">{escaped(said)}</option>\n' for key, said in options.items())
    yield "</select></label>\n"


def _origin(run: RunDir) -> Iterator[str]:
    """Parameters, versions and digests, as the first shard of each stage records them."""
    yield "<h2>What made it</h2>\n"
    for stage in STAGES:
        shards = run.committed(stage)
        if shards:
            record = read_commit_record(run.read_file(stage, shards[0]))
            yield f"<details><summary>{escaped(stage)}, as shard {escaped(shards[0])} records it</summary>\n<table>\n"
            for name, value in _facts_of(record):
                shown = value if isinstance(value, str) else json.dumps(value)
                yield f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(shown)}</td></tr>\n'
            yield "</table></details>\n"


def _facts_of(record: CommitRecord) -> Iterator[tuple[str, Any]]:
    for name, value in record.fields.items():
        if isinstance(value, dict):
            yield from ((f"{name}: {key}", own) for key, own in value.items())
        else:
            yield name, value
    yield from ((f"version of {name}", value) for name, value in record.versions.items())
    yield "fingerprint", record.fingerprint
