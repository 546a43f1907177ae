"""Tracking other processes: many mappings, redis under load, the stop of an attach, our memory."""

from __future__ import annotations

import mmap
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks._pairs import (
    Member,
    MemberError,
    Round,
    Row,
    Skipped,
    Target,
    latency_row,
    ratio_row,
    run_pairs,
)
from benchmarks._redis import Redis, lacking
from benchmarks._setup import Setup, available_memory, command
from pyuffd import DirtyTracker, Process

_MODULE = "_tracking_members"
_MIB = 1 << 20
_MAPPINGS = 10_000
_PAGES = 8
#: Nearly as many as a process may have (vm.max_map_count).
_MANY_MAPPINGS = 60_000
#: One page in this many is written before a round.
_DIRTY_STEP = 10
_ATTACHES = 50
_COLLECT_EVERY_S = 1.0
_KEYS = 200_000
#: Several seconds of SET, so that several rounds are collected meanwhile.
_REQUESTS_PER_KEY = 3
_REDIS_ROUNDS = 5
_MEMORY_ROUNDS = 5
_WRITTEN_PAGES = 1000


def run(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield the rows of mappings, of redis, of attaching, and of memory."""
    yield _mappings(setup)
    yield from _opening(setup)
    yield from _redis(setup)
    yield from _attach(setup)
    yield from _memory(setup)


class _Tracked:
    """The C program that is tracked, and where its "syscall; ret" is."""

    def __init__(self, setup: Setup, *words: object) -> None:
        self.popen = subprocess.Popen(
            command(setup.programs.tracked, *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.syscall_ret = int(self._answer())

    def _answer(self) -> str:
        assert self.popen.stdout is not None
        answer = self.popen.stdout.readline()
        if not answer:
            raise MemberError("the program that is tracked has ended")
        return answer

    def write(self, every: int) -> None:
        """Let it write one page in `every`."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{every}\n")
        self.popen.stdin.flush()
        self._answer()

    def close(self) -> None:
        """End it."""
        self.popen.kill()
        self.popen.communicate()


@contextmanager
def _tracked(setup: Setup, *words: object) -> Iterator[_Tracked]:
    target = _Tracked(setup, *words)
    try:
        yield target
    finally:
        target.close()


