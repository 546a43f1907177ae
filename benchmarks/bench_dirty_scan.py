"""Reading page state: PAGEMAP_SCAN with every tenth page dirty, and /proc/self/pagemap."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks._pairs import Row, Skipped, Target, latency_row, run_pairs
from benchmarks._setup import Setup, available_memory, command

_LENGTH = 1 << 30
_REPEATS = 5


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield the rows of scans, of a round of tracking, and of a pagemap read."""
    for what, base, name, target in (
        ("scan", "scan", "PAGEMAP_SCAN / one ioctl", 1.15),
        ("reset", "reset", "PAGEMAP_SCAN that write-protects again / one ioctl", 1.1),
        # collect() tells dropped pages from written ones, so it asks whether each has content.
        ("track", "content", "DirtyTracker.collect() / one ioctl that asks the same", 1.2),
        ("track", "reset", "DirtyTracker.collect() / one ioctl for written pages alone", 1.2),
        ("pagemap", "pagemap", "pagemap read / one pread", 1.2),
    ):
        pairs = run_pairs(
            command(setup.programs.scan, base, _LENGTH, _REPEATS),
            setup.member("scan", what, _LENGTH, _REPEATS),
            setup.rounds,
        )
        yield latency_row(f"1 GiB: {name}", pairs, target=Target("<=", target), unit="ms")
    yield from _growth(setup)


def _growth(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield the row that compares a round over 8 times the memory: nothing grows faster than it."""
    small = _LENGTH // 8 if setup.quick else _LENGTH
    name = f"DirtyTracker.collect() over {8 * small >> 20} MiB / over {small >> 20} MiB"
    if available_memory() < 12 * small:
        yield Skipped(name, "too little memory is free")
        return
    pairs = run_pairs(
        setup.member("scan", "track", small, _REPEATS),
        setup.member("scan", "track", 8 * small, _REPEATS),
        setup.rounds,
    )
    yield latency_row(name, pairs, target=Target("<=", 9), unit="ms")
