"""Handler(driver="process"): the worker process dies, or the keeper too, or the owner."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyuffd import (
    CallableSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    HelperLostError,
    PagePoisonedError,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
    _memory,
)
from pyuffd.handlers.process import _wire
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._barriers import Point
from tests._child import run_child
from tests.kernel._faults import Task
from tests.kernel._serving import is_efault, wait_for_stalled
from tests.process import _process_sources as sources
from tests.process._pitfalls import wait_blocked
from tests.process._process_sources import PAGE, content
from tests.process.test_process_driver import LENGTH, gone, processes, serve, stopped

WAIT_S = 20.0
# Threads; more than in csrc/engine/crowd.h.
CROWD = 100


def wait_until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, f"waited too long until {what}"
        time.sleep(0.002)


def kill_worker(handler: Handler) -> None:
    """Kill the worker process, and wait until another one runs."""
    _, worker = processes(handler)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: processes(handler)[1] != worker, "another worker is there")


def in_threads(count: int, action: Callable[[int], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=action, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    return threads


def faults_wait() -> None:
    """Threads wait for pages that the dead worker process was asked for: they get their data."""
    called, go = str(Path.cwd() / "called"), str(Path.cwd() / "go")
    handler, region = serve(sources.Gate(called, go), workers=4, stall_timeout_s=60)
    read: dict[int, bytes] = {}

    def read_page(index: int) -> None:
        read[index] = region.read(index * PAGE, PAGE)

    threads = in_threads(8, read_page)
    wait_until(
        lambda: Path(called).exists() and len(Path(called).read_text().split()) >= 4,
        "four workers are at it",
    )
    kill_worker(handler)
    Path(go).touch()
    for thread in threads:
        thread.join()
    assert read == {index: content(LENGTH)[index * PAGE :][:PAGE] for index in range(8)}
    assert handler.stats().restarts == 1
    assert region.read() == content(LENGTH)
    handler.stop()
    assert handler.stats().restarts == 1


def held_faults() -> None:
    """The new worker holds nothing, and the end of the hold says so."""
    handler, region = serve(CallableSource(sources.page))
    hold = handler.hold(limit_s=60.0)
    kill_worker(handler)
    assert region.read(0, PAGE) == content(PAGE)
    with pytest.raises(HandlerError, match="its worker process was replaced"):
        hold.release()
    handler.stop()


def killed_by_its_source() -> None:
    """With the interpreter's lock held, no thread of this process could help."""
    handler, region = serve(sources.KilledOnce(str(Path.cwd() / "killed")))
    with region.memoryview() as view:
        assert view[PAGE] == content(2 * PAGE)[PAGE]
    assert handler.stats().restarts == 1
    handler.stop()


def crashing() -> None:
    """A page whose source ends every worker process is poisoned after some attempts."""
    handler, region = serve(CallableSource(sources.crashing))
    other = Region.anonymous(LENGTH)
    handler.serve(other, ZeroSource())
    pipe = os.pipe()
    with region.memoryview() as view, pytest.raises(OSError):
        os.write(pipe[1], view[PAGE : PAGE + 1])
    assert handler.stats().restarts >= 2
    assert other.read() == bytes(LENGTH)
    with pytest.raises(PagePoisonedError) as poisoned:
        region.read(2 * PAGE, 1)
    assert "killed by SIGSEGV" in str(poisoned.value.__cause__)
    raised = stopped(handler)
    assert "killed by SIGSEGV" in str(raised.__cause__)
    said = (
        r"worker processes ended 5 times in a row: the last one, \d+, was killed by SIGSEGV while"
    )
    assert re.search(rf"{said} it worked on 1 page at {region.start + PAGE:#x}", str(raised)), (
        raised
    )


