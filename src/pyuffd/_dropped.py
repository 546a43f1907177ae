"""Close objects that were dropped without close() (layer L1).

A destructor runs wherever the last reference goes or the garbage collector happens to run: inside
any function that allocates, in a thread that may hold any lock, of this library or of the program.
So where close() may wait for another thread, the destructor lets a thread close the object. It
waits for that thread for a second at most: the code that it interrupted may hold a lock that
close() needs.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import sys
from collections import deque
from collections.abc import Callable

from pyuffd._errors import ClosedError
from pyuffd._latch import Latch
from pyuffd._room import has_room_for_thread

log = logging.getLogger(__name__)

# How long a destructor waits.
MOMENT_S = 1.0
# How long the interpreter's exit waits for what was dropped before: a handler's stop() may wait for
# page sources, and for a helper process.
EXIT_LIMIT_S = 30.0

# What is to be closed; the latch is set then. Only methods in C, which are atomic, touch them.
_queue: deque[tuple[Callable[[], object], Latch]] = deque()
# What a destructor waited for in vain, at most one. Until it is done none waits: all are behind it.
_late: list[Latch] = []
_working = _thread.allocate_lock()  # held by the thread that closes


def close_dropped(close: Callable[[], object]) -> None:
    """Call `close` in another thread; return when that is done, or after a moment.

    What `close` refers to lives until it has returned; its exceptions are logged. When the
    interpreter is finalized there are no other threads: it is called here.
    """
    if sys.is_finalizing():
        _call(close)
        return
    done = Latch()
    _queue.append((close, done))
    del close
    _start()
    if _late and not _late[0].is_set():
        return
    if not done.wait(MOMENT_S):
        _late[:] = [done]


def _start() -> None:
    """Start the thread unless there is one; at worst the next call or the exit does it."""
    if not _queue or not has_room_for_thread() or not _working.acquire(blocking=False):
        return
    try:
        # Thread.start() takes a lock that the interrupted code may hold.
        _thread.start_new_thread(_work, ())
    except RuntimeError as error:
        _working.release()
        log.debug("cannot start a thread that closes what was dropped: %s", error)


def _work() -> None:
    try:
        _close_all()
    finally:
        _working.release()
    _start()  # for what came since the last look


def _close_all() -> None:
    while _queue:
        close, done = _queue.popleft()
        _call(close)
        del close  # before anybody sees that it is done
        done.set()


def _call(close: Callable[[], object]) -> None:
    try:
        close()
    except ClosedError as error:  # the garbage collector has closed what it consists of
        log.debug("closing what was dropped: %s", error)
    except Exception as error:
        log.error("pyuffd: closing what was dropped: %s", error)


@atexit.register
def _finish() -> None:
    if (_queue or _working.locked()) and _working.acquire(timeout=EXIT_LIMIT_S):
        _work()


def _forget() -> None:
    """In a fork: the objects are the parent's, and the thread does not exist."""
    global _working
    _queue.clear()
    _late.clear()
    _working = _thread.allocate_lock()


os.register_at_fork(after_in_child=_forget)
