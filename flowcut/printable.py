"""Text of others on a terminal: a model's answer, a file's name, what a manifest says."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """`text` with escapes for what would move the cursor, set colours or turn the direction of writing.

    keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)
