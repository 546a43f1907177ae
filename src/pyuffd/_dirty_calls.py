"""Rounds of dirty tracking and sets of packed ranges, in C (layer L2).

Everything is packed and in ascending order. Every call releases the GIL.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pyuffd._enums import Number
from pyuffd._errors import raise_errno
from pyuffd._limits import raise_limit
from pyuffd._owned import Owner
from pyuffd._rows import new_ranges, rows_of, take_ranges
from pyuffd._shim import ffi, lib

PEEK = lib.UFFD_ROUND_PEEK
HOLES_APART = lib.UFFD_ROUND_HOLES_APART
# Mappings that are registered, unregistered or scanned by one call.
AT_ONCE = lib.UFFD_ARM_AT_ONCE

NO_RANGES = memoryview(b"").cast("Q")

_WORDS = 3  # of a range
_TRACKED_WORDS, _TRACKED_ERROR = 7, 5  # of a `struct uffd_tracked`
# Each set has an object of its own until it becomes a part of a larger one.
_GATHERED_MOST = 4096


class Track(Number):
    """How a mapping is tracked.

    Attributes:
        DENSE: Every page is protected, holes too.
        SPARSE: Only populated pages are protected; holes are compared with the round before.
        HUGE: Hugetlb pages, protected by UFFDIO_WRITEPROTECT.
    """

    DENSE = lib.UFFD_TRACK_DENSE
    SPARSE = lib.UFFD_TRACK_SPARSE
    HUGE = lib.UFFD_TRACK_HUGE


class Backing(Number):
    """The content of a page without an entry in the page table.

    Attributes:
        FILE: What its file holds.
        ZERO: Zeros: private anonymous memory.
        COPIED: What its file holds; a page written here is a private copy.
    """

    FILE = lib.UFFD_BACKING_FILE
    ZERO = lib.UFFD_BACKING_ZERO
    COPIED = lib.UFFD_BACKING_COPIED


class TrackedRows:
    """The mappings that a round scans: (start, end, track, backing, userfaultfd), in C memory."""

    def __init__(self, rows: Iterable[tuple[int, int, Track, Backing, int]]) -> None:
        words = array("Q", chain.from_iterable((*row, 0, 0) for row in rows))
        self._count = len(words) // _TRACKED_WORDS
        # The constructor of cffi is slow with many rows.
        self._vec: Any = ffi.new("struct uffd_tracked[]", self._count)
        ffi.buffer(self._vec)[:] = words.tobytes()

    def __len__(self) -> int:
        return self._count

    def register(self) -> None:
        """Register all for write protection; `errors()` tells afterwards which were refused."""
        lib.uffd_arm_register(self._vec, self._count)

    def protect(self, uffd: int) -> bool:
        """Protect those that were registered, with a userfaultfd of their process.

        Returns:
            Whether all of them are protected: part of the memory may be gone.
        """
        return bool(lib.uffd_arm_protect(uffd, self._vec, self._count) == 0)

    def unregister(self) -> None:
        """Unregister all; `errors()` tells afterwards of which mappings nothing was."""
        lib.uffd_arm_unregister(self._vec, self._count)

    def errors(self) -> list[tuple[int, int]]:
        """Return index and errno of each mapping that the last call has failed for."""
        if not self._count:
            return []
        words = memoryview(ffi.buffer(self._vec)).cast("Q")[_TRACKED_ERROR::_TRACKED_WORDS]
        if not words.tobytes().strip(b"\0"):
            return []  # nearly always, and there may be many
        return [(index, code) for index, code in enumerate(words) if code]


@dataclass(frozen=True, slots=True)
class Found:
    """What a round found, packed; `known` is for the next round to compare with."""

    written: memoryview
    dropped: memoryview
    known: memoryview


def round_(pagemap_fd: int, rows: TrackedRows, flags: int, known: memoryview) -> Found:
    """Scan all mappings; `rows.errors()` tells afterwards which scans failed."""
    results = [new_ranges() for _ in range(3)]
    vec, count = rows_of(known)
    code = lib.uffd_round(pagemap_fd, rows._vec, len(rows), flags, vec, count, *results)
    found = Found(*(take_ranges(result) for result in results))
    if code:
        raise_errno("PAGEMAP_SCAN", -code)
    return found


class DropReader(Owner):
    """A process that reads the REMOVE events of a userfaultfd, until `close`."""

    _instead = "make another reader"

    def __init__(self, uffd: int) -> None:
        super().__init__(ffi.new("struct uffd_drops **"), lib.uffd_drops_destroy)
        code = lib.uffd_drops_create(uffd, self._cell)
        if code:
            raise_limit("starting a reader of events", -code)

    def take(self) -> tuple[memoryview, bool]:
        """Return the ranges of the events since the last call, and whether some are lost."""
        result, lost = new_ranges(), ffi.new("uint32_t *")
        code = lib.uffd_drops_take(self._cell[0], result, lost)
        packed = take_ranges(result)
        if code:
            raise_errno("events of dropped memory", -code)
        return packed, bool(lost[0])

    def close(self) -> None:
        """End it; may be called again."""
        ffi.release(self._cell)


def populated(pagemap_fd: int, start: int, end: int) -> int:
    """Return the bytes of [start, end) that are present or on swap."""
    out = ffi.new("uint64_t *")
    code = lib.uffd_round_populated(pagemap_fd, start, end, out)
    if code:
        raise_errno("PAGEMAP_SCAN", -code, start, end - start)
    return int(out[0])


def union(a: memoryview, b: memoryview) -> memoryview:
    """Return the pages that are in either set."""
    if not len(a) or not len(b):
        return a if len(a) else b
    return _combined(lib.uffd_ranges_union, a, b)


def subtract(a: memoryview, b: memoryview) -> memoryview:
    """Return the pages of `a` that are not in `b`."""
    return _combined(lib.uffd_ranges_subtract, a, b) if len(a) and len(b) else a


def intersect(a: memoryview, b: memoryview) -> memoryview:
    """Return the pages that are in both sets."""
    return _combined(lib.uffd_ranges_intersect, a, b) if len(a) and len(b) else NO_RANGES


class Gathered:
    """Pages that come in many small sets: a union with each would read all of the others."""

    def __init__(self) -> None:
        self._sets: list[memoryview] = []

    def add(self, pages: memoryview) -> None:
        """Add pages."""
        if len(pages):
            self._sets.append(pages)
        if len(self._sets) >= _GATHERED_MOST:
            self._sets = [self.all()]

    def all(self) -> memoryview:
        """Return all pages that were added."""
        sets = self._sets
        while len(sets) > 1:
            rest = sets[-1:] if len(sets) % 2 else []
            sets = [union(a, b) for a, b in zip(sets[::2], sets[1::2], strict=False)] + rest
        return sets[0] if sets else NO_RANGES


def around(a: memoryview, start: int, end: int) -> memoryview:
    """Return the ranges of a set that reach into [start, end), as a part of the same memory."""
    rows = range(len(a) // _WORDS)
    first = bisect_right(rows, start, key=lambda row: a[row * _WORDS + 1])
    last = bisect_left(rows, end, lo=first, key=lambda row: a[row * _WORDS])
    return a[first * _WORDS : last * _WORDS]


def bytes_in(a: memoryview, spans: memoryview) -> list[int]:
    """Return how many bytes of each span are in a set."""
    first, first_count = rows_of(a)
    second, second_count = rows_of(spans)
    out = ffi.new("uint64_t[]", second_count or 1)
    lib.uffd_ranges_bytes_in(first, first_count, second, second_count, out)
    return list(out[0:second_count])


def _combined(function: Any, a: memoryview, b: memoryview) -> memoryview:
    first, first_count = rows_of(a)
    second, second_count = rows_of(b)
    result = new_ranges()
    code = function(first, first_count, second, second_count, result)
    packed = take_ranges(result)
    if code:
        raise_errno("ranges of pages", -code)
    return packed
