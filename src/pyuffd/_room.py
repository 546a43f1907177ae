"""Whether this process has memory for a thread (layer L1)."""

from __future__ import annotations

import mmap
import resource
import threading

# More than what an interpreter allocates before a new thread tells that it runs.
ROOM = 2 << 20
# The size of a thread's stack in glibc if RLIMIT_STACK is unlimited.
STACK = 2 << 20


def stack_size() -> int:
    """Return how much is mapped for the stack of a thread."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return threading.stack_size() or (STACK if soft == resource.RLIM_INFINITY else soft)


def has_room_for_thread() -> bool:
    """Return whether a thread that is started now will run.

    Where RLIMIT_AS or RLIMIT_DATA leaves room for its stack and no more, the first call of a new
    thread fails for lack of memory, and Thread.start() waits forever for the thread to tell that it
    runs (measured with CPython 3.11). A stack of an earlier thread may be left for it; that is not
    counted.
    """
    try:
        size = stack_size() + ROOM
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, ValueError, OverflowError, MemoryError):
        return False
    return True
