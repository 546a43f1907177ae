"""Helpers for the tests of handlers: served regions, and waits for what must happen."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from pyuffd import Feature, Handler, PageState, UffdOSError, Userfaultfd, _memory
from pyuffd.testing._opening import only_user_mode
from tests._child import run_child
from tests._memory import Memory, memory_of, memory_params
from tests._tasks import of_threads

Driver = Literal["native", "inline"]
AnyDriver = Literal[Driver, "thread", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "inline")
# Reached only if there is a bug: what we wait for must happen soon.
WAIT_S = 20.0
# A prime, so that no two of this many pages begin at the same place in the random bytes.
REPEATS = 65_537
OPEN_FOR_A_MOMENT = re.compile(r"/proc/(\d+/task/\d+/schedstat|loadavg)")

both_drivers = pytest.mark.parametrize("driver", DRIVERS)

Check = Callable[[Driver, str], None]


def everywhere(check: Check, *names: str, drivers: tuple[Driver, ...] = DRIVERS) -> Any:
    """Make a test that runs `check(driver, memory type)` in a child for each pair."""

    @pytest.mark.parametrize("driver", drivers)
    @pytest.mark.parametrize("name", memory_params(*names))
    def test(driver: Driver, name: str) -> None:
        run_child(check, driver, name)

    return test


def with_both_drivers(check: Callable[[Driver], None]) -> Any:
    """Make a test that runs `check(driver)` in a child for each driver."""

    @both_drivers
    def test(driver: Driver) -> None:
        run_child(check, driver)

    return test


@contextlib.contextmanager
def handler_of(
    driver: AnyDriver,
    features: Feature = Feature(0),  # noqa: B008 - an immutable flag
    **options: Any,
) -> Iterator[Handler]:
    """A handler that is not started, on a new userfaultfd."""
    options.setdefault("autostart", False)
    if driver == "inline":
        features |= Feature.SIGBUS
    with Userfaultfd(features=features) as uffd, Handler(uffd, driver=driver, **options) as handler:
        yield handler


@contextlib.contextmanager
def serving(
    driver: AnyDriver,
    name: str,
    features: Feature = Feature(0),  # noqa: B008
    **options: Any,
) -> Iterator[tuple[Handler, Memory]]:
    """A handler from `handler_of`, and a factory of regions that outlive it.

    With events of unmapping or moving, a test may leave holes in the regions.
    """
    holes = bool(features & (Feature.EVENT_UNMAP | Feature.EVENT_REMAP))
    with (
        contextlib.closing(memory_of(name, holes=holes)) as memory,
        handler_of(driver, features, **options) as handler,
    ):
        yield handler, memory


def content(length: int, seed: int = 1) -> bytes:
    """Return bytes in which all pages differ and none is full of zeros.

    The random bytes repeat after `REPEATS`, so megabytes cost no more than a copy.
    """
    some = random.Random(seed).randbytes(min(length, REPEATS))
    return (some * (length // REPEATS + 1))[:length]


def states(handler: Handler, region: Any) -> list[PageState]:
    """Return the state of every page of a served region."""
    return [PageState(state) for state in handler.page_states(region)]


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Wait until something has happened; fail if it does not in time."""
    deadline = time.monotonic() + WAIT_S
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {WAIT_S} s")
        os.sched_yield()


def wait_for_stalled(uffd: Userfaultfd, threads: int) -> None:
    """Wait until this many faults wait, whether their messages were read or not."""

    def stalled() -> bool:
        info = Path(f"/proc/self/fdinfo/{uffd.fileno()}").read_text()
        found = re.search(r"total:\s*(\d+)", info)
        return found is not None and int(found[1]) >= threads

    wait_until(stalled, f"{threads} threads wait for a fault")


def run_threads(*functions: Callable[[], object]) -> None:
    """Run functions at the same time, each in a thread; raise the first exception."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], object]) -> None:
        barrier.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def in_fork(function: Callable[[], object]) -> int:
    """Run a function in a fork of this process; return its exit code, negative for a signal.

    The fork exits with 0, or with 1 after an exception, and runs no exit handlers.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns about every thread, even C threads that hold no Python lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        # pyuffd warns that a fork reads zeros, which tests of forks expect.
        warnings.simplefilter("ignore", RuntimeWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def open_fds() -> set[str]:
    """Return the descriptors of this process by name, without those that are open only briefly.

    One of these is the folder that lists them; the engine's thread opens others as it starts.
    """
    names = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            file = os.readlink(f"/proc/self/fd/{fd}")
            if not OPEN_FOR_A_MOMENT.fullmatch(file):
                names.add(f"{fd} {file}")
    return names


def thread_names() -> list[str]:
    """Return the names of the threads of this process."""
    return sorted(name.strip() for name in of_threads("self", "comm").values())


def is_lost(region: Any, offset: int = 0, length: int | None = None) -> bool:
    """Whether user code that reads this memory gets SIGBUS, and system calls get EFAULT."""
    if not only_user_mode():
        return is_efault(region, offset, length)
    # With UFFD_USER_MODE_ONLY, system calls get EFAULT for every missing page.
    try:
        _memory.read(region.start + offset, region.page_size if length is None else length)
    except UffdOSError:  # a poisoned huge page looks like one that the pool could not provide
        return True
    return False


def is_efault(region: Any, offset: int = 0, length: int | None = None) -> bool:
    """Whether a system call that reads this memory fails with EFAULT."""
    length = region.page_size if length is None else length
    with open(os.memfd_create("sink"), "wb", buffering=0) as sink:
        libc = ctypes.CDLL(None, use_errno=True)
        written = libc.write(sink.fileno(), ctypes.c_void_p(region.start + offset), length)
        if written >= 0:
            assert written == length, f"{written:#x} bytes of {length:#x}"
            return False
        assert ctypes.get_errno() == errno.EFAULT, os.strerror(ctypes.get_errno())
        return True


def peek(region: Any, offset: int = 0, n: int = 1) -> bytes:
    """Read as user code does, without the GIL: it raises SIGBUS where a method would raise."""
    target = ctypes.create_string_buffer(n)
    ctypes.memmove(target, region.start + offset, n)
    return target.raw


def wait_in_system_call(thread: threading.Thread, number: int) -> None:
    """Wait until a thread is inside this system call."""

    def inside() -> bool:
        line = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text()
        return line.split()[0] == str(number)

    wait_until(inside, f"{thread.name} is in system call {number}")


def ending_thread() -> threading.Thread:
    """Wait for the thread that ends the handler, and return it."""

    def found() -> list[threading.Thread]:
        return [
            one
            for one in threading.enumerate()
            if one.name.startswith("uffd-stop") and one.native_id
        ]

    wait_until(lambda: bool(found()), "the end has begun")
    return found()[0]
