"""Closing a region while other threads wait in its methods: they raise, and nothing crashes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyuffd
from pyuffd import (
    AsyncSource,
    ClosedError,
    Feature,
    Handler,
    HandlerError,
    PagePoisonedError,
    Region,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import wait_until

ACCESSES: dict[str, Callable[[Region], object]] = {
    "read": lambda region: region.read(PAGE, 4),
    "write": lambda region: region.write(PAGE, b"data"),
    "fill": lambda region: region.fill(1, PAGE, PAGE),
    "touch": lambda region: region.touch(PAGE),
    "digest": lambda region: region.digest("sha256"),
    "part": lambda region: region[PAGE:].read(),
}


def waits(thread_id: int | None) -> bool:
    return "handle_userfault" in Path(f"/proc/self/task/{thread_id}/wchan").read_text()


def begun(access: Callable[[Region], object], region: Region, found: list[Any]) -> threading.Thread:
    """Start a thread that waits in the access."""

    def run() -> None:
        try:
            found.append(access(region))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: waits(thread.native_id), "the thread waits")
    return thread


def close_each() -> None:
    for name, access in ACCESSES.items():
        region, found = Region.memfd(2 * PAGE), list[Any]()
        start = region.start
        # Not started: nobody fills the page, and close() poisons it.
        with Userfaultfd() as uffd, Handler(uffd, autostart=False) as handler:
            handler.serve(region, ZeroSource())
            thread = begun(access, region, found)
            region.close()
            thread.join()
        assert isinstance(found[0], PagePoisonedError | ClosedError | type(None) | bytes), name
        del region
        assert f"{start:x}-" not in Path("/proc/self/maps").read_text(), name


@needs(Feature.POISON)
def test_close() -> None:
    run_child(close_each)


def close_without_handler() -> None:
    """The thread waits until the userfaultfd is closed; the memory stays so long."""
    region, found = Region.anonymous(2 * PAGE), list[Any]()
    with Userfaultfd() as uffd:
        uffd.register(region)
        thread = begun(ACCESSES["read"], region, found)
        region.close()
    thread.join()
    assert found == [bytes(4)]


@needs(Feature(0))
def test_close_without_a_handler() -> None:
    run_child(close_without_handler)


def close_in_the_loop() -> None:
    go_on = asyncio.Event()

    async def page(offset: int, length: int) -> bytes:
        del offset
        await go_on.wait()
        return b"x" * length

    async def main() -> None:
        memory = pyuffd.lazy(
            AsyncSource(page, length=2 * PAGE), driver="thread", stall_timeout_s=60.0
        )
        reader = asyncio.create_task(asyncio.to_thread(memory.read, 0, 4))
        while not memory.handler.stats().requests:
            await asyncio.sleep(0.01)
        with pytest.raises(HandlerError, match="own thread"):
            memory.close()
        assert not memory.closed
        assert not memory.uffd.closed
        go_on.set()
        assert await reader == b"xxxx"
        await asyncio.to_thread(memory.close)
        assert memory.closed

    asyncio.run(main())


@needs(Feature.POISON)
def test_close_in_the_loop_of_its_source() -> None:
    run_child(close_in_the_loop)
