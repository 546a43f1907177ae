"""Handler.stats() and recent_faults(): what is counted, and what is remembered."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    PagefaultFlag,
    PageState,
    RecentFault,
    RegisterMode,
    ZeroSource,
)
from tests._barriers import Point, holding
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import (
    Driver,
    content,
    everywhere,
    handler_of,
    run_threads,
    serving,
    states,
    wait_until,
    with_both_drivers,
)

# The size of each CPU's ring.
RING = 64
# The longest time that a reader waits for a fault that is being counted.
AWAIT_S = 0.1


def exact_counts(driver: Driver, name: str) -> None:
    """Missing and write-protect faults, populated and present pages, after the handler stopped."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(5)
        data, size = content(region.length), memory.page_size
        handler.serve(region, BufferSource(data), mode=RegisterMode.MISSING | RegisterMode.WP)
        assert handler.populate(region, 3 * size, size) == size
        handler.start()
        for page in range(3):
            assert region.read(page * size, 1) == data[page * size : page * size + 1]
        region.write(0, b"dirty")
        region.write(3 * size, b"dirty")
        handler.stop()
        stats = handler.stats()
    assert stats.faults == {"missing": 3, "wp": 2, "minor": 0}
    assert {kind: latency.count for kind, latency in stats.latency.items()} == stats.faults
    assert stats.messages == (5 if driver == "native" else 0)
    assert (stats.filled_pages, stats.prefetched_pages, stats.already_present) == (4, 0, 0)
    assert stats.poisoned_pages == 1  # page 4, by stop(): no thread touched it
    nothing = ("preserved_pages", "deferred", "retried", "failed", "layout_changed", "unserved")
    assert {getattr(stats, name) for name in (*nothing, "layout_events")} == {0}


test_exact_counts = everywhere(exact_counts, "anon", "shmem", "hugetlb")


def woken() -> None:
    """The faulting thread continues before its fault is counted; readers wait for the count."""
    with serving("native", "anon") as (handler, memory):
        region = memory.pages(2)
        handler.serve(region, ZeroSource())
        handler.start()
        with holding(Point.FAULT_WOKEN) as point:
            region.touch(0, 1)
            point.wait()
            began = time.monotonic()
            assert handler.stats().faults["missing"] == 0
            assert time.monotonic() - began >= AWAIT_S
            point.release()
            assert handler.stats().faults["missing"] == 1
        assert states(handler, region) == [PageState.CLEAN, PageState.ABSENT]


@pytest.mark.parametrize("check", [pytest.param(woken, id="pitfall.16.counted-when-it-is-seen")])
def test_counted_before_it_is_read(check: Callable[[], None]) -> None:
    run_child(check)


def latencies(driver: Driver) -> None:
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(100)
        handler.serve(region, ZeroSource())
        handler.start()
        began = time.monotonic_ns()
        region.touch()
        histogram = handler.stats().latency["missing"]
        assert histogram.count == 100
        bounds = [bound for bound, _ in histogram.buckets]
        assert bounds == sorted(set(bounds))
        assert 0 < histogram.percentile(50) <= histogram.percentile(99) <= bounds[-1]
        assert histogram.percentile(100) == bounds[-1]
        recent = handler.recent_faults()
        assert max(fault.latency_ns for fault in recent) < bounds[-1]
        # A thread that was woken may fault again before the clock is read: the sum proves nothing.
        assert max(fault.latency_ns for fault in recent) <= time.monotonic_ns() - began


test_latencies = with_both_drivers(latencies)


