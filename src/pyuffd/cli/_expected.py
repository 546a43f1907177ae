"""What is expected of a stop, for the first line of a command (layer L6)."""

from __future__ import annotations

import time

from pyuffd import Process


def limited_pause(target: Process, limit_s: float, condition: str = "") -> str:
    """Say for how long a process is to stand under a limit, and if its mappings are too many.

    They are read in the stop, whatever the method is, so here it is measured how long that lasts.
    """
    count, seconds = reading(target)
    text = f"for at most {limit_s:g} s{condition}"
    if seconds <= limit_s:
        return text
    return f"{text}; but reading its {count} mappings, which is part of it, lasts {seconds:.2f} s"


def reading(target: Process) -> tuple[int, float]:
    """Return how many mappings a process has, and for how many seconds reading them lasts."""
    begin = time.perf_counter()
    count = sum(1 for _ in target.mappings())
    return count, time.perf_counter() - begin
