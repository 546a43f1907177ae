"""Attaching to programs of several kinds, again and again, and while they end, execute or fork."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyuffd import DirtyTracker, Process
from pyuffd.testing import needs, needs_privilege
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._memory import PAGE
from tests._tasks import of_threads
from tests.process._attach import DEEDS, FEATURES, answers, seen, start, status, wait_until
from tests.process._redis import Connection, redis
from tests.process.test_track_process import needs_program

pytestmark = [needs(FEATURES), needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")]
ROUNDS, STRESS_ROUNDS = 30, 1000
SLEEP_MS, STRESS_SLEEP_MS = 1500, 20_000


def _build(folder: str, *options: str) -> str:
    source = Path(__file__).parent / "targets.c"
    target = f"{folder}/targets{len(options)}"
    subprocess.run(["cc", "-O2", "-pthread", *options, "-o", target, source], check=True)
    return target


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as made:
        yield made


@pytest.fixture(scope="module")
def program(folder: str) -> str:
    return _build(folder)


@pytest.fixture(scope="module")
def static_program(folder: str) -> str:
    return _build(folder, "-static")


@contextmanager
def running(program: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    target = start(program, *words)
    try:
        yield target
    finally:
        target.kill()
        target.communicate()


@pytest.mark.parametrize("deed", DEEDS)
def test_a_target_that_does_it_at_each_point(program: str, deed: str) -> None:
    """A barrier at each point of the injection; nothing hangs, and what remains runs."""
    run_child("tests.process._attach:deed_at_each_point", program, deed, budget_s=60)


def test_a_static_program(static_program: str) -> None:
    """Without a dynamic linker: the way home is in the program itself."""
    with running(static_program, "spin") as target, Process(target.pid) as process:
        assert not [m for m in process.mappings() if m.path.endswith(".so.6")]
        before = seen(target.pid)
        with DirtyTracker(process) as tracker:
            tracker.collect().commit()
            answers(target)
            with tracker.collect() as round_:
                assert round_.written.bytes >= PAGE, "its stack, at least"
            with process.stopped(10 * SCALE):
                pass
        assert seen(target.pid) == before
        answers(target)


@needs_program("fzf")
def test_a_go_program() -> None:
    """A runtime that makes threads by itself and signals them, and moves its stacks."""
    # A filter that answers each line at once.
    words = ["fzf", "--no-sort", "--filter", "needle"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as target:
        assert target.stdin is not None
        assert target.stdout is not None
        target.stdin.write(b"first needle\n")
        assert target.stdout.readline() == b"first needle\n"
        with Process(target.pid) as process:
            assert len(process.threads()) > 2
            for number in range(5):
                with DirtyTracker(process) as tracker:
                    tracker.collect().commit()
                    target.stdin.write(b"hay\n" * 1000 + b"needle %d\n" % number)
                    assert target.stdout.readline() == b"needle %d\n" % number
                    with tracker.collect() as round_:
                        assert round_.written.bytes >= PAGE
                with process.stopped(10 * SCALE) as stop:
                    assert stop.threads > 2
            assert status(target.pid)["TracerPid"] == "0"
        target.stdin.close()
        assert target.stdout.read() == b""
        assert target.wait(30 * SCALE) == 0


class Client(threading.Thread):
    """Keeps a redis-server busy, and checks each of its answers."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._connection = Connection(port)
        self.asked = 0
        self.wrong: list[bytes] = []
        self._ends = threading.Event()

    def run(self) -> None:
        with self._connection as connection:
            # A moment between them, for the interpreter's lock: it is to be busy, not this process.
            while not self._ends.wait(0.001) and not self.wrong:
                number = self.asked
                value = f"{number}:" + "x" * (number % 3000)
                for answer, wanted in (
                    (connection.ask("INCR", "count"), b":%d\r\n" % (number + 1)),
                    (connection.ask("SET", f"key{number % 100}", value), b"+OK\r\n"),
                    (
                        connection.ask("GET", f"key{number % 100}"),
                        b"$%d\r\n%s\r\n" % (len(value), value.encode()),
                    ),
                ):
                    if answer != wanted:
                        self.wrong.append(answer)
                self.asked += 1

    def end(self) -> None:
        self._ends.set()
        self.join(30 * SCALE)


def threads(pid: int) -> dict[int, str]:
    """Return how each of its threads is: running and sleeping are the same."""
    stats = of_threads(pid, "stat").items()
    return {tid: stat.rpartition(") ")[2][0].replace("R", "S") for tid, stat in stats}


def attached_again_and_again(program: str, rounds: int, sleep_ms: int) -> list[int]:
    """Attach to a busy server, to a thread that keeps its registers and to one that sleeps."""
    with (
        redis() as server,
        running(program, "spin") as spinner,
        running(program, "nanosleep", str(sleep_ms)) as sleeper,
        Process(server.pid) as busy,
        Process(spinner.pid) as spinning,
        Process(sleeper.pid) as sleeping,
    ):
        client = Client(server.port)
        client.start()
        wait_until("it is busy", lambda: client.asked > 10)
        processes = (busy, spinning, sleeping)
        before = {p.pid: (seen(p.pid), threads(p.pid)) for p in processes}
        pages = busy.mappings().bytes
        begin = time.monotonic()
        for number in range(rounds):
            for process in processes:
                if process is sleeping and (time.monotonic() - begin) * 1000 > sleep_ms / 2:
                    continue
                with process.attach(FEATURES):
                    pass
                # A descriptor may be open for a moment: the server reads its own /proc/self/stat.
                wait_until(
                    f"round {number}: as before",
                    lambda pid=process.pid: (seen(pid), threads(pid)) == before[pid],
                )
            if number % 10 == 0:
                answers(spinner)
        client.end()
        assert client.wrong == []
        assert sleeper.stdout is not None
        result = sleeper.stdout.readline().decode().rsplit(" ", 1)
        assert result[0] == "0 0"
        # If it started over each time, it would have slept twice as long.
        assert sleep_ms - 2 <= float(result[1]) < sleep_ms * 1.4
        # What it has allocated since for itself, not pages of ours.
        assert busy.mappings().bytes - pages < 64 << 20
        return [client.asked]


@needs_program("redis-server")
def test_a_busy_server_in_many_rounds(program: str) -> None:
    run_child(attached_again_and_again, program, ROUNDS, SLEEP_MS, budget_s=60)


@pytest.mark.stress
@needs_program("redis-server")
def test_a_busy_server_in_a_thousand_rounds(program: str) -> None:
    run_child(attached_again_and_again, program, STRESS_ROUNDS, STRESS_SLEEP_MS, budget_s=600)
