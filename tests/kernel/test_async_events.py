"""`async for event in uffd.events()`: order, cancellation, closing, other tasks."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest

from pyuffd import (
    BufferSource,
    ClosedError,
    Event,
    EventsBusyError,
    Feature,
    Fork,
    Handler,
    Pagefault,
    Region,
    Remove,
    Userfaultfd,
)
from pyuffd.testing import FaultingChild, layout_change_pending, needs, needs_privilege, require
from tests._child import run_child
from tests._tasks import of_threads
from tests.kernel._faults import Task, no_events, readable, registered
from tests.kernel._serving import wait_for_stalled, wait_until

PAGE = 4096
DROP = mmap.MADV_DONTNEED
WAIT_S = 10.0
REMOVE = Feature.EVENT_REMOVE
CHECKS: list[Callable[[], None]] = []

pytestmark = needs(REMOVE)


def check(function: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """Turn a coroutine function into a check that runs in a loop, in a child process."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(function(), WAIT_S))

    run.__name__ = run.__qualname__ = function.__name__
    run.__module__ = function.__module__
    CHECKS.append(run)
    return run


@pytest.mark.parametrize("function", CHECKS, ids=lambda check: check.__name__)
def test_in_a_child(function: Callable[[], None]) -> None:
    run_child(function, budget_s=2 * WAIT_S)


def stalled_reads(uffd: Userfaultfd, region: Region, count: int) -> list[Task[bytes]]:
    """Make this many threads wait for a page each."""
    tasks = [Task(region.read, page * region.page_size, 1) for page in range(count)]
    wait_for_stalled(uffd, count)
    return tasks


def resolve(uffd: Userfaultfd, event: Event) -> int:
    assert isinstance(event, Pagefault)
    uffd.fill_copy(event.address, bytes([7]) * PAGE)
    return event.address


async def next_of(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


@check
async def serves_beside_other_tasks() -> None:
    """Other tasks run between the batches; all pages arrive."""
    pages, turns = 256, 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    with FaultingChild(pages) as child:
        worker = asyncio.create_task(other_work())
        step = child.begin("touch", 0, pages * PAGE)
        served = set()
        async for event in child.uffd.events():
            served.add(resolve(child.uffd, event))
            if len(served) == pages:
                break
        worker.cancel()
        step.done()
        assert child.run("read", 0, pages * PAGE) == bytes([7]) * pages * PAGE
    assert turns >= pages  # the child faults for a page at a time


@check
async def events_come_one_by_one_and_none_is_lost() -> None:
    with Region.anonymous(8 * PAGE) as region, registered(region) as uffd:
        tasks = stalled_reads(uffd, region, 8)
        first = await anext(uffd.events())
        # Seven were read and not delivered: another iterator gets half, read_events the rest.
        assert not readable(uffd)
        seen = [first]
        async for event in uffd.events():
            seen.append(event)
            if len(seen) == 4:
                break
        seen += uffd.read_events(1)
        seen += uffd.read_events()
        assert uffd.read_events() == []
        pages = {resolve(uffd, event) for event in seen}
        assert (len(seen), pages) == (8, {region.start + page * PAGE for page in range(8)})
        assert [task.result() for task in tasks] == [b"\x07"] * 8


@check
async def layout_events_come_before_faults_of_their_batch() -> None:
    with Region.anonymous(2 * PAGE) as region, registered(region, features=REMOVE) as uffd:
        (reading,) = stalled_reads(uffd, region, 1)
        with layout_change_pending(uffd, region, offset=PAGE):
            events = uffd.events()
            first, second = await anext(events), await anext(events)
            assert first == Remove(region.start + PAGE, region.start + 2 * PAGE)
            assert resolve(uffd, second) == region.start
        reading.result()


@check
async def cancelled_while_it_waits() -> None:
    with Region.anonymous(PAGE) as region, registered(region) as uffd:
        events = uffd.events()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 0.01)
        # The loop has unregistered the descriptor each time.
        assert not asyncio.get_running_loop().remove_reader(uffd.fileno())
        (reading,) = stalled_reads(uffd, region, 1)
        resolve(uffd, await anext(events))
        reading.result()


@check
async def cancelled_when_the_event_is_there() -> None:
    """The task is cancelled after the descriptor became ready and before the task runs."""
    loop = asyncio.get_running_loop()
    with Region.anonymous(PAGE) as region, registered(region) as uffd:
        events = uffd.events()
        task = asyncio.create_task(next_of(events))
        await asyncio.sleep(0)
        again = os.dup(uffd.fileno())
        # Ready in the same turn of the loop, as it is the same file.
        loop.add_reader(again, task.cancel)
        (reading,) = stalled_reads(uffd, region, 1)
        with pytest.raises(asyncio.CancelledError):
            await task
        loop.remove_reader(again)
        os.close(again)
        resolve(uffd, await anext(events))
        reading.result()


@check
async def closing_ends_the_iteration() -> None:
    loop = asyncio.get_running_loop()
    for close in (Userfaultfd.close, lambda uffd: os.close(uffd.detach())):
        uffd = Userfaultfd()
        fd = uffd.fileno()
        events = uffd.events()
        task = asyncio.create_task(collect(events))
        await asyncio.sleep(0)
        close(uffd)
        assert not loop.remove_reader(fd)
        assert await task == []
        assert await collect(events) == []
        with pytest.raises(ClosedError):
            uffd.events()


@check
async def closing_in_another_thread_ends_the_iteration() -> None:
    loop = asyncio.get_running_loop()
    uffd = Userfaultfd()
    copy, fd = os.dup(uffd.fileno()), uffd.fileno()  # with it, epoll would keep a closed one
    task = asyncio.create_task(collect(uffd.events()))
    await asyncio.sleep(0)
    await asyncio.to_thread(uffd.close)
    assert await task == []
    assert not loop.remove_reader(fd)
    os.close(copy)


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


