"""What the C engine tells about itself: counters, faults, failures, threads inside (layer L4)."""

from __future__ import annotations

from typing import Any

from pyuffd._abi import PagefaultFlag
from pyuffd._shim import ffi, lib
from pyuffd.handlers._engine_calls import EngineCalls
from pyuffd.handlers._fault_log import FaultLog
from pyuffd.handlers._types import (
    Failure,
    FailureStage,
    HandlerStats,
    Held,
    Latency,
    RecentFault,
    SourceFailure,
    known_failure,
)

RECENT_MEANWHILE = 64  # room for faults that come between counting and copying the recent ones
KINDS = ("missing", "wp", "minor")
HELD_CAPACITY = 256
TAKEN_MOST = 1 << 24  # faults, half a gigabyte

_COUNTERS = [
    "messages",
    "filled_pages",
    "prefetched_pages",
    "already_present",
    "preserved_pages",
    "deferred",
    "retried",
    "poisoned_pages",
    "failed",
    "layout_changed",
    "unserved",
    "layout_events",
    "removed_pages",
    "forks",
    "requests",
    "stalled_requests",
]


class EngineReports(EngineCalls):
    """The part of `Engine` that tells how it is, and what has happened."""

    @property
    def source_failure(self) -> SourceFailure | None:
        """The first exception of a source; None, since this engine calls none."""
        return None

    def failure_at(self, address: int) -> SourceFailure | None:
        """Return why a page was lost, or the first failure, which may be of another page."""
        return known_failure(self.failure(), self.source_failure)

    def stats(self) -> HandlerStats:
        """Return the sums of the counters."""
        out = ffi.new("struct uffd_stats *")
        lib.uffd_engine_stats(self._engine(), out)
        return HandlerStats(
            faults={name: out.faults[kind] for kind, name in enumerate(KINDS)},
            latency={
                name: Latency(_buckets(out.latency_ns[kind])) for kind, name in enumerate(KINDS)
            },
            **{name: getattr(out, name) for name in _COUNTERS},
        )

    def fault_count(self) -> int:
        """Return how many missing and minor faults were resolved, without waiting for any."""
        return int(lib.uffd_engine_fault_count(self._engine()))

    def recent(self) -> list[RecentFault]:
        """Return the faults resolved last, newest first."""
        # Not all the room, which is for thousands: memory may be short when a handler stops.
        capacity = lib.uffd_engine_recent_count(self._engine()) + RECENT_MEANWHILE
        out = ffi.new("struct uffd_recent_fault[]", capacity)
        found = lib.uffd_engine_recent(self._engine(), out, capacity)
        return [
            RecentFault(
                fault.time_ns,
                fault.address,
                PagefaultFlag(fault.flags),
                fault.thread_id,
                fault.latency_ns,
            )
            for fault in out[0:found]
        ]

    def take_faults(self) -> FaultLog:
        """Take what the log of demand faults holds."""
        capacity = min(lib.uffd_engine_logged_faults(self._engine()), TAKEN_MOST)
        lost = ffi.new("uint64_t *")
        data = bytearray(capacity * ffi.sizeof("struct uffd_logged_fault"))
        with ffi.from_buffer("struct uffd_logged_fault[]", data) as pointer:
            found = lib.uffd_engine_take_faults(self._engine(), pointer, capacity, lost)
        del data[found * ffi.sizeof("struct uffd_logged_fault") :]
        return FaultLog(bytes(data), int(lost[0]))

    def failure(self) -> Failure | None:
        """Return the first failure and the number of failures, or None."""
        out = ffi.new("struct uffd_failure *")
        lib.uffd_engine_failure(self._engine(), out)
        if not out.count:
            return None
        return Failure(out.count, out.address, out.length, out.error, FailureStage(out.stage))

    def progress(self) -> object:
        """Return a value that changes while the end makes progress."""
        return lib.uffd_engine_progress(self._engine())

    def held(self) -> tuple[Held, ...]:
        """Return the threads at pages of ranges; after the end, those that never left."""
        out = ffi.new("struct uffd_held[]", HELD_CAPACITY)
        found = lib.uffd_engine_held(self._engine(), out, HELD_CAPACITY)
        return tuple(
            Held(one.id, one.start, one.length, one.thread_id, bool(one.is_request))
            for one in out[0:found]
        )

    @property
    def hung(self) -> int:
        """The number of workers that have not returned with a page that was given up."""
        return int(lib.uffd_engine_hung(self._engine()))

    @property
    def spaces(self) -> int:
        """The number of address spaces served: one for each userfaultfd and each living fork."""
        return int(lib.uffd_engine_spaces(self._engine()))

    @property
    def owner_exited(self) -> bool:
        """Whether the process whose memory is served has exited (needs `watch_owner`)."""
        return bool(lib.uffd_engine_owner_exited(self._engine()))


def _buckets(counts: Any) -> tuple[tuple[int, int], ...]:
    return tuple(
        (lib.uffd_histogram_bound(index), faults)
        for index, faults in enumerate(ffi.unpack(counts, lib.UFFD_HISTOGRAM_BUCKETS))
        if faults
    )
