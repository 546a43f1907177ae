"""stop() while the helper processes are frozen: a debugger, SIGSTOP, a cgroup's freezer."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pyuffd import CallableSource, Handler, HandlerError, HelperLostError, Region, Userfaultfd
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.testing._needs import needs_kernel_faults
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._memory import PAGE
from tests._tasks import of_threads
from tests.kernel._faults import Task
from tests.kernel._serving import is_lost, wait_for_stalled, wait_until

pytestmark = needs_kernel_faults()

LIMIT_S = 1.0
REST_S = 10.0 * SCALE  # without the limit it was above 30 s


def filled(offset: int, length: int) -> bytes:
    return b"x" * length


def session(leader: int) -> list[int]:
    """Return the helper processes, which are those of the keeper's session."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.getsid(int(name)) == leader:
                found.append(int(name))
        except ProcessLookupError:
            continue
    return found


def is_frozen(pid: int) -> bool:
    """Whether every thread has stopped."""
    lines = of_threads(pid, "stat").values()
    return {line.rpartition(") ")[2][0] for line in lines} == {"T"}


def freeze(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(map(is_frozen, pids)), "they stop")


def check(who: str, drain: bool) -> None:
    uffd, region = Userfaultfd(), Region.anonymous(4 * PAGE)
    handler = Handler(uffd, driver="process")
    handler.serve(region, CallableSource(filled))
    handler.start()
    assert region.read(0, PAGE) == b"x" * PAGE
    engine = handler._engine
    assert isinstance(engine, RemoteEngine)
    keeper, worker = engine.pids()
    freeze({"all": session(keeper), "keeper": [keeper], "worker": [worker]}[who])
    # If only the keeper is frozen, the worker process continues to serve.
    reader = Task(is_lost, region, PAGE, PAGE)
    if who != "keeper":
        wait_for_stalled(uffd, 1)
    began = time.monotonic()
    with pytest.raises(HandlerError if who == "worker" else HelperLostError):
        handler.stop(drain, timeout_s=LIMIT_S)
    assert time.monotonic() - began < LIMIT_S + REST_S
    assert reader.result() is (who != "keeper")
    assert is_lost(region, 2 * PAGE, PAGE), "zeros"
    assert region.read(0, PAGE) == b"x" * PAGE
    wait_until(lambda: not session(keeper), "the helper processes end")
    uffd.close()
    region.close()


@pytest.mark.crossing
@pytest.mark.parametrize("drain", [True, False], ids=["drain", "no-drain"])
@pytest.mark.parametrize("who", ["all", "keeper", "worker"])
def test_stop(who: str, drain: bool) -> None:
    run_child(check, who, drain, budget_s=60)
