"""Latency of one missing fault while other threads want the CPUs.

The base case is the native driver with every CPU named, which leaves its thread to the scheduler.
So this measures what the search for a CPU costs when it cannot gain anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks._members import ALL_CPUS, ANY_CPU
from benchmarks._pairs import Row, Target, latency_row, run_pairs
from benchmarks._setup import Setup

_PAGES = 4096
_QUICK_PAGES = 1024
# One round lasts a fraction of a second, and depends on what the scheduler happens to do.
_ROUNDS_FACTOR = 3
_SETTLE_S = 0.5
_LIMITS = Target("<=", 1.2)


@contextmanager
def _busy_threads(count: int) -> Iterator[None]:
    """Run `count` processes that compute, inside the ``with`` block."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
        time.sleep(_SETTLE_S if count else 0)
        yield


def run(setup: Setup) -> Iterator[Row]:
    """Yield a row for no busy thread, for one on each CPU, and for three."""
    cpus = len(os.sched_getaffinity(0))
    pages = _QUICK_PAGES if setup.quick else _PAGES
    for busy in (0, cpus, 3 * cpus):
        with _busy_threads(busy):
            pairs = run_pairs(
                setup.member("fault", "missing", "native", pages, 1, ANY_CPU, ALL_CPUS),
                setup.member("fault", "missing", "native", pages, 1, ANY_CPU, ANY_CPU),
                setup.rounds * _ROUNDS_FACTOR,
            )
        yield latency_row(
            f"missing fault, {busy} busy threads: native / native with all CPUs named",
            pairs,
            target=_LIMITS,
            target_p99=_LIMITS,
        )
