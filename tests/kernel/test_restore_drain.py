"""The background of a restore: what its threads ask, and what they wait for."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from pyuffd import Feature, Region, Snapshot
from pyuffd._image_calls import read_ahead
from pyuffd.snapshot import _restore_hot, _serve, _working_sets
from pyuffd.snapshot._content import PIECE
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


def failing_hints(*, hot: bool) -> None:
    """Two are refused, the first by an exception: what they asked for is asked for again."""
    asked: list[int] = []
    pieces = 8
    module = _restore_hot if hot else _serve

    def refuse(rows: memoryview, *rest: Any) -> bool:
        asked.append(rows.cast("B").cast("Q")[0])
        if len(asked) == 1:
            raise MemoryError
        return len(asked) > 2 and read_ahead(rows, *rest)

    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as path,
        Region.anonymous(pieces * PIECE) as region,
    ):
        patch.setattr(module, "read_ahead", refuse)
        folder = write(Path(path) / "one", [(START, [data(pieces * PIECE // PAGE)])])
        with Snapshot.open(folder) as snapshot:
            if hot:
                _working_sets.add(snapshot._image, "hot", [(0, pieces * PIECE // PAGE)])
            with snapshot.restore(
                {START: region},
                mode="copy",
                verify="no",
                threads=1,
                working_set="hot" if hot else None,
            ) as restore:
                assert restore.wait(30)
            assert region.read() == snapshot.read(START, region.length)
    # The windows of a working set are asked for in order. Of pieces, what is in place by the third
    # is not asked for again.
    assert asked[:3] == ([0, 0, 0] if hot else [0, PIECE, 2 * PIECE])
    assert not hot or asked[2:] == list(range(0, pieces * PIECE, PIECE))


@pytest.mark.parametrize("hot", [False, True], ids=["pieces", "working-set"])
def test_hints_that_fail(*, hot: bool) -> None:
    """Memory is short for reading ahead: it takes longer, and nothing else is lost."""
    run_child(failing_hints, hot=hot)


def test_faults_are_counted_beside_work() -> None:
    """All threads of the background count them, between two pieces."""
    run_child(count_beside_work)


def beside_what_is_complete(*, hot: bool) -> None:
    """One part of a snapshot has been restored by "minor" before, another has not."""
    with (
        tempfile.TemporaryDirectory() as path,
        Region.anonymous(2 * PIECE) as first,
        Region.anonymous(2 * PIECE) as again,
        Region.anonymous(3 * PIECE) as other,
    ):
        folder = write(Path(path) / "one", [(START, [data(5 * PIECE // PAGE)])])
        with Snapshot.open(folder) as snapshot:
            good = snapshot.read(START, 5 * PIECE)
            if hot:
                _working_sets.add(snapshot._image, "hot", [(7, 1), (3 * PIECE // PAGE, 2)])
            with snapshot.restore({START: first}, mode="minor") as restore:
                assert restore.wait(30)
            first.write(0, b"mine")
            with snapshot.restore(
                [(START, again), (START + 2 * PIECE, other)],
                mode="minor",
                paused=True,
                working_set="hot" if hot else None,
            ) as restore:
                assert again.read() == good[: 2 * PIECE]  # at once
                assert restore.progress.bytes == 2 * PIECE
                assert other.read(PIECE, PAGE) == good[3 * PIECE : 3 * PIECE + PAGE]
                restore.resume()
                assert restore.wait(30)
                assert restore.progress.bytes == restore.progress.total == 5 * PIECE
            assert other.read() == good[2 * PIECE :]
            assert first.read(0, 4) == b"mine"


@pytest.mark.parametrize("hot", [False, True], ids=["alone", "working-set"])
def test_minor_beside_what_is_complete(*, hot: bool) -> None:
    run_child(beside_what_is_complete, hot=hot)
