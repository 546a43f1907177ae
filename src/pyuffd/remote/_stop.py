"""Stop all threads of a process for a while, and those of others that share its memory."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyuffd import _remote_calls as calls
from pyuffd._arguments import check_seconds
from pyuffd._closing import Closing
from pyuffd._errors import ClosedError, StopTimeoutError, UffdOSError, raise_errno
from pyuffd._limits import frozen_cgroup, raise_limit
from pyuffd._refusals import why_no_ptrace
from pyuffd.remote._target import Target
from pyuffd.remote._threads import Refusals, wait_channel

LIMIT_S = 1.0
_ROUNDS_MOST = 5  # of processes that come to share the memory while others are stopped


@dataclass(frozen=True, slots=True)
class RegisterSet:
    """The registers of a stopped thread, as the notes of an ELF core have them.

    Attributes:
        tid: The thread.
        partial: Whether only the registers are known that a system call keeps: the thread waits in
            vfork(2) for its child, and cannot be stopped.
        stop_signal: The signal that has stopped the process (SIGSTOP), or 0.
        pending: Signals that wait for this thread alone; bit 0 is signal 1.
        blocked: Signals that it blocks, likewise.
        general: 27 registers of 8 bytes, as in NT_PRSTATUS.
        floating: 512 bytes, as in NT_FPREGSET.
        extended: The vector registers and others, as in NT_X86_XSTATE; empty if there is none.
    """

    tid: int
    partial: bool
    stop_signal: int
    pending: int
    blocked: int
    general: bytes
    floating: bytes
    extended: bytes


@dataclass(eq=False)
class Stop(Closing):
    """A process whose threads are all stopped; see `Process.stopped`.

    Attributes:
        threads: How many are stopped.
        seconds: The time needed to stop them.
        pids: The processes that were stopped: the target, and those that share its memory.
        since: When stopping them began, by `time.monotonic`.
    """

    _what = "stop"
    _instead = "stop the process once more"

    threads: int
    seconds: float
    pids: tuple[int, ...]
    since: float
    _held: calls.StoppedThreads
    _until: float | None = None

    @property
    def pause_s(self) -> float:
        """How long the process has been stopped so far, or was stopped until this was closed."""
        return (time.monotonic() if self._until is None else self._until) - self.since

    def registers(self) -> list[RegisterSet]:
        """Return the registers of all stopped threads, those of `pids` behind each other.

        A thread that has been killed meanwhile is left out.

        Raises:
            ClosedError: the threads run again.
            StopTimeoutError: ETIMEDOUT - they were let go early; see `check`.
            UffdOSError: ENOEXEC - a thread runs 32-bit code.

        Kernel: PTRACE_GETREGSET and PTRACE_PEEKSIGINFO of ptrace(2).  GIL: released.
        """
        return self._read_registers()()

    def _read_registers(self) -> Callable[[], list[RegisterSet]]:
        """Read them; return what makes the result of `registers`, once, which can wait."""
        if not self._held.holds:
            raise ClosedError("the threads run again")
        try:
            sets = self._held.registers()
        except UffdOSError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            raise self._let_go() from error
        return lambda: [RegisterSet(*row) for row in calls.register_rows(sets)]

    def check(self) -> None:
        """Raise if the threads ran while they should have been stopped; call it after the block.

        They are let go early if this process is itself stopped (SIGSTOP, Ctrl-Z, a debugger) for
        50 ms or more, as they might otherwise be stopped forever. Then what was read of them is
        not of one instant.

        Raises:
            StopTimeoutError: ETIMEDOUT - they have run.
            ValueError: the block has not ended.
        """
        if self._held.holds:
            raise ValueError("the threads are still stopped: check after the block")
        if self._held.lost:
            raise self._let_go()

    def _let_go(self) -> StopTimeoutError:
        return StopTimeoutError(
            errno.ETIMEDOUT,
            f"keep process {self.pids[0]} stopped",
            hint="this process was stopped itself, by a signal or a debugger, so it was let go",
            tid=self.pids[0],
            state="T",
        )

    def _check_usable(self) -> None:
        if self._until is not None:
            raise ClosedError("the threads run again")

    def close(self) -> None:
        """Let all threads continue."""
        self._held.close()
        if self._until is None:
            self._until = time.monotonic()


def stop(process: Target, limit_s: float, asleep_limit_s: float | None = None) -> Stop:
    """Stop a process; see `Process.stopped`.

    Args:
        process: The process.
        limit_s: When to give up.
        asleep_limit_s: The same if a thread waits in the kernel, uninterruptibly, and others are
            already stopped: that may take long even on an idle machine.
    """
    limit_s = check_seconds("timeout_s", limit_s)
    asleep_s = limit_s if asleep_limit_s is None else min(limit_s, asleep_limit_s)
    if process.pid == os.getpid():
        raise ValueError("a process cannot stop itself")
    process.check()
    refusals = Refusals()
    pids = sharing(process.pid, process.memory_tid)
    rounds = 0
    while rounds < _ROUNDS_MOST:
        if os.getpid() in pids:
            raise ValueError(f"process {process.pid} shares its memory with this process")
        held = calls.StoppedThreads()
        since = time.monotonic()
        try:
            held.stop(pids, int(limit_s * 1e9), int(asleep_s * 1e9))
            if held.code == errno.EPERM and refusals.try_again(held.tid):
                held.close()
                continue
            if held.code:
                _fail(process, held, limit_s, refusals)
            now = sharing(process.pid, process.memory_tid)
            if set(now) <= set(pids):
                return Stop(held.threads, held.ns / 1e9, tuple(pids), since, held)
        except BaseException:  # whoever keeps the traceback must not keep the process
            held.close()
            raise
        held.close()
        pids = now
        rounds += 1
    raise_errno(
        f"stop process {process.pid}",
        errno.EAGAIN,
        hint="more and more processes come to share its memory",
    )


def _fail(process: Target, held: calls.StoppedThreads, limit_s: float, refusals: Refusals) -> None:
    process.check()
    if held.code == errno.ETIMEDOUT:
        # Before the limit only a thread is given up that waits in the kernel.
        state = "D" if held.ns < limit_s * 1e9 else _state_of(held.tid)
        raise StopTimeoutError(
            errno.ETIMEDOUT,
            f"stop process {process.pid}",
            hint=why_not_stopped(held.tid, state),
            tid=held.tid,
            state=state,
        )
    hint = ""
    if held.code == errno.EPERM:
        hint = refusals.why(why_no_ptrace(process.pid, attaching=True))
    if held.code == errno.EAGAIN:
        raise_limit(f"stop process {process.pid}", held.code)
    raise_errno(f"stop process {process.pid}", held.code, hint=hint, tid=held.tid)


def _state_of(tid: int) -> str:
    try:
        text = Path(f"/proc/{tid}/stat").read_text(errors="replace")
    except OSError:
        return "?"
    return text.rpartition(")")[2].split()[0]


def frozen_hint(cgroup: str) -> str:
    """Say what to do about a thread of a frozen cgroup."""
    return f"its cgroup {cgroup} is frozen (as by `docker pause`): thaw it"


def why_not_stopped(tid: int, state: str = "") -> str:
    """Say what keeps a thread from stopping."""
    if cgroup := frozen_cgroup(tid):
        return frozen_hint(cgroup)
    if (state or _state_of(tid)) != "D":
        return "its thread did not get a CPU in time: the machine is busy"
    channel = wait_channel(tid)
    where = f" ({channel})" if channel else ""
    return f"a thread in state D waits in the kernel{where} and cannot be stopped"


def sharing(pid: int, tid: int) -> list[int]:
    """Return the processes with this one's memory, itself first: vfork and CLONE_VM make them.

    Args:
        pid: The process.
        tid: A thread of it that has not ended.
    """
    found = [pid]
    # Kernel threads have no memory to compare, and what we may not trace cannot share the memory
    # of a process that we may.
    for name in os.listdir("/proc"):
        if name.isdigit() and (other := int(name)) != pid and calls.shares_memory(tid, other):
            found.append(other)
    return found
