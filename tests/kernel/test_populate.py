"""populate() with sources in Python: how much it asks for at a time, and how it fails."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyuffd import (
    CallableSource,
    Handler,
    HandlerError,
    PageState,
    Region,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import needs_hugepages
from pyuffd.testing._memory_types import HUGE_PAGE
from tests._child import run_child
from tests._memory import PAGE, memory_of, memory_params
from tests.kernel._serving import WAIT_S, is_lost, states, wait_until

MIB = 1 << 20
STALL_S = 0.5


def content_of(offset: int, length: int) -> bytes:
    """Return a page that has its number in every 8 bytes."""
    return b"".join(
        (at // PAGE + 1).to_bytes(8, "little") * (PAGE // 8)
        for at in range(offset, offset + length, PAGE)
    )


class Source:
    """Content from `content_of`, with a record of the requests."""

    def __init__(self, before: Callable[[int, int], object] = lambda offset, length: None) -> None:
        self.asked: list[tuple[int, int]] = []
        self._before = before

    def __call__(self, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        self._before(offset, length)
        return content_of(offset, length)

    @property
    def sizes(self) -> Counter[int]:
        return Counter(length for _, length in self.asked)


@contextlib.contextmanager
def serving(
    source: Callable[[int, int], Any], length: int, name: str = "anon", **options: Any
) -> Iterator[tuple[Handler, Region]]:
    with (
        contextlib.closing(memory_of(name)) as memory,
        Userfaultfd() as uffd,
        Handler(uffd, driver="thread", **options) as handler,
    ):
        region = memory.make(length)
        handler.serve(region, CallableSource(source))
        handler.start()
        yield handler, region


# How much at a time


def chunks(name: str, chunk: int, prefetch: int) -> None:
    source = Source()
    length = max(8 * chunk, 2 * HUGE_PAGE if "hugetlb" in name else 0) + chunk
    with serving(source, length, name, prefetch=prefetch) as (handler, region):
        assert handler.populate(region, 0, length, chunk=chunk) == length
        assert region.read() == content_of(0, length)
        assert source.sizes == {chunk: length // chunk}
        assert handler.populate(region, chunk=chunk) == 0


@pytest.mark.crossing
@pytest.mark.parametrize("name", memory_params())
@pytest.mark.parametrize("prefetch", [0, 1 << 18])
def test_as_much_as_it_is_told(name: str, prefetch: int) -> None:
    for chunk in [HUGE_PAGE] if "hugetlb" in name else [PAGE, 16 * PAGE, MIB]:
        run_child(chunks, name, chunk, prefetch)


def by_default(prefetch: int) -> None:
    source = Source()
    with serving(source, 32 * MIB, prefetch=prefetch) as (handler, region):
        assert handler.populate(region) == 32 * MIB
        assert region.read() == content_of(0, 32 * MIB)
        assert max(source.sizes) == MIB
        assert len(source.asked) < 64  # of 8,192 pages


@pytest.mark.parametrize("prefetch", [0, PAGE, 1 << 18])
def test_a_mebibyte_by_default(prefetch: int) -> None:
    run_child(by_default, prefetch)


@needs_hugepages(4)
def test_a_huge_page_by_default() -> None:
    run_child(huge_by_default)


def huge_by_default() -> None:
    source = Source()
    with serving(source, 4 * HUGE_PAGE, "hugetlb") as (handler, region):
        assert handler.populate(region) == 4 * HUGE_PAGE
        assert source.sizes == {HUGE_PAGE: 4}


def holes() -> None:
    """Only absent pages are asked for, and no request spans a page that is present."""
    source = Source()
    with serving(source, 64 * PAGE) as (handler, region):
        for page in (0, 9, 10, 63):
            region.read(page * PAGE, 1)
        source.asked.clear()
        assert handler.populate(region, chunk=32 * PAGE) == 60 * PAGE
        assert source.asked == [(PAGE, 8 * PAGE), (11 * PAGE, 32 * PAGE), (43 * PAGE, 20 * PAGE)]
        assert region.read() == content_of(0, 64 * PAGE)


def test_only_what_is_absent() -> None:
    run_child(holes)


def slow_by_page(chunk: int | None) -> None:
    source = Source(lambda offset, length: time.sleep(length // PAGE * 0.02))
    with serving(source, 48 * PAGE, stall_timeout_s=STALL_S) as (handler, region):
        assert handler.populate(region, chunk=chunk) == 48 * PAGE
        assert region.read() == content_of(0, 48 * PAGE)
        assert handler.stats().stalled_requests == 0


@pytest.mark.parametrize("chunk", [None, PAGE])
def test_slow_source_is_not_taken_for_a_stalled_one(chunk: int | None) -> None:
    """It needs 20 ms for each page: 48 pages, queued at once or as one chunk, are too many."""
    run_child(slow_by_page, chunk)


def two_workers() -> None:
    both = threading.Barrier(2)
    source = Source(lambda offset, length: both.wait(WAIT_S))
    with serving(source, 8 * PAGE, workers=2, stall_timeout_s=WAIT_S) as (handler, region):
        assert handler.populate(region, chunk=PAGE) == 8 * PAGE
        assert region.read() == content_of(0, 8 * PAGE)


def test_workers_are_asked_at_the_same_time() -> None:
    run_child(two_workers, budget_s=40)


def callers_at_once() -> None:
    source = Source()
    with serving(source, 8 * MIB, workers=2) as (handler, region):
        filled = [0] * 4

        def populate(index: int) -> None:
            filled[index] = handler.populate(region, chunk=(index + 1) * 4 * PAGE)

        threads = [threading.Thread(target=populate, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(filled) == 8 * MIB
        assert region.read() == content_of(0, 8 * MIB)


def test_callers_at_once() -> None:
    run_child(callers_at_once)


def bad_chunks() -> None:
    with (
        Userfaultfd() as uffd,
        Region.anonymous(4 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, ZeroSource())
        handler.start()
        for chunk in (0, -PAGE, PAGE - 1, PAGE + 1):
            with pytest.raises(ValueError, match="chunk"):
                handler.populate(region, chunk=chunk)
        assert handler.populate(region, chunk=PAGE) == 4 * PAGE


def test_bad_chunks() -> None:
    run_child(bad_chunks)


@needs_hugepages(1)
def test_a_chunk_is_no_less_than_a_page() -> None:
    run_child(small_chunk)


def small_chunk() -> None:
    with serving(Source(), HUGE_PAGE, "hugetlb") as (handler, region):
        for chunk in (PAGE, 3 * HUGE_PAGE // 2):
            with pytest.raises(ValueError, match="chunk"):
                handler.populate(region, chunk=chunk)


# Failures


class Bad(Exception):
    """The exception of a source."""


class BrokenAt:
    """Raise if the request contains a certain page."""

    def __init__(self, *pages: int) -> None:
        self.pages = set(pages)

    def __call__(self, offset: int, length: int) -> None:
        asked = set(range(offset // PAGE, (offset + length) // PAGE))
        if asked & self.pages:
            raise Bad(f"page {min(asked & self.pages)}")


def failure(handler: Handler, region: Region, **options: Any) -> UffdOSError:
    with pytest.raises(UffdOSError) as caught:
        handler.populate(region, **options)
    return caught.value


def filled_bytes(handler: Handler, region: Region) -> int:
    return handler.page_states(region).count(PageState.CLEAN) * region.page_size


def one_bad_page(chunk: int | None, workers: int) -> None:
    broken = BrokenAt(37)
    source = Source(broken)
    with serving(source, 256 * PAGE, workers=workers) as (handler, region):
        error = failure(handler, region, chunk=chunk)
        assert error.errno == errno.EIO
        assert error.start == region.start + 37 * PAGE
        assert isinstance(error.__cause__, Bad)
        assert "Bad: page 37" in error.hint
        assert error.data["completed"] == filled_bytes(handler, region)
        found = states(handler, region)
        assert found[37] is PageState.ABSENT
        assert set(found) == {PageState.ABSENT, PageState.CLEAN}
        if workers == 1:
            assert set(found[:37]) == {PageState.CLEAN}
        broken.pages.clear()  # no page was lost
        assert handler.populate(region, chunk=chunk) == 256 * PAGE - error.data["completed"]
        assert region.read() == content_of(0, 256 * PAGE)
        assert handler.stats().failed > 0
        handler.stop()  # the failure was mended
        assert handler.stats().poisoned_pages == 0


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("chunk", [None, PAGE, 16 * PAGE, 256 * PAGE])
def test_one_bad_page(chunk: int | None, workers: int) -> None:
    run_child(one_bad_page, chunk, workers)


def all_bad() -> None:
    source = Source(BrokenAt(*range(1024)))
    with serving(source, 1024 * PAGE) as (handler, region):
        assert failure(handler, region, chunk=MIB).start == region.start
        assert len(source.asked) < 64
        assert set(states(handler, region)) == {PageState.ABSENT}
        with pytest.raises(HandlerError):
            handler.stop()


def test_a_source_that_is_down_is_not_asked_for_every_page() -> None:
    run_child(all_bad)


def page_at_a_time() -> None:
    """A source that ignores the length of the request works page by page."""

    def page(offset: int, length: int) -> bytes:
        del length
        return content_of(offset, PAGE)

    with serving(page, 64 * PAGE, prefetch=16 * PAGE) as (handler, region):
        assert region.read(40 * PAGE, PAGE) == content_of(40 * PAGE, PAGE)
        assert handler.populate(region) == 63 * PAGE
        assert region.read() == content_of(0, 64 * PAGE)


def test_source_that_answers_with_a_page_whatever_it_is_asked() -> None:
    run_child(page_at_a_time)


def hung() -> None:
    release = threading.Event()
    source = Source(lambda offset, length: release.wait(WAIT_S))
    with serving(source, 64 * PAGE, stall_timeout_s=STALL_S) as (handler, region):
        began = time.monotonic()
        error = failure(handler, region, chunk=16 * PAGE)
        assert time.monotonic() - began < WAIT_S / 2
        assert error.errno == errno.ETIMEDOUT
        assert "stall_timeout_s" in error.hint
        assert error.data["completed"] == 0
        assert set(states(handler, region)) == {PageState.ABSENT}
        release.set()
        assert handler.populate(region) == 64 * PAGE
        assert handler.stats().failed > 0
        handler.stop()  # the failure was mended


def test_source_that_hangs() -> None:
    run_child(hung, budget_s=20)


def waited_for(mended: bool) -> None:
    """A thread waits for a page that populate() then fails to fill."""
    asked, release = threading.Event(), threading.Event()

    def before(offset: int, length: int) -> None:
        del offset, length
        if not asked.is_set():
            asked.set()
            release.wait(WAIT_S)
            raise Bad("first")
        if not mended:
            raise Bad("again")

    with serving(Source(before), PAGE, stall_timeout_s=WAIT_S) as (handler, region):
        errors: list[UffdOSError] = []

        def populate() -> None:
            errors.append(failure(handler, region))

        lost: list[bool] = []
        threads = [threading.Thread(target=populate)]
        threads[0].start()
        asked.wait(WAIT_S)
        threads.append(threading.Thread(target=lambda: lost.append(is_lost(region))))
        threads[1].start()
        wait_until(lambda: handler.stats().messages > 0, "a fault is read")
        release.set()
        for thread in threads:
            thread.join()
        assert errors[0].errno == errno.EIO
        assert lost == [not mended]
        assert handler.stats().failed > 0
        if mended:
            assert region.read() == content_of(0, PAGE)
            handler.stop()
            return
        with pytest.raises(HandlerError):
            handler.stop()


@pytest.mark.parametrize("mended", [False, True])
def test_who_waits_for_a_page_of_populate_asks_for_it_again(mended: bool) -> None:
    run_child(waited_for, mended, budget_s=30)


def stopped() -> None:
    asked, release = threading.Event(), threading.Event()

    def before(offset: int, length: int) -> None:
        del offset, length
        asked.set()
        release.wait(WAIT_S)

    with serving(Source(before), 64 * PAGE, stall_timeout_s=WAIT_S) as (handler, region):
        errors: list[UffdOSError] = []
        thread = threading.Thread(target=lambda: errors.append(failure(handler, region)))
        thread.start()
        asked.wait(WAIT_S)
        stopper = threading.Thread(target=lambda: handler.stop(drain=False))
        stopper.start()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        release.set()
        stopper.join()
        assert errors[0].data["completed"] == 0


def test_stop_ends_it() -> None:
    run_child(stopped, budget_s=30)


# Faults with prefetch


def bad_neighbour() -> None:
    source = Source(BrokenAt(5))
    with serving(source, 16 * PAGE, prefetch=16 * PAGE) as (handler, region):
        assert region.read(3 * PAGE, PAGE) == content_of(3 * PAGE, PAGE)
        assert source.asked == [(0, 16 * PAGE), (3 * PAGE, PAGE)]
        found = states(handler, region)
        assert found[3] is PageState.CLEAN
        assert set(found[:3] + found[4:]) == {PageState.ABSENT}
        assert is_lost(region, 5 * PAGE)
        assert states(handler, region).count(PageState.POISONED) == 1
        assert region.read(6 * PAGE, PAGE) == content_of(6 * PAGE, PAGE)
        with pytest.raises(HandlerError) as caught:
            handler.stop()
        assert caught.value.start == region.start + 5 * PAGE


def test_a_bad_neighbour_does_not_cost_the_page_that_is_touched() -> None:
    run_child(bad_neighbour)


def address() -> None:
    with serving(Source(), 16 * PAGE, prefetch=16 * PAGE) as (handler, region):
        region.read(9 * PAGE, 1)
        assert [fault.address for fault in handler.recent_faults()] == [region.start + 9 * PAGE]


def test_a_recent_fault_is_where_the_access_was() -> None:
    run_child(address)
