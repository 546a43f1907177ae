"""Arguments and results of an engine, in this process or another (layer L4)."""

from __future__ import annotations

import errno
import os
from array import array
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple, TypedDict

from pyuffd._abi import Ioctl, PagefaultFlag, RegisterMode
from pyuffd._arguments import check_number
from pyuffd._enums import Number
from pyuffd._shim import lib

# How long to wait for threads at a page before it is poisoned: far longer than a slow disk needs.
PATIENCE_S = 10.0
_RUN_WORDS = 3  # of struct uffd_run_spec


class PageState(Number):
    """The state of a page as the engine knows it; `Handler.page_states` returns one byte for each.

    Attributes:
        ABSENT: Never filled; the next access gets the source's content.
        IN_FLIGHT: Being filled, saved, protected or poisoned now.
        CLEAN: Present; also write-protected, if the region is served for WP.
        DIRTY: Written since it was protected, or perhaps written, since it is not protected.
        REMOVED: Dropped by its owner; it reads as zeros from then on. But shared memory that was
            only unmapped (MADV_DONTNEED, the same event) has what its file holds, and memory given
            back by MADV_FREE has its content until Linux takes it: to copy a page, read it. Without
            Feature.EVENT_REMOVE the handler learns of a drop when the page is touched, and until
            then its state is the old one.
        POISONED: Its content could not be read; an access raises SIGBUS.
        SAVED: Its old content was saved by `Handler.preserve`; it is still protected.
    """

    ABSENT = lib.UFFD_PAGE_ABSENT
    IN_FLIGHT = lib.UFFD_PAGE_IN_FLIGHT
    CLEAN = lib.UFFD_PAGE_CLEAN
    DIRTY = lib.UFFD_PAGE_DIRTY
    REMOVED = lib.UFFD_PAGE_REMOVED
    POISONED = lib.UFFD_PAGE_POISONED
    SAVED = lib.UFFD_PAGE_SAVED


# States of pages that a thread works on; users are only told the first of them.
IN_FLIGHT = (lib.UFFD_PAGE_IN_FLIGHT, lib.UFFD_PAGE_REQUESTED)


class OnError(IntEnum):
    """What happens to a page whose content cannot be read."""

    POISON = lib.UFFD_ON_ERROR_POISON
    STALL = lib.UFFD_ON_ERROR_STALL
    KILL = lib.UFFD_ON_ERROR_KILL


class Protect(IntEnum):
    """Why pages are protected, and what becomes of what is known to be written."""

    NOT = lib.UFFD_UNPROTECT  # the protection is lifted
    FOR_STATES = lib.UFFD_PROTECT  # the caller learns it from the states
    TO_EVICT = lib.UFFD_PROTECT_TO_EVICT  # it is noted for the next checkpoint
    TO_CHECK = lib.UFFD_PROTECT_TO_CHECK  # this is the checkpoint


class IfPresent(IntEnum):
    """What to do about pages that are present once a range is registered; see engine/open.h."""

    ANY = lib.UFFD_PRESENT_ANY
    REFUSE = lib.UFFD_PRESENT_REFUSE
    KEEP = lib.UFFD_PRESENT_KEEP
    DROP = lib.UFFD_PRESENT_DROP


class Opening(NamedTuple):
    """How a range is registered and opened, see engine/open.h.

    `mode`: of the range. `poison`: offsets, (start, end) each, of pages without content.
    """

    mode: int
    present: IfPresent
    needed: int
    before: int = 0
    stays_registered: bool = False
    reads_events: bool = False
    poison: tuple[int, ...] = ()


def lacks_error(served: RangeId, needed: int, supported: int) -> ValueError:
    """Return the error for a range that does not support all the ioctls that it needs."""
    missing = ", ".join(str(one.name) for one in Ioctl if one & needed & ~supported)
    return ValueError(
        f"[{served.start:#x}, +{served.length:#x}) does not support {missing}, only"
        f" {Ioctl(supported)!r}"
    )


class PagesPresentError(ValueError):
    """Nobody has filled a page, and it was present when its range had been registered."""

    def __init__(self, address: int) -> None:
        super().__init__(address)
        self.address = address


class DropRacedError(Exception):
    """Other threads made pages of zeros each time between a drop and a registration."""


class SourceKind(IntEnum):
    """Where the content of absent pages comes from."""

    NONE = lib.UFFD_SOURCE_NONE
    ZERO = lib.UFFD_SOURCE_ZERO
    MEMORY = lib.UFFD_SOURCE_MEMORY
    FILE = lib.UFFD_SOURCE_FILE
    REQUEST = lib.UFFD_SOURCE_REQUEST
    OVERLAY = lib.UFFD_SOURCE_OVERLAY


