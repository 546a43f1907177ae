"""What "cow" does about a process that writes, page by page and at known moments."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pyuffd import PageBit, Process, RunState, Snapshot, SnapshotReport
from pyuffd import _image_calls as calls
from pyuffd._pages import HUGE_PAGE_2M
from pyuffd.dirty._rows import DENSE_BYTES
from pyuffd.snapshot import _capture
from pyuffd.snapshot._cow import MEMORY_PAGES
from pyuffd.testing import needs_privilege, needs_swap
from pyuffd.testing._run import SCALE
from tests._memory import PAGE
from tests.process.test_snapshot import take

pytestmark = needs_privilege("CAP_SYS_PTRACE")

# Values of bytes of pages, dropping, moving and swapping out pages, at the words of standard input.
WRITER = """
import ctypes, mmap, os, sys
MOVE, SWAP_OUT, MOVE_OVER, MADV_PAGEOUT = -1, -2, -3, 21
libc = ctypes.CDLL(None)
length = int(sys.argv[1])
NORESERVE = 0x4000
area = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
area.madvise(mmap.MADV_NOHUGEPAGE)
size = ctypes.c_size_t(length)
at = ctypes.addressof(ctypes.c_char.from_buffer(area))
other = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
to = ctypes.addressof(ctypes.c_char.from_buffer(other))
print(at, to, flush=True)
for line in sys.stdin:
    value, first, past, step = map(int, line.split())
    if value == MOVE:
        assert libc.mremap(ctypes.c_void_p(at), size, size, 3, ctypes.c_void_p(to)) != -1
        assert libc.mmap(ctypes.c_void_p(at), size, 3, 0x4032, -1, 0) != -1
        at, to = to, at
    elif value == MOVE_OVER:
        part = ctypes.c_size_t((past - first) * 4096)
        place = ctypes.c_void_p(at + step * 4096)
        assert libc.mremap(ctypes.c_void_p(at + first * 4096), part, part, 3, place) != -1
    elif value == SWAP_OUT:
        for cpu in sorted(os.sched_getaffinity(0)):
            os.sched_setaffinity(0, {cpu})
            area.madvise(MADV_PAGEOUT, first * 4096, (past - first) * 4096)
    elif value:
        for page in range(first, past, step):
            area[page * 4096] = value
    else:
        area.madvise(mmap.MADV_DONTNEED, first * 4096, (past - first) * 4096)
    print(flush=True)
"""


@dataclass(frozen=True)
class Area:
    start: int
    length: int


class Writer:
    """A process with an area that it writes when it is told."""

    def __init__(self, popen: subprocess.Popen[str], length: int) -> None:
        assert popen.stdout is not None
        self.pid, self._popen = popen.pid, popen
        self.area, self.other = (
            Area(int(word), length) for word in popen.stdout.readline().split()
        )

    def write(self, value: int, first: int, past: int, step: int = 1) -> None:
        """Write a value to each of some pages; 0 drops them."""
        self._do(value, first, past, step)

    def move(self) -> None:
        """Move the memory from one area to the other; where it was is empty memory."""
        self._do(-1, 0, 0, 1)

    def move_over(self, first: int, past: int, to: int) -> None:
        """Move pages to others of the area, which are unmapped by that."""
        self._do(-3, first, past, to)

    def swap_out(self, first: int, past: int) -> None:
        """Move pages to swap."""
        self._do(-2, first, past, 1)

    def _do(self, *words: int) -> None:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(" ".join(map(str, words)) + "\n")
        self._popen.stdin.flush()
        assert self._popen.stdout.readline() == "\n"


@contextmanager
def writer(length: int) -> Iterator[Writer]:
    popen = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(length)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Writer(popen, length)
    finally:
        popen.kill()
        popen.communicate()


def values(snapshot: Snapshot, area: Area, pages: int) -> bytes:
    """Return the first byte of each page."""
    return snapshot.read(area.start, pages * PAGE)[::PAGE]


def test_neighbours_are_saved_with_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that writes page after page waits once for 16 of them."""
    pages = 1024
    with writer(pages * PAGE) as target, Process(target.pid) as process:
        target.write(1, 0, pages)

        def at(name: str) -> None:
            if name == "resumed":
                target.write(2, 0, pages)

        monkeypatch.setattr(_capture, "barrier", at)
        # At one byte a second the sweep does its first step and no other.
        report = take(process, tmp_path / "1", method="cow", ranges=[target.area], rate=1)
        assert isinstance(report, SnapshotReport)
        with Snapshot.open(tmp_path / "1") as snapshot:
            assert values(snapshot, target.area, pages) == b"\1" * pages
        assert report.faults + report.swept == pages
        assert 1 <= report.faults <= pages // 8


