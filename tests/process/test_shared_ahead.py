"""Shared memory is copied before the stop; what changes until the stop is what counts."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from pyuffd import PageRanges, Process, Region, Snapshot, SnapshotProgress, write_core
from pyuffd import _image_calls as calls
from pyuffd._memory import fallocate
from pyuffd._pages import HUGE_PAGE_2M as HUGE_PAGE
from pyuffd.snapshot import _capture, _memory_files
from pyuffd.snapshot._capture import Placed
from pyuffd.snapshot._memory_files import FilesCopied
from pyuffd.testing import needs_hugepages, needs_privilege
from tests.process._core import PAGE, Core

pytestmark = needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")

PAGES = 600  # more than one piece of 1 MiB
LENGTH = PAGES * PAGE
PUNCH_HOLE = 3
LONG_S = 5.0
PIECE = 1 << 20  # what is copied at once
F_SEAL_WRITE = 8
TARGET = """
import ctypes, mmap, os, sys
fd, length = int(sys.argv[1]), int(sys.argv[2])
area = mmap.mmap(fd, length)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
print(start, flush=True)
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
for line in sys.stdin:
    first, count, filled = map(int, line.split())
    at, size = start + first * 4096, count * 4096
    if filled:
        libc.mmap(at, size, 3, 0x32, -1, 0)  # private, anonymous, fixed
        ctypes.memset(at, 7, filled * 4096)
    else:
        libc.mmap(at, size, 3, 0x11, fd, first * 4096)  # shared, fixed
    print(flush=True)
"""


@dataclass
class Shared:
    """A memfd that a process has mapped, and what the process sees there."""

    fd: int
    start: int
    process: Process
    program: subprocess.Popen[str]
    content: bytearray

    def write(self, page: int, data: bytes) -> None:
        os.pwrite(self.fd, data, page * PAGE)
        self.content[page * PAGE : page * PAGE + len(data)] = data

    def punch(self, page: int, count: int) -> None:
        fallocate(self.fd, PUNCH_HOLE, page * PAGE, count * PAGE)
        self.content[page * PAGE : (page + count) * PAGE] = bytes(count * PAGE)

    def replace(self, page: int, count: int, filled: int) -> None:
        """Map private memory there, of which some pages are written; none: the memfd again."""
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        self.program.stdin.write(f"{page} {count} {filled}\n")
        self.program.stdin.flush()
        self.program.stdout.readline()
        new = b"\7" * filled * PAGE + bytes((count - filled) * PAGE)
        if not filled:
            new = os.pread(self.fd, count * PAGE, page * PAGE)
        self.content[page * PAGE : (page + count) * PAGE] = new


@contextmanager
def mapping(fd: int, length: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A program that maps the file, and where; it ends with the block, and the file is closed."""
    words = [sys.executable, "-c", TARGET, str(fd), str(length)]
    pipe = subprocess.PIPE
    program = subprocess.Popen(words, stdin=pipe, stdout=pipe, pass_fds=[fd], text=True)
    try:
        assert program.stdout is not None
        yield program, int(program.stdout.readline())
    finally:
        program.kill()
        program.communicate()
        os.close(fd)


@contextmanager
def shared() -> Iterator[Shared]:
    fd = os.memfd_create("shared")
    content = bytearray(b"".join(bytes([1 + page % 255]) * PAGE for page in range(PAGES)))
    content[50 * PAGE : 60 * PAGE] = bytes(10 * PAGE)  # pages of zeros, and a hole
    os.pwrite(fd, content, 0)
    with mapping(fd, LENGTH) as (program, start), Process(program.pid) as process:
        memory = Shared(fd, start, process, program, content)
        memory.punch(80, 5)
        yield memory


def nothing(_memory: Shared) -> None:
    pass


def written(memory: Shared) -> None:
    memory.write(0, b"new")
    memory.write(255, b"new" * PAGE)  # into the next piece
    memory.write(82, b"in the hole")
    memory.write(PAGES - 1, b"the last")


