"""Handlers stop and processes die while faults wait: data or SIGBUS, never zeros."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Handler,
    HandlerError,
    PageSource,
    Region,
    RegisterMode,
    Userfaultfd,
)
from pyuffd.testing import (
    DelayedSource,
    FailingSource,
    FaultingChild,
    GatedSource,
    WrongLengthSource,
)
from pyuffd.testing._needs import needs_kernel_faults
from tests._barriers import Point, holding
from tests._child import run_child
from tests.kernel._faults import Task
from tests.kernel._serving import (
    ending_thread,
    is_lost,
    wait_for_stalled,
    wait_in_system_call,
    wait_until,
)
from tests.process._pitfalls import (
    ALL,
    ANON,
    BOTH,
    EVENTS,
    EVERY,
    SMALL,
    Driver,
    Pages,
    Setting,
    checks_of,
    losing,
    page,
    pitfall,
    reading,
)

pytestmark = needs_kernel_faults()

SYS_CLOCK_NANOSLEEP = 230
THREAD: tuple[Driver, ...] = ("thread",)


# stop()


@pitfall(4, "stop-drains", drivers=ALL, memory=EVERY)
def drains(at: Setting) -> None:
    """Threads that wait when stop() is called get their pages."""
    with at.serving() as (handler, memory):
        region = memory.pages(4)
        data = Pages(4, memory.page_size)
        handler.serve(region, delayed(at, data))
        readers = [reading(region, index) for index in range(3)]
        wait_for_stalled(handler.uffd, 3)
        handler.start()
        handler.stop()
        assert [reader.result() for reader in readers] == [data[index] for index in range(3)]
        assert is_lost(region, 3 * data.size)


@pitfall(4, "stop-without-draining", memory=EVERY)
def refuses(at: Setting) -> None:
    """stop(drain=False) poisons pages with waiters; unregistering alone would give them zeros."""
    with at.serving() as (handler, memory):
        region = memory.pages(4)
        data = Pages(4, memory.page_size)
        handler.serve(region, at.source(data.all))
        handler.start()
        with holding(Point.STEP_APPLIED) as point:
            readers = [losing(region, index) for index in range(3)]
            point.wait()
            wait_for_stalled(handler.uffd, 3)
            stopper = Task(handler.stop, False)
            # stop() refuses faults, and waits for the leader.
            wait_in_system_call(ending_thread(), SYS_CLOCK_NANOSLEEP)
        stopper.result()
        assert [reader.result() for reader in readers] == [True] * 3


@pitfall(4, "stop-without-a-slow-source", drivers=THREAD, memory=SMALL)
def abandons(at: Setting) -> None:
    """stop(drain=False) poisons requested pages without waiting for their source."""
    with at.serving(workers=1) as (handler, memory):
        region = memory.pages(3)
        data = Pages(3, memory.page_size)
        gate = GatedSource(at.source(data.all))
        handler.serve(region, gate)
        handler.start()
        readers = [losing(region, 0), losing(region, 1)]
        gate.wait_for_reads(1)
        wait_for_stalled(handler.uffd, 2)
        stopper = Task(handler.stop, False)
        assert [reader.result() for reader in readers] == [True] * 2
        gate.open()
        stopper.result()
        assert is_lost(region, 0)


@pitfall(4, "unserve-under-a-slow-source", drivers=THREAD, memory=SMALL)
def unserves(at: Setting) -> None:
    """unserve() poisons requested pages; the late answer changes nothing."""
    with at.serving() as (handler, memory):
        region, other = memory.pages(2), memory.pages(1)
        data = Pages(2, memory.page_size)
        gate = GatedSource(at.source(data.all))
        handler.serve(region, gate)
        handler.serve(other, at.source(data.all))
        handler.start()
        reader = losing(region, 0)
        gate.wait_for_reads(1)
        handler.unserve(region)
        assert reader.result()
        gate.open()
        assert page(other, 0) == data[0]
        assert is_lost(region, 0, data.size)


@pitfall(4, "stop-behind-an-unserved-source", drivers=THREAD)
def stops_behind(at: Setting) -> None:
    """stop() waits for a source whose memory was unserved, and names it if it does not return."""
    for returns in (True, False):
        data = Pages(1, os.sysconf("SC_PAGE_SIZE"))
        gate = GatedSource(at.source(data.all))
        with (
            Userfaultfd() as uffd,
            Region.anonymous(data.size) as region,
            contextlib.ExitStack() as late,
        ):
            late.callback(gate.open)
            handler = Handler(uffd, driver=at.driver)
            handler.serve(region, gate)
            handler.start()
            reader = losing(region, 0)
            gate.wait_for_reads(1)
            handler.unserve(region)
            assert reader.result()
            if returns:
                threading.Timer(0.3, gate.open).start()
                handler.stop(timeout_s=30)
            else:
                with pytest.raises(HandlerError, match="the source of memory that was unserved"):
                    handler.stop(timeout_s=0.5)


@pitfall(4, "exception-in-the-body", drivers=ALL)
def exception(at: Setting) -> None:
    """The with statement stops like stop(): waiting threads get the content."""
    size = os.sysconf("SC_PAGE_SIZE")
    data = Pages(2, size)
    with Region.anonymous(2 * size) as region, Userfaultfd() as uffd:
        with pytest.raises(KeyError), Handler(uffd, driver=at.driver, autostart=False) as handler:
            handler.serve(region, delayed(at, data))
            reader = reading(region, 1)
            wait_for_stalled(uffd, 1)
            handler.start()
            raise KeyError("the body's own")
        assert reader.result() == data[1]


def delayed(at: Setting, data: Pages) -> PageSource:
    """A source that is slow if the driver calls Python."""
    source = at.source(data.all)
    return source if at.driver == "native" else DelayedSource(source, 0.1)


@pitfall(4, "stopped-while-sealed", memory=SMALL)
def sealed(at: Setting) -> None:
    """A fault between sealing and unregistering gets no zeros."""
    with at.served(3) as (handler, region, data):
        region.touch(0, 1)
        with holding(Point.UNSERVE_SEALED) as point:
            stopper = Task(handler.stop)
            point.wait()
            reader = losing(region, 2)
            assert reader.result()
        stopper.result()
        assert page(region, 0) == data[0]
        assert is_lost(region, data.size, 2 * data.size)


# Ends of the process

RUNNING = """
import os, signal, sys, threading, time
from pyuffd import *
def source(offset, length):
    if offset:
        waiting.set()
        threading.Event().wait()
    return b"a" * length
