"""What differs between two fingerprints' fields, in words a user can act on."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from capfilt.data.field_changes import field_changes

DIGEST_A, DIGEST_B = "a" * 64, "b" * 64

VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
FIELDS = st.dictionaries(st.sampled_from("abcd"), VALUES | st.dictionaries(st.sampled_from("xy"), VALUES), max_size=4)


def test_settings_are_named_with_both_values() -> None:
    changes = field_changes({"top_p": 0.9, "seed": 1, "gone": "x"}, {"top_p": 0.8, "seed": 1})
    assert changes == ["gone 'x' -> none", "top_p 0.9 -> 0.8"]


def test_a_digest_is_named_and_not_printed() -> None:
    old = {"table_sha256": DIGEST_A, "model": {"config.json": DIGEST_A, "model.safetensors": DIGEST_A}}
    new = {"table_sha256": DIGEST_B, "model": {"config.json": DIGEST_B, "vocab.txt": DIGEST_A}}
    assert field_changes(old, new, {"table_sha256": "table"}) == [
        "model: another config.json", "model: no model.safetensors", "model: vocab.txt besides", "another table",
    ]  # fmt: skip


@given(FIELDS, FIELDS)
def test_there_are_changes_exactly_where_the_fields_differ(old: dict[str, Any], new: dict[str, Any]) -> None:
    as_numbers = [json.loads(json.dumps(fields)) for fields in (old, new)]
    assert bool(field_changes(old, new)) == (as_numbers[0] != as_numbers[1])
    assert not field_changes(old, json.loads(json.dumps(old)))