class LeafKind(IntEnum):
    """What a part of an overlay is."""

    ZERO = lib.UFFD_LEAF_ZERO
    MEMORY = lib.UFFD_LEAF_MEMORY
    FILE = lib.UFFD_LEAF_FILE
    REQUEST = lib.UFFD_LEAF_REQUEST


class FailureStage(IntEnum):
    """What failed; engine/types.h describes each stage."""

    NOTHING = lib.UFFD_FAILED_NOTHING
    SOURCE = lib.UFFD_FAILED_SOURCE
    RESOLVE = lib.UFFD_FAILED_RESOLVE
    UNSERVED = lib.UFFD_FAILED_UNSERVED
    READ = lib.UFFD_FAILED_READ
    FORK = lib.UFFD_FAILED_FORK
    STALLED = lib.UFFD_FAILED_STALLED
    SAVE = lib.UFFD_FAILED_SAVE


class Leaf(NamedTuple):
    """One of the sources of an overlay: an address, or a descriptor and an offset in its file.

    `around` is how many bytes the kernel reads for a fault from a file that is not in memory.
    """

    kind: LeafKind
    address: int = 0
    fd: int = -1
    offset: int = 0
    around: int = 0


@dataclass(frozen=True, slots=True)
class Overlay:
    """The sources of a range, and its runs as an array of `struct uffd_run_spec`."""

    leaves: tuple[Leaf, ...]
    runs: bytes

    @property
    def fds(self) -> list[int]:
        """The descriptors of its files, one for each such leaf."""
        return [leaf.fd for leaf in self.leaves if leaf.kind is LeafKind.FILE]

    def without_memory(self) -> Overlay:
        """Return a copy for another process, where a worker is asked for what is memory here."""
        leaves = (
            Leaf(LeafKind.REQUEST) if leaf.kind is LeafKind.MEMORY else leaf for leaf in self.leaves
        )
        return Overlay(tuple(leaves), self.runs)

    def with_fds(self, fds: list[int]) -> Overlay:
        """Return a copy with these descriptors."""
        left = list(fds)
        leaves = (
            leaf._replace(fd=left.pop(0)) if leaf.kind is LeafKind.FILE else leaf
            for leaf in self.leaves
        )
        return Overlay(tuple(leaves), self.runs)


@dataclass(frozen=True, slots=True)
class Content:
    """Where the engine reads a range's pages; `owner` must live as long as the range."""

    kind: SourceKind
    address: int = 0
    fd: int = -1
    offset: int = 0
    length: int = 0
    owner: object = None
    overlay: Overlay | None = None
    outline: bytes = b""  # REQUEST: where it has zeros, see `outline_of`

    @property
    def fds(self) -> list[int]:
        """The descriptors of the files that it reads."""
        if self.overlay is not None:
            return self.overlay.fds
        return [self.fd] if self.kind is SourceKind.FILE else []

    @property
    def reads_memory(self) -> bool:
        """Whether it is memory of this process, or some of it is."""
        leaves = self.overlay.leaves if self.overlay is not None else ()
        is_memory = any(leaf.kind is LeafKind.MEMORY for leaf in leaves)
        return is_memory or self.kind is SourceKind.MEMORY

    def with_fds(self, fds: list[int]) -> Content:
        """Return a copy with these descriptors."""
        if self.overlay is not None:
            return replace(self, overlay=self.overlay.with_fds(fds))
        return replace(self, fd=fds[0]) if fds else self


def outline_of(content: Content) -> bytes:
    """Return the runs of a content as those of two leaves, 1 if it is zeros and 0 if not.

    It is empty if all of the content, or none of it, may be zeros.
    """
    overlay = content.overlay
    if content.outline or overlay is None or not overlay.runs:
        return content.outline
    words = memoryview(overlay.runs).cast("Q")
    outline = array("Q")
    for at in range(0, len(words), _RUN_WORDS):
        is_zeros = int(overlay.leaves[words[at + 1]].kind is LeafKind.ZERO)
        if not outline or outline[-2] != is_zeros:
            outline.extend((words[at], is_zeros, 0))
    return outline.tobytes()


@dataclass(frozen=True, slots=True)
class Failure:
    """The number of pages that failed, and the address, length and errno of the first failure."""

    count: int
    address: int
    length: int
    error: int
    stage: FailureStage

    @property
    def text(self) -> str:
        """The errno in words."""
        if self.error == errno.EOWNERDEAD:
            return "the helper process of its handler has ended"
        return os.strerror(self.error)


@dataclass(frozen=True, slots=True)
class RecentFault:
    """One resolved fault.

    Attributes:
        time_ns: CLOCK_MONOTONIC when it was resolved, in ns.
        address: The faulting address, which the kernel rounds down to the page without
            Feature.EXACT_ADDRESS.
        flags: Which kind of fault it was.
        thread_id: The faulting thread; 0 without Feature.THREAD_ID.
        latency_ns: The time until it was resolved, in ns, from reading its message or (inline
            driver) from its signal.
    """

    time_ns: int
    address: int
    flags: PagefaultFlag
    thread_id: int
    latency_ns: int


