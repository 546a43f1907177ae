"""One snapshot of a process at a time: the second is refused, with the name of the first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyuffd._errors import SnapshotError
from pyuffd._machine import raise_without_procfs
from pyuffd._owned import Descriptor
from pyuffd.remote._process import Process
from pyuffd.snapshot._format import PAGES


@contextmanager
def only_one(process: Process) -> Iterator[None]:
    """Hold a lock on the process until the end of the block, or of this process."""
    # A lock on a file of /proc is one on the process: all who open it meet, as long as one has it
    # open, and it ends with its owner.
    with _status(process.pid) as file:
        try:
            fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SnapshotError("busy", _who(process.pid, file.number)) from None
        yield


def _status(pid: int) -> Descriptor:
    path = f"/proc/{pid}/status"
    try:
        return Descriptor.open(path, os.O_RDONLY)
    except OSError as error:
        raise_without_procfs(f"open {path}", error)
        raise


def _who(pid: int, fd: int) -> str:
    text = f"another snapshot of process {pid} is being taken"
    inode = f":{os.fstat(fd).st_ino}"
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(inode):
                return text + _what(int(words[4]))
    return text


def _what(owner: int) -> str:
    with suppress(OSError):
        for name in os.listdir(f"/proc/{owner}/fd"):
            with suppress(OSError):
                path = Path(os.readlink(f"/proc/{owner}/fd/{name}"))
                if path.name == PAGES and path.parent.name.endswith(".tmp"):
                    final = path.parent.name[1:].rsplit(".", 2)[0]
                    return f": {path.parent.parent / final}, by process {owner}"
    return f", by process {owner}"
