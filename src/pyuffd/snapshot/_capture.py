"""Parts of every method that writes the memory of a process, as it is at one instant, to a file.

The caller says where each mapping goes, so that a snapshot's pages and an ELF core are written by
the same code (`_methods.capture`). What the file cannot tell, the states of its pages, is returned.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Literal, TypeVar

from pyuffd import _dirty_calls as ranges
from pyuffd import _image_calls as calls
from pyuffd._pages import HUGE_PAGE_2M
from pyuffd.dirty._round import Pending
from pyuffd.pagemap import PageRanges
from pyuffd.remote._mappings import Mapping, MappingKind, Mappings
from pyuffd.remote._process import Process
from pyuffd.remote._stop import Stop
from pyuffd.snapshot import _own_pages

Method = Literal["auto", "cow", "precopy", "stopped"]
Used = Literal["cow", "precopy", "stopped"]

STOP_LIMIT_S = 1.0

# Ranges of this size get places that are as far from a huge page's beginning as their addresses,
# so that a restore can map the page cache with one fault for 2 MiB; at most an eighth is a hole.
ALIGNED_FROM = 16 << 20
WITHOUT_FILE = (MappingKind.ANONYMOUS, MappingKind.HEAP, MappingKind.STACK)
DISK = (MappingKind.PRIVATE_FILE, MappingKind.SHARED_FILE)


@dataclass(frozen=True, slots=True)
class Placed:
    """A mapping, or a part of one, and its place in the file.

    Attributes:
        mapping: The mapping at the instant.
        start: First address, a multiple of the page size.
        end: The address behind the last.
        offset: Where in the file, a multiple of the page size.
        whole: Also what the process has not written: all pages of the mapping's file. Shared memory
            needs it, and private memory whose file cannot be opened. Otherwise the pages that are
            the process's own.
    """

    mapping: Mapping
    start: int
    end: int
    offset: int
    whole: bool = False


# Called with the mappings, in the stop and perhaps before; an address keeps its place (`Places`).
# While nothing changes it returns the same list, of which everything is known (`Frame`).
Layout = Callable[[Mappings], Sequence[Placed]]


@dataclass
class SnapshotProgress:
    """How far it is; a callback may show it.

    Attributes:
        phase: "before" the stop, "stop", "sweep" behind it, "sums"; at last "name", when all is
            written and gets its name next.
        bytes: Bytes done in this phase.
        total: Of how many; 0 if that is unknown.
    """

    phase: str = "before"
    bytes: int = 0
    total: int = 0


@dataclass
class Options:
    """What applies to every method."""

    stop_limit_s: float = STOP_LIMIT_S
    max_stall_s: float = 0.05
    # What is copied in the stop as it was agreed to: everything with "stopped", or shared memory.
    stopped_s: float = math.inf
    asleep_s: float = math.inf  # for "stopped": how long it may wait for a thread in the kernel
    rounds: int = 8
    rate: float | None = None
    durable: bool = False  # somebody will wait for the disk: it may begin early
    progress: Callable[[SnapshotProgress], None] | None = None
    in_stop: Callable[[Stop, Mappings, Sequence[Placed]], Sequence[Placed]] | None = None


@dataclass
class Captured:
    """The memory of one instant, in the file.

    Attributes:
        method: How it was captured.
        layout: What was captured: what the caller's layout said in the stop.
        data: Pages whose content is in the file.
        zero: Pages that are present and all zeros; they are holes in the file.
        lost: Pages whose content of that instant is not known; holes too.
        dropped: Those of them that were given back by the process while it was captured.
        unseen: Those of them that are not known to have content.
        pause_s: How long the process was stopped.
        instant_ns: Time of day of the instant, while it was stopped.
        absent: Pages without content that had some in an earlier image, if only what was written
            since is in this one.
        rounds: Rounds before the stop.
        faults: Pages saved because a thread was about to write them.
        swept: Pages saved by the sweep.
        longest_wait_s: The longest time that a fault waited for us.
        stop_bytes: Bytes read while it was stopped; of shared memory only changes are written.
        changes: What a tracker reported, and will not report again.
        written: Pages that were written to their places at any time, also if they are in no
            layout any more.
    """

    method: Used
    layout: Sequence[Placed] = ()
    data: memoryview = ranges.NO_RANGES
    zero: memoryview = ranges.NO_RANGES
    lost: memoryview = ranges.NO_RANGES
    absent: memoryview = ranges.NO_RANGES
    dropped: memoryview = ranges.NO_RANGES
    unseen: memoryview = ranges.NO_RANGES
    pause_s: float = 0.0
    instant_ns: int = 0
    rounds: int = 0
    faults: int = 0
    swept: int = 0
    longest_wait_s: float = 0.0
    stop_bytes: int = 0
    changes: Pending | None = None
    written: memoryview = ranges.NO_RANGES


# Tests wait here, or kill the process.
barrier: Callable[[str], None] | None = None


def at_barrier(name: str) -> None:
    """Tell a test how far it is."""
    if barrier is not None:
        barrier(name)


def pieces_of(layout: Sequence[Placed]) -> calls.Pieces:
    """Return a layout as C needs it."""
    return calls.Pieces(
        (part.start, part.end, part.offset, part.whole or has_no_file(part.mapping))
        for part in layout
    )


class Frame:
    """What is made of a layout for C, once: in the stop there is no time for each mapping.

    A layout that has not changed since is the same list, see `Layout`.
    """

    def __init__(self, layout: Sequence[Placed]) -> None:
        self.layout = layout

    @cached_property
    def pieces(self) -> calls.Pieces:
        """The places."""
        return pieces_of(self.layout)

    @cached_property
    def rows(self) -> memoryview:
        """Its parts, one by one, packed."""
        return packed(self.layout)

    @cached_property
    def spans(self) -> memoryview:
        """Its pages, packed."""
        return PageRanges.of((part.start, part.end) for part in self.layout).memoryview()

    @cached_property
    def behind(self) -> memoryview:
        """Those of them that a file on a disk may have, in the page table or not."""
        return PageRanges.of(
            (part.start, part.end)
            for part in self.layout
            if part.whole and (part.mapping.kind in DISK or not part.mapping.shared)
        ).memoryview()

    def content(self, process: Process, *, within: memoryview | None = None) -> memoryview:
        """Return the pages that have content, packed; `within` packed ranges only."""
        if not self.layout:
            return ranges.NO_RANGES
        found = own_content(process, self.pieces, within=within)
        behind = self.behind
        return ranges.union(found, behind if within is None else ranges.intersect(behind, within))


F = TypeVar("F", bound=Frame)


class Frames(Generic[F]):
    """The frame of mappings, which is kept while their layout is the same.

    Attributes:
        last: The one that was returned last.
    """

    def __init__(self, layout_of: Layout, kind: type[F]) -> None:
        self._layout_of = layout_of
        self._kind = kind
        self.last = kind([])

    def of(self, mappings: Mappings) -> F:
        """Return the frame of these mappings."""
        layout = self._layout_of(mappings)
        if layout is not self.last.layout:
            self.last = self._kind(layout)
        return self.last


def in_parts(layout: Iterable[Placed], pages: memoryview) -> Iterator[tuple[Placed, int, int]]:
    """Yield what the parts of a layout have of packed pages, both in ascending order."""
    parts = iter(layout)
    part = next(parts, None)
    for each in PageRanges(pages):
        while part is not None and part.start < each.end:
            first, last = max(part.start, each.start), min(part.end, each.end)
            if first < last:
                yield part, first, last
            if part.end > each.end:
                break
            part = next(parts, None)


def packed(parts: Iterable[Placed]) -> memoryview:
    """Return parts in ascending order as C takes them, also where they touch."""
    words = [word for part in parts for word in (part.start, part.end, 0)]
    return memoryview(struct.pack(f"={len(words)}Q", *words)).cast("Q")


def has_no_file(mapping: Mapping) -> bool:
    """Whether no page of a mapping can be one of a file."""
    return not mapping.has_file and mapping.kind in WITHOUT_FILE


def own_content(
    process: Process,
    pieces: calls.Pieces,
    *,
    unprotected: bool = False,
    within: memoryview | None = None,
) -> memoryview:
    """Return the pages in the page table that have content, packed; `within` packed ranges only.

    The scan takes what has a mark for a page on swap. Reading one would give the process a page of
    zeros, or what the file behind it holds.
    """
    pagemap = process.pagemap.fileno()
    found, swapped = pieces.scan_apart(pagemap, unprotected=unprotected, within=within)
    if not len(swapped):
        return found
    empty = _own_pages.marks(process, PageRanges(swapped))
    return ranges.subtract(found, empty.memoryview())


class Places:
    """Gives every address one place in a file, whatever is mapped there meanwhile.

    A layout that is asked more than once must not move anything.

    Args:
        offset: The first place.
        for_mapping: Give large ranges places that the kernel can map with huge pages.
    """

    def __init__(self, offset: int = 0, *, for_mapping: bool = False) -> None:
        self._for_mapping = for_mapping
        self._known: list[tuple[int, int, int]] = []
        self._whole: dict[tuple[int, int], int] = {}  # ranges that are one part
        self.end = offset

    def of(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield the parts (start, end, offset) of a range, in ascending order."""
        if (offset := self._whole.get((start, end))) is not None:
            yield start, end, offset
            return
        first = bisect_right(self._known, start, key=lambda known: known[1])
        new: list[tuple[int, int, int]] = []
        at = start
        for known in self._known[first:]:
            if known[0] >= end:
                break
            if at < known[0]:
                new.append(self._new(at, known[0]))
                yield new[-1]
                at = known[0]
            stop = min(end, known[1])
            yield at, stop, known[2] + at - known[0]
            at = stop
        if at < end:
            new.append(self._new(at, end))
            yield new[-1]
        for part in new:
            insort(self._known, part)
            self._whole[part[0], part[1]] = part[2]

    def _new(self, start: int, end: int) -> tuple[int, int, int]:
        if self._for_mapping and end - start >= ALIGNED_FROM:
            self.end += (start - self.end) % HUGE_PAGE_2M
        part = (start, end, self.end)
        self.end += end - start
        return part
