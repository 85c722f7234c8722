"""The audit of a manifest, against counts made by hand."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from capfilt.world.audit import SourceAudit, audit_manifest, read_scenes, sum_audits
from capfilt.world.site import SiteSettings, WorldSite

COLUMNS = ("url", "source", "text", "itm_score", "kept")


def test_counts_by_source(tmp_path: Path) -> None:
    site = WorldSite(SiteSettings(num_urls=60), port=80)
    truth_file = site.write_truth(tmp_path / "truth.parquet")
    rows, expected = [], SourceAudit()
    for row in site.rows():
        score = None if row.caption_kind == "empty" else 0.9
        kept = score is not None and row.index % 2 == 0
        is_true = row.verdict == "true"
        rows.append((row.url, "web", row.web_caption or "", score, kept))
        expected.num_pairs += 1
        expected.num_true += is_true
        expected.num_kept += kept
        expected.num_kept_true += kept and is_true
        expected.num_judged += score is not None
        expected.num_judged_true += score is not None and is_true
    url = rows[0][0]
    rows.append((url, "synthetic", "nothing that the world knows", None, False))
    manifest = pa.table({name: [row[n] for row in rows] for n, name in enumerate(COLUMNS)})

    audits = audit_manifest(manifest, truth_file)
    assert audits["web"] == expected
    assert expected.num_true > 20
    assert audits["synthetic"] == SourceAudit(num_pairs=1)
    total = sum_audits(audits)
    assert total.num_pairs == 61
    assert total.precision == pytest.approx(expected.num_kept_true / expected.num_kept)
    assert total.recall == pytest.approx(expected.num_kept_true / expected.num_judged_true)
    assert total.share_true == pytest.approx(expected.num_true / 61)
    assert read_scenes(truth_file)[url] == site.row(0).scene


def test_nothing_is_no_division() -> None:
    assert (SourceAudit().share_true, SourceAudit().precision, SourceAudit().recall) == (0.0, 0.0, 0.0)
