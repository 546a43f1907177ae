"""Sources that block the thread that reads them, by driver: Python, files, other threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    LayoutChangedError,
    Region,
    Userfaultfd,
)
from pyuffd.testing import needs_privilege
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._faults import Task
from tests.kernel._mounts import mounted
from tests.kernel._serving import is_lost, wait_for_stalled
from tests.process._hung_files import FUSE, Server, connect
from tests.process._pitfalls import with_and_without_events

LIMIT_S = 0.5
REST_S = 10.0  # on a busy machine
HELPER_REST_S = 25.0  # a helper process has ten seconds to answer
PAGES = 64


def never(offset: int, length: int) -> bytes:
    threading.Event().wait()
    raise AssertionError


def with_the_lock(offset: int, length: int) -> bytes:
    """Never returns, and keeps the interpreter's lock."""
    while True:
        ctypes.PyDLL(None).sleep(1000)


def from_a_pipe(offset: int, length: int) -> bytes:
    return os.read(os.pipe()[0], length)  # no process writes


def stopped(handler: Handler, rest_s: float = REST_S) -> HandlerError:
    """Stop within the limit; return the failure."""
    began = time.monotonic()
    with pytest.raises(HandlerError) as caught:
        handler.stop(timeout_s=LIMIT_S)
    assert time.monotonic() - began < LIMIT_S + rest_s
    return caught.value


# Sources in Python

PYTHON = {"never": never, "with-the-lock": with_the_lock, "from-a-pipe": from_a_pipe}


def check_python(driver: str, name: str, features: int) -> None:
    function = PYTHON[name]
    uffd, region = Userfaultfd(features=Feature(features)), Region.anonymous(4 * PAGE)
    handler = Handler(uffd, driver=driver, stall_timeout_s=60)  # type: ignore[arg-type]
    source = CallableSource(function)
    handler.serve(region, source)
    handler.start()
    reader = Task(is_lost, region, PAGE, PAGE)
    wait_for_stalled(uffd, 1)
    time.sleep(0.2)  # it is read, and requested
    error = stopped(handler, HELPER_REST_S)
    assert error.start == region.start + PAGE
    assert repr(source) in str(error)
    assert reader.result(), "zeros"
    assert is_lost(region, 0, PAGE)
    uffd.close()
    region.close()


@pytest.mark.crossing
@with_and_without_events
@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("thread", "never"),
        ("thread", "from-a-pipe"),
        ("process", "never"),
        ("process", "from-a-pipe"),
        ("process", "with-the-lock"),
    ],
)
def test_python(driver: str, name: str, features: Feature) -> None:
    run_child(check_python, driver, name, int(features), budget_s=40)


# The inline driver, and threads beside the leader


def waiting_for_another(features: Feature, driver: str) -> tuple[Handler, Region, Userfaultfd, int]:
    """A handler whose source is memory that another userfaultfd never fills, at this address."""
    never_, source = Userfaultfd(), Region.anonymous(4 * PAGE)
    region, view = Region.anonymous(4 * PAGE), source.memoryview()
    handler = Handler(Userfaultfd(features=features), driver=driver)  # type: ignore[arg-type]
    handler.serve(region, BufferSource(view))
    never_.register(source)
    handler.start()
    return handler, region, never_, source.start


def check_inline() -> None:
    handler, region, never_, _ = waiting_for_another(Feature.SIGBUS, "inline")
    Task(region.touch, PAGE, 1)
    wait_for_stalled(never_, 1)
    error = stopped(handler)
    assert "test-task" in str(error)  # the thread that faulted
    assert error.start == region.start + PAGE
    assert is_lost(region)
    os._exit(0)  # that thread will never end


@needs_kernel_faults()
def test_inline() -> None:
    run_child(check_inline, budget_s=20)


def check_populate(features: int) -> None:
    """populate() waits for the source, and no thread waits for the page: the handler just ends."""
    handler, region, never_, start = waiting_for_another(Feature(features), "native")
    populater = Task(handler.populate, region)
    wait_for_stalled(never_, 1)
    reader = Task(is_lost, region, 2 * PAGE, PAGE)
    wait_for_stalled(never_, 2)
    stopped(handler)
    assert reader.result()
    assert is_lost(region)
    handler.uffd.close()
    never_.zeropage(start, 4 * PAGE)
    with pytest.raises((LayoutChangedError, OSError)):
        populater.result()
    assert is_lost(region)


@needs_kernel_faults()
@with_and_without_events
def test_populate(features: Feature) -> None:
    run_child(check_populate, int(features), budget_s=20)


EXITING = """
import sys, threading
from pyuffd import *
from tests.process.test_stuck_drivers import waiting_for_another
from tests.kernel._faults import Task
from tests.kernel._serving import is_lost, wait_for_stalled
handler, region, never, start = waiting_for_another(Feature(0), {driver!r})
sys.kept = handler, region, never
Task(is_lost, region, 4096, 4096)
wait_for_stalled(never, 1)
print("exits", flush=True)
"""


@needs_kernel_faults()
@pytest.mark.parametrize("driver", ["native", "thread"])
def test_interpreter_exit(driver: str) -> None:
    ended = run_child(EXITING.format(driver=driver), budget_s=40)
    assert ended.stdout == "exits\n"
    assert "BufferSource" in ended.stderr


# Files


@contextlib.contextmanager
def hung_file() -> Iterator[tuple[Server, str]]:
    """A file on a file system that answers until it is told to hang."""
    connection = connect()
    options = {"fd": str(connection), "rootmode": "40000", "user_id": "0", "group_id": "0"}
    with mounted("fuse", **options) as folder:
        server = Server(connection, os.urandom(PAGES * PAGE))
        try:
            yield server, f"{folder}/file"
        finally:
            os.kill(server.pid, signal.SIGKILL)
            os.waitpid(server.pid, 0)
            os.close(connection)  # threads that wait for it get an error


def check_hung_file(driver: str, way: str) -> None:
    with hung_file() as (server, path):
        uffd, region = Userfaultfd(), Region.anonymous(PAGES * PAGE)
        other = Region.anonymous(PAGES * PAGE)
        handler = Handler(uffd, driver=driver)  # type: ignore[arg-type]
        source = FileSource(path)
        for one in (region, other):
            handler.serve(one, source)
        handler.start()
        assert len(region.read(0, 4)) == 4
        server.hang()
        reader = Task(is_lost, region, (PAGES - 1) * PAGE, PAGE)
        time.sleep(0.3)
        began = time.monotonic()
        if way == "unserve":  # of the other one, for which no thread waits: closing its file may
            handler.unserve(other)
            assert time.monotonic() - began < REST_S
        error = stopped(handler, HELPER_REST_S)
        assert repr(source) in str(error)
        assert reader.result(), "zeros"
        assert is_lost(other, (PAGES - 1) * PAGE, PAGE)
    os._exit(0)


@pytest.mark.crossing
@needs_privilege()
@pytest.mark.skipif(not Path(FUSE).exists(), reason="this kernel has no FUSE")
@pytest.mark.parametrize("way", ["stop", "unserve"])
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_hung_file(driver: str, way: str) -> None:
    run_child(check_hung_file, driver, way, budget_s=40)
