"""A recording has the demand faults of a handler, in order, and nothing that was filled ahead."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pyuffd import Feature, FileSource
from pyuffd._recording import Recording, Watched
from pyuffd._working_set import Place
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import content, everywhere, in_fork, serving

DRIVERS: Any = ("native", "inline", "thread", "process")


def source_of(data: bytes) -> FileSource:
    """Return a source that every driver can read."""
    with open(os.memfd_create("data"), "wb+") as file:
        file.write(data)
        file.flush()
        return FileSource(file)


def without_what_was_filled(driver: Any, name: str) -> None:
    with serving(driver, name, fault_log=1000) as (handler, memory):
        handler.start()
        size = memory.page_size
        region = memory.pages(8)
        data = content(region.length)
        handler.serve(region, source_of(data))
        # The memory begins 100 base pages into its part of the image, which ends a page early.
        units = size // PAGE
        place = Place(100 * PAGE, region.length - PAGE, page_size=size)
        recording = Recording(
            handler.take_faults, [Watched(0, region.start, region.length, (place,))]
        )
        handler.populate(region, ranges=[(size, 3 * size)])
        handler.load(region, 4 * size, size)
        for index in (7, 1, 4, 3, 0, 2, 3):
            assert region.read(index * size, size) == data[index * size : (index + 1) * size]
        recording.look()
        recording.look()
        wanted = [(100 + 7 * units, units - 1), (100 + 3 * units, units), (100, units)]
        assert recording.runs == [run for run in wanted if run[1]]
        assert recording.lost == 0


test_without_what_was_filled = pytest.mark.crossing(
    everywhere(without_what_was_filled, drivers=DRIVERS)
)


def neighbours(driver: Any) -> None:
    """What a fault brings along (`prefetch=`) was not asked for."""
    with serving(driver, "anon", fault_log=1000, prefetch=8 * PAGE) as (handler, memory):
        handler.start()
        region = memory.pages(64)
        handler.serve(region, source_of(content(region.length)))
        place = Place(0, region.length)
        recording = Recording(
            handler.take_faults, [Watched(0, region.start, region.length, (place,))]
        )
        for index in range(64):
            region.read(index * PAGE, 1)
        recording.look()
        faults = handler.stats().faults["missing"]
        assert faults < 64
        assert len(recording) == faults


@pytest.mark.parametrize("driver", DRIVERS)
def test_without_neighbours(driver: str) -> None:
    run_child(neighbours, driver)


def forks() -> None:
    """A fork's faults are of its own memory."""
    with serving("native", "anon", Feature.EVENT_FORK, fault_log=100) as (handler, memory):
        handler.start()
        region = memory.pages(8)
        handler.serve(region, source_of(content(region.length)))
        place = Place(0, region.length)
        recording = Recording(
            handler.take_faults, [Watched(0, region.start, region.length, (place,))]
        )
        region.read(5 * PAGE, 1)
        assert in_fork(lambda: region.read(2 * PAGE, 1)) == 0
        recording.look()
        assert recording.runs == [(5, 1)]


@needs(Feature.EVENT_FORK)
def test_without_forks() -> None:
    run_child(forks)
