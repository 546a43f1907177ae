"""Handler: many threads, many regions, and Python code that faults while it holds the GIL."""

from __future__ import annotations

import contextlib
import functools
import struct
import sys
import threading

from pyuffd import BufferSource, Region, RegisterMode, ZeroSource
from tests._memory import PAGE, memory_of
from tests.kernel._serving import (
    Driver,
    content,
    everywhere,
    handler_of,
    run_threads,
    serving,
    states,
    wait_for_stalled,
    with_both_drivers,
)

THREADS = 8


def one_page(driver: Driver, name: str) -> None:
    """Threads fault on one page at once: it is filled once, and all see all of it."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(2)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()

        def read() -> None:
            assert region.read(0, memory.page_size) == data[: memory.page_size]

        run_threads(*[read] * THREADS)
        assert handler.stats().faults == {"missing": 1, "wp": 0, "minor": 0}
        assert handler.stats().filled_pages == 1


test_threads_on_one_page = everywhere(one_page, "anon", "shmem", "hugetlb")


def waiting_together(name: str) -> None:
    """Their messages are queued when the handler starts: one page, one fill."""
    with serving("native", name) as (handler, memory):
        region = memory.pages(2)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        read: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: read.append(region.read(9, 9))) for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        wait_for_stalled(handler.uffd, THREADS)
        handler.start()
        for thread in threads:
            thread.join()
        assert read == [data[9:18]] * THREADS
        stats = handler.stats()
        assert stats.faults == {"missing": 1, "wp": 0, "minor": 0}
        # start() wakes all waiting threads: one that faults again later finds the page.
        assert stats.filled_pages == 1
        assert stats.already_present < THREADS


def waiting_together_each(driver: Driver, name: str) -> None:
    assert driver == "native"
    waiting_together(name)


test_queued_faults_on_one_page = everywhere(
    waiting_together_each, "anon", "shmem", "hugetlb", drivers=("native",)
)


def many_pages(driver: Driver, name: str) -> None:
    """Every thread has pages of its own, between those of the others."""
    with serving(driver, name) as (handler, memory):
        count = 8 if memory.is_hugetlb else 512
        region = memory.pages(count)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()

        def read(first: int) -> None:
            for page in range(first, count, THREADS):
                at = page * memory.page_size
                assert region.read(at, 64) == data[at : at + 64]

        run_threads(*(functools.partial(read, first) for first in range(THREADS)))
        assert handler.stats().faults == {"missing": count, "wp": 0, "minor": 0}
        assert handler.stats().filled_pages == count
        assert region.read() == data


test_threads_on_many_pages = everywhere(many_pages, "anon", "shmem", "hugetlb")


def writers(driver: Driver, name: str) -> None:
    """Threads write to the same protected pages: each page becomes dirty once."""
    with serving(driver, name) as (handler, memory):
        count = 4 if memory.is_hugetlb else 128
        region = memory.pages(count)
        data = content(region.length)
        handler.serve(region, BufferSource(data), mode=RegisterMode.MISSING | RegisterMode.WP)
        handler.start()

        def write(thread: int) -> None:
            for page in range(count):
                region.write(page * memory.page_size + thread, bytes([thread]))

        run_threads(*(functools.partial(write, thread) for thread in range(THREADS)))
        assert {state.name for state in states(handler, region)} == {"DIRTY"}
        for page in range(count):
            at = page * memory.page_size
            assert region.read(at, 64) == bytes(range(THREADS)) + data[at + THREADS : at + 64]
        counted = handler.stats().faults
        assert counted["missing"] == count
        assert counted["wp"] >= count


test_threads_write_to_protected_pages = everywhere(writers, "anon", "shmem", "hugetlb")


def page_sizes(driver: Driver) -> None:
    """Regions of every memory type on one userfaultfd, each filled by its own page size."""
    names = ("anon", "hugetlb", "shmem", "hugetlb-private", "shmem-private")
    memories = [memory_of(name) for name in names]
    with handler_of(driver) as handler:
        regions = [memory.pages(2) for memory in memories]
        data = [content(region.length, seed) for seed, region in enumerate(regions)]
        for region, bytes_ in zip(regions, data, strict=True):
            handler.serve(region, BufferSource(bytes_))
        handler.start()
        for region, bytes_ in zip(regions, data, strict=True):
            assert region.read(region.page_size + 5, 5) == bytes_[region.page_size + 5 :][:5]
            assert [state.name for state in states(handler, region)] == ["ABSENT", "CLEAN"]
        assert [region.read() for region in regions] == data
        assert handler.stats().faults["missing"] == 10
    for memory in memories:
        memory.close()


test_page_sizes_on_one_userfaultfd = with_both_drivers(page_sizes)


def thousands(driver: Driver) -> None:
    """2,000 regions of one page on one descriptor, served, read, and some taken out again."""
    count = 2000
    with serving(driver, "anon") as (handler, _):
        regions = [Region.anonymous(PAGE) for _ in range(count)]
        data = content(count * 16)
        for index, region in enumerate(regions):
            handler.serve(region, BufferSource(data[16 * index :][:16].ljust(PAGE, b"\1")))
            if index == count // 2:
                handler.start()
        order = sorted(range(count), key=lambda index: index * 7919 % count)
        for index in order:
            assert regions[index].read(0, 17) == data[16 * index :][:16] + b"\1"
        assert handler.stats().faults["missing"] == count
        for index in order[::2]:
            handler.unserve(regions[index])
        assert regions[order[1]].read(0, 16) == data[16 * order[1] :][:16]
        handler.stop()
        for region in regions:
            region.close()


test_thousands_of_regions = with_both_drivers(thousands)


def coming_and_going(driver: Driver) -> None:
    """Verbs find their part while other threads serve and unserve other regions."""
    interval = sys.getswitchinterval()
    with serving(driver, "anon") as (handler, memory), contextlib.ExitStack() as stack:
        region = memory.pages(2)
        handler.serve(region, ZeroSource())
        for _ in range(100):
            handler.serve(stack.enter_context(Region.anonymous(PAGE)), ZeroSource())
        guests = [stack.enter_context(Region.anonymous(PAGE)) for _ in range(2)]
        done = threading.Event()

        def come_and_go() -> None:
            try:
                for _ in range(40):
                    for guest in guests:
                        handler.serve(guest, ZeroSource(), present="drop")
                    for guest in guests:
                        handler.unserve(guest)
            finally:
                done.set()

        def look() -> None:
            while not done.is_set():
                assert len(handler.page_states(region[PAGE:])) == 1

        sys.setswitchinterval(1e-6)
        try:
            run_threads(come_and_go, look, look)
        finally:
            sys.setswitchinterval(interval)
        handler.stop()


test_verbs_while_others_come_and_go = with_both_drivers(coming_and_going)


# The purpose of the library: each of these holds the GIL while it faults.


def holding_the_gil(driver: Driver, name: str) -> None:
    import numpy

    with serving(driver, name) as (handler, memory):
        size = memory.page_size
        region = memory.pages(8)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        view = region.memoryview()
        assert view[3] == data[3]
        assert view[size + 1 : size + 9].tobytes() == data[size + 1 :][:8]
        assert struct.unpack_from("<Q", view, 2 * size) == struct.unpack_from("<Q", data, 2 * size)
        array = numpy.asarray(region)
        page = array[3 * size : 4 * size]
        assert int(page.sum(dtype=numpy.uint64)) == sum(data[3 * size : 4 * size])
        view[4 * size] = 0xFF
        array[5 * size + 1] = 0xFE
        expected = bytearray(data)
        expected[4 * size], expected[5 * size + 1] = 0xFF, 0xFE
        assert view[6 * size : 7 * size] == data[6 * size : 7 * size]
        assert handler.stats().faults["missing"] == 7
        assert bytes(view) == expected
        assert handler.stats().faults["missing"] == 8
        del view, array, page


test_access_that_holds_the_gil = everywhere(holding_the_gil)


def holding_the_gil_and_writing(driver: Driver, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        region.fill(1)
        handler.serve(region, None, mode=RegisterMode.WP)
        handler.writeprotect(region)
        handler.start()
        view = region.memoryview()
        view[memory.page_size] = 2
        assert [state.name for state in states(handler, region)] == ["CLEAN", "DIRTY", "CLEAN"]
        assert view[memory.page_size] == 2
        del view


test_write_that_holds_the_gil = everywhere(holding_the_gil_and_writing, "anon", "shmem", "hugetlb")


def python_threads_go_on(driver: Driver) -> None:
    """Threads that fault holding the GIL and threads that do not, all at once."""
    with serving(driver, "anon") as (handler, memory):
        region = memory.pages(256)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        zeros = memory.pages(256)
        handler.serve(zeros, ZeroSource())
        handler.start()
        view = region.memoryview()

        def index() -> None:
            for page in range(0, 256, 2):
                assert view[page * PAGE] == data[page * PAGE]

        def read() -> None:
            for page in range(1, 256, 2):
                assert region.read(page * PAGE, 1) == data[page * PAGE : page * PAGE + 1]

        def touch() -> None:
            zeros.touch(write=True)

        run_threads(index, read, touch, index, read, touch)
        assert handler.stats().faults["missing"] == 512
        view.release()


test_python_threads_go_on = with_both_drivers(python_threads_go_on)
