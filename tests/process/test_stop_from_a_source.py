"""stop() where it would wait for itself, and what a stopped handler still reports."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from pyuffd import (
    AsyncSource,
    CallableSource,
    ClosedError,
    Handler,
    HandlerError,
    Region,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import FaultingChild
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE

pytestmark = needs_kernel_faults()

DATA = b"x" * PAGE
SOON_S = 4.0  # one that waited for itself would do so for the 10 s of stop()


def check_source(what: str) -> None:
    """A page source that stops its own handler gets an error at once, and the page arrives."""
    refused: list[BaseException] = []

    def read(offset: int, length: int) -> bytes:
        try:
            calls[what]()
        except HandlerError as error:
            refused.append(error)
        return DATA

    async def coroutine(offset: int, length: int) -> bytes:
        return read(offset, length)

    with Region.anonymous(2 * PAGE) as region, Userfaultfd() as uffd:
        handler = Handler(uffd, driver="thread")
        calls: dict[str, Callable[[], object]] = {
            "stop": handler.stop,
            "handler-close": handler.close,
            "uffd-close": uffd.close,
            "own-loop": handler.stop,
        }
        own_loop = what == "own-loop"
        handler.serve(region, AsyncSource(coroutine) if own_loop else CallableSource(read))
        handler.start()
        began = time.monotonic()
        assert region.read(0, PAGE) == DATA
        assert time.monotonic() - began < SOON_S
        assert "asyncio.to_thread" in str(refused[0]) or "page source" in str(refused[0])
        handler.stop()
        assert not uffd.closed


@pytest.mark.parametrize("what", ["stop", "handler-close", "uffd-close", "own-loop"])
def test_from_a_source(what: str) -> None:
    run_child(check_source, what)


def check_loop(name: str) -> None:
    """stop() in the loop's thread tells what to do; no page is lost, and the right way works."""

    async def fetch(offset: int, length: int) -> bytes:
        await asyncio.sleep(0.2)
        return DATA

    async def run() -> None:
        with Region.anonymous(2 * PAGE) as region, Userfaultfd() as uffd:
            handler = Handler(uffd, driver="thread")
            handler.serve(region, AsyncSource(fetch))
            handler.start()
            reading = asyncio.ensure_future(asyncio.to_thread(region.read, 0, PAGE))
            await asyncio.sleep(0.1)
            began = time.monotonic()
            with pytest.raises(HandlerError, match=r"loop's own thread.*asyncio.to_thread"):
                (uffd if name == "uffd" else handler).close()
            assert time.monotonic() - began < SOON_S
            await asyncio.to_thread(handler.stop)
            assert await reading == DATA

    asyncio.run(run())


@pytest.mark.parametrize("name", ["handler", "uffd"])
def test_in_the_loops_thread(name: str) -> None:
    run_child(check_loop, name)


def check_other_loop() -> None:
    """The loop runs in another thread, which is free meanwhile."""

    async def fetch(offset: int, length: int) -> bytes:
        return DATA

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def run() -> None:
        with (
            Region.anonymous(PAGE) as region,
            Userfaultfd() as uffd,
            Handler(uffd, driver="thread") as handler,
        ):
            handler.serve(region, AsyncSource(fetch, loop=loop))
            assert await asyncio.to_thread(region.read, 0, PAGE) == DATA

    asyncio.run(run())


def test_beside_another_loop() -> None:
    run_child(check_other_loop)


# After stop()


def check_exited(driver: str, exits: bool) -> None:
    with FaultingChild(PAGE) as child:
        handler = Handler(child.uffd, driver=driver)  # type: ignore[arg-type]
        handler.serve(child.region, ZeroSource())
        handler.start()
        if exits:
            child.kill()
        handler.stop()
        assert handler.owner_exited is exits
        with pytest.raises(ClosedError):
            assert handler.spaces


@pytest.mark.crossing
@pytest.mark.parametrize("exits", [True, False], ids=["exits", "lives"])
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_owner_exited_after_stop(driver: str, exits: bool) -> None:
    run_child(check_exited, driver, exits)
