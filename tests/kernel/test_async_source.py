"""AsyncSource: pages from coroutines of a running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import math
import os
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyuffd import (
    AsyncSource,
    CallableSource,
    Feature,
    Handler,
    HandlerError,
    PagePoisonedError,
    Region,
    Userfaultfd,
    lazy,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests.kernel._serving import is_lost
from tests.process._pitfalls import Pages

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 16
DATA = Pages(PAGES, PAGE)

pytestmark = needs(Feature(0))

Fetch = Callable[[int, int], Awaitable[bytes]]


@contextlib.asynccontextmanager
async def served(fetch: Fetch, **options: Any) -> AsyncIterator[tuple[Handler, Region]]:
    """A region served by a coroutine function of the running loop."""
    with Region.anonymous(PAGES * PAGE) as region, Userfaultfd() as uffd:
        async with Handler(uffd, driver="thread", **options) as handler:
            handler.serve(region, AsyncSource(fetch))
            handler.start()
            yield handler, region


async def read(region: Region, index: int) -> bytes:
    """Read a page in another thread, while the loop runs."""
    return await asyncio.to_thread(region.read, index * PAGE, PAGE)


async def lost(region: Region, index: int) -> bool:
    return await asyncio.to_thread(is_lost, region, index * PAGE, PAGE)


def in_loop(function: Callable[[], Any]) -> None:
    asyncio.run(function())


async def plain() -> None:
    async def fetch(offset: int, length: int) -> bytes:
        await asyncio.sleep(0)
        return DATA.all[offset : offset + length]

    async with served(fetch) as (handler, region):
        assert await read(region, 5) == DATA[5]
        assert await asyncio.to_thread(handler.populate, region) == (PAGES - 1) * PAGE
        assert await asyncio.to_thread(region.read) == DATA.all


def test_pages_from_coroutines() -> None:
    run_child(in_loop_of, "plain")


async def together() -> None:
    """Every worker runs a coroutine: none returns before all have begun."""
    workers = 4  # fewer than the threads of asyncio.to_thread
    begun = 0
    all_begun = asyncio.Event()

    async def fetch(offset: int, length: int) -> bytes:
        nonlocal begun
        begun += 1
        if begun == workers:
            all_begun.set()
        await all_begun.wait()
        return DATA.all[offset : offset + length]

    async with served(fetch, workers=workers) as (_, region):
        found = await asyncio.gather(*(read(region, index) for index in range(workers)))
        assert found == [DATA[index] for index in range(workers)]


def test_many_pages_at_once() -> None:
    run_child(in_loop_of, "together")


async def raises() -> None:
    error = KeyError("no such page")

    async def fetch(offset: int, length: int) -> bytes:
        if offset == PAGE:
            raise error
        return DATA.all[offset : offset + length]

    with pytest.raises(HandlerError) as caught:
        async with served(fetch) as (_, region):
            start = region.start
            assert await lost(region, 1)
            assert await read(region, 2) == DATA[2]
    assert caught.value.start == start + PAGE
    assert caught.value.__cause__ is error


def test_exception() -> None:
    run_child(in_loop_of, "raises")


async def cancelled() -> None:
    """A cancelled coroutine loses its page, and no thread keeps waiting."""
    tasks: dict[int, asyncio.Task[Any]] = {}
    begun = asyncio.Semaphore(0)

    async def fetch(offset: int, length: int) -> bytes:
        if offset < 3 * PAGE:
            task = asyncio.current_task()
            assert task is not None
            tasks[offset] = task
            begun.release()
            await asyncio.Event().wait()
        return DATA.all[offset : offset + length]

    with pytest.raises(HandlerError) as caught:
        async with served(fetch, workers=4, stall_timeout_s=60.0) as (handler, region):
            start = region.start
            readers = [asyncio.create_task(lost(region, index)) for index in range(3)]
            for _ in readers:
                await begun.acquire()
            assert await read(region, 8) == DATA[8]
            for task in tasks.values():
                task.cancel()
            assert await asyncio.gather(*readers) == [True] * 3
            assert handler.stats().failed == 3
            assert await read(region, 9) == DATA[9]
    assert caught.value.start in [start, start + PAGE, start + 2 * PAGE]
    assert isinstance(caught.value.__cause__, (asyncio.CancelledError, Exception))


def test_cancelled_coroutines() -> None:
    run_child(in_loop_of, "cancelled")


async def cancelled_block() -> None:
    """Cancelling the serving task stops the handler; waiting threads still get their data."""
    begun = asyncio.Event()
    go = asyncio.Event()

    async def fetch(offset: int, length: int) -> bytes:
        begun.set()
        await go.wait()
        return DATA.all[offset : offset + length]

    with Region.anonymous(PAGES * PAGE) as region, Userfaultfd() as uffd:
        handler = Handler(uffd, driver="thread", stall_timeout_s=60.0)

        async def serve() -> None:
            async with handler:
                handler.serve(region, AsyncSource(fetch))
                handler.start()
                await asyncio.Event().wait()

        server = asyncio.create_task(serve())
        reader = asyncio.create_task(read(region, 3))
        await begun.wait()
        server.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await server
        assert await reader == DATA[3]
        assert "stopped" in repr(handler)
        assert await lost(region, 4)


def test_cancelled_server() -> None:
    run_child(in_loop_of, "cancelled_block")


async def cancelled_twice() -> None:
    """However often the task is cancelled, the handler stops, and `lazy` closes everything."""
    for turns in range(4):
        for is_lazy in (False, True):
            left = asyncio.Event()

            async def fetch(offset: int, length: int, until: asyncio.Event = left) -> bytes:
                await until.wait()
                return DATA.all[offset : offset + length]

            serving = (
                lazy(fetch, PAGES * PAGE, driver="thread", stall_timeout_s=60.0)
                if is_lazy
                else served(fetch, stall_timeout_s=60.0)
            )
            made: list[Any] = []

            async def serve(serving: Any = serving, made: list[Any] = made) -> None:
                async with serving as value:
                    made[:] = value if isinstance(value, tuple) else (value.handler, value)
                    await asyncio.Event().wait()

            server = asyncio.create_task(serve())
            while not made:
                await asyncio.sleep(0)
            handler, region = made
            reader = asyncio.create_task(asyncio.to_thread(region.read, 0, PAGE))
            while handler.stats().requests == 0:
                await asyncio.sleep(0.01)
            for _ in range(3):
                server.cancel()
                for _ in range(turns):
                    await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await server
            with pytest.raises(PagePoisonedError):
                await reader
            while "stopped" not in repr(handler) or (is_lazy and not region.closed):
                await asyncio.sleep(0.01)


def test_cancelled_twice() -> None:
    run_child(in_loop_of, "cancelled_twice", budget_s=30)


async def full_executor() -> None:
    """All threads of the loop's executor may wait, for pages of this handler or for its end."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    over = threading.Event()
    waiter = loop.run_in_executor(None, over.wait)

    async def fetch(offset: int, length: int) -> bytes:
        return DATA.all[offset : offset + length]

    async with served(fetch) as (handler, _):
        pass
    assert "stopped" in repr(handler)
    async with lazy(fetch, PAGES * PAGE, driver="thread") as memory:
        pass
    assert memory.closed
    over.set()
    await waiter


