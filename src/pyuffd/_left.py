"""Threads that a stopped handler left behind because a page source holds them up (layer L2).

In the kernel only SIGKILL ends such a wait, so a handler that stops leaves the thread behind. The
thread must do no harm if it continues later: its ioctl may still copy to its addresses, even if
they are registered with another userfaultfd by then, and it may use the descriptor's number again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field

from pyuffd._errors import raise_errno
from pyuffd._owned import Descriptor


@dataclass(eq=False, slots=True)
class LeftBehind:
    """Threads that are left behind; `keep` keeps alive what they may still use.

    `targets` are spans (start, end) of the address space that `memory` names. `is_over` tells
    whether the threads have left.
    """

    threads: tuple[str, ...]
    targets: tuple[tuple[int, int], ...]
    is_over: Callable[[], bool]
    memory: object
    keep: object
    pid: int = field(default_factory=os.getpid)


# Lists without a lock: destructors use them, wherever they run. Only atomic methods change them.
_left: list[LeftBehind] = []
_inert: list[tuple[Descriptor, list[LeftBehind]]] = []  # numbers that must not be reused yet
# Numbers that others than their owner use: the owner and the descriptor may be garbage.
_in_use: set[Number] = set()
os.register_at_fork(after_in_child=_in_use.clear)


def note(left: LeftBehind) -> None:
    """Keep what threads left behind may still use, until they are gone."""
    _left.append(left)


def is_any() -> bool:
    """Return whether `check_target` has anything to look at."""
    return bool(_left or _inert)


def tidy() -> None:
    """Forget the threads that are gone, and what was kept for them."""
    if not _left and not _inert:
        return
    pid = os.getpid()
    for one in _left.copy():
        if one.pid == pid and one.is_over():
            with suppress(ValueError):  # another thread has removed it
                _left.remove(one)
    for row in _inert.copy():
        descriptor, users = row
        if any(one in _left for one in users):
            continue
        try:
            _inert.remove(row)
        except ValueError:  # another thread has removed it
            continue
        if all(one.pid == pid for one in users):
            descriptor.close()
        else:  # noted before a fork; in the child another file may have the number
            descriptor.release()


def check_target(start: int, length: int, memory: object) -> None:
    """Raise RangeBusyError if a thread that is left behind may still copy into a range."""
    tidy()
    for one in _left.copy():
        for first, end in one.targets:
            if one.memory == memory and first < start + length and start < end:
                raise_errno(
                    "UFFDIO_REGISTER",
                    errno.EBUSY,
                    start,
                    length,
                    hint=f"thread {', '.join(one.threads)} may still write there: a page source"
                    " held it up when its handler stopped",
                )


class Number:
    """A descriptor, with the users of its number other than its owner.

    A user is a name, not a count: what an exception of a signal handler interrupted can be done
    again or undone, whether it was done or not.
    """

    def __init__(self, descriptor: Descriptor) -> None:
        self.descriptor = descriptor
        self._users: set[Hashable] = set()
        self._left: list[LeftBehind] = []
        self._is_closed = False

    @property
    def fd(self) -> int:
        """The number, or -1 after its owner has closed it."""
        return -1 if self._is_closed else self.descriptor.number

    def hold(self, user: Hashable) -> None:
        """Keep it open even if its owner closes it, or is garbage; may be called again."""
        self._users.add(user)
        _in_use.add(self)

    def release(self, user: Hashable) -> None:
        """Undo `hold`; close it if its owner has closed it meanwhile. May be called again."""
        self._users.discard(user)
        if not self._users:
            _in_use.discard(self)
        self._end()

    def leave(self, left: LeftBehind) -> None:
        """Note threads that may use the number after the owner has closed it."""
        self._left.append(left)

    @property
    def is_free(self) -> bool:
        """Whether only its owner uses it."""
        tidy()
        self._left = [one for one in self._left if one in _left]
        return not self._users and not self._left

    def close(self) -> None:
        """Close it for its owner; may be called again."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        if not self._is_closed or self._users or not self.descriptor.is_open:
            return
        if self.is_free:
            self.descriptor.close()
            return
        _make_inert(self.descriptor.number)
        _inert.append((self.descriptor.moved(), self._left))


def _make_inert(fd: int) -> None:
    """Replace the file of this number, so that ioctls fail with ENOTTY and it is not reused."""
    try:
        with Descriptor.open(os.devnull, os.O_RDWR) as null:
            os.dup2(null.number, fd, inheritable=False)
    except OSError:  # too many open files: it stays a userfaultfd without registered ranges
        return