def _mappings(setup: Setup) -> Row:
    """Return the row of one process with many mappings, which both members scan in turn."""
    count = _MAPPINGS // 10 if setup.quick else _MAPPINGS
    written = -(-count * _PAGES // _DIRTY_STEP)
    pairs = []
    with (
        _tracked(setup, "mappings", count, _PAGES) as target,
        Process(target.popen.pid) as process,
        DirtyTracker(process) as tracker,
        Member(command(setup.programs.rounds, target.popen.pid)) as base,
    ):
        for number in range(setup.rounds + 1):
            target.write(_DIRTY_STEP)
            scanned = base.round().wall_ns
            target.write(_DIRTY_STEP)
            begin_ns = time.perf_counter_ns()
            with tracker.collect() as found:
                found.commit()
            collected = time.perf_counter_ns() - begin_ns
            if found.written.pages() < written:
                raise MemberError(f"{found.written.pages()} pages were found, not {written}")
            if number:
                pairs.append((scanned / 1e6, collected / 1e6))
    return ratio_row(
        f"{count} mappings of another process: collect() / one ioctl each",
        pairs,
        unit="ms",
        target=Target("<=", 2),
    )


def _opening(setup: Setup) -> Iterator[Row]:
    """Yield what it costs to begin to track a process with very many mappings, and to end that."""
    count = _MANY_MAPPINGS // 10 if setup.quick else _MANY_MAPPINGS
    with _tracked(setup, "mappings", count, 1) as target:
        found = run_pairs(
            command(setup.programs.arm, count),
            setup.member("open", target.popen.pid, module=_MODULE),
            setup.rounds,
        )
    for index, ours, base in (
        (0, "opening a tracker", "registering, protecting and reading smaps"),
        (1, "closing it", "unregistering"),
    ):
        pairs = [(a.samples[index] / 1e6, b.samples[index] / 1e6) for a, b in found]
        name = f"{count} mappings: {ours} / {base} by C"
        yield ratio_row(name, pairs, unit="ms", target=Target("<=", 2))


def _redis(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield SET of a tracked server beside an untracked one, and after the tracker was closed."""
    if why := lacking():
        yield Skipped("redis SET, tracked", why)
        return
    keys = _KEYS // 10 if setup.quick else _KEYS
    rounds = min(setup.rounds, _REDIS_ROUNDS)
    during: list[tuple[tuple[float, float], tuple[float, float]]] = []
    after: list[tuple[tuple[float, float], tuple[float, float]]] = []
    with tempfile.TemporaryDirectory(prefix="pyuffd-bench-") as folder:
        plain, watched = Redis(Path(folder), keys), Redis(Path(folder), keys)
        try:
            with Process(watched.popen.pid) as process:
                with DirtyTracker(process) as tracker, _collecting(tracker):
                    during = _loads(plain, watched, rounds)
                after = _loads(plain, watched, rounds)
        finally:
            plain.close()
            watched.close()
    for when, pairs, least, most in (
        ("tracked, a collect() a second", during, Target(">=", 0.9), Target("<=", 1.5)),
        ("after the tracker was closed", after, Target(">=", 0.98), None),
    ):
        rates = [(a[0] / 1e3, b[0] / 1e3) for a, b in pairs]
        yield ratio_row(f"redis SET {when} / untracked", rates, unit="k/s", target=least)
        tails = [(a[1], b[1]) for a, b in pairs]
        yield ratio_row(f"redis SET p99 {when} / untracked", tails, unit="ms", target=most)


def _loads(
    plain: Redis, watched: Redis, rounds: int
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Return (requests a second, p99) of both; they take turns at being first."""
    pairs = []
    for number in range(-1, rounds):
        order = (plain, watched) if number % 2 else (watched, plain)
        found = {id(server): server.load(_REQUESTS_PER_KEY * server.keys) for server in order}
        if number >= 0:
            pairs.append((found[id(plain)], found[id(watched)]))
    return pairs


@contextmanager
def _collecting(tracker: DirtyTracker) -> Iterator[None]:
    """Collect and commit a round a second."""
    done = threading.Event()
    errors: list[BaseException] = []

    def collect() -> None:
        try:
            while not done.wait(_COLLECT_EVERY_S):
                tracker.collect().commit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if errors:
        raise MemberError("collecting failed") from errors[0]


def _attach(setup: Setup) -> Iterator[Row]:
    """Yield how long a thread is stopped during an attach, by its own measurement."""
    repeats = _ATTACHES // 5 if setup.quick else _ATTACHES
    with tempfile.NamedTemporaryFile(prefix="pyuffd-bench-") as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        with _tracked(setup, "spin", file.name) as target:
            pid = target.popen.pid
            pairs = run_pairs(
                command(setup.programs.attach, pid, target.syscall_ret, file.name, repeats),
                setup.member("attach", pid, file.name, repeats, module=_MODULE),
                setup.rounds,
            )
    name = "attach: the time that a thread stands / the same calls injected by C"
    yield latency_row(name, pairs, target=Target("<=", 1.5))
    yield Row(
        "attach: the time that a thread stands",
        "us",
        ours=statistics.median(_median(ours) for _, ours in pairs) / 1e3,
        target=Target("<=", 1000),
    )


def _median(round_: Round) -> int:
    return round_.percentile(50)


def _memory(setup: Setup) -> Iterator[Row | Skipped]:
    """Yield what a tracker needs of our memory, for a small and for a large process."""
    small, large = (32, 1024) if setup.quick else (256, 8192)
    name = f"our memory for tracking {large} MiB of another process, more than for {small} MiB"
    if available_memory() < (large + 2048) * _MIB:
        yield Skipped(name, "too little memory is free")
        return
    found = []
    for size in (small, large):
        with (
            _tracked(setup, "mappings", 1, size * _MIB // mmap.PAGESIZE) as target,
            Member(setup.member("memory", target.popen.pid, module=_MODULE)) as member,
        ):
            # So many pages of each that the rounds have the same number.
            every = size * _MIB // mmap.PAGESIZE // _WRITTEN_PAGES
            for _ in range(_MEMORY_ROUNDS):
                target.write(every)
                taken = member.round()
            found.append(taken.samples[0] / _MIB)
        yield Row(
            f"our memory for tracking {size} MiB of another process",
            "MiB",
            ours=found[-1],
            target=None,
        )
    yield Row(name, "MiB", ours=found[1] - found[0], target=Target("<=", 1))
