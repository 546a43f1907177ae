"""The interface between a `Handler` and an engine, in this process or another (layer L4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyuffd.handlers._bounce import Bounce
    from pyuffd.handlers._fault_log import FaultLog
    from pyuffd.handlers._packed import Packed
    from pyuffd.handlers._served_parts import Part
    from pyuffd.handlers._types import (
        Ended,
        Failure,
        HandlerStats,
        Held,
        Opening,
        Protect,
        RangeId,
        RangeSpec,
        RecentFault,
        SourceFailure,
    )
    from pyuffd.lowlevel import Granted
    from pyuffd.pagemap import Pagemap


class Backend(Protocol):
    """An engine in this process, with or without workers, or one in the worker process.

    `calls_python`: it can call sources in Python. `is_remote`: it runs in another process, without
    the memory of this one.
    """

    calls_python: bool
    is_remote: bool

    def own(self) -> None:
        """Note that somebody will call `destroy`, even if all of it is garbage."""

    def add_space(self, fd: int, *, layout_events: int, owner_pid: int) -> int:
        """Serve another userfaultfd too; return its space. `owner_pid` 0 is unknown."""

    def remove_space(self, space: int) -> None:
        """Forget a userfaultfd whose ranges have been taken out."""

    def add(self, spec: RangeSpec) -> RangeId:
        """Put a range in."""

    def find(self, space: int, start: int) -> RangeId | None:
        """Return the range that an interrupted `add` has put in there, or None."""

    def open(
        self, served: RangeId, how: Opening, granted: Granted, pagemap: Pagemap | None = None
    ) -> int:
        """Register a range, look for pages that are present, and begin to serve it.

        Return the ioctls that it supports, which `granted` receives even if this is interrupted.
        """

    def open_dropped(
        self, served: RangeId, how: Opening, granted: Granted, fd: int, *, shared: bool
    ) -> int:
        """For an engine that `is_remote`: register a range, drop all of it, and do the same."""

    def set_ioctls(self, served: RangeId, ioctls: int) -> None:
        """Begin to serve a range that its owner registers."""

    def list_registered(
        self, space: int, ranges: Sequence[tuple[int, int]], *, is_all: bool = False
    ) -> None:
        """Note ranges (start, length) that are, or will be, registered; `is_all`: no others are."""

    def unlist_registered(self, space: int, start: int, length: int) -> None:
        """Note that a range is no longer registered."""

    def unserve(
        self,
        served: RangeId,
        *,
        seal: bool,
        unregister: bool = True,
        patience_s: float = ...,
        gently: bool = False,
        part: Part | None = None,
    ) -> bool:
        """Take a range or a part of it out; wait at most `patience_s` for threads at its pages.

        With `gently`, return False and leave it in if a thread is still there.
        """

    def start(self, cpus: list[int]) -> None:
        """Start the driver."""

    def end(self, patience_s: float) -> Ended:
        """Take out every range and end the driver; wait `patience_s` at most for its threads."""

    def progress(self) -> object:
        """Return a value that changes while the end makes progress."""

    def held(self) -> tuple[Held, ...]:
        """Return the threads at pages of ranges."""

    def hurry(self, patience_s: float) -> None:
        """Let drain and end, in other threads, wait no longer than this."""

    def drain(self, limit_ns: int) -> bool:
        """Wait until the faults that wait now are resolved; return False after the limit."""

    def refuse(self) -> None:
        """Poison pages that fault from now on."""

    def abandon(self, served: RangeId | None = None, *, failed: bool = False) -> None:
        """Poison the pages that wait for a worker, of one range or all; `failed` counts them."""

    def populate(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages, `chunk` bytes at a time by workers; return the bytes filled."""

    def load(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages that have content, in forks too; return the bytes filled."""

    def populate_ranges(
        self, served: RangeId, offset: int, length: int, ranges: Packed, chunk: int = 0
    ) -> int:
        """Fill absent pages of ranges in [offset, +length); return the bytes filled."""

    def fill(
        self, served: RangeId, offset: int, source: Bounce | int, length: int, *, unprotected: bool
    ) -> int:
        """Fill absent pages; return the bytes filled.

        `source` is an address of this process or, for an engine that `is_remote`, a shared Bounce.
        """

    def preserve(self, served: RangeId, offset: int, length: int, *, unprotect: bool) -> int:
        """Save protected pages; return the bytes saved."""

    def take_in(self, served: RangeId) -> None:
        """Note the pages that are present."""

    def writeprotect(
        self, served: RangeId, offset: int, length: int, pages: int, how: Protect
    ) -> bytes:
        """Protect pages, or lift the protection; return their states as they were then."""

    def pause(self, limit_ns: int) -> int:
        """Resolve no fault for at most `limit_ns`; return a token for `resume`."""

    def resume(self, token: int) -> bool:
        """Resolve faults again; return False if this engine did so before."""

    def peek(self, served: RangeId, offset: int, length: int, target: int) -> bool:
        """Copy the content of pages to an address of this process; False if one is missing."""

    def evict(
        self, served: RangeId, offset: int, length: int, wanted: bytes, *, written_too: bool
    ) -> int:
        """Drop the pages that have a 1 in `wanted`; return the bytes dropped."""

    def evict_to(
        self,
        served: RangeId,
        offset: int,
        length: int,
        fd: int,
        begin: int,
        *,
        written_only: bool,
    ) -> int:
        """Protect pages, write them to a file from `begin` on, and drop them."""

    def retry(self, served: RangeId, offset: int, length: int) -> int:
        """Wake what waits, so that it faults again; return how many pages have failed so far."""

    def states(self, served: RangeId, first_page: int, pages: int) -> bytes:
        """Return the state bytes of some pages."""

    @property
    def spaces(self) -> int:
        """The number of address spaces served."""

    @property
    def owner_exited(self) -> bool:
        """Whether the process whose memory is served has exited."""

    @property
    def source_failure(self) -> SourceFailure | None:
        """The first exception of a source."""

    def failure_at(self, address: int) -> SourceFailure | None:
        """Return why a page was lost, or the first failure, which may be of another page."""

    def stats(self) -> HandlerStats:
        """Return the sums of the counters."""

    def fault_count(self) -> int:
        """Return how many missing and minor faults were resolved; the latest may be missing."""

    def recent(self) -> list[RecentFault]:
        """Return the faults resolved last."""

    def take_faults(self) -> FaultLog:
        """Take what the log of demand faults holds."""

    def failure(self) -> Failure | None:
        """Return the first failure and the number of failures, or None."""

    def destroy(self) -> None:
        """Free it; the driver has stopped and no range is left."""
