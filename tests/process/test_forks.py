"""Forks of the process whose memory is served: trees of forks, their memory, their ends."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyuffd import (
    BufferSource,
    ClosedError,
    Feature,
    Handler,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
    _memory,
)
from pyuffd._memory import Agent, Interrupted
from pyuffd.testing import GatedSource, needs
from tests._barriers import Point, holding
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import in_fork, is_lost, open_fds, states, wait_until
from tests.process._peer import Link, peer
from tests.process._pitfalls import (
    ALL,
    ANON,
    BOTH,
    EVENTS,
    EVERY,
    SMALL,
    Pages,
    Setting,
    checks_of,
    page,
    pitfall,
    reading,
)

FORK = Feature.EVENT_FORK
MANY, STRESS = 500, 10_000
SYS_MADVISE, MADV_REMOVE = 28, 9


@contextlib.contextmanager
def agent() -> Iterator[Agent]:
    """A fork that reads and writes its memory when told."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = Agent(theirs.fileno(), ours.fileno())
        try:
            yield child
        finally:
            ours.close()
            os.waitpid(child.pid, 0)


def wait_alone(handler: Handler) -> None:
    """Wait until the handler no longer follows any fork."""
    wait_until(lambda: handler.spaces == 1, "the forks' descriptors are closed")


@pitfall(14, "child-and-grandchild", drivers=ALL, memory=EVERY, features=EVENTS)
def tree(at: Setting) -> None:
    """Pages that were missing at the fork are served in the whole tree, never zeros."""
    with at.served(4, EVENTS) as (handler, region, data):
        assert page(region, 1) == data[1]

        def grandchild() -> None:
            assert region.read() == data.all

        def child() -> None:
            assert page(region, 3) == data[3]
            assert in_fork(grandchild) == 0
            assert region.read() == data.all

        assert in_fork(child) == 0
        assert handler.stats().forks == 2
        assert region.read() == data.all


@pitfall(14, "memory-of-its-own", drivers=ALL, memory=EVERY, features=EVENTS)
def copy_on_write(at: Setting) -> None:
    """After the fork the child has its own private pages, and shares the shared ones."""
    with at.served(4, EVENTS) as (_, region, data), agent() as child:
        shared = region.shared
        assert child.write(region.start, b"child") is None
        region.write(data.size, b"parent")
        assert region.read(0, 5) == (b"child" if shared else data[0][:5])
        seen = child.read(region.start + data.size, 6)
        assert seen == (b"parent" if shared else data[1][:6])
        for index in (2, 3):
            assert child.read(region.start + index * data.size, 64) == data[index][:64]
        assert page(region, 3) == data[3]


@pitfall(14, "parent-and-child-on-one-page", drivers=("thread",), memory=SMALL, features=FORK)
def same_page(at: Setting) -> None:
    """Parent and child wait for the same page; the child asks while the parent's request runs."""
    with at.serving(FORK) as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        gate = GatedSource(at.source(data.all))
        handler.serve(region, gate)
        handler.start()
        ours = reading(region, 1)
        gate.wait_for_reads(1)
        with agent() as child:
            theirs = Task(child.read, region.start + data.size, 64)
            # Shared memory has one page for both, so one request may suffice.
            if region.shared:
                wait_until(lambda: handler.stats().messages >= 3, "both faults and the fork")
            else:
                gate.wait_for_reads(2)
            gate.open()
            assert ours.result() == data[1]
            assert theirs.result() == data[1][:64]


@pitfall(14, "fork-while-a-page-is-filled", drivers=BOTH, memory=SMALL, features=FORK)
def in_flight(at: Setting) -> None:
    """The child's copy of a state says "in flight", but no thread works for the child."""
    with at.served(3, FORK) as (_, region, data):
        point = Point.COMPLETE if at.driver == "thread" else Point.FILL_CLAIMED
        if at.driver == "native":
            # The gate keeps the event unread while a page is claimed, so the fork comes after.
            with holding(point) as held:
                filler = reading(region, 1)
                held.release()
                filler.result()
            with agent() as child:
                assert child.read(region.start + data.size, 64) == data[1][:64]
            return
        with holding(point) as held:
            ours = reading(region, 1)
            held.wait()
            with agent() as child:
                theirs = Task(child.read, region.start + data.size, 64)
                if not region.shared:
                    assert theirs.result() == data[1][:64]
                held.release()
                assert theirs.result() == data[1][:64]
                assert ours.result() == data[1]


