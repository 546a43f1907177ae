"""The threads of a process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyuffd._errors import raise_errno


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


def threads_of(pid: int) -> Iterator[Thread]:
    """Yield the threads of a process, in the kernel's order; none if it has exited."""
    try:
        names = sorted(os.listdir(f"/proc/{pid}/task"), key=int)
    except OSError as error:
        _raise_of_limits(error)
        return
    for name in names:
        try:
            text = Path(f"/proc/{pid}/task/{name}/stat").read_text(errors="replace")
        except OSError as error:  # it has ended
            _raise_of_limits(error)
            continue
        before, _, after = text.rpartition(")")
        yield Thread(int(name), before.partition("(")[2], after.split()[0])


def _raise_of_limits(error: OSError) -> None:
    """Raise if nothing could be opened; that says nothing about the process."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise_errno(f"open {error.filename}", error.errno)
