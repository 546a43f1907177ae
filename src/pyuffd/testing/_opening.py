"""How the tests in this process open a userfaultfd, found out with plain system calls.

A user without privilege may handle only faults of user code (UFFD_USER_MODE_ONLY). They suffice for
most tests, and `_user_mode.make_do` makes the tests use them.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
from collections.abc import Callable

NR_USERFAULTFD = 323
USER_MODE_ONLY = 1
O_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_USERFAULTFD_IOC_NEW = 0xAA00
_DEVICE = "/dev/userfaultfd"

_making_do = False


def set_making_do(is_on: bool) -> None:
    """Set whether the tests in this process make do with faults of user code."""
    global _making_do
    _making_do = is_on


def only_user_mode() -> bool:
    """Whether the tests in this process make do with faults of user code: none else are allowed."""
    return _making_do and _may_open_nothing_else()


@functools.cache
def _may_open_nothing_else() -> bool:
    """Whether this user may open only userfaultfds with UFFD_USER_MODE_ONLY."""
    ways: list[Callable[[], int]] = [_of_any_faults, lambda: open_syscall(O_FLAGS | USER_MODE_ONLY)]
    for number, way in enumerate(ways):
        try:
            os.close(way())
        except OSError:
            continue
        return number == 1
    return False


def open_userfaultfd(flags: int = O_FLAGS) -> int:
    """Return a new userfaultfd, before its handshake, of the kind that these tests use.

    Raises:
        OSError: none can be opened; the text gives the error of each way.
    """
    return open_syscall(flags | USER_MODE_ONLY) if only_user_mode() else _of_any_faults(flags)


def _of_any_faults(flags: int = O_FLAGS) -> int:
    try:
        return open_syscall(flags)
    except OSError as error:
        by_syscall = error
    try:
        return open_device(flags)
    except OSError as error:
        text = f"the syscall: {by_syscall.strerror}, {_DEVICE}: {error.strerror}"
        raise OSError(by_syscall.errno, text) from None


def open_syscall(flags: int) -> int:
    """Open a userfaultfd by the system call, without a handshake; return its descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(ctypes.c_long(NR_USERFAULTFD), flags))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "userfaultfd")
    return fd


def open_device(flags: int) -> int:
    """Open a userfaultfd by /dev/userfaultfd; return its file descriptor."""
    device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)
