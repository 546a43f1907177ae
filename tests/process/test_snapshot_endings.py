"""A process that exits, execs or forks at each point: a good snapshot or a named error."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from pyuffd import Process, Snapshot, SnapshotError, UffdOSError
from pyuffd.snapshot import _capture
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
TARGET = """
import os, sys
data = bytearray(b"d" * (4 << 20))
print("ready", flush=True)
for line in sys.stdin:
    if line == "exec\\n":
        os.execv(sys.executable, [sys.executable, "-c", "print('done', flush=True); input()"])
    if line == "exit\\n":
        os._exit(0)
    if line == "fork\\n" and not os.fork():
        data[:] = bytes(len(data))
        os._exit(0)
    print("done", flush=True)
"""
POINTS = [
    ("stopped", "begun"),
    ("stopped", "captured"),
    ("precopy", "begun"),
    ("precopy", "ahead"),
    ("precopy", "round 0"),
    ("precopy", "resumed"),
    ("cow", "attached"),
    ("cow", "armed"),
    ("cow", "resumed"),
    ("cow", "begun sweep"),
    ("cow", "swept"),
]


@pytest.mark.crossing
@pytest.mark.parametrize("event", ["exit", "exec", "fork"])
@pytest.mark.parametrize(("method", "point"), POINTS)
def test_it_ends_or_forks(
    method: str, point: str, event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = subprocess.PIPE
    popen = subprocess.Popen([sys.executable, "-c", TARGET], stdin=pipe, stdout=pipe, bufsize=0)
    assert popen.stdin is not None
    assert popen.stdout is not None
    assert popen.stdout.readline() == b"ready\n"
    happened: list[str] = []
    failed = ""

    def happen(name: str) -> None:
        if name != point or happened:
            return
        happened.append(name)
        assert popen.stdin is not None
        popen.stdin.write(f"{event}\n".encode())
        if event == "exit":
            popen.wait(10 * SCALE)
        elif event == "exec":
            give_up = time.monotonic() + 10 * SCALE
            while process.is_running:
                assert time.monotonic() < give_up
                time.sleep(0.005)

    limit = None if method == "stopped" else SCALE
    try:
        with Process(popen.pid) as process:
            monkeypatch.setattr(_capture, "barrier", happen)
            try:
                Snapshot.take(
                    process,
                    tmp_path / "one",
                    method=method,  # type: ignore[arg-type]
                    max_stall_s=limit,
                    durable=False,
                )
            except SnapshotError as error:
                failed = error.reason
            if failed:
                assert (failed, event == "fork") == ("ended", False)
                assert os.listdir(tmp_path) == []
            else:
                with Snapshot.open(tmp_path / "one") as snapshot:
                    snapshot.verify()
                if event == "fork":
                    assert process.is_running
        assert happened == [point]
        if event != "exit":
            assert popen.stdout.readline() == b"done\n"
            assert popen.poll() is None
    finally:
        popen.kill()
        popen.communicate()


def test_an_exception_right_after_the_directory_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a signal's handler; nothing is left."""
    mkdir = os.mkdir

    def interrupted(path: str | os.PathLike[str], mode: int = 0o777) -> None:
        mkdir(path, mode)
        raise KeyboardInterrupt

    popen = subprocess.Popen(["sleep", "60"])
    try:
        with Process(popen.pid) as process:
            monkeypatch.setattr(os, "mkdir", interrupted)
            with pytest.raises(KeyboardInterrupt):
                Snapshot.take(process, tmp_path / "1", method="stopped", durable=False)
        assert list(tmp_path.iterdir()) == []
    finally:
        popen.kill()
        popen.wait()


def with_little_address_space(pid: int, path: str, method: Literal["precopy", "cow"]) -> None:
    with Process(pid) as process:
        Snapshot.take(process, f"{path}/first", method=method, max_stall_s=10 * SCALE)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (size + (36 << 20), resource.RLIM_INFINITY))
        with pytest.raises(UffdOSError, match="ulimit -v") as caught:
            Snapshot.take(process, f"{path}/second", method=method, max_stall_s=10 * SCALE)
        assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize("method", ["precopy", "cow"])
def test_the_limit_of_memory_is_named(method: str, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as target:
        target_of = "tests.process.test_snapshot_endings:with_little_address_space"
        try:
            run_child(target_of, target.pid, str(tmp_path), method, budget_s=30 * SCALE)
            assert target.poll() is None
        finally:
            target.kill()
    assert os.listdir(tmp_path) == ["first"]
