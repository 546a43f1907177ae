"""Handler.populate of many ranges at once."""

from __future__ import annotations

import errno
from array import array
from typing import Any

import pytest

from pyuffd import CallableSource, Handler, UffdOSError
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_params
from tests.kernel._serving import states
from tests.kernel._verbs import (
    ABSENT,
    CLEAN,
    DRIVERS,
    MISSING,
    NEEDED,
    PYTHON,
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
