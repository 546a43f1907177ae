"""Threads that a page source holds up, left behind by the handler they worked for (layer L2).

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
from pyuffd._owned import Descriptor


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
_inert: list[tuple[Descriptor, list[LeftBehind]]] = []  # numbers that nobody may get yet
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
    for descriptor, users in over:
        if all(one.pid == pid for one in users):
            descriptor.close()
        else:  # a fork's copy of the number, which another file may have by now
            descriptor.release()


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

    def __init__(self, descriptor: Descriptor) -> None:
        self.descriptor = descriptor
        self._users = 0
        self._left: list[LeftBehind] = []
        self._is_closed = False

    @property
    def fd(self) -> int:
        """The number, as long as it is its owner's; -1 afterwards."""
        return -1 if self._is_closed else self.descriptor.number

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
        """Close it for its owner; again without complaint."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        if not self._is_closed or self._users or not self.descriptor.is_open:
            return
        if self.is_free:
            self.descriptor.close()
            return
        _make_inert(self.descriptor.number)
        with _lock:
            _inert.append((self.descriptor.moved(), self._left))


def _make_inert(fd: int) -> None:
    """Let ioctls on this number say ENOTTY, and nobody else get it."""
    try:
        with Descriptor.open(os.devnull, os.O_RDWR) as null:
            os.dup2(null.number, fd, inheritable=False)
    except OSError:  # too many are open: then it stays what it is, with nothing registered
        return
