"""pyuffd's side of each pair: ``python -m benchmarks._members LIBTOUCHER WHAT ...``.

Does one round for each line on standard input and answers like ``serve_rounds`` in ``c/bench.c``.
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, cast

import psutil

from benchmarks._toucher import SEED, Touched, Toucher
from pyuffd import (
    BufferSource,
    DirtyTracker,
    Feature,
    Handler,
    PageCategory,
    Pagemap,
    Region,
    RegisterMode,
    ScanFlag,
    Userfaultfd,
    ZeroSource,
)

_PAGE = 4096
_HUGE = 2 << 20
_DIRTY_STEP = 10
_RARE_FAULTS_PER_S = 20
#: The native driver's default when it may run on any CPU.
_SPIN_US = 50

#: In place of a CPU for the handler: name none, or name all of them.
ANY_CPU = -1
ALL_CPUS = -2

Driver: TypeAlias = Literal["native", "inline"]
Answer: TypeAlias = "tuple[int, array[int]]"


def handler_cpus(cpu: int) -> list[int] | None:
    """Return the argument `cpus` of the Handler."""
    if cpu == ALL_CPUS:
        return sorted(os.sched_getaffinity(0))
    return None if cpu == ANY_CPU else [cpu]


def _source(length: int) -> mmap.mmap:
    """Return populated anonymous memory, mapped as ``map_memory(ANON)`` in ``c/bench.c`` does."""
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, length, _HUGE):
        end = min(offset + _HUGE, length)
        memory[offset:end] = b"\1" * (end - offset)
    return memory


def _region(memory: str, length: int) -> Region:
    """Return a region of the named memory type."""
    if memory == "anon":
        region = Region.anonymous(length)
    elif memory == "shmem":
        region = Region.memfd(length)
    else:
        return Region.memfd(length, huge_page_size=_HUGE)
    region.madvise(mmap.MADV_NOHUGEPAGE)
    return region


def _populate_and_release(region: Region, memory: str) -> None:
    """Touch every page, so that the hypervisor backs it, and drop them again."""
    region.fill(1)
    if memory == "anon":
        region.madvise(mmap.MADV_DONTNEED)
    else:
        region.punch_hole(0, region.length)


@contextmanager
def _userfaultfd(driver: Driver) -> Iterator[Userfaultfd]:
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    with Userfaultfd(features=features) as uffd:
        yield uffd


class _Fault:
    """Latency of one 4 KiB fault."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher = toucher
        self._args = args
        self._length = args.pages * _PAGE
        self._order = toucher.order(args.pages, SEED)
        self._source = _source(self._length)

    def round(self) -> Answer:
        kind = self._args.kind
        memory = "shmem" if kind == "minor" else "anon"
        with _userfaultfd(self._args.driver) as uffd, _region(memory, self._length) as region:
            if kind == "minor":
                with region.alias() as alias:
                    alias.fill(1)
                    touched = self._serve(uffd, region)
            else:
                region.fill(1)
                if kind == "missing":
                    region.madvise(mmap.MADV_DONTNEED)
                touched = self._serve(uffd, region)
        return touched.wall_ns, touched.samples

    def _serve(self, uffd: Userfaultfd, region: Region) -> Touched:
        args = self._args
        cpus = handler_cpus(args.handler_cpu)
        mode = RegisterMode[args.kind.upper()]
        source = BufferSource(self._source) if mode is RegisterMode.MISSING else None
        # On one CPU, which may be the faulting thread's, the handler does not spin unless told to.
        spin_us = _SPIN_US if args.handler_cpu not in (ANY_CPU, ALL_CPUS, args.cpu) else None
        handler = Handler(
            uffd, driver=args.driver, cpus=cpus, prefetch=0, spin_us=spin_us, autostart=False
        )
        with handler:
            handler.serve(region, source, mode=mode)
            if mode is RegisterMode.WP:
                handler.writeprotect(region)
            handler.start()
            return self._toucher.run(
                region.start,
                self._order,
                page_size=_PAGE,
                threads=args.threads,
                cpu=args.cpu,
                write=mode is RegisterMode.WP,
            )


