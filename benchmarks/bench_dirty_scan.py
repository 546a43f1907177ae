"""Reading page state: PAGEMAP_SCAN with every tenth page dirty, and /proc/self/pagemap."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks._pairs import Row, Skipped, Target, latency_row, run_pairs
from benchmarks._setup import Setup, command

_LENGTH = 1 << 30
_REPEATS = 5


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield the rows of a scan, of a scan that also protects again, and of a pagemap read."""
    for what, name, target in (
        ("scan", "PAGEMAP_SCAN / one ioctl", Target("<=", 1.15)),
        ("reset", "PAGEMAP_SCAN that write-protects again / one ioctl", Target("<=", 1.15)),
        ("pagemap", "pagemap read / one pread", Target("<=", 1.2)),
    ):
        pairs = run_pairs(
            command(setup.programs.scan, what, _LENGTH, _REPEATS),
            setup.member("scan", what, _LENGTH, _REPEATS),
            setup.rounds,
        )
        yield latency_row(f"1 GiB: {name}", pairs, target=target, unit="ms")
