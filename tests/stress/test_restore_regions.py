"""Restores of ten thousand regions: the time grows with their number, not with its square."""

from __future__ import annotations

import contextlib
import resource
import tempfile
import time
from pathlib import Path

import pytest

from pyuffd import Region, Snapshot
from tests._child import run_child
from tests._images import START, data, write, zero
from tests._memory import PAGE

MANY, FEW = 10_000, 1_000
# Of the time for each region: what grows with the square would be a factor of ten.
WORSE_MOST = 4


def seconds_each(count: int) -> float:
    """Restore this many regions, compare each, and return the CPU time for one."""
    with tempfile.TemporaryDirectory() as path, contextlib.ExitStack() as stack:
        folder = write(
            Path(path) / "one",
            [(START + 64 * n * PAGE, [data(3, n), zero(1)]) for n in range(count)],
        )
        snapshot = stack.enter_context(Snapshot.open(folder))
        regions = {
            where: stack.enter_context(Region.anonymous(where.length)) for where in snapshot.regions
        }
        began = time.process_time()
        with snapshot.restore(regions, mode="copy") as restore:
            where, last = next(reversed(regions.items()))
            assert last.read(0, PAGE) == snapshot.read(where.start, PAGE)
            assert restore.wait(300)
        spent = time.process_time() - began
        for where, region in regions.items():
            assert region.read() == snapshot.read(where.start, where.length)
    return spent / count


def many_regions() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, most), most))  # the usual limit
    few, many = seconds_each(FEW), seconds_each(MANY)
    assert many < WORSE_MOST * few, (few, many)


@pytest.mark.stress
def test_ten_thousand_regions() -> None:
    run_child(many_regions, budget_s=300)
