"""Threads that a page source holds up, left behind by the handler they worked for (layer L1).

In the kernel nothing but SIGKILL ends such a wait, so a handler that stops leaves the thread
behind. It must do no harm when it comes back after all: the ioctl it is in may still copy to its
addresses, whichever userfaultfd they are registered with by then; and it may use the number of the
descriptor once more.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from pyuffd._errors import raise_errno


@dataclass(eq=False, slots=True)
class LeftBehind:
    """Threads that are left behind; `keep` is what they may still touch.

    `targets` are spans (start, end) of the memory that `memory` names, `is_over` tells whether
    they have left.
    """

    threads: tuple[str, ...]
    targets: tuple[tuple[int, int], ...]
    is_over: Callable[[], bool]
    memory: object
    keep: object
    pid: int = field(default_factory=os.getpid)


_left: list[LeftBehind] = []
_inert: list[tuple[int, list[LeftBehind]]] = []  # numbers that nobody may get yet
_lock = threading.Lock()


def note(left: LeftBehind) -> None:
    """Keep what threads that are left behind may still touch, until they are gone."""
    with _lock:
        _left.append(left)


def tidy() -> None:
    """Forget the threads that are gone by now, and what was kept for them."""
    if not _left and not _inert:
        return
    with _lock:
        pid = os.getpid()
        _left[:] = [one for one in _left if one.pid != pid or not one.is_over()]
        over = [row for row in _inert if not any(one in _left for one in row[1])]
        for row in over:
            _inert.remove(row)
    for fd, users in over:
        if all(one.pid == pid for one in users):
            os.close(fd)


def check_target(start: int, length: int, memory: object) -> None:
    """Raise RangeBusyError where a thread that is left behind may still copy into a range."""
    tidy()
    for one in _left:
        for first, end in one.targets:
            if one.memory == memory and first < start + length and start < end:
                raise_errno(
                    "UFFDIO_REGISTER",
                    errno.EBUSY,
                    start,
                    length,
                    hint=f"thread {', '.join(one.threads)}, left behind by a handler that"
                    " stopped because a page source held it up, may still write there",
                )


class Number:
    """A descriptor, and who may still use its number when its owner closes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._users = 0
        self._left: list[LeftBehind] = []
        self._is_closed = False

    def hold(self) -> None:
        """Keep it open as it is, whatever its owner does."""
        self._users += 1

    def release(self) -> None:
        """Undo a `hold`; closes what the owner has closed meanwhile."""
        self._users -= 1
        self._end()

    def leave(self, left: LeftBehind) -> None:
        """Note threads that may use the number after the owner has closed it."""
        self._left.append(left)

    @property
    def is_free(self) -> bool:
        """Whether nobody but its owner uses it."""
        tidy()
        self._left = [one for one in self._left if one in _left]
        return not self._users and not self._left

    def close(self) -> None:
        """Close it for its owner."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        if not self._is_closed or self._users or self._fd < 0:
            return
        is_free = self.is_free
        fd, self._fd = self._fd, -1
        if is_free:
            os.close(fd)
            return
        _make_inert(fd)
        with _lock:
            _inert.append((fd, self._left))


def _make_inert(fd: int) -> None:
    """Let ioctls on this number say ENOTTY, and nobody else get it."""
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # too many are open: then it stays what it is, with nothing registered
        return
    try:
        os.dup2(null, fd, inheritable=False)
    finally:
        os.close(null)
