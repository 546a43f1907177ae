"""The thread of the native driver: name, signals, CPUs, spinning."""

from __future__ import annotations

import functools
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from pyuffd import BufferSource, Handler, HandlerError, Region, UffdOSError, ZeroSource
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE
from tests._tasks import of_threads
from tests.kernel._serving import (
    content,
    handler_of,
    is_lost,
    run_threads,
    serving,
    thread_names,
    wait_until,
)


def handler_thread(handler: Handler) -> Path:
    """Return the /proc folder of a handler's thread."""
    name = f"uffd-h{handler.uffd.fileno()}"
    names = of_threads("self", "comm")
    (found,) = (thread for thread, its in names.items() if its.strip() == name)
    return Path(f"/proc/self/task/{found}")


def status(task: Path, key: str) -> str:
    for line in (task / "status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return line.split(maxsplit=1)[1]
    raise KeyError(key)


def test_thread_name_and_end() -> None:
    before = thread_names()
    with handler_of("native") as handler:
        assert thread_names() == before
        handler.start()
        assert handler_thread(handler).exists()
        assert len(thread_names()) == len(before) + 1
    wait_until(lambda: thread_names() == before, "the thread is gone")


def test_all_signals_are_blocked() -> None:
    with handler_of("native") as handler:
        handler.start()
        blocked = int(status(handler_thread(handler), "SigBlk"), 16)
    # 32 and 33 belong to the C library.
    catchable = set(range(1, 65)) - {signal.SIGKILL, signal.SIGSTOP, 32, 33}
    assert {number for number in catchable if not blocked >> (number - 1) & 1} == set()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()  # the caller's are as they were


@pytest.mark.parametrize("options", [{"cpus": [0]}, {"cpus": [0], "spin_us": 5.0}])
def test_one_cpu(options: dict[str, Any]) -> None:
    if 0 not in os.sched_getaffinity(0):
        pytest.skip("needs CPU 0; this process may not use it")
    run_child(one_cpu, options)


def one_cpu(options: dict[str, Any]) -> None:
    with serving("native", "anon", **options) as (handler, memory):
        region = memory.pages(64)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        assert status(handler_thread(handler), "Cpus_allowed_list") == "0"
        assert region.read() == data
        assert handler.stats().faults["missing"] == 64


def test_cpus_as_allowed() -> None:
    with handler_of("native") as handler:
        handler.start()
        task = handler_thread(handler)
        allowed = status(Path("/proc/thread-self"), "Cpus_allowed_list")
        assert status(task, "Cpus_allowed_list") == allowed


def spinning(spin_us: float) -> None:
    with serving("native", "anon", spin_us=spin_us) as (handler, memory):
        region = memory.pages(64)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        for page in range(0, 64, 2):
            assert region.read(page * PAGE, 8) == data[page * PAGE :][:8]
        task = handler_thread(handler)
        # It goes to sleep, and a fault wakes it.
        wait_until(lambda: status(task, "State").startswith("S"), "the thread sleeps")
        assert region.read() == data


@pytest.mark.parametrize("spin_us", [0, 0.5, 10_000])
def test_spinning(spin_us: float) -> None:
    run_child(spinning, spin_us)


def signals() -> None:
    """Signals interrupt faulting threads: faults are sent again, and each page is filled once."""
    with serving("native", "anon") as (handler, memory):
        region = memory.pages(512)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        received = []
        signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
        handler.start()
        done = threading.Event()
        main = threading.main_thread().ident
        assert main is not None

        def send() -> None:
            while not done.is_set() or len(received) < 20:
                signal.pthread_kill(main, signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGUSR1)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            for page in range(512):
                assert region.read(page * PAGE, 16) == data[page * PAGE :][:16]
        finally:
            done.set()
            sender.join()
        handler.stop()
        stats = handler.stats()
        assert stats.faults["missing"] == stats.filled_pages == 512
        assert stats.messages >= 512
        assert stats.failed == 0
        assert region.read() == data


def test_signals_do_not_disturb() -> None:
    run_child(signals)


def interval_timer() -> None:
    """The same with a timer that fires every millisecond, and faults in other threads too."""
    with serving("native", "anon") as (handler, memory):
        region = memory.pages(1024)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        fired = []
        signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        handler.start()

        def read(first: int) -> None:
            for page in range(first, 1024, 4):
                assert region.read(page * PAGE, 16) == data[page * PAGE :][:16]

        run_threads(*(functools.partial(read, first) for first in range(4)))
        wait_until(lambda: len(fired) > 3, "the timer fires")
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert handler.stats().faults["missing"] == 1024


def test_interval_timer() -> None:
    run_child(interval_timer)


@pytest.mark.parametrize("cpus", [[], [-1], [1 << 20], [0, 1 << 20]])
def test_bad_cpus(cpus: list[int]) -> None:
    with pytest.raises(ValueError), handler_of("native", cpus=cpus):
        pass


def no_threads() -> None:
    """If no thread can be created start() says so, and the handler can be stopped."""
    # Limit the address space: a new thread needs a stack, and nothing else here needs as much.
    # glibc keeps the stack of a thread that has ended (the child's first watchdog): use it up.
    threads = 3 if "libtsan" in os.environ.get("LD_PRELOAD", "") else 2
    wait_until(lambda: len(os.listdir("/proc/self/task")) == threads, "one watchdog is left")
    release = threading.Event()
    other = threading.Thread(target=release.wait)
    other.start()
    with serving("native", "anon") as (handler, memory):
        region = memory.pages(1)
        handler.serve(region, ZeroSource())
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
        fds = os.listdir("/proc/self/fd")
        with pytest.raises(UffdOSError) as caught:
            handler.start()
        assert caught.value.errno in {11, 12}
        assert os.listdir("/proc/self/fd") == fds
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        handler.start()
        region.touch()
        assert handler.stats().faults["missing"] == 1
    release.set()
    other.join()


def test_no_room_for_the_thread() -> None:
    run_child(no_threads)


def unserved() -> None:
    """A range that the program registered, and no handler serves: an error, not a stall.

    The engine waits for a while, as the range may be served next.
    """
    with Region.anonymous(PAGE) as region, handler_of("native") as handler:
        handler.start()
        handler.uffd.register(region)
        assert is_lost(region)
        wait_until(lambda: handler.stats().unserved == 1, "the fault is counted")
        with pytest.raises(HandlerError) as caught:
            handler.stop()
        assert caught.value.start == region.start


@needs_kernel_faults()
def test_registered_but_not_served() -> None:
    run_child(unserved)
