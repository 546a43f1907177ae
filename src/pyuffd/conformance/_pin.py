"""Long-term pins of memory: for writing, an io_uring fixed buffer; for reading, gup_test.

No ordinary interface lets user space take a long-term pin for reading. The kernel's test module
gup_test does, if it is built in.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from pyuffd.testing._need import Need

_OPEN, _IOCTL, _SETUP, _REGISTER = 2, 16, 425, 427  # system calls
_GUP_TEST = Path("/sys/kernel/debug/gup_test")
_PIN_LONGTERM_TEST_START, _PIN_LONGTERM_TEST_STOP = 0x40186707, 0x6708  # mm/gup_test.h
_REGISTER_BUFFERS, _UNREGISTER_BUFFERS = 0, 1
_PARAMS_BYTES = 120
_ENTRIES = 1

# Makes a system call in the process that is to pin; returns its result or -errno.
Syscall = Callable[..., int]


def syscall(number: int, *args: int) -> int:
    """Make a system call in this process, as `Child.syscall` does in a child; GIL released."""
    result = int(_libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args)))
    return result if result >= 0 else -ctypes.get_errno()


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Pin:
    """Memory of a process, pinned for writing until `close` (FOLL_WRITE | FOLL_LONGTERM).

    Make it before a fork whose child is to pin, so that the arguments are in the child's memory.
    """

    def __init__(self, start: int, length: int) -> None:
        self._params = ctypes.create_string_buffer(_PARAMS_BYTES)
        self._vector = (ctypes.c_uint64 * 2)(start, length)

    def take(self, call: Syscall) -> int:
        """Pin; return the ring's descriptor in that process.

        Raises:
            OSError: io_uring refuses.
        """
        ring = _checked("io_uring_setup", call(_SETUP, _ENTRIES, ctypes.addressof(self._params)))
        vector = ctypes.addressof(self._vector)
        _checked("pin", call(_REGISTER, ring, _REGISTER_BUFFERS, vector, 1))
        return ring

    def drop(self, call: Syscall, ring: int) -> None:
        """Unpin; the pages are free when this returns."""
        _checked("unpin", call(_REGISTER, ring, _UNREGISTER_BUFFERS, 0, 0))


class ReadPin:
    """Memory of a process, pinned for reading until `close` (FOLL_LONGTERM), by gup_test.

    Make it before the fork, as `Pin`.  Only one can exist at a time on the whole machine.
    """

    def __init__(self, start: int, length: int) -> None:
        self._path = ctypes.create_string_buffer(bytes(_GUP_TEST))
        self._range = (ctypes.c_uint64 * 3)(start, length, 0)

    def take(self, call: Syscall) -> int:
        """Pin; return a descriptor of that process, whose last close unpins.

        Raises:
            OSError: gup_test refuses.
        """
        fd = _checked("gup_test", call(_OPEN, ctypes.addressof(self._path), os.O_RDWR, 0))
        _checked("pin", call(_IOCTL, fd, _PIN_LONGTERM_TEST_START, ctypes.addressof(self._range)))
        return fd

    def drop(self, call: Syscall, fd: int) -> None:
        """Unpin."""
        _checked("unpin", call(_IOCTL, fd, _PIN_LONGTERM_TEST_STOP, 0))


def _checked(what: str, result: int) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def needs_pin() -> Need:
    """io_uring may be used."""

    def missing() -> tuple[list[str], str]:
        params = ctypes.create_string_buffer(_PARAMS_BYTES)
        ring = syscall(_SETUP, _ENTRIES, ctypes.addressof(params))
        if ring >= 0:
            os.close(ring)
            return [], ""
        return ["io_uring"], f"io_uring_setup: {errno.errorcode.get(-ring, ring)}"

    return Need("io_uring, to pin memory", missing)


def needs_read_pin() -> Need:
    """The kernel has gup_test (CONFIG_GUP_TEST), and debugfs is mounted in its usual place."""

    def missing() -> tuple[list[str], str]:
        there = os.access(_GUP_TEST, os.R_OK | os.W_OK)
        return ([] if there else ["gup_test"]), f"there is no {_GUP_TEST} to open"

    return Need("gup_test, to pin memory for reading", missing)
