"""Text for HTML. Nothing that came from the web, a file or a model gets into a page but through `escaped`."""

from __future__ import annotations

import html

from capfilt.data.texts import clean_for_terminal

MAX_TEXT_CHARS = 500


def escaped(value: object) -> str:
    """Anything untrusted as HTML text, or inside a quoted attribute."""
    return html.escape(clean_for_terminal(str(value), MAX_TEXT_CHARS), quote=True)
