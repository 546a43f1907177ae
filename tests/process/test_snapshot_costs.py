"""What a snapshot does not do: work that grows with the memory, and not with what was written."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pyuffd import (
    DirtyTracker,
    MappingKind,
    PageRanges,
    Process,
    Region,
    SnapshotReport,
    Userfaultfd,
    _remote_calls,
)
from pyuffd import _image_calls as calls
from pyuffd._saver_calls import Saver
from pyuffd.dirty._round import Pending
from pyuffd.snapshot import _capture, _own_pages
from pyuffd.snapshot._capture import Options
from pyuffd.snapshot._drain import Drain
from pyuffd.snapshot._writer import MEMORY, Writer
from pyuffd.testing import needs_privilege
from pyuffd.testing._run import SCALE
from tests._memory import PAGE
from tests._tracked import note_runs
from tests.process._counters import counters, new_file
from tests.process._counters import program as program
from tests.process.test_snapshot import take, wait_until

pytestmark = needs_privilege("CAP_SYS_PTRACE")
NICER = 5
ANONYMOUS = MappingKind.ANONYMOUS


def test_what_a_tracker_has_registered_is_not_walked(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel walks all page tables for the flags of mappings."""
    mappings, walks = Process.mappings, []

    def noted(self: Process, *, details: bool = False) -> object:
        walks.append(details)
        return mappings(self, details=details)

    with (
        counters(program, 2, 400) as target,
        Process(target.pid) as process,
        DirtyTracker(process) as tracker,
    ):
        monkeypatch.setattr(Process, "mappings", noted)
        take(process, tmp_path / "1", tracker=tracker)
        take(process, tmp_path / "2", tracker=tracker, parent=tmp_path / "1")
        assert walks
        assert not any(walks)
        take(process, tmp_path / "3")
        assert any(walks)  # without it they are


