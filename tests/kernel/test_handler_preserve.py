"""Handler(preserve=...): a snapshot of one instant, while threads write to the memory."""

from __future__ import annotations

import functools
import threading

import pytest

from pyuffd import Feature, HandlerError, PageState, RegisterMode, lowlevel
from tests.kernel._serving import (
    Driver,
    content,
    everywhere,
    run_threads,
    serving,
    states,
    wait_for_stalled,
    wait_until,
    with_both_drivers,
)

WP = RegisterMode.WP
MARKERS = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
WRITERS = 4
STRIDE = 61  # bytes between two writes of a round: each page is written many times


def snapshot(driver: Driver, name: str) -> None:
    """Threads write everywhere after the instant; the copy has every byte from before."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(4 if memory.is_hugetlb else 64)
        before = content(region.length)
        region.write(0, before)
        kept = bytearray(b"?" * region.length)
        handler.serve(region, None, mode=WP, preserve=kept)
        protected = threading.Event()
        rounds = threading.Barrier(WRITERS + 1)

        def write(first: int) -> None:
            protected.wait()
            for page in range(first, region.length // memory.page_size, WRITERS):
                for at in range(0, 4096, STRIDE):
                    region.write(page * memory.page_size + at, b"\xaa\x55")
                if page == first:
                    rounds.wait()  # saving begins after every writer has written
            region.fill(0x11, first * memory.page_size, memory.page_size)

        def save() -> None:
            handler.writeprotect(region)
            handler.start()
            protected.set()
            rounds.wait()
            handler.preserve(region)

        run_threads(save, *(functools.partial(write, first) for first in range(WRITERS)))
        assert kept == before
        assert set(states(handler, region)) <= {PageState.DIRTY, PageState.SAVED}
        assert region.read(0, memory.page_size) == b"\x11" * memory.page_size
        pages = region.length // memory.page_size
        wait_until(lambda: handler.stats().preserved_pages >= pages, "pages are counted")
        assert handler.stats().preserved_pages == pages
        assert handler.preserve(region) == 0


test_snapshot_of_one_instant = everywhere(snapshot)


def writers_wait(name: str) -> None:
    """Writes between writeprotect() and start() wait, and are not in the copy."""
    with serving("native", name) as (handler, memory):
        region = memory.pages(3)
        region.fill(1)
        kept = bytearray(region.length)
        handler.serve(region, None, mode=WP, preserve=kept)
        handler.writeprotect(region)
        threads = [
            threading.Thread(target=functools.partial(region.write, at, b"late"))
            for at in (0, 2 * memory.page_size)
        ]
        for thread in threads:
            thread.start()
        wait_for_stalled(handler.uffd, 2)
        handler.start()
        for thread in threads:
            thread.join()
        assert handler.preserve(region) == memory.page_size
        assert kept == b"\1" * region.length
        assert region.read(2 * memory.page_size, 5) == b"late\1"


def writers_wait_each(driver: Driver, name: str) -> None:
    assert driver == "native"
    writers_wait(name)


test_writers_wait_for_start = everywhere(
    writers_wait_each, "anon", "shmem", "hugetlb", drivers=("native",)
)


def holes(driver: Driver, name: str) -> None:
    """Pages that were never present are zeros in the copy."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(4)
        region.write(0, b"page 0")
        kept = bytearray(b"?" * region.length)
        handler.serve(region, None, mode=WP, preserve=kept)
        handler.writeprotect(region)
        handler.start()
        region.write(memory.page_size, b"new")
        region.write(0, b"PAGE")
        handler.preserve(region)
        assert kept == b"page 0".ljust(region.length, b"\0")
        assert region.read(0, 6) == b"PAGE 0"


test_holes = everywhere(holes)


def parts(driver: Driver, name: str) -> None:
    """preserve() accepts parts; stop() saves the rest; the copy can be made again."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(4)
        size, data = memory.page_size, content(region.length)
        region.write(0, data)
        kept = bytearray(region.length)
        handler.serve(region, None, mode=WP, preserve=kept)
        handler.writeprotect(region)
        handler.start()
        assert handler.preserve(region, size, 2 * size) == 2 * size
        assert kept == bytes(size) + data[size : 3 * size] + bytes(size)
        saved, clean = PageState.SAVED, PageState.CLEAN
        assert states(handler, region) == [clean, saved, saved, clean]
        region.write(size, b"free")  # not saved again: it belongs to a later instant
        assert states(handler, region) == [clean, PageState.DIRTY, saved, clean]
        assert kept[size : size + 5] == data[size : size + 5]
        then = [PageState(state) for state in handler.writeprotect(region)]
        assert then == [clean, PageState.DIRTY, saved, clean]
        assert states(handler, region) == [clean] * 4
        region.write(size, b"FREE")
        assert bytes(kept[size : size + 5]) == b"free" + data[size + 4 : size + 5]
        handler.stop()
        expected = data[:size] + b"free" + data[size + 4 :]
        assert kept == expected
        kept.append(0)  # it has no other references


test_parts_and_stop = everywhere(parts, "anon", "shmem", "hugetlb")


def unprotected(driver: Driver, name: str) -> None:
    """preserve(keep_protected=False) lets later writes pass, and the states say DIRTY."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        region.fill(1)
        kept = bytearray(region.length)
        handler.serve(region, None, mode=WP, preserve=kept)
        handler.writeprotect(region)
        handler.start()
        size = memory.page_size
        assert handler.preserve(region, 0, 2 * size, keep_protected=False) == 2 * size
        assert states(handler, region) == [PageState.DIRTY] * 2 + [PageState.CLEAN]
        region.write(size, b"free")
        assert handler.stats().faults["wp"] == 0
        assert kept == b"\1" * (2 * size) + bytes(size)


test_unprotect = everywhere(unprotected)


def never_protected(driver: Driver, name: str) -> None:
    """Before writeprotect() the pages are not of one instant."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(2)
        region.fill(1)
        kept = bytearray(b"?" * region.length)
        handler.serve(region, None, mode=WP, preserve=kept)
        handler.start()
        assert states(handler, region) == [PageState.DIRTY] * 2
        region.write(0, b"new")
        with pytest.raises(ValueError, match="writeprotect"):
            handler.preserve(region)
        assert kept == b"?" * region.length
        handler.writeprotect(region)
        region.write(0, b"NEW")
        handler.preserve(region)
        assert kept[:4] == b"new\1"


test_never_protected = everywhere(never_protected, "anon", "shmem", "hugetlb")


def taken_off(driver: Driver) -> None:
    """If other code lifts the protection before the page is saved, stop() raises."""
    with serving(driver, "anon", MARKERS) as (handler, memory):
        region = memory.pages(2)
        region.fill(1)
        kept = bytearray(region.length)
        handler.serve(region, None, mode=WP, preserve=kept)
        handler.writeprotect(region)
        handler.start()
        lowlevel.writeprotect(handler.uffd.fileno(), region.start, memory.page_size, 0)
        region.write(0, b"new")
        handler.preserve(region)
        with pytest.raises(HandlerError):
            handler.stop()


test_protection_taken_off = with_both_drivers(taken_off)