@dataclass(frozen=True, slots=True)
class Latency:
    """A latency histogram: (upper bound in ns, number of faults) of every bucket with faults.

    Each bound is at most 12.5 % above the one before, which limits the error of a percentile.
    """

    buckets: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Number of faults."""
        return sum(faults for _, faults in self.buckets)

    def percentile(self, percent: float) -> int:
        """Return the latency in ns that `percent` of the faults did not exceed; 0 without faults.

        The result is the upper bound of a bucket.
        """
        check_number("percent", percent, 100)
        wanted = self.count * percent / 100
        seen = 0
        for bound, faults in self.buckets:
            seen += faults
            if seen >= wanted:
                return bound
        return 0


@dataclass(frozen=True, slots=True)
class HandlerStats:
    """Counters since the handler was made. Pages are counted in their region's page size.

    Attributes:
        faults: Faults that were resolved, by kind: "missing", "wp", "minor".
        latency: The latency of these faults, by kind.
        messages: Messages that were read; a fault that was interrupted sends several.
        filled_pages: Pages that were put in place, by faults, prefetch and `populate`.
        prefetched_pages: Those of them that `prefetch` filled ahead, except from Python sources.
        already_present: Faults whose page was already present; their threads were woken.
        preserved_pages: Pages whose old content was saved.
        deferred: Faults that could not be resolved at once, mostly because the layout was changing.
        retried: Attempts to resolve a deferred fault.
        poisoned_pages: Pages that were poisoned.
        failed: Failures, such as pages whose content could not be read.
        layout_changed: Faults in ranges that were gone when they were handled.
        unserved: Faults in registered ranges that are not served.
        layout_events: Remove, Unmap, Remap and Fork events that were applied.
        removed_pages: Pages that the owner dropped.
        forks: Forks that were followed.
        requests: Requests for content, to page sources in Python.
        stalled_requests: Those of them that were not answered within `stall_timeout_s`.
        restarts: How often the worker process of the process driver died and was replaced.
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
    """The engine's name of a range: its space, its number, and where it was put in."""

    space: int
    number: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class RangeSpec:
    """A range to serve, and what its faults need.

    `local` is the address of another mapping of the same memory, for an engine of this process;
    `local_file` is the descriptor and offset that another process maps instead. `owner` is kept
    alive as long as the range is served. `label` names the range and its source in messages.
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
    maps_holes: bool = False  # map missing pages before protecting: Linux would skip them
    shared: bool = False
    owner: object = None
    label: str = ""


class ReportKind(IntEnum):
    """What an engine reports to the keeper (engine/successor.h)."""

    ADDED = lib.UFFD_REPORT_ADDED
    DROPPED = lib.UFFD_REPORT_DROPPED
    PIECES = lib.UFFD_REPORT_PIECES
    FORK = lib.UFFD_REPORT_FORK
    GONE = lib.UFFD_REPORT_GONE


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a range at its present address; `states_offset` is that of the whole range.

    `is_left`: mremap(2) has left this place behind, and there is another piece.
    """

    number: int
    start: int
    end: int
    origin: int
    states_offset: int
    is_left: int = 0


@dataclass(frozen=True, slots=True)
class Taken:
    """A piece of a range that another engine served, with the file of its pages' states."""

    piece: Piece
    states_fd: int
    states_offset: int


class Held(NamedTuple):
    """A thread that works on pages of a range, and may never leave them."""

    number: int  # of the range
    start: int
    length: int
    thread_id: int
    is_request: bool  # the thread fetches the content, and is not in an ioctl


class Ended(NamedTuple):
    """How an engine ended: the threads still inside, and whether ranges had to stay registered."""

    held: tuple[Held, ...] = ()
    stays: bool = False


class Request(NamedTuple):
    """Pages that a source in Python is asked for, for a fault or for `populate`.

    `abandoned`: the answer came too late, and the pages were given up.
    """

    number: int
    offset: int
    address: int
    length: int
    is_fault: bool = True
    abandoned: bool = False


class SourceFailure(NamedTuple):
    """An exception of a page source, and the pages that it was asked for."""

    error: BaseException
    start: int
    length: int


class EngineOptions(TypedDict):
    """The options of every engine, in this process or another; `owner_pid` 0 is unknown."""

    owner_pid: int
    on_error: OnError
    layout_events: int
    watch_owner: bool
    stall_limit_ns: int
    prefetch: int
    spin_ns: int
    retry_limit_ns: int
    say_fd: int
    fault_log: int


def known_failure(failure: Failure | None, source: SourceFailure | None) -> SourceFailure | None:
    """Return the first failure as an exception with its pages."""
    if source is not None or failure is None:
        return source
    error = OSError(failure.error, failure.text)
    return SourceFailure(error, failure.address, failure.length)
