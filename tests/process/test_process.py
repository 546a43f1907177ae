"""`Process`: the mappings, memory and threads of another process."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyuffd import (
    ClosedError,
    MappingKind,
    PageBit,
    PageRanges,
    Process,
    ProcessGoneError,
    Region,
    StopTimeoutError,
)
from pyuffd.dirty import _rows
from pyuffd.testing import needs_hugepages
from pyuffd.testing._needs import needs_privilege
from pyuffd.testing._run import SCALE
from tests._child import limit_s, run_child

PAGE = 4096
# Maps memory of many kinds, fills it, prints the addresses, and runs commands.
PROGRAM = """
import ctypes, mmap, os, sys, threading
P = 4096
kept = []
def address(m):
    kept.append(m)
    return ctypes.addressof(ctypes.c_char.from_buffer(m))
anon = mmap.mmap(-1, 64 * P, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for i in range(64):
    anon[i * P] = i + 1
shared = mmap.mmap(-1, 4 * P)
memfd = os.memfd_create("kind")
os.ftruncate(memfd, 4 * P)
shmem = mmap.mmap(memfd, 4 * P)
private = mmap.mmap(os.open(sys.executable, os.O_RDONLY), 4 * P, mmap.MAP_PRIVATE)
private[0] = 77
places = [address(m) for m in (anon, shared, shmem, private)]
if "huge" in sys.argv:
    huge = os.memfd_create("huge", 4)
    os.ftruncate(huge, 2 << 20)
    places.append(address(mmap.mmap(huge, 2 << 20)))
stop = threading.Event()
thread = threading.Thread(target=stop.wait, daemon=True)
thread.start()
print(*places, flush=True)
libc = ctypes.CDLL(None)
for line in sys.stdin:
    word, *numbers = line.split()
    numbers = [ctypes.c_size_t(int(n)) for n in numbers]
    if word == "exec":
        os.execv(sys.executable, [sys.executable, "-c", "import sys; print(flush=True); input()"])
    getattr(libc, word)(*numbers)
    print(flush=True)
"""


class Target:
    """A Python process that runs commands."""

    def __init__(self, *args: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.popen.pid
        self.places = [int(word) for word in self._line().split()]

    def _line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline()

    def tell(self, word: str, *numbers: int) -> None:
        assert self.popen.stdin is not None
        print(word, *numbers, file=self.popen.stdin, flush=True)
        self._line()

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate(timeout=limit_s(10))


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.end()


def test_mappings_are_typed(target: Target) -> None:
    with Process(target.pid) as process:
        mappings = process.mappings()
        kinds = [found.kind if (found := mappings.at(at)) else None for at in target.places]
        assert kinds == [
            MappingKind.ANONYMOUS,
            MappingKind.SHMEM,
            MappingKind.SHMEM,
            MappingKind.PRIVATE_FILE,
        ]
        by_path = {mapping.path: mapping for mapping in mappings}
        assert by_path["[stack]"].kind is MappingKind.STACK
        assert by_path["[heap]"].kind is MappingKind.HEAP
        assert by_path["[vdso]"].kind is MappingKind.SPECIAL
        private = mappings.at(target.places[3])
        assert private is not None
        assert private.path == os.path.realpath(sys.executable)
        assert (private.inode, private.device) == (
            os.stat(sys.executable).st_ino,
            os.stat(sys.executable).st_dev,
        )
        starts = [mapping.start for mapping in mappings]
        assert starts == sorted(starts)
        assert mappings[-1] == list(mappings)[-1]
        assert mappings.at(0) is None


def test_equal_until_something_changes(target: Target) -> None:
    with Process(target.pid) as process:
        before = process.mappings()
        assert before == process.mappings()
        target.tell("munmap", target.places[1], PAGE)
        assert before != process.mappings()


@needs_hugepages(1)
def test_huge_pages_are_hugetlb() -> None:
    target = Target("huge")
    try:
        with Process(target.pid) as process:
            found = process.mappings().at(target.places[4])
            assert found is not None
            assert (found.kind, found.page_size) == (MappingKind.HUGETLB, 2 << 20)
    finally:
        target.end()


def test_details_have_the_flags(target: Target) -> None:
    with Process(target.pid) as process:
        found = process.mappings(details=True).at(target.places[0])
        assert found is not None
        assert {"rd", "wr"} <= found.flags
        assert process.mappings()[0].flags == frozenset()


def ranges_of(target: Target, *pages: int) -> PageRanges:
    start = target.places[0]
    packed = b"".join(
        number.to_bytes(8, "little")
        for page in pages
        for number in (start + page * PAGE, start + (page + 1) * PAGE, 0)
    )
    return PageRanges(memoryview(packed).cast("Q"))


def test_copy_packs_or_places(target: Target) -> None:
    start = target.places[0]
    ranges = ranges_of(target, 1, 2, 5)
    with Process(target.pid) as process, Region.anonymous(8 * PAGE) as region:
        buffer = bytearray(4 * PAGE)
        copied = process.copy(ranges, buffer, offset=PAGE)
        assert (copied.bytes, len(copied.lost)) == (3 * PAGE, 0)
        assert buffer[::PAGE] == bytes([0, 2, 3, 6])
        process.copy(ranges, region, base=start)
        assert [region.read(at * PAGE, 1)[0] for at in range(8)] == [0, 2, 3, 0, 0, 6, 0, 0]
        with tempfile.TemporaryFile() as file:
            process.copy(ranges, file, offset=PAGE, base=start)
            assert [os.pread(file.fileno(), 1, (at + 1) * PAGE) for at in (1, 2, 5)] == [
                b"\x02",
                b"\x03",
                b"\x06",
            ]
            process.copy(ranges, file)
            assert os.pread(file.fileno(), 3 * PAGE, 0)[::PAGE] == b"\x02\x03\x06"
        assert process.read(start + 1, 3) == bytes(3)


def test_copy_of_many_ranges_and_whole_mappings(target: Target) -> None:
    with Process(target.pid) as process:
        every = ranges_of(target, *range(0, 64, 2))
        buffer = bytearray(32 * PAGE)
        assert process.copy(every, buffer).bytes == 32 * PAGE
        assert buffer[::PAGE] == bytes(range(1, 65, 2))
        mapping = process.mappings().at(target.places[3])
        assert mapping is not None
        image = bytearray(mapping.length)
        process.copy(mapping, image)
        assert image[target.places[3] - mapping.start] == 77


def test_lost_pages_are_named(target: Target) -> None:
    start = target.places[0]
    target.tell("munmap", start + 2 * PAGE, PAGE)
    target.tell("mprotect", start + 5 * PAGE, PAGE, 0)
    with Process(target.pid) as process:
        buffer = bytearray(b"\xff" * 8 * PAGE)
        copied = process.copy(ranges_of(target, *range(8)), buffer)
        assert copied.bytes == 8 * PAGE
        assert [(item.start - start) // PAGE for item in copied.lost] == [2, 5]
        assert buffer[::PAGE] == bytes([1, 2, 0, 4, 5, 0, 7, 8])
        with pytest.raises(OSError) as caught:
            process.read(start, 4 * PAGE)
        assert caught.value.start == start + 2 * PAGE  # type: ignore[attr-defined]


def test_bad_arguments(target: Target) -> None:
    ranges = ranges_of(target, 1, 2)
    with Process(target.pid) as process:
        with pytest.raises(ValueError, match="need 0x2000"):
            process.copy(ranges, bytearray(PAGE))
        with pytest.raises(ValueError, match="below base"):
            process.copy(ranges, bytearray(PAGE), base=target.places[0] + 2 * PAGE)
        with pytest.raises(ValueError, match="read-only"):
            process.copy(ranges, bytes(2 * PAGE))
        with pytest.raises(TypeError):
            process.copy(ranges, None)
        with pytest.raises(ValueError, match="end of the address space"):
            process.read((1 << 64) - PAGE, 2 * PAGE)
    with pytest.raises(ClosedError):
        process.mappings()


@pytest.mark.parametrize("pid", [0, -1, 1 << 31])
def test_bad_pids(pid: int) -> None:
    with pytest.raises(ValueError):
        Process(pid)


def test_pagemap_and_threads(target: Target) -> None:
    with Process(target.pid) as process:
        entries = process.pagemap.read(target.places[0], 64 * PAGE)
        assert entries.count(PageBit.PRESENT) == 64
        threads = process.threads()
        assert threads[0].tid == target.pid
        assert len(threads) == 2
        assert {thread.state for thread in threads} <= {"S", "R"}
        # The id of any of its threads names the process.
        with Process(threads[1].tid) as same:
            assert same.pid == target.pid


def test_gone_after_its_exit(target: Target) -> None:
    with Process(target.pid) as process:
        assert process.is_running
        target.end()
        assert not process.is_running
        for call in (process.check, process.mappings, process.threads):
            with pytest.raises(ProcessGoneError):
                call()
        with pytest.raises(ProcessGoneError):
            process.read(target.places[0], 1)


def test_gone_after_execve(target: Target) -> None:
    with Process(target.pid) as process:
        target.tell("exec")
        assert not process.is_running
        with pytest.raises(ProcessGoneError):
            process.mappings()
        with pytest.raises(ProcessGoneError):
            process.copy(ranges_of(target, 0)[0], bytearray(PAGE))


def test_no_such_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(ProcessGoneError):
        Process(child.pid)


@needs_privilege("CAP_SYS_PTRACE")
def test_kernel_threads() -> None:
    with pytest.raises(ProcessGoneError):
        Process(2)  # kthreadd has no memory


def test_reading_itself_in_a_thread() -> None:
    with Region.anonymous(PAGE) as region, Process(os.getpid()) as process:
        region.write(0, b"own")
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(process.read(region.start, 3)))
        thread.start()
        thread.join()
        assert found == [b"own"]


MANY_THREADS = """
import sys, threading
threading.stack_size(65536)
end = threading.Event()
for _ in range(1000):
    threading.Thread(target=end.wait, daemon=True).start()
print(flush=True)
sys.stdin.read()
end.set()
"""


def test_a_thousand_threads_are_stopped() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MANY_THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with Process(child.pid) as target:
            with target.stopped(10 * SCALE) as stop:
                assert stop.threads == 1001
                assert len(stop.registers()) == 1001
                assert {thread.state for thread in target.threads()} == {"t"}
            assert len(target.threads()) == 1001
        child.communicate()
        assert child.returncode == 0


def test_a_child_that_is_killed_in_the_stop() -> None:
    """Its parent is told at once, though another process traces it."""
    with (
        subprocess.Popen(["sleep", "60"]) as child,
        Process(child.pid) as target,
        contextlib.suppress(ProcessGoneError),
        target.stopped(10 * SCALE),
    ):
        child.kill()
        assert child.wait(10 * SCALE) == -signal.SIGKILL


def stopped_ourselves() -> None:
    with (
        subprocess.Popen(["sleep", "60"]) as child,
        Process(child.pid) as target,
        target.stopped(10 * SCALE) as stop,
    ):
        assert len(stop.registers()) == 1
        wake = f"sleep 0.3; kill -CONT {os.getpid()}"
        with subprocess.Popen(["sh", "-c", wake]):
            os.kill(os.getpid(), signal.SIGSTOP)
        with pytest.raises(StopTimeoutError, match="stopped itself"):
            stop.registers()
        child.kill()
    with pytest.raises(StopTimeoutError, match="stopped itself"):
        stop.check()


def test_a_stop_is_lost_while_we_are_stopped() -> None:
    """What is read afterwards would be of no instant."""
    run_child(stopped_ourselves)


def test_mappings_of_ranges_are_those_of_the_whole(tmp_path: Path) -> None:
    """Asked for one by one, they are what the whole file says of them."""
    path = tmp_path / "mapped"
    path.write_bytes(bytes(4 * PAGE))
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), 4 * PAGE) as mapped,
        Region.memfd(4 * PAGE) as memfd,
        Region.anonymous(8 * PAGE) as anonymous,
        Process(os.getpid()) as process,
    ):
        path.unlink()  # its path ends with " (deleted)"
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        at = anonymous.start
        protect = ctypes.CDLL(None).mprotect
        assert not protect(ctypes.c_void_p(at + 2 * PAGE), ctypes.c_size_t(PAGE), mmap.PROT_READ)
        shared = (memfd.start, memfd.start + PAGE)
        whole = process.mappings()
        stack = next(m for m in whole if m.path == "[stack]")
        for spans in (
            [(at, at + PAGE)],
            [(at, at + 8 * PAGE)],
            [(at, at + PAGE), (at + PAGE, at + 4 * PAGE), (at + 7 * PAGE, at + 8 * PAGE)],
            sorted([(address, address + PAGE), shared, (stack.start, stack.end)]),
            [(PAGE, 2 * PAGE)],
            [(stack.end, stack.end + PAGE)],
            [(0, 1 << 47)],
        ):
            found = process._mappings_in(_rows.packed(spans))
            assert list(_rows.in_scope(found, spans)) == list(_rows.in_scope(whole, spans)), spans
