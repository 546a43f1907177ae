"""Layout events that come late or in an unlikely order.

munmap(2) of pages of two userfaultfds sends its event to one after the other and waits for each
reader, and until the end both say EAGAIN. So by not reading the first event, a test keeps the
layout of the second one changing, without an event to read, for as long as it likes.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pyuffd import Feature, Handler, Region, RegisterMode, Unmap, Userfaultfd, _memory
from pyuffd.handlers import _handler
from tests._barriers import Point, holding
from tests.kernel._faults import Task
from tests.kernel._serving import wait_until
from tests.kernel.test_layout_events import SYS_MREMAP, SYS_MUNMAP, move, room
from tests.process._pitfalls import (
    BOTH,
    LAYOUT,
    SMALL,
    Pages,
    Setting,
    checks_of,
    failed,
    page,
    pitfall,
    reading,
    wait_blocked,
    wait_changing,
)

REMOVE = Feature.EVENT_REMOVE
PROTECTED = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
YIELDS = 64  # the leader yields this often before it waits for work (csrc/engine/loop.c)


class Unmapping:
    """An munmap(2) that has unmapped the memory and has not returned."""

    def __init__(self, first: Userfaultfd, task: Task[None]) -> None:
        self._first = first
        self._task = task

    def end(self) -> None:
        """Let it send its event to the second userfaultfd, and return."""
        assert [type(event) for event in self._first.read_events()] == [Unmap]
        self._task.result()


@contextmanager
def unmapping(handler: Handler, whole: Region, pages: int) -> Iterator[Unmapping]:
    """Unmap the first pages of a region, all of which the handler serves but the first."""
    with Userfaultfd(features=LAYOUT) as first:
        first.register(whole.start, whole.page_size)
        task = Task(_memory.munmap, whole.start, pages * whole.page_size)
        wait_changing(handler.uffd, task, SYS_MUNMAP)
        yield Unmapping(first, task)


@contextmanager
def all_but_the_first(at: Setting) -> Iterator[tuple[Handler, Region, Region, Pages]]:
    """Serve all but the first of four pages; yield handler, memory, served region and content."""
    with at.serving(LAYOUT) as (handler, memory):
        whole = memory.pages(4)
        size = whole.page_size
        data = Pages(3, size)
        region = Region.at(whole.start + size, 3 * size, size)
        handler.serve(region, at.source(data.all))
        handler.start()
        yield handler, whole, region, data


@pitfall(2, "put-off-without-a-message", memory=SMALL, features=LAYOUT)
def no_message(at: Setting) -> None:
    """The layout keeps changing and no message comes: only a timer retries a fault."""
    with all_but_the_first(at) as (handler, whole, region, data):
        with unmapping(handler, whole, 2) as change:
            reader = reading(region, 1)
            wait_until(lambda: handler.stats().retried > 2 * YIELDS, "it is tried again")
            assert reader.running
            change.end()
            assert reader.result() == data[1]
        assert page(region, 2) == data[2]
        assert handler.stats().failed == 0


@pitfall(2, "put-off-too-long", drivers=BOTH, memory=SMALL, features=LAYOUT)
def too_long(at: Setting) -> None:
    """After a while it is an error. POISON fails with EAGAIN too, so the thread must be woken."""
    _handler.RETRY_LIMIT_S = 0.05
    with all_but_the_first(at) as (handler, whole, region, data):
        with unmapping(handler, whole, 2) as change:
            reader = reading(region, 1)
            wait_until(lambda: failed(handler), "it is an error")
            assert reader.running
            change.end()
            assert reader.result() == data[1]
        handler.stop()  # the page came after all
        assert handler.stats().failed


@pitfall(2, "put-off-while-protected", drivers=BOTH, memory=SMALL, features=LAYOUT | PROTECTED)
def protected(at: Setting) -> None:
    """A write to a protected page lacks nothing: it waits for the layout, however long."""
    _handler.RETRY_LIMIT_S = 0.05
    with at.serving(LAYOUT | PROTECTED, on_error="poison") as (handler, memory):
        whole = memory.pages(5)
        size = whole.page_size
        data = Pages(4, size)
        region = Region.at(whole.start + size, 4 * size, size)
        region.write(0, data.all)
        handler.serve(region, None, mode=RegisterMode.WP)
        handler.start()
        region.madvise(mmap.MADV_DONTNEED, 2 * size, size)
        handler.writeprotect(region)  # the dropped page too
        with unmapping(handler, whole, 2) as change:
            writers = [Task(region.write, page * size, b"new") for page in (1, 2)]
            before = time.monotonic() + 4 * _handler.RETRY_LIMIT_S
            tries = handler.stats().retried + 2 * YIELDS
            wait_until(lambda: time.monotonic() > before, "the limit is over")
            wait_until(lambda: handler.stats().retried > tries, "it is tried again")
            assert all(writer.running for writer in writers)
            assert handler.stats().failed == 0
            change.end()
            for writer in writers:
                writer.result()
        assert region.read(size, size) == b"new" + data[1][3:]
        handler.stop()
        assert handler.stats().poisoned_pages == 0


@pitfall(11, "moved-before-the-unmap-of-the-other", drivers=BOTH, memory=SMALL, features=LAYOUT)
def unmapped_before(at: Setting) -> None:
    """A range is moved to where another one was, and the other one's UNMAP comes after that."""
    with at.serving(LAYOUT) as (handler, memory):
        whole, other = memory.pages(3), memory.pages(2)
        size = whole.page_size
        data, theirs = Pages(2, size), Pages(2, size, seed=2)
        region = Region.at(whole.start + size, 2 * size, size)
        handler.serve(region, at.source(data.all))
        handler.serve(other, at.source(theirs.all))
        handler.start()
        assert page(region, 0) == data[0]
        with unmapping(handler, whole, 3) as change:
            there = move(other, 0, 2, region.start)
            change.end()
        assert there.read() == theirs.all
        assert handler.stats().unserved == 0


