"""Handler(prefetch=...): what is filled around a fault, and what is not."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace

from pyuffd import BufferSource, FileSource, Handler, PageState, Region, RegisterMode
from tests._memory import PAGE
from tests.kernel._serving import (
    Driver,
    content,
    everywhere,
    serving,
    states,
    wait_until,
    with_both_drivers,
)

ABSENT, CLEAN = PageState.ABSENT, PageState.CLEAN


def present(handler: Handler, region: Region) -> set[int]:
    return {index for index, state in enumerate(states(handler, region)) if state is CLEAN}


def expect(handler: Handler, region: Region, pages: set[int], touched: int) -> None:
    """Check which pages are present after this many faults, and that all are counted."""
    wait_until(lambda: len(present(handler, region)) >= len(pages), "prefetching ends")
    assert present(handler, region) == pages
    assert sum(handler.stats().faults.values()) == touched
    wait_until(lambda: handler.stats().prefetched_pages >= len(pages) - touched, "pages counted")
    stats = handler.stats()
    assert (stats.filled_pages, stats.prefetched_pages) == (len(pages), len(pages) - touched)


def chunks(driver: Driver, name: str) -> None:
    """Half a page, one page, two pages, more than the region."""
    for half_pages, around in ((1, {5}), (2, {5}), (4, {4, 5}), (1000, set(range(6)))):
        prefetch = half_pages * (2 << 20 if name.startswith("hugetlb") else PAGE) // 2
        with serving(driver, name, prefetch=prefetch) as (handler, memory):
            region = memory.pages(6)
            data = content(region.length)
            handler.serve(region, BufferSource(data))
            handler.start()
            at = 5 * memory.page_size
            assert region.read(at, 8) == data[at : at + 8]
            expect(handler, region, around, 1)
            assert region.read() == data


test_chunks = everywhere(chunks, "anon", "shmem", "hugetlb")


def odd_chunk(driver: Driver) -> None:
    """A chunk that is no multiple of the page size still fills whole pages correctly."""
    for prefetch in (1, 100, PAGE - 1, PAGE + 1, 3 * PAGE + 5):
        with serving(driver, "anon", prefetch=prefetch) as (handler, memory):
            region = memory.pages(16)
            data = content(region.length)
            handler.serve(region, BufferSource(data))
            handler.start()
            region.touch(7 * PAGE, 1)
            region.touch(3 * PAGE, 1)
            assert {3, 7} <= present(handler, region)
            assert region.read() == data


test_odd_chunk = with_both_drivers(odd_chunk)


def readahead(driver: Driver) -> None:
    """Faults in sequence double what is filled ahead, up to eight chunks; a jump resets it."""
    with serving(driver, "anon", prefetch=4 * PAGE) as (handler, memory):
        region = memory.pages(200)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        pages: set[int] = set()
        steps = [(0, 4), (4, 12), (12, 28), (28, 60), (60, 92), (150, 152), (152, 160)]
        for touched, (page, end) in enumerate(steps, 1):
            assert region.read(page * PAGE, 8) == data[page * PAGE :][:8]
            pages |= set(range(148 if page == 150 else page, end))
            expect(handler, region, pages, touched)
        assert region.read() == data


test_sequential_readahead = with_both_drivers(readahead)


def whole_sequence(driver: Driver, name: str) -> None:
    """Reading in sequence causes few faults and fills each page once."""
    with serving(driver, name, prefetch=2 << 20) as (handler, memory):
        region = memory.make(16 << 20)
        pages = region.length // memory.page_size
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        region.touch()  # a read, which is a memcpy, may begin at the end
        wait_until(lambda: handler.stats().filled_pages == pages, "every page is filled once")
        assert region.read() == data
        # One for each span, which doubles; a reader beside the native driver catches up with
        # some of them, and then waits for another 2 MiB.
        most = 5 if driver == "inline" else 5 + (region.length >> 21)
        assert sum(handler.stats().faults.values()) <= min(most, pages)


test_sequential_read = everywhere(whole_sequence, "anon", "shmem", "hugetlb")


def neighbours(driver: Driver) -> None:
    """A chunk never crosses the end of its region, even if another region begins there."""
    with serving(driver, "anon", prefetch=1 << 40) as (handler, memory):
        whole = memory.pages(12)
        parts = [
            SimpleNamespace(start=whole.start + at * PAGE, length=4 * PAGE, page_size=PAGE)
            for at in (0, 4, 8)
        ]
        data = content(4 * PAGE)
        for part in parts:
            handler.serve(part, BufferSource(data))
        handler.start()
        assert whole.read(7 * PAGE, 8) == data[3 * PAGE :][:8]
        wait_until(lambda: handler.stats().prefetched_pages >= 3, "prefetching ends")
        assert [states(handler, part) for part in parts] == [
            [ABSENT] * 4,
            [CLEAN] * 4,
            [ABSENT] * 4,
        ]
        assert handler.stats().filled_pages == 4
        assert whole.read() == data * 3
        handler.stop()


test_never_beyond_the_region = with_both_drivers(neighbours)


def own_page_first(driver: Driver) -> None:
    """The fault's own page does not depend on its chunk: lost pages in it cause no failure."""
    with (
        serving(driver, "anon", prefetch=8 * PAGE) as (handler, memory),
        tempfile.TemporaryFile() as file,
    ):
        region = memory.pages(8)
        data = content(region.length)
        file.write(data)
        file.flush()
        with FileSource(file) as source:
            handler.serve(region, source)
        handler.start()
        file.truncate(4 * PAGE)
        assert region.read(2 * PAGE, PAGE) == data[2 * PAGE :][:PAGE]
        assert region.read(PAGE, PAGE) == data[PAGE:][:PAGE]
        assert states(handler, region)[4:] == [ABSENT] * 4
        assert region.read(0, 4 * PAGE) == data[: 4 * PAGE]
        stats = handler.stats()
        assert (stats.failed, stats.poisoned_pages) == (0, 0)


test_own_page_first = with_both_drivers(own_page_first)


def minor(driver: Driver, name: str) -> None:
    with serving(driver, name, prefetch=1 << 30) as (handler, memory):
        region = memory.pages(4)
        data = content(region.length)
        with region.alias() as alias:
            alias.write(0, data)
        handler.serve(region, None, mode=RegisterMode.MINOR)
        handler.start()
        region.touch(memory.page_size, 1)
        expect(handler, region, {0, 1, 2, 3}, 1)
        assert region.read() == data


test_minor = everywhere(minor, "shmem", "hugetlb")


def already_there(driver: Driver) -> None:
    """Pages that were populated, written or removed before are not changed."""
    with serving(driver, "anon", prefetch=1 << 30) as (handler, memory):
        region = memory.pages(6)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.populate(region, PAGE, 2 * PAGE)
        region.write(PAGE, b"changed")
        region.punch_hole(2 * PAGE, PAGE)
        handler.start()
        region.touch(4 * PAGE, 1)
        expect_pages = {0, 1, 2, 3, 4, 5}
        wait_until(lambda: present(handler, region) == expect_pages, "prefetching ends")
        expected = data[:PAGE] + b"changed" + data[PAGE + 7 : 2 * PAGE] + bytes(PAGE)
        assert region.read() == expected + data[3 * PAGE :]
        assert handler.stats().already_present == 0


test_leaves_what_is_there = with_both_drivers(already_there)