def test_marks_are_looked_for_where_content_is(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All protected memory has marks on its holes; the stop copies what is not protected."""
    marks, looked, scans = _own_pages.marks, [0], []
    scan_apart = calls.Pieces.scan_apart

    def scanned(self: calls.Pieces, *arguments: Any, **options: Any) -> object:
        scans.append(len(self))
        return scan_apart(self, *arguments, **options)

    def noted(process: Process, swapped: PageRanges, *, doubtful: bool = False) -> PageRanges:
        if not doubtful:  # that is before the stop
            looked.append(swapped.bytes)
        return marks(process, swapped, doubtful=doubtful)

    monkeypatch.setattr(_own_pages, "marks", noted)
    monkeypatch.setattr(calls.Pieces, "scan_apart", scanned)
    with counters(program, 2, 400) as target, Process(target.pid) as process:
        take(process, tmp_path / "1", method="cow")
    assert scans
    assert sum(looked) < 64 * PAGE


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE


def test_memory_for_the_stop_is_as_large_as_needed(tmp_path: Path) -> None:
    with Process(os.getpid()) as process, new_file(tmp_path / "pages") as fd:
        with Writer(process, fd, Options()) as writer:
            before = resident()
            writer.prepare(0)
            few = resident() - before
            writer.prepare(MEMORY)
            all_of_it = resident() - before
        assert few < 8 << 20
        assert all_of_it > MEMORY * 9 // 10


def test_an_exception_in_the_stop_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its traceback has a view of the memory for the stop."""

    def interrupted(pid: int, ranges: object, target: memoryview, base: int | None) -> None:
        view = target[:1]
        raise KeyboardInterrupt(len(view))

    monkeypatch.setattr(_remote_calls, "read_ranges", interrupted)
    with (
        Process(os.getpid()) as process,
        new_file(tmp_path / "pages") as fd,
        Region.anonymous(PAGE) as region,
        pytest.raises(KeyboardInterrupt),
        Writer(process, fd, Options()) as writer,
    ):
        writer.prepare(PAGE)
        pages = PageRanges.of([(region.start, region.start + PAGE)]).memoryview()
        writer.take(pages, calls.Pieces([(region.start, region.start + PAGE, 0, True)]), math.inf)


def nice_of_copier() -> int | None:
    for tid in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{tid}/comm") as comm:
                if comm.read() == "uffd-copy\n":
                    return os.getpriority(os.PRIO_PROCESS, int(tid))
        except OSError:
            continue
    return None


def test_who_copies_while_the_process_runs_lets_others_go_first(tmp_path: Path) -> None:
    """A fault of the copy that nobody answers holds it, so that its priority can be read."""
    with (
        Region.anonymous(PAGE) as region,
        Userfaultfd() as uffd,
        new_file(tmp_path / "pages") as fd,
    ):
        uffd.register(region)
        span = (region.start, region.start + PAGE)
        pages = PageRanges.of([span]).memoryview()
        pieces = calls.Pieces([(*span, 0, True)])
        found: list[calls.Copied] = []
        copier = threading.Thread(
            target=lambda: found.append(
                calls.copy(os.getpid(), -1, pages, pieces, fd, overwrite=False, gentle=True)
            )
        )
        copier.start()
        try:
            wait_until(lambda: nice_of_copier() is not None)
            wait_until(lambda: nice_of_copier() == os.getpriority(os.PRIO_PROCESS, 0) + NICER)
        finally:
            uffd.copy(region.start, b"x" * PAGE)
            copier.join()
        assert os.pread(fd, PAGE, 0) == b"x" * PAGE
        assert [one.bytes for one in found] == [PAGE]


def test_who_fills_in_the_background_lets_others_go_first() -> None:
    """And what it fills is found one piece after the other: memory is usable before."""
    asked: list[int] = []
    found: list[int] = []

    def pieces() -> Iterator[int]:
        for number in range(3):
            asked.append(number)
            yield number

    def work(piece: int) -> int:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        assert len(asked) == min(piece + 2, 3)
        return 0

    drain = Drain(work, lambda: None, pieces(), threads=1, held=True)
    drain.start()
    assert asked == [0]
    drain.hold(False)
    assert drain.wait(10 * SCALE)
    drain.stop()
    assert drain.error is None
    assert found == [os.getpriority(os.PRIO_PROCESS, 0) + NICER] * 3


def test_while_faults_come_one_thread_fills() -> None:
    """With a thread on each CPU, a fault would wait for one; the first faults are not delayed."""
    count = 0
    threads: set[int] = set()
    first: set[int] = set()
    together = threading.Barrier(2, timeout=10 * SCALE)

    def faults() -> int:
        nonlocal count
        count += 1
        return count

    def work(_: int) -> int:
        threads.add(threading.get_native_id())
        time.sleep(0.001)
        return 0

    def at_once() -> int:
        first.add(threading.get_native_id())
        together.wait()
        return 0

    drain = Drain(work, lambda: None, range(100), threads=2, held=True, faults=faults)
    drain.start()
    assert drain.first([at_once, at_once]).wait(10 * SCALE)
    drain.hold(False)
    assert drain.wait(10 * SCALE)
    drain.stop()
    assert drain.error is None
    assert (len(first), len(threads)) == (2, 1)


@contextmanager
def running(text: str) -> Iterator[Process]:
    """Run a program in Python, which prints a line when it is ready."""
    command = [sys.executable, "-c", text]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as popen,
        Process(popen.pid) as process,
    ):
        assert popen.stdout is not None
        popen.stdout.readline()
        try:
            yield process
        finally:
            popen.kill()


IDLE = "import sys; block = bytearray(b'x') * (8 << 20); print(flush=True); sys.stdin.read()"


