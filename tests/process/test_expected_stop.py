"""How long a process will be stopped, as the commands expect it, and how long it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyuffd import Process, Snapshot
from pyuffd.cli._expected import needed, whole_pause
from pyuffd.snapshot import _capture
from tests._child import crowd
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
MAPPINGS = 6000
TARGET = """
import ctypes, os, sys, threading, time
mappings, threads, mib = map(int, sys.argv[1:])
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
W = ctypes.c_size_t
for index in range(mappings):
    at = libc.mmap(None, W(4096), 1 + 2 * (index % 2), 0x22, -1, W(0))
    if index % 2:
        ctypes.memset(at, 1, 1)
threading.stack_size(65536)
for _ in range(threads):
    threading.Thread(target=time.sleep, args=[600], daemon=True).start()
memory = os.urandom(1 << 20) * mib
print("ready", flush=True)
time.sleep(600)
"""
# An idle machine keeps well inside; others take turns on a busy one.
AT_MOST = 10
AT_LEAST = 5
ATTEMPTS = 3


@pytest.mark.parametrize("what", [(MAPPINGS, 0, 0), (0, 150, 0), (0, 0, 128)], ids=str)
def test_expected_stop(what: tuple[int, int, int], tmp_path: Path) -> None:
    command = [sys.executable, "-c", TARGET, *map(str, what)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as target:
        try:
            assert target.stdout is not None
            assert target.stdout.readline()
            with Process(target.pid) as process:
                whole = min(whole_pause(process) for _ in range(ATTEMPTS))
                least = min(needed(process)[2] for _ in range(ATTEMPTS))
                pauses = {"stopped": 0.0, "precopy": 0.0}
                for method in ("stopped", "precopy"):
                    pauses[method] = min(
                        Snapshot.take(
                            process,
                            tmp_path / f"{method}{number}",
                            method=method,
                            max_stall_s=60,
                            shared="skip",
                            durable=False,
                        ).pause_s
                        for number in range(ATTEMPTS)
                    )
        finally:
            target.kill()
    print(whole, least, pauses)
    assert whole / AT_LEAST <= pauses["stopped"] <= whole * AT_MOST * crowd()
    assert least / AT_LEAST <= pauses["precopy"]


def test_mappings_are_looked_at_before_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made of them is used in the stop: there is no time for each of them."""
    command = [sys.executable, "-c", TARGET, str(MAPPINGS), "0", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as target:
        try:
            assert target.stdout is not None
            assert target.stdout.readline()
            made: list[str] = []
            reached = ["before"]
            real = _capture.pieces_of

            def noted(layout: object) -> object:
                made.append(reached[-1])
                return real(layout)  # type: ignore[arg-type]

            monkeypatch.setattr(_capture, "pieces_of", noted)
            monkeypatch.setattr(_capture, "barrier", reached.append)
            with Process(target.pid) as process:
                Snapshot.take(process, tmp_path / "one", method="stopped", shared="skip")
        finally:
            target.kill()
    assert made == ["begun"]
