"""The end of a handler, in a thread of its own (layer L4).

Whoever waits for it can be interrupted by a signal's exception at any line, and what was promised
of the pages is kept all the same: the ending goes on. The first interruption cuts it short, and it
is waited for; the second one leaves at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from pyuffd._errors import HandlerError

log = logging.getLogger(__name__)

# How soon a waiting thread looks again, for signals and for an ending that is held up itself.
LOOK_S = 0.2
# For what comes behind the limits that the ending itself keeps, as long as nothing gets on there.
REST_LIMIT_S = 10.0
# Once a limit has passed, or the ending was cut short, what is left of an ioctl is not waited for.
GRACE_S = 0.2


class Ending:
    """Ends a handler once; `work` returns the error that stop() raises.

    `cut_short` is called when whoever waits is interrupted; `progress` returns something that
    changes as long as the work gets on.

    Threads: safe, and of use inside a signal handler that interrupted the waiting.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Ending], HandlerError | None],
        cut_short: Callable[[], None],
        progress: Callable[[], object],
        limit_s: float,
    ) -> None:
        self.is_cut_short = False
        self._work = work
        self._cut_short = cut_short
        self._progress = progress
        self._error: BaseException | None = None
        self._is_over = threading.Event()
        self._start_lock = threading.RLock()
        self._is_started = False
        self._work_lock = threading.Lock()
        self._worker = 0  # the thread that does the work
        self._give_up_at = time.monotonic() + limit_s
        self._limit_s = limit_s
        self._name = name

    def left_s(self) -> float:
        """Return how long page sources may still be waited for."""
        if self.is_cut_short:
            return GRACE_S
        return max(GRACE_S, self._give_up_at - time.monotonic())

    def wait(self) -> None:
        """Wait for the end, which this begins, and raise its error unless that was done."""
        if self._worker == threading.get_ident():
            return  # closed something whose callbacks stop the handler
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
        """Wait for no page source any more."""
        self.is_cut_short = True
        try:
            self._cut_short()
        except Exception as error:  # it may be over by now, or its helper lost
            log.debug("cutting the end of a handler short: %s", error)

    def _go_on(self) -> None:
        if not self._start():
            self._run()
        self._join()

    def _start(self) -> bool:
        """Start a thread; False where none can be started: at the interpreter's end.

        When this is interrupted nobody knows whether there is one, and the next call starts
        another; one of them does the work.
        """
        with self._start_lock:
            if not self._is_started:
                try:
                    threading.Thread(target=self._run, name=self._name, daemon=True).start()
                except RuntimeError as error:
                    log.debug("no thread to end a handler: %s", error)
                    return False
                self._is_started = True
        return True

    def _run(self) -> None:
        """Do the work, unless that is done; every step of it may be done again."""
        with self._work_lock:
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
                    f"a handler's end does not get on: it is left to thread {self._name!r},"
                    " and ranges that are not unregistered yet stay registered"
                )

    def _look(self) -> object:
        try:
            return self._progress()
        except Exception:  # nothing can be asked any more: it is in its last steps
            return None
