"""No descriptor is left for a fork's userfaultfd: the fork waits, which is said on stderr."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Literal

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Fork,
    Handler,
    HandlerError,
    Region,
    Userfaultfd,
    _memory,
)
from pyuffd.testing import FaultingChild, needs
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._gil import needs_gil
from tests._memory import PAGE
from tests._tasks import of_threads
from tests.kernel._serving import wait_until

Driver = Literal["native", "thread", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "thread", "process")
LACKS_S = 1.0
RETRY_LIMIT_S = 5.0  # of a deferred fault
HARD = 4096

pytestmark = needs(Feature.EVENT_FORK)


def descendants(pid: int) -> Iterator[int]:
    for children in of_threads(pid, "children").values():
        for child in map(int, children.split()):
            yield child
            yield from descendants(child)


@contextlib.contextmanager
def no_descriptors(*pids: int) -> Iterator[None]:
    """Leave these processes no descriptor below their limit."""
    for pid in pids:
        free = 0
        while os.path.lexists(f"/proc/{pid}/fd/{free}"):
            free += 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, HARD))
    try:
        yield
    finally:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (HARD, HARD))


def source(driver: Driver, length: int) -> BufferSource | FileSource | CallableSource:
    if driver == "process":
        with open(os.memfd_create("content"), "w+b") as file:
            file.write(b"c" * length)
            file.flush()
            return FileSource(file.fileno())
    if driver == "thread":
        return CallableSource(lambda _, size: b"c" * size)
    return BufferSource(b"c" * length)


def waits(driver: Driver, lacks_s: float) -> None:
    with (
        FaultingChild(pages=4, features=Feature.EVENT_FORK) as child,
        Handler(child.uffd, driver=driver) as handler,
    ):
        handler.serve(child.region, source(driver, 4 * PAGE))
        readers = list(descendants(os.getpid())) if driver == "process" else [os.getpid()]
        if driver == "process":
            readers.remove(child.pid)
        cpu = time.process_time()
        with no_descriptors(*readers):
            fork = child.begin("fork", "read", PAGE, 2)
            time.sleep(lacks_s)
            assert fork.running
            # The layout changes until then, so it is deferred, for longer than other faults.
            other = child.begin("read", 0, 2, thread=1)
            time.sleep(lacks_s)
            assert other.running
        assert other.done(20 * SCALE) == b"cc"
        assert fork.done(20 * SCALE).value == b"cc"
        assert time.process_time() - cpu < lacks_s / 2
        stats = handler.stats()
        assert stats.forks == 1
        assert stats.failed == 0
        assert 1 <= stats.deferred <= 4


@pytest.mark.parametrize("driver", DRIVERS)
def test_fork_waits(driver: Driver) -> None:
    ended = run_child(waits, driver, LACKS_S, budget_s=30)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("pyuffd: ")]
    assert "RLIMIT_NOFILE of process " in line
    assert f"hard limit {HARD}" in line


def test_faults_beside_it_are_not_given_up() -> None:
    run_child(waits, "native", RETRY_LIMIT_S + 1, budget_s=40)


def stops(driver: Driver) -> None:
    with FaultingChild(pages=4, features=Feature.EVENT_FORK) as child:
        handler = Handler(child.uffd, driver=driver)
        handler.start()
        handler.serve(child.region, source(driver, 4 * PAGE))
        with no_descriptors(os.getpid()):
            fork = child.begin("fork")
            wait_until(lambda: handler.stats().deferred > 0, "its event cannot be read")
            began = time.monotonic()
            with contextlib.suppress(HandlerError):
                handler.stop(timeout_s=1)
            assert time.monotonic() - began < 10 * SCALE
        for event in child.uffd.read_events():
            assert isinstance(event, Fork)
            event.uffd.close()
        fork.done(20 * SCALE)


@pytest.mark.parametrize("driver", ["native", "thread"])
def test_stop_is_bounded(driver: Driver) -> None:
    run_child(stops, driver, budget_s=30)


def read_by_hand(is_imported: bool) -> None:
    with FaultingChild(pages=4, features=Feature.EVENT_FORK) as child:
        with no_descriptors(os.getpid()):
            fork = child.begin("fork")
            time.sleep(LACKS_S)
            if not is_imported:  # and cannot be, without a descriptor
                del sys.modules["resource"]
            with pytest.raises(OSError, match="RLIMIT_NOFILE") as caught:
                child.uffd.read_events()
            assert caught.value.errno == errno.EMFILE
            assert fork.running
        (event,) = child.uffd.read_events()
        assert isinstance(event, Fork)
        event.uffd.close()
        fork.done()


def read_by_a_task() -> None:
    async def first(child: FaultingChild) -> None:
        async for event in child.uffd.events():
            assert isinstance(event, Fork)
            event.uffd.close()
            return

    async def main(child: FaultingChild) -> None:
        child.uffd.events()  # which imports its module
        with no_descriptors(os.getpid()):
            fork = child.begin("fork")
            with pytest.raises(OSError, match="RLIMIT_NOFILE") as caught:
                await first(child)
            assert caught.value.errno == errno.EMFILE
        await first(child)
        fork.done()

    with FaultingChild(pages=4, features=Feature.EVENT_FORK) as child:
        asyncio.run(main(child))


@pytest.mark.parametrize("is_imported", [True, False], ids=["imported", "not-imported"])
def test_a_reader_is_told_and_loses_nothing(is_imported: bool) -> None:
    run_child(read_by_hand, is_imported)


def test_a_task_is_told_and_loses_nothing() -> None:
    run_child(read_by_a_task)


def below_what_is_open(driver: Driver, first: int) -> None:
    # The library's descriptors get the lowest free numbers.
    resource.setrlimit(resource.RLIMIT_NOFILE, (HARD, HARD))
    taken = [os.dup(2)]
    while taken[-1] < first:
        taken.append(os.dup(2))
    with Userfaultfd() as uffd, Region.anonymous(8 * PAGE) as region:
        handler = Handler(uffd, driver=driver)
        with handler:
            handler.serve(region, source(driver, len(region)))
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, HARD))
            for page in range(4):
                assert region.read(page * PAGE, PAGE) == b"c" * PAGE
            time.sleep(0.1)
            before = time.process_time()
            time.sleep(1)
            spent = time.process_time() - before
            resource.setrlimit(resource.RLIMIT_NOFILE, (HARD, HARD))
            assert spent < 0.05  # a busy machine gives a thread that does not sleep more
        assert handler.stats().faults["missing"] == 4


@pytest.mark.parametrize("first", [0, 1500])  # beyond what the macros of select(2) allow for
@pytest.mark.parametrize("driver", ["native", "thread"])
def test_a_limit_below_what_is_open(driver: Driver, first: int) -> None:
    """poll(2) refuses more descriptors than the limit; the driver's thread never slept then."""
    run_child(below_what_is_open, driver, first)


