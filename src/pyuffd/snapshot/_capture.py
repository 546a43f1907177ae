"""Parts of every method that writes the memory of a process, as it is at one instant, to a file.

The caller says where each mapping goes, so that a snapshot's pages and an ELF core are written by
the same code (`_methods.capture`). What the file cannot tell, the states of its pages, is returned.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from pyuffd import _dirty_calls as ranges
from pyuffd import _image_calls as calls
from pyuffd import _remote_calls as remote_calls
from pyuffd._errors import SnapshotError
from pyuffd._owned import Descriptor
from pyuffd._pages import PAGE_SIZE
from pyuffd.dirty._round import Pending
from pyuffd.pagemap import PageRanges
from pyuffd.remote._mappings import Mapping, MappingKind, Mappings
from pyuffd.remote._process import Process
from pyuffd.remote._stop import Stop
from pyuffd.snapshot import _own_pages
from pyuffd.snapshot._output import punch

Method = Literal["auto", "cow", "precopy", "stopped"]
Used = Literal["cow", "precopy", "stopped"]

# How much is copied before somebody may look at the clock, or at Ctrl-C.
SLICE = 32 << 20
STOP_LIMIT_S = 1.0
# What the stop may copy to memory; the file gets it afterwards.
MEMORY = 48 << 20
STOP_SLICE = 4 << 20
MADV_POPULATE_WRITE = 23
# Bytes a second that one CPU copies from another process, before anything was measured.
READ_SPEED = 1e9
# Bytes a second, before anything was measured.
SPEED = 1e9

_WORDS = 3


@dataclass(frozen=True, slots=True)
class Placed:
    """A mapping, or a part of one, and its place in the file.

    Attributes:
        mapping: The mapping at the instant.
        start: First address, a multiple of the page size.
        end: The address behind the last.
        offset: Where in the file, a multiple of the page size.
        whole: Also what the process has not written: all pages of the mapping's file. Shared memory
            needs it. Otherwise the pages that are the process's own.
    """

    mapping: Mapping
    start: int
    end: int
    offset: int
    whole: bool = False


# Called with the mappings, in the stop and perhaps before; an address keeps its place (`Places`).
Layout = Callable[[Mappings], Sequence[Placed]]


@dataclass
class SnapshotProgress:
    """How far it is; a callback may show it.

    Attributes:
        phase: "before" the stop, "stop", "sweep" behind it, "sums".
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
    stopped_s: float = math.inf  # for method "stopped", which needs as long as the copy lasts
    rounds: int = 8
    rate: float | None = None
    progress: Callable[[SnapshotProgress], None] | None = None
    in_stop: Callable[[Stop, Mappings, Sequence[Placed]], None] | None = None


@dataclass
class Captured:
    """The memory of one instant, in the file.

    Attributes:
        method: How it was captured.
        layout: What was captured: what the caller's layout said in the stop.
        data: Pages whose content is in the file.
        zero: Pages that are present and all zeros; they are holes in the file.
        lost: Pages whose content of that instant is not known; holes too.
        dropped: How many bytes of `lost` were given back by the process while it was captured.
        pause_s: How long the process stood.
        instant_ns: Time of day of the instant, while it stood.
        absent: Pages without content that had some in an earlier image, if only what was written
            since is in this one.
        rounds: Rounds before the stop.
        faults: Pages saved because a thread was about to write them.
        swept: Pages saved by the sweep.
        longest_wait_s: The longest time that a fault waited for us.
        stop_bytes: Bytes copied while the process stood.
        changes: What a tracker reported, and will not report again.
    """

    method: Used
    layout: Sequence[Placed] = ()
    data: memoryview = ranges.NO_RANGES
    zero: memoryview = ranges.NO_RANGES
    lost: memoryview = ranges.NO_RANGES
    absent: memoryview = ranges.NO_RANGES
    dropped: int = 0
    pause_s: float = 0.0
    instant_ns: int = 0
    rounds: int = 0
    faults: int = 0
    swept: int = 0
    longest_wait_s: float = 0.0
    stop_bytes: int = 0
    changes: Pending | None = None


# Tests wait here, or kill the process.
barrier: Callable[[str], None] | None = None


def at_barrier(name: str) -> None:
    """Tell a test how far it is."""
    if barrier is not None:
        barrier(name)


def pieces_of(layout: Sequence[Placed]) -> calls.Pieces:
    """Return a layout as C needs it."""
    return calls.Pieces((part.start, part.end, part.offset, part.whole) for part in layout)


