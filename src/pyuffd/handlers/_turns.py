"""Locks of handlers, and the calls of signal handlers that must not wait for them (layer L4).

A signal handler runs inside whatever call it has interrupted, which may hold a lock. If another
thread holds a second lock and waits for the first, whoever waits for the second inside the signal
handler waits forever. So there a lock that is not free is refused.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pyuffd._errors import HandlerError
from pyuffd._latch import RLock, is_held_here

if TYPE_CHECKING:
    from types import TracebackType


class CalledInside(HandlerError):
    """A call that must not be made inside another one; it has changed nothing."""


def turn_of(lock: RLock, *inner: RLock) -> AbstractContextManager[object]:
    """Return what acquires a lock in a `with` statement, before the `inner` ones.

    If this thread holds an inner one already, the lock must be free: it is not waited for.
    """
    if is_held_here(lock) or not any(map(is_held_here, inner)):
        return lock
    return _Free(lock)


def refuse_inside(what: str, *locks: RLock) -> None:
    """Raise CalledInside if this thread is inside a call that holds one of these."""
    if any(map(is_held_here, locks)):
        raise CalledInside(
            f"{what} was called inside a call that works on the same pages, by a signal handler or"
            " by write_back: call it when that one has returned"
        )


class _Free:
    """A lock that is acquired only if it is free."""

    def __init__(self, lock: RLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        was_held = is_held_here(self._lock)
        try:
            is_ours = self._lock.acquire(blocking=False)
        except BaseException:  # of another signal handler
            if not was_held and is_held_here(self._lock):
                self._lock.release()
            raise
        if not is_ours:
            raise CalledInside(
                "a signal handler interrupted a call of a handler, for which another thread waits"
                " that is at work on the same pages: nothing was done. Call it again when the"
                " interrupted call has returned, from the program rather than the signal handler"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
