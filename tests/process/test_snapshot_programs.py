"""Snapshots of real programs while they work: the image is what was read of them in the stop."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pyuffd import (
    DirtyTracker,
    MappingKind,
    PageRanges,
    Process,
    RunState,
    Snapshot,
    SnapshotReport,
)
from pyuffd._image_calls import Pieces
from pyuffd.snapshot import _capture
from pyuffd.snapshot._capture import Used
from pyuffd.testing._run import SCALE
from tests._memory import PAGE
from tests.process._attach import status
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
METHODS: list[Used] = ["cow", "precopy"]
# Where a program is in the stop, with everything that it had then still to be read.
IN_STOP = {"cow": "saves", "precopy": "copied"}
OWN = (MappingKind.ANONYMOUS, MappingKind.HEAP, MappingKind.STACK)
LIMIT_S = 2.0 * SCALE
START_S = 30 * SCALE
PIECE = 1 << 20


def needs_program(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"there is no {name}")


class Reference:
    """What a program's private memory has at the instant, read in the stop."""

    def __init__(self, process: Process, method: Used, monkeypatch: pytest.MonkeyPatch) -> None:
        self._process = process
        self._at = IN_STOP[method]
        self.content: list[tuple[int, bytes]] = []
        monkeypatch.setattr(_capture, "barrier", self._read)

    def _read(self, name: str) -> None:
        if name != self._at:
            return
        self.content.clear()
        for mapping in self._process.mappings():
            if mapping.shared or mapping.inode or mapping.kind not in OWN:
                continue
            pieces = Pieces([(mapping.start, mapping.end, 0, False)])
            found = PageRanges(pieces.scan(self._process.pagemap.fileno()))
            for each in found:
                for at in range(each.start, each.end, PIECE):
                    length = min(PIECE, each.end - at)
                    data = bytearray(length)
                    if not self._process.copy(PageRanges.of([(at, at + length)]), data).lost:
                        self.content.append((at, bytes(data)))

    @property
    def bytes(self) -> int:
        return sum(len(data) for _, data in self.content)

    def check(self, snapshot: Snapshot) -> int:
        """Compare everything; return how many bytes are LOST."""
        lost = 0
        for start, expected in self.content:
            try:
                assert snapshot.read(start, len(expected)) == expected, hex(start)
                continue
            except LookupError:
                pass
            for at in range(0, len(expected), PAGE):
                if snapshot.state(start + at) is RunState.LOST:
                    lost += PAGE
                    continue
                assert snapshot.read(start + at, PAGE) == expected[at : at + PAGE], hex(start + at)
        return lost


def taken(
    process: Process,
    path: Path,
    method: Used,
    monkeypatch: pytest.MonkeyPatch,
    *,
    tracker: DirtyTracker | None = None,
    parent: Path | None = None,
) -> SnapshotReport:
    """Take a snapshot, and compare it with what was read in the stop."""
    reference = Reference(process, method, monkeypatch)
    report = Snapshot.take(
        process,
        path,
        method=method,
        shared="pause",
        tracker=tracker,
        parent=parent,
        max_stall_s=LIMIT_S,
        durable=False,
    )
    monkeypatch.setattr(_capture, "barrier", None)
    assert status(process.pid)["TracerPid"] == "0"
    assert reference.bytes > 1 << 20
    with Snapshot.open(path) as snapshot:
        assert reference.check(snapshot) <= report.dropped
        assert method == "cow" or not report.dropped
    return report


# CPython

THREADS = """
import sys, threading
accounts = [{"name": f"account {n}", "balance": 1000, "log": [b"x" * 500]} for n in range(4000)]
lock = threading.Lock()
moves = 0
def work(seed):
    global moves
    while True:
        seed = (seed * 1103515245 + 12345) & 0x7fffffff
        a, b = accounts[seed % 4000], accounts[seed // 4000 % 4000]
        with lock:
            a["balance"] -= 7
            b["balance"] += 7
            a["log"] = a["log"][-3:] + [b"%d" % seed * 40]
            moves += 1
for seed in (1, 2, 3):
    threading.Thread(target=work, args=(seed,), daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    with lock:
        print(sum(one["balance"] for one in accounts), moves, flush=True)
"""


@contextmanager
def running(*command: str) -> Iterator[tuple[Process, Callable[[], list[int]]]]:
    """Run a program that says when it is ready; yield it, and what asks it for numbers."""
    pipe = subprocess.PIPE
    popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)

    def ask() -> list[int]:
        assert popen.stdin is not None
        assert popen.stdout is not None
        popen.stdin.write(b"\n")
        return [int(word) for word in popen.stdout.readline().split()]

    try:
        assert popen.stdout is not None
        assert popen.stdout.readline() == b"ready\n"
        with Process(popen.pid) as process:
            yield process, ask
    finally:
        popen.kill()
        popen.communicate()


