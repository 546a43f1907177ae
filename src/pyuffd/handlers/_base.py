"""What the parts of `Handler` share: its state, and finding what it serves (layer L4)."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

from pyuffd._arguments import check_int
from pyuffd._closing import SoleOwner
from pyuffd._errors import ClosedError, HelperLostError
from pyuffd._pages import RangeLike, check_range, is_address, start_of
from pyuffd.handlers._backend import Backend
from pyuffd.handlers._bounce import BOUNCE_SIZE, Bounce
from pyuffd.handlers._checks import LAYOUT_EVENTS
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._overlaps import overlaps_lock
from pyuffd.handlers._served_parts import Part, holds, shown, without
from pyuffd.handlers._serving import Served, served_mode, unregister_hidden
from pyuffd.handlers._threads import WorkedEngine
from pyuffd.handlers._turns import turn_of
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.regions import Region

if TYPE_CHECKING:
    from pyuffd._abi import RegisterMode
    from pyuffd._latch import RLock
    from pyuffd._uffd import Userfaultfd
    from pyuffd.handlers._checks import Driver
    from pyuffd.handlers._ending import Ending
    from pyuffd.handlers._fault_log import FaultLog
    from pyuffd.handlers._overlaps import Overlaps
    from pyuffd.handlers._owners import Owners
    from pyuffd.handlers._serving import OnClose
    from pyuffd.handlers._types import (
        EngineOptions,
        HandlerStats,
        RecentFault,
        SourceFailure,
    )

BOUNCES_KEPT = 4  # as many threads fill at once without making memory for it


class HandlerBase(SoleOwner):
    """The state of a `Handler`, which makes it; every part of the class has this one's methods."""

    uffd: Userfaultfd
    driver: Driver

    _pid: int
    _engine: Backend | None
    _options: EngineOptions
    _worker_count: int
    _cpus: list[int]
    _owners: Owners
    _lock: RLock  # guards the members below; acquired before any lock of the C engine
    _spaces: dict[Userfaultfd, int]
    _served: dict[tuple[int, int], Served]  # by space and start
    _overlaps: Overlaps
    _bounces: list[Bounce]  # free ones
    _started: bool
    _may_move: bool  # true until the handler runs and serves a region without Python
    _at_close: OnClose[Any]

    _ending: Ending | None
    _ending_lock: RLock
    _ending_name: str
    _drains: bool
    _final_failure: SourceFailure | None
    _final_owner_exited: bool
    _final_stats: HandlerStats
    _final_faults: list[RecentFault]
    _final_log: FaultLog

    def _make_engine(self) -> Backend:
        fd = self.uffd.fileno()
        if self.driver == "process":
            return RemoteEngine(fd, workers=self._worker_count, **self._options)
        if self.driver == "thread":
            return WorkedEngine(fd, workers=self._worker_count, **self._options)
        return Engine(fd, inline=self.driver == "inline", **self._options)

    def _add_space(self, engine: Backend, uffd: Userfaultfd) -> int:
        return engine.add_space(
            uffd.fileno(),
            layout_events=int(uffd.features & LAYOUT_EVENTS),
            owner_pid=self._owners.of(uffd),
        )

    # The userfaultfd calls these when its own methods are used while the handler serves. They do
    # not acquire the lock, which may be held for long.

    def _registers(self, uffd: Userfaultfd, start: int, length: int) -> None:
        engine, space = self._engine, self._spaces.get(uffd)
        if engine is not None and space is not None and not uffd.adopted:
            with suppress(ClosedError, HelperLostError):
                engine.list_registered(space, [(start, length)])

    def _unregistered(self, uffd: Userfaultfd, start: int, length: int) -> None:
        engine, space = self._engine, self._spaces.get(uffd)
        if engine is not None and space is not None and not uffd.adopted:
            with suppress(ClosedError, HelperLostError):
                engine.unlist_registered(space, start, length)

    def _served_mode(self, uffd: Userfaultfd, start: int, length: int) -> RegisterMode | None:
        if self._engine is None or self._pid != os.getpid():
            return None
        return served_mode(list(self._served.values()), uffd, start, length)

    def _running_engine(self) -> Backend:
        if self._pid != os.getpid():
            raise ClosedError(
                f"this handler belongs to process {self._pid}, not to its fork {os.getpid()}"
            )
        engine = self._engine  # once: another thread, or a signal handler, may end it meanwhile
        if engine is None:
            raise ClosedError("this handler has stopped")
        return engine

    def _turn(self) -> AbstractContextManager[object]:
        """Return the lock, for a `with` statement."""
        return turn_of(self._lock, overlaps_lock())

    def _serves(self, served: Served) -> bool:
        return self._served.get(served.key) is served

    @property
    def must_end(self) -> bool:
        """Whether the handler must stop before its userfaultfd may be closed."""
        return self._engine is not None and self._pid == os.getpid()

    def _forget(self, served: Served, *, is_held: bool = False, stays: bool = False) -> None:
        """Release what belongs to a range that is no longer served; may be called again.

        The caller then lets go what was borrowed. What a thread that is left behind (`is_held`) may
        use stays. What may stay registered (`stays`) is watched: a thread that waits there, or for
        the event of its unmapping, is reported.
        """
        if not self._serves(served):
            return
        for memory in served.memory:
            self._overlaps.remove(memory)
        if not stays:
            for start, length in served.spans():
                served.uffd._note_unregistered(start, length)
        served.is_held = is_held
        if served.alias is not None and not is_held:
            served.alias.close()
        if isinstance(served.region, Region):
            served.region._note_served()
            if stays:
                number, spans = served.uffd._number, served.spans()
                served.region._on_unmap(functools.partial(unregister_hidden, number, spans))
            for callback in served.on_close:
                served.region._forget_on_close(callback)
            served.region._forget_check(served.check)
        served.let_unmap()
        self._served.pop(served.key, None)  # last

    def _forget_part(self, served: Served, begin: int, end: int) -> None:
        """Note that a part of a range is no longer served; may be called again."""
        if not self._serves(served):
            return
        served.uffd._note_unregistered(served.id.start + begin, end - begin)
        if isinstance(served.region, Region):
            served.region._note_served(begin, end - begin)
        left = without(served.parts, begin, end)
        old = list(served.memory)
        new = old[0].parts((served.id.start + first, past - first) for first, past in left)
        served.memory = old + new  # until all of this is done
        for memory in new:
            self._overlaps.add(memory)
        for memory in old:
            self._overlaps.remove(memory)
        served.memory = new
        key = served.key
        self._served[served.id.space, served.id.start + left[0][0]] = served
        served.parts = left
        if key != served.key:
            self._served.pop(key, None)

    def _bounce(self, page_size: int, *, shared: bool) -> Bounce:
        """Return memory for content under way; give it to `_keep_bounce` afterwards."""
        while (bounce := self._take_bounce()) is not None:
            if bounce.size >= page_size and shared == (bounce.fd >= 0):
                return bounce
        return Bounce(max(BOUNCE_SIZE, page_size), shared=shared)

    def _keep_bounce(self, bounce: Bounce) -> None:
        if len(self._bounces) >= BOUNCES_KEPT:
            bounce.close()
            return
        self._bounces.append(bounce)
        if self._engine is None:
            self._close_bounces()

    def _close_bounces(self) -> None:
        while (bounce := self._take_bounce()) is not None:
            bounce.close()

    def _take_bounce(self) -> Bounce | None:
        try:
            return self._bounces.pop()
        except IndexError:  # none, or another thread has just taken the last
            return None

    def _find(self, region: RangeLike | int, uffd: Userfaultfd | None = None) -> Served | None:
        """Return the range that begins where a region does, if it is served."""
        return self._find_at(start_of(region), region, uffd)

    def _find_at(
        self, start: int, region: RangeLike | int, uffd: Userfaultfd | None = None
    ) -> Served | None:
        # Copies: other threads may serve and unserve meanwhile.
        at = [
            self._served.get((space, start))
            for known, space in list(self._spaces.items())
            if uffd in (None, known)
        ]
        found = [one for one in at if one is not None]
        if len(found) == 1:
            return found[0]
        # Processes may have different memory at one address; the object served tells them apart.
        same = [one for one in found if one.region is region]
        if len(same or found) > 1:
            raise ValueError(
                f"several ranges at {start:#x} are served: pass the object that was served, or uffd"
            )
        return next(iter(same or found), None)

    def _pages(
        self, region: RangeLike, offset: int, length: int | None
    ) -> tuple[Backend, Served, int, int]:
        engine = self._running_engine()
        served, begin, past = self._find_part(region)
        offset = check_int("offset", offset)
        if length is None and offset >= past - begin:
            raise ValueError(f"offset {offset:#x} is outside a region of {past - begin:#x}")
        length = past - begin - offset if length is None else check_int("length", length)
        check_range(offset, length, served.page_size, name="offset")
        if begin + offset + length > past:
            raise ValueError(
                f"offset {offset:#x} + {length:#x} is outside a region of {past - begin:#x}"
            )
        if begin:
            offset += begin
            check_range(offset, length, served.page_size, name="start")
        if not holds(served.parts, offset, offset + length):
            raise ValueError(
                f"not all of [{served.id.start + offset:#x}, +{length:#x}) is served as one range:"
                f" this one has only {shown(served.parts, served.id.start)}"
            )
        return engine, served, offset // served.page_size, length // served.page_size

    def _find_part(self, region: RangeLike) -> tuple[Served, int, int]:
        """Return what is served of a region, or of a part of one: offsets in the served range."""
        start = start_of(region)
        served = self._find_at(start, region)
        if is_address(region):
            length = 0 if served is None else served.parts[-1][1] - served.parts[0][0]
        else:
            length = region.length
        if served is None or not holds(served.parts, *_offsets(served, start, length)):
            others = [one for one in list(self._served.values()) if one.is_here]
            whole = [one for one in others if one.region is region]
            whole += [one for one in others if holds(one.parts, *_offsets(one, start, length))]
            served = whole[0] if whole else served
        if served is None:
            raise ValueError(f"no range at {start:#x} is served by this handler")
        return served, *_offsets(served, start, length)


def _offsets(served: Served, start: int, length: int) -> Part:
    return start - served.id.start, start - served.id.start + length