def test_full_executor() -> None:
    run_child(in_loop_of, "full_executor")


async def busy() -> None:
    """Pages arrive while tasks keep the loop busy, and the tasks continue."""
    ticks = 0
    over = asyncio.Event()

    async def worker() -> None:
        nonlocal ticks
        while not over.is_set():
            end = time.monotonic() + 0.0005
            while time.monotonic() < end:
                pass
            ticks += 1
            await asyncio.sleep(0)

    async def fetch(offset: int, length: int) -> bytes:
        await asyncio.sleep(0.001)
        return DATA.all[offset : offset + length]

    async with served(fetch, workers=4, stall_timeout_s=10.0) as (_, region):
        others = [asyncio.create_task(worker()) for _ in range(4)]
        found = await asyncio.gather(*(read(region, index) for index in range(PAGES)))
        assert found == [DATA[index] for index in range(PAGES)]
        seen = ticks
        while ticks < seen + 10:
            await asyncio.sleep(0)
        over.set()
        await asyncio.gather(*others)


def test_beside_busy_tasks() -> None:
    run_child(in_loop_of, "busy")


async def from_the_loop() -> None:
    """A page touched by the loop's own thread cannot arrive: an error, not a hang."""

    async def fetch(offset: int, length: int) -> bytes:
        return DATA.all[offset : offset + length]

    with pytest.raises(HandlerError):
        async with served(fetch, stall_timeout_s=1) as (_, region):
            assert is_lost(region, 0, PAGE)
            assert await read(region, 1) == DATA[1]


def test_fault_in_the_loops_own_thread() -> None:
    run_child(in_loop_of, "from_the_loop")


def loop_is_closed(waits: bool) -> None:
    """A source whose loop has ended fails its pages; no thread waits forever, nor for the limit."""
    asked = threading.Event()

    async def fetch(offset: int, length: int) -> bytes:
        if offset:
            asked.set()
            await asyncio.sleep(1000)
        return DATA.all[offset : offset + length]

    loop = asyncio.new_event_loop()
    source = AsyncSource(fetch, loop=loop)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    with (
        warnings.catch_warnings(),
        Region.anonymous(PAGES * PAGE) as region,
        Userfaultfd() as uffd,
        Handler(uffd, driver="thread", stall_timeout_s=math.inf) as handler,
    ):
        warnings.simplefilter("error")
        handler.serve(region, source)
        assert region.read(0, PAGE) == DATA[0]
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            if waits:
                waiting = pool.submit(is_lost, region, PAGE, PAGE)
                assert asked.wait(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            assert waiting is None or waiting.result()
        assert is_lost(region, 2 * PAGE, PAGE)
        gc.collect()  # of a coroutine that was never awaited
        with pytest.raises(HandlerError, match="could not be read"):
            handler.stop()


@pytest.mark.parametrize("waits", [False, True])
def test_closed_loop(waits: bool) -> None:
    run_child(loop_is_closed, waits)


def without_a_loop() -> None:
    """Without a running or given loop the source has one of its own, in a thread."""

    async def fetch(offset: int, length: int) -> bytes:
        await asyncio.sleep(0)
        return DATA.all[offset : offset + length]

    with (
        Region.anonymous(PAGES * PAGE) as region,
        Userfaultfd() as uffd,
        Handler(uffd, driver="thread", workers=2) as handler,
    ):
        handler.serve(region, AsyncSource(fetch))
        handler.start()
        assert region.read() == DATA.all


def test_without_a_loop() -> None:
    run_child(without_a_loop)


def test_arguments() -> None:
    async def fetch(offset: int, length: int) -> bytes:
        return bytes(length)

    with pytest.raises(ValueError):
        AsyncSource(functools.partial(bytes, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        CallableSource(fetch)  # type: ignore[arg-type]
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(ValueError):
            AsyncSource(fetch, loop=loop, length=0)
        assert AsyncSource(fetch, loop=loop, length=PAGE).length == PAGE
    finally:
        loop.close()


def in_loop_of(name: str) -> None:
    in_loop(globals()[name])
