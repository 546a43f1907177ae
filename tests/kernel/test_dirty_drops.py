"""`DirtyTracker(watch_drops=True)`: memory that is dropped without a trace in the page table."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import psutil
import pytest

from pyuffd import BlindReason, DirtyTracker, Feature, Region, RegisterMode, Userfaultfd
from pyuffd._dirty_calls import DropReader
from pyuffd.dirty import _drops
from pyuffd.testing import needs, needs_privilege
from pyuffd.testing._needs import needs_kernel_faults
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._memory import PAGE, Memory, memory_of, memory_params
from tests.kernel.test_dirty_tracker import pages
from tests.kernel.test_userfaultfd_open import become_nobody
from tests.process._attach import wait_until

pytestmark = needs(
    Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM | Feature.EVENT_REMOVE
)

libc = ctypes.CDLL(None)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    made = memory_of(request.param)
    yield made
    made.close()


# How memory of each type is dropped unseen.
ADVICE = {
    "shmem": mmap.MADV_REMOVE,
    "hugetlb": mmap.MADV_REMOVE,
    "hugetlb-private": mmap.MADV_DONTNEED,
}


@pytest.mark.parametrize("memory", memory_params(*ADVICE), indirect=True)
@pytest.mark.parametrize("watches", [False, True], ids=["unwatched", "watched"])
def test_dropped_pages_are_reported(memory: Memory, watches: bool) -> None:
    region = memory.pages(4)
    region.fill(1)
    with DirtyTracker(region, watch_drops=watches) as tracker:
        tracker.collect().commit()
        region.madvise(ADVICE[memory.name], region.page_size, region.page_size)
        with tracker.collect() as round_:
            reported = round_.written | round_.unsure | round_.dropped
            assert pages(region, reported) == ([1] if watches else [])
            round_.commit()

        def settled() -> bool:
            with tracker.collect() as round_:
                again = pages(region, round_.written | round_.unsure | round_.dropped)
                round_.commit()
            assert again in ([], [1])
            return not again

        wait_until("each thread was seen outside, so it is reported no more", settled)
        reasons = {blind.reason for blind in tracker.blind}
        assert (BlindReason.HUGE_DROPS in reasons) == (region.page_size > PAGE and not watches)


def test_private_memory_has_no_event() -> None:
    """It is registered with a userfaultfd without events, and its drops wait for nobody."""
    with (
        Region.anonymous(4 * PAGE) as private,
        Region.memfd(4 * PAGE) as shared,
        DirtyTracker([private, shared], watch_drops=True) as tracker,
    ):
        for region in (private, shared):
            region.fill(1)
        tracker.collect().commit()
        private.madvise(mmap.MADV_DONTNEED, PAGE, PAGE)
        watch = tracker._method._watch  # type: ignore[attr-defined]
        assert not len(watch.peek(tracker._method.mapped()))
        with tracker.collect() as round_:
            assert pages(private, round_.dropped) == [1]
            assert not round_.unsure


def dropped_late() -> None:
    """The event is read long before the memory is dropped, and it is written in between."""
    with (
        Userfaultfd() as slow,
        Region.anonymous(PAGE) as buffer,
        Region.memfd(4 * PAGE) as region,
        DirtyTracker(region, watch_drops=True) as tracker,
    ):
        region.fill(1)
        tracker.collect().commit()
        slow.register(buffer, mode=RegisterMode.MISSING)
        # It holds the file's lock, and waits for its buffer.
        writer = threading.Thread(
            target=libc.pwrite, args=(region.fd, ctypes.c_void_p(buffer.start), 8, 0)
        )
        writer.start()
        wait_until("it waits", lambda: bool(select.select([slow], [], [], 0)[0]))
        dropper = threading.Thread(
            target=lambda: region.madvise(mmap.MADV_REMOVE, 2 * PAGE, PAGE), daemon=True
        )
        dropper.start()
        wait_until("its event is read", lambda: bool(pages(region, tracker.peek().unsure)))
        for number in range(3):
            with tracker.collect() as round_:
                assert pages(region, round_.unsure) == [2] or pages(region, round_.written) == [2]
                assert region.read(2 * PAGE, 1)[0] == 1 + number, "it has not been dropped yet"
                round_.commit()
            region.write(2 * PAGE, bytes([2 + number]))
        slow.zeropage(buffer)
        writer.join()
        dropper.join()
        assert region.read(2 * PAGE, 1) == b"\0"
        with tracker.collect() as round_:
            assert 2 in pages(region, round_.written | round_.unsure)
            round_.commit()


@needs_kernel_faults()
def test_a_range_is_reported_until_it_is_dropped() -> None:
    run_child(dropped_late)


def peeked_before_it_is_dropped() -> None:
    """The thread was seen outside in the round before the event that `peek` reads."""
    goes = threading.Event()
    with (
        Userfaultfd() as slow,
        Region.anonymous(PAGE) as buffer,
        Region.memfd(4 * PAGE) as region,
        DirtyTracker(region, watch_drops=True) as tracker,
    ):
        region.fill(1)
        slow.register(buffer, mode=RegisterMode.MISSING)

        def drop() -> None:
            goes.wait()
            region.madvise(mmap.MADV_REMOVE, 2 * PAGE, PAGE)

        dropper = threading.Thread(target=drop, daemon=True)
        dropper.start()
        tid = dropper.native_id
        assert tid is not None
        wait_until("it sleeps", lambda: _drops._is_outside(tid))
        # Threads are looked at only after an event.
        region.madvise(mmap.MADV_REMOVE, 3 * PAGE, PAGE)
        tracker.collect().commit()
        # It holds the file's lock, and waits for its buffer.
        writer = threading.Thread(
            target=libc.pwrite, args=(region.fd, ctypes.c_void_p(buffer.start), 8, 0)
        )
        writer.start()
        wait_until("it waits", lambda: bool(select.select([slow], [], [], 0)[0]))
        goes.set()
        wait_until("its event is read", lambda: 2 in pages(region, tracker.peek().unsure))
        for _ in range(3):
            with tracker.collect() as round_:
                assert 2 in pages(region, round_.unsure)
                round_.commit()
        slow.zeropage(buffer)
        writer.join()
        dropper.join()
        with tracker.collect() as round_:
            assert 2 in pages(region, round_.unsure | round_.written)


@needs_kernel_faults()
def test_a_range_that_peek_saw_is_reported_until_it_is_dropped() -> None:
    run_child(peeked_before_it_is_dropped)


def has_status(pid: int, status: str) -> bool:
    return psutil.Process(pid).status() == status


def reader_of(pid: int) -> int:
    """Return the process that reads events for a process; wait until it has its name."""
    found: list[int] = []

    def is_found() -> bool:
        for child in psutil.Process(pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.name() == "uffd-drops":
                    found.append(child.pid)
        return bool(found)

    wait_until("there is a reader", is_found)
    return found[0]


def dropped_and_collected_at_once() -> None:
    with Region.memfd(4 * PAGE) as region, DirtyTracker(region, watch_drops=True) as tracker:
        region.fill(1)
        tracker.collect().commit()
        # It continues as soon as the reader has read, before the reader does anything else.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        reader = reader_of(os.getpid())
        os.sched_setaffinity(reader, os.sched_getaffinity(0))
        os.sched_setscheduler(reader, os.SCHED_IDLE, os.sched_param(0))
        until = time.monotonic() + 5  # on a busy machine the reader seldom runs
        for number in range(100):
            if time.monotonic() > until:
                break
            region.madvise(mmap.MADV_REMOVE, number % 4 * PAGE, PAGE)
            with tracker.collect() as round_:
                assert number % 4 in pages(region, round_.unsure | round_.written), number
                round_.commit()
            region.write(number % 4 * PAGE, b"x")


def test_a_drop_is_in_the_next_round() -> None:
    run_child(dropped_and_collected_at_once)


def reader_is_killed() -> None:
    with Region.memfd(4 * PAGE) as region, DirtyTracker(region, watch_drops=True) as tracker:
        tracker.collect().commit()
        os.kill(reader_of(os.getpid()), signal.SIGKILL)
        dropper = threading.Thread(
            target=lambda: region.madvise(mmap.MADV_REMOVE, PAGE, PAGE), daemon=True
        )
        dropper.start()
        reported: list[int] = []

        def all_are_reported() -> bool:
            with tracker.collect() as round_:
                reported[:] = pages(region, round_.unsure | round_.written)
            return reported == [0, 1, 2, 3]

        wait_until("what may have been missed is reported", all_are_reported)
        dropper.join()
        assert reader_of(os.getpid())


def test_a_killed_reader_is_replaced() -> None:
    run_child(reader_is_killed)


def no_other_reader() -> None:
    with Userfaultfd() as uffd:
        become_nobody()
        drops = DropReader(uffd.fileno())
        reader = reader_of(os.getpid())
        # The other one is a child too, which must not be mistaken for the one that is missing.
        with closing(drops), closing(DropReader(uffd.fileno())):
            assert drops.take()[1] is False
            os.kill(reader, signal.SIGKILL)
            wait_until("it ends", lambda: has_status(reader, psutil.STATUS_ZOMBIE))
            most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
            resource.setrlimit(resource.RLIMIT_NPROC, (0, most))
            for _ in range(2):
                with pytest.raises(OSError, match="temporarily unavailable"):
                    drops.take()
            resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
            assert [drops.take()[1], drops.take()[1]] == [True, False]


@needs_privilege()
def test_a_reader_that_cannot_be_replaced() -> None:
    """That something may be missing is said as soon as there is a reader again."""
    run_child(no_other_reader)


TARGET = """
import ctypes, mmap, os, sys
fd = os.memfd_create("shared")
os.ftruncate(fd, 64 * 4096)
memory = mmap.mmap(fd, 64 * 4096)
memory[:] = b"x" * len(memory)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    memory.madvise(mmap.MADV_REMOVE, int(line) * 4096, 4096)
    print("dropped", flush=True)
