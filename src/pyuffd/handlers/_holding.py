"""Holding faults: they wait, and nothing is resolved (layer L4)."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pyuffd._arguments import check_seconds
from pyuffd._closing import Closing
from pyuffd._errors import ClosedError, HandlerError, HelperLostError
from pyuffd.handlers._base import HandlerBase

if TYPE_CHECKING:
    from pyuffd.handlers._backend import Backend

# Longer than a checkpoint of some gigabytes, and short enough that a program which forgets to
# continue does not seem to hang.
HOLD_LIMIT_S = 1.0


class Hold(Closing):
    """Faults are held until `release`, or until the limit; a context manager.

    Attributes:
        expired: Whether the limit came first, so that faults were resolved meanwhile.
    """

    _instead = "it ends once"
    _failed = "the hold ended too early"

    def __init__(self, engine: Backend, limit_s: float) -> None:
        self._limit_s = limit_s
        self._engine: Backend | None = engine
        self._lock = threading.Lock()
        self.expired: bool = False
        self._token = engine.pause(int(limit_s * 1e9))

    def close(self) -> None:
        """Release, as the end of the block does."""
        self.release()

    def release(self) -> None:
        """Let faults be resolved again; a second call does nothing.

        Raises:
            HandlerError: the limit came first: faults were resolved although they should be held.
        """
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is None:
            return
        try:
            self.expired = not engine.resume(self._token)
        except (ClosedError, HelperLostError):  # it stopped meanwhile
            self.expired = True
        if self.expired:
            raise HandlerError(
                f"faults were to be held, and were resolved again after {self._limit_s:g} s: ask"
                " for a longer limit_s, or do less while they are held"
            )


class HoldsFaults(HandlerBase):
    """The part of `Handler` that holds faults."""

    def hold(self, limit_s: float = HOLD_LIMIT_S) -> Hold:
        """Hold faults: return a context manager, in whose block threads that fault wait.

        When this returns no fault is being resolved, and none is until the end of the block. So
        several calls (`checkpoint` of many regions, `writeprotect`, `populate`) see memory of one
        instant, as far as its pages are missing or protected: pages that are neither can still be
        written. What sources in Python answer, and prefetch, waits as well; layout events are
        applied. Do not touch missing or protected pages inside the block, as this thread would wait
        too, nor through views in other threads, which would hold the GIL as they wait, nor
        populate() from a source in Python.

        Args:
            limit_s: After so many seconds faults are resolved again, and the end of the block
                raises HandlerError.

        Raises:
            RangeBusyError: EBUSY - they are held already.
            UffdOSError: ETIMEDOUT - a thread that resolves a fault was held up by its source for
                `limit_s`. Nothing is held.
            HandlerError: at the end of the block: the limit came first, or the worker process of
                the process driver was replaced.

        GIL: released.  Threads: safe.  Blocks: until the faults that are being resolved have been
        resolved, for at most `limit_s`.

        Example:
            >>> from pyuffd import Feature, Handler, Region, RegisterMode, Userfaultfd
            >>> with (
            ...     Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
            ...     Region.anonymous(8192) as one,
            ...     Region.anonymous(8192) as two,
            ...     Handler(uffd) as handler,
            ... ):
            ...     for region in (one, two):
            ...         _ = handler.serve(region, None, mode=RegisterMode.WP)
            ...         _ = handler.writeprotect(region)
            ...     one.write(0, b"new")
            ...     with handler.hold():
            ...         written = [handler.checkpoint(region).written for region in (one, two)]
            ...     [list(ranges) for ranges in written]
            [[StateRange(0x0, 0x1000, <PageState.DIRTY: 3>)], []]
        """
        check_seconds("limit_s", limit_s)
        return Hold(self._running_engine(), check_seconds("limit_s", limit_s))