def what_is_said_of_a_kill() -> None:
    """Which process, by which signal, what it was doing, and what happens now."""
    texts: list[str] = []
    log = logging.Handler()
    log.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pyuffd").addHandler(log)
    handler, region = serve(sources.KilledOnce(str(Path.cwd() / "killed")))
    _, worker = processes(handler)
    assert region.read(PAGE, PAGE) == content(2 * PAGE)[PAGE:]
    handler.stop()
    (text,) = texts
    assert text.startswith(f"pyuffd: worker process {worker} was killed by SIGKILL ("), text
    assert "for lack of memory" in text
    place = f"{region.start + PAGE:#x} (offset {PAGE:#x} of <Region "
    assert f" while it worked on 1 page at {place}" in text, text
    assert ", served from <tests.process._process_sources.KilledOnce" in text, text
    assert text.endswith("; another one takes over and asks the sources again"), text


def states_survive() -> None:
    """Removed pages are zeros, dirty ones are known, and served ranges stay served."""
    fd = os.memfd_create("source")
    os.write(fd, content(LENGTH, 5))
    handler, region = serve(
        CallableSource(sources.page), features=Feature.EVENT_REMOVE | Feature.EVENT_REMAP
    )
    from_file, protected = Region.anonymous(LENGTH), Region.anonymous(LENGTH)
    with FileSource(fd) as source:
        handler.serve(from_file, source)
    handler.serve(protected, sources.Source(9), mode=RegisterMode.MISSING | RegisterMode.WP)
    region.touch(0, 2 * PAGE)
    region.madvise(mmap.MADV_DONTNEED, 0, PAGE)
    region.madvise(mmap.MADV_DONTNEED, 4 * PAGE, PAGE)
    protected.touch(0, PAGE)
    protected.write(PAGE, b"x")
    counted = handler.stats().faults
    kill_worker(handler)
    assert handler.stats().faults == counted
    assert list(handler.page_states(region, 0, 5 * PAGE)) == [
        PageState.REMOVED,
        PageState.CLEAN,
        PageState.ABSENT,
        PageState.ABSENT,
        PageState.REMOVED,
    ]
    assert list(handler.page_states(protected, 0, 3 * PAGE)) == [
        PageState.CLEAN,
        PageState.DIRTY,
        PageState.ABSENT,
    ]
    assert region.read(0, PAGE) == bytes(PAGE)
    assert region.read(4 * PAGE, 2 * PAGE) == bytes(PAGE) + content(6 * PAGE)[5 * PAGE :]
    assert from_file.read() == content(LENGTH, 5)
    assert protected.read(2 * PAGE) == content(LENGTH, 9)[2 * PAGE :]
    kill_worker(handler)
    later = Region.anonymous(LENGTH)
    handler.serve(later, sources.Source(3))
    assert later.read() == content(LENGTH, 3)
    handler.unserve(region)
    kill_worker(handler)
    assert later.read() == content(LENGTH, 3)
    assert handler.stats().restarts == 3
    handler.stop()


def moved_memory() -> None:
    """A successor serves moved pages at their new place, and no unmapped ones."""
    libc_move = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED
    handler, region = serve(
        CallableSource(sources.page),
        features=Feature.EVENT_REMAP | Feature.EVENT_UNMAP | Feature.EVENT_REMOVE,
    )
    start = region.start
    to = Region.anonymous(LENGTH)
    _memory.mremap(start + 4 * PAGE, 4 * PAGE, 4 * PAGE, libc_move, to.start)
    _memory.munmap(start + 12 * PAGE, 4 * PAGE)
    kill_worker(handler)
    assert to.read(0, 4 * PAGE) == content(8 * PAGE)[4 * PAGE :]
    assert region.read(0, 4 * PAGE) == content(4 * PAGE)
    assert region.read(8 * PAGE, 4 * PAGE) == content(12 * PAGE)[8 * PAGE :]
    # The unmapped address can be served again.
    _map_at(start + 12 * PAGE, 4 * PAGE)
    again = Region.at(start + 12 * PAGE, 4 * PAGE, PAGE)
    handler.serve(again, sources.Source(77))
    assert again.read() == content(4 * PAGE, 77)
    handler.stop()