def test_what_moves_to_the_place_of_owed_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for them: they are LOST, as they were unmapped before they were saved."""
    half = 256
    with writer(2 * half * PAGE) as target, Process(target.pid) as process:
        target.write(1, 0, half)
        target.write(2, half, 2 * half)

        def at(name: str) -> None:
            if name == "resumed":
                target.move_over(half, 2 * half, 0)
                target.write(3, 0, half)

        monkeypatch.setattr(_capture, "barrier", at)
        # At one byte a second the sweep does its first step and no other.
        report = take(process, tmp_path / "1", method="cow", ranges=[target.area], rate=1)
        assert isinstance(report, SnapshotReport)
        with Snapshot.open(tmp_path / "1") as snapshot:
            pages = range(target.area.start, target.area.start + 2 * half * PAGE, PAGE)
            lost = [page for page in pages if snapshot.state(page) is RunState.LOST]
            found = {page: snapshot.read(page, 1)[0] for page in pages if page not in lost}
        assert half // 4 <= len(lost) == report.dropped // PAGE
        assert found == {page: 1 + (page >= pages[half]) for page in pages if page not in lost}


def test_children_have_no_copy_of_our_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that watches over the protection does not share what pages are saved to."""
    anonymous: dict[str, int] = {}

    def at(name: str) -> None:
        if name == "armed":
            give_up = time.monotonic() + 10 * SCALE
            guard = None  # it gives itself its name
            while guard is None and time.monotonic() < give_up:
                children = psutil.Process().children()
                guard = next((each for each in children if each.name() == "uffd-guard"), None)
            assert guard is not None
            for who, pid in (("guard", guard.pid), ("here", "self")):
                status = Path(f"/proc/{pid}/status").read_text()
                anonymous[who] = int(status.partition("RssAnon:")[2].split()[0]) << 10

    with writer(PAGE) as target, Process(target.pid) as process:
        monkeypatch.setattr(_capture, "barrier", at)
        take(process, tmp_path / "1", method="cow", ranges=[target.area])
    assert anonymous["guard"] + MEMORY_PAGES * PAGE * 3 // 4 < anonymous["here"]


