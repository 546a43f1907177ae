"""A handler ends in order although the program lowered its limit of descriptors meanwhile."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from pyuffd import (
    AsyncSource,
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    HelperLostError,
    PagePoisonedError,
    Region,
    RegisterMode,
    Userfaultfd,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import PAGE
from tests.process.test_killed_keeper import filled, kill_keeper

Driver = Literal["native", "thread", "async", "inline", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "thread", "async", "inline", "process")
Ending = Literal["stop", "handler", "uffd", "region"]
ENDINGS: tuple[Ending, ...] = ("stop", "handler", "uffd", "region")
PAGES = 8

pytestmark = needs(Feature.POISON | Feature.SIGBUS)


async def read(_offset: int, length: int) -> bytes:
    return b"x" * length


def source(driver: Driver) -> Any:
    if driver == "process":
        return CallableSource(filled)
    if driver == "thread":
        return CallableSource(lambda _, size: b"x" * size)
    return AsyncSource(read) if driver == "async" else BufferSource(b"x" * PAGES * PAGE)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def made(driver: Driver) -> tuple[Userfaultfd, Region, Handler]:
    uffd = Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))
    region = Region.anonymous(PAGES * PAGE)
    handler = Handler(uffd, driver="thread" if driver == "async" else driver)
    handler.serve(region, source(driver), mode=RegisterMode.MISSING)
    handler.start()
    return uffd, region, handler


def ends(driver: Driver, ending: Ending) -> None:
    uffd, region, handler = made(driver)
    assert region.read(0, PAGE) == b"x" * PAGE
    with no_descriptors():
        assert region.read(PAGE, PAGE) == b"x" * PAGE
        assert handler.stats().filled_pages >= 2
        handler.populate(region, 2 * PAGE, PAGE)
        if ending == "stop":
            handler.stop()
            assert region.read(0, 3 * PAGE) == b"x" * 3 * PAGE
            with pytest.raises(PagePoisonedError):
                region.read(4 * PAGE, 1)
        if ending == "handler":
            with handler:
                pass
        for close in {"uffd": (uffd.close,), "region": (region.close,)}.get(ending, ()):
            close()
        for again in (handler.stop, uffd.close, region.close):
            again()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_end(driver: Driver, ending: Ending) -> None:
    """The link to a helper was lost: poll(2) refuses more descriptors than RLIMIT_NOFILE."""
    ended = run_child(ends, driver, ending, budget_s=30)
    assert not ended.stderr


def lost() -> None:
    uffd, region, handler = made("process")
    assert region.read(0, PAGE) == b"x" * PAGE
    kill_keeper(handler)
    with no_descriptors():
        with pytest.raises(PagePoisonedError):
            region.read(PAGE, 1)
        with pytest.raises(HelperLostError):
            handler.populate(region)
        with pytest.raises(HelperLostError):
            handler.stop()
        assert region.read(0, PAGE) == b"x" * PAGE
        with pytest.raises(PagePoisonedError):
            region.read(4 * PAGE, 1)
        uffd.close()
        region.close()


def test_a_lost_helper() -> None:
    """What takes over has its descriptors already."""
    run_child(lost, budget_s=30)
