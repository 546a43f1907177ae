"""Restores from a cold file, of which a tenth is touched: with and without a working set."""

from __future__ import annotations

import mmap
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks._images import start_of, take
from benchmarks._pairs import Row, Skipped, Target, ratio_row, run_pairs
from benchmarks._setup import Setup
from pyuffd import Region, Snapshot

_MIB = 1 << 20
_PAGE = mmap.PAGESIZE
_MODULE = "_working_set_members"
#: One page in this many is touched.
_TOUCHED_EVERY = 10
_RECORD_MOST_S = 600


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield both rows: against the same restore without the set, and against the file's bytes."""
    length = (1024 if not setup.quick else 128) * _MIB
    # Not in a tmpfs, whose files are never cold.
    with tempfile.TemporaryDirectory(prefix="pyuffd-bench-", dir="/var/tmp") as folder:
        image = Path(folder) / "image"
        take(image, length)
        _record(image, length)

        def times(base: str) -> list[tuple[float, float]]:
            pairs = run_pairs(
                setup.member(base, image, length, module=_MODULE),
                setup.member("with", image, length, module=_MODULE),
                setup.rounds,
            )
            return [(a.wall_ns / 1e6, b.wall_ns / 1e6) for a, b in pairs]

        what = f"{length // _MIB} MiB, cold file, a tenth of the pages touched"
        yield ratio_row(
            f"{what}: with a working set / without",
            times("without"),
            unit="ms",
            target=Target("<=", 1 / 3),
        )
        yield ratio_row(
            f"{what}: with a working set / reading just those bytes",
            times("bytes"),
            unit="ms",
            target=Target("<=", 1.2),
        )


def touched(length: int) -> list[int]:
    """Return the pages that are touched, in order."""
    pages = length // _PAGE
    return random.Random(1).sample(range(pages), pages // _TOUCHED_EVERY)


def _record(image: Path, length: int) -> None:
    with (
        Snapshot.open(image) as snapshot,
        Region.anonymous(length) as region,
        snapshot.restore(
            {start_of(snapshot, length): region},
            mode="copy",
            record="touched",
            record_until=_RECORD_MOST_S,
        ) as restore,
    ):
        for page in touched(length):
            region.read(page * _PAGE, 1)
        restore.stop_recording()
        if restore.recorded is None or restore.recorded.length != len(touched(length)) * _PAGE:
            raise RuntimeError("the recording is not what was touched")
