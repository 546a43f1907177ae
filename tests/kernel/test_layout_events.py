"""Layout events in order: pages dropped, mappings removed, moved and reused, with both drivers.

The docstring of a check tells what it would see without the engine's rules.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import threading
from collections.abc import Callable
from functools import partial

import pytest

from pyuffd import (
    CallableSource,
    Feature,
    Handler,
    HandlerError,
    PageState,
    Region,
    UffdOSError,
    _memory,
)
from pyuffd._shim import lib
from pyuffd.testing import GatedSource, require
from pyuffd.testing._needs import needs_kernel_faults
from tests import _rooms
from tests._barriers import Point, holding
from tests._rooms import MAP_FIXED_NOREPLACE
from tests.kernel._faults import Task
from tests.kernel._serving import (
    is_lost,
    states,
    wait_for_stalled,
    wait_in_system_call,
    wait_until,
)
from tests.process._pitfalls import (
    AFTER_CHECK,
    ALL,
    ANON,
    BOTH,
    EVERY,
    LAYOUT,
    SMALL,
    Pages,
    Setting,
    checks_of,
    over_or_blocked,
    page,
    pitfall,
    reading,
    wait_blocked,
    wait_changing,
)

MAP_FIXED, MAP_HUGETLB = 0x10, 0x40000
SYS_MMAP, SYS_MUNMAP, SYS_MADVISE, SYS_MREMAP = 9, 11, 28, 25
SYS_FUTEX, SYS_CLOCK_NANOSLEEP = 202, 230
PROT_RW = mmap.PROT_READ | mmap.PROT_WRITE
REMOVE = Feature.EVENT_REMOVE


def unmap(region: Region, first: int, count: int) -> None:
    """Unmap pages of a region."""
    _memory.munmap(region.start + first * region.page_size, count * region.page_size)


def map_at(address: int, length: int, page_size: int, flags: int = MAP_FIXED) -> Region:
    """Map new private memory of some page size at an address."""
    flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if page_size != mmap.PAGESIZE:
        flags |= MAP_HUGETLB
    assert _memory.mmap(length, PROT_RW, flags, address=address) == address
    return Region.at(address, length, page_size)


def room(length: int) -> int:
    """Return an address to which so much memory can be moved, more than once."""
    start = _rooms.room(length)
    AFTER_CHECK.callback(_memory.munmap, start, length)  # huge pages are few
    return start


def move(region: Region, first: int, count: int, to: int) -> Region:
    """Move pages of a region to an address; return a view of them there."""
    size = region.page_size
    length = count * size
    _memory.move(region.start + first * size, length, to, size)
    return Region.at(to, length, size)


# REMOVE


@pitfall(11, "removed-pages-are-zero", drivers=ALL, memory=EVERY, features=REMOVE)
def removed(at: Setting) -> None:
    """Without following REMOVE a dropped page comes back from the source: stale content."""
    with at.served(5, REMOVE) as (handler, region, data):
        assert region.read() == data.all
        region.punch_hole(data.size, 2 * data.size)
        assert region.read() == data.of(0, None, None, 3, 4)
        region.write(data.size, b"new")
        assert region.read(data.size, 4) == b"new\0"
        region.punch_hole(data.size, data.size)
        assert page(region, 1) == data.zeros
        assert handler.stats().removed_pages == 3


@pitfall(11, "removed-while-absent", drivers=ALL, memory=EVERY, features=REMOVE)
def removed_while_absent(at: Setting) -> None:
    """A page that is dropped before any access is zeros too, for faults and populate."""
    with at.served(4, REMOVE) as (handler, region, data):
        region.punch_hole(data.size, 2 * data.size)
        assert [PageState(state).name for state in handler.page_states(region)] == [
            "ABSENT",
            "REMOVED",
            "REMOVED",
            "ABSENT",
        ]
        assert page(region, 1) == data.zeros
        handler.populate(region)
        assert region.read() == data.of(0, None, None, 3)


@pitfall(11, "removed-while-in-flight", memory=EVERY, features=REMOVE)
def removed_in_flight(at: Setting) -> None:
    """The leader has claimed a page when it is dropped: its copy must not win."""
    with at.served(3, REMOVE) as (handler, region, data):
        with holding(Point.FAULT_CLAIMED) as point:
            reader = reading(region, 1)
            point.wait()
            dropper = Task(region.punch_hole, data.size, data.size)
            wait_changing(handler.uffd, dropper, SYS_MADVISE)
        assert reader.result() == data.zeros
        dropper.result()
        assert region.read() == data.of(0, None, 2)
        assert handler.stats().deferred > 0


def removed_at(at: Setting, where: Point) -> None:
    with at.served(3, REMOVE) as (handler, region, data), holding(where) as point:
        reader = reading(region, 1)
        point.wait()
        region.punch_hole(data.size, data.size)
        # The thread that waits for the worker continues at once: zeros need no worker.
        assert reader.result() == data.zeros
        point.release()
        wait_until(lambda: handler.stats().requests == 1, "one request")
        assert region.read() == data.of(0, None, 2)


@pitfall(11, "removed-while-requested", drivers=("thread",), memory=EVERY, features=REMOVE)
def removed_while_requested(at: Setting) -> None:
    """A Python source is asked for a page that is dropped meanwhile: its answer is stale."""
    removed_at(at, Point.REQUEST_TAKEN)


@pitfall(11, "removed-before-the-answer", drivers=("thread",), memory=EVERY, features=REMOVE)
def removed_before_the_answer(at: Setting) -> None:
    """As before, at the last moment: the source has answered, and the page is not filled yet."""
    removed_at(at, Point.COMPLETE)


@pitfall(11, "removed-and-being-zeroed", drivers=("thread",), memory=EVERY, features=REMOVE)
def removed_and_being_zeroed(at: Setting) -> None:
    """The answer comes while another thread fills the dropped page with zeros.

    If the page seemed to be still requested, it would get the old content.
    """
    with at.serving(REMOVE) as (handler, memory):
        region = memory.pages(3)
        data = Pages(3, memory.page_size)
        called: list[threading.Thread] = []

        def fetch(offset: int, length: int) -> bytes:
            called.append(threading.current_thread())
            return data.all[offset : offset + length]

        handler.serve(region, CallableSource(fetch, len(data.all)))
        handler.start()
        with holding(Point.COMPLETE) as answer:
            reader = reading(region, 1)
            answer.wait()
            with holding(Point.FAULT_CLAIMED) as zeroing:
                region.punch_hole(data.size, data.size)
                zeroing.wait()
                answer.release()
                wait_in_system_call(called[0], SYS_FUTEX)  # it waits for work again
        assert reader.result() == data.zeros
        assert region.read() == data.of(0, None, 2)
        assert states(handler, region)[1] == PageState.REMOVED


@pitfall(11, "fault-and-remove-in-one-batch", drivers=BOTH, memory=EVERY, features=REMOVE)
def one_batch(at: Setting) -> None:
    """read() returns the fault before the older REMOVE; handled in that order it would be stale."""
    with at.serving(REMOVE) as (handler, memory):
        region = memory.pages(3)
        data = Pages(3, memory.page_size)
        handler.serve(region, at.source(data.all))
        reader = reading(region, 1)
        wait_for_stalled(handler.uffd, 1)
        dropper = Task(region.punch_hole, data.size, data.size)
        wait_changing(handler.uffd, dropper, SYS_MADVISE)
        with holding(Point.STEP_READ) as point:
            handler.start()
            point.wait()
            dropper.result()  # it continues: from now on the kernel allows copies again
        assert reader.result() == data.zeros
        assert region.read() == data.of(0, None, 2)


@pitfall(11, "populate-claimed-when-removed", memory=EVERY, features=REMOVE)
def populate_claimed(at: Setting) -> None:
    """populate() has claimed pages when one of them is dropped."""
    with at.served(4, REMOVE) as (handler, region, data):
        with holding(Point.FILL_CLAIMED) as point:
            populater = Task(handler.populate, region)
            point.wait()
            dropper = Task(region.punch_hole, data.size, data.size)
            wait_changing(handler.uffd, dropper, SYS_MADVISE)
        populater.result()
        dropper.result()
        assert region.read() == data.of(0, None, 2, 3)


@pitfall(11, "populate-between-read-and-applied", drivers=BOTH, memory=EVERY, features=REMOVE)
def populate_after_read(at: Setting) -> None:
    """REMOVE was read, so the kernel allows copies again, but the engine has not applied it yet.

    Without the gate populate() puts the dropped page's old content in here.
    """
    with at.served(4, REMOVE) as (handler, region, data):
        with holding(Point.STEP_READ) as point:
            dropper = Task(region.punch_hole, data.size, data.size)
            point.wait()
            dropper.result()
            populater = Task(handler.populate, region)
            over_or_blocked(populater)
        populater.result()
        assert region.read() == data.of(0, None, 2, 3)


@pitfall(2, "every-fill-is-put-off", drivers=BOTH, memory=SMALL, features=REMOVE)
def put_off(at: Setting) -> None:
    """Faults that come while the layout changes get EAGAIN, and the kernel sends them once.

    Without the queue of deferred faults their threads would wait forever.
    """
    with at.served(6, REMOVE) as (handler, region, data):
        with holding(Point.STEP_APPLIED) as point:
            first = reading(region, 0)
            point.wait()
            dropper = Task(region.punch_hole, data.size, data.size)
            wait_changing(handler.uffd, dropper, SYS_MADVISE)
            others = [reading(region, index) for index in (2, 3, 4, 5)]
            wait_for_stalled(handler.uffd, 5)
        assert [one.result() for one in (first, *others)] == [data[i] for i in (0, 2, 3, 4, 5)]
        dropper.result()
        assert page(region, 1) == data.zeros
        stats = handler.stats()
        assert stats.failed == stats.poisoned_pages == 0


@pitfall(2, "refusal-is-put-off", drivers=BOTH, memory=SMALL, features=REMOVE | Feature.POISON)
def refusal_put_off(at: Setting) -> None:
    """A fault that finds no served range while the layout changes is retried.

    A range may be moving there. If EAGAIN were final, the thread would wait forever.
    """
    require(needs_kernel_faults())
    with at.served(2, REMOVE) as (handler, region, data):
        nobodys = Region.anonymous(data.size)
        handler.uffd.register(nobodys)
        with holding(Point.STEP_APPLIED) as point:
            lost = Task(is_lost, nobodys)
            point.wait()
            dropper = Task(region.punch_hole, data.size, data.size)
            wait_changing(handler.uffd, dropper, SYS_MADVISE)
        dropper.result()
        assert region.read() == data.of(0, None)
        with pytest.raises(HandlerError, match="not served"):
            handler.stop()
        assert lost.result()
        assert handler.stats().unserved == 1
        assert handler.stats().deferred >= 1
        nobodys.close()


# UNMAP


@pitfall(11, "partial-unmap-splits", drivers=ALL, memory=EVERY, features=LAYOUT)
def partial_unmap(at: Setting) -> None:
    """The rest on both sides is served, each page with its own content."""
    with at.served(6, LAYOUT) as (handler, region, data):
        unmap(region, 2, 2)
        assert page(region, 5) == data[5]
        assert page(region, 4) == data[4]
        assert page(region, 1) == data[1]
        assert page(region, 0) == data[0]
        unmap(region, 0, 1)
        unmap(region, 5, 1)
        assert page(region, 1) == data[1]
        handler.unserve(region)
        assert handler.stats().unserved == 0


@pitfall(11, "address-used-again", drivers=ALL, memory=EVERY, features=LAYOUT)
def used_again(at: Setting) -> None:
    """Another mapping at an unmapped address gets its own content, not that of the old one."""
    with at.served(6, LAYOUT) as (handler, region, data):
        assert page(region, 2) == data[2]
        unmap(region, 2, 2)
        new = map_at(region.start + 2 * data.size, 2 * data.size, data.size)
        fresh = Pages(2, data.size, seed=2)
        handler.serve(new, at.source(fresh.all))
        assert new.read() == fresh.all
        assert region.read(0, 2 * data.size) == data.of(0, 1)
        assert region.read(4 * data.size) == data.of(4, 5)
        # Mapped over: the kernel unmaps first, and sends the event.
        over = map_at(new.start, data.size, data.size)
        assert over.read() == data.zeros
        assert page(new, 1) == fresh[1]
        assert handler.stats().unserved == 0


@pitfall(11, "answer-for-an-address-used-again", drivers=("thread",), memory=EVERY, features=LAYOUT)
def stale_answer(at: Setting) -> None:
    """The answer of a slow source comes when its address belongs to another mapping.

    If the range were found by address, the answer would land in the new mapping, where a thread
    waits for the same page.
    """
    with at.served(2, LAYOUT) as (handler, region, data):
        fresh = Pages(2, data.size, seed=2)
        with holding(Point.COMPLETE) as point:
            populater = Task(handler.populate, region, 0, data.size)
            point.wait()
            unmap(region, 0, 2)
            new = map_at(region.start, 2 * data.size, data.size)
            gate = GatedSource(at.source(fresh.all), at=[0])
            handler.serve(new, gate)
            reader = reading(new, 0)
            gate.wait_for_reads(1)
        # By the worker with the stale answer: the other one is at the gate.
        assert page(new, 1) == fresh[1]
        assert states(handler, new) == [PageState.IN_FLIGHT, PageState.CLEAN]
        gate.open()
        assert reader.result() == fresh[0]
        populater.result()


def serve_before_the_event(at: Setting, moves: bool) -> None:
    with at.serving(LAYOUT) as (handler, memory):
        region, other = memory.pages(2), memory.pages(1)
        data, fresh = Pages(2, memory.page_size), Pages(2, memory.page_size, seed=2)
        handler.serve(region, at.source(data.all))
        handler.serve(other, at.source(data.all))
        handler.start()
        to = room(region.length)
        with holding(Point.STEP_APPLIED) as point:
            leader = None if moves else reading(other, 0)
            if moves:
                changer: Task[object] = Task(move, region, 0, 2, to)
            else:
                point.wait()
                changer = Task(unmap, region, 0, 2)
            point.wait()
            # Its event (the UNMAP that follows REMAP) waits; the old place is free.
            call = SYS_MREMAP if moves else SYS_MUNMAP
            wait_changing(handler.uffd, changer, call)
            new = map_at(region.start, region.length, data.size, MAP_FIXED_NOREPLACE)
            server = Task(handler.serve, new, at.source(fresh.all))
            # It must wait for the event to be read, which the point keeps from happening.
            wait_blocked(server, SYS_CLOCK_NANOSLEEP)
        server.result()
        changer.result()
        if leader:
            assert leader.result() == data[0]
        assert new.read() == fresh.all
        if moves:
            assert Region.at(to, region.length, data.size).read() == data.all
        assert handler.stats().unserved == 0


@pitfall(11, "served-before-unmap-is-read", memory=SMALL, features=LAYOUT)
def served_before_unmap(at: Setting) -> None:
    """An address is mapped and served again before the UNMAP of the old mapping is read.

    The event then takes the new range out, or the old one is in its way (-EEXIST).
    """
    serve_before_the_event(at, moves=False)


@pitfall(11, "served-before-the-unmap-after-remap", memory=SMALL, features=LAYOUT)
def served_before_remap(at: Setting) -> None:
    """As before, with the UNMAP of the old place that follows a REMAP."""
    serve_before_the_event(at, moves=True)


# REMAP


@pitfall(11, "moved-range-is-served", drivers=ALL, memory=EVERY, features=LAYOUT)
def moved(at: Setting) -> None:
    """The UNMAP of the old place, which the kernel sends after REMAP, must not drop the range."""
    with at.served(4, LAYOUT) as (handler, region, data):
        assert page(region, 1) == data[1]
        there = move(region, 0, 4, room(region.length))
        assert page(there, 3) == data[3]
        again = move(there, 0, 4, room(region.length))
        assert again.read() == data.all
        assert states(handler, region) == [PageState.CLEAN] * 4
        stats = handler.stats()
        assert (stats.unserved, stats.filled_pages) == (0, 4)


@pitfall(11, "moved-in-part", drivers=ALL, memory=EVERY, features=LAYOUT)
def moved_in_part(at: Setting) -> None:
    """Content and states of a moved piece depend on its offset in the served range."""
    with at.served(6, LAYOUT) as (handler, region, data):
        assert page(region, 2) == data[2]
        region.punch_hole(data.size, data.size)
        there = move(region, 1, 3, room(3 * data.size))
        assert there.read() == data.of(None, 2, 3)
        assert page(region, 0) == data[0]
        assert region.read(4 * data.size) == data.of(4, 5)
        handler.unserve(region)
        assert there.read() == data.of(None, 2, 3)
        assert handler.stats().unserved == 0


@pitfall(11, "moved-over-a-served-range", drivers=ALL, memory=SMALL, features=LAYOUT)
def moved_over(at: Setting) -> None:
    """The pages at the destination are gone; the rest of their range is not."""
    with at.serving(LAYOUT) as (handler, memory):
        region, other = memory.pages(2), memory.pages(4)
        data, theirs = Pages(2, memory.page_size), Pages(4, memory.page_size, seed=2)
        handler.serve(region, at.source(data.all))
        handler.serve(other, at.source(theirs.all))
        handler.start()
        assert page(other, 1) == theirs[1]
        there = move(region, 0, 2, other.start + data.size)
        assert there.read() == data.all
        assert page(other, 0) == theirs[0]
        assert page(other, 3) == theirs[3]


@pitfall(11, "answer-for-a-moved-page", drivers=("thread",), memory=EVERY, features=LAYOUT)
def moved_while_requested(at: Setting) -> None:
    """The page that a worker fetches is moved meanwhile: the answer follows it."""
    with at.served(2, LAYOUT) as (handler, region, data):
        with holding(Point.COMPLETE) as point:
            populater = Task(handler.populate, region, data.size, data.size)
            point.wait()
            there = move(region, 0, 2, room(region.length))
        populater.result()
        assert states(handler, region) == [PageState.ABSENT, PageState.CLEAN]
        assert there.read() == data.all
        assert handler.stats().requests == 2


@pitfall(4, "unserved-where-it-was-moved-to", drivers=ALL, memory=EVERY, features=LAYOUT)
def unserve_moved(at: Setting) -> None:
    """Sealing finds the pieces at their new place; at the old one it would leave zeros."""
    with at.served(4, LAYOUT) as (handler, region, data):
        assert page(region, 1) == data[1]
        first = move(region, 0, 2, room(2 * data.size))
        handler.unserve(region)
        assert is_lost(first, 0, data.size)
        assert page(first, 1) == data[1]
        assert is_lost(region, 2 * data.size)


@pitfall(11, "removed-is-known-after-a-move", drivers=ALL, memory=ANON, features=LAYOUT)
def removed_then_moved(at: Setting) -> None:
    """Events on one page in a row: moved, dropped there, moved back."""
    with at.served(3, LAYOUT) as (handler, region, data):
        first = move(region, 0, 3, room(region.length))
        there = move(first, 0, 3, room(region.length))
        there.punch_hole(data.size, data.size)
        back = move(there, 0, 3, first.start)
        assert back.read() == data.of(0, None, 2)
        assert handler.stats().unserved == 0


@pitfall(11, "event-after-unregister", drivers=BOTH, features=LAYOUT)
def event_after_unregister(at: Setting) -> None:
    """A madvise that began before the range was unregistered still waits for a reader.

    The stopping handler reads it; otherwise the thread waits until the userfaultfd is closed.
    """
    with at.serving(LAYOUT) as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        handler.serve(region, at.source(data.all))
        handler.start()
        with holding(Point.UNSERVE_SEALED) as sealed:
            stopper = Task(handler.stop)
            sealed.wait()
            dropper = Task(region.punch_hole, data.size, data.size)
            wait_changing(handler.uffd, dropper, SYS_MADVISE)
            sealed.release()
            dropper.result()
            stopper.result()


@pitfall(11, "no-lock-that-the-reader-needs", memory=SMALL, features=REMOVE)
def reader_goes_on(at: Setting) -> None:
    """A thread that waits for its event must not delay threads whose faults came before."""
    with at.served(4, REMOVE) as (handler, region, data):
        with holding(Point.FILL_CLAIMED) as point:
            populater = Task(handler.populate, region, 0, data.size)
            point.wait()
            dropper = Task(region.punch_hole, 3 * data.size, data.size)
            wait_blocked(dropper, SYS_MADVISE)
        for task in (populater, dropper):
            task.result()
        assert region.read() == data.of(0, 1, 2, None)


# Without memory

# Pages [first, past) of six that are unmapped or moved: a part of a piece, or all of it.
PARTS = [(0, 2), (2, 4), (4, 6), (0, 6)]


def until_all_succeed(once: Callable[[int], bool]) -> None:
    """Let the first allocation fail, then the second, until all of a change succeed."""
    tries = itertools.count(1)
    while once(next(tries)):
        pass


def apply_without_memory(
    handler: Handler, region: Region, change: Callable[[], None], nth: int
) -> bool:
    """Make a change, whose nth allocation in the engine fails; return whether there was one."""
    lib.uffd_alloc_fail_nth(nth)
    try:
        change()
        # The gate is closed until the event has been applied.
        with contextlib.suppress(UffdOSError):
            handler.page_states(region)
    finally:
        left = lib.uffd_alloc_fail_nth(0)
    return left <= 0


@pitfall(11, "unmapped-without-memory", drivers=BOTH, features=LAYOUT, budget_s=30)
def unmapped_without_memory(at: Setting) -> None:
    """What an unmapping leaves of a range is served on, whichever allocation fails.

    If the range were taken out before its rest is put in, the rest would be lost.
    """

    def once(first: int, past: int, nth: int) -> bool:
        with contextlib.ExitStack() as stack:
            handler, region, data = stack.enter_context(at.served(6, LAYOUT))
            lacked = apply_without_memory(
                handler, region, lambda: unmap(region, first, past - first), nth
            )
            for number in (*range(first), *range(past, 6)):
                assert page(region, number) == data[number]
            assert handler.stats().unserved == 0
            assert bool(handler.stats().failed) is lacked
            if lacked:
                with pytest.raises(HandlerError, match="memory"):
                    handler.stop()
        return lacked

    for first, past in PARTS:
        until_all_succeed(partial(once, first, past))


@pitfall(11, "moved-without-memory", drivers=BOTH, features=LAYOUT, budget_s=30)
def moved_without_memory(at: Setting) -> None:
    """What a move leaves behind is served on, whichever allocation fails; the failure is told."""

    def once(first: int, past: int, nth: int) -> bool:
        there: list[Region] = []
        with contextlib.ExitStack() as stack:
            handler, region, data = stack.enter_context(at.served(6, LAYOUT))
            to = room((past - first) * data.size)
            lacked = apply_without_memory(
                handler,
                region,
                lambda: there.append(move(region, first, past - first, to)),
                nth,
            )
            for number in (*range(first), *range(past, 6)):
                assert page(region, number) == data[number]
            failed = bool(handler.stats().failed)
            if not failed:
                assert there[0].read() == data.of(*range(first, past))
            assert handler.stats().unserved == 0
            assert failed or not lacked or nth == 1
            if failed:
                with pytest.raises(HandlerError, match="memory"):
                    handler.stop()
        return lacked

    for first, past in PARTS:
        until_all_succeed(partial(once, first, past))


test_pitfalls = checks_of(__name__)