@pitfall(14, "removed-on-one-side", drivers=ALL, memory=SMALL, features=EVENTS)
def removed(at: Setting) -> None:
    """A dropped page is zeros for the process that dropped it; with shared memory, for all.

    If the fork had states of its own, the source's content would return to shared memory.
    """
    with at.served(4, EVENTS) as (_, region, data), agent() as child:
        region.punch_hole(0, data.size)
        theirs = child.read(region.start, 64)
        assert theirs == (bytes(64) if region.shared else data[0][:64])
        assert page(region, 0) == data.zeros
        region.punch_hole(data.size, data.size)
        assert page(region, 1) == data.zeros
        assert child.read(region.start + 3 * data.size, 64) == data[3][:64]


def waits_in_madvise(pid: int) -> bool:
    """Whether a process has an unread layout event."""
    call = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return call == str(SYS_MADVISE) and "event_wait" in Path(f"/proc/{pid}/stack").read_text()


@pitfall(14, "removed-in-the-child-while-filled", memory=("shmem", "hugetlb"), features=EVENTS)
def removed_while_filled(at: Setting) -> None:
    """A fill in one address space and a drop in another: a page dropped before stays dropped.

    The kernel refuses the fill with EAGAIN only in the space that changes.
    """
    with at.served(3, EVENTS) as (handler, region, data), agent() as child:
        start = region.start + data.size
        with holding(Point.FILL_CLAIMED) as point:
            filler = Task(handler.populate, region, data.size, data.size)
            point.wait()
            dropper = Task(child.syscall, SYS_MADVISE, start, data.size, MADV_REMOVE)
            wait_until(
                lambda: not dropper.running or waits_in_madvise(child.pid), "dropped or waiting"
            )
        filler.result()
        assert dropper.result() == 0
        assert page(region, 1) == data.zeros
        assert child.read(start, 64) == bytes(64)


@pitfall(14, "ends-at-once", drivers=ALL, features=EVENTS, budget_s=20)
def ends_at_once(at: Setting) -> None:
    """Children exit, exec or are killed before they touch memory: every fd is closed."""
    with at.served(2, EVENTS) as (handler, region, data):
        before = open_fds()
        assert in_fork(lambda: None) == 0
        assert in_fork(lambda: os.execv("/bin/true", ["true"])) == 0
        assert in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL)) == -signal.SIGKILL
        command = [sys.executable, "-S", "-c", ""]
        subprocess.run(command, check=True)
        subprocess.run(command, check=True, preexec_fn=lambda: None)
        assert page(region, 1) == data[1]
        wait_alone(handler)
        wait_until(lambda: open_fds() == before, "no descriptor is left")


def ends_by_then(handler: Handler, region: Region, data: Pages, forks: int) -> None:
    """Fork often; the descriptors of ended forks do not accumulate."""
    most = 0
    for number in range(forks):
        pid = os.fork()
        if pid == 0:
            if number % 100 == 0:
                region.touch(data.size, 1)
            os._exit(0)
        os.waitpid(pid, 0)
        most = max(most, handler.spaces)
    assert handler.stats().forks == forks
    assert most < 100, f"{most} spaces were followed at once"
    assert page(region, 1) == data[1]
    wait_alone(handler)


@pitfall(14, f"{MANY}-forks", features=EVENTS, budget_s=30)
def many(at: Setting) -> None:
    """Without reaping, each fork would keep a descriptor forever: no event reports its exit."""
    with at.served(2, EVENTS) as (handler, region, data):
        before = open_fds()
        ends_by_then(handler, region, data, MANY)
        wait_until(lambda: open_fds() == before, "no descriptor is left")


