"""The engine in a helper process, as the owner of the memory sees it (layer L4).

Two processes stand behind it: the keeper (`_keeper`) and its fork, the worker
(`_worker`), which runs the engine and the page sources. Calls go over one socket
(`_link`). Nothing here is needed to resolve a fault.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Unpack

from pyuffd._closing import SoleOwner
from pyuffd._owned import Descriptor
from pyuffd.handlers._types import (
    PATIENCE_S,
    Ended,
    EngineOptions,
    Failure,
    HandlerStats,
    Held,
    RangeId,
    RangeSpec,
    RecentFault,
    SourceFailure,
    SourceKind,
    known_failure,
)
from pyuffd.handlers.process import _wire
from pyuffd.handlers.process._calls import Call
from pyuffd.handlers.process._link import HelperLink
from pyuffd.handlers.process._start import HelperLostError, starting
from pyuffd.handlers.process._transport import pack

# What a worker needs to poison a terabyte.
SEAL_LIMIT_S = 60.0
ENDED_LIMIT_S = 3.0


class RemoteEngine(SoleOwner):
    """A `Backend` in another process; `workers` threads there call the page sources."""

    calls_python = True
    is_remote = True
    _instead = "it is a process of this one"
    _has_ended = False
    _added_spaces = 0

    def __init__(self, fd: int, *, workers: int, **options: Unpack[EngineOptions]) -> None:
        self._pid = os.getpid()
        self._link = HelperLink(f"uffd-p{fd}")
        self._call = self._link.call
        try:
            self._link.start()
            with starting("pidfd_open"):
                own = Descriptor.of_process(os.getpid())  # the helper sees by it that we have ended
            with own:
                self._link.introduce((options, workers), (fd, own.number))
        except BaseException:
            self._link.close()
            raise

    def __del__(self) -> None:
        # Does something to one that never got to its user: an exception came between. In a fork the
        # helper is the parent's.
        if hasattr(self, "_link") and self._pid == os.getpid():
            self._link.close()

    # What a Handler calls

    def add_space(self, fd: int, *, layout_events: int, owner_pid: int) -> int:
        """Serve another userfaultfd as well."""
        self._added_spaces += 1
        key = self._added_spaces
        try:
            return int(self._call(Call.ADD_SPACE, layout_events, owner_pid, key, fds=(fd,)))
        except BaseException:
            with suppress(HelperLostError):
                space = self._call(Call.FIND_SPACE, key)
                if space is not None:  # interrupted: nobody knows of it
                    self.remove_space(space)
            raise

    def remove_space(self, space: int) -> None:
        """Forget it."""
        self._call(Call.REMOVE_SPACE, space)

    def add(self, spec: RangeSpec) -> RangeId:
        """Put a range in; what it needs of this process is sent."""
        content = spec.content
        if content.kind is SourceKind.MEMORY:
            raise ValueError(
                f"{content.owner!r} lies in this process, where the helper process cannot read"
                " it: put it into a memfd and serve a FileSource, or use driver='thread'"
            )
        if spec.preserve:
            raise ValueError(
                "preserve= is memory of this process, where the helper process cannot write:"
                " serve that region with another Handler, of driver='native'"
            )
        fds: list[int] = [content.fd] if content.kind is SourceKind.FILE else []
        if spec.local_file:
            fds.append(spec.local_file[0])
        source = pack(content.owner) if content.kind is SourceKind.REQUEST else None
        sent = replace(
            spec, content=replace(content, address=0, fd=-1, owner=source), local=0, owner=None
        )
        served: RangeId = self._call(Call.ADD, sent, fds=tuple(fds))
        return served

    def find(self, space: int, start: int) -> RangeId | None:
        """Return what an `add` that was interrupted has put in there, if it has."""
        found: RangeId | None = self._call(Call.FIND, space, start)
        return found

    def set_ioctls(self, served: RangeId, ioctls: int) -> None:
        """Tell which ioctls the registered range takes."""
        self._call(Call.SET_IOCTLS, served, int(ioctls))

    def list_registered(
        self, space: int, ranges: Sequence[tuple[int, int]], *, is_all: bool = False
    ) -> None:
        """Tell what is registered; a worker that takes over is not told."""
        self._call(Call.LIST_REGISTERED, space, tuple(ranges), is_all)

    def unlist_registered(self, space: int, start: int, length: int) -> None:
        """Tell what is registered no more."""
        self._call(Call.UNLIST_REGISTERED, space, start, length)

    def unserve(
        self,
        served: RangeId,
        *,
        seal: bool,
        unregister: bool = True,
        patience_s: float = PATIENCE_S,
        gently: bool = False,
    ) -> bool:
        """Take a range out."""
        return bool(self._call(Call.UNSERVE, served, seal, unregister, patience_s, gently))

    def start(self, cpus: list[int]) -> None:
        """Start the driver."""
        self._call(Call.START, cpus)

    def end(self, patience_s: float) -> Ended:
        """Take out every range and end the driver; wait so long for whoever is held up."""
        ended: Ended = self._link.call_at_end(
            Call.END, patience_s, limit_s=SEAL_LIMIT_S + patience_s
        )
        self._has_ended = True
        return ended

    def progress(self) -> object:
        """Say that it gets on: the helper process keeps its own limits."""
        return time.monotonic()

    def held(self) -> tuple[Held, ...]:
        """Return who is at pages of a range at the moment."""
        return tuple(self._call(Call.HELD))

    def hurry(self, patience_s: float) -> None:
        """From any thread: let drain and end wait no longer than this."""
        self._link.hurry(patience_s)

    def drain(self, limit_ns: int) -> bool:
        """Wait until the faults that wait now are resolved; False when the time ran out."""
        return bool(self._link.call_at_end(Call.DRAIN, limit_ns, limit_s=limit_ns / 1e9))

    def refuse(self) -> None:
        """Poison what is asked for from now on."""
        self._link.call_at_end(Call.REFUSE)

    def abandon(self, served: RangeId | None = None, *, failed: bool = False) -> None:
        """Poison the pages that wait for a worker; note it as a failure."""
        self._link.call_at_end(Call.ABANDON, served, failed)

    def populate(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages; return the bytes filled."""
        return int(self._call(Call.POPULATE, served, offset, length, chunk))

    def preserve(self, served: RangeId, offset: int, length: int, *, unprotect: bool) -> int:
        """Save protected pages: there are none, `add` has no preserve."""
        raise ValueError(f"the range at {served.start:#x} was served without preserve=")

    def take_in(self, served: RangeId) -> None:
        """Note the pages that are there already."""
        self._call(Call.TAKE_IN, served)

    def writeprotect(self, served: RangeId, offset: int, length: int, pages: int) -> bytes:
        """Write-protect pages; return their states as they were when they were protected."""
        return bytes(self._call(Call.WRITEPROTECT, served, offset, length, pages))

    def states(self, served: RangeId, first_page: int, pages: int) -> bytes:
        """Return the state bytes of some pages."""
        return bytes(self._call(Call.STATES, served, first_page, pages))

    @property
    def spaces(self) -> int:
        """Address spaces that are followed."""
        return int(self._call(Call.SPACES))

    @property
    def owner_exited(self) -> bool:
        """Whether the process whose memory is served is gone."""
        return bool(self._call(Call.OWNER_EXITED))

    def failure_at(self, address: int) -> SourceFailure | None:
        """What is known of why a page was lost; perhaps of another one."""
        return known_failure(self.failure(), self.source_failure)

    @property
    def source_failure(self) -> SourceFailure | None:
        """What a source raised first."""
        found = self._call(Call.SOURCE_FAILURE)
        if found is None:
            return None
        blob, start, length = found
        return SourceFailure(_wire.load_error(blob), start, length)

    def stats(self) -> HandlerStats:
        """Sum up the counters."""
        stats: HandlerStats = self._call(Call.STATS)
        return stats

    def recent(self) -> list[RecentFault]:
        """Return the faults resolved last."""
        return list(self._call(Call.RECENT))

    def failure(self) -> Failure | None:
        """Return what went wrong, or None."""
        failure: Failure | None = self._call(Call.FAILURE)
        return failure

    def pids(self) -> tuple[int, int]:
        """Return the process ids of the keeper and of the worker."""
        keeper, worker = self._call(Call.PIDS)
        return keeper, worker

    def destroy(self) -> None:
        """End the helper process."""
        self._link.tell(Call.CLOSE)
        # After the end it has nothing left that anybody waits for.
        self._link.close(ENDED_LIMIT_S if self._has_ended else None)