"""
TRACKER = """
import os, sys
from pyuffd import DirtyTracker, Process
process = Process(int(sys.argv[1]))
tracker = DirtyTracker(process, watch_drops=True)
tracker.collect().commit()
print("tracks", flush=True)
for line in sys.stdin:
    if line == "exec\\n":
        os.execv("/bin/sleep", ["sleep", "600"])
    with tracker.collect() as round_:
        found = round_.written | round_.unsure
        print(*(f"{item.start} {item.end}" for item in found), flush=True)
        round_.commit()
"""


@needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")
@pytest.mark.parametrize("how", ["stopped", "killed", "replaced"])
def test_nobody_waits_for_a_tracker_that_is(how: str) -> None:
    """A target drops memory meanwhile; 'replaced': by an execve(2)."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([sys.executable, "-c", TARGET], **options) as target,  # type: ignore[call-overload]
        subprocess.Popen(
            [sys.executable, "-c", TRACKER, str(target_start(target)[0])], **options
        ) as tracker,  # type: ignore[call-overload]
    ):
        place = target_start(target)[1]
        try:
            assert tracker.stdout.readline() == "tracks\n"
            reader = reader_of(tracker.pid)
            if how == "stopped":
                tracker.send_signal(signal.SIGSTOP)
                wait_until(
                    "it is stopped",
                    lambda: has_status(tracker.pid, psutil.STATUS_STOPPED),
                )
            elif how == "killed":
                tracker.kill()
            else:
                print("exec", file=tracker.stdin, flush=True)
            if how != "stopped":
                # A program that has replaced it does not reap it.
                wait_until("its reader ends", lambda: ended(reader))
            for page in (3, 9):
                print(page, file=target.stdin, flush=True)
                assert target.stdout.readline() == "dropped\n"
            if how == "stopped":
                tracker.send_signal(signal.SIGCONT)
                print(file=tracker.stdin, flush=True)
                spans = [int(word) for word in tracker.stdout.readline().split()]
                found = list(zip(spans[::2], spans[1::2], strict=True))
                for page in (3, 9):
                    at = place + page * PAGE
                    assert any(start <= at < end for start, end in found), "after it continued"
        finally:
            tracker.kill()
            target.kill()


