"""What goes into an engine and what comes out of it, in this process or another (layer L4)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypedDict

from pyuffd._abi import PagefaultFlag, RegisterMode
from pyuffd._enums import Number
from pyuffd._shim import lib

# So long threads at a page are waited for before it is poisoned: far longer than a slow disk needs.
PATIENCE_S = 10.0


class PageState(Number):
    """What the engine knows of a page; `Handler.page_states` returns one byte each.

    Attributes:
        ABSENT: Never filled: the next access gets the source's content.
        IN_FLIGHT: Being filled, saved or poisoned now.
        CLEAN: There; protected, where the region is served for WP.
        DIRTY: Written since it was protected, or nobody knows: it never was.
        REMOVED: Dropped by its owner: zeros from then on, whatever the source says.
        POISONED: Its content could not be had: whoever touches it gets SIGBUS.
        SAVED: Its old content was preserved in the background; it is protected still.
    """

    ABSENT = lib.UFFD_PAGE_ABSENT
    IN_FLIGHT = lib.UFFD_PAGE_IN_FLIGHT
    CLEAN = lib.UFFD_PAGE_CLEAN
    DIRTY = lib.UFFD_PAGE_DIRTY
    REMOVED = lib.UFFD_PAGE_REMOVED
    POISONED = lib.UFFD_PAGE_POISONED
    SAVED = lib.UFFD_PAGE_SAVED


# States of pages that somebody is at; only the first of them is ever told to users.
IN_FLIGHT = (lib.UFFD_PAGE_IN_FLIGHT, lib.UFFD_PAGE_REQUESTED)


class OnError(IntEnum):
    """What happens to a page whose content cannot be had."""

    POISON = lib.UFFD_ON_ERROR_POISON
    STALL = lib.UFFD_ON_ERROR_STALL
    KILL = lib.UFFD_ON_ERROR_KILL


class SourceKind(IntEnum):
    """Which content the engine puts into absent pages."""

    NONE = lib.UFFD_SOURCE_NONE
    ZERO = lib.UFFD_SOURCE_ZERO
    MEMORY = lib.UFFD_SOURCE_MEMORY
    FILE = lib.UFFD_SOURCE_FILE
    REQUEST = lib.UFFD_SOURCE_REQUEST


class FailureStage(IntEnum):
    """What went wrong first."""

    NOTHING = lib.UFFD_FAILED_NOTHING
    SOURCE = lib.UFFD_FAILED_SOURCE
    RESOLVE = lib.UFFD_FAILED_RESOLVE
    UNSERVED = lib.UFFD_FAILED_UNSERVED
    READ = lib.UFFD_FAILED_READ
    FORK = lib.UFFD_FAILED_FORK
    STALLED = lib.UFFD_FAILED_STALLED
    SAVE = lib.UFFD_FAILED_SAVE


@dataclass(frozen=True, slots=True)
class Content:
    """Where the engine reads a range's pages; `owner` must live as long as the range."""

    kind: SourceKind
    address: int = 0
    fd: int = -1
    offset: int = 0
    length: int = 0
    owner: object = None


@dataclass(frozen=True, slots=True)
class Failure:
    """How many pages failed, and the first of them."""

    count: int
    address: int
    length: int
    error: int
    stage: FailureStage


@dataclass(frozen=True, slots=True)
class RecentFault:
    """One resolved fault.

    `time_ns` is CLOCK_MONOTONIC when it was resolved, `latency_ns` the time since its message was
    read (native) or its signal came (inline).
    """

    time_ns: int
    address: int
    flags: PagefaultFlag
    thread_id: int
    latency_ns: int


