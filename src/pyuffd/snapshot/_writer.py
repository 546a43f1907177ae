"""`Writer`: copies memory of a process to its places in a file, and keeps the pages' states."""

from __future__ import annotations

import errno
import math
import mmap
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pyuffd import _dirty_calls as ranges
from pyuffd import _image_calls as calls
from pyuffd import _remote_calls as remote_calls
from pyuffd._errors import SnapshotError, UffdOSError, raise_if_short
from pyuffd._machine import why_no_memory
from pyuffd._owned import Descriptor
from pyuffd._pages import PAGE_SIZE
from pyuffd.pagemap import PageRanges
from pyuffd.remote._process import Process
from pyuffd.snapshot._capture import Captured, Options, Placed, SnapshotProgress, in_parts
from pyuffd.snapshot._output import punch

# How much is copied before somebody may look at the clock, or at Ctrl-C.
SLICE = 16 << 20
# What the stop may copy to memory; the file gets it afterwards.
MEMORY = 48 << 20
STOP_SLICE = 4 << 20
MADV_POPULATE_WRITE = 23
# What may be written between the last look and the stop.
SPARE = 1 << 20
# Bytes a second that one CPU copies from another process, before anything was measured.
READ_SPEED = 1e9
# Bytes a second, before anything was measured.
SPEED = 1e9

_WORDS = 3


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
        self._prepared = 0
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
                gentle=slow,
            )
            self._note(part, copied)
            if slow and self._options.durable:
                calls.begin_sync(self._fd)
            progress.bytes += copied.bytes
            if time.monotonic() > until_s:
                raise SnapshotError(
                    "stalled",
                    f"process {self._process.pid} would be stopped for longer than max_stall_s:"
                    f" after {self._options.stopped_s:g} s {progress.bytes / 1e6:.0f} of"
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

    def prepare(self, size: int) -> None:
        """Get the memory that `take` needs for about this many bytes, before the stop.

        More of it than that costs the stop page faults; all of it, each snapshot.
        """
        if self._memory is None:
            try:
                self._memory = mmap.mmap(-1, MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                hint = why_no_memory(MEMORY, accounted=True)
                code = error.errno or errno.ENOMEM
                raise UffdOSError(code, "memory for the stop: mmap", hint=hint) from None
            with suppress(OSError):  # without transparent huge pages it needs longer
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        wanted = min(MEMORY, -(-(size + size // 2 + SPARE) // PAGE_SIZE) * PAGE_SIZE)
        if wanted > self._prepared:
            with suppress(OSError):  # Linux 5.14
                self._memory.madvise(MADV_POPULATE_WRITE, 0, wanted)
            self._prepared = wanted

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

    def punch(self, *layouts: Sequence[Placed], without: memoryview = ranges.NO_RANGES) -> None:
        """Make holes of what was written to the file and is out of date.

        `without`: addresses at which others have written since.
        """
        stale = ranges.subtract(ranges.subtract(self._written, self.data), without)
        for layout in layouts:
            for part, start, end in in_parts(layout, stale):
                punch(self._fd, part.offset + start - part.start, end - start)

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
        captured.written = self._written
        return captured

    def close(self) -> None:
        """Close /proc/PID/mem, and free the memory; may be called again."""
        self._mem.close()
        if self._memory is not None:
            with suppress(BufferError):  # the traceback of an exception looks at it, and frees it
                self._memory.close()
            self._memory = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open_mem(pid: int) -> Descriptor:
    try:
        return Descriptor.open(f"/proc/{pid}/mem", os.O_RDONLY)
    except OSError as error:
        raise_if_short(f"open {error.filename}", error)
        return Descriptor()  # process_vm_readv(2) says why, or does without


def slices(pages: memoryview, most: int) -> Iterator[memoryview]:
    """Yield packed ranges in parts of at most `most` bytes."""
    if len(pages) and PageRanges(pages).bytes <= most:
        yield pages
        return
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
