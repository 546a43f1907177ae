"""Words for what commands print (layer L6); they use public names only, so not `_describe`."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 page", "2 pages"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
