"""The background of a restore: what its threads ask, and what they wait for."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from pyuffd import Feature, Region, Snapshot
from pyuffd.testing import needs
from tests._barriers import Point, holding
from tests._child import run_child
from tests._images import START, data, write
from tests._memory import PAGE

pytestmark = needs(Feature.MINOR_SHMEM | Feature.EVENT_REMOVE)
# The longest time that `Handler.stats` waits for a thread at work, and how often faults are counted
# meanwhile: in all it would be seconds.
STATS_WAIT_S, COUNTS = 0.1, 20


def count_beside_work() -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = write(Path(path) / "one", [(START, [data(2)])])
        with (
            Snapshot.open(folder) as snapshot,
            Region.anonymous(2 * PAGE) as region,
            snapshot.restore({START: region}, mode="copy", paused=True) as restore,
        ):
            serving = restore._serving
            assert serving is not None
            with holding(Point.FAULT_WOKEN) as point:
                region.touch(0, 1)
                point.wait()  # a thread is at work, and stays so
                began = time.monotonic()
                assert {serving.faults() for _ in range(COUNTS)} == {0}
                assert time.monotonic() - began < COUNTS * STATS_WAIT_S / 2
                point.release()
            assert restore.stats.faults == 1  # this waits until it is counted
            assert serving.faults() == 1


def test_faults_are_counted_beside_work() -> None:
    """All threads of the background count them, between two pieces."""
    run_child(count_beside_work)
