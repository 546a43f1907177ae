"""The SIGBUS handler of the inline driver beside others, other signals and many threads."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyuffd import BufferSource, FileSource, HandlerError, Region, RegisterMode, ZeroSource
from tests._child import run_child
from tests._memory import PAGE, memory_params
from tests.kernel._serving import content, peek, run_threads, serving

SIGBUS = signal.SIGBUS
SA_NODEFER, SA_ONSTACK = 0x40000000, 0x08000000
BUS_ERROR = "Fatal Python error: Bus error"


@pytest.fixture(scope="session")
def sigbus_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A C library with its own SIGBUS handler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler; neither cc nor gcc is there")
    target = tmp_path_factory.mktemp("sigbus") / "sigbus.so"
    source = Path(__file__).parent / "sigbus.c"
    options = ["-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *options, "-o", target, source], check=True)
    return str(target)


def load(path: str) -> Any:
    library = ctypes.CDLL(path)
    for name in ("address", "blocked_after_read"):
        getattr(library, name).restype = ctypes.c_uint64
    for name in ("guarded_read", "plain_read", "errno_after_read", "blocked_after_read"):
        getattr(library, name).argtypes = [ctypes.c_uint64]
    return library


@contextlib.contextmanager
def truncated_file() -> Iterator[Region]:
    """A mapped file without content: every access is a SIGBUS that is not pyuffd's."""
    with tempfile.TemporaryFile(buffering=0) as file:
        file.truncate(4 * PAGE)
        with Region.file(file, 4 * PAGE) as region:
            file.truncate(0)
            yield region


def started(name: str = "anon", **options: Any) -> Any:
    """Serve eight pages of known content inline, started."""

    @contextlib.contextmanager
    def run() -> Iterator[tuple[Any, Region, bytes]]:
        with serving("inline", name, **options) as (handler, memory):
            region = memory.pages(8)
            data = content(region.length)
            handler.serve(region, BufferSource(data))
            handler.start()
            yield handler, region, data

    return run()


# faulthandler


def with_faulthandler(order: str) -> None:
    faulthandler.disable()
    if order == "before":
        faulthandler.enable()
    with started() as (handler, region, data), Region.anonymous(PAGE) as late:
        if order == "after":
            region.touch(0, 1)
            faulthandler.enable()
            handler.serve(late, ZeroSource())  # puts pyuffd's handler back on top
            late.touch()
        assert region.read() == data
        with truncated_file() as other:
            print("touching", flush=True)
            peek(other)
            os._exit(3)


@pytest.mark.parametrize("order", ["before", "after"])
def test_faulthandler(order: str) -> None:
    """It reports a SIGBUS that is not pyuffd's, and the process dies of it."""
    died = run_child(with_faulthandler, order, expect=-SIGBUS)
    assert died.stdout == "touching\n"
    assert died.stderr.count(BUS_ERROR) == 1


def faulthandler_disabled(when: str) -> None:
    faulthandler.disable()
    with started() as (handler, region, data), Region.anonymous(PAGE) as late:
        faulthandler.enable()
        handler.serve(late, ZeroSource())  # puts pyuffd's handler back on top
        if when == "running":
            faulthandler.disable()
        assert region.read() == data
        handler.stop()
    faulthandler.disable()
    with truncated_file() as other:
        print("touching", flush=True)
        peek(other)
        os._exit(3)


@pytest.mark.parametrize("when", ["running", "stopped"])
def test_faulthandler_disabled_again(when: str) -> None:
    """A SIGBUS that cannot be resolved still kills after the handler in between is gone."""
    died = run_child(faulthandler_disabled, when, expect=-SIGBUS, budget_s=5)
    assert died.stdout == "touching\n"
    assert BUS_ERROR not in died.stderr


# The default action


def unowned(default: int) -> None:
    faulthandler.disable()
    signal.signal(SIGBUS, signal.Handlers(default))
    with started() as (_, region, data):
        assert region.read() == data
        with truncated_file() as other:
            print("touching", flush=True)
            peek(other)
            os._exit(3)


@pytest.mark.parametrize("default", [signal.SIG_DFL, signal.SIG_IGN])
def test_unowned_sigbus_is_fatal(default: signal.Handlers) -> None:
    """The kernel kills for a fault's SIGBUS even if SIGBUS is ignored."""
    died = run_child(unowned, int(default), expect=-SIGBUS)
    assert died.stdout == "touching\n"


def sent(how: str, with_faulthandler: bool) -> None:
    if not with_faulthandler:
        faulthandler.disable()
    with started() as (_, region, data):
        assert region.read() == data
        print("sending", flush=True)
        if how == "raise":
            signal.raise_signal(SIGBUS)
        elif how == "thread":
            signal.pthread_kill(threading.get_ident(), SIGBUS)
        else:
            subprocess.run(["kill", "-BUS", str(os.getpid())], check=True)
            signal.pause()
        os._exit(3)


