"""Handlers under all operations at once, for a while, from a printed seed."""

from __future__ import annotations

import functools
import mmap
import os
import random
import threading
import time
from collections.abc import Callable

import pytest

from pyuffd import BufferSource, PageState, Region, RegisterMode
from tests._child import run_child
from tests._memory import memory_params
from tests.kernel._serving import (
    Driver,
    both_drivers,
    content,
    is_lost,
    run_threads,
    serving,
)

pytestmark = pytest.mark.stress

SECONDS = 4.0
BUDGET_S = 60.0
SEED = int(os.environ.get("PYUFFD_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP


def until(stop_at: float, work: Callable[[], object]) -> None:
    while time.monotonic() < stop_at:
        work()


def everything(driver: Driver, name: str, seed: int) -> None:
    """Read, write, drop, populate, protect and look at the same pages from many threads."""
    print("seed", seed)
    prefetch = 3 * (2 << 20 if name.startswith("hugetlb") else 4096)
    with serving(driver, name, prefetch=prefetch) as (handler, memory):
        pages = 6 if memory.is_hugetlb else 256
        region = memory.pages(pages)
        size, data = memory.page_size, content(region.length, seed)
        handler.serve(region, BufferSource(data), mode=MISSING | WP)
        handler.start()
        stop_at = time.monotonic() + SECONDS

        def reader(chance: random.Random) -> None:
            at = chance.randrange(pages) * size
            found = region.read(at + 1024, 64)
            assert found in (data[at + 1024 :][:64], bytes(64)), hex(at)

        def writer(chance: random.Random) -> None:
            region.write(chance.randrange(pages) * size + chance.randrange(512), b"w")

        def dropper(chance: random.Random) -> None:
            region.punch_hole(chance.randrange(pages) * size, size)
            time.sleep(chance.random() / 1000)  # so that there is a page to drop

        def populater(chance: random.Random) -> None:
            first = chance.randrange(pages)
            handler.populate(region, first * size, (pages - first) * size)

        def protector(_: random.Random) -> None:
            handler.writeprotect(region)

        def looker(_: random.Random) -> None:
            stats = handler.stats()
            assert stats.failed == stats.unserved == 0
            assert len(handler.page_states(region)) == pages
            handler.recent_faults()

        roles = [reader] * 4 + [writer] * 3 + [dropper, populater, protector, looker]
        run_threads(
            *(
                functools.partial(until, stop_at, functools.partial(role, random.Random(seed + i)))
                for i, role in enumerate(roles)
            )
        )
        handler.stop()
        stats = handler.stats()
        assert sum(stats.faults.values()) > 0
        assert {kind: latency.count for kind, latency in stats.latency.items()} == stats.faults


@both_drivers
@pytest.mark.parametrize("name", memory_params())
def test_everything_at_once(driver: Driver, name: str) -> None:
    run_child(everything, driver, name, SEED, budget_s=BUDGET_S)


def populate_against_writers(driver: Driver, name: str, seed: int) -> None:
    """populate() in one thread, while others write to the pages that it has just filled."""
    print("seed", seed)
    until(time.monotonic() + SECONDS, functools.partial(populate_once, driver, name, seed))


def populate_once(driver: Driver, name: str, seed: int) -> None:
    with serving(driver, name) as (handler, memory):
        pages = 6 if memory.is_hugetlb else 1024
        region = memory.pages(pages)
        size, data = memory.page_size, content(region.length, seed)
        handler.serve(region, BufferSource(data), mode=MISSING | WP)
        handler.start()

        def write(order: list[int]) -> None:
            for page in order:
                region.write(page * size, b"W")
                if not memory.shared and page % 3 == 0:
                    region.madvise(mmap.MADV_DONTNEED, page * size, size)
                    region.read(page * size, 1)

        orders = [list(range(pages)), list(range(pages))[::-1], list(range(pages // 2, pages))]
        run_threads(
            functools.partial(handler.populate, region),
            *(functools.partial(write, order) for order in orders),
        )
        assert PageState.ABSENT not in handler.page_states(region)


@both_drivers
@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb"))
def test_populate_against_writers(driver: Driver, name: str) -> None:
    run_child(populate_against_writers, driver, name, SEED, budget_s=BUDGET_S)


def regions_come_and_go(driver: Driver, seed: int) -> None:
    """Threads serve, read, and unserve or close regions of their own on one userfaultfd."""
    print("seed", seed)
    with serving(driver, "anon", prefetch=16 << 10) as (handler, _):
        handler.start()
        stop_at = time.monotonic() + SECONDS

        def work(chance: random.Random) -> None:
            pages = chance.randrange(1, 20)
            with Region.anonymous(pages * 4096) as region:
                data = content(region.length, chance.randrange(100))
                handler.serve(region, BufferSource(data))
                if chance.random() < 0.5:
                    handler.populate(region)
                assert region.read() == data
                if chance.random() < 0.5:
                    handler.unserve(region)

        run_threads(
            *(
                functools.partial(until, stop_at, functools.partial(work, random.Random(seed + i)))
                for i in range(6)
            )
        )
        assert "0 ranges" in repr(handler)
        assert handler.stats().failed == 0


@both_drivers
def test_regions_come_and_go(driver: Driver) -> None:
    run_child(regions_come_and_go, driver, SEED, budget_s=BUDGET_S)


def stop_while_faulting(name: str, seed: int) -> None:
    """stop() at any moment: a thread reads the content, or the kernel says EFAULT."""
    print("seed", seed)
    chance = random.Random(seed)
    until(time.monotonic() + SECONDS, functools.partial(stop_once, name, chance))


def stop_once(name: str, chance: random.Random) -> None:
    with serving("native", name) as (handler, memory):
        pages = 4 if memory.is_hugetlb else 64
        region = memory.pages(pages)
        size, data = memory.page_size, content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        target = chance.randrange(pages)
        begun = threading.Event()

        def touch(first: int) -> None:
            for page in range(first, pages, 2):
                if not is_lost(region, page * size):
                    assert region.read(page * size, 64) == data[page * size :][:64], page
                if page >= target:
                    begun.set()
            begun.set()

        def stop(drain: bool) -> None:
            begun.wait()
            handler.stop(drain=drain)

        run_threads(
            functools.partial(touch, 0),
            functools.partial(touch, 1),
            functools.partial(stop, chance.random() < 0.5),
        )
        assert "stopped" in repr(handler)


@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb"))
def test_stop_while_faulting(name: str) -> None:
    run_child(stop_while_faulting, name, SEED, budget_s=BUDGET_S)