@pitfall(14, f"{STRESS}-forks", features=EVENTS, budget_s=120, marks=(pytest.mark.stress,))
def very_many(at: Setting) -> None:
    """As before, in `make soak`."""
    with at.served(2, EVENTS) as (handler, region, data):
        before = open_fds()
        ends_by_then(handler, region, data, STRESS)
        wait_until(lambda: open_fds() == before, "no descriptor is left")


@pitfall(14, "fork-and-signals", drivers=ALL, features=EVENTS, budget_s=20)
def signals(at: Setting) -> None:
    """A fork that a signal interrupts is retried, and may leave an event without a child."""
    with at.served(2, EVENTS) as (handler, region, data):
        before = open_fds()
        alarms = []
        signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)

        def child() -> None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert region.read() == data.all

        for _ in range(40):
            assert in_fork(child) == 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert alarms
        assert region.read() == data.all
        wait_alone(handler)
        wait_until(lambda: open_fds() == before, "no descriptor is left")


@pitfall(14, "no-descriptor-left", drivers=BOTH, features=EVENTS, budget_s=20)
def no_descriptor(at: Setting) -> None:
    """read() fails with EMFILE for a fork's event: the fork waits, everything else continues."""
    with at.served(4, EVENTS) as (handler, region, data):
        ours, theirs = socket.socketpair()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert page(region, 0) == data[0]  # the engine's thread has read what it reads as it starts
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        rest = []
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                rest.append(os.dup(0))
        # os.fork() would hold the GIL and stop this thread.
        forker = Task(Agent, theirs.fileno(), ours.fileno())
        wait_until(lambda: handler.stats().deferred > 0, "EMFILE was met")
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in rest:
            os.close(number)
        child = forker.result()
        ours.close()
        theirs.close()
        os.waitpid(child.pid, 0)
        assert page(region, 3) == data[3]
        handler.stop()  # nothing was lost
        assert handler.stats().failed == 0


@pitfall(14, "stopped-with-living-children", drivers=ALL, memory=EVERY, features=EVENTS)
def stopped(at: Setting) -> None:
    """stop() also poisons what children lack; closing their fds would give them zeros."""
    with at.served(3, EVENTS) as (handler, region, data), agent() as child:
        assert child.read(region.start, 64) == data[0][:64]
        region.touch(data.size, 1)
        handler.stop()
        assert child.read(region.start, 64) == data[0][:64]
        lost = child.read(region.start + 2 * data.size, 64)
        assert isinstance(lost, Interrupted), "zeros, or stale content"
        assert lost.number == signal.SIGBUS
        assert is_lost(region, 2 * data.size)


@pitfall(14, "unserved-with-living-children", drivers=ALL, memory=SMALL, features=EVENTS)
def unserved(at: Setting) -> None:
    """unserve() takes the range out in every fork; another range is still served there."""
    with at.serving(EVENTS) as (handler, memory):
        first, second = memory.pages(2), memory.pages(2)
        data = Pages(2, memory.page_size)
        for region in (first, second):
            handler.serve(region, at.source(data.all))
        handler.start()
        with agent() as child:
            assert child.read(first.start, 64) == data[0][:64]
            handler.unserve(first)
            lost = child.read(first.start + data.size, 64)
            assert isinstance(lost, Interrupted)
            assert child.read(second.start + data.size, 64) == data[1][:64]


@pitfall(14, "parents-object-in-the-child", drivers=BOTH)
def parents_object(at: Setting) -> None:
    """A fork has the descriptor too, but the descriptor acts on the parent's memory."""
    with at.served(2) as (handler, region, data):

        def child() -> None:
            for call in (handler.stats, handler.stop, handler.uffd.read_events):
                with contextlib.suppress(ClosedError):
                    call()
            with pytest.raises(ClosedError):
                handler.uffd.fill_zero(region)

        assert in_fork(child) == 0
        assert region.read() == data.all