def waits_with_the_gil() -> None:
    with (
        Userfaultfd() as uffd,
        Region.anonymous(8 * PAGE) as region,
        Handler(uffd, driver="thread", stall_timeout_s=1) as handler,
    ):
        handler.serve(region, source("thread", len(region)))
        region.read(0, 1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, HARD))
        for page in range(1, 4):
            region.read(page * PAGE, 1)
        bytes(region.memoryview()[4 * PAGE : 4 * PAGE + 1])


@needs_gil(there=True)
def test_a_stall_below_what_is_open() -> None:
    """The thread that ends a stall polls too."""
    ended = run_child(waits_with_the_gil, expect=-signal.SIGBUS, budget_s=20)
    assert "the source has not answered in time; it is poisoned" in ended.stderr


def closes_what_stays_registered(how: str) -> None:
    """While an event cannot be read the kernel refuses poison, so ranges stay registered."""
    events = Feature.EVENT_FORK | Feature.EVENT_UNMAP
    with Userfaultfd(features=events) as uffd, Region.anonymous(4 * PAGE) as region:
        handler = Handler(uffd)
        handler.serve(region, b"A" * region.length)
        handler.start()
        region.touch(0, PAGE)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            thread = threading.Thread(
                target=_memory.Agent, args=(theirs.fileno(), ours.fileno()), daemon=True
            )
            with no_descriptors(os.getpid()):
                thread.start()
                wait_until(lambda: handler.stats().deferred > 0, "the fork waits")
                began = time.monotonic()
                with pytest.raises(HandlerError, match="stay registered"):
                    handler.stop(timeout_s=0.2)
                if how == "uffd":
                    uffd.close()
                if how == "part":
                    region[PAGE:].close()
                region.close()
                assert time.monotonic() - began < 8
            assert thread.is_alive() or how == "uffd"
            if how != "uffd":
                (fork,) = uffd.read_events()
                assert isinstance(fork, Fork)
                fork.uffd.close()


@needs(Feature.EVENT_UNMAP)
@pytest.mark.parametrize("how", ["region", "part", "uffd"])
def test_closing_what_stays_registered(how: str) -> None:
    """Nobody reads the event of its unmapping."""
    run_child(closes_what_stays_registered, how)