waiting = threading.Event()
uffd = Userfaultfd(features=Feature.EVENT_FORK | Feature.EVENT_REMOVE)
region = Region.anonymous(8192)
handler = Handler(uffd, driver={driver!r}, stall_timeout_s=60)
in_python = {driver!r} == "thread"
handler.serve(region, CallableSource(source) if in_python else BufferSource(b"a" * 8192))
handler.start()
assert region.read(0, 1) == b"a"
print("running", flush=True)
{more}
"""
STALLED = """
threading.Thread(target=region.read, daemon=True).start()
waiting.wait()
"""


@pytest.mark.parametrize("driver", BOTH)
def test_interpreter_exit(driver: Driver) -> None:
    ended = run_child(RUNNING.format(driver=driver, more=""))
    assert ended.stdout == "running\n"
    assert 'File "<child' not in ended.stderr


@pytest.mark.parametrize("driver", BOTH)
def test_exit_by_exception(driver: Driver) -> None:
    ended = run_child(RUNNING.format(driver=driver, more="raise KeyError('x')"), expect=1)
    assert "KeyError: 'x'" in ended.stderr


@pytest.mark.parametrize("how", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_exit_with_a_stalled_thread(how: str) -> None:
    """A thread that waits in the kernel does not keep its process alive."""
    status = 3 if "_exit" in how else -signal.SIGTERM
    run_child(RUNNING.format(driver="thread", more=STALLED + how), expect=status)


def test_interrupt_with_a_stalled_thread() -> None:
    """Ctrl-C works as usual, and the exit handlers stop the handler within its limits."""
    interrupt = "signal.pthread_kill(threading.get_ident(), signal.SIGINT); time.sleep(9)"
    source = RUNNING.format(driver="thread", more=STALLED + interrupt)
    source = source.replace("threading.Event().wait()", "time.sleep(1)")
    ended = run_child(source, expect=-signal.SIGINT)
    assert "KeyboardInterrupt" in ended.stderr


@pitfall(6, "owner-is-killed", drivers=ALL)
def owner_dies(at: Setting) -> None:
    """The userfaultfd of a dead process reports nothing; a pidfd does."""
    size = os.sysconf("SC_PAGE_SIZE")
    data = Pages(4, size)
    with FaultingChild(pages=4, mode=None, features=EVENTS) as child:
        gate = GatedSource(at.source(data.all), at=[2 * size])
        in_python = at.driver == "thread"
        with Handler(child.uffd, driver=at.driver, owner_pid=child.pid) as handler:
            handler.serve(child.region, gate if in_python else at.source(data.all))
            handler.start()
            assert child.run("read", size, 4) == data[1][:4]
            if in_python:
                child.begin("read", 2 * size, 4)
                gate.wait_for_reads(1)
            assert not handler.owner_exited
            child.kill()
            wait_until(lambda: handler.owner_exited, "the owner's exit is noticed")
            gate.open()
            # populate raises: the process for which to fill pages is gone.
            with pytest.raises(OSError) as caught:
                handler.populate(child.region)
            assert caught.value.errno in (errno.ESRCH, errno.EIO)
            handler.stop(drain=True)


@pitfall(6, "owner-was-dead-before", drivers=ALL)
def owner_was_dead(at: Setting) -> None:
    """pidfd_open fails with ESRCH: the handler starts and knows."""
    with FaultingChild(pages=1, mode=RegisterMode.MISSING) as child:
        child.kill()
        with Handler(child.uffd, driver=at.driver, owner_pid=child.pid) as handler:
            handler.start()
            assert handler.owner_exited


@pitfall(6, "one-of-two-owners-dies", drivers=ALL)
def one_of_two(at: Setting) -> None:
    """The death of one process does not end serving another one."""
    size = os.sysconf("SC_PAGE_SIZE")
    data = Pages(4, size)
    with (
        FaultingChild(pages=4, mode=None) as first,
        FaultingChild(pages=4, mode=None) as second,
        Handler(first.uffd, driver=at.driver, owner_pid=first.pid) as handler,
    ):
        handler.serve(first.region, at.source(data.all))
        handler.serve(second.region, at.source(data.all), uffd=second.uffd)
        handler.start()
        assert first.run("read", 0, 4) == second.run("read", 0, 4) == data[0][:4]
        first.kill()
        wait_until(lambda: handler.owner_exited, "the owner's exit is noticed")
        assert second.run("read", size, 4) == data[1][:4]
        assert handler.spaces == 2


# Slow and failing sources


@pitfall(16, "slow-pages-in-parallel", drivers=THREAD, memory=SMALL)
def parallel(at: Setting) -> None:
    """As many reads at once as workers; one after the other, the first would block all."""
    with at.serving(workers=8, stall_timeout_s=60.0) as (handler, memory):
        region = memory.pages(9)
        data = Pages(9, memory.page_size)
        gate = GatedSource(at.source(data.all), at=[i * data.size for i in range(7)])
        handler.serve(region, gate)
        handler.start()
        readers = [reading(region, index) for index in range(7)]
        assert sorted(gate.wait_for_reads(7)) == [i * data.size for i in range(7)]
        assert page(region, 8) == data[8]  # by the eighth
        gate.open()
        assert [reader.result() for reader in readers] == [data[i] for i in range(7)]


@pitfall(16, "write-protect-beside-slow-reads", drivers=THREAD, memory=SMALL)
def protect_beside(at: Setting) -> None:
    """While every worker is busy, faults that need none are still resolved."""
    with at.serving(workers=2, stall_timeout_s=60.0) as (handler, memory):
        slow, protected, zeros = memory.pages(4), memory.pages(2), memory.pages(1)
        data = Pages(4, memory.page_size)
        gate = GatedSource(at.source(data.all))
        protected.fill(7)
        handler.serve(slow, gate)
        handler.serve(protected, None, mode=RegisterMode.WP)
        handler.serve(zeros, BufferSource(data[3]))
        handler.writeprotect(protected)
        handler.start()
        readers = [reading(slow, index) for index in range(4)]
        gate.wait_for_reads(2)
        protected.write(0, b"written")
        assert page(zeros, 0) == data[3]
        assert all(reader.running for reader in readers)
        gate.open()
        assert [reader.result() for reader in readers] == [data[i] for i in range(4)]
        assert handler.stats().faults["wp"] == 1


@pitfall(4, "source-raises", drivers=THREAD, memory=SMALL)
def source_raises(at: Setting) -> None:
    """An exception must not end a worker silently: SIGBUS, and HandlerError with its cause."""
    with at.serving() as (handler, memory):
        region = memory.pages(3)
        data = Pages(3, memory.page_size)
        error = KeyError("no such page")
        handler.serve(region, FailingSource(at.source(data.all), error, at=[data.size]))
        handler.start()
        assert is_lost(region, data.size)
        assert page(region, 2) == data[2]
        assert is_lost(region, data.size), "asked again, it is still lost"
        with pytest.raises(HandlerError) as caught:
            handler.stop()
        assert caught.value.start == region.start + data.size
        assert caught.value.__cause__ is error
        assert handler.stats().failed == 1


@pitfall(4, "source-answers-wrongly", drivers=(*THREAD, "process"), memory=SMALL)
def wrong_length(at: Setting) -> None:
    """Too few bytes would make C read past the answer; too many may be another page's."""
    for extra in (-1, 1, -4096):
        with at.serving() as (handler, memory):
            region = memory.pages(2)
            data = Pages(2, memory.page_size)
            source = WrongLengthSource(at.source(data.all), extra, at=[data.size])
            handler.serve(region, source)
            handler.start()
            assert is_lost(region, data.size)
            assert page(region, 0) == data[0]
            with pytest.raises(HandlerError) as caught:
                handler.stop()
            assert isinstance(caught.value.__cause__, HandlerError)
            assert caught.value.__cause__.start == region.start + data.size