@dataclass(frozen=True, slots=True)
class Latency:
    """A latency histogram: (upper bound in ns, faults) of every bucket that is not empty.

    Bounds grow by 12.5 % at most, which is how well a percentile is known.
    """

    buckets: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Number of faults."""
        return sum(faults for _, faults in self.buckets)

    def percentile(self, percent: float) -> int:
        """Return the bound in ns that `percent` of the faults stayed below; 0 without faults."""
        wanted = self.count * percent / 100
        seen = 0
        for bound, faults in self.buckets:
            seen += faults
            if seen >= wanted:
                return bound
        return 0


@dataclass(frozen=True, slots=True)
class HandlerStats:
    """Counters since the handler was made, read without stopping it.

    `faults` and `latency` go by kind: "missing", "wp", "minor". `messages` counts what was read:
    a fault that was interrupted sends several. Pages are of their region's size. `restarts`: how
    often the process driver's worker process died and another took over.
    """

    faults: dict[str, int]
    latency: dict[str, Latency]
    messages: int
    filled_pages: int
    prefetched_pages: int
    already_present: int
    preserved_pages: int
    deferred: int
    retried: int
    poisoned_pages: int
    failed: int
    layout_changed: int
    unserved: int
    layout_events: int
    removed_pages: int
    forks: int
    requests: int
    stalled_requests: int
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class RangeId:
    """A range as the engine knows it: its space, its number, and where it was served."""

    space: int
    number: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class RangeSpec:
    """A range that is to be served, and what its faults need.

    `local` is the address of the same memory mapped once more, for an engine of this process;
    `local_file` is descriptor and offset of what another process maps for that. `owner` is kept
    as long as the range is served. `label` names the range and its source for people.
    """

    space: int
    start: int
    length: int
    page_size: int
    mode: RegisterMode
    content: Content
    local: int = 0
    local_file: tuple[int, int] | None = None
    preserve: int = 0
    writes_cache: bool = False
    maps_holes: bool = False  # Linux would leave them unprotected
    shared: bool = False
    owner: object = None
    label: str = ""


class ReportKind(IntEnum):
    """What an engine tells its keeper (engine/successor.h)."""

    ADDED = lib.UFFD_REPORT_ADDED
    DROPPED = lib.UFFD_REPORT_DROPPED
    PIECES = lib.UFFD_REPORT_PIECES
    FORK = lib.UFFD_REPORT_FORK
    GONE = lib.UFFD_REPORT_GONE


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a range, where it is by now; `states_offset` is that of the whole range."""

    number: int
    start: int
    end: int
    origin: int
    states_offset: int


@dataclass(frozen=True, slots=True)
class Taken:
    """What is known of a range that another engine served: a piece of it, its pages' states."""

    piece: Piece
    states_fd: int
    states_offset: int


class Held(NamedTuple):
    """A thread at pages of a range, perhaps held up there for good."""

    number: int  # of the range
    start: int
    length: int
    thread_id: int
    is_request: bool  # it fetches them: no ioctl of its is under way


class Ended(NamedTuple):
    """How an engine ended: who is still inside, and whether ranges had to stay registered."""

    held: tuple[Held, ...] = ()
    stays: bool = False


class Request(NamedTuple):
    """Pages that were asked for, by a thread that waits for one of them or by `populate`.

    `abandoned`: it took too long, and they were given up.
    """

    number: int
    offset: int
    address: int
    length: int
    is_fault: bool = True
    abandoned: bool = False


class SourceFailure(NamedTuple):
    """What went wrong in a source, and where; its first failure counts."""

    error: BaseException
    start: int
    length: int


class EngineOptions(TypedDict):
    """What every engine is told, in this process or another; `owner_pid` 0 is unknown."""

    owner_pid: int
    on_error: OnError
    layout_events: int
    watch_owner: bool
    stall_limit_ns: int
    prefetch: int
    spin_ns: int
    retry_limit_ns: int
    say_fd: int


def known_failure(failure: Failure | None, source: SourceFailure | None) -> SourceFailure | None:
    """Return the first failure as an exception and a place."""
    if source is not None or failure is None:
        return source
    error = OSError(failure.error, os.strerror(failure.error))
    return SourceFailure(error, failure.address, failure.length)
