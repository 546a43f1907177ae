"""Memory that is dropped without a trace in the page table, by the events of a userfaultfd.

The kernel sends EVENT_REMOVE before it drops the memory, and nothing says when that is done. But
the thread stays in madvise(2) until then. So a range is reported again in each round, as unsure,
until every thread of the process has been seen outside of such a call after the event was read.
"""

from __future__ import annotations

import threading
from pathlib import Path

from pyuffd import _dirty_calls as calls
from pyuffd._uffd import Userfaultfd
from pyuffd.remote._mappings import Mapping, MappingKind
from pyuffd.remote._process import Process
from pyuffd.remote._stop import sharing
from pyuffd.remote._threads import listed

# madvise(2) and process_madvise(2).
_CALLS = (b"28", b"440")
# Stopped by a tracer or a signal, or ended: a thread is stopped on its way out of the kernel only.
_OUTSIDE = "tTZX"
# These make calls for io_uring, and the kernel shows none for them.
_WORKER = "iou-"
_LISTED_MOST = 5


def is_watched(mapping: Mapping) -> bool:
    """Whether its drops need events: elsewhere the page table shows them."""
    return mapping.shared or mapping.kind is MappingKind.HUGETLB


class DropWatch:
    """The ranges that may be dropped just now, of the memory registered with `uffd`."""

    def __init__(self, process: Process, uffd: Userfaultfd) -> None:
        self.uffd = uffd
        self._process = process
        self._reader = calls.DropReader(uffd.fileno())
        self._open: list[tuple[int, memoryview]] = []
        self._round = 0
        # The round in which each thread was last seen outside.
        self._seen: dict[int, int] = {}

    def close(self) -> None:
        """Let nobody wait any more; the userfaultfd is closed afterwards."""
        self._reader.close()

    def peek(self, watched: memoryview) -> memoryview:
        """Return the ranges of all events that are not settled."""
        # A thread may have come in since the last round saw it outside.
        self._take(watched, self._round + 1)
        return self._all()

    def collect(self, watched: memoryview) -> tuple[memoryview, memoryview]:
        """Begin a round; return the ranges that are still to be reported, and those settled now.

        Args:
            watched: What is registered.
        """
        self._round += 1
        self._take(watched, self._round)
        if not self._open:
            return calls.NO_RANGES, calls.NO_RANGES
        until = self._outside_since()
        settled, still = calls.NO_RANGES, []
        for number, ranges in self._open:
            if number <= until:
                settled = calls.union(settled, ranges)
            else:
                still.append((number, ranges))
        self._open = still
        still_open = self._all()
        return still_open, calls.subtract(settled, still_open)

    def _take(self, watched: memoryview, number: int) -> None:
        """Take in the events since the last call, as of a round before which nobody was seen."""
        ranges, is_lost = self._reader.take()
        if is_lost:
            ranges = watched
        if len(ranges):
            self._open.append((number, ranges))

    def _all(self) -> memoryview:
        found = calls.NO_RANGES
        for _, ranges in self._open:
            found = calls.union(found, ranges)
        return found

    def _outside_since(self) -> int:
        """Return the last round after whose events every thread has been outside."""
        tids = _threads(self._process)
        if tids is None:
            return -1
        for tid in tids:
            if _is_outside(tid):
                self._seen[tid] = self._round
        self._seen = {tid: number for tid, number in self._seen.items() if tid in tids}
        return min((self._seen.get(tid, -1) for tid in tids), default=self._round)


def _threads(process: Process) -> set[int] | None:
    """Return all threads that may change the memory; None if they come and go too fast."""
    before: set[int] = set()
    for _ in range(_LISTED_MOST):
        each = [listed(pid, 1) for pid in sharing(process.pid, process.memory_tid)]
        found = {tid for one in each for tid in one.tids}
        if found and found <= before and all(one.complete for one in each):
            return found
        before = found
    return None


def _is_outside(tid: int) -> bool:
    """Whether a thread was seen outside of a call that drops memory."""
    if tid == threading.get_native_id():
        return True
    folder = Path(f"/proc/{tid}")
    try:
        if (folder / "comm").read_text(errors="replace").startswith(_WORKER):
            return False
        call = (folder / "syscall").read_bytes().split()
        if call[0] != b"running" and call[0] not in _CALLS:
            return True
        # It is on a CPU, or it was stopped: then the call that is shown is over.
        stat = (folder / "stat").read_text(errors="replace")
    except FileNotFoundError:
        return True  # it has ended
    except OSError:
        return False
    return stat.rpartition(") ")[2][0] in _OUTSIDE
