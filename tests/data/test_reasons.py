"""What is said of many counts in few words leaves nothing out."""

from __future__ import annotations

from capfilt.data.reasons import shorten_counts


def test_what_is_not_named_is_counted() -> None:
    counts = {"not_found": 4_000, "gone": 2, "timeout": 1, "bad_url": 1, "forbidden": 1, "empty_body": 2}
    assert shorten_counts(counts) == "not_found 4,000, gone 2, timeout 1, bad_url 1 and 3 others"
    assert shorten_counts({"gone": 2}) == "gone 2"
    assert shorten_counts({}) == ""