def recent(driver: Driver, name: str) -> None:
    """Newest first, with time, page, kind of access and latency."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        size = memory.page_size
        handler.serve(region, ZeroSource(), mode=RegisterMode.MISSING | RegisterMode.WP)
        handler.start()
        assert handler.recent_faults() == []
        before = time.monotonic_ns()
        region.touch(2 * size, 1)
        region.write(0, b"w")
        running = handler.recent_faults()
        after = time.monotonic_ns()

        def check(found: list[RecentFault]) -> None:
            assert [fault.address for fault in found] == [
                region_start,
                region_start,
                region_start + 2 * size,
            ]
            times = [fault.time_ns for fault in found]
            assert times == sorted(times, reverse=True)
            assert all(before <= fault.time_ns <= after for fault in found)
            assert all(0 < fault.latency_ns <= after - before for fault in found)
            write, wp = PagefaultFlag.WRITE, PagefaultFlag.WP
            assert [fault.flags for fault in found] == [write | wp, write, PagefaultFlag(0)]

        region_start = region.start
        check(running)
        handler.stop()
        check(handler.recent_faults())


test_recent_faults = everywhere(recent, "anon", "shmem", "hugetlb")


def ring(driver: Driver) -> None:
    """The latest are kept, at least 64 of them, each once."""
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(1000)
        handler.serve(region, ZeroSource())
        handler.start()
        region.touch()
        handler.stop()
        found = [(fault.address - region.start) // PAGE for fault in handler.recent_faults()]
        assert len(found) >= RING
        assert len(set(found)) == len(found)
        assert found[0] == 999
        assert found == sorted(found, reverse=True)


test_ring_of_recent_faults = with_both_drivers(ring)


def while_running(driver: Driver) -> None:
    """Readers in other threads neither delay the faults nor see torn entries."""
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(4096)
        handler.serve(region, ZeroSource())
        handler.start()
        done = threading.Event()

        def touch() -> None:
            try:
                region.touch()
            finally:
                done.set()

        def look() -> None:
            pages = range(region.start, region.start + region.length, PAGE)
            last = 0
            while not done.is_set():
                for fault in handler.recent_faults():
                    assert fault.address in pages
                    assert fault.time_ns > fault.latency_ns > 0
                count = handler.stats().faults["missing"]
                assert last <= count <= 4096
                last = count

        run_threads(touch, look)
        assert handler.stats().faults["missing"] == 4096


test_stats_while_running = with_both_drivers(while_running)


def thread_ids(driver: Driver) -> None:
    with serving(driver, "anon", Feature.THREAD_ID) as (handler, memory):
        region = memory.pages(4)
        handler.serve(region, ZeroSource())
        handler.start()
        ids = {}

        def touch(page: int) -> None:
            ids[region.start + page * PAGE] = threading.get_native_id()
            region.touch(page * PAGE, 1)

        run_threads(*(functools.partial(touch, page) for page in range(4)))
        handler.stop()
        assert {fault.address: fault.thread_id for fault in handler.recent_faults()} == ids
        assert len(set(ids.values())) == 4


test_thread_ids = with_both_drivers(thread_ids)


def no_thread_ids() -> None:
    with serving("native", "anon") as (handler, memory):
        region = memory.pages(1)
        handler.serve(region, ZeroSource())
        handler.start()
        region.touch()
        handler.stop()
        assert [fault.thread_id for fault in handler.recent_faults()] == [0]


def test_no_thread_ids_unless_asked_for() -> None:
    run_child(no_thread_ids)


def exact_addresses(driver: Driver, name: str) -> None:
    with serving(driver, name, Feature.EXACT_ADDRESS) as (handler, memory):
        region = memory.pages(2)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        offsets = [memory.page_size + 1234, 77]
        for offset in offsets:
            assert region.read(offset, 1) == data[offset : offset + 1]
        handler.stop()
        found = [fault.address - region.start for fault in reversed(handler.recent_faults())]
        assert found == offsets


test_exact_addresses = everywhere(exact_addresses, "anon", "shmem", "hugetlb")


@pytest.mark.parametrize("driver", ["native", "inline"])
def test_stats_of_a_handler_that_never_started(driver: Driver) -> None:
    with handler_of(driver) as handler:
        stats = handler.stats()
        assert stats.faults == {"missing": 0, "wp": 0, "minor": 0}
        assert stats.latency["missing"].buckets == ()
        assert stats.latency["missing"].percentile(99) == 0
        assert handler.recent_faults() == []
    assert handler.stats() == stats


def preserved_and_minor(driver: Driver) -> None:
    with serving(driver, "shmem") as (handler, memory):
        region = memory.pages(3)
        region.fill(1)
        kept = bytearray(region.length)
        handler.serve(region, None, mode=RegisterMode.WP, preserve=kept)
        handler.writeprotect(region)
        handler.start()
        region.write(PAGE, b"x")
        assert handler.preserve(region) == 2 * PAGE
        wait_until(lambda: handler.stats().preserved_pages >= 3, "preserved pages are counted")
        assert handler.stats().preserved_pages == 3
        assert handler.stats().faults == {"missing": 0, "wp": 1, "minor": 0}


test_preserved_pages = with_both_drivers(preserved_and_minor)
