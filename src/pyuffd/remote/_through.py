"""The thread through which a process's memory is reached: the first, unless it has ended."""

from __future__ import annotations

from pyuffd._errors import raise_if_short
from pyuffd.remote._threads import listed

# Of /proc/PID/stat, behind the name; and PF_KTHREAD of it.
_FLAGS, _KERNEL_THREAD = 6, 0x00200000


def thread_with_memory(pid: int) -> int:
    """Return a thread of a process that has its memory; the process itself if there is none.

    After pthread_exit(3) in its first thread, a process runs on, and what the kernel tells by the
    process's own id is that of a zombie: no memory, no mappings, no command line.
    """
    if has_memory(pid, pid):
        return pid
    return next((tid for tid in listed(pid).tids if has_memory(pid, tid)), pid)


def has_memory(pid: int, tid: int) -> bool:
    """Whether a thread still is one of the process, and has not ended."""
    try:
        with open(f"/proc/{pid}/task/{tid}/statm", "rb", buffering=0) as file:
            return not file.read(2).startswith(b"0")
    except OSError as error:
        raise_if_short(f"open {error.filename}", error)
        return False


def why_no_memory(pid: int) -> str:
    """Say why a process has no memory that could be looked at."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            before, _, after = file.read().rpartition(")")
    except OSError:
        return f"process {pid} has ended"
    name, fields = before.partition("(")[2], after.split()
    if int(fields[_FLAGS]) & _KERNEL_THREAD:
        return f"{pid} ({name}) is a thread of the kernel, which has no memory of its own"
    if fields[0] in "ZX":
        return f"process {pid} ({name}) has ended, and its parent has not noticed it (a zombie)"
    return f"process {pid} ({name}) is ending"
