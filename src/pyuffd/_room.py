"""Whether this process has memory for a thread (layer L1)."""

from __future__ import annotations

import mmap

# More than what an interpreter allocates before a new thread tells that it runs.
ROOM = 2 << 20


def has_room_for_thread() -> bool:
    """Return whether a thread that is started now will run.

    Where RLIMIT_AS or RLIMIT_DATA is reached, the first call of a new thread fails for lack of
    memory, and Thread.start() waits forever for the thread to tell that it runs (measured with
    CPython 3.11, which had a stack of an earlier thread left for it).
    """
    try:
        mmap.mmap(-1, ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, MemoryError):
        return False
    return True
