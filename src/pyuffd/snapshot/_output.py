"""Writing the file of an image, on any file system."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pyuffd import _memory
from pyuffd._errors import UffdOSError
from pyuffd._limits import room_left

_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZEROS = 1 << 20
# The operations that write to a file, as their errors name them.
_WRITES = (
    "write",
    "fsync",
    "copying memory to a file",
    "writing memory to a file",
    "saving pages",
)
# What a file system says; of memory that cannot be read there is no error.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def name_is_taken(path: str) -> FileExistsError:
    """Return the error for an output whose name something has."""
    text = f"{os.strerror(errno.EEXIST)}; choose another name, or remove it"
    return FileExistsError(errno.EEXIST, text, path)


def write_at(fd: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of it."""
    view = memoryview(content)
    while view:
        try:
            done = os.pwrite(fd, view, offset)
        except OSError as error:
            raise UffdOSError(error.errno or errno.EIO, "write") from None
        view, offset = view[done:], offset + done


def sync(fd: int) -> None:
    """Wait until a file is on the disk."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise UffdOSError(error.errno or errno.EIO, "fsync") from None


@contextmanager
def named(path: str, fd: int) -> Iterator[None]:
    """Put the name that an open file will get into errors of writing it, and how full the disk is.

    Until then it has none, or another one, so that the error cannot name it.
    """
    try:
        yield
    except UffdOSError as error:
        code = error.errno or errno.EIO
        if error.filename is not None or error.op not in _WRITES or code not in _OF_DISKS:
            raise
        op = "fsync" if error.op == "fsync" else "write"
        raise UffdOSError(code, op, hint=room_left(fd, code), filename=path) from None


def punch(fd: int, offset: int, length: int) -> None:
    """Make a hole, or write zeros where the file system has no holes."""
    with suppress(UffdOSError):
        _memory.fallocate(fd, _PUNCH_HOLE, offset, length)
        return
    end = min(offset + length, os.fstat(fd).st_size)
    for at in range(offset, end, _ZEROS):
        write_at(fd, bytes(min(_ZEROS, end - at)), at)