_places: dict[int, int] = {}


def target_start(target: subprocess.Popen[str]) -> tuple[int, int]:
    """Return its pid, and where its shared memory is."""
    if target.pid not in _places:
        assert target.stdout is not None
        _places[target.pid] = int(target.stdout.readline())
    return target.pid, _places[target.pid]


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or has_status(pid, psutil.STATUS_ZOMBIE)


def test_a_thread_in_the_call_is_not_outside() -> None:
    """By what the kernel shows of its system call: sleeping threads, and one that runs."""
    ends = threading.Event()
    tids: list[int] = []

    def spin() -> None:
        tids.append(threading.get_native_id())
        while not ends.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin)
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        wait_until("it sleeps", lambda: has_status(sleeper.pid, psutil.STATUS_SLEEPING))
        assert _drops._is_outside(sleeper.pid)
        sleeper.kill()
    assert _drops._is_outside(threading.get_native_id())
    assert _drops._is_outside(1 << 22), "it has ended"
    thread.start()
    try:
        wait_until("seen on a CPU", lambda: bool(tids) and not _drops._is_outside(tids[0]))
    finally:
        ends.set()
        thread.join(10 * SCALE)


def test_what_cannot_be_watched() -> None:
    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.EVENT_REMOVE
    with Userfaultfd(features=features) as uffd, Region.memfd(PAGE) as region:
        with pytest.raises(ValueError, match="of its own"):
            DirtyTracker(uffd, [region], watch_drops=True)
        uffd.register(region, mode=RegisterMode.WP)
        uffd.unregister(region)


@needs_kernel_faults()
def test_wp_sync_sees_drops_anyway() -> None:
    with Region.memfd(4 * PAGE) as region:
        region.fill(1)
        with DirtyTracker(region, method="wp-sync", watch_drops=True) as tracker:
            region.madvise(mmap.MADV_REMOVE, PAGE, PAGE)
            assert pages(region, tracker.collect().written) == [1]
