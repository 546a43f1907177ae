"""Which parts of a range are still served: spans of offsets, in order (layer L4)."""

from __future__ import annotations

from collections.abc import Iterable

Part = tuple[int, int]  # [begin, end), offsets in the range as it was served


def without(parts: Iterable[Part], begin: int, end: int) -> list[Part]:
    """Return the parts without [begin, end)."""
    left = []
    for first, past in parts:
        left += [
            (at, to) for at, to in ((first, min(past, begin)), (max(first, end), past)) if at < to
        ]
    return left


def holds(parts: Iterable[Part], begin: int, end: int) -> bool:
    """Return whether one of the parts has all of [begin, end)."""
    return any(first <= begin and end <= past for first, past in parts)


def reaches(parts: Iterable[Part], begin: int, end: int) -> bool:
    """Return whether one of the parts has some of [begin, end)."""
    return any(first < end and begin < past for first, past in parts)


def shown(parts: Iterable[Part], start: int) -> str:
    """Return the parts as text, by address."""
    return ", ".join(f"[{start + first:#x}, +{past - first:#x})" for first, past in parts)
