"""The handler owns the events of its userfaultfd: other readers would lose them."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from typing import Any, Literal

import pytest

from pyuffd import (
    CallableSource,
    Event,
    EventsBusyError,
    Feature,
    Handler,
    Pagefault,
    Region,
    RegisterMode,
    Remove,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import wait_for_stalled
from tests.process import _process_sources as sources
from tests.process._pitfalls import wait_blocked
from tests.process._process_sources import PAGE, content

DROP, SYS_MADVISE = mmap.MADV_DONTNEED, 28
Driver = Literal["native", "inline", "thread", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "inline", "thread", "process")
WITH_MESSAGES: tuple[Driver, ...] = ("native", "thread", "process")

pytestmark = needs(Feature(0))


def uffd_for(driver: Driver) -> Userfaultfd:
    return Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))


def refuses(uffd: Userfaultfd) -> None:
    """Every way to read an event is refused."""
    with pytest.raises(EventsBusyError, match="Handler"):
        uffd.read_events()
    with pytest.raises(EventsBusyError, match="Handler"):
        asyncio.run(asyncio.wait_for(anext(uffd.events()), 10))


def from_making_to_stopping(driver: Driver) -> None:
    with uffd_for(driver) as uffd, uffd_for(driver) as other:
        handler = Handler(uffd, driver=driver)
        refuses(uffd)
        with pytest.raises(ValueError, match="handler"):
            Handler(uffd, driver=driver)
        handler.start()
        refuses(uffd)
        with Region.anonymous(PAGE) as region:
            if driver != "inline":
                assert other.read_events() == []
                handler.serve(region, ZeroSource(), uffd=other)
                refuses(other)
                with pytest.raises(ValueError, match="handler"):
                    Handler(other, driver=driver)
            handler.stop()
        for one in (uffd, other):
            assert one.read_events() == []
        Handler(other, driver=driver).stop()
        with contextlib.suppress(ValueError):
            Handler(uffd, driver=driver, on_error="zeros")  # type: ignore[arg-type]
        assert uffd.read_events() == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_refused_until_stop(driver: Driver) -> None:
    run_child(from_making_to_stopping, driver)


def a_task_waits(driver: Driver) -> None:
    """With a handler the task would wait forever, so the handler is refused."""

    async def main() -> None:
        with uffd_for(driver) as uffd:
            task = asyncio.ensure_future(anext(uffd.events()))
            await asyncio.sleep(0)
            with pytest.raises(EventsBusyError, match="task"):
                Handler(uffd, driver=driver)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            Handler(uffd, driver=driver).stop()

    asyncio.run(main())


@pytest.mark.parametrize("driver", DRIVERS)
def test_not_beside_a_waiting_task(driver: Driver) -> None:
    run_child(a_task_waits, driver)


# Messages that were read before the handler existed


def source_of(driver: Driver) -> Any:
    return ZeroSource() if driver == "native" else CallableSource(sources.page)


def taken_before(driver: Driver, memory: str) -> None:
    """A fault whose message was read and not handled is sent again."""
    with contextlib.closing(memory_of(memory)) as make, Userfaultfd() as uffd:
        region = make.pages(2)
        size = region.page_size
        uffd.register(region)
        tasks = [Task(region.read, page * size, 4) for page in range(2)]
        wait_for_stalled(uffd, 2)
        assert len(uffd.read_events()) == 2
        with Handler(uffd, driver=driver) as handler:
            handler.serve(region, source_of(driver))
            expected = bytes(2 * size) if driver == "native" else content(2 * size)
            assert [task.result() for task in tasks] == [expected[:4], expected[size : size + 4]]


@pytest.mark.crossing
@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize("driver", WITH_MESSAGES)
def test_messages_read_before(driver: Driver, memory: str) -> None:
    run_child(taken_before, driver, memory)


def protected_before(driver: Driver) -> None:
    with (
        Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
        Region.anonymous(PAGE) as region,
    ):
        region.fill(1)
        uffd.register(region, mode=RegisterMode.WP)
        uffd.writeprotect(region)
        task = Task(region.write, 0, b"x")
        wait_for_stalled(uffd, 1)
        assert len(uffd.read_events()) == 1
        with Handler(uffd, driver=driver) as handler:
            handler.serve(region, None, mode=RegisterMode.WP)
            task.result()


@needs(Feature.PAGEFAULT_FLAG_WP)
@pytest.mark.parametrize("driver", WITH_MESSAGES)
def test_write_faults_read_before(driver: Driver) -> None:
    run_child(protected_before, driver)


def not_delivered(driver: Driver) -> None:
    """Faults that events() read and did not deliver are sent again; layout events are kept."""
    with (
        Userfaultfd(features=Feature.EVENT_REMOVE) as uffd,
        Region.anonymous(4 * PAGE) as region,
    ):
        uffd.register(region)
        tasks = [Task(region.read, page * PAGE, 4) for page in range(2)]
        wait_for_stalled(uffd, 2)
        removing = [Task(region.madvise, DROP, page * PAGE, PAGE) for page in (2, 3)]
        for task in removing:
            wait_blocked(task, SYS_MADVISE)
        first = asyncio.run(one_event(uffd))
        for task in removing:
            task.result()
        assert [type(event) for event in uffd._claims.unread] == [Remove, Pagefault, Pagefault]
        second = uffd._claims.unread[0]
        assert {first, second} == {
            Remove(region.start + page * PAGE, region.start + (page + 1) * PAGE) for page in (2, 3)
        }
        with Handler(uffd, driver=driver) as handler:
            handler.serve(region, source_of(driver))
            expected = bytes(2 * PAGE) if driver == "native" else content(2 * PAGE)
            got = [task.result() for task in tasks]
            assert got == [expected[:4], expected[PAGE : PAGE + 4]]
            with pytest.raises(EventsBusyError):
                uffd.read_events()
        assert uffd.read_events() == [second]


async def one_event(uffd: Userfaultfd) -> Event:
    return await anext(uffd.events())


@needs(Feature.EVENT_REMOVE)
@pytest.mark.parametrize("driver", WITH_MESSAGES)
def test_events_read_and_not_delivered(driver: Driver) -> None:
    run_child(not_delivered, driver)
