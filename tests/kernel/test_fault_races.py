"""Faults that race with a fill, a drop, or the end of their range."""

from __future__ import annotations

import errno
import mmap
import os
from unittest.mock import patch

import pytest

from pyuffd import (
    BufferSource,
    CopyMode,
    Feature,
    FileSource,
    HandlerError,
    PagePoisonedError,
    PageState,
    PoisonMode,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.handlers import _engine
from pyuffd.testing import FailingSource
from tests._barriers import Point, holding
from tests.kernel._faults import Task, wait_for_pending
from tests.kernel._serving import is_lost, states, wait_for_stalled, wait_until
from tests.process._pitfalls import (
    BOTH,
    EVERY,
    SMALL,
    Pages,
    Setting,
    checks_of,
    losing,
    page,
    pitfall,
    reading,
    wait_blocked,
)

MISSING, MINOR, WP = RegisterMode.MISSING, RegisterMode.MINOR, RegisterMode.WP
MARKERS = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
SYS_CLOCK_NANOSLEEP = 230
NEVER_NS = 10**12


@pitfall(3, "dropped-before-it-is-noted", drivers=BOTH, memory=SMALL)
def dropped(at: Setting) -> None:
    """A page is filled and dropped again before its state says that it is present.

    A thread that faults on it then seems to wait for the fill, which wakes no thread any more.
    """
    with at.served(3) as (handler, region, data):
        with holding(Point.PLACED) as point:
            populater = Task(handler.populate, region, 0, data.size)
            point.wait()
            region.punch_hole(0, data.size)
            reader = reading(region, 0)
            wait_until(lambda: handler.stats().messages == 1, "the fault is seen")
            assert reader.running
        assert reader.result() == data.zeros
        populater.result()
        assert page(region, 2) == data[2]


@pitfall(3, "dropped-page-is-next-in-line", drivers=BOTH, memory=EVERY)
def next_in_line(at: Setting) -> None:
    """A page that was filled and dropped is touched just before its neighbours are filled.

    Its state says that it is present; filling the others does not wake a thread that waits for it.
    """
    with at.serving(prefetch=1 << 30) as (handler, memory):
        region = memory.pages(4)
        data = Pages(4, memory.page_size)
        handler.serve(region, BufferSource(data.all))
        handler.start()
        handler.populate(region, 0, data.size)
        region.punch_hole(0, data.size)
        with holding(Point.PLACED) as point:
            assert page(region, 2) == data[2]
            point.wait()  # page 3 has been filled, pages 0 and 1 are next
            reader = reading(region, 0)
            wait_for_pending(handler.uffd, 1)
        assert reader.result() == data.zeros
        assert page(region, 1) == data[1]


@pitfall(3, "poisoned-and-dropped-again", drivers=("thread",), memory=EVERY)
def poisoned_and_dropped(at: Setting) -> None:
    """A page is poisoned and dropped before its state says so; a thread must fault on it again."""
    with at.serving() as (handler, memory):
        region = memory.pages(2)
        handler.serve(region, FailingSource(ZeroSource(), OSError(errno.EIO, "no content")))
        handler.start()
        with holding(Point.PLACED) as point:
            first = losing(region, 0)
            point.wait()
            assert first.result()
            region.madvise(mmap.MADV_DONTNEED, 0, memory.page_size)  # removes the mark
            second = losing(region, 0)
            wait_until(lambda: handler.stats().messages == 2, "the fault is seen")
            assert second.running
        assert second.result()
        with pytest.raises(HandlerError):
            handler.stop()


@pitfall(3, "given-back", memory=SMALL)
def given_back(at: Setting) -> None:
    """A thread waits for a page that populate() then cannot get: the thread must fault again."""
    with at.serving() as (handler, memory):
        region = memory.pages(3)
        data = Pages(3, memory.page_size)
        file = os.memfd_create("content")
        os.write(file, data.all)
        with FileSource(file) as source:
            handler.serve(region, source)
            handler.start()
            with holding(Point.FILL_CLAIMED) as point:
                populater = Task(handler.populate, region)
                point.wait()
                reader = losing(region, 2)
                wait_until(lambda: handler.stats().messages == 1, "the fault is seen")
                os.ftruncate(file, data.size)
            with pytest.raises(OSError):
                populater.result()
            assert reader.result()
            assert page(region, 0) == data[0]
            with pytest.raises(HandlerError):
                handler.stop()
        os.close(file)


@pitfall(4, "asked-before-it-was-sealed", memory=EVERY, features=Feature.PAGEFAULT_FLAG_WP)
def asked_before(at: Setting) -> None:
    """The leader has read a fault when its range is poisoned: COPY would replace the mark."""
    with at.serving(Feature.PAGEFAULT_FLAG_WP) as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        handler.serve(region, at.source(data.all), mode=MISSING | WP)
        handler.start()
        with holding(Point.UNSERVE_SEALED) as sealed:
            with holding(Point.STEP_APPLIED) as applied:
                reader = losing(region, 1)
                applied.wait()
                unserver = Task(handler.unserve, region)
                sealed.wait()
                assert reader.result()
            wait_until(lambda: handler.stats().messages == 1, "the old message is handled")
        unserver.result()
        assert is_lost(region, data.size, data.size)


@pitfall(12, "sealed-over-markers", drivers=BOTH, memory=SMALL, features=MARKERS)
def sealed_markers(at: Setting) -> None:
    """Missing pages that are protected have markers, on which POISON fails as on pages.

    Unregistering removes the markers and leaves zeros.
    """
    with at.serving(MARKERS) as (handler, memory):
        region = memory.pages(3)
        data = Pages(3, memory.page_size)
        handler.serve(region, at.source(data.all), mode=MISSING | WP)
        handler.start()
        assert page(region, 0) == data[0]
        handler.writeprotect(region)
        handler.stop()
        assert page(region, 0) == data[0]
        assert [is_lost(region, index * data.size, data.size) for index in (1, 2)] == [True] * 2


@pitfall(15, "poison-over-a-marker", drivers=("thread",), memory=SMALL, features=MARKERS)
def poisoned_marker(at: Setting) -> None:
    """No content for a protected, missing page: POISON fails on its marker with EEXIST."""
    with at.serving(MARKERS) as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        source = FailingSource(at.source(data.all), OSError(5, "lost"), at=[data.size])
        handler.serve(region, source, mode=MISSING | WP)
        handler.writeprotect(region)
        handler.start()
        assert is_lost(region, data.size, data.size)
        assert states(handler, region)[1] == PageState.POISONED
        assert page(region, 0) == data[0]
        with pytest.raises(HandlerError):
            handler.stop()


@pitfall(15, "punched-before-continue", memory=("shmem",), features=Feature.MINOR_SHMEM)
def punched(at: Setting) -> None:
    """The page cache loses the page after the minor fault: EFAULT, then a missing fault."""
    with at.serving(Feature.MINOR_SHMEM) as (handler, memory):
        region = memory.pages(2)
        cached, data = Pages(2, memory.page_size, seed=2), Pages(2, memory.page_size)
        with region.alias() as alias:
            alias.write(0, cached.all)
        handler.serve(region, BufferSource(data.all), mode=MISSING | MINOR)
        handler.start()
        assert page(region, 0) == cached[0]
        with holding(Point.FAULT_CLAIMED) as point:
            reader = reading(region, 1)
            point.wait()
            region.punch_hole(data.size, data.size)
        assert reader.result() == data[1]
        assert handler.stats().failed == 0


@pitfall(12, "fault-older-than-the-mark", drivers=("thread",), features=Feature.PAGEFAULT_FLAG_WP)
def older_than_poison(at: Setting) -> None:
    """A write-protect fault is handled when its page has been poisoned: it stays poisoned."""
    with at.serving(Feature.PAGEFAULT_FLAG_WP) as (handler, memory):
        region = memory.pages(2)
        handler.serve(
            region,
            FailingSource(ZeroSource(), OSError(errno.EIO, "no content"), at=[0]),
            mode=MISSING | WP,
        )
        handler.start()
        assert losing(region, 0).result()
        # Others put a page there, and take it away again while the leader is busy.
        region.madvise(mmap.MADV_DONTNEED, 0, memory.page_size)
        handler.uffd.copy(region.start, bytes(memory.page_size), mode=CopyMode.WP)
        with holding(Point.FAULT_CLAIMED) as point:
            reader = reading(region, 1)
            point.wait()
            writer = Task(writes, region)
            wait_for_stalled(handler.uffd, 2)
            region.madvise(mmap.MADV_DONTNEED, 0, memory.page_size)
            # Waking the thread would take its fault back.
            handler.uffd.poison(region.start, memory.page_size, mode=PoisonMode.DONTWAKE)
        reader.result()
        assert writer.result()
        assert states(handler, region)[0] is PageState.POISONED
        with pytest.raises(HandlerError):
            handler.stop()


def writes(region: Region) -> bool:
    """Whether a write finds a page without content."""
    try:
        region.write(0, b"x")
    except PagePoisonedError:
        return True
    return False


@pitfall(16, "closed-in-the-middle-of-a-step", memory=SMALL)
def closed_in_a_step(at: Setting) -> None:
    """A descriptor closes while the leader handles its message; another file may get its number."""
    with at.serving() as (handler, memory), Userfaultfd() as other:
        ours, theirs = memory.pages(2), memory.pages(2)
        data = Pages(2, memory.page_size)
        handler.serve(ours, at.source(data.all))
        handler.serve(theirs, at.source(data.all), uffd=other)
        handler.start()
        with holding(Point.STEP_APPLIED) as point:
            reader = losing(theirs, 1)
            point.wait()
            with patch.object(_engine, "LEAVE_NS", NEVER_NS):  # a busy machine may need a while
                closer = Task(other.close)
                wait_blocked(closer, SYS_CLOCK_NANOSLEEP)
            assert not other.closed
        closer.result()
        assert reader.result()
        assert ours.read() == data.all


test_pitfalls = checks_of(__name__)