class _Regions:
    """Latency of one 4 KiB missing fault, with the same pages served as one region or as many."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher = toucher
        self._args = args
        self._length = args.pages * _PAGE
        self._order = toucher.order(args.pages, SEED)
        self._source = _source(self._length)

    def round(self) -> Answer:
        args = self._args
        size = self._length // args.regions
        cpus = [args.cpu] if args.driver == "native" else None
        content = memoryview(self._source)
        with (
            _userfaultfd(args.driver) as uffd,
            _region("anon", self._length) as memory,
            Handler(uffd, driver=args.driver, cpus=cpus, prefetch=0) as handler,
        ):
            _populate_and_release(memory, "anon")
            for offset in range(0, self._length, size):
                part = Region.at(memory.start + offset, size, page_size=_PAGE)
                handler.serve(part, BufferSource(content[offset : offset + size]))
            touched = self._toucher.run(memory.start, self._order, page_size=_PAGE, cpu=args.cpu)
        return touched.wall_ns, touched.samples


class _Fill:
    """Touch a region in order while 2 MiB chunks of it are filled."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher = toucher
        self._args = args
        self._page_size = _HUGE if args.memory == "hugetlb" else _PAGE
        self._order = toucher.order(args.length // self._page_size, 0)
        self._source = _source(args.length)

    def round(self) -> Answer:
        args = self._args
        with _userfaultfd(args.driver) as uffd, _region(args.memory, args.length) as region:
            _populate_and_release(region, args.memory)
            with Handler(uffd, driver=args.driver, prefetch=_HUGE) as handler:
                handler.serve(region, BufferSource(self._source))
                touched = self._toucher.run(
                    region.start, self._order, page_size=self._page_size, timed=False
                )
        return touched.wall_ns, array("Q", [touched.wall_ns])


class _Scan:
    """Read the state of a region with every tenth page written."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher = toucher
        self._args = args
        self._dirty_pages = toucher.order(args.length // _PAGE, 0)[::_DIRTY_STEP]
        self._region = _region("anon", args.length)
        self._region.fill(1)
        self._pagemap = Pagemap()
        if args.what == "track":
            self._tracker = DirtyTracker(self._region)
            self._dirty()
            self._tracker.collect().commit()
        elif args.what != "pagemap":
            self._uffd = Userfaultfd(features=Feature.WP_ASYNC | Feature.WP_UNPOPULATED)
            self._uffd.register(self._region, mode=RegisterMode.WP)
            self._uffd.writeprotect(self._region)
            self._dirty()

    def _dirty(self) -> None:
        self._toucher.run(
            self._region.start, self._dirty_pages, page_size=_PAGE, write=True, timed=False
        )

    def round(self) -> Answer:
        region, what = self._region, self._args.what
        flags = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC if what == "reset" else ScanFlag(0)
        samples = array("Q")
        for _ in range(self._args.repeats):
            if what in ("reset", "track"):
                self._dirty()
            begin_ns = time.perf_counter_ns()
            if what == "pagemap":
                found = len(self._pagemap.read(region))
                expected = region.length // _PAGE
            elif what == "track":
                round_ = self._tracker.collect()
                round_.commit()
                found = len(round_.written)
                expected = len(self._dirty_pages)
            else:
                written = self._pagemap.scan(
                    region, category_mask=PageCategory.WRITTEN, flags=flags
                )
                found = len(written.ranges)
                expected = len(self._dirty_pages)
            samples.append(time.perf_counter_ns() - begin_ns)
            if found != expected:
                raise RuntimeError(f"{found} entries, not {expected}")
        return sum(samples), samples


class _Rare:
    """CPU time of this process without the faulting thread's, while faults are rare."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher = toucher
        self._order = toucher.order(args.seconds * _RARE_FAULTS_PER_S, SEED)

    def round(self) -> Answer:
        length = len(self._order) * _PAGE
        with _userfaultfd("native") as uffd, _region("anon", length) as region:
            _populate_and_release(region, "anon")
            with Handler(uffd, driver="native") as handler:
                handler.serve(region, ZeroSource())
                before_ns = time.process_time_ns()
                touched = self._toucher.run(
                    region.start,
                    self._order,
                    page_size=_PAGE,
                    pause_ns=1_000_000_000 // _RARE_FAULTS_PER_S,
                )
                cpu_ns = time.process_time_ns() - before_ns - touched.cpu_ns
        return touched.wall_ns, array("Q", [cpu_ns])


class _Memory:
    """Bytes of address space that serving a region of a given size costs, besides the region."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        del toucher
        self._length = args.length

    def round(self) -> Answer:
        with Userfaultfd() as uffd, Region.anonymous(self._length) as region:
            before = psutil.Process().memory_info().vms
            with Handler(uffd, driver="native") as handler:
                handler.serve(region, ZeroSource())
                grown = psutil.Process().memory_info().vms - before
        return 1, array("Q", [max(grown, 0)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks._members")
    parser.add_argument("library")
    what = parser.add_subparsers(dest="what_member", required=True)

    fault = what.add_parser("fault")
    fault.set_defaults(member=_Fault)
    fault.add_argument("kind", choices=("missing", "wp", "minor"))
    fault.add_argument("driver", choices=("native", "inline"))
    for name in ("pages", "threads", "cpu", "handler_cpu"):
        fault.add_argument(name, type=int)

    regions = what.add_parser("regions")
    regions.set_defaults(member=_Regions)
    regions.add_argument("driver", choices=("native", "inline"))
    for name in ("pages", "regions", "cpu"):
        regions.add_argument(name, type=int)

    fill = what.add_parser("fill")
    fill.set_defaults(member=_Fill)
    fill.add_argument("driver", choices=("native", "inline"))
    fill.add_argument("memory", choices=("anon", "shmem", "hugetlb"))
    fill.add_argument("length", type=int)

    scan = what.add_parser("scan")
    scan.set_defaults(member=_Scan)
    scan.add_argument("what", choices=("scan", "reset", "track", "pagemap"))
    scan.add_argument("length", type=int)
    scan.add_argument("repeats", type=int)

    rare = what.add_parser("rare")
    rare.set_defaults(member=_Rare)
    rare.add_argument("seconds", type=int)

    memory = what.add_parser("memory")
    memory.set_defaults(member=_Memory)
    memory.add_argument("length", type=int)
    return parser.parse_args()


def main() -> None:
    """Answer the harness until it closes standard input."""
    args = _arguments()
    member = args.member(Toucher(args.library), args)
    answer_rounds(cast("Callable[[], Answer]", member.round))


def answer_rounds(run_round: Callable[[], Answer]) -> None:
    """Do a round for each line of standard input."""
    for _ in sys.stdin.buffer:
        wall_ns, samples = run_round()
        sys.stdout.buffer.write(struct.pack("=QQ", wall_ns, len(samples)) + samples.tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
