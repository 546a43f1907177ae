"""If one thread cannot be stopped, the others are not stopped for longer than was agreed to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyuffd import Feature, Process, StopTimeoutError, UffdOSError, write_core
from pyuffd import _remote_calls as calls
from pyuffd.snapshot import _core
from pyuffd.testing._run import SCALE
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
STALL_S = 0.05
# So that nothing depends on how long it takes to read the mappings.
LONG_S = 60.0
# A thread waits uninterruptibly until the event is read, which SIGUSR1 makes the first one do.
TARGET = """
import mmap, signal, sys, threading
from pyuffd import Feature, Region, Userfaultfd
uffd = Userfaultfd(features=Feature.EVENT_REMOVE)
region = Region.anonymous(4096)
uffd.register(region)
signal.signal(signal.SIGUSR1, lambda *_: uffd.read_events())
thread = threading.Thread(target=region.madvise, args=(mmap.MADV_DONTNEED,))
thread.start()
print(thread.native_id, flush=True)
while True:
    signal.pause()
"""


@contextlib.contextmanager
def waiting() -> Iterator[tuple[Process, int]]:
    """A process, and its thread that waits."""
    with subprocess.Popen(
        [sys.executable, "-c", TARGET],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYUFFD_WATCH": "0"},
    ) as popen:
        assert popen.stdout is not None
        try:
            tid = int(popen.stdout.readline())
            give_up = time.monotonic() + 10 * SCALE
            with Process(popen.pid) as process:
                while next(t for t in process.threads() if t.tid == tid).state != "D":
                    assert time.monotonic() < give_up
                    time.sleep(0.001)
                yield process, tid
        finally:
            popen.kill()


@dataclass
class Stop:
    """One that was tried."""

    limit_s: float
    code: int
    ns: int


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> list[Stop]:
    """What was tried to be stopped; a thread is waited for, and slept after that, for STALL_S."""
    seen: list[Stop] = []
    stop, sleep = calls.StoppedThreads.stop, time.sleep

    def noted(self: calls.StoppedThreads, pids: list[int], limit_ns: int, asleep_ns: int) -> None:
        stop(self, pids, limit_ns, min(asleep_ns, int(STALL_S * 1e9)))
        seen.append(Stop(asleep_ns / 1e9, self.code, self.ns))

    monkeypatch.setattr(_core, "STOP_LIMIT_S", 2 * LONG_S)
    monkeypatch.setattr(calls.StoppedThreads, "stop", noted)
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, STALL_S)))
    return seen


@pytest.mark.parametrize("method", ["precopy", "cow", "stopped"])
def test_others_are_let_go_in_time(method: Any, stops: list[Stop], tmp_path: Path) -> None:
    with waiting() as (process, tid):
        with pytest.raises(StopTimeoutError, match=r"state D .*userfault") as caught:
            write_core(process, tmp_path / "core", method=method, max_stall_s=LONG_S)
        assert caught.value.tid == tid
        assert {thread.state for thread in process.threads()} <= {"S", "R", "D"}
    assert len(stops) == 1 if method == "stopped" else len(stops) > 1
    assert {each.limit_s for each in stops} == {LONG_S}
    assert max(each.ns for each in stops) < LONG_S * 1e9 / 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["precopy", "cow"])
def test_it_is_tried_again(
    method: Any, stops: list[Stop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the thread is through, there is a core."""
    noted = calls.StoppedThreads.stop
    with waiting() as (process, _):

        def released(self: calls.StoppedThreads, *args: Any) -> None:
            noted(self, *args)
            if self.code:
                os.kill(process.pid, signal.SIGUSR1)

        monkeypatch.setattr(calls.StoppedThreads, "stop", released)
        core = write_core(process, tmp_path / "core", method=method, max_stall_s=LONG_S)
        assert core.method == method
        assert core.threads >= 1
    assert [bool(each.code) for each in stops][:1] == [True]
    assert not stops[-1].code


def test_a_frozen_cgroup_is_named(tmp_path: Path) -> None:
    """Version 1 stops its threads where no debugger can."""
    folder = Path(f"/sys/fs/cgroup/freezer/pyuffd-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made that freezes: {error}")
    with subprocess.Popen(["sleep", "600"]) as popen:
        try:
            (folder / "cgroup.procs").write_text(str(popen.pid))
            (folder / "freezer.state").write_text("FROZEN")
            give_up = time.monotonic() + 10 * SCALE
            while (folder / "freezer.state").read_text() != "FROZEN\n":
                assert time.monotonic() < give_up
            with Process(popen.pid) as process:
                with pytest.raises(StopTimeoutError, match=r"its cgroup /.* is frozen"):
                    process.stopped(0.1)
                with pytest.raises(UffdOSError, match=r"its cgroup /.* is frozen"):
                    process.attach(Feature.WP_ASYNC, timeout_s=0.1)
        finally:
            (folder / "freezer.state").write_text("THAWED")
            popen.kill()
            popen.wait()
            folder.rmdir()
