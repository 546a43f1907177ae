"""Throughput: sequential lazy restore with prefetch, and two threads that resolve inline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

from benchmarks._pairs import Row, Skipped, Target, ratio_row, run_pairs
from benchmarks._setup import Setup, command, huge_pages

_HUGE = 2 << 20
_RESTORE = 1 << 30
_QUICK_RESTORE = 128 << 20
_PAGES = 65536
_QUICK_PAGES = 8192
_MIB_PER_S = 1e9 / (1 << 20)
#: Of the copies alone. The native driver has a thread for them.
_LEAST = {"native": 0.98, "inline": 0.95}


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield the rows of sequential restore, then that of two threads faulting at once."""
    for memory in ("anon", "shmem", "hugetlb"):
        # Each member of the pair maps its region only during its round.
        length = _QUICK_RESTORE if setup.quick else _RESTORE
        needed = huge_pages(2 * length // _HUGE) if memory == "hugetlb" else nullcontext("")
        with needed as lacking:
            for driver in ("native", "inline"):
                name = f"lazy restore of {length >> 20} MiB {memory}: {driver}"
                if lacking:
                    yield Skipped(name, lacking)
                else:
                    yield from _restore(setup, name, driver, memory, length)
    yield from _two_threads(setup)


def _restore(setup: Setup, name: str, driver: str, memory: str, length: int) -> Iterator[Row]:
    pairs = run_pairs(
        command(setup.programs.fill, memory, length, "ahead"),
        setup.member("fill", driver, memory, length),
        setup.rounds,
    )
    size = length * _MIB_PER_S
    copies = [(size / a.wall_ns, size / b.wall_ns) for a, b in pairs]
    yield ratio_row(
        f"{name} / 2 MiB UFFDIO_COPYs", copies, unit="MiB/s", target=Target(">=", _LEAST[driver])
    )
    same_work = [(size / a.samples[0], size / b.wall_ns) for a, b in pairs]
    yield ratio_row(f"{name} / the same, then touched", same_work, unit="MiB/s", target=None)
    if driver != "native" or setup.other_cpu is None:
        return
    pairs = run_pairs(
        command(setup.programs.fill, memory, length, "lazily"),
        setup.member("fill", driver, memory, length),
        setup.rounds,
    )
    yield ratio_row(
        f"{name} / a thread that does only that",
        [(size / a.wall_ns, size / b.wall_ns) for a, b in pairs],
        unit="MiB/s",
        target=Target(">=", 0.98),
    )


def _two_threads(setup: Setup) -> Iterator[Row | Skipped]:
    name = "missing faults of two threads: inline / sigbus"
    if setup.other_cpu is None:
        yield Skipped(name, "this machine has one CPU")
        return
    where = (_QUICK_PAGES if setup.quick else _PAGES, 2, -1, -1)
    pairs = run_pairs(
        command(setup.programs.fault, "missing", "sigbus", *where),
        setup.member("fault", "missing", "inline", *where),
        setup.rounds,
    )
    rates = [(a.per_second / 1e3, b.per_second / 1e3) for a, b in pairs]
    yield ratio_row(name, rates, unit="k/s", target=Target(">=", 0.85))
