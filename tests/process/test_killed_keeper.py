"""The keeper of the process driver is killed: an engine of this process takes over, GIL or not."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import psutil
import pytest

from pyuffd import (
    CallableSource,
    Feature,
    FileSource,
    Handler,
    HelperLostError,
    PagePoisonedError,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
    _memory,
)
from pyuffd.handlers._checks import Policy
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.testing import FaultingChild, FaultingChildError, needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import limit_s, run_child
from tests._memory import PAGE, memory_of, memory_params
from tests.kernel._serving import in_fork

pytestmark = needs_kernel_faults()

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
LAYOUT = Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP | Feature.EVENT_FORK
WP_EVERYWHERE = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM


def filled(offset: int, length: int) -> bytes:
    return b"x" * length


def kill_keeper(handler: Handler) -> None:
    """Kill it, and wait until the worker has gone with it: until then it serves."""
    engine = handler._engine
    assert isinstance(engine, RemoteEngine)
    keeper, worker = engine.pids()
    pidfd = os.pidfd_open(worker)
    os.kill(keeper, signal.SIGKILL)
    select.select([pidfd], [], [])
    os.close(pidfd)


def ends(handler: Handler) -> None:
    with pytest.raises(HelperLostError):
        handler.stop()


@contextlib.contextmanager
def serving(
    features: Feature = Feature(0),  # noqa: B008 - an immutable flag
    on_error: Policy = "poison",
) -> Iterator[Handler]:
    """A handler whose stop() says that its helper is gone."""
    with Userfaultfd(features=features) as uffd:
        handler = Handler(uffd, driver="process", on_error=on_error)
        handler.start()
        yield handler
        if handler._engine is not None:
            ends(handler)


# A thread that waits


def touch(with_gil: bool, on_error: Policy) -> None:
    """Touch a page that nobody can fill any more, holding the GIL or not."""
    uffd, region = Userfaultfd(), Region.anonymous(2 * PAGE)
    handler = Handler(uffd, driver="process", on_error=on_error)
    handler.serve(region, CallableSource(filled))
    handler.start()
    assert region.read(0, 1) == b"x"
    kill_keeper(handler)
    if with_gil:
        ctypes.string_at(region.start + PAGE, 1)
    else:
        region.read(PAGE, 1)


ENDS = {
    (True, "poison"): -signal.SIGBUS,
    (False, "poison"): 1,  # PagePoisonedError
    (True, "kill"): -signal.SIGKILL,
    (False, "kill"): -signal.SIGKILL,
}


@pytest.mark.crossing
@pytest.mark.parametrize(("with_gil", "on_error"), ENDS)
def test_a_waiting_thread_goes_on(with_gil: bool, on_error: Policy) -> None:
    code = f"from tests.process.test_killed_keeper import touch; touch({with_gil}, {on_error!r})"
    process = subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=limit_s(20)
    )
    assert process.returncode == ENDS[with_gil, on_error]
    assert "has ended, perhaps killed" in process.stderr
    assert "the helper process of its handler has ended" in process.stderr


def stalls() -> None:
    with serving(on_error="stall") as handler, Region.anonymous(2 * PAGE) as region:
        handler.serve(region, CallableSource(filled))
        kill_keeper(handler)
        seen: list[BaseException] = []

        def work() -> None:
            try:
                region.read(0, 1)
            except PagePoisonedError as error:
                seen.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        ends(handler)
        thread.join()
        assert len(seen) == 1


def test_stall_waits_for_the_stop() -> None:
    ended = run_child(stalls, budget_s=30)
    assert "wait until stop() poisons them" in ended.stderr


# What each kind of page gets


def lost(region: Region, offset: int) -> None:
    with pytest.raises(PagePoisonedError) as caught:
        region.read(offset, 1)
    assert isinstance(caught.value.__cause__, HelperLostError)


def lost_at(address: int) -> None:
    with pytest.raises(PagePoisonedError):
        _memory.read(address, 1)


def kinds_of_pages(name: str) -> None:
    """What was filled stays, zeros need no source, protection is lifted, the rest is poisoned."""
    with contextlib.ExitStack() as stack:
        memories = [stack.enter_context(contextlib.closing(memory_of(name))) for _ in range(4)]
        asked, zeros, filed, again = (memory.pages(2) for memory in memories)
        size = asked.page_size
        file = os.memfd_create("source")
        os.ftruncate(file, 2 * size)
        source = stack.enter_context(FileSource(file))
        os.close(file)
        handler = stack.enter_context(serving(WP_EVERYWHERE))
        handler.serve(asked, CallableSource(filled), mode=MISSING | WP)
        handler.serve(zeros, ZeroSource())
        handler.serve(filed, source)
        handler.serve(again, ZeroSource())
        handler.unserve(again)
        handler.serve(again, CallableSource(filled), present="keep")
        assert asked.read(0, 8) == b"x" * 8
        kill_keeper(handler)
        lost(asked, size)
        lost(filed, 0)
        lost(again, size)
        assert zeros.read(size, 8) == bytes(8)
        asked.write(0, b"written")
        assert asked.read(0, 8) == b"writtenx"


@needs(Feature.POISON | WP_EVERYWHERE)
@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb-private"))
def test_kinds_of_pages(name: str) -> None:
    ended = run_child(kinds_of_pages, name, budget_s=30)
    assert ended.stderr.count("has ended, perhaps killed") == 1  # also after stop()


def minor() -> None:
    """The page cache holds old content, which the source would have replaced."""
    with Region.memfd(2 * PAGE) as region, region.alias() as alias, serving() as handler:
        alias.write(0, b"old" * 100)
        handler.serve(region, CallableSource(filled), mode=MINOR, local=alias)
        assert region.read(PAGE, 1) == b"x"
        kill_keeper(handler)
        lost(region, 0)


@needs(Feature.POISON | Feature.MINOR_SHMEM)
def test_old_content_of_the_page_cache_is_not_mapped() -> None:
    run_child(minor, budget_s=30)


# The layout


def layout() -> None:
    """Calls that send an event go on; what was moved is memory that nobody serves."""
    from pyuffd.handlers import _handler

    _handler.RETRY_LIMIT_S = 0.2
    with serving(LAYOUT) as handler, Region.anonymous(5 * PAGE) as region:
        place = _memory.mmap(2 * PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        handler.serve(region, CallableSource(filled))
        # Unmapped by other code, and mapped anew: the helper process reads of it.
        other = Region.anonymous(PAGE)
        handler.serve(other, ZeroSource())
        start = other.start
        _memory.munmap(start, PAGE)
        anew = _memory.mmap(
            PAGE, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000, -1, 0, start
        )
        assert anew == start
        handler.serve(Region.at(anew, PAGE), CallableSource(filled))
        _memory.move(region.start, PAGE, place, PAGE)
        kill_keeper(handler)
        for at in (place, anew, region.start + PAGE):
            lost_at(at)
        _memory.move(region.start + 3 * PAGE, PAGE, place + PAGE, PAGE)
        region.madvise(mmap.MADV_DONTNEED, 2 * PAGE, PAGE)
        assert region.read(2 * PAGE, 1) == bytes(1)
        assert in_fork(partial(lost_at, region.start + 4 * PAGE)) == 0
        lost_at(place + PAGE)
        _memory.munmap(place, PAGE)


@needs(Feature.POISON | LAYOUT)
def test_layout_events_are_read() -> None:
    run_child(layout, budget_s=40)


# Other processes, other descriptors


def of_another() -> None:
    with FaultingChild(2, mode=None) as child:
        handler = Handler(child.uffd, driver="process")
        handler.serve(child.region, CallableSource(filled))
        handler.start()
        assert child.run("read", 0, 1) == b"x"
        kill_keeper(handler)
        with pytest.raises(FaultingChildError):
            child.run("read", PAGE, 1)
        ends(handler)


@needs(Feature.POISON)
def test_memory_of_another_process() -> None:
    run_child(of_another, budget_s=30)


def several() -> None:
    """A second userfaultfd, and one that was closed before."""
    with (
        serving() as handler,
        Userfaultfd() as second,
        Region.anonymous(PAGE) as region,
        Region.anonymous(PAGE) as other,
    ):
        with Userfaultfd() as closed, Region.anonymous(PAGE) as gone:
            handler.serve(gone, CallableSource(filled), uffd=closed)
        handler.serve(region, CallableSource(filled), uffd=second)
        handler.serve(other, CallableSource(filled))
        kill_keeper(handler)
        lost(region, 0)
        lost(other, 0)


@needs(Feature.POISON)
def test_several_userfaultfds() -> None:
    run_child(several, budget_s=30)


def before_the_stop() -> None:
    """Pages that nobody touched are poisoned by stop()."""
    with serving() as handler, Region.anonymous(2 * PAGE) as region:
        handler.serve(region, CallableSource(filled))
        kill_keeper(handler)
        ends(handler)
        with pytest.raises(PagePoisonedError):
            region.read(PAGE, 1)


@needs(Feature.POISON)
def test_a_stop_poisons_the_rest() -> None:
    run_child(before_the_stop, budget_s=30)


# What is left


def quiet() -> None:
    """A handler that stops says nothing of its helper, and keeps nothing open."""
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    for turn in range(3):
        with (
            Userfaultfd() as uffd,
            Region.anonymous(PAGE) as region,
            Handler(uffd, driver="process") as handler,
        ):
            handler.serve(region, CallableSource(filled))
            assert region.read(0, PAGE) == b"x" * PAGE
        if turn == 0:
            open_then = os.listdir("/proc/self/fd")
    assert os.listdir("/proc/self/fd") == open_then
    os.set_blocking(reading, False)
    with pytest.raises(BlockingIOError):
        os.read(reading, 1000)


def test_nothing_said_of_a_stop() -> None:
    run_child(quiet, budget_s=30)


class KeepsPipes:
    """A source that forks: its child has what the worker process has open."""

    length = None

    def read(self, offset: int, length: int) -> bytes:
        if os.fork() == 0:
            signal.pause()
        return b"x" * length


def forking_source() -> None:
    with serving() as handler, Region.anonymous(2 * PAGE) as region:
        handler.serve(region, KeepsPipes())
        assert region.read(0, 1) == b"x"
        engine = handler._engine
        assert isinstance(engine, RemoteEngine)
        _, worker = engine.pids()
        children = psutil.Process(worker).children()
        kill_keeper(handler)
        try:
            lost(region, PAGE)
        finally:
            for child in children:
                child.kill()


@needs(Feature.POISON)
def test_a_child_of_a_source_lives_on() -> None:
    run_child(forking_source, budget_s=30)