def _map_at(address: int, length: int) -> None:
    """Map new memory at a free address."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    fixed = 0x100000  # MAP_FIXED_NOREPLACE
    got = libc.mmap(
        ctypes.c_void_p(address),
        ctypes.c_size_t(length),
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed,
        -1,
        ctypes.c_long(0),
    )
    assert got == address


def forks() -> None:
    """The successor serves children and grandchildren, each by its own states."""
    handler, region = serve(
        CallableSource(sources.page), features=Feature.EVENT_FORK | Feature.EVENT_REMOVE
    )
    shared = Region.memfd(LENGTH)
    handler.serve(shared, sources.Source(50))
    region.touch(0, PAGE)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        region.madvise(mmap.MADV_DONTNEED, 0, 2 * PAGE)
        grandchild = os.fork()
        if grandchild == 0:
            region.madvise(mmap.MADV_DONTNEED, 2 * PAGE, PAGE)
            os.write(ready[1], b"g")
        else:
            os.write(ready[1], b"c")
        os.read(go[0], 1)
        zeros = 3 if grandchild == 0 else 2
        good = region.read() == bytes(zeros * PAGE) + content(LENGTH)[zeros * PAGE :]
        good = good and shared.read() == content(LENGTH, 50)
        if grandchild:
            good = good and os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if good else 1)
    assert sorted(os.read(ready[0], 1) + os.read(ready[0], 1)) == sorted(b"gc")
    kill_worker(handler)
    assert handler.spaces == 3
    os.write(go[1], b"..")
    assert os.waitpid(child, 0)[1] == 0
    assert region.read() == content(LENGTH)
    wait_until(lambda: handler.spaces == 1, "the children are forgotten")
    keeper, _ = processes(handler)
    handler.stop()
    assert gone(keeper)


def fork_descriptors() -> None:
    handler, _ = serve(CallableSource(sources.page), features=Feature.EVENT_FORK)
    keeper, _ = processes(handler)
    before = len(os.listdir(f"/proc/{keeper}/fd"))
    for _ in range(200):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    wait_until(lambda: handler.spaces == 1, "the children are forgotten")
    processes(handler)
    wait_until(lambda: len(os.listdir(f"/proc/{keeper}/fd")) == before, "the keeper closes theirs")
    handler.stop()


def many_regions() -> None:
    """More ranges than a process may have descriptors by default."""
    count = 1200
    handler, first = serve(CallableSource(sources.page))
    regions = [Region.anonymous(PAGE) for _ in range(count)]
    for index, region in enumerate(regions):
        handler.serve(region, sources.Source(index))
    kill_worker(handler)
    for index in range(count - 1, 0, -100):
        assert regions[index].read() == content(PAGE, index)
    assert len(os.listdir(f"/proc/{processes(handler)[1]}/fd")) < 50
    assert first.read() == content(LENGTH)
    handler.stop()


def repeatedly() -> None:
    """Killed at any time, while threads fault and calls are made: nothing is lost."""
    length = 512 * PAGE
    region = Region.anonymous(length)
    handler, _ = serve(CallableSource(sources.page), region=region, workers=2)
    expected = content(length)
    wrong: list[int] = []
    done = threading.Event()

    def read(thread: int) -> None:
        for index in range(thread, 512, 3):
            if region.read(index * PAGE, PAGE) != expected[index * PAGE :][:PAGE]:
                wrong.append(index)
            time.sleep(0.002)

    def ask(_: int) -> None:
        while not done.is_set():
            assert len(handler.page_states(region)) == 512
            with Region.anonymous(PAGE) as other:
                handler.serve(other, sources.Source(1))
                assert other.read() == content(PAGE, 1)

    threads = in_threads(3, read)
    asking = in_threads(1, ask)
    for _ in range(4):
        time.sleep(0.15)
        kill_worker(handler)
    for thread in threads:
        thread.join()
    done.set()
    asking[0].join()
    assert wrong == []
    assert region.read() == expected
    handler.stop()


def both_killed() -> None:
    """No thread reads zeros or waits; the next call raises, and stop() poisons the rest."""
    handler, region = serve(CallableSource(sources.page))
    assert region.read(0, PAGE) == content(PAGE)
    keeper, worker = processes(handler)
    os.kill(keeper, signal.SIGKILL)
    assert gone(keeper)
    assert gone(worker)
    pipe = os.pipe()
    failed: list[OSError] = []

    def write(_: int) -> None:
        with region.memoryview() as view:
            try:
                os.write(pipe[1], view[PAGE : PAGE + 1])
            except OSError as error:
                failed.append(error)

    (thread,) = in_threads(1, write)
    thread.join()
    assert len(failed) == 1
    with pytest.raises(HandlerError, match="is gone"):
        handler.page_states(region)
    error = stopped(handler)
    assert "is gone" in str(error)
    assert region.read(0, PAGE) == content(PAGE)
    assert handler.stats().poisoned_pages == LENGTH // PAGE - 1


def owner_killed(pipe: int) -> None:
    """The owner of a fork's parent dies; the fork lives, and gets poison instead of zeros."""
    handler, region = serve(CallableSource(sources.page), features=Feature.EVENT_FORK)
    owner = os.getpid()
    if os.fork() == 0:
        wait_until(lambda: os.getppid() != owner, "the owner is gone")
        keeper_pid = int(Path("keeper").read_text())
        assert gone(keeper_pid)
        os.write(pipe, b"EFAULT" if is_efault(region, 0, 1) else b"none")
        os._exit(0)
    Path("keeper").write_text(str(processes(handler)[0]))
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Range:
    """Memory of another process."""

    start: int
    length: int
    page_size: int = PAGE


