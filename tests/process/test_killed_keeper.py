"""The keeper of the process driver is killed: this is said on stderr, with or without the GIL."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys

import pytest

from pyuffd import CallableSource, Handler, Region, Userfaultfd
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.testing._needs import needs_kernel_faults
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._memory import PAGE

pytestmark = needs_kernel_faults()


def filled(offset: int, length: int) -> bytes:
    return b"x" * length


def kill_keeper(handler: Handler) -> None:
    """Kill it, and wait until the worker process has ended too: until then it serves."""
    engine = handler._engine
    assert isinstance(engine, RemoteEngine)
    keeper, worker = engine.pids()
    pidfd = os.pidfd_open(worker)
    os.kill(keeper, signal.SIGKILL)
    select.select([pidfd], [], [])
    os.close(pidfd)


def hang(with_gil: bool) -> None:
    """Fault on a page that is never filled, with or without the GIL."""
    uffd, region = Userfaultfd(), Region.anonymous(2 * PAGE)
    handler = Handler(uffd, driver="process")
    handler.serve(region, CallableSource(filled))
    handler.start()
    kill_keeper(handler)
    if with_gil:
        ctypes.string_at(region.start, 1)
    else:
        region.read(0, PAGE)


@pytest.mark.parametrize("with_gil", [True, False], ids=["gil", "no-gil"])
def test_said_at_once(with_gil: bool) -> None:
    code = f"from tests.process.test_killed_keeper import hang; hang({with_gil})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=8 * SCALE)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    assert "has ended, perhaps killed" in said
    assert "stop() poisons" in said


def quiet() -> None:
    """A handler that stops writes nothing about its helper."""
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    for _ in range(3):
        with (
            Userfaultfd() as uffd,
            Region.anonymous(PAGE) as region,
            Handler(uffd, driver="process") as handler,
        ):
            handler.serve(region, CallableSource(filled))
            assert region.read(0, PAGE) == b"x" * PAGE
    os.set_blocking(reading, False)
    with pytest.raises(BlockingIOError):
        os.read(reading, 1000)


def test_nothing_said_of_a_stop() -> None:
    run_child(quiet, budget_s=30)
