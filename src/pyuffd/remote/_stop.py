"""Stop all threads of a process for a while, and those of others that share its memory."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyuffd import _remote_calls as calls
from pyuffd._arguments import check_seconds
from pyuffd._closing import Closing
from pyuffd._errors import StopTimeoutError, raise_errno

if TYPE_CHECKING:
    from pyuffd.remote._process import Process

LIMIT_S = 1.0
_ROUNDS_MOST = 5  # of processes that come to share the memory while others are stopped


@dataclass(eq=False)
class Stop(Closing):
    """A process whose threads are all stopped; see `Process.stopped`.

    Attributes:
        threads: How many are stopped.
        seconds: The time needed to stop them.
        pids: The processes that were stopped: the target, and those that share its memory.
    """

    _what = "stop"
    _instead = "stop the process once more"

    threads: int
    seconds: float
    pids: tuple[int, ...]
    _held: calls.StoppedThreads

    def close(self) -> None:
        """Let all threads continue."""
        self._held.close()


def stop(process: Process, limit_s: float) -> Stop:
    """Stop a process; see `Process.stopped`."""
    limit_s = check_seconds("timeout_s", limit_s)
    if process.pid == os.getpid():
        raise ValueError("a process cannot stop itself")
    process.check()
    pids = sharing(process.pid)
    for _ in range(_ROUNDS_MOST):
        if os.getpid() in pids:
            raise ValueError(f"process {process.pid} shares its memory with this process")
        held = calls.StoppedThreads()
        held.stop(pids, int(limit_s * 1e9))
        if held.code:
            _fail(process, held)
        now = sharing(process.pid)
        if set(now) <= set(pids):
            return Stop(held.threads, held.ns / 1e9, tuple(pids), held)
        held.close()
        pids = now
    raise_errno(
        f"stop process {process.pid}",
        errno.EAGAIN,
        hint="more and more processes come to share its memory",
    )


def _fail(process: Process, held: calls.StoppedThreads) -> None:
    process.check()
    if held.code == errno.ETIMEDOUT:
        try:
            text = Path(f"/proc/{held.tid}/stat").read_text(errors="replace")
            state = text.rpartition(")")[2].split()[0]
        except OSError:
            state = "?"
        raise StopTimeoutError(
            errno.ETIMEDOUT,
            f"stop process {process.pid}",
            hint="a thread in state D waits in the kernel and cannot be stopped",
            tid=held.tid,
            state=state,
        )
    hint = ""
    if held.code == errno.EPERM:
        hint = "it is traced already, or ptrace is refused (CAP_SYS_PTRACE, Yama)"
    raise_errno(f"stop process {process.pid}", held.code, hint=hint, tid=held.tid)


def sharing(pid: int) -> list[int]:
    """Return the processes with this one's memory, itself first: vfork and CLONE_VM make them."""
    found = [pid]
    # Kernel threads have no memory to compare, and what we may not trace cannot share the memory
    # of a process that we may.
    for name in os.listdir("/proc"):
        if name.isdigit() and (other := int(name)) != pid and calls.shares_memory(pid, other):
            found.append(other)
    return found
