"""The states that page_states() and writeprotect() return are true."""

from __future__ import annotations

import mmap
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    Handler,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
    lowlevel,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._serving import content, run_threads, states
from tests.kernel._verbs import (
    ABSENT,
    CLEAN,
    DIRTY,
    MISSING,
    REMOVED,
    SAVED,
    TRACKING,
    WP,
    Driver,
)
from tests.process._pitfalls import LAYOUT

DRIVERS: tuple[Driver, ...] = get_args(Driver)
WRITE_S = 1.0


@contextmanager
def tracking(
    driver: Driver,
    name: str,
    pages: int,
    features: Feature = Feature(0),  # noqa: B008 - an immutable flag
) -> Iterator[tuple[Handler, Region]]:
    memory = memory_of(name)
    features |= TRACKING
    if driver == "inline":
        features |= Feature.SIGBUS
    with (
        Userfaultfd(features=features) as uffd,
        memory.pages(pages) as region,
        Handler(uffd, driver=driver) as handler,
    ):
        yield handler, region


def pages_written(told: bytes) -> list[int]:
    return [page for page, state in enumerate(told) if state not in (CLEAN, SAVED, ABSENT)]


def rounds(driver: Driver, name: str, events: bool) -> None:
    """Rounds beside writers lose no write: a copy of the reported pages equals the memory."""
    features = LAYOUT if events else Feature(0)
    pages = 4 if name.startswith("hugetlb") else 64
    with tracking(driver, name, pages, features) as (handler, region):
        size = region.page_size
        region.fill(0)
        handler.serve(region, None, mode=WP)
        handler.start()
        handler.writeprotect(region)
        copy = [bytes(64)] * pages
        over = threading.Event()

        def take() -> None:
            for page in pages_written(handler.writeprotect(region)):
                copy[page] = region.read(page * size, 64)

        def write(seed: int) -> None:
            chance = random.Random(seed)
            until = time.monotonic() + WRITE_S
            number = 0
            while time.monotonic() < until:
                number += 1
                at = chance.randrange(pages) * size + 8 * seed
                region.write(at, number.to_bytes(8, "little"))
            over.set()

        def follow() -> None:
            while not over.is_set():
                take()

        run_threads(follow, lambda: write(1), lambda: write(2))
        take()
        assert copy == [region.read(page * size, 64) for page in range(pages)]
        assert handler.writeprotect(region) == bytes([CLEAN]) * pages


@pytest.mark.crossing
@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb"))
@pytest.mark.parametrize(
    ("driver", "events"), [*((driver, False) for driver in DRIVERS), ("native", True)]
)
@needs(TRACKING | LAYOUT)
def test_rounds_beside_writers(driver: Driver, events: bool, name: str) -> None:
    run_child(rounds, driver, name, events)


def never_protected(driver: Driver, name: str) -> None:
    """Served for WP and never protected: unknown writes, so every page is DIRTY."""
    with tracking(driver, name, 2) as (handler, region):
        region.fill(1)
        handler.serve(region, None, mode=WP)
        handler.start()
        assert states(handler, region) == [DIRTY] * 2
        region.write(0, b"changed")
        assert list(handler.writeprotect(region)) == [DIRTY] * 2
        assert states(handler, region) == [CLEAN] * 2
        region.write(0, b"changed")
        assert states(handler, region) == [DIRTY, CLEAN]
        # Lifted beside the handler.
        lowlevel.writeprotect(handler.uffd.fileno(), region.start, region.length, 0)
        assert states(handler, region) == [DIRTY] * 2
        assert list(handler.writeprotect(region)) == [DIRTY] * 2
        assert list(handler.writeprotect(region)) == [CLEAN] * 2


def parts(driver: Driver, name: str) -> None:
    """Only a part of a region is protected and reported."""
    with tracking(driver, name, 4) as (handler, region):
        size = region.page_size
        region.fill(1)
        handler.serve(region, None, mode=WP)
        handler.start()
        assert list(handler.writeprotect(region, size, 2 * size)) == [DIRTY] * 2
        assert states(handler, region) == [DIRTY, CLEAN, CLEAN, DIRTY]
        region.write(2 * size, b"new")
        assert list(handler.writeprotect(region, size)) == [CLEAN, DIRTY, DIRTY]
        for bad in ((1, size), (0, 5 * size), (-size, size)):
            with pytest.raises(ValueError):
                handler.writeprotect(region, *bad)


def arrive_protected(driver: Driver, name: str) -> None:
    """MISSING | WP: pages arrive clean and become dirty when written; absent ones stay so."""
    with tracking(driver, name, 4) as (handler, region):
        size = region.page_size
        handler.serve(region, ZeroSource(), mode=MISSING | WP)
        handler.start()
        region.touch(0, 2 * size)
        region.write(size, b"new")
        assert states(handler, region) == [CLEAN, DIRTY, ABSENT, ABSENT]
        assert list(handler.writeprotect(region)) == [CLEAN, DIRTY, ABSENT, ABSENT]
        region.touch(2 * size, size)
        region.write(3 * size, b"new")
        assert states(handler, region) == [CLEAN, CLEAN, CLEAN, DIRTY]


