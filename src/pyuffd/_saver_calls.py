"""Saving another process's pages before they are written, in C (layer L2).

Every call releases the GIL.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyuffd._errors import raise_errno
from pyuffd._image_calls import Pieces
from pyuffd._limits import raise_limit
from pyuffd._owned import Owner
from pyuffd._rows import new_ranges, rows_of, take_ranges
from pyuffd._shim import ffi, lib

DATA = lib.UFFD_OWED_DATA
ZERO = lib.UFFD_OWED_ZERO
DROPPED = lib.UFFD_OWED_DROPPED
UNREADABLE = lib.UFFD_OWED_UNREADABLE


@dataclass(frozen=True, slots=True)
class SaverStats:
    """Pages, the longest time that a fault waited, and calls that woke; `error` is an errno."""

    faults: int
    swept: int
    before: int
    left: int
    dropped: int
    longest_ns: int
    wakes: int
    error: int


class Saver(Owner):
    """A thread that reads a userfaultfd; nothing is protected after `close`."""

    _instead = "make another saver"

    def __init__(
        self,
        *,
        pid: int,
        uffd: int,
        pagemap_fd: int,
        mem_fd: int,
        fd: int,
        memory_pages: int,
        max_stall_ns: int,
        rate: int,
    ) -> None:
        options = ffi.new(
            "struct uffd_saver_options *",
            (pid, uffd, pagemap_fd, mem_fd, fd, memory_pages, max_stall_ns, rate),
        )
        super().__init__(ffi.new("struct uffd_saver **"), lib.uffd_saver_destroy)
        code = lib.uffd_saver_create(options, self._cell)
        if code:
            raise_limit("saving pages", -code)

    def arm(self, ranges: memoryview, *, registers: bool) -> int:
        """Register ranges, or protect registered ones; return an errno."""
        vec, count = rows_of(ranges)
        return -int(lib.uffd_saver_arm(self._cell[0], vec, count, registers))

    def unregistered(self, ranges: memoryview) -> memoryview:
        """Return the ranges whose first page cannot be protected; the others' pages are."""
        vec, count = rows_of(ranges)
        found = new_ranges()
        code = lib.uffd_saver_unregistered(self._cell[0], vec, count, found)
        packed = take_ranges(found)
        if code:
            raise_errno("saving pages", -code)
        return packed

    def take_noted(self) -> tuple[memoryview, memoryview, int]:
        """Return ranges that lost their protection since, and an errno.

        In the second one are those that were dropped, unmapped or moved, not only written.
        """
        noted = new_ranges()
        changed = new_ranges()
        code = lib.uffd_saver_take_noted(self._cell[0], noted, changed)
        return take_ranges(noted), take_ranges(changed), -code

    def prepare(self, parts: Pieces, pages: memoryview) -> int:
        """Say what `begin` will probably be given, so that it needs less time; return an errno."""
        vec, count = rows_of(pages)
        return -int(lib.uffd_saver_prepare(self._cell[0], parts._vec, len(parts), vec, count))

    def begin(self, parts: Pieces, pages: memoryview) -> int:
        """Owe the pages from now on; return an errno."""
        vec, count = rows_of(pages)
        return -int(lib.uffd_saver_begin(self._cell[0], parts._vec, len(parts), vec, count))

    def wait(self, limit_s: float) -> int:
        """Wait until all is saved; return an errno, EAGAIN if it is not yet."""
        return -int(lib.uffd_saver_wait(self._cell[0], int(limit_s * 1e9)))

    def stats(self) -> SaverStats:
        """Return the counters."""
        cell = ffi.new("struct uffd_saver_stats *")
        lib.uffd_saver_stats(self._cell[0], cell)
        return SaverStats(
            cell.faults,
            cell.swept,
            cell.before,
            cell.left,
            cell.dropped,
            cell.longest_ns,
            cell.wakes,
            -cell.error,
        )

    def ranges(self, state: int) -> memoryview:
        """Return the pages in a state, by their address at the instant."""
        found = new_ranges()
        code = lib.uffd_saver_ranges(self._cell[0], state, found)
        packed = take_ranges(found)
        if code:
            raise_errno("saving pages", -code)
        return packed

    def close(self) -> None:
        """End it; may be called again."""
        ffi.release(self._cell)
