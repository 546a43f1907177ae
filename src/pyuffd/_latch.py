"""What waits with signal handlers in mind: a flag that is set once, and a lock (layer L1).

`threading.Event` is no help there. An exception of a signal handler that arrives inside its
`wait()` can leave the lock of its condition held, so that `set()` waits until the process ends, or
released twice, so that RuntimeError replaces the exception (measured with CPython 3.11).
"""

from __future__ import annotations

import _thread
import contextlib
import sys
import threading
import time

# A waiter that was interrupted while it let the next one through leaves it waiting for so long.
LOOK_S = 0.2


if sys.version_info >= (3, 14):

    class RLock(_thread.RLock):
        """A lock that an exception of a signal handler does not leave held.

        Before CPython 3.14 no signal handler runs between the return of a lock's `__enter__` in C
        and the block. Since then one may (measured: in 4,488 of 8,000 interruptions of a loop). It
        still does not if `__enter__` is a Python function.
        """

        def __enter__(self) -> bool:
            before = self._recursion_count()
            try:
                return self.acquire()
            except BaseException:
                if self._recursion_count() > before:
                    self.release()
                raise

else:
    RLock = threading.RLock


def is_held_here(lock: threading.RLock) -> bool:
    """Return whether this thread holds a lock, perhaps in a call that a signal has interrupted."""
    owned: bool = lock._is_owned()  # type: ignore[attr-defined]  # as threading.Condition does
    return owned


class Latch:
    """A flag that is set once.

    Threads: safe, and usable in signal handlers.  GIL: released while waiting.
    """

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        # Held until the flag is set. Its methods are in C, so no exception arrives inside them.
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Set it, and let all waiters go."""
        self._is_set = True
        self._let_through()

    def is_set(self) -> bool:
        """Return whether it is set."""
        return self._is_set

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is set, or for this many seconds; return whether it is set."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_set:
            left_s = LOOK_S if until is None else min(LOOK_S, until - time.monotonic())
            if left_s <= 0:
                break
            if self._lock.acquire(timeout=left_s):
                self._let_through()
        return self._is_set

    def _let_through(self) -> None:
        with contextlib.suppress(RuntimeError):  # another thread has released it just now
            self._lock.release()
