"""The thread through which a process's memory is reached: the first, unless it has ended."""

from __future__ import annotations

import os


def thread_with_memory(pid: int) -> int:
    """Return a thread of a process that has its memory; the process itself if there is none.

    After pthread_exit(3) in its first thread, a process runs on, and what the kernel tells by the
    process's own id is that of a zombie: no memory, no mappings, no command line.
    """
    if has_memory(pid, pid):
        return pid
    try:
        others = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return pid
    return next((tid for tid in others if has_memory(pid, tid)), pid)


def has_memory(pid: int, tid: int) -> bool:
    """Whether a thread still is one of the process, and has not ended."""
    try:
        with open(f"/proc/{pid}/task/{tid}/statm", "rb", buffering=0) as file:
            return not file.read(2).startswith(b"0")
    except OSError:
        return False
