"""Pieces of a page of results."""

from __future__ import annotations

import textwrap


def header(*names: str) -> list[str]:
    """Of a table whose columns but the first hold numbers."""
    return [line(*names), "|---|" + "---:|" * (len(names) - 1)]


def line(*cells: str) -> str:
    """Of a table."""
    return f"| {' | '.join(cells)} |"


def prose(text: str) -> list[str]:
    """A paragraph, after an empty line."""
    return ["", *textwrap.wrap(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)]
