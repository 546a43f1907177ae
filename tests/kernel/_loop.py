"""Loop devices: block devices backed by files, for the time of a test."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

import pytest

from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked

_CONTROL = "/dev/loop-control"
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_SET_FD, _LOOP_CLR_FD, _LOOP_SET_CAPACITY = 0x4C00, 0x4C01, 0x4C07
_TRIES = 20  # another process may take the free device first


def needs_loop_device() -> pytest.MarkDecorator:
    """Skip unless a file can become a block device here."""

    def missing() -> tuple[list[str], str]:
        try:
            with loop_device(4096) as device:
                os.close(os.open(device.path, os.O_RDONLY))
        except OSError as error:
            return ["loop-device"], str(error)
        return [], ""

    return marked(Need("loop devices", missing))


class Device:
    """A block device backed by an unnamed file; `path` is the path of the device."""

    def __init__(self, path: str, fd: int, backing: int) -> None:
        self.path = path
        self._fd = fd
        self._backing = backing

    def write(self, data: bytes) -> None:
        """Write to the start of the device."""
        assert os.pwrite(self._fd, data, 0) == len(data)
        os.fsync(self._fd)

    def resize(self, length: int) -> None:
        """Change the size of the device."""
        os.ftruncate(self._backing, length)
        fcntl.ioctl(self._fd, _LOOP_SET_CAPACITY)


@contextlib.contextmanager
def loop_device(length: int) -> Iterator[Device]:
    """Make a block device of `length` bytes, a multiple of 512."""
    with contextlib.ExitStack() as stack:
        backing = os.memfd_create("loop", os.MFD_CLOEXEC)
        stack.callback(os.close, backing)
        os.ftruncate(backing, length)
        path, fd = _attach(backing)
        stack.callback(os.close, fd)
        stack.callback(fcntl.ioctl, fd, _LOOP_CLR_FD)
        yield Device(path, fd, backing)


def _attach(backing: int) -> tuple[str, int]:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for attempt in range(_TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _LOOP_SET_FD, backing)
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY or attempt == _TRIES - 1:
                    raise
            else:
                return path, fd
    finally:
        os.close(control)
    raise AssertionError("not reached")
