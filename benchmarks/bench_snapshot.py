"""Snapshots and cores of running programs: pauses beside fork() and gcore, redis beside BGSAVE.

Both members of a pair look at the same process, in turn.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil

from benchmarks._pairs import MemberError, Row, Skipped, Target, ratio_row
from benchmarks._redis import Redis, lacking
from benchmarks._setup import Setup, available_memory
from pyuffd import DirtyTracker, Process, Snapshot, SnapshotReport, StopTimeoutError, write_core

_MIB = 1 << 20
_THREADS = 8
_THREADS_OF_REGISTERS = (1, 8, 100)
_REGISTERS_MIB = 32
_PAGES_PER_S = 20_000
#: Larger than any pause: a stalled snapshot would give no number.
_STALL_S = 5.0
_ATTEMPTS = 10
_REDIS_KEYS = 200_000
_REDIS_ROUNDS = 3
_WRITE_CHUNK = 1 << 20

Method = Literal["cow", "precopy"]


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield pauses, throughput, cores and increments of a C program, and then redis."""
    size = 64 if setup.quick else 1024
    with tempfile.TemporaryDirectory(prefix="pyuffd-bench-") as name:
        folder = Path(name)
        with _writers(setup, size, _PAGES_PER_S) as target:
            yield from _pauses(setup, target, size, folder)
            yield from _gcore(setup, target, size, folder)
        with _writers(setup, size, 0) as target:
            yield _throughput(setup, target, size, folder)
            yield from _incremental(setup, target, size, folder)
        for threads in _THREADS_OF_REGISTERS:
            yield _registers(setup, threads, folder)
        yield _growth(setup, size, folder)
        yield from _redis(setup, folder)


