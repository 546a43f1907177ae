"""Handler.checkpoint, unprotect, preserve and hold: what is written, through every driver."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import random
import threading
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    ClosedError,
    Feature,
    Handler,
    HandlerError,
    LayoutChangedError,
    PagePoisonedError,
    PageState,
    RangeBusyError,
    Region,
    StateRanges,
    Userfaultfd,
    ZeroSource,
    _memory,
)
from pyuffd.testing import needs
from tests._barriers import Point, holding
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import content, run_threads, states, wait_until
from tests.kernel._verbs import (
    ABSENT,
    CLEAN,
    DIRTY,
    DRIVERS,
    MINOR,
    MISSING,
    NEEDED,
    PAGES,
    REMOVED,
    SAVED,
    TRACKING,
    WP,
    Case,
    Driver,
    added,
    filling,
    handling,
    run_cases,
)


def runs(ranges: StateRanges, size: int) -> list[tuple[int, int, PageState]]:
    """Return ranges in pages."""
    return [(start // size, end // size, state) for start, end, state in ranges]


def increments(handler: Handler, name: str) -> None:
    """Each checkpoint has what was written since the last one, in whole and in part."""
    with filling(handler, name, mode=WP) as region:
        size = region.page_size
        first = handler.checkpoint(region)
        assert runs(first.written, size) == [(0, PAGES, DIRTY)]
        assert first.states == bytes([DIRTY]) * PAGES
        assert len(handler.checkpoint(region).written) == 0
        region.write(0, b"a")
        region.write(size, b"b")
        region.write(3 * size, b"c")
        part = handler.checkpoint(region, size, 2 * size)
        assert runs(part.written, size) == [(1, 2, DIRTY)]
        assert part.states == bytes([DIRTY, CLEAN])
        second = handler.checkpoint(region)
        assert runs(second.written, size) == [(0, 1, DIRTY), (3, 4, DIRTY)]
        assert second.written.bytes == 2 * size
        assert second.written[-1].end == 4 * size
        table = np.asarray(second.written)
        assert table.tolist() == [[0, size, DIRTY], [3 * size, 4 * size, DIRTY]]
        assert handler.checkpoint(region).states == bytes([CLEAN]) * PAGES


def of_missing_pages(handler: Handler, name: str) -> None:
    """What was never loaded is not written; what was dropped is."""
    with filling(handler, name, mode=MISSING | WP) as region:
        size = region.page_size
        region.read(0, 1)
        region.write(size, b"new")
        found = handler.checkpoint(region)
        assert found.states == bytes([CLEAN, DIRTY, ABSENT, ABSENT])
        assert runs(found.written, size) == [(1, 2, DIRTY)]
        if handler.driver != "inline":
            region.madvise(9 if region.shared else 4, size, size)
            assert runs(handler.checkpoint(region).written, size) == [(1, 2, REMOVED)]


def only_unmapped(handler: Handler, name: str) -> None:
    """Shared memory that its owner unmaps is called dropped, and still has what its file holds."""
    if name not in ("shmem", "hugetlb") or handler.driver == "inline":
        return
    with filling(handler, name, mode=MISSING | WP) as region:
        size = region.page_size
        region.write(0, b"new")
        region.madvise(mmap.MADV_DONTNEED)
        assert runs(handler.checkpoint(region).written, size) == [(0, PAGES, REMOVED)]
        assert region.read(0, 3) == b"new"
        if handler.driver != "process":
            assert handler.evict(region, 0, size, write_back=None) == size
            assert states(handler, region)[0] is REMOVED
            assert region.read(0, 3) == bytes(3)


def mapped_again(handler: Handler, name: str) -> None:
    """What was written stays so if the page leaves the page table, and comes from the cache."""
    if name not in ("shmem", "hugetlb"):
        return
    verbs: tuple[Callable[[Region], bytes], ...] = (
        handler.writeprotect,
        lambda region: handler.checkpoint(region).states,
    )
    for verb in verbs:
        with filling(handler, name, mode=MISSING | MINOR | WP) as region:
            size = region.page_size
            region.read(0, 3 * size)
            region.write(0, b"new")
            region.madvise(mmap.MADV_DONTNEED)
            assert region.read(0, 3) == b"new"
            region.read(size, 1)
            # The event says that both were dropped.
            other = CLEAN if handler.driver == "inline" else DIRTY
            assert states(handler, region)[:2] == [DIRTY, other]
            assert verb(region)[:2] == bytes([DIRTY, other])
            assert verb(region)[:2] == bytes([CLEAN, CLEAN])


def lifted(handler: Handler, name: str) -> None:
    """unprotect() says what it lifts; writes cost nothing until the next protection."""
    with filling(handler, name, mode=WP) as region:
        size = region.page_size
        assert handler.writeprotect(region) == bytes([DIRTY]) * PAGES
        region.write(0, b"a")
        assert handler.unprotect(region, 0, 2 * size) == bytes([DIRTY, CLEAN])
        assert states(handler, region) == [DIRTY, DIRTY, CLEAN, CLEAN]
        before = handler.stats()
        region.write(size, b"b")
        assert handler.stats().faults == before.faults
        region.write(2 * size, b"c")
        assert handler.stats().faults["wp"] == before.faults["wp"] + 1
        assert handler.checkpoint(region).states == bytes([DIRTY, DIRTY, DIRTY, CLEAN])
    with filling(handler, name, mode=MISSING | WP) as region:
        assert handler.unprotect(region) == bytes([ABSENT]) * PAGES
        region.read(0, 1)
        region.write(0, b"a")
        assert handler.checkpoint(region).states == bytes([DIRTY, ABSENT, ABSENT, ABSENT])


def preserved(handler: Handler, name: str) -> None:
    """preserve() keeps the pages protected or not; unprotect() loses none that is unsaved."""
    if handler.driver == "process":
        return
    saved = bytearray(PAGES << 21)
    with filling(handler, name, mode=WP, preserve=saved) as region:
        size = region.page_size
        handler.checkpoint(region)
        with pytest.raises(ValueError, match="still to be saved"):
            handler.unprotect(region)
        assert handler.preserve(region, 0, 2 * size, keep_protected=True) == 2 * size
        assert handler.preserve(region, 2 * size, size, keep_protected=False) == size
        assert states(handler, region) == [SAVED, SAVED, DIRTY, CLEAN]
        assert handler.unprotect(region, 0, size) == bytes([SAVED])
        region.write(size, b"later")
        assert states(handler, region) == [DIRTY, DIRTY, DIRTY, CLEAN]
        assert handler.preserve(region) == size
        assert saved[: region.length] == b"\1" * region.length


def evicted(handler: Handler, name: str) -> None:
    """What was written shows once in a checkpoint, also if it has been evicted since."""
    if handler.driver == "process":
        return
    size = 2 << 20 if name.startswith("hugetlb") else 4096
    store = bytearray(content(PAGES * size))

    def keep(offset: int, data: memoryview) -> None:
        store[offset : offset + len(data)] = data

    def fail(offset: int, data: memoryview) -> None:
        raise KeyError("full")

    with filling(handler, name, BufferSource(store), MISSING | WP) as region:

        def taken() -> list[tuple[int, int, PageState]]:
            found = handler.checkpoint(region)
            for start, end, state in runs(found.written, size):
                assert found.states[start:end] == bytes([state]) * (end - start)
            again = handler.checkpoint(region)
            assert again.states == found.states.replace(bytes([DIRTY]), bytes([CLEAN]))
            assert len(again.written) == 0
            return runs(found.written, size)

        # One was written and one only read; one has come back; one is written after that.
        region.read(0, 4 * size)
        for page in (0, 2, 3):
            region.write(page * size, b"new")
        assert handler.evict(region, write_back=keep) == 4 * size
        region.read(2 * size, 1)
        region.write(3 * size, b"newer")
        assert taken() == [(0, 1, ABSENT), (2, 3, CLEAN), (3, 4, DIRTY)]
        assert region.read(0, 3) == b"new"
        # Without write_back, and unprotected before or filled after.
        handler.unprotect(region, 2 * size, size)
        region.write(2 * size, b"lost")
        region.write(3 * size, b"lost")
        assert handler.evict(region, write_back=None) == 3 * size
        handler.fill(region, 3 * size, content(size))
        assert taken() == [(2, 3, ABSENT), (3, 4, CLEAN)]
        # It stays, and nobody has got it.
        region.write(0, b"stays")
        region.write(size, b"stays")
        with pytest.raises(KeyError):
            handler.evict(region, write_back=fail)
        assert taken() == [(0, 2, DIRTY)]
        region.write(0, b"stays")
        with pytest.raises(KeyError):
            handler.evict(region, write_back=lambda at, data: (keep if at else fail)(at, data))
        # writeprotect() takes what it says, and no more.
        region.write(size, b"new")
        handler.evict(region, write_back=keep)
        assert handler.writeprotect(region) == bytes([ABSENT]) * PAGES
        region.write(0, b"new")
        assert handler.writeprotect(region) == bytes([DIRTY, ABSENT, ABSENT, ABSENT])
        assert taken() == [(1, 2, ABSENT)]


def dropped_and_evicted(handler: Handler, name: str) -> None:
    """What its owner dropped is no longer REMOVED once it is evicted, and shows once more."""
    if handler.driver in ("process", "inline"):
        return
    with filling(handler, name, mode=MISSING | WP) as region:
        size = region.page_size
        region.read(0, 2 * size)
        handler.checkpoint(region)
        region.madvise(9 if region.shared else 4, size, size)
        assert handler.evict(region, write_back=lambda *_: None) == 2 * size
        for expected in ([(1, 2, ABSENT)], []):
            assert runs(handler.checkpoint(region).written, size) == expected


def beside_writers(handler: Handler, name: str) -> None:
    """Copying what each checkpoint says follows threads that write: nothing is missed."""
    with filling(handler, name, mode=WP) as region:
        size, over = region.page_size, threading.Event()
        copy = [b""] * PAGES
        until = time.monotonic() + 0.3

        def write(seed: int) -> None:
            chance = random.Random(seed)
            for number in itertools.count(1):
                if time.monotonic() > until:
                    break
                region.write(chance.randrange(PAGES) * size + 8 * seed, number.to_bytes(8))
            over.set()

        def take() -> None:
            for run in handler.checkpoint(region).written:
                for page in range(run.start // size, run.end // size):
                    copy[page] = region.read(page * size, 32)

        def follow() -> None:
            while not over.is_set():
                take()

        run_threads(follow, lambda: write(1), lambda: write(2))
        take()
        assert copy == [region.read(page * size, 32) for page in range(PAGES)]


def held(handler: Handler, name: str) -> None:
    """In the block threads that write, or read a missing page, wait; then they go on."""
    with filling(handler, name, mode=MISSING | WP) as region:
        size = region.page_size
        region.read(0, 2 * size)
        before = handler.stats()
        done: list[str] = []
        with handler.hold(limit_s=60.0) as hold:

            def write() -> None:
                region.write(0, b"new")
                done.append("w")

            def read() -> None:
                region.read(3 * size, 1)
                done.append("r")

            writer, reader = threading.Thread(target=write), threading.Thread(target=read)
            for thread in (writer, reader):
                thread.start()
                thread.join(0.05)
            with pytest.raises(RangeBusyError):
                handler.hold()
            # What the program asks for is done.
            assert handler.checkpoint(region).states == bytes([CLEAN, CLEAN, ABSENT, ABSENT])
            assert handler.fill(region, 2 * size, content(size)) == size
            assert done == []
            assert handler.stats().faults == before.faults
        assert not hold.expired
        writer.join()
        reader.join()
        assert sorted(done) == ["r", "w"]
        assert states(handler, region) == [DIRTY, CLEAN, CLEAN, CLEAN]
        hold.release()


def expired(handler: Handler, name: str) -> None:
    """At the limit faults are resolved again, and the end of the block says so."""
    with filling(handler, name) as region:
        hold = handler.hold(limit_s=0.05)
        with pytest.raises(HandlerError, match="longer limit_s"), hold:
            assert region.read(0, 1) == b"\0"
        assert hold.expired
        with pytest.raises(ZeroDivisionError) as raised, handler.hold(limit_s=0.01):
            region.read(region.page_size, 1)
            _ = 1 / 0
        assert "after 0.01 s: ask for a longer limit_s" in raised.value.__notes__[0]
        with handler.hold() as another:
            pass
        assert not another.expired


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        increments,
        of_missing_pages,
        only_unmapped,
        mapped_again,
        lifted,
        preserved,
        evicted,
        dropped_and_evicted,
        beside_writers,
        held,
        expired,
    )
}


def check(name: str) -> None:
    warnings.simplefilter("ignore")
    for driver in DRIVERS:
        with handling(driver) as handler:
            run_cases(CASES, handler, name)


@pytest.mark.parametrize("name", memory_params())
@needs(NEEDED)
def test_tracking(name: str) -> None:
    run_child(check, name, budget_s=60)


def dropped_by_its_writer(driver: Driver, name: str) -> None:
    """A writer continues, and drops its page from the page table before the state is set."""
    with (
        contextlib.closing(memory_of(name)) as memory,
        Userfaultfd(features=TRACKING) as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        region = memory.pages(2)
        size = region.page_size
        assert region.fd is not None
        with Region.file(region.fd) as alias:
            handler.serve(region, ZeroSource(), mode=MISSING | WP)
            region.read(0, 1)
            region.punch_hole(0, size)
            region.read(0, 1)
            alias.write(size, b"old")  # Linux maps it: the page stays absent for the handler
            assert [*handler.checkpoint(region).states] == [REMOVED, ABSENT]

            def write(offset: int) -> None:
                region.write(offset, b"new")
                region.madvise(mmap.MADV_DONTNEED, offset, size)

            for offset in (0, size):
                with holding(Point.LIFTED) as point:
                    writer = Task(write, offset)
                    point.wait()
                    writer.result()
                assert states(handler, region)[offset // size] == DIRTY
            assert runs(handler.checkpoint(region).written, size) == [(0, 2, DIRTY)]
            assert region.read(0, 3) == region.read(size, 3) == b"new"


@needs(NEEDED)
@pytest.mark.parametrize("driver", ["native", "thread"])
@pytest.mark.parametrize("name", memory_params("shmem", "hugetlb"))
def test_a_writer_drops_its_page(name: str, driver: Driver) -> None:
    run_child(dropped_by_its_writer, driver, name)


def zeros_written_over(name: str) -> None:
    """Of zeros whose protection was lifted, nobody knows whether they still are zeros."""
    with (
        contextlib.closing(memory_of(name)) as memory,
        Userfaultfd(features=TRACKING) as uffd,
        Handler(uffd) as handler,
    ):
        region = memory.pages(2)
        handler.serve(region, ZeroSource(), mode=MISSING | WP)
        region.read()
        region.punch_hole()
        region.read(0, 1)
        for verb in (handler.writeprotect, handler.unprotect):
            assert [*verb(region)] == [REMOVED, CLEAN]
        region.write(0, b"new")
        region.madvise(mmap.MADV_DONTNEED)
        assert handler.checkpoint(region).states[0] == DIRTY
        assert region.read(0, 3) == b"new"


@needs(NEEDED)
@pytest.mark.parametrize("name", memory_params("shmem", "hugetlb"))
def test_zeros_are_written_over(name: str) -> None:
    run_child(zeros_written_over, name)


def poison_unprotected() -> None:
    """MADV_REMOVE leaves the mark of poison in shared memory: that is no page, and not written."""
    with handling("native") as handler, Region.memfd(4096) as region:
        handler.serve(region, BufferSource(b"x" * 4096), mode=MISSING | WP)
        handler.unserve(region)
        handler.serve(region, ZeroSource(), mode=MISSING | WP, present="keep")
        region.madvise(9)
        assert [*handler.unprotect(region)] == [REMOVED]
        assert states(handler, region) == [REMOVED]


@needs(NEEDED | Feature.POISON)
def test_the_mark_of_poison_is_no_page() -> None:
    run_child(poison_unprotected)


def taken_in_vain() -> None:
    """An error loses nothing of what was written and evicted."""
    with (
        contextlib.closing(memory_of("anon", holes=True)) as memory,
        handling("native") as handler,
    ):
        region = memory.make(4 << 20)
        handler.serve(region, ZeroSource(), mode=MISSING | WP)
        region.write(0, b"new")
        handler.evict(region, write_back=None)
        # What is done in one step ends at a multiple of 2 MiB.
        last = ((region.start + region.length - 1) & -(2 << 20)) - region.start
        _memory.munmap(region.start + last, region.length - last)
        with pytest.raises(LayoutChangedError):
            handler.checkpoint(region)
        found = handler.checkpoint(region, 0, last)
        assert runs(found.written, mmap.PAGESIZE) == [(0, 1, ABSENT)]
        assert found.states == bytes([ABSENT]) * (last // mmap.PAGESIZE)


@needs(NEEDED)
def test_an_error_takes_nothing() -> None:
    run_child(taken_in_vain)


def answers_wait() -> None:
    """What a source in Python answers is not put in place while faults are held."""
    asked, go = threading.Event(), threading.Event()

    def slow(offset: int, length: int) -> bytes:
        asked.set()
        go.wait()
        return content(length)

    with (
        handling("thread", stall_timeout_s=60.0) as handler,
        filling(handler, "anon", CallableSource(slow)) as region,
    ):
        thread = threading.Thread(target=lambda: region.read(0, 1))
        thread.start()
        asked.wait()
        before = handler.stats()
        with handler.hold(limit_s=60.0):
            go.set()
            thread.join(0.1)
            assert thread.is_alive()
            assert added(handler, before, "filled_pages") == 0
        thread.join()
        assert region.read(0, 8) == content(region.page_size)[:8]


@needs(NEEDED)
def test_answers_wait() -> None:
    run_child(answers_wait, budget_s=20)


def stopped_while_held() -> None:
    with handling("native") as handler, filling(handler, "anon") as region:
        hold = handler.hold(limit_s=60.0)
        thread = threading.Thread(target=lambda: region.read(0, 1))
        thread.start()
        wait_until(lambda: handler.stats().messages > 0, "the fault is read")
        handler.stop(drain=False)
        with pytest.raises(HandlerError, match="the handler was stopped") as said:
            hold.release()
        assert "60 s" not in str(said.value)
        assert hold.expired


@needs(NEEDED)
def test_stop_ends_a_hold() -> None:
    run_child(stopped_while_held)


def stopped_as_a_hold_waits() -> None:
    """The source of a fault is memory that nobody fills: hold() waits for it, and stop() comes."""
    with (
        Userfaultfd() as other,
        Region.anonymous(PAGES * 4096) as never_filled,
        handling("native") as handler,
        filling(handler, "anon", BufferSource(never_filled)) as region,
    ):
        other.register(never_filled)
        reader = Task(region.read, 0, 1)
        wait_until(lambda: bool(other.read_events()), "the engine waits for its source")
        holding = Task(handler.hold, 60.0)
        time.sleep(0.05)
        assert holding.running
        handler.stats()  # returned when hold() gave up
        assert holding.running
        with pytest.raises(HandlerError, match="source"):
            handler.stop(drain=False, timeout_s=0.1)
        with pytest.raises(ClosedError, match="stopped before its faults were held"):
            holding.result()
        other.zeropage(never_filled)
        with pytest.raises(PagePoisonedError):
            reader.result()


@needs(NEEDED)
def test_stop_as_a_hold_waits() -> None:
    run_child(stopped_as_a_hold_waits)


def refused() -> None:
    with handling("native") as handler, filling(handler, "anon") as region:
        for verb in (handler.checkpoint, handler.unprotect):
            with pytest.raises(ValueError, match="not served for WP"):
                verb(region)
        with filling(handler, "anon", mode=WP) as region:
            for bad in ((1, 4096), (0, 5 * 4096), (-4096, 4096), (0, 0)):
                for verb in (handler.checkpoint, handler.unprotect):
                    with pytest.raises(ValueError):
                        verb(region, *bad)
            assert states(handler, region) == [DIRTY] * PAGES


@needs(NEEDED)
def test_refuses_bad_arguments() -> None:
    run_child(refused)
