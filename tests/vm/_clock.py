"""By which clock a guest is late: its own counts instructions, which a busy host executes later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

# A guest that never runs again uses no CPU, so the wall has a say, too.
BUSY = 20.0
_TICKS_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Return for how long a process and its threads have run, in seconds; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_S


def clock(pid: int, *, counted: bool) -> Callable[[], float]:
    """Return a clock for the limits of a guest, in seconds from now.

    Args:
        pid: QEMU's.
        counted: The guest's time is the instructions that it has executed. Then only what its QEMU
            has run counts, or a part of the wall's time if that is more.
    """
    started = time.monotonic()

    def now() -> float:
        wall = time.monotonic() - started
        return max(cpu_s(pid), wall / BUSY) if counted else wall

    return now