def foreign_owner(pipe: int) -> None:
    """The process that serves another one's memory is killed: the other one gets poison too."""
    ours, theirs = socket.socketpair()
    owner = os.fork()
    if owner == 0:
        server = os.getppid()
        region, uffd = Region.anonymous(LENGTH), Userfaultfd()
        socket.send_fds(theirs, [region.start.to_bytes(8, "little")], [uffd.fileno()])
        theirs.recv(1)
        good = region.read(PAGE, PAGE) == content(2 * PAGE)[PAGE:]
        theirs.send(b"!")
        wait_until(lambda: os.getppid() != server, "the server is gone")
        assert gone(int(Path("keeper").read_text()))
        error = b"EFAULT" if is_efault(region, 0, 1) else b"none"
        good = good and region.read(PAGE, PAGE) == content(2 * PAGE)[PAGE:]
        os.write(pipe, error if good else b"wrong")
        os._exit(0)
    address, fds, _, _ = socket.recv_fds(ours, 8, 1)
    uffd = Userfaultfd.from_fd(fds[0])
    handler = Handler(uffd, driver="process", owner_pid=owner)
    handler.serve(Range(int.from_bytes(address, "little"), LENGTH), CallableSource(sources.page))
    handler.start()
    Path("keeper").write_text(str(processes(handler)[0]))
    ours.send(b"!")
    ours.recv(1)
    assert not handler.owner_exited
    os.kill(os.getpid(), signal.SIGKILL)


# Killed between reading an event and applying it


LAYOUT = Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP
LEAVE = 1 | 4  # MREMAP_MAYMOVE | MREMAP_DONTUNMAP
MOVE = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED
SYS_MREMAP = 25


@contextlib.contextmanager
def held_worker(features: Feature) -> Iterator[tuple[Handler, Region, sources.WorkerPoints]]:
    """A worker process that can be stopped; the region's first page is present."""
    points = sources.WorkerPoints(str(Path.cwd()))
    handler, region = serve(points.source, features=features)
    region.touch(0, PAGE)
    points.connect()
    with contextlib.closing(points):
        yield handler, region, points
    handler.stop()
    assert handler.stats().restarts >= 1


