"""The clock for a guest's limits: the guest counts instructions, which a busy host runs later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

# A guest that never runs again uses no CPU, so wall time counts too, divided by this.
BUSY = 20.0
_TICKS_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Return how much CPU a process and its threads have used, in seconds; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_S


def clock(pid: int, *, counted: bool) -> Callable[[], float]:
    """Return a clock for the limits of a guest, in seconds from now.

    Args:
        pid: The process id of QEMU.
        counted: The guest measures time in instructions. Then only the CPU time of QEMU counts, or
            a fraction of the wall time if that is more.
    """
    started = time.monotonic()

    def now() -> float:
        wall = time.monotonic() - started
        return max(cpu_s(pid), wall / BUSY) if counted else wall

    return now