@pytest.mark.parametrize("length", [4096 * PAGE, 4 * DENSE_BYTES], ids=["dense", "sparse"])
def test_what_was_written_before_the_stop(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop looks at pages only that were not protected again; those dropped come back."""
    pages = 4096
    looked: list[int] = []
    scan = calls.Pieces._scan
    in_stop = False

    def noted(
        self: calls.Pieces, pagemap_fd: int, flags: int, within: memoryview | None
    ) -> tuple[memoryview, memoryview]:
        if in_stop and within is not None:
            looked.append(sum(within[1::3]) - sum(within[0::3]))
        return scan(self, pagemap_fd, flags, within)

    monkeypatch.setattr(calls.Pieces, "_scan", noted)
    with writer(length) as target, Process(target.pid) as process:
        target.write(1, 0, pages)
        rounds = 0

        def at(name: str) -> None:
            nonlocal in_stop, rounds
            in_stop = name == "stopped"
            if name == "armed":
                target.write(2, 0, pages, 2)
                target.write(0, 100, 132)
            elif name == "protected again":
                rounds += 1
                if rounds == 1:
                    target.write(3, 108, 116)

        monkeypatch.setattr(_capture, "barrier", at)
        report = take(process, tmp_path / "1", method="cow", ranges=[target.area])
        assert isinstance(report, SnapshotReport)
        with Snapshot.open(tmp_path / "1") as snapshot:
            expected = bytearray(b"\2\1" * (pages // 2))
            expected[100:132] = bytes(32)
            expected[108:116] = b"\3" * 8
            assert values(snapshot, target.area, pages) == expected
        assert not report.dropped
    assert rounds >= 1
    # In a sparse area all of it is looked at for pages that were empty.
    assert max(looked) <= (64 * PAGE if length <= DENSE_BYTES else length)


@pytest.mark.parametrize("stops", [1, 2])
def test_first_writes_of_a_sparse_area(
    stops: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its empty pages are not protected: the stop finds them, even after a failed stop."""
    limit_s = 0.3 * SCALE
    with writer(4 * DENSE_BYTES) as target, Process(target.pid) as process:
        target.write(1, 8, 9)
        found = 0

        def at(name: str) -> None:
            nonlocal found
            if name == "armed":
                target.write(2, 0, 3)
            elif name == "stopped":
                found += 1
                if found < stops:
                    time.sleep(limit_s)

        monkeypatch.setattr(_capture, "barrier", at)
        take(process, tmp_path / "1", method="cow", ranges=[target.area], max_stall_s=limit_s)
        with Snapshot.open(tmp_path / "1") as snapshot:
            assert values(snapshot, target.area, 9) == b"\2\2\2" + bytes(5) + b"\1"
    assert found >= stops


def test_what_is_moved_before_it_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No event tells of it: content is where it is once events are sent, and nowhere else."""
    pages = 64
    with writer(pages * PAGE) as target, Process(target.pid) as process:
        target.write(1, 0, pages)

        def at(name: str) -> None:
            if name in ("arming", "content known"):
                target.move()

        monkeypatch.setattr(_capture, "barrier", at)
        take(process, tmp_path / "1", method="cow", ranges=[target.area, target.other])
        with Snapshot.open(tmp_path / "1") as snapshot:
            assert values(snapshot, target.area, pages) == b"\1" * pages
            states = {snapshot.state(target.other.start + i * PAGE) for i in range(pages)}
            assert states == {RunState.ABSENT}


@needs_swap()
def test_what_is_new_and_on_swap_while_it_is_armed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not in memory, and looks like the mark of an empty page that is protected."""
    with writer(1024 * PAGE) as target, Process(target.pid) as process:
        target.write(1, 0, 1024, 2)

        def at(name: str) -> None:
            if name == "content known":
                target.write(2, 101, 102)
                until = time.monotonic() + 5
                page = target.area.start + 101 * PAGE
                while process.pagemap.read(page, PAGE).count(PageBit.PRESENT):
                    assert time.monotonic() < until
                    target.swap_out(101, 102)

        monkeypatch.setattr(_capture, "barrier", at)
        take(process, tmp_path / "1", method="cow", ranges=[target.area])
        with Snapshot.open(tmp_path / "1") as snapshot:
            found = bytearray(b"\1\0" * 512)
            found[101] = 2
            assert values(snapshot, target.area, 1024) == found
            assert snapshot.state(target.area.start + 103 * PAGE) is RunState.ABSENT


def test_large_memory_can_be_mapped_with_huge_pages(tmp_path: Path) -> None:
    """Its place in the file is as far from a multiple of 2 MiB as its address; flattened too."""
    with writer(32 << 20) as target, Process(target.pid) as process:
        target.write(1, 0, 10)
        take(process, tmp_path / "1", method="stopped")
    with Snapshot.open(tmp_path / "1") as snapshot:
        snapshot.flatten(tmp_path / "2", durable=False)
    for name in ("1", "2"):
        with Snapshot.open(tmp_path / name) as snapshot:
            large = [
                (start, offset)
                for region in snapshot.manifest["regions"]
                for start, end, offset in region["places"]
                if end - start >= 32 << 20
            ]
            assert large
            assert all((start - offset) % HUGE_PAGE_2M == 0 for start, offset in large)
            assert values(snapshot, target.area, 11) == b"\1" * 10 + b"\0"
