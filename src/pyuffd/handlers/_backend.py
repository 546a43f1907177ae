"""What a `Handler` needs of an engine, wherever that runs (layer L4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyuffd.handlers._types import (
        Ended,
        Failure,
        HandlerStats,
        Held,
        RangeId,
        RangeSpec,
        RecentFault,
        SourceFailure,
    )


class Backend(Protocol):
    """An engine of this process, with or without workers, or one in a helper process.

    `calls_python` says that it can read sources in Python, `is_remote` that it does not have
    the memory of this process.
    """

    calls_python: bool
    is_remote: bool

    def add_space(self, fd: int, *, layout_events: int, owner_pid: int) -> int:
        """Serve another userfaultfd as well; `owner_pid` 0 is unknown."""

    def remove_space(self, space: int) -> None:
        """Forget it."""

    def add(self, spec: RangeSpec) -> RangeId:
        """Put a range in."""

    def find(self, space: int, start: int) -> RangeId | None:
        """Return what an `add` that was interrupted has put in there, if it has."""

    def set_ioctls(self, served: RangeId, ioctls: int) -> None:
        """Tell which ioctls the registered range takes."""

    def list_registered(
        self, space: int, ranges: Sequence[tuple[int, int]], *, is_all: bool = False
    ) -> None:
        """Tell what is registered, (start, length) each, or about to be; all of it at first."""

    def unlist_registered(self, space: int, start: int, length: int) -> None:
        """Tell what is registered no more."""

    def unserve(
        self,
        served: RangeId,
        *,
        seal: bool,
        unregister: bool = True,
        patience_s: float = ...,
        gently: bool = False,
    ) -> bool:
        """Take a range out; wait so long for threads at its pages.

        False: `gently` it was not taken out, as somebody is still there.
        """

    def start(self, cpus: list[int]) -> None:
        """Start the driver."""

    def end(self, patience_s: float) -> Ended:
        """Take out every range and end the driver; wait so long for whoever is held up."""

    def progress(self) -> object:
        """Return something that changes as long as the end gets on."""

    def held(self) -> tuple[Held, ...]:
        """Return who is at pages of a range at the moment."""

    def hurry(self, patience_s: float) -> None:
        """From any thread: let drain and end wait no longer than this."""

    def drain(self, limit_ns: int) -> bool:
        """Wait until the faults that wait now are resolved; False when the time ran out."""

    def refuse(self) -> None:
        """Poison what is asked for from now on."""

    def abandon(self, served: RangeId | None = None, *, failed: bool = False) -> None:
        """Poison the pages that wait for a worker; note it as a failure."""

    def populate(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages, `chunk` bytes at a time by workers; return the bytes filled."""

    def preserve(self, served: RangeId, offset: int, length: int, *, unprotect: bool) -> int:
        """Save protected pages; return the bytes saved."""

    def take_in(self, served: RangeId) -> None:
        """Note the pages that are there already."""

    def writeprotect(self, served: RangeId, offset: int, length: int, pages: int) -> bytes:
        """Write-protect pages; return their states as they were when they were protected."""

    def states(self, served: RangeId, first_page: int, pages: int) -> bytes:
        """Return the state bytes of some pages."""

    @property
    def spaces(self) -> int:
        """Address spaces that are followed."""

    @property
    def owner_exited(self) -> bool:
        """Whether the process whose memory is served is gone."""

    @property
    def source_failure(self) -> SourceFailure | None:
        """What a source raised first."""

    def failure_at(self, address: int) -> SourceFailure | None:
        """What is known of why a page was lost; perhaps of another one."""

    def stats(self) -> HandlerStats:
        """Sum up the counters."""

    def recent(self) -> list[RecentFault]:
        """Return the faults resolved last."""

    def failure(self) -> Failure | None:
        """Return what went wrong, or None."""

    def destroy(self) -> None:
        """Free it; the driver has stopped and no range is left."""
