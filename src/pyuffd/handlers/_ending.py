"""End a handler in a thread of its own (layer L4).

A signal handler may raise at any line in the thread that waits for the end. The ending thread is
not interrupted, so every page is still poisoned and every region unregistered. The first exception
cuts the ending short, and the waiting thread still waits for it; a second one is raised at once.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable

from pyuffd._closing import attach
from pyuffd._describe import repr_of
from pyuffd._errors import HandlerError, UffdOSError
from pyuffd._latch import Latch, RLock
from pyuffd._limits import start_thread
from pyuffd._overlay import leaves_of
from pyuffd._room import has_room_for_thread
from pyuffd.handlers._backend import Backend
from pyuffd.handlers._serving import Served
from pyuffd.handlers._threads import WorkedEngine
from pyuffd.sources import AsyncSource, PageSource

log = logging.getLogger(__name__)

# How often a waiting thread looks for signals and for progress of the ending.
LOOK_S = 0.2
# How long to wait, without any progress, after the limit that the ending itself keeps has passed.
REST_LIMIT_S = 10.0
# How long to wait for page sources after the limit has passed or the ending was cut short.
GRACE_S = 0.2


def refuse_sources_thread(engine: Backend, all_served: Iterable[Served]) -> None:
    """Raise HandlerError in a thread that a page source needs: it would wait for itself."""
    if isinstance(engine, WorkedEngine) and engine.works_here():
        raise HandlerError(
            "a handler cannot be stopped, nor its userfaultfd closed, by its own page source: the"
            " end waits for the source's answer. Let another thread call stop() or close()"
        )
    if engine.is_remote:  # the coroutines run in a loop of the helper process
        return
    for served in list(all_served):
        if any(_runs_here(leaf) for leaf in leaves_of(served.source)):
            raise HandlerError(
                "stop() was called in the loop's own thread, which must be free for the"
                f" coroutines of {repr_of(served.source)}: use `async with handler`, or"
                " `await asyncio.to_thread(handler.stop)`",
                served.id.start,
                served.id.length,
            )


def _runs_here(source: PageSource) -> bool:
    return isinstance(source, AsyncSource) and source.runs_here()


class Ending:
    """Ends a handler once; `work` returns the error that stop() raises.

    `hurry` lets the work wait for page sources only this many seconds from now. `progress`
    returns a value that changes while the work makes progress.

    Threads: safe, and usable in a signal handler that interrupted the waiting thread.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Ending], HandlerError | None],
        hurry: Callable[[float], None],
        progress: Callable[[], object],
        limit_s: float,
    ) -> None:
        self.is_cut_short = False
        self._work = work
        self._hurry = hurry
        self._progress = progress
        self._error: BaseException | None = None
        self._is_over = Latch()
        self._start_lock = RLock()
        self._is_started = False
        self._work_lock = RLock()
        self._worker = 0  # the thread that does the work
        self.began_at = time.monotonic()
        self._give_up_at = self.began_at + limit_s
        self._limit_s = limit_s
        self._name = name

    def left_s(self) -> float:
        """Return how long page sources may still be waited for."""
        if self.is_cut_short:
            return GRACE_S
        return max(GRACE_S, self._give_up_at - time.monotonic())

    def wait(self) -> None:
        """Start the ending if needed, wait for it, and raise its error, once."""
        if self._worker == threading.get_ident():
            return  # the ending closed an object whose callback stops the handler
        try:
            self._go_on()
        except BaseException:
            self.cut_short()
            self._go_on()
            raise
        error, self._error = self._error, None
        if error is not None:
            raise error

    def cut_short(self) -> None:
        """Stop waiting for page sources."""
        self.is_cut_short = True
        self._let_hurry(GRACE_S)

    def shorten(self, limit_s: float) -> None:
        """Wait for page sources no longer than `limit_s` from now; never longer than before."""
        if not self._is_over.is_set() and limit_s < self.left_s():
            self._give_up_at, self._limit_s = time.monotonic() + limit_s, limit_s
            self._let_hurry(max(GRACE_S, limit_s))

    def _let_hurry(self, limit_s: float) -> None:
        try:
            self._hurry(limit_s)
        except Exception as error:  # the handler may have ended, or its helper may be lost
            log.debug("cutting the end of a handler short: %s", error)

    def _go_on(self) -> None:
        if not self._start():
            self._run()
        self._join()

    def _start(self) -> bool:
        """Start the thread; return False if none can be started, as when the interpreter exits.

        If this is interrupted it is unknown whether the thread exists, and the next call starts
        another. Only one of them does the work.
        """
        # Before Python 3.12 a thread that is started now would never run, nor start() return.
        if sys.is_finalizing() or not has_room_for_thread():
            return False
        with self._start_lock:
            if not self._is_started:
                try:
                    threading.Thread(target=self._run, name=self._name, daemon=True).start()
                except RuntimeError as error:
                    log.debug("cannot start a thread that ends the handler: %s", error)
                    return False
                self._is_started = True
        return True

    def _run(self) -> None:
        """Do the work unless it has been done; every step of it may be repeated."""
        if self._is_over.is_set():
            return
        # At the interpreter's exit every other thread that needs the GIL has ended where it was,
        # perhaps with the lock.
        with contextlib.nullcontext() if sys.is_finalizing() else self._work_lock:
            if self._is_over.is_set():
                return
            self._worker = threading.get_ident()
            try:
                self._error = self._work(self)
            except Exception as error:
                self._error = error
            finally:
                self._worker = 0
            self._is_over.set()

    def _join(self) -> None:
        last, since = None, time.monotonic()
        while not self._is_over.wait(LOOK_S):
            now, progress = time.monotonic(), self._look()
            if progress != last:
                last, since = progress, now
            limit_s = GRACE_S if self.is_cut_short else self._limit_s
            if now - since > limit_s + REST_LIMIT_S:
                raise HandlerError(
                    f"stopping a handler makes no progress: thread {self._name!r} continues it,"
                    " and ranges that are not unregistered yet stay registered"
                )

    def _look(self) -> object:
        try:
            return self._progress()
        except Exception:  # in its last steps the ending has no engine to ask
            return None


async def leave_in_thread(
    name: str, leave: Callable[[], None], cut_short: Callable[[], None], failed: str
) -> None:
    """Call `leave` in a thread of its own, and wait for it as long as no second cancellation comes.

    It is not a thread of the loop's executor: these may all wait for pages. The first cancellation
    calls `cut_short`. An error of `leave` is kept with the CancelledError.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    over = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if not over.done():
            over.set_result(error)

    def work() -> None:
        error: BaseException | None = None
        try:
            leave()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(tell, error)
        except RuntimeError:  # the loop was closed: nobody waits
            if error is not None:
                log.error("pyuffd: %s: %s", failed, error)

    try:
        start_thread(threading.Thread(target=work, name=name, daemon=True))
    except UffdOSError as reason:
        log.debug("cannot start a thread that leaves the handler: %s", reason)
        leave()  # it refuses if a page source needs this thread
        return
    try:
        error = await asyncio.shield(over)
    except asyncio.CancelledError as cancelled:
        cut_short()
        error = await asyncio.shield(over)
        if error is not None:
            attach(cancelled, error, failed)
        raise
    if error is not None:
        raise error
