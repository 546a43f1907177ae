"""Memory of one instant in a file: what is under `Snapshot.take` and `pyuffd core`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyuffd import MappingKind, Mappings, PageRanges, Process, UffdOSError
from pyuffd.remote._stop import Stop
from pyuffd.snapshot._capture import Captured, Options, Placed, Places, Used
from pyuffd.snapshot._methods import capture
from pyuffd.testing import needs_privilege
from pyuffd.testing._run import SCALE
from tests._memory import PAGE
from tests.process._attach import status
from tests.process._counters import counters, new_file
from tests.process._counters import program as program
from tests.process._tracking import METHODS

pytestmark = needs_privilege("CAP_SYS_PTRACE")
LIMIT_S = 0.2 * SCALE


class OwnMemory:
    """Puts all private memory one behind the other."""

    def __init__(self) -> None:
        self._places = Places()

    def __call__(self, mappings: Mappings) -> list[Placed]:
        return [
            Placed(mapping, *part)
            for mapping in mappings
            if not mapping.shared and mapping.kind is not MappingKind.SPECIAL
            for part in self._places.of(mapping.start, mapping.end)
        ]


def reader(fd: int, captured: Captured) -> Callable[[int, int], bytes]:
    def read(address: int, length: int) -> bytes:
        for part in captured.layout:
            if part.start <= address and address + length <= part.end:
                return os.pread(fd, length, part.offset + address - part.start).ljust(length, b"\0")
        raise LookupError(hex(address))

    return read


@pytest.mark.parametrize("how", ["s", "dms"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_of_one_instant(method: Used, how: str, program: str, tmp_path: Path) -> None:
    """The content, the layout and what is read in the stop are of one instant."""
    seen: list[tuple[set[str], int]] = []

    def in_stop(stop: Stop, mappings: Mappings, layout: Sequence[Placed]) -> Sequence[Placed]:
        seen.append(({thread.state for thread in process.threads()}, len(layout)))
        return ()

    with (
        counters(program, 3, 300, how) as target,
        Process(target.pid) as process,
        new_file(tmp_path / "pages") as fd,
    ):
        options = Options(in_stop=in_stop, max_stall_s=LIMIT_S)
        found = capture(process, OwnMemory(), fd, method=method, options=options)
        target.works_on()
        lost = PageRanges(found.lost)
        target.check(reader(fd, found), lambda at: any(r.start <= at < r.end for r in lost))
        assert status(target.pid)["TracerPid"] == "0"
        assert seen == [({"t"}, len(found.layout))]
        assert found.method == method
        assert found.lost == found.dropped
        assert method == "cow" or not found.dropped
        # The memory that moves is in one of its two places.
        places = PageRanges.of((at, at + 64 * PAGE) for at in (target.moved, target.other))
        assert (PageRanges(found.data) & places).bytes + (lost & places).bytes == 64 * PAGE
        # Nothing out of date is left in the file.
        read = reader(fd, found)
        for empty in places - PageRanges(found.data):
            try:
                assert not any(read(empty.start, empty.length))
            except LookupError:  # not mapped at the instant
                continue


def test_a_file_system_that_is_full(program: str, tmp_path: Path) -> None:
    """The errno is the file system's, and the target continues to run."""
    with counters(program, 2, 300) as target, Process(target.pid) as process:
        with open("/dev/full", "wb", buffering=0) as full, pytest.raises(UffdOSError) as caught:
            capture(process, OwnMemory(), full.fileno())
        assert caught.value.errno == 28
        assert status(target.pid)["TracerPid"] == "0"
        target.works_on()


STATES = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None)
area = mmap.mmap(-1, 8 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
area[0:4] = b"data"
area[4096] = 0
area[2 * 4096 : 2 * 4096 + 6] = b"hidden"
libc.mprotect(ctypes.c_void_p(address + 2 * 4096), ctypes.c_size_t(4096), 0)
file = open(sys.executable, "rb")
private = mmap.mmap(file.fileno(), 4 * 4096, mmap.MAP_PRIVATE)
place = ctypes.addressof(ctypes.c_char.from_buffer(private))
private[4096] = 77
shared = mmap.mmap(-1, 4 * 4096)
shmem = ctypes.addressof(ctypes.c_char.from_buffer(shared))
shared[3 * 4096] = 78
print(address, place, shmem, flush=True)
sys.stdin.read()
"""


@contextmanager
def python(script: str) -> Iterator[tuple[int, list[int]]]:
    """Run a script that prints numbers and waits; yield its pid and the numbers."""
    popen = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert popen.stdout is not None
    try:
        yield popen.pid, [int(word) for word in popen.stdout.readline().split()]
    finally:
        popen.kill()
        popen.communicate()


def test_states_of_pages(tmp_path: Path) -> None:
    """Pages of zeros, pages without PROT_READ, pages of files, holes in shared memory."""
    with (
        python(STATES) as (pid, (area, private, shared)),
        Process(pid) as process,
        new_file(tmp_path / "pages") as fd,
    ):
        hidden = area + 2 * PAGE
        mappings = process.mappings()

        def placed(address: int, pages: int, offset: int, whole: bool = False) -> Placed:
            mapping = mappings.at(address)
            assert mapping is not None
            return Placed(mapping, address, address + pages * PAGE, offset, whole)

        found = capture(
            process,
            lambda _: [
                placed(area, 2, 0),
                placed(hidden, 1, 2 * PAGE),
                placed(private, 4, 8 * PAGE),
            ],
            fd,
        )
        assert PageRanges(found.data) == PageRanges.of(
            [
                (area, area + PAGE),
                (hidden, hidden + PAGE),
                (private + PAGE, private + 2 * PAGE),
            ]
        )
        assert PageRanges(found.zero) == PageRanges.of([(area + PAGE, area + 2 * PAGE)])
        assert os.pread(fd, 6, 2 * PAGE) == b"hidden"
        assert os.pread(fd, 1, 9 * PAGE) == b"M"

        found = capture(
            process, lambda _: [placed(private, 4, 0, True), placed(shared, 4, 4 * PAGE, True)], fd
        )
        assert PageRanges(found.data) == PageRanges.of(
            [(private, private + 4 * PAGE), (shared + 3 * PAGE, shared + 4 * PAGE)]
        )
        assert os.pread(fd, 4, 0) == b"\x7fELF"
        assert os.pread(fd, 1, 7 * PAGE) == b"N"