@pytest.mark.parametrize("method", METHODS)
def test_python_with_threads(method: Used, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sum stays right, it continues to work, and the image is what it had in the stop."""
    with running(sys.executable, "-c", THREADS) as (process, ask):
        before = ask()
        taken(process, tmp_path / "one", method, monkeypatch)
        after = ask()
        assert before[0] == after[0] == 4_000_000
        while ask()[1] <= after[1]:
            time.sleep(0.01)


# OpenJDK

JAVA = """
import java.util.concurrent.ConcurrentHashMap;
public class Work {
    static final long[] balances = new long[100000];
    static long moves = 0;
    static ConcurrentHashMap<Integer, byte[]> garbage = new ConcurrentHashMap<>();
    public static void main(String[] words) throws Exception {
        for (int i = 0; i < 3; i++) {
            final int seed = i;
            Thread thread = new Thread(() -> {
                java.util.Random random = new java.util.Random(seed);
                while (true) {
                    int a = random.nextInt(100000), b = random.nextInt(100000);
                    garbage.put(a % 1000, new byte[1000 + b % 3000]);
                    synchronized (balances) { balances[a] -= 7; balances[b] += 7; moves++; }
                }
            });
            thread.setDaemon(true);
            thread.start();
        }
        System.out.println("ready");
        System.out.flush();
        while (System.in.read() >= 0) {
            long sum = 0, done;
            synchronized (balances) { for (long each : balances) sum += each; done = moves; }
            System.out.println(sum + " " + done);
            System.out.flush();
        }
    }
}
"""


@pytest.mark.stress
@needs_program("java")
@pytest.mark.parametrize("method", METHODS)
def test_a_java_virtual_machine(
    method: Used, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its collector moves objects."""
    (tmp_path / "Work.java").write_text(JAVA)
    with running("java", "-Xmx40m", str(tmp_path / "Work.java")) as (process, ask):
        for number in range(3):
            taken(process, tmp_path / str(number), method, monkeypatch)
            before = ask()
            while ask()[1] <= before[1]:
                time.sleep(0.01)
            assert before[0] == 0


# redis


class Redis:
    """A server that writes an append-only file and frees lazily, and the load on it."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        words = [
            "--port",
            str(self.port),
            "--save",
            "",
            "--dir",
            str(folder),
            "--appendonly",
            "yes",
        ]
        for name in ("lazyfree-lazy-user-del", "lazyfree-lazy-server-del", "lazyfree-lazy-expire"):
            words += [f"--{name}", "yes"]
        self.server = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
        give_up = time.monotonic() + START_S
        while True:
            try:
                assert self.ask("PING") == "+PONG"
                break
            except OSError:
                assert time.monotonic() < give_up
                time.sleep(0.02)
        for number in range(100):
            assert self.ask("SET", f"kept:{number}", f"value {number} " * 100) == "+OK"
        self.load = subprocess.Popen(
            [
                *("redis-benchmark", "-p", str(self.port), "-q", "-l", "-n", "100000"),
                *("-t", "set,lpush,hset,spop", "-r", "20000", "-d", "700"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, *words: str) -> str:
        """Return an answer, without its length."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=START_S) as connection:
            text = "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
            connection.sendall(f"*{len(words)}\r\n{text}".encode())
            answer = connection.makefile("rb")
            first = answer.readline().decode().rstrip()
            return answer.read(int(first[1:])).decode() if first[0] == "$" else first

    def check(self) -> None:
        """What was put in before the load is there, and the load runs."""
        for number in range(0, 100, 9):
            assert self.ask("GET", f"kept:{number}") == f"value {number} " * 100
        assert self.load.poll() is None
        assert self.server.poll() is None

    def close(self) -> None:
        for popen in (self.load, self.server):
            popen.kill()
            popen.wait()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    (tmp_path / "redis").mkdir()
    server = Redis(tmp_path / "redis")
    yield server
    server.close()


@pytest.mark.stress
@needs_program("redis-server")
@needs_program("redis-benchmark")
@pytest.mark.parametrize("method", METHODS)
def test_redis_under_load(
    method: Used, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an append-only file, and memory that another thread frees."""
    with Process(redis.server.pid) as process:
        for number in range(3):
            taken(process, tmp_path / str(number), method, monkeypatch)
            redis.check()


@pytest.mark.stress
@needs_program("redis-server")
@needs_program("redis-benchmark")
def test_twenty_in_a_row(redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are of their instants; our memory and our descriptors do not grow."""
    ours = psutil.Process()
    sizes: list[int] = []
    descriptors: list[int] = []
    with Process(redis.server.pid) as process:
        for number in range(20):
            if number % 5 == 0:
                taken(process, tmp_path / "one", METHODS[number // 5 % 2], monkeypatch)
                shutil.rmtree(tmp_path / "one")
            Snapshot.take(
                process,
                tmp_path / "one",
                method=METHODS[number % 2],
                shared="pause",
                max_stall_s=LIMIT_S,
                durable=False,
            )
            with Snapshot.open(tmp_path / "one") as snapshot:
                snapshot.verify()
            shutil.rmtree(tmp_path / "one")
            redis.check()
            sizes.append(ours.memory_info().rss)
            descriptors.append(ours.num_fds())
    assert len(set(descriptors[4:])) == 1, descriptors
    # Between two references, which are as large as the server.
    for first in (5, 10, 15):
        assert sizes[first + 4] - sizes[first] < 16 << 20, sizes


@pytest.mark.stress
@needs_program("redis-server")
@needs_program("redis-benchmark")
def test_a_chain_of_a_loaded_server(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each link has what was read in its stop, through all its parents."""
    with Process(redis.server.pid) as process, DirtyTracker(process) as tracker:
        parent: Path | None = None
        for number in range(5):
            path = tmp_path / str(number)
            taken(process, path, "precopy", monkeypatch, tracker=tracker, parent=parent)
            with Snapshot.open(path) as snapshot:
                snapshot.verify()
                assert snapshot.depth == number
                states = {run.state for run in snapshot.runs}
                assert (RunState.PARENT in states) == (number > 0)
            parent = path
            redis.check()
