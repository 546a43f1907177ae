"""The inline driver in a fork: the child has handlers of its own, not its parent's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pytest

from pyuffd import AsyncSource, BufferSource, ClosedError, Feature, Handler, Region, Userfaultfd
from pyuffd.testing import needs
from tests._child import run_child
from tests.kernel._serving import in_fork, peek, wait_until

PAGE = 4096

pytestmark = needs(Feature.SIGBUS)


def serve_own(fill: int) -> None:
    """Serve and read memory of this process's own."""
    with (
        Userfaultfd(features=Feature.SIGBUS) as uffd,
        Region.anonymous(4 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        assert handler.driver == "inline"
        handler.serve(region, BufferSource(bytes([fill]) * 4 * PAGE))
        assert region.read() == bytes([fill]) * 4 * PAGE
        assert handler.stats().faults["missing"] == 4


def forks(depth: int) -> None:
    """Each generation has its own handlers, while its parent's run."""
    with (
        Userfaultfd(features=Feature.SIGBUS) as uffd,
        Region.anonymous(4 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, BufferSource(b"p" * 4 * PAGE))
        assert region.read(0, 1) == b"p"

        def child() -> None:
            # in_fork() has replaced the action, which no program does.
            serve_own(depth)
            # The parent's range is not registered here, and not served.
            assert region.read(0, 1) == b"p"
            assert region.read(PAGE, 1) == b"\0"
            serve_own(depth + 1)
            if depth:
                forks(depth - 1)

        assert in_fork(child) == 0
        assert region.read(2 * PAGE, 1) == b"p"


@pytest.mark.parametrize("depth", [0, 2])
def test_forks(depth: int) -> None:
    run_child(forks, depth)


def keeps_the_action() -> None:
    """The fork inherits the action; a SIGBUS that is not pyuffd's still kills."""
    with (
        Userfaultfd(features=Feature.SIGBUS) as uffd,
        Region.anonymous(PAGE) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, BufferSource(b"p" * PAGE))
        pid = os.fork()
        if pid == 0:
            serve_own(1)
            fd = os.memfd_create("short")
            os.ftruncate(fd, PAGE)
            with Region.file(fd, PAGE) as short:
                os.ftruncate(fd, 0)
                peek(short)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS
        assert region.read(0, 1) == b"p"


def test_keeps_the_action() -> None:
    run_child(keeps_the_action)


def while_others_fault() -> None:
    """A thread that does not exist in the child was inside the handler or its heap."""
    with (
        Userfaultfd(features=Feature.SIGBUS) as uffd,
        Region.anonymous(4 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, BufferSource(b"p" * 4 * PAGE))
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                region.madvise(4)
                region.read()
                with Region.anonymous(PAGE) as other:
                    handler.serve(other, BufferSource(b"x" * PAGE))
                    other.read()

        threads = [threading.Thread(target=churn) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: handler.stats().faults["missing"] > 20, "they are at it")
        for _ in range(20):
            assert in_fork(lambda: serve_own(3)) == 0
        stop.set()
        for thread in threads:
            thread.join()


def test_while_others_fault() -> None:
    run_child(while_others_fault, budget_s=20)


def by_multiprocessing() -> None:
    with (
        Userfaultfd(features=Feature.SIGBUS) as uffd,
        Region.anonymous(PAGE) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, BufferSource(b"p" * PAGE))
        process = multiprocessing.get_context("fork").Process(target=serve_own, args=(5,))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert region.read(0, 1) == b"p"


def test_multiprocessing() -> None:
    run_child(by_multiprocessing)


async def answer(offset: int, length: int) -> bytes:
    return b"a" * length


def async_source_in_a_fork() -> None:
    """The loop that runs coroutines is in a thread, which a fork does not have."""
    source = AsyncSource(answer)
    assert source.read(0, 2) == b"aa"

    def child() -> None:
        assert source.read(0, 2) == b"aa"

    assert in_fork(child) == 0


def test_async_source_in_a_fork() -> None:
    run_child(async_source_in_a_fork)


def parents_lock() -> None:
    """A handler in a fork refuses at once, whatever its parent's threads were doing."""
    with (
        Userfaultfd() as uffd,
        Region.anonymous(PAGE) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, BufferSource(b"p" * PAGE))
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with handler._lock:
                held.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()

        def child() -> None:
            for call in (
                lambda: handler.serve(region, BufferSource(b"c" * PAGE)),
                lambda: handler.unserve(region),
                lambda: handler.writeprotect(region),
                handler.start,
                handler.stats,
            ):
                with pytest.raises(ClosedError):
                    call()
            handler.stop()

        assert in_fork(child) == 0
        done.set()
        thread.join()


def test_parents_lock() -> None:
    run_child(parents_lock)