def drop_and_wait(handler: Handler, region: Region, offset: int) -> None:
    """Drop a page, and wait until the worker process has applied the event.

    madvise() returns as soon as the event is read: a point armed then could catch its batch, and
    the event that the test is about would not be read.
    """
    region.madvise(mmap.MADV_DONTNEED, offset, PAGE)
    wait_until(
        lambda: handler.page_states(region, offset, PAGE)[0] == PageState.REMOVED, "it is applied"
    )


def dropped_in_hand() -> None:
    """The owner has continued: a page that it dropped must not come from the source."""
    with held_worker(LAYOUT) as (handler, region, points):
        points.arm(Point.STEP_READ)
        region.madvise(mmap.MADV_DONTNEED, 0, 2 * PAGE)
        points.wait(Point.STEP_READ)
        kill_worker(handler)
        assert list(handler.page_states(region, 0, 3 * PAGE)) == [
            PageState.REMOVED,
            PageState.REMOVED,
            PageState.ABSENT,
        ]
        assert region.read() == bytes(2 * PAGE) + content(LENGTH)[2 * PAGE :]


def moved_in_hand() -> None:
    """Memory is where the event says, with what was dropped before."""
    with held_worker(LAYOUT) as (handler, region, points):
        drop_and_wait(handler, region, 5 * PAGE)
        to = Region.anonymous(4 * PAGE)
        points.arm(Point.STEP_READ)
        move = (region.start + 4 * PAGE, 4 * PAGE, 4 * PAGE, MOVE, to.start)
        # Its second event, of the old place unmapped, waits for a successor.
        (mover,) = in_threads(1, lambda _: _memory.mremap(*move))
        points.wait(Point.STEP_READ)
        kill_worker(handler)
        mover.join()
        assert (
            to.read()
            == content(5 * PAGE)[4 * PAGE :] + bytes(PAGE) + content(8 * PAGE)[-2 * PAGE :]
        )
        assert region.read(0, 4 * PAGE) == content(4 * PAGE)


def unmapped_in_hand() -> None:
    """The address is free: another range there is served, the old one is not."""
    with held_worker(LAYOUT) as (handler, region, points):
        points.arm(Point.STEP_READ)
        _memory.munmap(region.start + 14 * PAGE, 2 * PAGE)
        points.wait(Point.STEP_READ)
        kill_worker(handler)
        _map_at(region.start + 14 * PAGE, 2 * PAGE)
        again = Region.at(region.start + 14 * PAGE, 2 * PAGE, PAGE)
        handler.serve(again, sources.Source(77))
        assert again.read() == content(2 * PAGE, 77)
        assert region.read(0, 14 * PAGE) == content(14 * PAGE)


def fork_in_hand(die: bool = False) -> None:
    """Only the dead process had the child's descriptor, whose close would give the child zeros."""
    with held_worker(LAYOUT | Feature.EVENT_FORK) as (handler, region, points):
        drop_and_wait(handler, region, 3 * PAGE)
        points.arm(Point.STEP_READ)
        child = os.fork()
        if child == 0:
            good = region.read() == content(3 * PAGE) + bytes(PAGE) + content(LENGTH)[4 * PAGE :]
            os._exit(0 if good else 1)
        points.wait(Point.STEP_READ)
        if die:
            Path("die").touch()
        kill_worker(handler)
        assert os.waitpid(child, 0)[1] == 0
        assert handler.stats().forks == 1
        assert handler.stats().restarts == 1 + die
        assert region.read(0, 3 * PAGE) == content(3 * PAGE)
        wait_until(lambda: handler.spaces == 1, "the child is forgotten")


def fork_in_two_hands() -> None:
    """The successor is killed before it has applied the event."""
    fork_in_hand(die=True)