@pitfall(4, "source-returns-no-bytes", drivers=THREAD)
def no_bytes(at: Setting) -> None:
    """None, text, a view that is not contiguous."""
    size = os.sysconf("SC_PAGE_SIZE")
    answers: list[object] = [None, "x" * size, memoryview(bytes(2 * size))[::2]]
    for answer in answers:
        with at.serving() as (handler, memory):
            region = memory.pages(2)
            handler.serve(region, CallableSource(lambda offset, length, a=answer: a))  # type: ignore[misc]
            handler.start()
            assert is_lost(region, 0, size), answer
            with pytest.raises(HandlerError) as caught:
                handler.stop()
            assert isinstance(caught.value.__cause__, (TypeError, BufferError, HandlerError))


@pitfall(16, "source-too-slow", drivers=THREAD, memory=SMALL)
def too_slow(at: Setting) -> None:
    """After `stall_timeout_s` the page is poisoned, and the late answer dropped."""
    with at.serving(stall_timeout_s=0.1) as (handler, memory):
        region = memory.pages(3)
        data = Pages(3, memory.page_size)
        gate = GatedSource(at.source(data.all), at=[data.size])
        handler.serve(region, gate)
        handler.start()
        began = time.monotonic()
        assert is_lost(region, data.size)
        assert time.monotonic() - began >= 0.1
        gate.open()
        assert page(region, 2) == data[2]
        assert is_lost(region, data.size)
        with pytest.raises(HandlerError) as caught:
            handler.stop()
        assert caught.value.start == region.start + data.size
        assert handler.stats().stalled_requests == 1


@pitfall(16, "stall-reports-only", drivers=THREAD)
def stall_reports(at: Setting) -> None:
    """on_error="stall": the thread keeps waiting, and gets its page when the source has it."""
    with at.serving(stall_timeout_s=0.1, on_error="stall") as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        gate = GatedSource(at.source(data.all))
        handler.serve(region, gate)
        handler.start()
        reader = reading(region, 1)
        wait_until(lambda: handler.stats().stalled_requests == 1, "the stall is reported")
        assert reader.running
        gate.open()
        assert reader.result() == data[1]
        handler.stop()  # mended: no error
        assert handler.stats().stalled_requests == 1


@pitfall(16, "stall-kills", drivers=THREAD, memory=ANON, expect=-signal.SIGKILL)
def stall_kills(at: Setting) -> None:
    """on_error="kill": the owner is killed, though it did nothing wrong."""
    with at.serving(stall_timeout_s=0.1, on_error="kill") as (handler, memory):
        region = memory.pages(2)
        handler.serve(region, GatedSource(at.source(Pages(2, memory.page_size).all)))
        handler.start()
        region.read(0, 1)


test_pitfalls = checks_of(__name__)