def zeroed(memory: Shared) -> None:
    for page in (0, 17, 255, 256, PAGES - 1):
        memory.write(page, bytes(PAGE))


def punched(memory: Shared) -> None:
    for page, count in ((0, 1), (200, 100), (PAGES - 1, 1)):
        memory.punch(page, count)


def replaced(memory: Shared) -> None:
    memory.replace(10, 300, 1)


def at_random(memory: Shared) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(300):
        page = chance.randrange(PAGES - 8)
        match chance.randrange(4):
            case 0:
                memory.write(page, chance.randbytes(chance.randrange(1, 3 * PAGE)))
            case 1:
                memory.write(page, bytes(PAGE))
            case 2:
                memory.punch(page, chance.randrange(1, 8))
            case 3:
                memory.write(page, bytes([1 + page % 255]) * PAGE)  # as it was


CHANGES = [nothing, written, zeroed, punched, replaced, at_random]
Method = Literal["precopy", "cow", "stopped"]


@contextmanager
def changed(
    memory: Shared, change: Callable[[Shared], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Change it after the copy, and again when the instant is over, which must not be seen."""
    done: list[str] = []

    def at(name: str) -> None:
        if name == "ahead" and not done:
            change(memory)
        elif name == "resumed" and done == ["ahead"]:
            os.pwrite(memory.fd, b"later" * PAGE, 0)
        else:
            return
        done.append(name)

    monkeypatch.setattr(_capture, "barrier", at)
    yield
    assert done == ["ahead", "resumed"]


@pytest.mark.parametrize("method", ["precopy", "cow"])
@pytest.mark.parametrize("change", CHANGES)
def test_core(
    change: Callable[[Shared], None],
    method: Method,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with shared() as memory:
        with changed(memory, change, monkeypatch):
            write_core(memory.process, tmp_path / "core", method=method, max_stall_s=LONG_S)
        with Core(tmp_path / "core") as core:
            assert core.read(memory.start, LENGTH) == bytes(memory.content)


@pytest.mark.parametrize("method", ["precopy", "cow"])
@pytest.mark.parametrize("change", CHANGES)
def test_snapshot(
    change: Callable[[Shared], None],
    method: Method,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read through the snapshot, and mapped, where a page of zeros must be a hole of the file."""
    path = tmp_path / "one"
    with shared() as memory:
        with changed(memory, change, monkeypatch):
            Snapshot.take(memory.process, path, method=method, shared="pause", max_stall_s=LONG_S)
        with Snapshot.open(path) as snapshot:
            snapshot.verify()
            assert snapshot.read(memory.start, LENGTH) == bytes(memory.content)
            assert mapped(snapshot, memory.start) == bytes(memory.content)


def mapped(snapshot: Snapshot, start: int) -> bytes:
    """Return the memory as a mapping of the snapshot's file has it."""
    content = b""
    for each in snapshot.regions:
        if start <= each.start < start + LENGTH:
            region = Region.anonymous(each.length)
            with region, snapshot.restore({each.start: region}, mode="map"):
                content += region.read()
    return content


@pytest.mark.parametrize(("method", "point"), [("precopy", "round 0"), ("cow", "armed")])
@pytest.mark.parametrize("what", ["core", "snapshot"])
def test_shared_memory_in_place_of_private(
    what: str, method: Method, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The private pages have been copied; holes and zeros of the memfd must not show them."""
    with shared() as memory:
        done: list[str] = []

        def at(name: str) -> None:
            if name in ("ahead", point) and name not in done:
                done.append(name)
                memory.replace(10, 300, 300 if name == "ahead" else 0)

        monkeypatch.setattr(_capture, "barrier", at)
        path = tmp_path / "one"
        if what == "core":
            write_core(memory.process, path, method=method, max_stall_s=LONG_S)
            with Core(path) as core:
                assert core.read(memory.start, LENGTH) == bytes(memory.content)
        else:
            Snapshot.take(memory.process, path, method=method, shared="pause", max_stall_s=LONG_S)
            with Snapshot.open(path) as snapshot:
                assert snapshot.read(memory.start, LENGTH) == bytes(memory.content)
                assert mapped(snapshot, memory.start) == bytes(memory.content)
        assert done == ["ahead", point]


def test_shared_memory_in_place_of_private_since_the_last_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was copied of private memory is out of date; its places have the memfd's content."""
    with shared() as memory:

        def at(name: str) -> None:
            if name == "ahead":
                memory.replace(10, 300, 300)
            elif name == "round 0":
                memory.replace(10, 300, 0)

        monkeypatch.setattr(_capture, "barrier", at)
        path = tmp_path / "one"
        Snapshot.take(
            memory.process, path, method="precopy", shared="pause", max_stall_s=LONG_S, rounds=1
        )
        with Snapshot.open(path) as snapshot:
            assert snapshot.read(memory.start, LENGTH) == bytes(memory.content)
            assert mapped(snapshot, memory.start) == bytes(memory.content)


def test_only_what_differs_is_written() -> None:
    """Sealed against writes, the file takes what it has already, and nothing else."""
    fd = os.memfd_create("image", os.MFD_ALLOW_SEALING)
    held = random.Random(1).randbytes(20 * PAGE) + bytes(20 * PAGE)
    os.pwrite(fd, held, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_WRITE)
    start = 1 << 30
    longer = held + bytes(PAGE)  # behind the end are zeros
    pieces = calls.Pieces([(start, start + len(longer), PAGE, True)])
    span = PageRanges.of([(start, start + len(longer))])
    zero = calls.write(span.memoryview(), longer, pieces, fd, if_changed=True)
    assert [(each.start, each.end) for each in PageRanges(zero)] == [
        (start + 20 * PAGE, start + 41 * PAGE)
    ]
    for page in (0, 15, 16, 19, 20, 40):
        other = bytearray(longer)
        other[page * PAGE + 100] ^= 1
        with pytest.raises(PermissionError):
            calls.write(span.memoryview(), other, pieces, fd, if_changed=True)
    os.close(fd)


@pytest.mark.parametrize("method", ["precopy", "cow"])
def test_the_rate_holds_before_the_stop(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 8 << 20
    times: dict[str, float] = {}
    done: list[tuple[float, int]] = []

    def told(progress: SnapshotProgress) -> None:
        if "ahead" not in times:
            assert progress.phase == "before"
            done.append((time.monotonic(), progress.bytes))

    with shared() as memory:
        monkeypatch.setattr(
            _capture, "barrier", lambda name: times.setdefault(name, time.monotonic())
        )
        Snapshot.take(
            memory.process,
            tmp_path / "one",
            method=method,
            shared="pause",
            rate=rate,
            max_stall_s=LONG_S,
            progress=told,
        )
    copied = LENGTH - 5 * PAGE  # but for the hole
    assert done[-1][1] == copied
    assert times["ahead"] - times["begun"] >= copied / rate
    for at, size in done:
        assert size <= rate * (at - times["begun"]) + PIECE


@dataclass
class Huge:
    """A memfd of huge pages that a process has mapped."""

    fd: int
    start: int
    process: Process
    area: mmap.mmap
    content: bytearray

    def write(self, at: int, data: bytes) -> None:
        """Through a mapping: hugetlbfs has no write(2)."""
        self.area[at : at + len(data)] = self.content[at : at + len(data)] = data

    def punch(self, page: int) -> None:
        fallocate(self.fd, PUNCH_HOLE, page * HUGE_PAGE, HUGE_PAGE)
        self.content[page * HUGE_PAGE : (page + 1) * HUGE_PAGE] = bytes(HUGE_PAGE)

    def touch(self, page: int) -> None:
        """Fill a hole with a page of zeros."""
        assert not self.area[page * HUGE_PAGE]

    def allocated(self) -> int:
        return os.fstat(self.fd).st_blocks * 512


@contextmanager
def huge() -> Iterator[Huge]:
    """Six of them, of which 3 and 5 are holes."""
    fd = os.memfd_create("huge", os.MFD_HUGETLB)
    length = 6 * HUGE_PAGE
    os.ftruncate(fd, length)
    with (
        mmap.mmap(fd, length) as area,
        mapping(fd, length) as (program, start),
        Process(program.pid) as process,
    ):
        memory = Huge(fd, start, process, area, bytearray(length))
        for page in (0, 1, 2, 4):
            memory.write(page * HUGE_PAGE, random.Random(page).randbytes(HUGE_PAGE))
        yield memory


def huge_nothing(_memory: Huge) -> None:
    pass


def huge_written(memory: Huge) -> None:
    memory.write(100, b"new")
    memory.write(HUGE_PAGE + 4096 * 300 - 5, b"over the end of a small page")
    memory.write(5 * HUGE_PAGE - 4, b"last")


def huge_filled(memory: Huge) -> None:
    memory.write(3 * HUGE_PAGE + 12345, b"in a hole")
    memory.touch(5)


def huge_zeroed(memory: Huge) -> None:
    memory.write(HUGE_PAGE, bytes(HUGE_PAGE))
    memory.write(2 * HUGE_PAGE + 8192, bytes(8192))


def huge_punched(memory: Huge) -> None:
    memory.punch(0)
    memory.punch(4)


def huge_punched_and_filled(memory: Huge) -> None:
    memory.punch(1)
    memory.write(HUGE_PAGE + 8192, b"other")


HUGE_CHANGES = [
    huge_nothing,
    huge_written,
    huge_filled,
    huge_zeroed,
    huge_punched,
    huge_punched_and_filled,
]


@needs_hugepages(6)
@pytest.mark.parametrize("method", ["precopy", "cow"])
@pytest.mark.parametrize("change", HUGE_CHANGES)
@pytest.mark.parametrize("what", ["core", "snapshot"])
def test_huge_pages(
    what: str,
    change: Callable[[Huge], None],
    method: Method,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They change between the copy and the stop, and after it; no hole is filled."""
    path = tmp_path / "one"
    done: list[str] = []
    allocated = 0
    with huge() as memory:
        expected = memory.content

        def at(name: str) -> None:
            nonlocal expected, allocated
            if name == "ahead":
                change(memory)
                allocated = memory.allocated()
                expected = bytearray(memory.content)
            elif name == "resumed":
                assert memory.allocated() == allocated
                memory.write(2 * HUGE_PAGE, b"later" * PAGE)
            else:
                return
            done.append(name)

        monkeypatch.setattr(_capture, "barrier", at)
        if what == "core":
            write_core(memory.process, path, method=method, full=True, max_stall_s=LONG_S)
            with Core(path) as core:
                assert core.read(memory.start, len(expected)) == bytes(expected)
        else:
            Snapshot.take(memory.process, path, method=method, shared="pause", max_stall_s=LONG_S)
            with Snapshot.open(path) as snapshot:
                snapshot.verify()
                assert snapshot.read(memory.start, len(expected)) == expected
        assert memory.allocated() == allocated
        assert done == ["ahead", "resumed"]


@pytest.mark.parametrize("method", ["precopy", "cow"])
@pytest.mark.parametrize("what", ["core", "snapshot"])
def test_memory_that_is_unmapped_while_it_is_copied(
    what: str, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the file and the copy of its content."""
    path = tmp_path / "one"
    done: list[int] = []
    work = _memory_files._work
    with shared() as memory:

        def looked(process: Process, part: Placed, result: FilesCopied) -> object:
            found = work(process, part, result)
            if not done:
                done.append(part.start)
                memory.replace(0, PAGES, 3)
            return found

        monkeypatch.setattr(_memory_files, "_work", looked)
        if what == "core":
            write_core(memory.process, path, method=method, max_stall_s=LONG_S)
            with Core(path) as core:
                assert core.read(memory.start, LENGTH) == bytes(memory.content)
        else:
            Snapshot.take(memory.process, path, method=method, shared="pause", max_stall_s=LONG_S)
            with Snapshot.open(path) as snapshot:
                assert snapshot.read(memory.start, LENGTH) == bytes(memory.content)
        assert done == [memory.start]