@pitfall(14, "moved-in-the-child", drivers=ALL, memory=ANON, features=EVENTS)
def moved(at: Setting) -> None:
    """A fork changes its own layout, not its parent's."""
    with at.served(4, EVENTS) as (_, region, data):

        def child() -> None:
            region.punch_hole(0, data.size)
            to = _memory.mmap(2 * data.size, 0, 0x22)
            _memory.mremap(region.start + 2 * data.size, 2 * data.size, 2 * data.size, 3, to)
            there = Region.at(to, 2 * data.size, data.size)
            assert there.read() == data.of(2, 3)
            assert region.read(0, 2 * data.size) == data.of(None, 1)

        assert in_fork(child) == 0
        assert region.read() == data.all


@pitfall(12, "protection-in-a-child", memory=SMALL, features=EVENTS)
def protection(at: Setting) -> None:
    """With EVENT_FORK a child keeps the protection: its writes are its own, and cause faults."""
    both = RegisterMode.MISSING | RegisterMode.WP
    with at.serving(EVENTS) as (handler, memory):
        region = memory.pages(3)
        data = Pages(3, memory.page_size)
        handler.serve(region, at.source(data.all), mode=both)
        handler.start()
        handler.populate(region)
        with agent() as child:
            assert child.write(region.start, b"child") is None
            assert child.read(region.start, 5) == b"child"
            found = states(handler, region)
            # Shared memory has one state for all processes that map it.
            assert found[0] == (PageState.DIRTY if region.shared else PageState.CLEAN)
            assert found[1:] == [PageState.CLEAN] * 2
            region.write(data.size, b"parent")
            wait_until(lambda: states(handler, region)[1] == PageState.DIRTY, "it is dirty")
            wait_until(lambda: handler.stats().faults["wp"] == 2, "both faults are counted")


# Owners in another process


def own_and_fork(link: Link) -> None:
    """Send a userfaultfd, fork, and exit before the fork reads."""
    size = os.sysconf("SC_PAGE_SIZE")
    with Region.anonymous(3 * size) as region, Userfaultfd(features=EVENTS) as uffd:
        link.send([region.start, region.length], [uffd.fileno()])
        link.value()
        go, went = os.pipe()
        if os.fork() == 0:
            os.close(went)
            os.read(go, 1)  # until the parent has exited
            link.send(region.read(size, 4).hex())
            os._exit(0)
        region.touch(0, 1)


def child_outlives_owner() -> None:
    size = os.sysconf("SC_PAGE_SIZE")
    data = Pages(3, size, seed=3)
    with peer(own_and_fork) as link:
        (start, length), (fd,) = link.receive(1)
        with (
            Userfaultfd.from_fd(fd) as uffd,
            Handler(uffd, owner_pid=link.pid) as handler,
        ):
            handler.serve(Remote(start, length, size), BufferSource(data.all))
            handler.start()
            link.send("registered")
            assert link.value() == data[1][:4].hex()
            wait_until(lambda: handler.owner_exited, "the owner's exit is noticed")


class Remote:
    """A range of another process."""

    def __init__(self, start: int, length: int, page_size: int) -> None:
        self.start, self.length, self.page_size = start, length, page_size


@needs(EVENTS)
def test_child_outlives_the_owner() -> None:
    run_child(child_outlives_owner, budget_s=20)


def forked_after_the_poison(name: str) -> None:
    memory = memory_of(name)
    region = memory.pages(2)
    data = Pages(2, memory.page_size, seed=5)
    with Userfaultfd() as uffd, Handler(uffd) as handler:
        handler.serve(region, BufferSource(data.all))
        handler.unserve(region)
        assert is_lost(region, 0)

        def read() -> None:
            # docs/concepts/limits.md: a fork does not copy the marks of shared memory.
            if memory.shared:
                assert region.read(0, 1) == b"\0"
            else:
                assert is_lost(region, 0)

        assert in_fork(read) == 0
    memory.close()


@needs(Feature.POISON)
@pytest.mark.parametrize("name", memory_params())
def test_a_fork_after_the_poison(name: str) -> None:
    run_child(forked_after_the_poison, name)


test_pitfalls = checks_of(__name__)
