"""A session gives back what it reserved of the machine, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyuffd.testing import _machine, needs_privilege
from pyuffd.testing._run import wait_for_end
from tests._child import ROOT, limit_s

pytestmark = needs_privilege("CAP_SYS_ADMIN")

CONTROLLER = """
import signal, sys
from pyuffd.testing import _machine
reservation = _machine.reserve(1)
print(reservation.pid, flush=True)
sys.stdin.read()
reservation.release()
"""
END_S = 30


def held(keeper: int) -> _machine.Entry | None:
    entries = json.loads(_machine.STATE.read_text())
    return next((_machine.Entry(**item) for item in entries if item["pid"] == keeper), None)


def is_swap(path: str | None) -> bool:
    return path is not None and path in Path("/proc/swaps").read_text()


@contextmanager
def controller() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a session's controller that has reserved; yield it and its keeper's pid."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", CONTROLLER],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())


def taken(keeper: int) -> _machine.Entry:
    entry = held(keeper)
    assert entry is not None
    assert entry.huge_pages == _machine.HUGE_PAGES_PER_WORKER
    assert is_swap(entry.swap_file)
    return entry


def assert_given_back(entry: _machine.Entry) -> None:
    assert held(entry.pid) is None
    assert entry.swap_file is not None
    assert not is_swap(entry.swap_file)
    assert not Path(entry.swap_file).exists()


def test_release() -> None:
    with controller() as (process, keeper):
        entry = taken(keeper)
        process.communicate(timeout=limit_s(END_S))
    assert process.returncode == 0
    assert_given_back(entry)


def test_controller_is_killed() -> None:
    with controller() as (process, keeper):
        entry = taken(keeper)
        process.kill()
        assert wait_for_end(keeper, limit_s(END_S))
    assert_given_back(entry)


def test_keeper_is_killed_too() -> None:
    with controller() as (process, keeper):
        entry = taken(keeper)
        os.kill(keeper, signal.SIGKILL)
        process.kill()
        assert wait_for_end(keeper, limit_s(END_S))
    assert held(keeper) == entry
    with controller() as (process, _):
        process.communicate(timeout=limit_s(END_S))
    assert_given_back(entry)