class Writer:
    """Copies memory of a process to a file, and keeps the states of the pages."""

    def __init__(self, process: Process, fd: int, options: Options) -> None:
        self._process = process
        self._fd = fd
        self._options = options
        self._mem = _open_mem(process.memory_tid)
        self._begin = time.monotonic()
        self._bytes = 0
        self.speed = SPEED  # bytes a second, of the last copy that was long enough to tell
        self.read_speed = READ_SPEED
        self._memory: mmap.mmap | None = None
        self._taken = ranges.NO_RANGES
        self.data = self.zero = self.lost = self._written = ranges.NO_RANGES

    def copy(
        self,
        pages: memoryview,
        pieces: calls.Pieces,
        phase: str,
        *,
        slow: bool = False,
        until_s: float = math.inf,
    ) -> None:
        """Copy pages to their places; what was there is replaced.

        Raises:
            SnapshotError: "stalled" - it lasted until a time of the monotonic clock.
        """
        progress = SnapshotProgress(phase, 0, PageRanges(pages).bytes)
        begin = time.perf_counter()
        for part in slices(pages, SLICE):
            overwrite = bool(len(ranges.intersect(part, self._written)))
            copied = calls.copy(
                self._process.memory_tid,
                self._mem.number,
                part,
                pieces,
                self._fd,
                overwrite=overwrite,
            )
            self._note(part, copied)
            progress.bytes += copied.bytes
            if time.monotonic() > until_s:
                raise SnapshotError(
                    "stalled",
                    f"process {self._process.pid} would stand for longer than max_stall_s: after"
                    f" {self._options.stopped_s:g} s {progress.bytes / 1e6:.0f} of"
                    f" {progress.total / 1e6:.0f} MB were copied",
                )
            self._bytes += copied.bytes
            if self._options.progress is not None:
                self._options.progress(progress)
            if slow:
                self._wait()
        seconds = time.perf_counter() - begin
        if progress.total >= SLICE and seconds > 0:
            self.speed = progress.total / seconds

    def prepare(self) -> None:
        """Get the memory that `take` needs, before the stop."""
        if self._memory is None:
            self._memory = mmap.mmap(-1, MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # Linux 5.14
                self._memory.madvise(MADV_POPULATE_WRITE)

    def take(self, pages: memoryview, pieces: calls.Pieces, until_s: float) -> bool:
        """Copy pages in the stop: to memory, as the file may wait for its disk.

        What memory has no room for goes to the file. Returns False if that has not come to its end
        at a time of the monotonic clock; then nothing was taken.
        """
        assert self._memory is not None
        self._taken = ranges.NO_RANGES
        begin, done = time.perf_counter(), 0
        room = memoryview(self._memory)
        try:
            for part in slices(pages, STOP_SLICE):
                if time.monotonic() > until_s:
                    self._taken = ranges.NO_RANGES
                    return False
                size = PageRanges(part).bytes
                if done + size > MEMORY:
                    self.copy(part, pieces, "stop")
                    continue
                lost, _ = remote_calls.read_ranges(
                    self._process.memory_tid, part, room[done : done + size], None
                )
                if len(lost):  # without PROT_READ: /proc/PID/mem has it
                    self.copy(part, pieces, "stop")
                    continue
                self._taken = ranges.union(self._taken, part)
                done += size
        finally:
            room.release()
            if done >= STOP_SLICE:
                self.read_speed = done / (time.perf_counter() - begin)
        return True

    def write_taken(self, pieces: calls.Pieces) -> None:
        """Write what `take` copied to memory."""
        taken, self._taken = self._taken, ranges.NO_RANGES
        if not len(taken):
            return
        assert self._memory is not None
        overwrite = bool(len(ranges.intersect(taken, self._written)))
        zero = calls.write(taken, self._memory, pieces, self._fd, overwrite=overwrite)
        self._note(taken, calls.Copied(zero, ranges.NO_RANGES, 0))

    def _note(self, pages: memoryview, copied: calls.Copied) -> None:
        empty = ranges.subtract(copied.zero, copied.lost)
        full = ranges.subtract(pages, copied.zero)
        self._written = ranges.union(self._written, full)
        self.data = ranges.union(ranges.subtract(self.data, pages), full)
        self.zero = ranges.union(ranges.subtract(self.zero, pages), empty)
        self.lost = ranges.union(ranges.subtract(self.lost, pages), copied.lost)

    @property
    def fd(self) -> int:
        """The file."""
        return self._fd

    @property
    def mem_fd(self) -> int:
        """An open /proc/PID/mem, or -1."""
        return self._mem.number

    def add(self, data: memoryview, zero: memoryview, lost: memoryview) -> None:
        """Somebody else has written these."""
        self.data = ranges.union(self.data, data)
        self.zero = ranges.union(self.zero, zero)
        self.lost = ranges.union(self.lost, lost)

    def empty(self, pages: memoryview) -> None:
        """Note pages that are zeros, without reading them."""
        self._note(pages, calls.Copied(pages, ranges.NO_RANGES, 0))

    def forget(self, pages: memoryview) -> None:
        """Pages were dropped: what was copied of them is out of date."""
        self.data = ranges.subtract(self.data, pages)
        self.zero = ranges.subtract(self.zero, pages)
        self.lost = ranges.subtract(self.lost, pages)

    def without_content(self, pages: memoryview) -> memoryview:
        """Return the pages of which nothing is known."""
        for known in (self.data, self.zero, self.lost):
            pages = ranges.subtract(pages, known)
        return pages

    def punch(self, parts: Iterable[Placed]) -> None:
        """Make holes of what was written to the file and is out of date."""
        stale = PageRanges(ranges.subtract(self._written, self.data))
        if not len(stale):
            return
        for part in parts:
            span = PageRanges.of([(part.start, part.end)])
            for each in stale & span:
                punch(self._fd, part.offset + each.start - part.start, each.length)

    def _wait(self) -> None:
        if self._options.rate:
            due = self._begin + self._bytes / self._options.rate
            time.sleep(max(0.0, due - time.monotonic()))

    def result(self, captured: Captured) -> Captured:
        """Put in the states of the pages that are in the layout."""
        spans = PageRanges.of((part.start, part.end) for part in captured.layout).memoryview()
        captured.data = ranges.intersect(self.data, spans)
        captured.zero = ranges.intersect(self.zero, spans)
        captured.lost = ranges.intersect(self.lost, spans)
        return captured

    def close(self) -> None:
        """Close /proc/PID/mem, and free the memory."""
        self._mem.close()
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open_mem(pid: int) -> Descriptor:
    try:
        return Descriptor.open(f"/proc/{pid}/mem", os.O_RDONLY)
    except OSError:
        return Descriptor()  # process_vm_readv(2) says why, or does without


def slices(pages: memoryview, most: int) -> Iterator[memoryview]:
    """Yield packed ranges in parts of at most `most` bytes."""
    words: list[int] = []
    left = most
    for at in range(0, len(pages), _WORDS):
        start, end = pages[at], pages[at + 1]
        while start < end:
            step = min(left, end - start)
            words += (start, start + step, 0)
            start += step
            left -= step
            if not left:
                yield _packed(words)
                words, left = [], most
    if words:
        yield _packed(words)


def _packed(words: list[int]) -> memoryview:
    return memoryview(struct.pack(f"={len(words)}Q", *words)).cast("Q")


def content(
    process: Process, layout: Sequence[Placed], pieces: calls.Pieces, *, unprotected: bool = False
) -> memoryview:
    """Return the pages of a layout that have content, packed."""
    found = pieces.scan(process.pagemap.fileno(), unprotected=unprotected)
    found = _without_marks(process, layout, found)
    more = [span for part in layout if part.whole for span in _of_file(process.memory_tid, part)]
    return ranges.union(found, PageRanges.of(more).memoryview())


def _without_marks(process: Process, layout: Sequence[Placed], found: memoryview) -> memoryview:
    """Leave out pages that are not there and are tracked: the scan takes them for pages on swap.

    Reading one would give the process a page of zeros, or what the file behind it holds.
    """
    parts = [part for part in layout if not part.whole]
    if not parts or not len(found):
        return found
    start, end = min(part.start for part in parts), max(part.end for part in parts)
    return ranges.subtract(found, _own_pages.marks(process, start, end).memoryview())


def _of_file(pid: int, part: Placed) -> Iterator[tuple[int, int]]:
    """Yield what the file has behind a part, whether it is in the page table or not."""
    mapping = part.mapping
    if mapping.kind in (MappingKind.PRIVATE_FILE, MappingKind.SHARED_FILE):
        yield part.start, part.end
    elif mapping.kind is MappingKind.SHMEM:
        # Reading a hole would fill it.
        path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        try:
            with Descriptor.open(path, os.O_RDONLY) as file:
                yield from _data_of(file.number, part)
        except OSError:
            return  # no privilege to open it: what is in the page table has to do


def _data_of(fd: int, part: Placed) -> Iterator[tuple[int, int]]:
    shift = part.mapping.start - part.mapping.offset
    at, end = part.start - shift, part.end - shift
    while at < end:
        try:
            first = os.lseek(fd, at, os.SEEK_DATA) // PAGE_SIZE * PAGE_SIZE
            at = -(-os.lseek(fd, first, os.SEEK_HOLE) // PAGE_SIZE) * PAGE_SIZE
        except OSError:  # ENXIO: no more data
            return
        if first < end:
            yield first + shift, min(at, end) + shift


class Places:
    """Gives every address one place in a file, whatever is mapped there meanwhile.

    A layout that is asked more than once must not move anything.
    """

    def __init__(self, offset: int = 0) -> None:
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
        part = (start, end, self.end)
        self.end += end - start
        return part


def stopped(process: Process, layout_of: Layout, writer: Writer, options: Options) -> Captured:
    """Copy everything in the stop."""
    captured = Captured("stopped")
    begin = time.perf_counter()
    until_s = time.monotonic() + options.stopped_s
    with process.stopped(options.stop_limit_s) as stop:
        at_barrier("stopped")
        captured.instant_ns = time.time_ns()
        mappings = process.mappings()
        captured.layout = layout_of(mappings)
        if options.in_stop is not None:
            options.in_stop(stop, mappings, captured.layout)
        pieces = pieces_of(captured.layout)
        pages = content(process, captured.layout, pieces)
        writer.copy(pages, pieces, "stop", until_s=until_s)
        captured.stop_bytes = PageRanges(pages).bytes
        at_barrier("copied")
        process.check()
    captured.pause_s = time.perf_counter() - begin
    stop.check()
    return captured
