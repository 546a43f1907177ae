"""What is done about the mappings of a process grows with their number, not with its square."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pyuffd import DirtyTracker, Process, Snapshot, _dirty_calls, write_core
from pyuffd.snapshot import _capture
from pyuffd.snapshot._capture import Used
from tests.process._core import PAGE, Core
from tests.process._tracking import METHODS, OF_OTHERS

pytestmark = OF_OTHERS
FEW, MANY = 150, 600
# Four times as many are four times the work; with its square, 16 times.
MOST = 7
PLACE = 0x200000000000
LONG_S = 20.0
TARGET = """
import ctypes, os, sys, tempfile
kind, count, place = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def make(place):
    fd, flags = -1, 0x100022  # private, anonymous, fixed, in place of nothing
    if kind == "shared":
        fd, flags = os.memfd_create("many"), 0x100001
        os.ftruncate(fd, count * 4096)
    elif kind == "file":
        file = tempfile.TemporaryFile()
        fd, flags = os.dup(file.fileno()), 0x100002
        for i in range(count):
            os.write(fd, bytes([i % 251 + 1]) * 4096)
    for i in range(count):
        at = place + i * 8192  # not adjacent
        assert libc.mmap(at, 4096, 3, flags, fd, 0 if fd < 0 else i * 4096) == at
        if kind != "file" or i % 3 == 0:
            ctypes.memset(at, i % 251 + 1, 4096)
make(place)
print(flush=True)
for line in sys.stdin:
    if line == "drop\\n":
        for i in range(count):
            libc.madvise(place + i * 8192, 4096, 9 if kind == "shared" else 4)
    elif line == "more\\n":
        make(place + (1 << 40))
    print(flush=True)
"""
Tell = Callable[[str], None]


@contextmanager
def many(kind: str, count: int) -> Iterator[tuple[Process, Tell]]:
    """A process with so many mappings of one page."""
    words = [sys.executable, "-c", TARGET, kind, str(count), str(PLACE)]
    pipe = subprocess.PIPE
    program = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
    assert program.stdin is not None
    assert program.stdout is not None

    def tell(word: str) -> None:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write(f"{word}\n")
        program.stdin.flush()
        program.stdout.readline()

    try:
        program.stdout.readline()
        with Process(program.pid) as process:
            yield process, tell
    finally:
        program.kill()
        program.communicate()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of sets that were read."""
    done = [0]
    combined = _dirty_calls._combined

    def counted(function: Any, a: memoryview, b: memoryview) -> memoryview:
        done[0] += (len(a) + len(b)) // 3
        return combined(function, a, b)

    monkeypatch.setattr(_dirty_calls, "_combined", counted)
    return done


def expected(count: int, *, holes: bool = False) -> bytes:
    return b"".join(bytes([0 if holes else i % 251 + 1]) * PAGE for i in range(count))


def read(at: Callable[[int, int], bytes | None], count: int) -> bytes:
    return b"".join(at(PLACE + i * 2 * PAGE, PAGE) or b"" for i in range(count))


def check_growth(of: Callable[[int], int]) -> None:
    few, many_ = of(FEW), of(MANY)
    assert few > FEW
    assert many_ <= MOST * few


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["anonymous", "file", "shared"])
def test_snapshot(kind: str, method: Used, tmp_path: Path, work: list[int]) -> None:
    def of(count: int) -> int:
        path = tmp_path / str(count)
        with many(kind, count) as (process, _):
            before = work[0]
            Snapshot.take(process, path, method=method, shared="pause", max_stall_s=LONG_S)
            done = work[0] - before
        with Snapshot.open(path) as snapshot:
            assert read(snapshot.read, count) == expected(count)
        return done

    check_growth(of)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["anonymous", "file", "shared"])
def test_core(kind: str, method: Used, tmp_path: Path, work: list[int]) -> None:
    def of(count: int) -> int:
        path = tmp_path / str(count)
        with many(kind, count) as (process, _):
            before = work[0]
            write_core(process, path, method=method, full=True, max_stall_s=LONG_S)
            done = work[0] - before
        with Core(path) as core:
            assert read(core.read, count) == expected(count)
        return done

    check_growth(of)


@pytest.mark.parametrize(("kind", "point"), [("anonymous", "round 0"), ("shared", "ahead")])
def test_what_is_dropped_before_the_stop(
    kind: str, point: str, tmp_path: Path, work: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(count: int) -> int:
        path = tmp_path / str(count)
        with many(kind, count) as (process, tell):
            monkeypatch.setattr(
                _capture, "barrier", lambda name: tell("drop") if name == point else None
            )
            before = work[0]
            Snapshot.take(process, path, method="precopy", shared="pause", max_stall_s=LONG_S)
            done = work[0] - before
        with Snapshot.open(path) as snapshot:
            assert read(snapshot.read, count) == expected(count, holes=True)
        return done

    check_growth(of)


@pytest.mark.parametrize("method", ["precopy", "cow"])
def test_mappings_that_are_new_in_the_stop(
    method: Used, tmp_path: Path, work: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = "round 0" if method == "precopy" else "armed"

    def of(count: int) -> int:
        path = tmp_path / str(count)
        with many("anonymous", count) as (process, tell):
            monkeypatch.setattr(
                _capture, "barrier", lambda name: tell("more") if name == point else None
            )
            before = work[0]
            Snapshot.take(process, path, method=method, max_stall_s=LONG_S)
            done = work[0] - before
        with Snapshot.open(path) as snapshot:
            assert read(snapshot.read, count) == expected(count)
            assert read(lambda at, n: snapshot.read(at + (1 << 40), n), count) == expected(count)
        return done

    check_growth(of)


def test_opening_and_closing_a_tracker() -> None:
    """However many mappings there are, they are registered and unregistered by a few C calls."""

    def of(count: int) -> int:
        made = 0

        def called(_frame: object, event: str, function: Any) -> None:
            nonlocal made
            made += event == "c_call" and function.__name__.startswith("uffd_")

        with many("anonymous", count) as (process, _):
            sys.setprofile(called)
            try:
                with DirtyTracker(process):
                    pass
            finally:
                sys.setprofile(None)
        return made

    few = of(FEW)
    assert 0 < few < FEW
    # Attaching makes a few more calls, or a few less.
    assert of(MANY) < few + MANY - FEW


def test_mappings_that_are_new_in_a_round(work: list[int]) -> None:
    def of(count: int) -> int:
        with many("anonymous", count) as (process, tell), DirtyTracker(process) as tracker:
            with tracker.collect() as round_:
                round_.commit()
            tell("more")
            before = work[0]
            with tracker.collect() as round_:
                sizes = round_.written.bytes_in(
                    (PLACE + (1 << 40) + i * 2 * PAGE, PLACE + (1 << 40) + (i * 2 + 1) * PAGE)
                    for i in range(count)
                )
                assert sizes == [PAGE] * count
                round_.commit()
            return work[0] - before

    check_growth(of)
