"""The members of `bench_working_set`: ``python -m benchmarks._working_set_members LIB WAY ...``.

A round drops the image from memory, and lasts until all pages that the program needs are there.
"""

from __future__ import annotations

import argparse
import mmap
import os
import time
from array import array

from benchmarks._images import drop, start_of
from benchmarks._members import Answer, answer_rounds
from benchmarks._toucher import Toucher
from benchmarks.bench_working_set import touched
from pyuffd import Region, RunState, Snapshot

_PAGE = mmap.PAGESIZE


class _Restored:
    """Restore, and touch the pages in order, from a C thread."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher, self._args = toucher, args
        self._order = array("I", touched(args.length))
        self._set = "touched" if args.way == "with" else None

    def round(self) -> Answer:
        length = self._args.length
        drop(self._args.image)
        with Snapshot.open(self._args.image) as snapshot, Region.anonymous(length) as region:
            region.madvise(mmap.MADV_NOHUGEPAGE)
            start = start_of(snapshot, length)
            begun = time.monotonic_ns()
            with snapshot.restore({start: region}, mode="copy", working_set=self._set) as restore:
                self._toucher.run(region.start, self._order, page_size=_PAGE, timed=False)
                wall = time.monotonic_ns() - begun
                if restore.working_set is not None and restore.working_set.problem:
                    raise RuntimeError(restore.working_set.problem)
        return wall, array("Q")


class _Bytes:
    """Read the same pages from the file: all are asked for, in order, and then read."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        del toucher
        self._image = args.image
        with Snapshot.open(args.image) as snapshot:
            start = start_of(snapshot, args.length)
            self._offsets = array("Q")
            at = {}
            for run in snapshot.runs:
                if run.state is RunState.DATA and start <= run.start < start + args.length:
                    for offset in range(0, run.length, _PAGE):
                        at[(run.start + offset - start) // _PAGE] = run.offset + offset
            self._offsets.extend(at[page] for page in touched(args.length))

    def round(self) -> Answer:
        drop(self._image)
        buffer = bytearray(_PAGE)
        with open(f"{self._image}/pages", "rb", buffering=0) as file:
            fd = file.fileno()
            begun = time.monotonic_ns()
            for offset in self._offsets:
                os.posix_fadvise(fd, offset, _PAGE, os.POSIX_FADV_WILLNEED)
            for offset in self._offsets:
                os.preadv(fd, [buffer], offset)
            wall = time.monotonic_ns() - begun
        return wall, array("Q")


def main() -> None:
    """Answer the harness until it closes standard input."""
    parser = argparse.ArgumentParser(prog="benchmarks._working_set_members")
    parser.add_argument("library")
    parser.add_argument("way", choices=("with", "without", "bytes"))
    parser.add_argument("image")
    parser.add_argument("length", type=int)
    args = parser.parse_args()
    member = (_Bytes if args.way == "bytes" else _Restored)(Toucher(args.library), args)
    answer_rounds(member.round)


if __name__ == "__main__":
    main()
