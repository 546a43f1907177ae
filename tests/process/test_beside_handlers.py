"""Calls of a userfaultfd beside its handler are refused if a promise would break."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    Handler,
    PageState,
    RegisterMode,
    Userfaultfd,
    WriteprotectMode,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import Memory, memory_of, memory_params
from tests.kernel._serving import content, states
from tests.process._pitfalls import Data, Pages

Driver = Literal["native", "inline", "thread", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "inline", "thread", "process")
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
WP_EVERYWHERE = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM

# Each gets the address and the length of a page.
REFUSED: dict[str, tuple[Callable[[Userfaultfd, int, int], object], str]] = {
    "writeprotect": (lambda uffd, at, n: uffd.writeprotect(at, n), "handler.writeprotect"),
    "unprotect": (
        lambda uffd, at, n: uffd.writeprotect(at, n, mode=WriteprotectMode(0)),
        "handler.writeprotect",
    ),
    "unregister": (lambda uffd, at, n: uffd.unregister(at, n), "handler.unserve"),
    "register-other-modes": (
        lambda uffd, at, n: uffd.register(at, n, mode=RegisterMode.MINOR),
        "serve it again",
    ),
    "rwprotect": (lambda uffd, at, n: uffd.rwprotect(at, n), "handler"),
    "set-mode": (lambda uffd, at, n: uffd.set_mode(enable=Feature.RWP_ASYNC), "stop it first"),
}


@contextlib.contextmanager
def handler_of(driver: Driver) -> Iterator[Handler]:
    features = WP_EVERYWHERE | (Feature.SIGBUS if driver == "inline" else Feature(0))
    with Userfaultfd(features=features) as uffd, Handler(uffd, driver=driver) as handler:
        yield handler


def refuses(driver: Driver, memory: str) -> None:
    """A refused call changes nothing: the states are true, and the content arrives."""
    with contextlib.closing(memory_of(memory)) as make, handler_of(driver) as handler:
        region = make.pages(3)
        data = content(region.length)
        source = BufferSource(data) if driver in ("native", "inline") else Data(data)
        handler.serve(region, source, mode=MISSING | WP)
        region.write(0, b"written")
        for name, (call, instead) in REFUSED.items():
            for page in range(3):
                with pytest.raises(ValueError, match=instead):
                    call(handler.uffd, region.start + page * make.page_size, make.page_size)
                print(name, page)
        expected = [PageState.DIRTY, PageState.ABSENT, PageState.ABSENT]
        assert states(handler, region) == expected
        assert region.read(make.page_size) == data[make.page_size :]
        # The same modes, or some of them, change nothing.
        handler.uffd.register(region, mode=MISSING)
        handler.uffd.register(region, mode=MISSING | WP)
        assert states(handler, region)[0] == PageState.DIRTY


@pytest.mark.crossing
@needs(WP_EVERYWHERE)
@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize("driver", DRIVERS)
def test_refused(driver: Driver, memory: str) -> None:
    run_child(refuses, driver, memory)


def preserve_is_not_fooled() -> None:
    """writeprotect() of the userfaultfd does not arm `preserve`: it would save nothing."""
    with contextlib.closing(memory_of("anon")) as make, handler_of("native") as handler:
        region = make.pages(2)
        region.fill(1)
        image = bytearray(region.length)
        handler.serve(region, None, mode=WP, preserve=image)
        with pytest.raises(ValueError, match=r"handler\.writeprotect"):
            handler.uffd.writeprotect(region)
        handler.writeprotect(region)
        region.write(0, b"new")
        assert image[: region.page_size] == b"\1" * region.page_size


@needs(WP_EVERYWHERE)
def test_preserve_is_not_fooled() -> None:
    run_child(preserve_is_not_fooled)


def is_allowed_elsewhere(make: Memory) -> None:
    with handler_of("native") as handler:
        served, other = make.pages(1), make.pages(2)
        data = Pages(1, make.page_size)
        handler.serve(served, BufferSource(data.all), mode=MISSING | WP)
        uffd = handler.uffd
        uffd.register(other, mode=MISSING | WP)
        uffd.fill_zero(other)
        uffd.writeprotect(other)
        uffd.unregister(other)
        handler.unserve(served)
        uffd.register(served, mode=WP)
        uffd.writeprotect(served)
        uffd.writeprotect(served, mode=WriteprotectMode(0))
        uffd.unregister(served)
        handler.stop()
        uffd.register(other)


def allowed_elsewhere(memory: str) -> None:
    """Ranges that the handler does not serve, or no longer serves, belong to its user."""
    with contextlib.closing(memory_of(memory)) as make:
        is_allowed_elsewhere(make)


@needs(WP_EVERYWHERE)
@pytest.mark.parametrize("memory", memory_params("anon", "shmem", "hugetlb"))
def test_allowed_elsewhere(memory: str) -> None:
    run_child(allowed_elsewhere, memory)


def fills_beside(driver: Driver, memory: str) -> None:
    """Filling is not refused: the page table shows it."""
    with contextlib.closing(memory_of(memory)) as make, handler_of(driver) as handler:
        region = make.pages(4)
        data = content(region.length)
        source = BufferSource(data) if driver in ("native", "inline") else Data(data)
        handler.serve(region, source)
        size, uffd = make.page_size, handler.uffd
        uffd.copy(region.start, data[:size])
        uffd.fill_copy(region.start + size, data[size : 2 * size]) if size == 4096 else None
        assert region.read() == data
        assert set(states(handler, region)) == {PageState.CLEAN}


@pytest.mark.crossing
@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize("driver", DRIVERS)
def test_fills_beside(driver: Driver, memory: str) -> None:
    run_child(fills_beside, driver, memory)
