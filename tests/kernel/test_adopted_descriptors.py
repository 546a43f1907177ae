"""One handler for several userfaultfds, of its own process and of others."""

from __future__ import annotations

import os

import pytest

from pyuffd import ClosedError, Feature, Handler, Region, Userfaultfd
from pyuffd.testing import FaultingChild
from tests.kernel._faults import Task
from tests.kernel._serving import is_lost, open_fds, run_threads, wait_until
from tests.process._pitfalls import (
    ALL,
    EVENTS,
    LAYOUT,
    SMALL,
    Pages,
    Setting,
    checks_of,
    page,
    pitfall,
)

PAGE = os.sysconf("SC_PAGE_SIZE")
MANY = 200


@pitfall(16, "several-descriptors", drivers=ALL, memory=SMALL, features=LAYOUT)
def several(at: Setting) -> None:
    """Each range is resolved through its own descriptor, and events apply to the right one."""
    with at.serving() as (handler, memory), Userfaultfd(features=LAYOUT) as other:
        ours, theirs = memory.pages(3), memory.pages(3)
        data, more = Pages(3, memory.page_size), Pages(3, memory.page_size, seed=2)
        handler.serve(ours, at.source(data.all))
        handler.start()
        handler.serve(theirs, at.source(more.all), uffd=other)
        assert handler.spaces == 2
        assert theirs.read() == more.all
        assert ours.read() == data.all
        theirs.punch_hole(0, memory.page_size)
        assert page(theirs, 0) == bytes(memory.page_size)
        # The handler has forgotten it, so it may be served again.
        handler.unserve(theirs, uffd=other)
        theirs.punch_hole()
        handler.serve(theirs, at.source(data.all), uffd=other)
        assert theirs.read() == data.all


@pitfall(16, "one-of-several-closes", drivers=ALL, memory=SMALL)
def one_closes(at: Setting) -> None:
    """The ranges of a closing descriptor are sealed first; the others are served as before.

    If it closed while the leader polls it, another file could get its number.
    """
    with at.serving() as (handler, memory):
        ours, theirs = memory.pages(2), memory.pages(2)
        data = Pages(2, memory.page_size)
        handler.serve(ours, at.source(data.all))
        handler.start()
        for _ in range(5):
            with Userfaultfd() as other, memory.pages(2) as region:
                handler.serve(region, at.source(data.all), uffd=other)
                assert page(region, 1) == data[1]
                other.close()
                assert handler.spaces == 1
                assert is_lost(region, 0, memory.page_size)
                assert page(region, 1) == data[1]
        assert ours.read() == data.all
        with pytest.raises(ClosedError):
            handler.serve(theirs, at.source(data.all), uffd=other)


@pitfall(16, "closed-while-it-waits", drivers=ALL)
def closed_while_faulting(at: Setting) -> None:
    """Threads fault while descriptors close: they get content or SIGBUS, never zeros."""
    with at.serving() as (handler, memory):
        data = Pages(8, memory.page_size)
        handler.start()
        for _ in range(10):
            with Userfaultfd() as other, memory.pages(8) as region:
                handler.serve(region, at.source(data.all), uffd=other)

                def touch(region: Region = region) -> None:
                    for index in range(8):
                        if not is_lost(region, index * data.size, data.size):
                            assert page(region, index) == data[index]

                run_threads(touch, other.close, touch)


@pitfall(16, f"{MANY}-descriptors", drivers=ALL, budget_s=20)
def many(at: Setting) -> None:
    """A handler serves each of many descriptors, and leaves none behind."""
    with at.serving() as (handler, memory):
        handler.start()
        before = open_fds()
        data = Pages(2, memory.page_size)
        uffds = [Userfaultfd() for _ in range(MANY)]
        regions = [memory.pages(2) for _ in uffds]
        for uffd, region in zip(uffds, regions, strict=True):
            handler.serve(region, at.source(data.all), uffd=uffd)
        assert handler.spaces == MANY + 1
        for region in regions:
            assert page(region, 1) == data[1]
        tasks = [Task(region.read, 0, 1) for region in regions[::4]]
        assert {task.result() for task in tasks} == {data[0][:1]}
        for uffd in uffds:
            uffd.close()
        assert handler.spaces == 1
        wait_until(lambda: open_fds() == before, "no descriptor is left")


@pitfall(16, "descriptors-of-processes", drivers=ALL, features=EVENTS, budget_s=20)
def of_processes(at: Setting) -> None:
    """Two other processes and this one: one forks, one is killed."""
    data, theirs = Pages(3, PAGE), Pages(3, PAGE, seed=2)
    with (
        at.serving() as (handler, memory),
        FaultingChild(pages=3, mode=None, features=EVENTS) as first,
        FaultingChild(pages=3, mode=None, features=LAYOUT) as second,
    ):
        region = memory.pages(3)
        handler.serve(region, at.source(data.all))
        handler.start()
        for child in (first, second):
            handler.serve(child.region, at.source(theirs.all), uffd=child.uffd)
        assert first.run("read", PAGE, 8) == second.run("read", PAGE, 8) == theirs[1][:8]
        assert first.run("fork", "read", 0, 8).value == theirs[0][:8]
        second.run("madvise", 4, 2 * PAGE, PAGE)
        assert second.run("read", 2 * PAGE, 8) == bytes(8)
        second.kill()
        assert first.run("read", 2 * PAGE, 8) == theirs[2][:8]
        assert region.read() == data.all
        wait_until(lambda: handler.spaces <= 3, "the fork is forgotten")
        second.uffd.close()
        assert first.run("read", 0, 8) == theirs[0][:8]


@pitfall(7, "one-descriptor-one-handler", drivers=ALL)
def claimed(at: Setting) -> None:
    """Two readers of one descriptor would read each other's messages."""
    with at.serving() as (handler, memory), Userfaultfd() as other:
        region = memory.pages(1)
        data = Pages(1, memory.page_size)
        handler.serve(region, at.source(data.all), uffd=other)
        with pytest.raises(ValueError):
            Handler(other)
        with at.serving() as (second, _), pytest.raises(ValueError):
            second.serve(region, at.source(data.all), uffd=other)
        with pytest.raises(ValueError):
            handler.serve(region, at.source(data.all), uffd=other)
        blocking = Userfaultfd(nonblocking=False, features=Feature(0))
        with blocking, pytest.raises(ValueError):
            handler.serve(region, at.source(data.all), uffd=blocking)


test_pitfalls = checks_of(__name__)