def filled_beside(driver: Driver, name: str) -> None:
    """Pages that other code fills are present, protected or not."""
    with tracking(driver, name, 5) as (handler, region):
        size = region.page_size
        handler.serve(region, ZeroSource(), mode=MISSING | WP)
        fd = handler.uffd.fileno()
        source = mmap.mmap(-1, size)
        source.write(b"beside")
        address = BufferSource(source).address
        lowlevel.copy(fd, region.start, address, size, 0)
        lowlevel.copy(fd, region.start + size, address, size, 2)
        handler.start()
        assert states(handler, region) == [DIRTY, CLEAN, ABSENT, ABSENT, ABSENT]
        assert list(handler.writeprotect(region)) == [DIRTY, CLEAN, ABSENT, ABSENT, ABSENT]
        assert states(handler, region) == [CLEAN, CLEAN, ABSENT, ABSENT, ABSENT]
        lowlevel.copy(fd, region.start + 2 * size, address, size, 0)
        handler.populate(region)
        assert states(handler, region) == [CLEAN, CLEAN, DIRTY, CLEAN, CLEAN]
        assert region.read(2 * size, 6) == b"beside"


CHECKS = {
    check.__name__: check for check in (never_protected, parts, arrive_protected, filled_beside)
}


def run_all(driver: Driver, name: str) -> None:
    for check in CHECKS.values():
        check(driver, name)


@pytest.mark.crossing
@pytest.mark.parametrize("name", memory_params())
@pytest.mark.parametrize("driver", DRIVERS)
@needs(TRACKING)
def test_states_are_true(driver: Driver, name: str) -> None:
    run_child(run_all, driver, name, budget_s=20)


def freed_and_written(driver: Driver, mode: int, armed: bool) -> None:
    """MADV_FREE sends REMOVE; a page that is written again is kept, with its data."""
    with tracking(driver, "anon", 8, Feature.EVENT_REMOVE) as (handler, region):
        size = region.page_size
        if mode == WP:
            region.fill(1)
            handler.serve(region, None, mode=WP)
        else:
            handler.serve(region, BufferSource(content(region.length)), mode=RegisterMode(mode))
        handler.start()
        region.touch(0, 4 * size, write=True)
        if armed:
            handler.writeprotect(region)
        region.madvise(mmap.MADV_FREE, 0, 4 * size)
        region.write(3 * size, b"written")
        assert states(handler, region)[3] == (DIRTY if mode & WP else CLEAN)
        region.madvise(mmap.MADV_DONTNEED, size, size)
        assert states(handler, region)[1] == REMOVED
        assert region.read(size, size) == bytes(size)
        assert region.read(3 * size, 7) == b"written"


@pytest.mark.parametrize(
    ("mode", "armed"),
    [(MISSING, False), *((mode, armed) for mode in (MISSING | WP, WP) for armed in (True, False))],
)
@needs(TRACKING | Feature.EVENT_REMOVE)
def test_freed_and_written_again(mode: RegisterMode, armed: bool) -> None:
    run_child(freed_and_written, "native", int(mode), armed)


def not_loaded(name: str, events: bool) -> None:
    """MADV_DONTNEED of a shared page that was never loaded.

    Linux keeps the content of shared memory; a page that is not loaded has none. With
    EVENT_REMOVE the handler gets the same event as for MADV_REMOVE, and makes the page zeros.
    """
    with tracking("native", name, 3, Feature.EVENT_REMOVE if events else Feature(0)) as at:
        handler, region = at
        size, data = region.page_size, content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        region.touch(0, size)
        region.madvise(mmap.MADV_DONTNEED, 0, 2 * size)
        kept = memory_of(name).shared
        assert region.read(0, size) == (data[:size] if kept else bytes(size))
        assert region.read(size, size) == (bytes(size) if events else data[size : 2 * size])
        assert region.read(2 * size, size) == data[2 * size :]


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb"))
@needs(Feature.EVENT_REMOVE)
def test_dontneed_of_a_page_not_loaded(name: str, events: bool) -> None:
    run_child(not_loaded, name, events)


@pytest.mark.parametrize("mode", [WP, MISSING | WP])
@needs(Feature.WP_ASYNC)
def test_asynchronous_protection_is_refused(mode: RegisterMode) -> None:
    run_child(refused, int(mode))


def refused(mode: int) -> None:
    with (
        Userfaultfd(features=TRACKING | Feature.WP_ASYNC) as uffd,
        Region.anonymous(8192) as region,
        Handler(uffd) as handler,
    ):
        source = ZeroSource() if mode & MISSING else None
        with pytest.raises(ValueError, match=r"Pagemap\.scan"):
            handler.serve(region, source, mode=RegisterMode(mode))
        handler.serve(region, ZeroSource())
        assert region.read(0, 1) == b"\0"