@check
async def closing_after_the_loop() -> None:
    """A loop that has ended is not asked to unregister the descriptor."""
    uffd = Userfaultfd()

    def other_loop() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(collect(uffd.events()))
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        task._log_destroy_pending = False  # type: ignore[attr-defined]

    await asyncio.to_thread(other_loop)
    uffd.close()


@check
async def second_task_is_refused() -> None:
    with Region.anonymous(PAGE) as region, registered(region) as uffd:
        first = asyncio.create_task(next_of(uffd.events()))
        await asyncio.sleep(0)
        with pytest.raises(EventsBusyError):
            await anext(uffd.events())
        (reading,) = stalled_reads(uffd, region, 1)
        resolve(uffd, await first)
        reading.result()
        assert no_events(uffd)


@check
async def undelivered_forks_are_closed() -> None:
    require(needs_privilege("CAP_SYS_PTRACE"))
    features = REMOVE | Feature.EVENT_FORK
    with FaultingChild(2, features=features, content=bytes(2 * PAGE)) as child:
        removing = child.begin("madvise", DROP, 0, PAGE, thread=1)
        wait_until(lambda: waiting_threads(child.pid) == 1, "the Remove event is queued")
        forking = child.begin("fork", thread=2)
        wait_until(lambda: waiting_threads(child.pid) == 2, "the Fork event is queued")
        before = len(os.listdir("/proc/self/fd"))
        assert isinstance(await anext(child.uffd.events()), Remove)
        (fork,) = child.uffd._claims.unread
        assert isinstance(fork, Fork)
        assert len(os.listdir("/proc/self/fd")) == before + 1
        removing.done()
        assert forking.done().returncode == 0
        child.uffd.close()
        assert fork.uffd.closed


def waiting_threads(pid: int) -> int:
    """Return how many threads wait for a layout event to be read."""
    places = list(of_threads(pid, "wchan").values())
    return places.count("userfaultfd_event_wait_completion")


def test_blocking_one_is_refused() -> None:
    with Userfaultfd(nonblocking=False) as uffd, pytest.raises(ValueError):
        uffd.events()


def test_closed_one_is_refused() -> None:
    uffd = Userfaultfd()
    uffd.close()
    with pytest.raises(ClosedError):
        uffd.events()


def test_a_loop_that_is_busy_elsewhere_still_serves() -> None:
    run_child(beside_sockets)


def beside_sockets() -> None:
    """Faults are served while the loop echoes on a socket."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)

        async def echo() -> None:
            while line := await reader.readline():
                writer.write(line)

        async def serve(uffd: Userfaultfd) -> int:
            return len({resolve(uffd, event) async for event in uffd.events()})

        with FaultingChild(64) as child:
            echoing = asyncio.create_task(echo())
            serving = asyncio.create_task(serve(child.uffd))
            step = child.begin("touch", 0, 64 * PAGE)
            for number in range(64):
                line = b"%d\n" % number
                await asyncio.to_thread(theirs.sendall, line)
                assert await asyncio.to_thread(theirs.recv, 100) == line
            await asyncio.to_thread(step.done)
            child.uffd.close()
            assert await serving == 64
            theirs.close()
            await echoing
            writer.close()

    asyncio.run(main())


def left_in_a_loop(how: str) -> None:
    """A task waits for events in a loop that does not run any more, and keeps nobody away."""
    with Userfaultfd(features=Feature.EVENT_REMOVE) as uffd:

        async def first() -> object:
            async for event in uffd.events():
                return event
            return None

        loop = asyncio.new_event_loop()
        task: asyncio.Task[object] | None = loop.create_task(first(), name="reader")
        loop.run_until_complete(asyncio.sleep(0))
        gc.collect()
        if how == "stopped":
            named = r"the task 'reader' of <.*EventLoop"
            with pytest.raises(EventsBusyError, match=named):
                asyncio.run(first())
            with pytest.raises(EventsBusyError, match=named):
                Handler(uffd)
        if how != "dropped":
            loop.close()
        if how in ("forgotten", "dropped"):
            del loop, task
            gc.collect()
        with Region.anonymous(2 * PAGE) as region:
            uffd.register(region)
            uffd.zeropage(region.start, PAGE)
            dropping = Task(region.madvise, mmap.MADV_DONTNEED, 0, PAGE)
            assert isinstance(asyncio.run(asyncio.wait_for(first(), 10)), Remove)
            dropping.result()
            with Handler(uffd) as handler:
                handler.serve(region, BufferSource(b"x" * PAGE * 2))
                assert region.read(PAGE, 1) == b"x"


@pytest.mark.filterwarnings("ignore:unclosed event loop")
@pytest.mark.parametrize("how", ["kept", "forgotten", "dropped", "stopped"])
def test_a_task_of_a_loop_that_is_over(how: str) -> None:
    run_child(left_in_a_loop, how)


def kept_by_its_loop() -> None:
    with Userfaultfd(features=Feature.EVENT_REMOVE) as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        uffd.zeropage(region.start, PAGE)
        found: list[object] = []

        async def read() -> None:
            async for event in uffd.events():
                found.append(event)

        async def main() -> None:
            asyncio.get_running_loop().call_soon(asyncio.ensure_future, read())
            for _ in range(3):
                await asyncio.sleep(0.01)
                gc.collect()
            await asyncio.to_thread(region.madvise, mmap.MADV_DONTNEED, 0, PAGE)

        asyncio.run(main())
        assert [type(event) for event in found] == [Remove]


def test_a_task_that_only_its_loop_keeps() -> None:
    run_child(kept_by_its_loop)
