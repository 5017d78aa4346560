"""Pieces of a page of results."""

from __future__ import annotations

import textwrap


def header(*names: str) -> list[str]:
    """Of a table whose columns but the first hold numbers."""
    return [line(*names), "|---|" + "---:|" * (len(names) - 1)]


def table(*names: str) -> list[str]:
    """Its header, after an empty line."""
    return ["", *header(*names)]


def line(*cells: str) -> str:
    """Of a table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def paragraph(text: str) -> list[str]:
    """On one line, after an empty one."""
    return ["", " ".join(text.split())]


def prose(text: str) -> list[str]:
    """A paragraph in lines of at most 120 letters, after an empty line."""
    return ["", *textwrap.wrap(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)]