class _Target:
    """The C program, and what it says."""

    def __init__(self, program: str, size: int, rate: int, threads: int) -> None:
        self.popen = subprocess.Popen(
            [program, str(size), str(threads), str(rate)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        if self.popen.stdout.readline() != "ready\n":
            raise MemberError("the program that is looked at has ended")
        self.process = Process(self.popen.pid)

    def ask(self, words: str) -> int:
        """Send a command; return the number in its answer."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(words + "\n")
        self.popen.stdin.flush()
        return int(self.popen.stdout.readline())

    def close(self) -> None:
        """End it."""
        self.process.close()
        self.popen.kill()
        self.popen.communicate()


@contextmanager
def _writers(setup: Setup, size: int, rate: int, threads: int = _THREADS) -> Iterator[_Target]:
    target = _Target(setup.programs.writers, size, rate, threads)
    try:
        yield target
    finally:
        target.close()


def _take(target: _Target, path: Path, method: Method, **more: object) -> SnapshotReport:
    """Take a snapshot that is not waited for on the disk."""
    return _taken(target.process, path, method=method, **more)


def _taken(process: Process, path: Path, **more: object) -> SnapshotReport:
    options: dict[str, object] = {"max_stall_s": _STALL_S, "durable": False} | more
    for _ in range(_ATTEMPTS - 1):
        # On a machine that is busy with other things a thread gets no CPU to stop on.
        with suppress(StopTimeoutError):
            return Snapshot.take(process, path, **options)  # type: ignore[arg-type]
    return Snapshot.take(process, path, **options)  # type: ignore[arg-type]


def _pauses(setup: Setup, target: _Target, size: int, folder: Path) -> Iterator[Row]:
    """Yield the pause beside fork() of the same process, and the longest write beside the pause."""
    methods: tuple[Method, ...] = ("cow", "precopy")
    for method in methods:
        forks: list[tuple[float, float]] = []
        waits: list[tuple[float, float]] = []
        for number in range(setup.rounds):
            fork_ms = target.ask("fork") / 1e6
            target.ask("reset")
            path = folder / f"{method}{number}"
            report = _take(target, path, method)
            waits.append((report.pause_s * 1e3, target.ask("write") / 1e6))
            forks.append((fork_ms, report.pause_s * 1e3))
            shutil.rmtree(path)
        yield ratio_row(
            f"{size} MiB, {_THREADS} threads: pause, {method} / fork()",
            forks,
            unit="ms",
            target=Target("<=", 0.5),
        )
        yield ratio_row(
            f"{size} MiB: longest write of the process, {method} / pause",
            waits,
            unit="ms",
            target=Target("<=", 1.0) if method == "precopy" else None,
        )


def _gcore(setup: Setup, target: _Target, size: int, folder: Path) -> Iterator[Row | Skipped]:
    """Yield a core's pause and time beside those of gcore, as the process sees them."""
    if shutil.which("gcore") is None:
        yield Skipped("core / gcore", "there is no gcore (install gdb)")
        return
    pauses: list[tuple[float, float]] = []
    times: list[tuple[float, float]] = []
    for _ in range(setup.rounds):
        target.ask("reset")
        began = time.perf_counter()
        subprocess.run(
            ["gcore", "-o", str(folder / "gcore"), str(target.popen.pid)],
            check=True,
            capture_output=True,
        )
        gcore_s = time.perf_counter() - began
        gcore_pause = target.ask("longest") / 1e6
        target.ask("reset")
        began = time.perf_counter()
        write_core(target.process, folder / "core", max_stall_s=_STALL_S)
        core_s = time.perf_counter() - began
        pauses.append((gcore_pause, target.ask("longest") / 1e6))
        times.append((gcore_s * 1e3, core_s * 1e3))
        for path in folder.glob("*core*"):
            path.unlink()
    name = f"{size} MiB, {_THREADS} threads: core / gcore"
    yield ratio_row(
        f"{name}, longest time without the process's thread",
        pauses,
        unit="ms",
        target=Target("<=", 0.02),
    )
    yield ratio_row(f"{name}, elapsed", times, unit="ms", target=Target("<=", 1.3))


def _throughput(setup: Setup, target: _Target, size: int, folder: Path) -> Row:
    """Return the throughput to the file beside a plain write of the same bytes, both synced."""
    pairs = []
    for number in range(setup.rounds):
        path = folder / f"full{number}"
        began = time.perf_counter()
        report = _take(target, path, "precopy", durable=True)
        ours = report.bytes / _MIB / (time.perf_counter() - began)
        shutil.rmtree(path)
        pairs.append((_plain_write(folder / "plain", report.bytes), ours))
    return ratio_row(
        f"{size} MiB: snapshot / sequential write of the same bytes, durable",
        pairs,
        unit="MiB/s",
        target=Target(">=", 0.6),
    )


def _plain_write(path: Path, length: int) -> float:
    chunk = memoryview(os.urandom(_WRITE_CHUNK))
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        left = length
        while left:
            left -= file.write(chunk[: min(left, _WRITE_CHUNK)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return length / _MIB / seconds


def _incremental(setup: Setup, target: _Target, size: int, folder: Path) -> Iterator[Row]:
    """Yield time and bytes of an incremental snapshot with 1 % written beside a full one."""
    times: list[tuple[float, float]] = []
    sizes: list[tuple[float, float]] = []
    for number in range(setup.rounds):
        full, more = folder / f"parent{number}", folder / f"child{number}"
        with DirtyTracker(target.process) as tracker:
            first = _take(target, full, "precopy", tracker=tracker)
            target.ask(f"touch {size * 256 // 100}")
            second = _take(target, more, "precopy", tracker=tracker, parent=full)
        times.append((first.seconds * 1e3, second.seconds * 1e3))
        sizes.append((first.bytes / _MIB, second.bytes / _MIB))
        shutil.rmtree(more)
        shutil.rmtree(full)
    name = f"{size} MiB: incremental with 1 % written / full"
    yield ratio_row(f"{name}, elapsed", times, unit="ms", target=Target("<=", 0.1))
    yield ratio_row(f"{name}, bytes", sizes, unit="MiB", target=Target("<=", 0.1))


def _registers(setup: Setup, threads: int, folder: Path) -> Row:
    """Return the pause of a whole process beside that of all its memory, without registers."""
    pairs = []
    with _writers(setup, _REGISTERS_MIB, _PAGES_PER_S // 40, threads) as target:
        for _ in range(2 * setup.rounds):
            pauses = []
            for ranges in (target.process.mappings(), None):
                report = _take(target, folder / "one", "precopy", ranges=ranges)
                pauses.append(report.pause_s * 1e3)
                shutil.rmtree(folder / "one")
            pairs.append((pauses[0], pauses[1]))
    return ratio_row(
        f"{_REGISTERS_MIB} MiB, {threads} threads: pause, precopy with registers / without",
        pairs,
        unit="ms",
        target=Target("<=", 1.1),
    )


def _growth(setup: Setup, size: int, folder: Path) -> Row | Skipped:
    """Return the pause of cow with 8 times the memory beside that with the memory."""
    name = f"pause, cow: {8 * size} MiB / {size} MiB"
    if available_memory() < 10 * size * _MIB:
        return Skipped(name, "too little memory is free")
    if shutil.disk_usage(folder).free < 10 * size * _MIB:
        return Skipped(name, "too little space is free")
    pairs = []
    with (
        _writers(setup, size, _PAGES_PER_S) as small,
        _writers(setup, 8 * size, _PAGES_PER_S) as large,
    ):
        for _ in range(setup.rounds):
            pauses = []
            for target in (small, large):
                report = _take(target, folder / "one", "cow")
                pauses.append(report.pause_s * 1e3)
                shutil.rmtree(folder / "one")
            pairs.append((pauses[0], pauses[1]))
    return ratio_row(name, pairs, unit="ms", target=Target("<=", 1.5))


# redis


class _Peak(threading.Thread):
    """The most memory that all others with the name, and a process, had beyond what they had."""

    def __init__(self, *pids: int) -> None:
        super().__init__(daemon=True)
        self._pids = pids
        self._done = threading.Event()
        self._first = self._now()
        self.bytes = 0

    def _now(self) -> int:
        # redis is a child of this process: it counts once.
        return sum(map(_memory, {one for pid in self._pids for one in (pid, *_children(pid))}))

    def run(self) -> None:
        while not self._done.wait(0.05):
            self.bytes = max(self.bytes, self._now() - self._first)

    def end(self) -> float:
        """Return it in MiB."""
        self._done.set()
        self.join()
        return self.bytes / _MIB


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def _memory(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    # A page that parent and child share counts once.
    found = re.findall(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    return sum(map(int, found)) << 10


def _redis(setup: Setup, folder: Path) -> Iterator[Row | Skipped]:
    """Yield SET while a snapshot is taken, beside undisturbed SET and SET during BGSAVE."""
    if why := lacking():
        yield Skipped("redis SET during a snapshot", why)
        return
    keys = _REDIS_KEYS // 10 if setup.quick else _REDIS_KEYS
    redis = Redis(folder, keys)
    alone: list[tuple[float, float]] = []
    ways: dict[str, list[tuple[float, float, float]]] = {"precopy": [], "cow": [], "BGSAVE": []}
    try:
        with Process(redis.popen.pid) as process:
            for _ in range(min(setup.rounds, _REDIS_ROUNDS)):
                alone.append(redis.load(keys))
                for way, results in ways.items():
                    results.append(_loaded(redis, process, way, folder))
    finally:
        redis.close()
    for way, results in ways.items():
        rates = [(a[0] / 1e3, b[0] / 1e3) for a, b in zip(alone, results, strict=True)]
        yield ratio_row(
            f"redis SET during {way} / undisturbed",
            rates,
            unit="k/s",
            target=None if way == "BGSAVE" else Target(">=", 0.6),
        )
        tails = [(a[1], b[1]) for a, b in zip(alone, results, strict=True)]
        yield ratio_row(f"redis SET, p99 during {way} / undisturbed", tails, unit="ms", target=None)
        yield Row(
            f"redis: memory of redis and of ours, more than before, during {way}",
            "MiB",
            ours=max(result[2] for result in results),
            target=None,
        )


def _loaded(redis: Redis, process: Process, way: str, folder: Path) -> tuple[float, float, float]:
    """Return rate, p99 and memory while a snapshot is taken again and again, or redis saves."""
    done = threading.Event()

    def again() -> None:
        while not done.is_set():
            if way == "BGSAVE":
                if not redis.saves():
                    redis.command("BGSAVE")
                done.wait(0.05)
                continue
            _taken(process, folder / "redis", method=way)
            shutil.rmtree(folder / "redis")

    saver = threading.Thread(target=again)
    peak = _Peak(redis.popen.pid, os.getpid())
    saver.start()
    peak.start()
    try:
        rate, p99 = redis.load(redis.keys)
    finally:
        done.set()
        saver.join()
    return rate, p99, peak.end()
