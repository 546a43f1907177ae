"""A process whose first thread has ended, by pthread_exit(3), and which runs on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyuffd import DirtyTracker, Process, Snapshot, write_core
from pyuffd.testing._run import SCALE
from tests._memory import PAGE
from tests.process._core import Core
from tests.process._tracking import METHODS, OF_OTHERS

pytestmark = OF_OTHERS
BYTES = 1 << 20
CONTENT = b"\7" * BYTES


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ended") / "ended_leader"
    source = Path(__file__).parent / "ended_leader.c"
    subprocess.run(["cc", "-O1", "-pthread", "-o", path, source], check=True)
    return str(path)


@contextmanager
def running(*command: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0) as popen:
        assert popen.stdout is not None
        try:
            yield popen, int(popen.stdout.readline(), 16)
        finally:
            popen.kill()


def works_on(popen: subprocess.Popen[bytes]) -> None:
    assert popen.stdin is not None
    assert popen.stdout is not None
    popen.stdin.write(b"\n")
    assert int(popen.stdout.readline()) > 0


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_it_has_memory_and_is_saved(program: str, tmp_path: Path) -> None:
    """Everything is reached by another of its threads, and again and again."""
    with running(program) as (popen, area), Process(popen.pid) as process:
        assert state_of(popen.pid) == "Z"
        assert process.pid == popen.pid != process.memory_tid
        assert process.read(area, BYTES) == CONTENT
        assert {mapping.path for mapping in process.mappings(details=True)} >= {program, "[stack]"}
        for method in METHODS:
            options = {"max_stall_s": None if method == "stopped" else 0.2 * SCALE}
            Snapshot.take(process, tmp_path / method, method=method, durable=False, **options)  # type: ignore[arg-type]
            works_on(popen)
            with Snapshot.open(tmp_path / method) as snapshot:
                assert snapshot.read(area, BYTES) == CONTENT
                target = snapshot.manifest["target"]
                assert (target["pid"], target["exe"]) == (popen.pid, program)
                assert target["arguments"] == [program]
            report = write_core(process, tmp_path / f"{method}.core", method=method, **options)  # type: ignore[arg-type]
            works_on(popen)
            assert report.threads == 1
            with Core(tmp_path / f"{method}.core") as core:
                assert core.read(area, BYTES) == CONTENT
        # Another process that is asked by the id of a thread, as a tool may have it.
        with Process(process.memory_tid) as same:
            assert same.pid == popen.pid


def test_its_first_thread_ends_meanwhile(program: str) -> None:
    """What was opened by the first thread's id is opened by another's."""
    with (
        running(program, "later") as (popen, area),
        Process(popen.pid) as process,
        DirtyTracker(process) as tracker,
    ):
        assert process.memory_tid == popen.pid
        before = {mapping.start for mapping in process.mappings()}
        os.kill(popen.pid, signal.SIGUSR1)
        give_up = time.monotonic() + 10 * SCALE
        while state_of(popen.pid) != "Z":
            assert time.monotonic() < give_up
            time.sleep(0.001)
        assert {mapping.start for mapping in process.mappings()} & before
        assert process.memory_tid != popen.pid
        assert process.read(area, BYTES) == CONTENT
        works_on(popen)
        with tracker.collect() as round_:
            assert round_.written.bytes >= PAGE
            round_.commit()
        with process.stopped() as stop:
            assert stop.threads == 1
        works_on(popen)
