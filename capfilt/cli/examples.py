"""Examples of every command, as its help and docs/cli.md show them. Tests parse each of them."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {}
"""Words of a command → command lines, each with what it is for."""
