"""The threads of a process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyuffd._errors import raise_if_short

# How long another tracer may need to leave: one that traces for a moment, as this library does.
LEAVE_S = 0.3
_LOOK_S = 0.002
_LISTED_MOST = 5
# Of the directory itself; proc_task_getattr() of the kernel adds the number of threads.
_LINKS = 2
# After so many refusals in a row while nobody traced the thread, ptrace itself is refused.
_REFUSALS = 3


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread of a process.

    Attributes:
        tid: Its id, in this process's PID namespace.
        name: Its name.
        state: The letter of /proc/PID/stat: R runs, S sleeps, D waits uninterruptibly, T is
            stopped by a signal, t by a tracer, Z has ended.
    """

    tid: int
    name: str
    state: str


@dataclass(frozen=True, slots=True)
class Listed:
    """A listing of the threads of a process.

    Attributes:
        tids: Their ids, ascending; none if the process has exited.
        complete: Whether these are all that there were. A listing ends at a thread that ends
            meanwhile.
    """

    tids: list[int]
    complete: bool


def listed(pid: int, attempts: int = _LISTED_MOST) -> Listed:
    """List the threads of a process, again if a listing is not complete."""
    folder = f"/proc/{pid}/task"
    tids: list[int] = []
    for _ in range(attempts):
        try:
            tids = [int(name) for name in os.listdir(folder)]
            count = os.stat(folder).st_nlink - _LINKS
        except OSError as error:
            raise_if_short(f"open {error.filename}", error)
            return Listed([], True)
        # Where it ended early the last has ended, and the kernel does not count it any more.
        if len(tids) >= count and os.path.exists(f"{folder}/{tids[-1]}"):
            return Listed(sorted(tids), True)
    return Listed(sorted(tids), False)


def threads_of(pid: int) -> Iterator[Thread]:
    """Yield the threads of a process, in the kernel's order; none if it has exited."""
    for tid in listed(pid).tids:
        try:
            text = Path(f"/proc/{pid}/task/{tid}/stat").read_text(errors="replace")
        except OSError as error:  # it has ended
            raise_if_short(f"open {error.filename}", error)
            continue
        before, _, after = text.rpartition(")")
        yield Thread(tid, before.partition("(")[2], after.split()[0])


def wait_channel(tid: int) -> str:
    """Return the function of the kernel that a thread waits in; "" if the kernel does not tell."""
    try:
        name = Path(f"/proc/{tid}/wchan").read_text()
    except OSError:
        return ""
    return "" if name == "0" else name


def tracer_of(tid: int) -> int:
    """Return the process that traces a thread; 0 if there is none, or it is not seen."""
    try:
        text = Path(f"/proc/{tid}/status").read_text(errors="replace")
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("TracerPid:")]
    return int(found[0]) if found else 0


def traced_hint(tid: int) -> str:
    """Say who traces a thread; "" if nobody does."""
    tracer = tracer_of(tid)
    if not tracer:
        return ""
    try:
        name = Path(f"/proc/{tracer}/comm").read_text(errors="replace")
    except OSError:
        name = ""
    name = "".join(c if c.isprintable() else "?" for c in name.rstrip("\n"))
    return f"process {tracer}{f' ({name})' if name else ''} traces it: a debugger?"


def wait_for_tracer(tid: int, give_up_at: float) -> str:
    """Wait until nobody traces a thread; return who still does, or ""."""
    while (hint := traced_hint(tid)) and time.monotonic() < give_up_at:
        time.sleep(_LOOK_S)
    return hint


class Refusals:
    """Refusals (EPERM) of ptrace: another tracer, who may have left since, or no permission."""

    def __init__(self) -> None:
        self._give_up_at = time.monotonic() + LEAVE_S
        self._untraced = 0
        self._tracer = ""

    def try_again(self, tid: int) -> bool:
        """Wait for another tracer to leave; return whether trying once more makes sense."""
        tracer = traced_hint(tid)
        if tracer:
            self._tracer, self._untraced = tracer, 0
            wait_for_tracer(tid, self._give_up_at)
        else:
            self._untraced += 1
        return self._untraced < _REFUSALS and time.monotonic() < self._give_up_at

    def why(self, otherwise: str) -> str:
        """Return why it is refused; `otherwise` if it is no other tracer."""
        return self._tracer if self._untraced < _REFUSALS and self._tracer else otherwise
