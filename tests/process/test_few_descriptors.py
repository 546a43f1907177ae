"""A limit of descriptors is no property of the process that is looked at: it is said, or not met.

Each operation runs with no descriptor left, then with one, and so on until it succeeds. What fails
names the limit and leaves no descriptor; what succeeds has what it has without a limit.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyuffd import DirtyTracker, Process, RunState, Snapshot, write_core
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
MOST = 64
# Memory whose content is found only by opening something: pages of a memfd that the process has
# not touched, a deleted file, pages that only /proc/PID/mem can read.
TARGET = """
import ctypes, mmap, os, sys, tempfile
libc = ctypes.CDLL(None)
kept = []
memfd = os.memfd_create("shared")
os.write(memfd, b"m" * 16384)
kept.append(mmap.mmap(memfd, 16384))
with tempfile.TemporaryFile(dir=sys.argv[1]) as file:
    file.write(b"f" * 16384)
    file.flush()
    kept.append(mmap.mmap(file.fileno(), 16384, flags=mmap.MAP_PRIVATE))
hidden = mmap.mmap(-1, 16384, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
hidden.write(b"h" * 16384)
at = ctypes.addressof(ctypes.c_char.from_buffer(hidden))
assert not libc.mprotect(ctypes.c_void_p(at), 16384, 0)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def left(count: int) -> Iterator[None]:
    """Leave this process only `count` free descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = free = 0
    while True:
        if not os.path.lexists(f"/proc/self/fd/{number}"):
            if free == count:
                break
            free += 1
        number += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def looked_at(pid: int, _: Path) -> object:
    with Process(pid) as process:
        mappings = [(m.start, m.kind, m.page_size, m.path) for m in process.mappings()]
        return mappings, len(process.threads()), process.memory_tid


def by_a_thread(pid: int, _: Path) -> object:
    tid = max(map(int, os.listdir(f"/proc/{pid}/task")))
    with Process(tid) as process:
        return process.pid


def stopped(pid: int, _: Path) -> object:
    with Process(pid) as process, process.stopped(10 * SCALE) as stop:
        return stop.threads, len(stop.registers())


def tracked(pid: int, _: Path) -> object:
    with Process(pid) as process, DirtyTracker(process) as tracker:
        return sorted((gap.start, gap.length, gap.reason.value) for gap in tracker.blind)


def saved(pid: int, folder: Path) -> object:
    path = folder / "saved"
    with Process(pid) as process:
        Snapshot.take(process, path, method="stopped", shared="pause", durable=False)
    return states(path)


def saved_in_rounds(pid: int, folder: Path) -> object:
    path = folder / "saved"
    with Process(pid) as process:
        Snapshot.take(
            process, path, method="precopy", shared="pause", durable=False, max_stall_s=SCALE
        )
    return states(path)


def states(path: Path) -> object:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with Snapshot.open(path) as snapshot:
        lost = [run.start for run in snapshot.runs if run.state is RunState.LOST]
        content = [
            snapshot.read(region.start, 16384)
            for region in snapshot.regions
            if region.length == 16384 and ("shared" in region.path or "deleted" in region.path)
        ]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return lost, content


def core(pid: int, folder: Path) -> object:
    with Process(pid) as process:
        done = write_core(process, folder / "core", method="stopped")
    return done.bytes, done.lost.bytes, done.unseen


def opened(_: int, folder: Path) -> object:
    with Snapshot.open(folder / "child") as snapshot:
        snapshot.verify()
        return snapshot.depth


OPERATIONS: list[Callable[[int, Path], object]] = [
    looked_at,
    by_a_thread,
    stopped,
    tracked,
    saved,
    saved_in_rounds,
    core,
    opened,
]


def tried(name: str, folder: str) -> int:
    """Try one operation with more and more descriptors; return how many it needs."""
    operation = next(each for each in OPERATIONS if each.__name__ == name)
    place = Path(folder)
    command = [sys.executable, "-c", TARGET, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as target:
        assert target.stdout is not None
        assert target.stdout.readline() == b"ready\n"
        try:
            return _needed(operation, target.pid, place)
        finally:
            target.kill()


def _needed(operation: Callable[[int, Path], object], pid: int, folder: Path) -> int:
    with Process(pid) as process:
        Snapshot.take(process, folder / "parent", method="stopped", shared="pause", durable=False)
        Snapshot.take(
            process,
            folder / "child",
            method="stopped",
            shared="pause",
            durable=False,
            parent=folder / "parent",
        )
    before = set(os.listdir(folder))
    expected = operation(pid, folder)  # imports everything too
    for count in range(MOST):
        for name in set(os.listdir(folder)) - before:
            os.system(f"rm -r {folder / name}")
        descriptors = sorted(os.listdir("/proc/self/fd"))
        code = 0
        try:
            with left(count):
                found = operation(pid, folder)
        except OSError as error:
            code = error.errno or 0
        if not code:
            assert expected == found, f"{count} left"
            return count
        assert code == errno.EMFILE, f"{count} left"
        assert sorted(os.listdir("/proc/self/fd")) == descriptors, f"{count} left"
    raise AssertionError("it never succeeds")


@pytest.mark.parametrize("name", [each.__name__ for each in OPERATIONS])
def test_it_is_said_or_not_met(name: str, tmp_path: Path) -> None:
    assert run_child(tried, name, str(tmp_path), budget_s=60).value > 0
