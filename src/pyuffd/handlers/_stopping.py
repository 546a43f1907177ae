"""`Handler.stop`: every page poisoned, every region unregistered, the driver ended (layer L4)."""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from contextlib import suppress

from pyuffd._arguments import check_bools
from pyuffd._closing import alive
from pyuffd._describe import log_error
from pyuffd._errors import HandlerError, HelperLostError, UffdOSError
from pyuffd._latch import is_held_here
from pyuffd._memory import note_ended
from pyuffd.handlers._aftermath import (
    completed,
    describe,
    leave_behind,
    take_out_what_goes,
    views_of,
)
from pyuffd.handlers._backend import Backend
from pyuffd.handlers._base import HandlerBase
from pyuffd.handlers._checks import check_timeout, handler_error
from pyuffd.handlers._ending import LOOK_S, Ending, refuse_sources_thread
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._types import Ended, SourceKind, known_failure
from pyuffd.handlers.process._remote import RemoteEngine

log = logging.getLogger(__name__)


class Stops(HandlerBase):
    """The part of `Handler` that ends it."""

    _stops_inside = False  # one of its calls waits for the end: a signal handler has interrupted it

    def stop(self, drain: bool = True, *, timeout_s: float | None = None) -> None:
        """Stop: resolve or poison what waits, unregister every region, end the driver.

        Pages that were never filled are poisoned, as by `unserve`. A second call does nothing, or
        waits for the first, which waits for page sources no longer than either asked for.

        Poisoning takes time and page tables for all that was never filled, as much as UFFDIO_POISON
        alone. Memory that nobody needs afterwards is better closed before: for a region of 8 GiB of
        which nothing had been touched, that was 24 to 45 times faster (measured).

        Args:
            drain: Fill the pages that threads wait for now. False poisons them.
            timeout_s: How long page sources may need for that, in seconds; 10 by default. Pages
                that threads still wait for are then poisoned.

        Raises:
            HandlerError: since the start, the content of a page could not be read, and was not read
                later either (see `retry`), or the engine failed; or a page source does not return
                to a thread, which is left behind. The error names page, source and thread. The
                handler is stopped in any case.
            HandlerError: called by a page source, or in the thread of the loop that an
                `AsyncSource` runs in: this would wait for itself, so nothing is done.
            HelperLostError: the helper process is gone. The handler is stopped.
            ValueError: a negative `timeout_s`.

        GIL: released while it waits.  Threads: safe.
        Blocks: no longer than `timeout_s` for page sources, even if they never return. A helper
            process that does not answer (stopped, frozen) gets 5 s more as a rule, and is killed
            then: a thread of this process poisons what is missing. If a signal
            handler raises meanwhile (Ctrl-C), the wait is cut short: the exception is raised when
            every page is poisoned and every region unregistered. A second exception is raised at
            once, and a thread finishes stopping.
        """
        limit_s = check_timeout(timeout_s)
        check_bools(drain=drain)
        if self._pid != os.getpid():
            return  # before the lock, which a thread of the parent may have held at the fork
        self._refuse_sources_thread()
        self._stop(drain, limit_s)

    def _refuse_sources_thread(self) -> None:
        engine = self._engine  # once: another thread may end it meanwhile
        if engine is not None and self._pid == os.getpid():
            refuse_sources_thread(engine, list(self._served.values()))

    def _stop(self, drain: bool, limit_s: float) -> None:
        self._make_ending(drain, limit_s)
        if self._ending is not None:
            self._ending.wait()

    def _make_ending(self, drain: bool, limit_s: float) -> None:
        """Make the ending, which begins when somebody waits for it, or shorten an earlier one."""
        self._stops_inside = self._stops_inside or is_held_here(self._lock)
        with self._ending_lock:
            earlier = self._ending
            if earlier is None and self._engine is not None:
                self._drains = drain
                self._ending = Ending(
                    self._ending_name,
                    self._finish,
                    lambda left_s: self._running_engine().hurry(left_s),
                    lambda: self._running_engine().progress(),
                    limit_s,
                )
        if earlier is not None:
            earlier.shorten(limit_s)

    def _finish(self, ending: Ending) -> HandlerError | None:
        """End everything; return what stop() raises. Each step may be repeated."""
        locked = self._acquire_at_end(ending)
        all_served = list(self._served.values())
        try:
            engine = self._engine
            if engine is None:
                return None
            try:
                return self._end(engine, ending)
            except HelperLostError as lost:
                ending.cut_short()
                self._end(self._stand_in_for(engine), ending)
                return lost
        finally:
            self._engine = None
            for uffd in list(self._spaces):
                uffd._release_events(self)
                uffd._let_close(id(self))
            unstopped.discard(self)
            self.uffd._forget_on_close(self._at_close)
            self._at_close.keeps = None
            for served in all_served:
                if not served.is_held and not self._serves(served):
                    served.borrowed.let_go()
            self._close_bounces()
            if locked:
                self._lock.release()

    def _acquire_at_end(self, ending: Ending) -> bool:
        """Acquire the lock; return whether that was possible."""
        # A thread in serve() may hold it and wait. Ranges that it adds later are refused. A call
        # that a signal handler has interrupted to stop cannot let go of it.
        give_up_at = time.monotonic() + ending.left_s()
        while (left_s := give_up_at - time.monotonic()) > 0 and not self._stops_inside:
            if self._lock.acquire(timeout=min(LOOK_S, left_s)):
                return True
        return self._lock.acquire(blocking=False)

    def _end(self, engine: Backend, ending: Ending) -> HandlerError | None:
        """Stop an engine and return the error that it reports."""
        all_served, began = list(self._served.values()), time.monotonic()
        views = [] if engine.is_remote else views_of(all_served)
        ending_user = (id(self), "ending")
        for uffd in list(self._spaces):
            uffd._hold_open(ending_user)
        # Assumed until it is known; a lost helper holds nothing open, its stand-in does.
        ended = Ended(stays=not engine.is_remote)
        try:
            self._drain(engine, ending)
            take_out_what_goes(engine, all_served)
            ended = engine.end(ending.left_s())
            self._final_stats, self._final_faults = engine.stats(), engine.recent()
            self._final_log = engine.take_faults()
            self._final_owner_exited = engine.owner_exited
            failure, source_failure = engine.failure(), engine.source_failure
            if failure is not None and source_failure is not None and failure.address:
                # The first that failed may have been mended: take the exception of the one that
                # was not.
                start, end = source_failure.start, source_failure.start + source_failure.length
                if not start <= failure.address < end:
                    source_failure = engine.failure_at(failure.address)
            self._final_failure = known_failure(failure, source_failure)
            at_work = {one.number for one in ended.held if not one.is_request}
            for served in all_served:
                is_held = served.id.number in at_work
                self._forget(served, is_held=is_held, stays=ended.stays)
            engine.destroy()
        finally:
            if isinstance(engine, Engine) and not engine.life.free_if_deserted():
                leave_behind(engine, ended.held, all_served, self._spaces, views)
            if not ended.stays:
                for uffd in list(self._spaces):
                    uffd._let_close(ending_user)
        owner = self._options["owner_pid"] if len(self._spaces) == 1 else 0
        error = None if failure is None else handler_error(failure, source_failure, owner)
        # An exception of a source in this process has been logged already.
        if error is not None and (source_failure is None or engine.is_remote):
            log_error(log, str(error), error.__cause__)
        if ended.stays:
            error = error or HandlerError(
                "pages could not be poisoned: their ranges stay registered"
            )
        held = ended.held
        if ending.is_cut_short and held:
            left = describe(held, all_served, is_remote=engine.is_remote)
            log.warning("pyuffd: %r: %s", self, left)
            held = ()
        return completed(
            error,
            held,
            all_served,
            is_remote=engine.is_remote,
            waited_s=time.monotonic() - began,
        )

    def _note_exit(self) -> None:
        """Have a SIGBUS explained that a thread gets which outlives the interpreter."""
        if self._pid != os.getpid() or self._options["say_fd"] < 0:
            return
        for served in list(self._served.values()):
            if served.is_here and served.kind is not SourceKind.ZERO:
                for start, length in served.spans():
                    with suppress(UffdOSError):  # a line is less than the end of the handler
                        note_ended(start, length, self._options["say_fd"])

    def _stand_in_for(self, engine: Backend) -> Engine:
        """Return an engine of this process that poisons the ranges of a lost helper."""
        if not isinstance(engine, RemoteEngine):
            raise TypeError(f"{engine!r} has no helper process")
        stand_in = engine.take_over()
        for key, served in list(self._served.items()):
            place = stand_in.place_of(served.id)
            if place is not None:
                del self._served[key]
                served.id = place
                self._served[served.key] = served
        return stand_in.engine

    def _drain(self, engine: Backend, ending: Ending) -> None:
        if not self._started:
            return
        limit_s = ending.left_s()
        waits = self._drains and not ending.is_cut_short
        drained = waits and engine.drain(int(limit_s * 1e9))
        failed = waits and not drained and not ending.is_cut_short
        engine.refuse()
        if not drained:
            engine.abandon(failed=failed)
        if failed:
            log.warning(
                "pyuffd: %r: threads still waited after %.1f s: their pages are poisoned",
                self,
                limit_s,
            )


unstopped: weakref.WeakSet[Stops] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for handler in alive(unstopped):
        try:
            handler._note_exit()
            handler.stop()
        except HandlerError as error:
            log.error("pyuffd: at exit: %r: %s", handler, error)
