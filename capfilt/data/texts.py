"""Text from the web or from a file, made safe to print on a terminal."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # meaningful inside words and emoji, and harmless on a terminal
_SPACES = "\t\n\x0b\x0c\r\x85\u2028\u2029"


def _safe(char: str) -> str:
    if char in _SPACES:
        return " "
    category = unicodedata.category(char)
    # Cc: C0, DEL, C1 (escape sequences start there); Cf: bidi controls, tags, zero-width; Cs: lone
    # surrogates, which cannot be encoded; Cn and Co: no agreed appearance.
    if category[0] == "C" and char not in _JOINERS:
        code = ord(char)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return char


def first_line(error: BaseException) -> str:
    """Give the first line of an error's message, or its class's name where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def clean_for_terminal(text: str, max_chars: int = 200) -> str:
    """Give `text` on one line, with everything a terminal could act upon written out as an escape.

    Line breaks and tabs become spaces; C0 and C1 controls (with them every escape sequence, OSC included),
    bidirectional controls, other invisible format characters, lone surrogates and unassigned code points
    become `\\x1b`-like escapes. A result longer than `max_chars` is cut and ends in "…".
    """
    if max_chars < 1:
        raise ValueError(f"max_chars is {max_chars}; expected at least 1")
    clipped = text[: max_chars + 1]  # an escape is never shorter than its character
    cleaned = "".join(map(_safe, clipped))
    return cleaned if len(cleaned) <= max_chars else cleaned[: max_chars - 1] + "…"
