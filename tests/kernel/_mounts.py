"""Small file systems without a path: such a mount ends with its descriptor."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

_NR_FSOPEN, _NR_FSCONFIG, _NR_FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6


@contextlib.contextmanager
def mounted(file_system: str, **options: str) -> Iterator[str]:
    """Mount a file system, and yield a path to its root that is valid inside the block."""
    context = _syscall(_NR_FSOPEN, file_system.encode(), _CLOEXEC)
    try:
        for key, value in options.items():
            _syscall(_NR_FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
        _syscall(_NR_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _syscall(_NR_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        yield f"/proc/self/fd/{mount}"
    finally:
        os.close(mount)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = int(libc.syscall(ctypes.c_long(number), *passed))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