@pytest.mark.parametrize("with_faulthandler", [False, True], ids=["default", "faulthandler"])
@pytest.mark.parametrize("how", ["raise", "thread", "kill"])
def test_sent_sigbus_kills(how: str, with_faulthandler: bool) -> None:
    died = run_child(sent, how, with_faulthandler, expect=-SIGBUS)
    assert died.stdout == "sending\n"
    assert died.stderr.count(BUS_ERROR) == with_faulthandler


def sent_ignored() -> None:
    faulthandler.disable()
    signal.signal(SIGBUS, signal.SIG_IGN)
    with started() as (_, region, data):
        signal.raise_signal(SIGBUS)
        assert region.read() == data
    assert signal.getsignal(SIGBUS) is signal.SIG_IGN


def test_sent_sigbus_stays_ignored() -> None:
    run_child(sent_ignored)


def python_handler() -> None:
    faulthandler.disable()
    received: list[int] = []
    signal.signal(SIGBUS, lambda number, _: received.append(number))
    with started() as (handler, region, data):
        assert region.read(0, PAGE) == data[:PAGE]
        signal.raise_signal(SIGBUS)
        assert received == [SIGBUS]
        assert region.read() == data
        handler.stop()
        signal.raise_signal(SIGBUS)
        assert received == [SIGBUS] * 2


def test_python_signal_handler() -> None:
    run_child(python_handler)


# A program's own handler in C


def own_handler(path: str, flags: int) -> None:
    library = load(path)
    faulthandler.disable()
    assert library.install(flags) == 0
    with started() as (handler, region, data), truncated_file() as other:
        assert not library.is_installed(flags)
        assert region.read(0, PAGE) == data[:PAGE]
        assert library.count() == 0  # it does not see ours
        assert library.guarded_read(other.start + 5) == -1
        assert (library.count(), library.address()) == (1, other.start + 5)
        assert library.guarded_read(region.start + PAGE) == data[PAGE]
        assert library.plain_read(other.start + PAGE) == 0  # it maps a page there
        assert library.count() == 2
        assert library.guarded_read(other.start + 2 * PAGE) == -1
        signal.raise_signal(SIGBUS)
        assert library.count() == 4
        assert region.read() == data
        handler.stop()
        assert library.is_installed(flags)
        assert library.guarded_read(other.start + 2 * PAGE) == -1
        assert library.count() == 5


@pytest.mark.parametrize("flags", [0, SA_NODEFER, SA_ONSTACK], ids=["plain", "nodefer", "onstack"])
def test_own_handler(sigbus_library: str, flags: int) -> None:
    run_child(own_handler, sigbus_library, flags)


def own_handler_in_threads(path: str) -> None:
    """Jumping out of the handler leaves no lock held: regions can still come and go."""
    library = load(path)
    library.install(0)
    with started() as (handler, region, data), truncated_file() as other:
        done = threading.Event()

        def jump(thread: int) -> None:
            for page in range(8):
                assert library.guarded_read(other.start + thread) == -1
                assert library.guarded_read(region.start + page * PAGE) == data[page * PAGE]

        def come_and_go() -> None:
            while not done.is_set():
                with Region.anonymous(PAGE) as short:
                    handler.serve(short, BufferSource(b"s" * PAGE))
                    assert short.read(0, 1) == b"s"

        background = threading.Thread(target=come_and_go)
        background.start()
        try:
            run_threads(*(functools.partial(jump, thread) for thread in range(4)))
        finally:
            done.set()
            background.join()
        assert library.count() == 32


def test_own_handler_in_threads(sigbus_library: str) -> None:
    run_child(own_handler_in_threads, sigbus_library)


def failure(path: str, name: str, mode: int) -> None:
    """A lost page is SIGBUS for the program's handler, and stop() names it."""
    library = load(path)
    library.install(0)
    with serving("inline", name) as (handler, memory):
        region = memory.pages(3)
        size, data = memory.page_size, content(region.length)
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(data)
            with FileSource(file) as source:
                handler.serve(region, source, mode=RegisterMode(mode))
            handler.start()
            file.truncate(size)
            for _ in range(3):
                assert library.guarded_read(region.start + size) == -1
            assert library.guarded_read(region.start) == data[0]
            assert [state for state in handler.page_states(region)] == [2, 5, 0]
            with pytest.raises(HandlerError) as caught:
                handler.stop()
        assert (caught.value.start, caught.value.length) == (region.start + size, size)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENODATA
        assert library.guarded_read(region.start + size) == -1
        assert library.guarded_read(region.start + 2 * size) == -1
        assert library.count() == 5


@pytest.mark.parametrize("name", memory_params())
@pytest.mark.parametrize(
    "mode",
    [RegisterMode.MISSING, RegisterMode.MISSING | RegisterMode.WP],
    ids=["missing", "missing-wp"],
)
def test_lost_page(sigbus_library: str, name: str, mode: RegisterMode) -> None:
    run_child(failure, sigbus_library, name, mode)