def unmapping_to_come() -> None:
    """A successor recognises the UNMAP that follows a REMAP.

    Memory moves away from A, and other memory to A, before the UNMAP of A is sent: it must not
    take the new memory out.
    """
    with held_worker(LAYOUT) as (handler, region, points):
        # Smaller than any mapping that the interpreter makes for a new thread, so A stays free.
        a, size = region.start + 4 * PAGE, 2 * PAGE
        points.arm(Point.STEP_APPLIED)
        region.madvise(mmap.MADV_DONTNEED, 3 * PAGE, PAGE)
        points.wait(Point.STEP_APPLIED)
        # No thread reads: both moves are done, in this order, and wait until their events are read.
        other = Region.anonymous(size)
        first = Task(_memory.mremap, a, size, size, MOVE, other.start)
        wait_blocked(first, SYS_MREMAP)
        second = Task(_memory.mremap, region.start + 8 * PAGE, size, size, MOVE, a)
        wait_blocked(second, SYS_MREMAP)
        reader = Task(region.read, PAGE, PAGE)
        wait_for_stalled(handler.uffd, 1)
        points.arm(Point.FAULT_WOKEN)
        points.release(Point.STEP_APPLIED)
        points.wait(Point.FAULT_WOKEN)
        kill_worker(handler)
        assert first.result() == other.start
        assert second.result() == a
        assert reader.result() == content(2 * PAGE)[PAGE:]
        assert region.read(4 * PAGE, size) == content(10 * PAGE)[8 * PAGE :]
        assert other.read() == content(6 * PAGE)[4 * PAGE :]


def left_behind(point: Point, shared: bool, events: Feature = LAYOUT) -> None:
    """A move leaves its old place mapped, and only the dead process knew that.

    If it had applied the event, a touch of the old place is an error: never zeros, and no hang.
    """
    with (
        held_worker(events) as (handler, region, points),
        Region.memfd(LENGTH) if shared else contextlib.nullcontext(region) as memory,
    ):
        if shared:
            handler.serve(memory, sources.Source(0))
            memory.touch(0, PAGE)
        points.arm(point)
        mover = Task(_memory.mremap, memory.start, 8 * PAGE, 8 * PAGE, LEAVE, 0)
        points.wait(point)
        kill_worker(handler)
        to = mover.result()
        old = Task(_memory.read, memory.start + PAGE, 7 * PAGE)
        assert _memory.read(to, 8 * PAGE) == content(8 * PAGE)
        assert memory.read(8 * PAGE) == content(LENGTH)[8 * PAGE :]
        if point is Point.STEP_READ:
            assert old.result() == (content(8 * PAGE)[PAGE:] if shared else bytes(7 * PAGE))
            assert handler.stats().unserved == 0
        else:
            try:
                assert old.result() == (content(8 * PAGE)[PAGE:] if shared else bytes(7 * PAGE))
            except PagePoisonedError:
                with pytest.raises(HandlerError, match="not served"):
                    handler.stop()
        _memory.munmap(to, 8 * PAGE)


def left_in_hand() -> None:
    """The successor applies the event, and looks at the old place."""
    left_behind(Point.STEP_READ, shared=False)


def left_shared_in_hand() -> None:
    """As above, of shared memory."""
    left_behind(Point.STEP_READ, shared=True)


def left_without_unmap_in_hand() -> None:
    """Without EVENT_UNMAP."""
    left_behind(Point.STEP_READ, False, LAYOUT & ~Feature.EVENT_UNMAP)


def left_and_applied() -> None:
    """The successor does not know of the old place."""
    left_behind(Point.STEP_APPLIED, shared=False)


def left_shared_and_applied() -> None:
    """As above, of shared memory."""
    left_behind(Point.STEP_APPLIED, shared=True)


def crowd_in_hand() -> None:
    """Pages of many threads are in place, and the thread that was to wake them dies."""
    with held_worker(Feature(0)) as (handler, _, points):
        Path("file").write_bytes(content((CROWD + 1) * PAGE))
        with Region.anonymous((CROWD + 1) * PAGE) as region:
            handler.serve(region, FileSource("file"))
            points.arm(Point.FAULT_WOKEN)
            region.touch(CROWD * PAGE, 1)
            points.wait(Point.FAULT_WOKEN)
            tasks = [Task(region.read, page * PAGE, PAGE) for page in range(CROWD)]
            wait_for_stalled(handler.uffd, CROWD)
            points.arm(Point.STEP_APPLIED)
            points.release(Point.FAULT_WOKEN)
            points.wait(Point.STEP_APPLIED)
            points.arm(Point.FAULT_WOKEN)
            points.release(Point.STEP_APPLIED)
            points.wait(Point.FAULT_WOKEN)
            kill_worker(handler)
            for page, task in enumerate(tasks):
                assert task.result() == content((page + 1) * PAGE)[-PAGE:]
            handler.unserve(region)


