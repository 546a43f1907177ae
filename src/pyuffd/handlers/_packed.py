"""Ranges of pages as 64-bit words, for calls that take many (layer L4)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pyuffd._arguments import check_int, shown
from pyuffd.handlers._checkpoint import StateRanges

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Ranges = StateRanges | Buffer | Iterable[Sequence[int]]

WIDTHS = (2, 3)  # start and end, and perhaps a state


class Packed(NamedTuple):
    """Native 64-bit words, `width` for each range; the first two are where it begins and ends."""

    words: bytes
    width: int


class FileRuns(NamedTuple):
    """The content of a range in files: packed rows (offset, leaf, offset in the leaf).

    Leaf 0 is zeros, leaf n + 1 the file of descriptor `fds[n]`.
    """

    runs: memoryview
    length: int
    fds: Sequence[int]


def packed(ranges: Ranges) -> Packed:
    """Return ranges as words; TypeError or ValueError for anything else."""
    if isinstance(ranges, StateRanges):
        return Packed(ranges.memoryview().tobytes(), 3)
    try:
        view = memoryview(ranges)  # type: ignore[arg-type]
    except TypeError:
        return _packed_pairs(ranges)  # type: ignore[arg-type]
    shape = view.shape or ()
    if len(shape) != 2 or shape[1] not in WIDTHS or view.format not in ("Q", "L", "q", "l"):
        raise ValueError(
            f"ranges: an array has two or three columns of 64-bit numbers, not shape {shape} and"
            f" format {view.format!r}"
        )
    return Packed(view.tobytes(), shape[1])


def _packed_pairs(ranges: Iterable[Sequence[int]]) -> Packed:
    words = array("Q")
    try:
        for pair in ranges:
            if len(pair) < 2:
                raise TypeError
            start, end, *_ = pair
            words.append(check_int("ranges", start, 0, 1 << 64))
            words.append(check_int("ranges", end, 0, 1 << 64))
    except TypeError:
        raise TypeError(
            f"ranges must be an array or pairs of offsets (start, end), not {shown(ranges)}"
        ) from None
    return Packed(words.tobytes(), 2)
