"""`Snapshot.take` of this process and of parts of its memory, and of a userfaultfd's memory."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pyuffd import (
    BufferSource,
    DirtyTracker,
    Feature,
    Handler,
    HelperLostError,
    Process,
    Region,
    RegisterMode,
    RunState,
    Snapshot,
    SnapshotError,
    Userfaultfd,
)
from pyuffd.snapshot import SnapshotProgress, _helper
from pyuffd.snapshot._capture import Used
from pyuffd.snapshot._restore_options import Mode
from pyuffd.testing import MEMORY_TYPES
from pyuffd.testing._run import SCALE
from tests._child import limit_s, run_child
from tests._memory import PAGE
from tests.process._tracking import METHODS, OF_OTHERS

pytestmark = OF_OTHERS
LIMIT_S = 0.5 * SCALE
NUMBER = struct.Struct("=Q")
PAGES = 16


@contextmanager
def counting(places: list[Callable[[int], None]]) -> Iterator[None]:
    """Write 1, 2, 3, ... to every place in order, again and again, from a thread."""
    is_over = threading.Event()
    rounds = threading.Semaphore(0)

    def run() -> None:
        for number in itertools.count(1):
            for write in places:
                write(number)
                if is_over.is_set():
                    return
            rounds.release()

    thread = threading.Thread(target=run)
    thread.start()
    rounds.acquire()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def by_call(region: Region, offset: int) -> Callable[[int], None]:
    return lambda number: region.write(offset, NUMBER.pack(number))


def by_view(view: memoryview, offset: int) -> Callable[[int], None]:
    """Hold the GIL while the page is protected; one store, as zeros before the number are two."""
    numbers = view.cast("Q")

    def write(number: int) -> None:
        numbers[offset // NUMBER.size] = number

    return write


def expect_one_instant(numbers: list[int]) -> None:
    """Later places have the same number, or the one before from some place on."""
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] - numbers[-1] <= 1
    assert numbers[-1] > 0


def all_types(method: Used, folder: str) -> None:
    with ExitStack() as stack:
        regions = [
            stack.enter_context(
                memory.make(max(2, PAGES * PAGE // memory.page_size) * memory.page_size)
            )
            for memory in MEMORY_TYPES.values()
        ]
        places = [
            (region, offset)
            for region in regions
            for offset in range(0, region.length, region.page_size)
        ]
        with counting([by_call(*place) for place in places]):
            report = Snapshot.take(
                regions,
                f"{folder}/{method}",
                method=method,
                shared="pause",
                durable=False,
                max_stall_s=LIMIT_S,
            )
        assert report.method == method
        with Snapshot.open(report.path) as snapshot:
            assert {(r.start, r.length) for r in snapshot.regions} >= {
                (region.start, region.length) for region in regions
            }
            read = [snapshot.read(region.start + at, 8) for region, at in places]
        expect_one_instant([NUMBER.unpack(each)[0] for each in read])


@pytest.mark.parametrize("method", METHODS)
def test_one_instant(method: Used, tmp_path: Path) -> None:
    run_child(all_types, method, str(tmp_path), budget_s=30)


def with_the_gil(folder: str) -> None:
    """A thread that holds the GIL while it waits for a page to be saved is no deadlock."""
    seen: list[SnapshotProgress] = []
    with Region.anonymous(64 * PAGE) as region:
        view = memoryview((ctypes.c_char * region.length).from_address(region.start)).cast("B")
        places = [by_view(view, at) for at in range(0, region.length, PAGE)]
        with counting(places):
            report = Snapshot.take(
                region,
                f"{folder}/gil",
                method="cow",
                durable=False,
                max_stall_s=LIMIT_S,
                progress=seen.append,
            )
        assert {type(each) for each in seen} == {SnapshotProgress}
        with Snapshot.open(report.path) as snapshot:
            content = snapshot.read(region.start, region.length)
        expect_one_instant(
            [NUMBER.unpack_from(content, at)[0] for at in range(0, len(content), PAGE)]
        )


def test_writers_that_hold_the_gil(tmp_path: Path) -> None:
    run_child(with_the_gil, str(tmp_path), budget_s=30)


def whole(folder: str) -> None:
    """This whole process; then what is different; nothing is left in it."""
    with Region.anonymous(8 * PAGE) as region, Process(os.getpid()) as me:
        region.fill(1)
        descriptors = os.listdir("/proc/self/fd")
        first = Snapshot.take(me, f"{folder}/0", shared="skip", durable=False, max_stall_s=LIMIT_S)
        region.write(PAGE, b"new")
        second = Snapshot.take(
            me,
            f"{folder}/1",
            shared="skip",
            parent=first.path,
            durable=False,
            max_stall_s=LIMIT_S,
        )
        assert second.bytes < first.bytes
        with Snapshot.open(second.path) as snapshot:
            assert snapshot.read(region.start, region.length) == region.read()
            assert snapshot.state(region.start) is RunState.DATA  # of the parent
            assert any(each.path == "[stack]" for each in snapshot.regions)
        assert len(os.listdir("/proc/self/fd")) == len(descriptors)
        vmas = {m.start: m for m in me.mappings(details=True)}
        assert not vmas[region.start].flags & {"uw", "um", "ui"}


def test_whole_process_and_increment(tmp_path: Path) -> None:
    run_child(whole, str(tmp_path), budget_s=30)


def lazy(folder: str) -> None:
    """What a handler has not filled yet is no page of zeros: it is LOST, and a gap says why."""
    content = bytes(range(1, 9)) * (8 * PAGE // 8)
    with Region.anonymous(8 * PAGE) as region, Userfaultfd() as uffd, Handler(uffd) as handler:
        handler.serve(region, BufferSource(content), mode=RegisterMode.MISSING)
        assert region.read(2 * PAGE, 8) == content[:8]
        for method in METHODS:
            report = Snapshot.take(
                region,
                f"{folder}/{method}",
                method=method,
                durable=False,
                max_stall_s=LIMIT_S,
            )
            filled = 2 * PAGE
            assert {gap.reason for gap in report.gaps} == {"unfilled"}
            assert sum(gap.length for gap in report.gaps) == region.length - PAGE
            with Snapshot.open(report.path) as snapshot:
                assert snapshot.read(region.start + filled, PAGE) == content[filled : filled + PAGE]
                assert snapshot.state(region.start) is RunState.LOST
                with pytest.raises(LookupError):
                    snapshot.read(region.start, 1)
        assert region.read() == content


def test_lazily_filled_memory(tmp_path: Path) -> None:
    run_child(lazy, str(tmp_path), budget_s=30)


def of_files(folder: str) -> None:
    """Memory that was restored by each mode, and mappings of files: all of it is in the snapshot.

    The files go with this process, or may be changed: what the memory holds is what counts.
    """
    content = (b"\1" * PAGE + bytes(2 * PAGE) + b"\2" * PAGE) * 4
    path = Path(folder, "file")
    path.write_bytes(content)
    with Region.anonymous(len(content)) as source:
        source.write(0, content)
        Snapshot.take(source, f"{folder}/source", method="stopped", durable=False)
        start = source.start
    with ExitStack() as stack:
        modes: list[Mode] = ["copy", "map", "minor"]
        regions = [stack.enter_context(Region.anonymous(len(content))) for _ in modes]
        snapshot = stack.enter_context(Snapshot.open(f"{folder}/source"))
        for mode, region in zip(modes, regions, strict=True):
            with snapshot.restore({start: region}, mode=mode) as restore:
                restore.wait()
        regions += [
            stack.enter_context(Region.file(path, shared=False)),
            stack.enter_context(Region.file(path, 8 * PAGE, offset=4 * PAGE, shared=False)),
            stack.enter_context(Region.memfd(4 * PAGE, shared=False)),
        ]
        for region in regions:
            region.write(3 * PAGE, b"changed")
        expected = [region.read() for region in regions]
        for method in METHODS:
            report = Snapshot.take(
                regions,
                f"{folder}/{method}",
                method=method,
                durable=False,
                max_stall_s=LIMIT_S,
            )
            assert report.gaps == ()
            with Snapshot.open(report.path) as again:
                again.verify()
                for region, content in zip(regions, expected, strict=True):
                    assert again.read(region.start, region.length) == content, (method, region)
        # A part of a mapping, and after that what is restored is as good as the memory was.
        Snapshot.take(regions[2][PAGE:], f"{folder}/part", method="stopped", durable=False)
        with Snapshot.open(f"{folder}/part") as part, Region.anonymous(15 * PAGE) as target:
            with part.restore({regions[2].start + PAGE: target}) as restore:
                restore.wait()
            assert target.read() == expected[2][PAGE:]


def test_mappings_of_files(tmp_path: Path) -> None:
    run_child(of_files, str(tmp_path), budget_s=60)


def half_restored(folder: str) -> None:
    """What a restore has not filled yet is no page of zeros, in memory of the mode "minor" too."""
    with Region.anonymous(8 * PAGE) as source:
        source.fill(7)
        Snapshot.take(source, f"{folder}/source", method="stopped", durable=False)
        start = source.start
    with (
        Snapshot.open(f"{folder}/source") as snapshot,
        Region.anonymous(8 * PAGE) as region,
        snapshot.restore({start: region}, mode="minor", paused=True) as restore,
    ):
        at = region.start
        assert region.read(2 * PAGE, 1) == b"\7"
        report = Snapshot.take(region, f"{folder}/half", method="stopped", durable=False)
        restore.resume()
        restore.wait()
    assert {gap.reason for gap in report.gaps} <= {"unfilled"}
    with Snapshot.open(f"{folder}/half") as half:
        states = {half.state(at + page * PAGE) for page in range(8)}
        assert half.state(at + 2 * PAGE) is RunState.DATA
        assert states <= {RunState.DATA, RunState.LOST}


def test_a_restore_that_has_not_ended(tmp_path: Path) -> None:
    run_child(half_restored, str(tmp_path), budget_s=30)


def test_bad_targets(tmp_path: Path) -> None:
    with Region.anonymous(PAGE) as region, Process(os.getpid()) as me:
        with pytest.raises(ValueError, match="the target is ranges"):
            Snapshot.take(region, tmp_path / "a", ranges=[region])
        for target in ("text", 5, b"bytes", tmp_path):
            with pytest.raises(TypeError, match="must be a Process"):
                Snapshot.take(target, tmp_path / "a")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no ranges"):
            Snapshot.take([], tmp_path / "a")
        with (
            DirtyTracker(region) as tracker,
            pytest.raises(ValueError, match="has no tracker of it"),
        ):
            Snapshot.take(me, tmp_path / "a", tracker=tracker)
        with Userfaultfd() as uffd, pytest.raises(ValueError, match="needs ranges="):
            Snapshot.take(uffd, tmp_path / "a")
    with Region.memfd(PAGE) as region, pytest.raises(SnapshotError, match="shares"):
        Snapshot.take(region, tmp_path / "a")
    with Region.anonymous(PAGE) as region:
        os.mkdir(tmp_path / "there")
        with pytest.raises(FileExistsError):
            Snapshot.take(region, tmp_path / "there")
    assert os.listdir(tmp_path) == ["there"]


def without_standard_streams(folder: str) -> None:
    for fd in range(3):
        os.close(fd)
    with Region.anonymous(PAGE) as region:
        region.fill(1)
        Snapshot.take(region, f"{folder}/a", method="stopped", durable=False)
        with Snapshot.open(f"{folder}/a") as snapshot:
            if snapshot.read(region.start, PAGE) != region.read():
                os._exit(3)
    os._exit(0)


def test_without_standard_streams(tmp_path: Path) -> None:
    run_child(without_standard_streams, str(tmp_path), budget_s=30)


def test_what_is_refused_before_the_helper_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: int) -> None:
        raise AssertionError("the helper was started")

    monkeypatch.setattr(_helper, "_start", start)
    os.symlink("nowhere", tmp_path / "link")
    with Region.anonymous(PAGE) as region:
        for name in (".", "link"):
            with pytest.raises(FileExistsError):
                Snapshot.take(region, tmp_path / name)
        with pytest.raises(FileNotFoundError, match="parent"):
            Snapshot.take(region, tmp_path / "a", parent=tmp_path / "parent")
        with pytest.raises(AssertionError, match="started"):
            Snapshot.take(region, tmp_path / "a")
        with pytest.raises(AssertionError, match="started"):
            Snapshot.take(region, tmp_path / "a", compress=22)
    with pytest.raises(TypeError, match=rf"make Process\({os.getpid()}\)"):
        Snapshot.take(os.getpid(), tmp_path / "a")  # type: ignore[arg-type]


SLOW_END = "import atexit, time; atexit.register(time.sleep, 2);"


def test_the_helper_ends_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """However late it is told to end; and its start is a part of the time that is reported."""
    start = _helper._start

    def late(fd: int) -> subprocess.Popen[bytes]:
        time.sleep(0.2)
        return start(fd)

    monkeypatch.setattr(_helper, "_start", late)
    monkeypatch.setattr(_helper, "_PROGRAM", SLOW_END + _helper._PROGRAM)
    with Region.anonymous(PAGE) as region:
        report = Snapshot.take(region, tmp_path / "a", method="stopped", durable=False)
    assert report.seconds > 0.2
    assert capfd.readouterr().err == ""


def test_a_helper_of_a_process_that_has_ended() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = _helper._PROGRAM.format(
            path=[entry for entry in sys.path if entry], fd=theirs.fileno(), pid=ended.pid
        )
        helper = subprocess.run(
            [sys.executable, "-P", "-c", program],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
            timeout=limit_s(60),
        )
    assert helper.stderr == ""


class Refused(Exception):
    pass


def refuse(_: SnapshotProgress) -> None:
    raise Refused


def refuse_late(_: SnapshotProgress) -> None:
    """Refuse when the helper has long done everything."""
    time.sleep(0.5)
    raise Refused


@pytest.mark.parametrize("progress", [refuse, refuse_late])
def test_an_exception_ends_it(tmp_path: Path, progress: Callable[[SnapshotProgress], None]) -> None:
    """Nothing is left of the helper, nor of the snapshot."""
    with Region.anonymous(64 * PAGE) as region:
        region.fill(1)
        with pytest.raises(Refused):
            Snapshot.take(region, tmp_path / "a", method="stopped", progress=progress)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_helper_is_killed(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = _helper._start

    def killed(fd: int) -> subprocess.Popen[bytes]:
        helper = start(fd)
        helper.send_signal(number)
        return helper

    monkeypatch.setattr(_helper, "_start", killed)
    with (
        Region.anonymous(PAGE) as region,
        pytest.raises(HelperLostError, match=f"ended by {number.name}"),
    ):
        Snapshot.take(region, tmp_path / "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("executable", ["/nowhere/python", "/proc/self/status"])
def test_an_interpreter_that_cannot_be_started(
    executable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with Region.anonymous(PAGE) as region, pytest.raises(HelperLostError, match=executable):
        Snapshot.take(region, tmp_path / "image", method="cow")
    assert not list(tmp_path.iterdir())


def of_a_descriptor(folder: str) -> None:
    """The memory that an adopted userfaultfd governs, by WP_ASYNC where it has that."""
    reading, writing = os.pipe()
    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.PAGEFAULT_FLAG_WP
    region = Region.anonymous(8 * PAGE)
    region.fill(7)
    # A fork of the test: it keeps the memory registered until it is killed.
    if (child := os.fork()) == 0:
        with Userfaultfd(features=features) as uffd:
            uffd.register(region, mode=RegisterMode.WP)
            os.write(writing, str(uffd.fileno()).encode())
            time.sleep(600)
    try:
        fd = int(os.read(reading, 16))
        pidfd = os.pidfd_open(child)
        mine = pidfd_getfd(pidfd, fd)
        os.close(pidfd)
        region.fill(1)  # ours, not the child's
        with Userfaultfd.from_fd(mine, owner_pid=child) as uffd:
            report = Snapshot.take(
                uffd, f"{folder}/a", ranges=[region], durable=False, max_stall_s=LIMIT_S
            )
            assert report.method == "precopy"
            assert report.bytes == region.length
        with Snapshot.open(report.path) as snapshot:
            assert snapshot.read(region.start, region.length) == bytes([7]) * region.length
            assert snapshot.manifest["target"]["pid"] == child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    region.close()


def pidfd_getfd(pidfd: int, fd: int) -> int:
    found = int(ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, fd, 0))
    assert found >= 0, os.strerror(ctypes.get_errno())
    return found


def test_of_an_adopted_descriptor(tmp_path: Path) -> None:
    run_child(of_a_descriptor, str(tmp_path), budget_s=30)
