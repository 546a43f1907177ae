"""Handler.populate of many ranges at once."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from pyuffd import (
    CallableSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    Region,
    UffdOSError,
    Userfaultfd,
    _memory,
)
from pyuffd.testing import needs
from tests._barriers import Point, holding
from tests._child import run_child
from tests._memory import memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import content, states
from tests.kernel._verbs import (
    ABSENT,
    CLEAN,
    DRIVERS,
    MISSING,
    NEEDED,
    PYTHON,
    TRACKING,
    WP,
    Case,
    Driver,
    filling,
    handling,
    run_cases,
)


def some(handler: Handler, name: str) -> None:
    """What the ranges name is filled, nothing else; pairs, arrays and checkpoints name it."""
    with filling(handler, name, mode=MISSING | WP) as region:
        size = region.page_size
        assert handler.populate(region, ranges=[(3 * size, 4 * size), (0, size)]) == 2 * size
        assert states(handler, region) == [CLEAN, ABSENT, ABSENT, CLEAN]
        assert handler.populate(region, ranges=[]) == 0
        region.write(0, b"x")
        assert handler.populate(region, ranges=handler.checkpoint(region).written) == 0
        words = array("Q", [size, 2 * size, 7])
        rows: Any = memoryview(words).cast("B").cast("Q", (1, 3))
        assert handler.populate(region, ranges=rows) == size
        # Offsets are those of the region, also of a part.
        assert handler.populate(region[2 * size :], ranges=((0, size),)) == size
        assert states(handler, region) == [CLEAN] * 4


def bad(handler: Handler, name: str) -> None:
    """One bad range, and nothing is filled."""
    with filling(handler, name) as region:
        size = region.page_size
        for wrong in ((0, 0), (size, 0), (0, size + 8), (8, size), (0, 5 * size), (-size, size)):
            with pytest.raises(ValueError):
                handler.populate(region, ranges=[(0, size), wrong])
        with pytest.raises(ValueError):
            handler.populate(region[:size], ranges=[(size, 2 * size)])
        with pytest.raises(ValueError, match="either"):
            handler.populate(region, size, ranges=[(0, size)])
        for unfit in (bytes(16), array("d", [0, size]), array("Q", [0, size])):
            with pytest.raises(ValueError, match="columns"):
                handler.populate(region, ranges=unfit)
        for kind in (7, [1], "text", [(0, 1.5)]):
            with pytest.raises((TypeError, ValueError)):
                handler.populate(region, ranges=kind)  # type: ignore[arg-type]
        assert states(handler, region) == [ABSENT] * 4


CASES: dict[str, Case] = {case.__name__: case for case in (some, bad)}


def check(name: str) -> None:
    for driver in DRIVERS:
        if driver != "process" or name == "anon":  # it is slow to start
            with handling(driver) as handler:
                run_cases(CASES, handler, name)


@needs(NEEDED)
@pytest.mark.parametrize("name", memory_params())
def test_ranges(name: str) -> None:
    run_child(check, name, budget_s=30)


def half(offset: int, length: int) -> bytes:
    """Pages up to the second one; the third has no content."""
    if offset + length > 8192:
        raise OSError(errno.ENXIO, "the end")
    return b"x" * length


def failing(driver: Driver) -> None:
    with (
        handling(driver, on_error="stall") as handler,
        filling(handler, "anon", CallableSource(half)) as region,
    ):
        ranges = [(0, 4096), (8192, 12288), (4096, 8192)]
        with pytest.raises(UffdOSError) as failed:
            handler.populate(region, ranges=ranges, chunk=4096)
        assert (failed.value.start, failed.value.data["completed"]) == (region.start + 8192, 4096)
        assert "the end" in failed.value.hint
        assert states(handler, region) == [CLEAN, ABSENT, ABSENT, ABSENT]
        handler.fill(region, 8192, bytes(4096))  # it is no failure of the handler any more


@needs(NEEDED)
@pytest.mark.parametrize("driver", PYTHON)
def test_the_first_failure(driver: Driver) -> None:
    run_child(failing, driver, budget_s=20)


# Ranges of a file that are close to each other are filled together

MANY = 600  # pages; more than one group
NONE = Feature(0)
EVERY_THIRD = [(at, at + 4096) for at in range(0, MANY * 4096, 3 * 4096)]


@contextmanager
def many_of_a_file(events: Feature = NONE) -> Iterator[tuple[Handler, Region, int]]:
    fd = os.memfd_create("image")
    os.write(fd, content(MANY * 4096))
    with (
        Userfaultfd(features=TRACKING | events) as uffd,
        Region.anonymous(MANY * 4096) as region,
        FileSource(fd) as source,
        Handler(uffd, driver="native") as handler,
    ):
        handler.serve(region, source, mode=MISSING | WP)
        yield handler, region, fd
    os.close(fd)


def close_ones() -> None:
    """Only these pages, each with what the file has there; those that are there stay."""
    for events in (Feature(0), Feature.EVENT_REMAP | Feature.EVENT_UNMAP):
        with many_of_a_file(events) as (handler, region, _):
            region.write(6 * 4096, b"mine")
            assert handler.populate(region, ranges=EVERY_THIRD) == (len(EVERY_THIRD) - 1) * 4096
            found = states(handler, region)
            assert found[::3].count(CLEAN) == len(EVERY_THIRD) - 1
            assert {*found[1::3], *found[2::3]} == {ABSENT}
            data = content(region.length)
            for start, end in EVERY_THIRD:
                want = b"mine" if start == 6 * 4096 else data[start : start + 4]
                assert region.read(start, end - start) == want + data[start + 4 : end]


@needs(NEEDED)
def test_ranges_close_to_each_other() -> None:
    run_child(close_ones)


def beside_a_hole() -> None:
    """Memory between two ranges is no longer mapped, or is elsewhere."""
    with many_of_a_file(Feature.EVENT_REMAP | Feature.EVENT_UNMAP) as (handler, region, _):
        data, start = content(region.length), region.start
        _memory.munmap(start + 4096, 4096)
        to = _memory.mmap(4096, 0, 0x22)  # MAP_PRIVATE | MAP_ANONYMOUS
        _memory.mremap(start + 3 * 4096, 4096, 4096, 3, to)
        assert handler.populate(region, ranges=EVERY_THIRD) == len(EVERY_THIRD) * 4096
        assert _memory.read(to, 4096) == data[3 * 4096 : 4 * 4096]
        assert _memory.read(start + 6 * 4096, 4096) == data[6 * 4096 : 7 * 4096]
        handler.unserve(region)
        _memory.munmap(to, 4096)


@needs(NEEDED | Feature.EVENT_REMAP | Feature.EVENT_UNMAP)
def test_ranges_beside_a_hole() -> None:
    run_child(beside_a_hole)


def of_a_shorter_file() -> None:
    """The first page that the file has lost is named, and the pages before it are there."""
    with many_of_a_file() as (handler, region, fd):
        os.ftruncate(fd, 10 * 4096)
        with pytest.raises(UffdOSError) as failed:
            handler.populate(region, ranges=EVERY_THIRD)
        assert failed.value.errno == errno.ENODATA
        assert failed.value.data["completed"] == 4 * 4096
        assert states(handler, region).count(CLEAN) == 4
        assert region.read(9 * 4096, 4096) == content(10 * 4096)[9 * 4096 :]
        handler.unserve(region)


@needs(NEEDED)
def test_ranges_of_a_file_that_was_truncated() -> None:
    run_child(of_a_shorter_file)


def cut_meanwhile(length: int) -> None:
    """The file is cut while it is copied: a page that may have zeros is reported."""
    with pytest.raises(HandlerError) as failed, many_of_a_file() as (handler, region, fd):
        with holding(Point.FILL_CLAIMED) as claimed:
            filling = Task(lambda: handler.populate(region, ranges=EVERY_THIRD))
            claimed.wait()
            os.ftruncate(fd, length)
        with suppress(UffdOSError):
            filling.result()
        start = region.start
        assert handler.stats().failed
        handler.stop()
    assert failed.value.start == start


@needs(NEEDED)
def test_a_file_that_is_cut_meanwhile() -> None:
    run_child(cut_meanwhile, 100)