def test_the_stop_is_made_small(tmp_path: Path) -> None:
    """What would fit into the stop is copied before it, if that leaves less."""
    with running(IDLE) as process, DirtyTracker(process) as tracker:
        take(process, tmp_path / "1", tracker=tracker)
        heap = max(process.mappings(), key=lambda m: m.length * (m.kind is ANONYMOUS))
        written = PageRanges.of([(heap.start, heap.end)]).memoryview()
        tracker._put_back(Pending(written=written))
        report = take(
            process, tmp_path / "2", tracker=tracker, parent=tmp_path / "1", max_stall_s=10.0
        )
    assert isinstance(report, SnapshotReport)
    assert report.bytes >= 8 << 20
    assert report.stop_bytes < 1 << 20


MANY = """
import mmap, sys
P, kept = 4096, []
for i in range(%d):
    kept.append(mmap.mmap(-1, P, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 1 + i %% 2 * 2))
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def many_mappings(count: int) -> Iterator[Process]:
    with running(MANY % count) as process:
        yield process


@pytest.mark.parametrize("method", ["precopy", "cow"])
def test_no_call_registers_or_unregisters_all_of_many_mappings(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile the process can map nothing; nor while a userfaultfd is closed that has them."""
    spans: dict[str, list[tuple[int, int]]] = {"register": [], "unregister": []}
    arm = Saver.arm

    def armed(self: Saver, pages: memoryview, *, registers: bool) -> int:
        if registers:
            spans["register"] += [(span.start, span.end) for span in PageRanges(pages)]
        return arm(self, pages, registers=registers)

    def noted(name: str) -> None:
        real = getattr(Userfaultfd, name)

        def call(self: Userfaultfd, start: Any, length: Any = None, **more: Any) -> None:
            if length is not None:
                spans[name].append((start, start + length))
            real(self, start, length, **more)

        monkeypatch.setattr(Userfaultfd, name, call)

    for name in spans:
        noted(name)
    note_runs(monkeypatch, lambda name, runs: spans[name].extend(runs))
    monkeypatch.setattr(Saver, "arm", armed)
    with many_mappings(2500) as process:
        starts = [m.start for m in process.mappings() if m.kind is ANONYMOUS]
        take(process, tmp_path / "one", method=method, max_stall_s=20 * SCALE)
    if method == "cow":
        # C lets it go, in runs of adjacent mappings: see test_unregister_mappings.
        assert spans.pop("unregister") == []
    for name, calls_ in spans.items():
        held = [bisect_left(starts, end) - bisect_left(starts, start) for start, end in calls_]
        assert (name, sum(held) >= 2500, max(held) <= 1000) == (name, True, True), held


@pytest.mark.parametrize("method", ["precopy", "cow"])
def test_the_stop_does_nothing_for_each_of_many_mappings(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mappings are read and compared; all that is made of them was made before."""
    count, calls_ = 2500, 0

    def called(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls_
        calls_ += event == "call"

    def at(name: str) -> None:
        nonlocal calls_
        if name == "stopped":
            calls_ = 0
        sys.setprofile(called if name == "stopped" else None)

    with many_mappings(count) as process:
        monkeypatch.setattr(_capture, "barrier", at)
        try:
            take(process, tmp_path / "one", method=method, max_stall_s=20 * SCALE)
        finally:
            sys.setprofile(None)
    assert 0 < calls_ < count // 2


HUGE = """
import contextlib, mmap, sys
area = mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
with contextlib.suppress(OSError):  # a kernel without them
    area.madvise(mmap.MADV_HUGEPAGE)
area[:] = b"x" * len(area)
print(flush=True)
sys.stdin.read()
"""


def in_huge_pages(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


def test_the_sweep_splits_no_huge_pages(tmp_path: Path) -> None:
    with running(HUGE) as process:
        before = in_huge_pages(process.pid)
        if not before:
            pytest.skip("no transparent huge page was free")
        report = take(process, tmp_path / "1", method="cow", max_stall_s=10.0)
        assert isinstance(report, SnapshotReport)
        assert report.swept >= (32 << 20) // PAGE
        assert in_huge_pages(process.pid) * 4 >= before * 3
