"""The engine in the worker process, as seen by the process of the `Handler` (layer L4).

Calls go over one socket (`_link`) to the keeper (`_keeper`), and from there to the worker process
(`_worker`), which runs the engine and the page sources. No call is needed to resolve a fault.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Unpack

from pyuffd._closing import SoleOwner
from pyuffd._describe import repr_of
from pyuffd._dropped import close_dropped
from pyuffd._errors import HelperLostError
from pyuffd._overlay import OverlaySource, without_files
from pyuffd._owned import Descriptor
from pyuffd.handlers._bounce import Bounce
from pyuffd.handlers._engine_calls import Dropping
from pyuffd.handlers._fault_log import FaultLog
from pyuffd.handlers._packed import Packed
from pyuffd.handlers._served_parts import Part
from pyuffd.handlers._types import (
    PATIENCE_S,
    Ended,
    EngineOptions,
    Failure,
    HandlerStats,
    Held,
    Opening,
    Protect,
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
from pyuffd.handlers.process._stand_in import StandIn
from pyuffd.handlers.process._start import starting
from pyuffd.handlers.process._transport import pack
from pyuffd.lowlevel import Granted
from pyuffd.pagemap import Pagemap

# How long a worker process needs to poison a terabyte.
SEAL_LIMIT_S = 60.0
ENDED_LIMIT_S = 3.0
NO_EVICTION = (
    "driver='process' cannot evict: its engine is in another process, which cannot drop memory of"
    " this one. Use driver='native', or driver='thread' for a source in Python"
)
# Descriptors of a source: a message has those of `local` and of the pages' states as well.
MAX_FILES = _wire.MAX_FDS - 2


def _close(link: HelperLink, stand_in: StandIn | None) -> None:
    if stand_in is not None:
        stand_in.dismiss()
    link.close()


class RemoteEngine(SoleOwner):
    """A `Backend` in another process, where `workers` threads call the page sources."""

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
                own = Descriptor.of_process(os.getpid())  # tells the keeper when we end
            with own:
                self._link.introduce((options, workers), (fd, own.number))
            self._stand_in = StandIn(fd, self._link.helper, **options)
        except BaseException:
            self._link.close()
            raise

    def __del__(self) -> None:
        # Needed if an exception came before the object reached its user. In a fork the helper
        # belongs to the parent.
        if hasattr(self, "_link") and self._pid == os.getpid():
            close = partial(_close, self._link, getattr(self, "_stand_in", None))
            close_dropped(close) if self._link.is_open else close()

    # What a Handler calls

    def add_space(self, fd: int, *, layout_events: int, owner_pid: int) -> int:
        """Serve another userfaultfd too; return its space."""
        self._added_spaces += 1
        key = self._added_spaces
        try:
            space = int(self._call(Call.ADD_SPACE, layout_events, owner_pid, key, fds=(fd,)))
            self._stand_in.add_space(space, fd, layout_events=layout_events, owner_pid=owner_pid)
            return space
        except BaseException:
            with suppress(HelperLostError):
                space = self._call(Call.FIND_SPACE, key)
                if space is not None:  # interrupted: the caller does not know of it
                    self.remove_space(space)
            raise

    def remove_space(self, space: int) -> None:
        """Forget a userfaultfd whose ranges have been taken out."""
        with suppress(HelperLostError):  # stop() raises it
            self._call(Call.REMOVE_SPACE, space)
        self._stand_in.remove_space(space)

    def add(self, spec: RangeSpec) -> RangeId:
        """Put a range in; its source and descriptors are sent to the worker process."""
        content = spec.content
        if content.kind is SourceKind.REQUEST and content.overlay is not None:
            # The sources that are memory are sent with those in Python.
            content = replace(content, overlay=content.overlay.without_memory())
        if content.reads_memory:
            raise ValueError(
                f"{repr_of(content.owner)} is memory of this process, or some of it is, which the"
                " helper process cannot read: write it to a memfd and serve a FileSource, or use"
                " driver='thread'"
            )
        if spec.preserve:
            raise ValueError(
                "preserve= is memory of this process, which the helper process cannot write:"
                " serve the region with another Handler, with driver='native'"
            )
        fds = content.fds
        if len(fds) > MAX_FILES:
            raise ValueError(
                f"{repr_of(content.owner)} has {len(fds)} files, more than the {MAX_FILES} that can"
                " be sent to the helper process: use driver='native'"
            )
        unsent = content.with_fds([-1] * len(fds))
        if spec.local_file:
            fds.append(spec.local_file[0])
        source = None
        if content.kind is SourceKind.REQUEST:
            owner = content.owner
            source = pack(without_files(owner) if isinstance(owner, OverlaySource) else owner)
        sent = replace(spec, content=replace(unsent, address=0, owner=source), local=0, owner=None)
        served: RangeId = self._call(Call.ADD, sent, fds=tuple(fds))
        self._stand_in.add(served, spec)
        return served

    def find(self, space: int, start: int) -> RangeId | None:
        """Return the range that an interrupted `add` has put in there, or None."""
        found: RangeId | None = self._call(Call.FIND, space, start)
        return found

    def open(
        self, served: RangeId, how: Opening, granted: Granted, pagemap: Pagemap | None = None
    ) -> int:
        """Have the worker process register a range, look for pages, and begin to serve it.

        A thread of this process that waits meanwhile may have the GIL.
        """
        fds = () if pagemap is None else (pagemap.fileno(),)
        return self._open(served, granted, lambda: int(self._call(Call.OPEN, served, how, fds=fds)))

    def open_dropped(
        self, served: RangeId, how: Opening, granted: Granted, fd: int, *, shared: bool
    ) -> int:
        """Register a range here, drop all of it, and have the worker process serve it."""
        drop = Dropping(fd, served.start, served.length, how.mode, shared=shared)
        return self._open(
            served, granted, lambda: int(self._link.call_by(drop.send, Call.OPEN, served, how))
        )

    def _open(self, served: RangeId, granted: Granted, call: Callable[[], int]) -> int:
        granted.ask()
        try:
            ioctls = call()
        except Exception as error:
            if not isinstance(error, HelperLostError):
                granted.answer(0)
            raise
        granted.answer(ioctls)
        self._stand_in.set_ioctls(served, ioctls)
        return ioctls

    def set_ioctls(self, served: RangeId, ioctls: int) -> None:
        """Begin to serve a range that its owner registers."""
        self._call(Call.SET_IOCTLS, served, int(ioctls))
        self._stand_in.set_ioctls(served, int(ioctls))

    def list_registered(
        self, space: int, ranges: Sequence[tuple[int, int]], *, is_all: bool = False
    ) -> None:
        """Note registered ranges (start, length); `is_all`: no others are."""
        self._call(Call.LIST_REGISTERED, space, tuple(ranges), is_all)

    def unlist_registered(self, space: int, start: int, length: int) -> None:
        """Note that a range is no longer registered."""
        self._call(Call.UNLIST_REGISTERED, space, start, length)

    def unserve(
        self,
        served: RangeId,
        *,
        seal: bool,
        unregister: bool = True,
        patience_s: float = PATIENCE_S,
        gently: bool = False,
        part: Part | None = None,
    ) -> bool:
        """Take a range, or a part of it, out."""
        try:
            found = self._call(Call.UNSERVE, served, seal, unregister, patience_s, gently, part)
            done = bool(found)
        except HelperLostError:
            # stop() raises it. Here the caller continues, perhaps to unmap the range.
            return self._stand_in.remove(
                served.number,
                seal=seal,
                unregister=unregister,
                patience_s=patience_s,
                gently=gently,
                part=part,
            )
        if done:
            self._stand_in.remove(served.number, part=part)
        return done

    def start(self, cpus: list[int]) -> None:
        """Start the driver."""
        self._call(Call.START, cpus)
        self._stand_in.start()

    def end(self, patience_s: float) -> Ended:
        """Take out every range and end the driver; wait `patience_s` at most for its threads."""
        self._stand_in.dismiss()
        ended: Ended = self._link.call_at_end(
            Call.END, patience_s, limit_s=SEAL_LIMIT_S + patience_s, patience_s=patience_s
        )
        self._has_ended = True
        return ended

    def progress(self) -> object:
        """Return a value that always changes: the helper process keeps its own limits."""
        return time.monotonic()

    def held(self) -> tuple[Held, ...]:
        """Return the threads at pages of ranges."""
        return tuple(self._call(Call.HELD))

    def hurry(self, patience_s: float) -> None:
        """Let drain and end, in other threads, wait no longer than this."""
        self._link.hurry(patience_s)

    def drain(self, limit_ns: int) -> bool:
        """Wait until the faults that wait now are resolved; return False after the limit."""
        self._stand_in.dismiss()
        return bool(self._link.call_at_end(Call.DRAIN, limit_ns, limit_s=limit_ns / 1e9))

    def refuse(self) -> None:
        """Poison pages that fault from now on."""
        self._link.call_at_end(Call.REFUSE)

    def abandon(self, served: RangeId | None = None, *, failed: bool = False) -> None:
        """Poison the pages that wait for a worker, of one range or all; `failed` counts them."""
        self._link.call_at_end(Call.ABANDON, served, failed)

    def populate(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages; return the bytes filled."""
        return int(self._call(Call.POPULATE, served, offset, length, chunk))

    def populate_ranges(
        self, served: RangeId, offset: int, length: int, ranges: Packed, chunk: int = 0
    ) -> int:
        """Fill absent pages of ranges in [offset, +length); return the bytes filled."""
        return int(self._call(Call.POPULATE_RANGES, served, offset, length, ranges, chunk))

    def load(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages that have content, in forks too; return the bytes filled."""
        return int(self._call(Call.LOAD, served, offset, length, chunk))

    def fill(
        self, served: RangeId, offset: int, source: Bounce | int, length: int, *, unprotected: bool
    ) -> int:
        """Fill absent pages from a shared Bounce, which the worker process maps too."""
        if not isinstance(source, Bounce):
            raise TypeError("the worker process cannot read memory of this one")
        found = self._call(Call.FILL, served, offset, length, unprotected, fds=(source.fd,))
        return int(found)

    def preserve(self, served: RangeId, offset: int, length: int, *, unprotect: bool) -> int:
        """Raise ValueError, since `add` refuses ranges with `preserve`."""
        raise ValueError(f"the range at {served.start:#x} was served without preserve=")

    def take_in(self, served: RangeId) -> None:
        """Note the pages that are present."""
        self._call(Call.TAKE_IN, served)

    def writeprotect(
        self, served: RangeId, offset: int, length: int, pages: int, how: Protect
    ) -> bytes:
        """Protect pages, or lift the protection; return their states as they were then."""
        return bytes(self._call(Call.WRITEPROTECT, served, offset, length, pages, how))

    def pause(self, limit_ns: int) -> int:
        """Resolve no fault for at most `limit_ns`; return a token for `resume`."""
        return int(self._call(Call.PAUSE, limit_ns))

    def resume(self, token: int) -> bool:
        """Resolve faults again; return False if this engine did so before."""
        return bool(self._call(Call.RESUME, token))

    def peek(self, served: RangeId, offset: int, length: int, target: int) -> bool:
        """Raise ValueError, as `evict` does."""
        raise ValueError(NO_EVICTION)

    def evict(
        self, served: RangeId, offset: int, length: int, wanted: bytes, *, written_too: bool
    ) -> int:
        """Raise ValueError: the worker process cannot drop memory of this one."""
        raise ValueError(NO_EVICTION)

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
        """Raise ValueError, as `evict` does."""
        raise ValueError(NO_EVICTION)

    def retry(self, served: RangeId, offset: int, length: int) -> int:
        """Wake what waits, so that it faults again; return how many pages have failed so far."""
        return int(self._call(Call.RETRY, served, offset, length))

    def states(self, served: RangeId, first_page: int, pages: int) -> bytes:
        """Return the state bytes of some pages."""
        return bytes(self._call(Call.STATES, served, first_page, pages))

    @property
    def spaces(self) -> int:
        """The number of address spaces served."""
        return int(self._call(Call.SPACES))

    @property
    def owner_exited(self) -> bool:
        """Whether the process whose memory is served has exited."""
        return bool(self._call(Call.OWNER_EXITED))

    def failure_at(self, address: int) -> SourceFailure | None:
        """Return why a page was lost, or the first failure, which may be of another page."""
        try:
            found = self._call(Call.FAILURE_AT, address)
        except HelperLostError as lost:
            return self._stand_in.failure_at(address, lost)
        if found is not None and found[1] <= address < found[1] + found[2]:
            return _wire.load_failure(found)
        # An earlier worker may have seen it.
        failure, source = self.failure(), self.source_failure
        gave_up = failure is not None and failure.error == errno.EOWNERDEAD
        if gave_up and source is not None:  # whatever page it is
            return SourceFailure(source.error, address, 1)
        return known_failure(failure, source)

    @property
    def source_failure(self) -> SourceFailure | None:
        """The first exception of a source."""
        found = self._call(Call.SOURCE_FAILURE)
        return None if found is None else _wire.load_failure(found)

    def stats(self) -> HandlerStats:
        """Return the sums of the counters."""
        stats: HandlerStats = self._call(Call.STATS)
        return stats

    def fault_count(self) -> int:
        """Return how many missing and minor faults were resolved."""
        faults = self.stats().faults
        return faults["missing"] + faults["minor"]

    def recent(self) -> list[RecentFault]:
        """Return the faults resolved last."""
        return list(self._call(Call.RECENT))

    def take_faults(self) -> FaultLog:
        """Take what the log of demand faults holds."""
        log: FaultLog = self._call(Call.TAKE_FAULTS)
        return log

    def failure(self) -> Failure | None:
        """Return the first failure and the number of failures, or None."""
        failure: Failure | None = self._call(Call.FAILURE)
        return failure

    def pids(self) -> tuple[int, int]:
        """Return the pids of the keeper and of the worker process."""
        keeper, worker = self._call(Call.PIDS)
        return keeper, worker

    def own(self) -> None:
        """Note that somebody will call `destroy`, even if all of it is garbage."""
        self._stand_in.engine.own()

    def destroy(self) -> None:
        """End the helper processes."""
        self._stand_in.close()
        self._leave()

    def take_over(self) -> StandIn:
        """End what is left of a lost helper; return the stand-in, which poisons from now on."""
        self._stand_in.take_over()
        self._leave()
        return self._stand_in

    def _leave(self) -> None:
        self._link.leave()
        self._link.tell(Call.CLOSE)
        # After `end` no thread waits for it any more.
        self._link.close(ENDED_LIMIT_S if self._has_ended else None)