@pitfall(11, "moved-to-where-another-came-from", drivers=BOTH, memory=SMALL, features=LAYOUT)
def moved_after(at: Setting) -> None:
    """Two moves, the second to the first one's old place, whose UNMAP comes after both."""
    with at.serving(LAYOUT) as (handler, memory):
        first, second, spare = memory.pages(2), memory.pages(2), memory.pages(1)
        data, more = Pages(2, first.page_size), Pages(2, first.page_size, seed=2)
        for region, content in ((first, data), (second, more), (spare, data)):
            handler.serve(region, at.source(content.all))
        handler.start()
        to = room(first.length)
        with holding(Point.STEP_APPLIED) as point:
            leader = reading(spare, 0)
            point.wait()
            mover = Task(move, first, 0, 2, to)
            wait_changing(handler.uffd, mover, SYS_MREMAP)
            follower = Task(move, second, 0, 2, first.start)
            wait_blocked(follower, SYS_MREMAP)
        assert leader.result() == data[0]
        assert mover.result().read() == data.all
        assert follower.result().read() == more.all
        assert handler.stats().unserved == 0


@pitfall(11, "answered-before-the-zeros", drivers=("thread",), memory=SMALL, features=REMOVE)
def answered_first(at: Setting) -> None:
    """Old content of a dropped page comes after the REMOVE was applied, before the zeros."""
    with at.served(3, REMOVE) as (handler, region, data):
        with holding(Point.COMPLETE) as answer, holding(Point.STEP_APPLIED) as leader:
            populater = Task(handler.populate, region, data.size, data.size)
            answer.wait()
            dropper = Task(region.punch_hole, data.size, data.size)
            leader.wait()
            dropper.result()
            answer.release()
            populater.result()
        assert region.read() == data.of(0, None, 2)


test_pitfalls = checks_of(__name__)