def thread_state(path: str) -> None:
    library = load(path)
    with started() as (_, region, _data):
        assert library.errno_after_read(region.start) == 77
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        assert library.blocked_after_read(region.start + PAGE) == 1 << (signal.SIGUSR1 - 1)


def test_errno_and_signal_mask_survive(sigbus_library: str) -> None:
    run_child(thread_state, sigbus_library)


# The previous action is restored


def restored() -> None:
    faulthandler.disable()
    mine = []
    signal.signal(SIGBUS, lambda *_: mine.append(1))
    with started() as (first, region, data):
        with started() as (second, other, other_data):
            first.stop()
            assert other.read() == other_data  # the second one still needs it
            signal.raise_signal(SIGBUS)
            assert second.stats().faults["missing"] == 8
        del region, data
    signal.raise_signal(SIGBUS)
    assert len(mine) == 2
    status = Path("/proc/self/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    assert caught >> (SIGBUS - 1) & 1
    signal.signal(SIGBUS, signal.SIG_DFL)
    with started() as (handler, region, data):
        assert region.read() == data
        handler.stop()
        caught = int(Path("/proc/self/status").read_text().split("SigCgt:")[1].split()[0], 16)
        assert not caught >> (SIGBUS - 1) & 1


def test_previous_action_comes_back() -> None:
    run_child(restored)


# Threads and other signals


def threads_and_timer(name: str) -> None:
    """A timer calls a Python handler every millisecond while threads fault."""
    fired: list[int] = []
    signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
    with serving("inline", name) as (handler, memory):
        count = 16 if memory.is_hugetlb else 2048
        region = memory.pages(count)
        size, data = memory.page_size, content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)

        def read(first: int) -> None:
            for page in range(first, count, 4):
                assert region.read(page * size, 64) == data[page * size :][:64]

        run_threads(*(functools.partial(read, first) for first in range(4)))
        deadline = time.monotonic() + 20
        while len(fired) < 5 and time.monotonic() < deadline:
            signal.pause()
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert len(fired) >= 5
        assert region.read() == data
        stats = handler.stats()
        assert stats.faults["missing"] == stats.filled_pages == count


@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb"))
def test_interval_timer(name: str) -> None:
    run_child(threads_and_timer, name)


def same_pages(threads: int) -> None:
    """All threads touch the same pages in the same order, so that they collide."""
    with serving("inline", "anon", prefetch=4 * PAGE) as (handler, memory):
        region = memory.pages(1024)
        data = content(region.length)
        handler.serve(region, BufferSource(data), mode=RegisterMode.MISSING | RegisterMode.WP)
        handler.start()

        def read_and_write(thread: int) -> None:
            for page in range(1024):
                assert region.read(page * PAGE + 64, 32) == data[page * PAGE + 64 :][:32]
                region.write(page * PAGE + thread, b"w")

        run_threads(*(functools.partial(read_and_write, thread) for thread in range(threads)))
        stats = handler.stats()
        assert stats.filled_pages == 1024
        assert stats.failed == 0
        assert stats.faults["wp"] >= 1024
        for page in range(1024):
            at = page * PAGE
            assert region.read(at, 64) == b"w" * threads + data[at + threads : at + 64]


def test_threads_on_the_same_pages() -> None:
    run_child(same_pages, 8)


def signal_handler_faults() -> None:
    """A Python signal handler touches served memory itself."""
    with started() as (handler, region, data):
        read: list[bytes] = []
        signal.signal(signal.SIGUSR1, lambda *_: read.append(region.read(PAGE, PAGE)))
        signal.raise_signal(signal.SIGUSR1)
        assert read == [data[PAGE : 2 * PAGE]]
        assert handler.stats().faults["missing"] == 1
        assert region.read() == data


def test_fault_inside_a_signal_handler() -> None:
    run_child(signal_handler_faults)


# A thread that blocks SIGBUS


def blocks_sigbus(how: str, memory: str) -> None:
    with serving("inline", memory) as (handler, make):
        region = make.pages(2)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, {SIGBUS})
        if how == "populated":
            handler.populate(region)
        if how == "method":
            assert region.read(0, 1) == data[:1]
            region.write(region.page_size, b"x")
        else:
            assert ctypes.string_at(region.start, 1) == data[:1]
        assert SIGBUS in signal.pthread_sigmask(signal.SIG_BLOCK, set())


@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize(("how", "ends"), [("plain", -SIGBUS), ("method", 0), ("populated", 0)])
def test_a_thread_that_blocks_sigbus(how: str, ends: int, memory: str) -> None:
    """Linux kills a thread that blocks its fault's signal; methods of Region unblock it."""
    run_child(blocks_sigbus, how, memory, expect=ends)