CHECKS: dict[Callable[[], None], Feature] = {
    faults_wait: Feature(0),
    held_faults: Feature(0),
    killed_by_its_source: Feature(0),
    what_is_said_of_a_kill: Feature(0),
    crashing: Feature.POISON,
    states_survive: Feature.EVENT_REMOVE | Feature.EVENT_REMAP,
    moved_memory: Feature.EVENT_REMAP | Feature.EVENT_UNMAP | Feature.EVENT_REMOVE,
    forks: Feature.EVENT_FORK | Feature.EVENT_REMOVE | Feature.MISSING_SHMEM,
    fork_descriptors: Feature.EVENT_FORK,
    many_regions: Feature(0),
    repeatedly: Feature(0),
    both_killed: Feature.POISON,
    dropped_in_hand: LAYOUT,
    moved_in_hand: LAYOUT,
    unmapped_in_hand: LAYOUT,
    fork_in_hand: LAYOUT | Feature.EVENT_FORK,
    fork_in_two_hands: LAYOUT | Feature.EVENT_FORK,
    unmapping_to_come: LAYOUT,
    left_in_hand: LAYOUT,
    left_shared_in_hand: LAYOUT | Feature.MISSING_SHMEM,
    left_without_unmap_in_hand: LAYOUT,
    left_and_applied: LAYOUT,
    left_shared_and_applied: LAYOUT | Feature.MISSING_SHMEM,
    crowd_in_hand: Feature(0),
}


# In these the kernel touches the pages.
IN_THE_KERNEL = {crashing, both_killed}


def _marks(check: Callable[[], None]) -> list[pytest.MarkDecorator]:
    return [needs_kernel_faults()] if check in IN_THE_KERNEL else []


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=check.__name__, marks=[needs(features), *_marks(check)])
        for check, features in CHECKS.items()
    ],
)
def test_death(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_child(check, budget_s=30)


@needs(Feature.EVENT_FORK | Feature.POISON)
@pytest.mark.parametrize("which", ["owner_killed", "foreign_owner"])
def test_who_is_left_gets_poison(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_child(killed_in_a_child, which, budget_s=30)


def killed_in_a_child(which: str) -> None:
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        {"owner_killed": owner_killed, "foreign_owner": foreign_owner}[which](write)
        os._exit(1)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(middle, 0)[1]) == -signal.SIGKILL
    with open(read, "rb") as pipe:
        assert pipe.read() == b"EFAULT"


def no_memory_for_an_answer() -> None:
    """Whatever ends the thread that hears the helper, nobody waits for an answer forever."""
    receive = _wire.receive

    def failing(*args: Any, **options: Any) -> Any:
        receive(*args, **options)
        raise MemoryError

    with Userfaultfd() as uffd, Region.anonymous(LENGTH) as region:
        handler = Handler(uffd, driver="process")
        handler.serve(region, CallableSource(sources.page))
        handler.start()
        assert region.read(0, PAGE) == content(PAGE)
        pids = processes(handler)
        _wire.receive = failing
        with pytest.raises(HelperLostError, match="MemoryError"):
            handler.stats()
        with pytest.raises(HelperLostError):
            handler.stop()
        assert region.read(0, PAGE) == content(PAGE)
        with pytest.raises(PagePoisonedError):
            region.read(PAGE, PAGE)
        wait_until(lambda: all(gone(pid) for pid in pids), "end of the helper")


def test_no_memory_for_an_answer() -> None:
    run_child(no_memory_for_an_answer)
