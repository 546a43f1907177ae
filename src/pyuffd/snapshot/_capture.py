"""Write the memory of a process, as it is at one instant, to a file.

The caller says where each mapping goes, so that a snapshot's pages and an ELF core are written by
the same code. What cannot be told from the file, the states of the pages, is returned.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pyuffd import _dirty_calls as ranges
from pyuffd import _image_calls as calls
from pyuffd._owned import Descriptor
from pyuffd._pages import PAGE_SIZE
from pyuffd.pagemap import PageRanges
from pyuffd.remote._mappings import Mapping, MappingKind, Mappings
from pyuffd.remote._process import Process
from pyuffd.remote._stop import Stop

Method = Literal["auto", "cow", "precopy", "stopped"]
Used = Literal["cow", "precopy", "stopped"]

# How much is copied before somebody may look at the clock, or at Ctrl-C.
SLICE = 32 << 20
STOP_LIMIT_S = 1.0

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


Layout = Callable[[Mappings], Sequence[Placed]]


@dataclass
class Progress:
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
    rounds: int = 8
    rate: float | None = None
    progress: Callable[[Progress], None] | None = None
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
        rounds: Rounds before the stop.
        faults: Pages saved because a thread was about to write them.
        swept: Pages saved by the sweep.
        longest_wait_s: The longest time that a fault waited for us.
        stop_bytes: Bytes copied while the process stood.
    """

    method: Used
    layout: Sequence[Placed] = ()
    data: memoryview = ranges.NO_RANGES
    zero: memoryview = ranges.NO_RANGES
    lost: memoryview = ranges.NO_RANGES
    dropped: int = 0
    pause_s: float = 0.0
    instant_ns: int = 0
    rounds: int = 0
    faults: int = 0
    swept: int = 0
    longest_wait_s: float = 0.0
    stop_bytes: int = 0


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
        self._mem = _open_mem(process.pid)
        self._begin = time.monotonic()
        self._bytes = 0
        self.data = self.zero = self.lost = ranges.NO_RANGES

    def copy(
        self, pages: memoryview, pieces: calls.Pieces, phase: str, *, slow: bool = False
    ) -> None:
        """Copy pages to their places; what was there is replaced."""
        progress = Progress(phase, 0, PageRanges(pages).bytes)
        for part in slices(pages, SLICE):
            known = ranges.union(self.data, self.lost)
            overwrite = bool(len(ranges.intersect(part, known)))
            copied = calls.copy(
                self._process.pid, self._mem.number, part, pieces, self._fd, overwrite=overwrite
            )
            self._note(part, copied)
            progress.bytes += copied.bytes
            self._bytes += copied.bytes
            if self._options.progress is not None:
                self._options.progress(progress)
            if slow:
                self._wait()

    def _note(self, pages: memoryview, copied: calls.Copied) -> None:
        empty = ranges.subtract(copied.zero, copied.lost)
        self.data = ranges.union(
            ranges.subtract(self.data, pages), ranges.subtract(pages, copied.zero)
        )
        self.zero = ranges.union(ranges.subtract(self.zero, pages), empty)
        self.lost = ranges.union(ranges.subtract(self.lost, pages), copied.lost)

    def forget(self, pages: memoryview) -> None:
        """Pages were dropped: they are zeros in the process, and nothing at all in the snapshot."""
        self.data = ranges.subtract(self.data, pages)
        self.zero = ranges.subtract(self.zero, pages)
        self.lost = ranges.subtract(self.lost, pages)

    def _wait(self) -> None:
        if self._options.rate:
            due = self._begin + self._bytes / self._options.rate
            time.sleep(max(0.0, due - time.monotonic()))

    def result(self, captured: Captured) -> Captured:
        """Put the states in."""
        captured.data, captured.zero, captured.lost = self.data, self.zero, self.lost
        return captured

    def close(self) -> None:
        """Close /proc/PID/mem."""
        self._mem.close()

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


def capture(
    process: Process,
    layout_of: Layout,
    fd: int,
    *,
    method: Used = "stopped",
    options: Options | None = None,
) -> Captured:
    """Write the memory of a process at one instant to a file.

    Args:
        process: The process.
        layout_of: Called with the mappings; returns what goes where. It is called in the stop, and
            may be called before it with the mappings of that time.
        fd: The file, empty at the places of the layout.
        method: "stopped": everything is copied in the stop.
        options: Limits; callbacks. `in_stop` is called when all threads are stopped, with the stop,
            the mappings and their places, to read what else has to be of the same instant.

    Raises:
        ProcessGoneError: ESRCH - it has exited, or replaced its memory.
        StopTimeoutError: ETIMEDOUT - it cannot be stopped.
        UffdOSError: ENOSPC, EIO, EFBIG - writing the file failed.
    """
    options = options or Options()
    with Writer(process, fd, options) as writer:
        return writer.result(_stopped(process, layout_of, writer, options))


def content(
    process: Process, layout: Sequence[Placed], pieces: calls.Pieces, *, unprotected: bool = False
) -> memoryview:
    """Return the pages of a layout that have content, packed."""
    found = pieces.scan(process.pagemap.fileno(), unprotected=unprotected)
    more = [span for part in layout if part.whole for span in _of_file(process.pid, part)]
    return ranges.union(found, PageRanges.of(more).memoryview())


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


def _stopped(process: Process, layout_of: Layout, writer: Writer, options: Options) -> Captured:
    captured = Captured("stopped")
    begin = time.perf_counter()
    with process.stopped(options.stop_limit_s) as stop:
        at_barrier("stopped")
        captured.instant_ns = time.time_ns()
        mappings = process.mappings()
        captured.layout = layout_of(mappings)
        if options.in_stop is not None:
            options.in_stop(stop, mappings, captured.layout)
        pieces = pieces_of(captured.layout)
        pages = content(process, captured.layout, pieces)
        writer.copy(pages, pieces, "stop")
        captured.stop_bytes = PageRanges(pages).bytes
        at_barrier("copied")
        process.check()
    captured.pause_s = time.perf_counter() - begin
    return captured
