"""The members of `bench_tracking`: ``python -m benchmarks._tracking_members LIB WAY PID ...``."""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from typing import cast

import psutil

from benchmarks._members import Answer, answer_rounds
from pyuffd import DirtyTracker, Feature, Process

_FEATURES = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
_LONGEST = _LOOKS = struct.Struct("=Q")


class _Attach:
    """Attach and detach; the samples are what the target noted in a file: see c/tracked.c."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._process = Process(args.pid)
        self._repeats = args.repeats
        with open(args.file, "r+b") as file:
            self._seen = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def round(self) -> Answer:
        samples = array("Q")
        begin_ns = time.perf_counter_ns()
        for _ in range(self._repeats):
            _LONGEST.pack_into(self._seen, 0, 0)
            self._process.attach(_FEATURES).close()
            samples.append(self._stood())
        return time.perf_counter_ns() - begin_ns, samples

    def _stood(self) -> int:
        """Return how long it was stopped, once it has looked at the clock again."""
        (looks,) = _LOOKS.unpack_from(self._seen, _LONGEST.size)
        while _LOOKS.unpack_from(self._seen, _LONGEST.size)[0] < looks + 2:
            os.sched_yield()
        return int(_LONGEST.unpack_from(self._seen)[0])


class _Memory:
    """Collect a round; the sample is how much more private memory there is than without tracker."""

    def __init__(self, args: argparse.Namespace) -> None:
        stack = ExitStack()
        process = stack.enter_context(Process(args.pid))
        # What the first use of everything needs is no tracker's.
        with DirtyTracker(process) as tracker:
            tracker.collect().commit()
        self._before = _private()
        self._tracker = stack.enter_context(DirtyTracker(process))
        self._stack = stack

    def round(self) -> Answer:
        begin_ns = time.perf_counter_ns()
        self._tracker.collect().commit()
        wall_ns = time.perf_counter_ns() - begin_ns
        return wall_ns, array("Q", [max(0, _private() - self._before)])


class _Open:
    """Open and close a tracker; the samples are how long each of the two takes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._process = Process(args.pid)

    def round(self) -> Answer:
        begin_ns = time.perf_counter_ns()
        tracker = DirtyTracker(self._process)
        opened_ns = time.perf_counter_ns()
        tracker.close()
        closed_ns = time.perf_counter_ns()
        return closed_ns - begin_ns, array("Q", [opened_ns - begin_ns, closed_ns - opened_ns])


def _private() -> int:
    return int(psutil.Process(os.getpid()).memory_full_info().uss)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    ways = parser.add_subparsers(dest="way", required=True)
    attach = ways.add_parser("attach")
    attach.set_defaults(member=_Attach)
    attach.add_argument("pid", type=int)
    attach.add_argument("file")
    attach.add_argument("repeats", type=int)
    opened = ways.add_parser("open")
    opened.set_defaults(member=_Open)
    opened.add_argument("pid", type=int)
    memory = ways.add_parser("memory")
    memory.set_defaults(member=_Memory)
    memory.add_argument("pid", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    args = _arguments()
    answer_rounds(cast("Callable[[], Answer]", args.member(args).round))
