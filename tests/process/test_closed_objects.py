"""Objects that were closed: a `with` statement says so, and close() does nothing."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import pyuffd
from pyuffd import (
    ClosedError,
    DirtyTracker,
    Feature,
    FileSource,
    Handler,
    Pagemap,
    Process,
    Region,
    Snapshot,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import FaultingChild
from tests._memory import PAGE


class World:
    """What the objects are made of."""

    def __init__(self, stack: ExitStack, folder: str) -> None:
        self.stack, self.folder = stack, folder
        child = subprocess.Popen(["sleep", "60"])
        stack.callback(child.wait)
        stack.callback(child.kill)
        self.process = stack.enter_context(Process(child.pid))
        Snapshot.take(self.process, f"{folder}/taken", method="stopped")

    def handler(self) -> Handler:
        handler = self.stack.enter_context(Handler(self.uffd()))
        handler.serve(self.region(), ZeroSource())
        return handler

    def uffd(self) -> Userfaultfd:
        return self.stack.enter_context(Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP))

    def region(self) -> Region:
        return self.stack.enter_context(Region.anonymous(2 * PAGE))

    def snapshot(self) -> Snapshot:
        return self.stack.enter_context(Snapshot.open(f"{self.folder}/taken"))

    def restore(self) -> pyuffd.Restore:
        snapshot = self.snapshot()
        found = next(one for one in snapshot.regions if one.length <= 64 * PAGE)
        memory = self.stack.enter_context(Region.anonymous(found.length))
        return snapshot.restore([(found, memory)], gaps="zeros")

    def handover(self) -> pyuffd.Handover:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pyuffd.send_uffd(ours, self.uffd(), [])
            return pyuffd.recv_uffd(theirs)


@pytest.fixture
def world(tmp_path: Any) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack, str(tmp_path))


MAKE: dict[str, Callable[[World], Any]] = {
    "DirtyTracker": lambda w: DirtyTracker(w.process),
    "FileSource": lambda _: FileSource(__file__),
    "Handler": World.handler,
    "Handover": World.handover,
    "LazyRegion": lambda _: pyuffd.lazy(bytes(PAGE)),
    "Pagemap": lambda _: Pagemap(),
    "Process": lambda w: Process(w.process.pid),
    "Region": lambda _: Region.anonymous(2 * PAGE),
    "Restore": World.restore,
    "Snapshot": World.snapshot,
    "Stop": lambda w: w.process.stopped(),
    "UnixListener": lambda w: pyuffd.listen_unix(f"{w.folder}/socket"),
    "Userfaultfd": lambda _: Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP),
}
# A round of a tracker owns nothing.
NEVER_CLOSED = ("DirtyRound",)
OTHERS: dict[str, Callable[[World], Any]] = {
    "Hold": lambda w: w.handler().hold(),
    "FaultingChild": lambda _: FaultingChild(),
    "unstarted": lambda w: Handler(w.uffd(), autostart=False),
    "part": lambda w: w.region()[:PAGE],
}


def test_the_table_is_complete() -> None:
    public = [getattr(pyuffd, name) for name in pyuffd.__all__]
    owners = {one.__name__ for one in public if hasattr(one, "__enter__")}
    assert owners - set(NEVER_CLOSED) == set(MAKE)


@pytest.mark.parametrize("name", [*MAKE, *OTHERS])
def test_a_with_statement(name: str, world: World) -> None:
    """It succeeded, and the first use in its block failed, if there was one."""
    closed = (MAKE | OTHERS)[name](world)
    closed.close()
    with pytest.raises(ClosedError) as caught, closed:
        raise AssertionError("the block runs")
    assert str(caught.value)
    closed.close()
    assert repr(closed)


async def enter(closed: Any) -> None:
    async with closed:
        raise AssertionError("the block runs")


@pytest.mark.parametrize("name", ["Handler", "LazyRegion"])
def test_an_async_with_statement(name: str, world: World) -> None:
    closed = MAKE[name](world)
    closed.close()
    with pytest.raises(ClosedError):
        enter(closed).send(None)
