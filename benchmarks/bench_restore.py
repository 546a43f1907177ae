"""Restores of a whole snapshot: the first access, all of it, and faults meanwhile."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks._images import take
from benchmarks._pairs import Member, Row, Skipped, Target, latency_row, ratio_row, run_pairs
from benchmarks._setup import Setup

_MIB = 1 << 20
_MODULE = "_restore_members"
MODES = ("copy", "minor", "map", "auto")


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield the times of each method, and the bounds that they have to keep."""
    length = (1024 if not setup.quick else 128) * _MIB
    # Not in a tmpfs, whose files are never cold.
    with tempfile.TemporaryDirectory(prefix="pyuffd-bench-", dir="/var/tmp") as folder:
        image = Path(folder) / "image"
        take(image, length)
        yield from _times(setup, image, length)
        yield from _bounds(setup, image, length)


def _times(setup: Setup, image: Path, length: int) -> Iterator[Row]:
    """Yield the first access and the whole restore by method, of a warm and of a cold file."""
    for state in ("warm", "cold"):
        for mode in MODES:
            words = setup.member("times", image, length, mode, state, module=_MODULE)
            with Member(words) as member:
                member.round()
                found = [member.round().samples for _ in range(setup.rounds)]
            for at, what in enumerate(("first access", "all read")):
                times = [samples[at] / 1e6 for samples in found]
                yield Row(
                    f"restore of {length // _MIB} MiB, {state} file, {mode}: {what}",
                    "ms",
                    statistics.median(times),
                    target=Target("<=", 5) if (at, mode) == (0, "copy") else None,
                    detail={"mode": mode, "state": state, "what": what, "of_each_round": times},
                )


def _bounds(setup: Setup, image: Path, length: int) -> Iterator[Row]:
    what = f"restore of {length // _MIB} MiB, warm file"

    def pairs(base: str, ours: str) -> list[tuple[float, float]]:
        found = run_pairs(
            setup.member(base, image, length, "copy", "warm", module=_MODULE),
            setup.member(ours, image, length, "auto", "warm", module=_MODULE),
            setup.rounds,
        )
        return [(a.wall_ns / 1e6, b.wall_ns / 1e6) for a, b in found]

    yield ratio_row(
        f"{what}: copy, unverified / reading the file into memory",
        pairs("read", "copy"),
        unit="ms",
        target=Target("<=", 1 / 0.95),
    )
    yield ratio_row(
        f"{what}: auto and reading it all / MAP_PRIVATE",
        pairs("private", "auto"),
        unit="ms",
        target=Target("<=", 1.1),
    )
    yield latency_row(
        f"{what}: a fault while it is filled / while it pauses",
        run_pairs(
            setup.member("fault-paused", image, length, "copy", "warm", module=_MODULE),
            setup.member("fault", image, length, "copy", "warm", module=_MODULE),
            setup.rounds,
        ),
        target=None,
        target_p99=Target("<=", 2),
    )
