"""Holding faults: they wait, and nothing is resolved (layer L4)."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from pyuffd._arguments import check_seconds
from pyuffd._closing import Closing
from pyuffd._errors import ClosedError, HandlerError, HelperLostError, UffdOSError
from pyuffd._latch import RLock
from pyuffd.handlers._base import HandlerBase

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyuffd.handlers._backend import Backend

# Longer than a checkpoint of some gigabytes, and short enough that a program which forgets to
# continue does not seem to hang.
HOLD_LIMIT_S = 1.0


class Hold(Closing):
    """Faults are held until `release`, or until the limit; a context manager.

    Attributes:
        expired: Whether it ended before `release`, at the limit or as the handler stopped, so that
            faults were resolved meanwhile.
    """

    _instead = "it ends once"
    _failed = "the hold ended too early"

    def __init__(
        self, engine: Backend, limit_s: float, stopped_at: Callable[[], float | None]
    ) -> None:
        self._limit_s = limit_s
        self._stopped_at = stopped_at
        self._limit_at = time.monotonic() + limit_s
        self._engine: Backend | None = engine
        self._lock = RLock()
        self._is_begun = False  # the release
        self.expired: bool = False
        try:
            self._token = engine.pause(int(limit_s * 1e9))
        except UffdOSError as error:
            if error.errno != errno.ETIMEDOUT or self._cut_by_stop() is None:
                raise
            raise ClosedError("the handler was stopped before its faults were held") from None

    def _check_usable(self) -> None:
        if self._engine is None:
            raise ClosedError("the faults are no longer held: hold() holds them again")

    def close(self) -> None:
        """Release, as the end of the block does."""
        self.release()

    def release(self) -> None:
        """Let faults be resolved again; a second call does nothing.

        Raises:
            HandlerError: it had ended: faults were resolved although they should be held. The text
                says whether the limit came first, the handler was stopped, or its worker process
                was lost.
        """
        lost: HelperLostError | None = None
        with self._lock:
            engine = self._engine
            if engine is None:
                return
            # A call that a signal handler's exception has ended may have released them.
            was_begun, self._is_begun = self._is_begun, True
            try:
                is_released = engine.resume(self._token)
                self.expired = not (is_released or (was_begun and self._is_in_time()))
            except ClosedError:  # it stopped meanwhile
                self.expired = True
            except HelperLostError as error:
                self.expired, lost = True, error
            self._engine = None
        if self.expired:
            raise HandlerError(
                "faults were to be held, and were not to the end of the block:"
                f" {self._why(is_remote=engine.is_remote, lost=lost)}"
            )

    def _is_in_time(self) -> bool:
        return time.monotonic() < self._limit_at

    def _cut_by_stop(self) -> float | None:
        """Return when the handler was stopped, if that came before the limit."""
        stopped_at = self._stopped_at()
        return None if stopped_at is None or stopped_at >= self._limit_at else stopped_at

    def _why(self, *, is_remote: bool, lost: HelperLostError | None) -> str:
        began_at, stopped_at = self._limit_at - self._limit_s, self._cut_by_stop()
        if stopped_at is not None:
            return (
                f"the handler was stopped {stopped_at - began_at:.3f} s after they were held,"
                " before the limit"
            )
        if lost is not None:
            return str(lost)
        if is_remote and self._is_in_time():
            return "its worker process was replaced, and the new one holds none"
        return (
            f"they were resolved again after {self._limit_s:g} s: ask for a longer limit_s, or do"
            " less while they are held"
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
        populate() from a source in Python. What the owner has dropped is missing as well; without
        Feature.EVENT_REMOVE the handler does not know of that, and such a page may be DIRTY. If a
        signal handler raises just as the block ends, faults are held until the limit.

        Args:
            limit_s: After this many seconds faults are resolved again, and the end of the block
                raises HandlerError.

        Raises:
            RangeBusyError: EBUSY - they are held already.
            UffdOSError: ETIMEDOUT - a thread that resolves a fault was held up by its source for
                `limit_s`. Nothing is held.
            ClosedError: the handler has stopped, or was stopped as this call waited.
            HandlerError: at the end of the block: the limit came first, the handler was stopped, or
                the worker process of the process driver was replaced; the text says which.

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
        limit_s = check_seconds("limit_s", limit_s)
        return Hold(self._running_engine(), limit_s, self._stopped_at)

    def _stopped_at(self) -> float | None:
        return None if self._ending is None else self._ending.began_at
