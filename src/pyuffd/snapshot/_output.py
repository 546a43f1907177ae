"""Writing the file of an image, on any file system."""

from __future__ import annotations

import os
from contextlib import suppress

from pyuffd import _memory
from pyuffd._errors import UffdOSError

_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZEROS = 1 << 20


def write_at(fd: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of it."""
    view = memoryview(content)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def punch(fd: int, offset: int, length: int) -> None:
    """Make a hole, or write zeros where the file system has no holes."""
    with suppress(UffdOSError):
        _memory.fallocate(fd, _PUNCH_HOLE, offset, length)
        return
    end = min(offset + length, os.fstat(fd).st_size)
    for at in range(offset, end, _ZEROS):
        write_at(fd, bytes(min(_ZEROS, end - at)), at)
