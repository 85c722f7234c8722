"""Text in CSV files that spreadsheets open: a cell that a spreadsheet would take for a formula is made plain text.

    cell = to_cell(text)        text = from_cell(cell)

A text that begins with a sign of formulas, or with an apostrophe, gets an apostrophe in front, which spreadsheets take
for "this is text". One with NUL, which many readers of CSV end at, gets an apostrophe and a backslash, and NUL and
backslashes inside are written `\\0` and `\\\\`. Every other text is its own cell. Numbers stay as they are.
"""

from __future__ import annotations

import re

FORMULA_SIGNS = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
"""What a formula begins with, full-width forms included, and what is passed over before it."""

_ESCAPES = re.compile(r"\\(.)", re.DOTALL)


def to_cell(text: str) -> str:
    """The cell of a text."""
    if "\0" in text:
        return "'\\" + text.replace("\\", "\\\\").replace("\0", "\\0")
    return f"'{text}" if text.startswith((*FORMULA_SIGNS, "'")) else text


def from_cell(cell: str) -> str:
    """The text of a cell that `to_cell` made."""
    if cell.startswith("'\\"):
        return _ESCAPES.sub(lambda match: "\0" if match[1] == "0" else match[1], cell[2:])
    return cell.removeprefix("'")
