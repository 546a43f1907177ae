"""What /proc says about the threads of a process."""

from __future__ import annotations

import contextlib
from pathlib import Path


def of_threads(pid: int | str, file: str) -> dict[int, str]:
    """Read a file of /proc/PID/task/TID of each thread, except threads that end meanwhile."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[int(task.name)] = (task / file).read_text()
    return found
