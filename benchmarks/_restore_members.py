"""The members of `bench_restore`: ``python -m benchmarks._restore_members LIB WAY ...``."""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import time
from array import array
from collections.abc import Callable
from typing import Any

from benchmarks._images import drop, start_of, warm
from benchmarks._members import Answer, answer_rounds
from benchmarks._toucher import Toucher
from pyuffd import Region, Snapshot

_PAGE = mmap.PAGESIZE
_MIB = 1 << 20
_SEED = 7
# Faults that are timed in one go; then it is looked how far the background is.
_FAULTS_AT_ONCE = 16
_FAULTS = 2048
_RESTORES_MOST = 8


class _Member:
    """Does rounds with one image."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._toucher, self._args = Toucher(args.library), args
        self._pages = args.length // _PAGE
        self._in_order = self._toucher.order(self._pages, 0)
        # The second half, which the background reaches last.
        shuffled = self._toucher.order(self._pages // 2, _SEED)
        self._shuffled = array("I", (page + self._pages // 2 for page in shuffled))

    def _restored(self, work: Callable[[Region, Any], Answer], **options: Any) -> Answer:
        """Do something with a restore that has just begun."""
        args = self._args
        (warm if args.state == "warm" else drop)(args.image)
        with Snapshot.open(args.image) as snapshot, Region.anonymous(args.length) as region:
            region.madvise(mmap.MADV_NOHUGEPAGE)
            start = start_of(snapshot, args.length)
            self._begun = time.monotonic_ns()
            with snapshot.restore({start: region}, mode=args.mode, **options) as restore:
                return work(region, restore)

    def _touch_all(self, start: int) -> None:
        self._toucher.run(start, self._in_order, page_size=_PAGE, timed=False)

    def _since(self) -> int:
        return time.monotonic_ns() - self._begun

    def times(self) -> Answer:
        """Time the first access, and until all is there and was read."""

        def work(region: Region, restore: Any) -> Answer:
            region.touch(0, 1)
            first = self._since()
            restore.wait()
            self._touch_all(region.start)
            return self._since(), array("Q", [first, self._since()])

        return self._restored(work)

    def whole(self) -> Answer:
        """Time until all is there."""

        def work(region: Region, restore: Any) -> Answer:
            restore.wait()
            if self._args.mode == "auto":
                self._touch_all(region.start)
            return self._since(), array("Q")

        return self._restored(work, verify="no")

    def read(self) -> Answer:
        """Time reading the same bytes of the file into new memory."""
        args = self._args
        warm(args.image)
        with (
            Snapshot.open(args.image) as snapshot,
            Region.anonymous(args.length) as region,
            open(f"{args.image}/pages", "rb", buffering=0) as file,
        ):
            region.madvise(mmap.MADV_NOHUGEPAGE)
            runs = [run for run in snapshot.runs if run.stored]
            start = start_of(snapshot, args.length)
            first = next(run.offset for run in runs if run.start >= start)
            with region.memoryview() as view:
                self._begun = time.monotonic_ns()
                for at in range(0, args.length, _MIB):
                    part = view[at : at + _MIB]
                    if os.preadv(file.fileno(), [part], first + at) != len(part):
                        raise RuntimeError("the file ends early")
                return self._since(), array("Q")

    def private(self) -> Answer:
        """Time mapping the file, and reading it all."""
        args = self._args
        warm(args.image)
        with open(f"{args.image}/pages", "rb") as file:
            self._begun = time.monotonic_ns()
            with mmap.mmap(file.fileno(), args.length, flags=mmap.MAP_PRIVATE) as mapping:
                self._touch_all(_address(mapping))
                return self._since(), array("Q")

    def faults(self, *, paused: bool) -> Answer:
        """Time faults; none of pages that the background can have filled."""
        samples = array("Q")
        reached = self._args.length // 2 - 8 * _MIB

        def work(region: Region, restore: Any) -> Answer:
            for at in range(0, len(self._shuffled), _FAULTS_AT_ONCE):
                order = self._shuffled[at : at + _FAULTS_AT_ONCE]
                run = self._toucher.run(region.start, order, page_size=_PAGE)
                if restore.progress.bytes > reached or len(samples) >= _FAULTS:
                    break
                samples.extend(run.samples)
            return self._since(), samples

        for _ in range(_RESTORES_MOST):
            if len(samples) < _FAULTS:
                wall, _ = self._restored(work, paused=paused)
        if not samples:
            raise RuntimeError("the background was faster than the first faults")
        return wall, samples


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


WAYS = ("times", "copy", "auto", "read", "private", "fault", "fault-paused")


def main() -> None:
    """Answer the harness until it closes standard input."""
    parser = argparse.ArgumentParser(prog="benchmarks._restore_members")
    parser.add_argument("library")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("image")
    parser.add_argument("length", type=int)
    parser.add_argument("mode")
    parser.add_argument("state", choices=("warm", "cold"))
    args = parser.parse_args()
    if args.way in ("copy", "auto"):
        args.mode = args.way
    member = _Member(args)
    rounds: dict[str, Callable[[], Answer]] = {
        "times": member.times,
        "copy": member.whole,
        "auto": member.whole,
        "read": member.read,
        "private": member.private,
        "fault": lambda: member.faults(paused=False),
        "fault-paused": lambda: member.faults(paused=True),
    }
    answer_rounds(rounds[args.way])


if __name__ == "__main__":
    main()
