"""`Snapshot`: taking, reading, chains, damage, and what failures and kills leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyuffd import (
    ClosedError,
    DirtyTracker,
    Feature,
    MappingKind,
    PageBit,
    Process,
    Region,
    RegisterMode,
    RunState,
    Snapshot,
    SnapshotError,
    SnapshotFormatError,
    SnapshotProgress,
    StopTimeoutError,
    Userfaultfd,
    write_core,
)
from pyuffd._owned import Descriptor
from pyuffd.cli import _expected, main
from pyuffd.cli._expected import has_shared_files, limited_pause, shared_memory
from pyuffd.snapshot import _capture, _format, _own_pages, _precopy, _private_files, _sums
from pyuffd.snapshot._capture import Method, Used
from pyuffd.snapshot._files import NewDirectory
from pyuffd.testing import needs_swap, swap_out
from pyuffd.testing._run import SCALE
from tests._child import crowd, limit_s, run_child
from tests._memory import PAGE
from tests.kernel.test_userfaultfd_open import drop_capability
from tests.process._attach import status
from tests.process._counters import Counters, counters
from tests.process._counters import program as program
from tests.process._tracking import METHODS, OF_OTHERS

if TYPE_CHECKING:
    from typing_extensions import Buffer

pytestmark = OF_OTHERS
LIMIT_S = 0.2 * SCALE
WAITS_S = 10.0


def take(target: Process, path: Path, **options: object) -> object:
    limit = None if options.get("method") == "stopped" else LIMIT_S * crowd()
    kept: dict[str, object] = {"max_stall_s": limit, "durable": False} | options
    until = time.monotonic() + WAITS_S * crowd()
    while True:
        try:
            return Snapshot.take(target, path, **kept)  # type: ignore[arg-type]
        except StopTimeoutError as error:
            # On a busy machine a thread may not get a CPU for a second, so that it does not stop.
            if error.state != "R" or time.monotonic() > until:
                raise


def check(target: Counters, snapshot: Snapshot) -> None:
    """Only what is marked as lost may be missing."""

    def read(address: int, length: int) -> bytes:
        # In pieces, since a part may be lost.
        return b"".join(
            bytes(PAGE) if lost(at) else snapshot.read(at, PAGE)
            for at in range(address, address + length, PAGE)
        )

    def lost(address: int) -> bool:
        return snapshot.state(address) is RunState.LOST

    target.check(read, lost)


def unharmed(target: Counters) -> None:
    """Check that it continues to work, is not traced, and has nothing registered."""
    target.works_on()
    assert status(target.pid)["TracerPid"] == "0"
    # What a SIGKILL leaves ends a moment later.
    wait_until(lambda: not is_registered(target.pid))


def is_registered(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    return any(" uw" in line for line in lines if line.startswith("VmFlags"))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_is_of_one_instant(method: Used, program: str, tmp_path: Path) -> None:
    with counters(program, 3, 300, "dms") as target, Process(target.pid) as process:
        report = Snapshot.take(
            process, tmp_path / "one", method=method, max_stall_s=LIMIT_S, durable=True
        )
        unharmed(target)
        assert (report.method, report.path) == (method, str(tmp_path / "one"))
        assert 0 < report.pause_s < report.seconds
        with Snapshot.open(tmp_path / "one") as snapshot:
            check(target, snapshot)
            snapshot.verify()
            assert snapshot.state(target.areas[0]) in (RunState.DATA, RunState.LOST)
            assert snapshot.state(0x1000) is None
            assert {r.path for r in snapshot.regions} >= {"[stack]"}
            # Every page of every region has a run.
            covered = sum(run.length for run in snapshot.runs)
            assert covered == sum(region.length for region in snapshot.regions)
            with pytest.raises(LookupError):
                snapshot.read(0x1000, 1)
        with pytest.raises(ClosedError):
            snapshot.read(target.areas[0], 1)
    modes = {
        name: os.stat(tmp_path / "one" / name).st_mode & 0o777
        for name in os.listdir(tmp_path / "one")
    }
    assert modes == dict.fromkeys(("manifest.json", "notes", "pages", "runs"), 0o600)
    assert os.listdir(tmp_path) == ["one"]


@pytest.mark.parametrize("how", ["compare", "tracker"])
def test_a_chain_and_its_flat_copy(how: str, program: str, tmp_path: Path) -> None:
    """Each snapshot of a chain is of its own instant, and the flat copy has the same content."""
    with (
        counters(program, 2, 400, "dms") as target,
        Process(target.pid) as process,
        DirtyTracker(process) if how == "tracker" else nullcontext() as tracker,
    ):
        parent: Path | None = None
        images = []
        for number in range(4):
            path = tmp_path / str(number)
            take(process, path, parent=parent, tracker=tracker)
            parent = path
            target.works_on()
        if tracker is not None:
            tracker.close()
        unharmed(target)
        for number in range(4):
            with Snapshot.open(tmp_path / str(number)) as snapshot:
                assert snapshot.depth == number
                target.check(snapshot.read)
                images.append(snapshot.read(target.areas[0], 400 * PAGE))
                if number == 3:
                    states = {run.state for run in snapshot.runs}
                    assert RunState.PARENT in states
                    snapshot.flatten(tmp_path / "flat", durable=False)
        assert len(set(images)) == 4
        for number in range(4):
            shutil.move(tmp_path / str(number), tmp_path / f"moved {number}")
        # By hash and not by name.
        with Snapshot.open(tmp_path / "moved 3") as last, Snapshot.open(tmp_path / "flat") as flat:
            assert flat.depth == 0
            flat.verify()
            assert flat.regions == last.regions
            for region in last.regions:
                for address in range(region.start, region.end, 64 * PAGE):
                    length = min(64 * PAGE, region.end - address)
                    try:
                        expected = last.read(address, length)
                    except LookupError:
                        continue
                    assert flat.read(address, length) == expected
        shutil.rmtree(tmp_path / "moved 1")
        with pytest.raises(SnapshotFormatError):
            Snapshot.open(tmp_path / "moved 3")


def test_a_tracker_of_another_snapshot(program: str, tmp_path: Path) -> None:
    """What was written since the parent is known only to the tracker that the parent had."""
    with (
        counters(program, 1, 16, "s") as target,
        Process(target.pid) as process,
        DirtyTracker(process) as tracker,
    ):
        take(process, tmp_path / "1")
        with pytest.raises(SnapshotError) as caught:
            take(process, tmp_path / "2", parent=tmp_path / "1", tracker=tracker)
        assert caught.value.reason == "parent"
        take(process, tmp_path / "2", tracker=tracker)
        with tracker.collect() as round_:
            round_.commit()  # from here on the tracker knows less
        with pytest.raises(SnapshotError):
            take(process, tmp_path / "3", parent=tmp_path / "2", tracker=tracker)
        with (
            counters(program, 1, 16, "s") as other,
            Process(other.pid) as stranger,
            pytest.raises(SnapshotError) as caught,
        ):
            take(stranger, tmp_path / "3", parent=tmp_path / "2")
        assert caught.value.reason == "parent"
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_failed_incremental_loses_nothing(program: str, tmp_path: Path) -> None:
    """The next one has what the failed one had collected."""
    with (
        counters(program, 2, 200, "s") as target,
        Process(target.pid) as process,
        DirtyTracker(process) as tracker,
    ):
        take(process, tmp_path / "1", tracker=tracker)
        target.works_on()

        def fail(progress: object) -> None:
            if getattr(progress, "phase", "") == "sums":
                raise OSError(28, os.strerror(28))

        with pytest.raises(OSError) as caught:
            take(process, tmp_path / "2", parent=tmp_path / "1", tracker=tracker, progress=fail)
        assert caught.value.errno == 28
        take(process, tmp_path / "3", parent=tmp_path / "1", tracker=tracker)
        with Snapshot.open(tmp_path / "3") as snapshot:
            target.check(snapshot.read)
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]


# What is refused


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "fast"},
        {"shared": "yes"},
        {"max_stall_s": -1.0},
        {"rounds": 0},
        {"rate": 0.5},
        {"compress": 23},
        {"ranges": []},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_bad_arguments(bad: dict[str, object], tmp_path: Path) -> None:
    with Process(os.getpid()) as process, pytest.raises(ValueError):
        Snapshot.take(process, tmp_path / "one", **bad)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_no_name_for_a_directory() -> None:
    with pytest.raises(ValueError, match="name of a directory"):
        NewDirectory("/", durable=False)


def test_nothing_is_replaced_and_no_link_is_followed(program: str, tmp_path: Path) -> None:
    with counters(program, 1, 16, "s") as target, Process(target.pid) as process:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "folder")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        for name in ("file", "folder", "link", "dangling"):
            with pytest.raises(FileExistsError):
                take(process, tmp_path / name)
        take(process, tmp_path / "one")
        (tmp_path / "alias").symlink_to(tmp_path / "one")
        with pytest.raises(OSError):
            Snapshot.open(tmp_path / "alias")
        for name in ("manifest.json", "runs", "pages", "notes"):
            copy = tmp_path / f"with a link {name}"
            shutil.copytree(tmp_path / "one", copy)
            (copy / name).unlink()
            (copy / name).symlink_to(tmp_path / "one" / name)
            with pytest.raises(SnapshotFormatError, match="symbolic link") as caught:
                Snapshot.open(copy)
            assert caught.value.path == str(copy / name)
        with pytest.raises(FileNotFoundError):
            take(process, tmp_path / "no" / "such")
    assert (tmp_path / "file").read_text() == "mine"


SHARED = """
import ctypes, mmap, sys
shared = mmap.mmap(-1, 4 * 4096)
shared[0:6] = b"shared"
print(ctypes.addressof(ctypes.c_char.from_buffer(shared)), flush=True)
sys.stdin.read()
"""


def test_shared_memory(tmp_path: Path) -> None:
    """Refused by name; copied in the stop, or left out, and marked in both cases."""
    popen = subprocess.Popen(
        [sys.executable, "-c", SHARED], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert popen.stdout is not None
    address = int(popen.stdout.readline())
    try:
        with Process(popen.pid) as process:
            with pytest.raises(SnapshotError) as caught:
                take(process, tmp_path / "refused")
            assert caught.value.reason == "shared"
            for method in METHODS:
                for shared in ("pause", "skip"):
                    path = tmp_path / f"{method} {shared}"
                    report = take(process, path, method=method, shared=shared)
                    gaps = report.not_of_one_instant  # type: ignore[attr-defined]
                    assert address in {gap.start for gap in gaps}
                    with Snapshot.open(path) as snapshot:
                        if shared == "pause":
                            assert snapshot.read(address, 6) == b"shared"
                            continue
                        assert snapshot.state(address) is RunState.SHARED
                        with pytest.raises(LookupError):
                            snapshot.read(address, 1)
    finally:
        popen.communicate()


def test_two_at_once(program: str, tmp_path: Path) -> None:
    """The second is refused, with the name of the first."""
    with counters(program, 1, 16, "s") as target, Process(target.pid) as process:
        inner: list[SnapshotError] = []

        def again(progress: object) -> None:
            if not inner:
                with pytest.raises(SnapshotError) as caught:
                    take(process, tmp_path / "second")
                inner.append(caught.value)

        take(process, tmp_path / "first", progress=again)
        take(process, tmp_path / "third")
    assert inner[0].reason == "busy"
    assert str(tmp_path / "first") in str(inner[0])
    assert sorted(os.listdir(tmp_path)) == ["first", "third"]


# Failures


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_full_disk(method: Used, program: str, tmp_path: Path) -> None:
    with (
        tmpfs(tmp_path / "small", "1m") as folder,
        counters(program, 2, 400, "s") as target,
        Process(target.pid) as process,
    ):
        with pytest.raises(OSError) as caught:
            take(process, folder / "one", method=method)
        assert caught.value.errno == 28
        assert os.listdir(folder) == []
        unharmed(target)


@pytest.mark.parametrize("method", METHODS)
def test_the_directory_is_removed_meanwhile(method: Used, program: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()

    def remove(progress: object) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    with counters(program, 1, 100, "s") as target, Process(target.pid) as process:
        with pytest.raises(FileNotFoundError):
            take(process, folder / "one", method=method, progress=remove)
        unharmed(target)
    assert not folder.exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_process_ends_meanwhile(
    method: Used, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(name: str) -> None:
        if name == "stopped":
            target.popen.kill()
            wait_until(lambda: not process.is_running)

    monkeypatch.setattr(_capture, "barrier", kill)
    with (
        counters(program, 1, 100, "s") as target,
        Process(target.pid) as process,
        pytest.raises(SnapshotError) as caught,
    ):
        take(process, tmp_path / "one", method=method)
    assert caught.value.reason == "ended"
    assert os.listdir(tmp_path) == []


def test_stopped_while_it_saves(program: str, tmp_path: Path) -> None:
    """Stop ourselves: the protection is lifted, the process continues, and the snapshot ends."""
    with counters(program, 2, 400) as target, Process(target.pid) as process:
        with standing_at(
            "begun sweep", process, tmp_path / "one", method="cow", max_stall_s=0.5, rate=1e5
        ) as pid:
            os.kill(pid, signal.SIGSTOP)
            target.works_on()
            os.kill(pid, signal.SIGCONT)
        unharmed(target)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("method", METHODS)
def test_stopped_in_the_stop(method: Used, program: str, tmp_path: Path) -> None:
    """Stop ourselves while the process is stopped: it is let go, and the snapshot is no mixture.

    It ends with the reason; by precopy, which copies nothing before it has looked at the time,
    another stop is tried.
    """
    with counters(program, 2, 100) as target, Process(target.pid) as process:
        with standing_at(
            "stopped", process, tmp_path / "one", method=method, until_told=True
        ) as pid:
            assert status(target.pid)["TracerPid"] != "0"
            os.kill(pid, signal.SIGSTOP)
            target.works_on()  # it would wait without an end
            assert status(target.pid)["TracerPid"] == "0"
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGUSR1)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        unharmed(target)
        if method == "precopy" and code == 0:
            with Snapshot.open(tmp_path / "one") as snapshot:
                check(target, snapshot)
        else:
            assert code == 3
            assert os.listdir(tmp_path) == []


def test_too_fast_for_precopy(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method auto takes cow then, and says so."""

    def stall(*_arguments: object, **_options: object) -> None:
        raise SnapshotError("stalled", "it writes too fast")

    monkeypatch.setattr(_precopy, "captured", stall)
    with counters(program, 2, 400) as target, Process(target.pid) as process:
        take(process, tmp_path / "one")
        unharmed(target)
        with Snapshot.open(tmp_path / "one") as snapshot:
            assert snapshot.manifest["method"] == "cow"
            assert "too fast" in snapshot.manifest["reason"]
            check(target, snapshot)


def test_a_process_that_writes_too_fast(program: str, tmp_path: Path) -> None:
    """It is not stopped for longer than allowed: the snapshot ends."""
    with counters(program, 2, 4000) as target, Process(target.pid) as process:
        with pytest.raises(SnapshotError) as caught:
            Snapshot.take(process, tmp_path / "one", method="precopy", max_stall_s=0.001)
        assert caught.value.reason == "stalled"
        unharmed(target)
    assert os.listdir(tmp_path) == []


POINTS = {
    "stopped": ("begun", "stopped", "copied", "captured", "pages", "written"),
    "precopy": ("ahead", "round 0", "stopped", "copied", "resumed", "captured", "written"),
    "cow": ("attached", "armed", "stopped", "saves", "resumed", "swept", "captured", "written"),
}


@contextmanager
def standing_at(
    point: str, target: Process, path: Path, until_told: bool = False, **options: object
) -> Iterator[int]:
    """Fork a process that takes a snapshot and waits at a point, until SIGUSR1 if told."""
    there, write_end = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    pid = os.fork()
    if not pid:
        stood = False

        def stand(name: str) -> None:
            nonlocal stood
            if name == point and not stood:
                stood = True
                os.write(write_end, b"t")
                if until_told:
                    signal.sigwait({signal.SIGUSR1})
                else:
                    time.sleep(1000)

        _capture.barrier = stand
        try:
            with Process(target.pid) as mine:
                take(mine, path, **options)
        except (StopTimeoutError, SnapshotError) as error:
            # With cow, the pages that were protected already are unprotected first.
            named = isinstance(error, StopTimeoutError) or error.reason == "stalled"
            os._exit(3 if named else 4)
        except BaseException as error:
            # pytest shows it with the failure
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
        else:
            os._exit(0)
        finally:
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    os.close(write_end)
    try:
        assert os.read(there, 1000) == b"t", point
        yield pid
    finally:
        os.close(there)
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_each_point(method: Used, program: str, tmp_path: Path) -> None:
    """There is no snapshot, the parent is intact, and the process continues to work."""
    with counters(program, 2, 200, "s") as target, Process(target.pid) as process:
        take(process, tmp_path / "parent")
        for point in POINTS[method]:
            with standing_at(
                point, process, tmp_path / "one", method=method, parent=tmp_path / "parent"
            ):
                pass
            unharmed(target)
            assert not (tmp_path / "one").exists(), point
            with Snapshot.open(tmp_path / "parent") as snapshot:
                snapshot.verify()
        # What they left is removed by the next one.
        assert len(list(tmp_path.iterdir())) > 1
        take(process, tmp_path / "one")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "parent"]


# Damage


@pytest.fixture(scope="module")
def taken(program: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of two."""
    folder = tmp_path_factory.mktemp("taken")
    with counters(program, 1, 40, "s") as target, Process(target.pid) as process:
        take(process, folder / "first")
        target.works_on()
        take(process, folder / "second", parent=folder / "first")
    return folder


def read_all(path: Path) -> None:
    with Snapshot.open(path) as snapshot:
        snapshot.verify()


def flipped(path: Path, at: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("name", ["manifest.json", "runs", "pages", "notes"])
def test_each_flipped_bit_is_found(which: str, name: str, taken: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(taken, copy)
    file = copy / which / name
    original = file.read_bytes()
    with Snapshot.open(taken / which) as snapshot:
        data = [run for run in snapshot.runs if run.state is RunState.DATA]
    places = (
        [run.offset + run.stored * k // 3 for run in data[:4] for k in (0, 1, 2)]
        if name == "pages"
        else range(0, len(original), max(1, len(original) // 12))
    )
    for number, at in enumerate(places):
        flipped(file, at, number % 8)
        with pytest.raises(SnapshotFormatError):
            read_all(copy / "second")
        file.write_bytes(original)
    read_all(copy / "second")


@pytest.mark.parametrize("name", ["manifest.json", "runs", "pages", "notes"])
def test_truncated_and_missing(name: str, taken: Path, tmp_path: Path) -> None:
    for length in (0, 1, -1):
        copy = tmp_path / f"copy {length}"
        shutil.copytree(taken / "first", copy)
        os.truncate(copy / name, length if length >= 0 else os.path.getsize(copy / name) - 1)
        with pytest.raises(SnapshotFormatError):
            read_all(copy)
    (copy / name).unlink()
    with pytest.raises(SnapshotFormatError):
        read_all(copy)


@pytest.mark.parametrize("name", ["manifest.json", "runs", "pages", "notes"])
def test_no_regular_file(name: str, taken: Path, tmp_path: Path) -> None:
    """A FIFO would wait for its writer."""
    copy = tmp_path / "copy"
    shutil.copytree(taken / "first", copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(SnapshotFormatError, match="regular"):
        Snapshot.open(copy)


def test_a_table_without_an_end(taken: Path, tmp_path: Path) -> None:
    """It is refused by its length, before it is read."""
    copy = tmp_path / "copy"
    shutil.copytree(taken / "first", copy)
    os.truncate(copy / "runs", 1 << 40)
    with pytest.raises(SnapshotFormatError, match=str(1 << 40)):
        Snapshot.open(copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start", "\0"),
        ("start", -PAGE),
        ("start", True),
        ("length", 0),
        ("length", 1 << 65),
        ("page_size", 4096.0),
        ("path", None),
        ("inode", []),
    ],
)
def test_fields_of_another_type(name: str, value: object, taken: Path, tmp_path: Path) -> None:
    """Whoever can make the hashes right can write anything."""
    copy = tmp_path / "copy"
    shutil.copytree(taken / "first", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["regions"][1][name] = value
    del manifest["manifest_sha256"]
    (copy / "manifest.json").write_bytes(_format.seal(manifest))
    with pytest.raises(SnapshotFormatError):
        Snapshot.open(copy)


RESERVES = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
W = ctypes.c_size_t
at = libc.mmap(W(0), W(20 << 40), 3, 0x4022, -1, W(0))
ctypes.memset(at + (12 << 40), 7, 4096)
print(at + (12 << 40), flush=True)
input()
"""


@contextmanager
def python(text: str) -> Iterator[tuple[Process, int]]:
    """Run a program in Python that prints a number."""
    pipe = subprocess.PIPE
    program = subprocess.Popen([sys.executable, "-c", text], stdin=pipe, stdout=pipe)
    try:
        assert program.stdout is not None
        number = int(program.stdout.readline())
        with Process(program.pid) as process:
            yield process, number
    finally:
        program.kill()
        program.communicate()


def test_terabytes_reserved(tmp_path: Path) -> None:
    """They cost nothing, also in the flat copy of a chain."""
    with python(RESERVES) as (process, address):
        take(process, tmp_path / "0", method="stopped")
        take(process, tmp_path / "1", method="stopped", parent=tmp_path / "0")
    with Snapshot.open(tmp_path / "1") as snapshot:
        snapshot.flatten(tmp_path / "flat", durable=False)
    with Snapshot.open(tmp_path / "flat") as flat:
        flat.verify()
        assert flat.read(address, PAGE) == b"\7" * PAGE
        assert flat.read(address + PAGE, 1) == b"\0"


MAPS = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
W = ctypes.c_size_t
at = libc.mmap(W(0), W(1000 * 8192), 3, 0x22, -1, W(0))
for page in range(0, 2000, 2):
    ctypes.memset(at + page * 4096, 7, 16)
    libc.mprotect(ctypes.c_void_p(at + page * 4096 + 4096), W(4096), 0)
print(at, flush=True)
input()
"""


def test_many_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is not stopped if reading its mappings is too long by itself."""
    with python(MAPS) as (process, address):
        # The first line of the commands tells it.
        told = limited_pause(process, 1e-5)
        count = len(process.mappings())
        assert f"stopping its threads (1) and reading its mappings ({count})" in told
        assert limited_pause(process, 100) == "for at most 100 s"
        with monkeypatch.context() as patch:
            patch.setattr(_expected, "THREAD_S", 200.0)
            assert "takes 200" in limited_pause(process, 100)
        with pytest.raises(SnapshotError, match="mappings are read") as caught:
            take(process, tmp_path / "0", method="precopy", max_stall_s=0.001)
        assert caught.value.reason == "stalled"
        assert os.listdir(tmp_path) == []
        report = Snapshot.take(
            process, tmp_path / "0", method="precopy", max_stall_s=10 * SCALE, durable=False
        )
        assert report.pause_s < 2 * SCALE  # 0.04 s on an idle machine
    with Snapshot.open(tmp_path / "0") as snapshot:
        assert snapshot.read(address + 100 * 8192, 17) == b"\7" * 16 + b"\0"


def test_a_limit_for_stopped(program: str, tmp_path: Path) -> None:
    with counters(program, 2, 4000) as target, Process(target.pid) as process:
        with pytest.raises(SnapshotError, match="max_stall_s") as caught:
            take(process, tmp_path / "0", method="stopped", max_stall_s=0.0005)
        assert caught.value.reason == "stalled"
        assert os.listdir(tmp_path) == []
        unharmed(target)


@pytest.mark.parametrize("limit_s", [0, 1e-6])
def test_a_limit_that_cannot_be_kept(limit_s: float, program: str, tmp_path: Path) -> None:
    """Every method says so, and the process runs on."""
    methods: list[Method] = ["auto", *METHODS]
    with counters(program, 2, 600) as target, Process(target.pid) as process:
        for method in methods:
            with pytest.raises(SnapshotError, match=r"stopped for|max_stall_s") as raised:
                Snapshot.take(process, tmp_path / "a", method=method, max_stall_s=limit_s)
            assert raised.value.reason == "stalled"
        assert os.listdir(tmp_path) == []
        unharmed(target)


@pytest.mark.parametrize("times", [1, 100])
def test_a_stop_that_was_slow_is_tried_again(
    times: int, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine may be to blame; if it is usual, the snapshot ends."""
    stops: list[str] = []
    stall_s = LIMIT_S * crowd()

    def wait(name: str) -> None:
        if name == "stopped":
            stops.append(name)
            if len(stops) <= times:
                time.sleep(1.1 * stall_s)

    monkeypatch.setattr(_capture, "barrier", wait)
    with counters(program, 2, 600) as target, Process(target.pid) as process:
        if times == 1:
            take(process, tmp_path / "a", method="precopy", max_stall_s=stall_s)
            with Snapshot.open(tmp_path / "a") as snapshot:
                check(target, snapshot)
            assert len(stops) >= 2
        else:
            with pytest.raises(SnapshotError, match="mappings were read") as raised:
                take(process, tmp_path / "a", method="precopy", max_stall_s=stall_s)
            assert raised.value.reason == "stalled"
            assert len(stops) == 3
            assert os.listdir(tmp_path) == []
        unharmed(target)


def test_cow_is_let_go_at_its_limit(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the stop needs longer than was estimated."""
    stall_s = LIMIT_S * crowd()

    def wait(name: str) -> None:
        if name == "stopped":
            time.sleep(1.2 * stall_s)

    monkeypatch.setattr(_capture, "barrier", wait)
    with counters(program, 2, 600) as target, Process(target.pid) as process:
        with pytest.raises(SnapshotError, match="let go") as raised:
            take(process, tmp_path / "a", method="cow", max_stall_s=stall_s)
        assert raised.value.reason == "stalled"
        assert os.listdir(tmp_path) == []
        unharmed(target)


def counted(sum_: _sums.Sum, calls: list[int]) -> _sums.Sum:
    """Note the length of what is summed."""

    def count(data: Buffer) -> int:
        calls.append(len(memoryview(data)))
        return sum_(data)

    return count


def test_reading_page_by_page(program: str, tmp_path: Path) -> None:
    """Every chunk is checked once, in whatever order its pages are read; a parent's too."""
    with counters(program, 1, 12 * 256, "s") as target, Process(target.pid) as process:
        area = target.areas[0]
        take(process, tmp_path / "0", method="stopped")
        take(process, tmp_path / "1", method="stopped", parent=tmp_path / "0")
    for name in ("0", "1"):
        with Snapshot.open(tmp_path / name) as snapshot:
            expected = snapshot.read(area, 12 * 256 * PAGE)
        with Snapshot.open(tmp_path / name) as snapshot:
            image = snapshot._image
            checked: list[int] = []
            for each in filter(None, (image, image.parent)):
                each._sum = counted(each._sum, checked)
            read = {
                page: snapshot.read(area + page * PAGE, PAGE)
                for first in range(256)
                for page in range(first, 12 * 256, 256)
            }
            assert b"".join(read[page] for page in range(12 * 256)) == expected
            images = filter(None, (image, image.parent))
            data = sum(run.state is RunState.DATA for each in images for run in each.runs)
            assert 12 <= len(checked) <= data


def test_a_file_cut_while_it_is_open(taken: Path, tmp_path: Path) -> None:
    """What was checked before is not there any more: an error, and no short result."""
    shutil.copytree(taken / "first", tmp_path / "one")
    with Snapshot.open(tmp_path / "one") as snapshot:
        runs = [run for run in snapshot.runs if run.state is RunState.DATA]
        for run in runs:
            snapshot.read(run.start, 16)
        os.truncate(tmp_path / "one" / "pages", 0)
        with pytest.raises(SnapshotFormatError):
            for run in runs:
                snapshot.read(run.start, 16)


PRIVATE_FILES = """
import ctypes, mmap, os, sys, tempfile
kept, deleted = open(sys.argv[1], "w+b"), tempfile.TemporaryFile(dir=os.path.dirname(sys.argv[1]))
areas = []
for fd in os.memfd_create("m"), deleted.fileno(), kept.fileno():
    os.pwrite(fd, b"file", 0)
    os.ftruncate(fd, 7 * 4096 + 5)
    areas.append(mmap.mmap(fd, 7 * 4096 + 5, mmap.MAP_PRIVATE))
for area in areas:
    area[4096:4100] = b"mine"
    area[2 * 4096] = 1
print(*(ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in areas), flush=True)
while True:
    line = sys.stdin.readline()
    if not line: break
    for area in areas:
        area[3 * 4096:3 * 4096 + 4] = b"more"
        area.madvise(mmap.MADV_DONTNEED, 2 * 4096, 4096)
        area[5 * 4096]
    print("done", flush=True)
"""


def no_map_files(name: str, key: tuple[int, int] | None = None) -> Descriptor | None:
    return None if "/map_files/" in name else opened_regular(name, key)


def nothing_opens(_name: str, _key: object = None) -> None:
    return None


opened_regular = _private_files._regular


@pytest.mark.parametrize(
    ("method", "how"),
    [
        *((method, "compare") for method in METHODS),
        ("precopy", "tracker"),
        ("cow", "descriptors"),
        ("precopy", "mapping"),
    ],
)
def test_private_files(
    method: Used, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not written, or was dropped, is what the file holds, which may end with the process.

    A file with a name keeps it by itself: the page is ABSENT.
    """
    if how in ("descriptors", "mapping"):
        opens = no_map_files if how == "descriptors" else nothing_opens
        monkeypatch.setattr(_private_files, "_regular", opens)
    pipe = subprocess.PIPE
    program = subprocess.Popen(
        [sys.executable, "-c", PRIVATE_FILES, str(tmp_path / "kept")], stdin=pipe, stdout=pipe
    )
    assert program.stdin is not None
    assert program.stdout is not None
    addresses = [int(word) for word in program.stdout.readline().split()]

    def states(snapshot: Snapshot, address: int) -> str:
        found = (snapshot.state(address + page * PAGE) for page in range(8))
        return "".join(state.value[0] if state else "-" for state in found)

    def check(name: str, expected: str, content: list[bytes]) -> None:
        with Snapshot.open(tmp_path / name) as snapshot:
            snapshot.verify()
            for address in addresses[:2]:
                assert states(snapshot, address) == expected
                read = [snapshot.read(address + page * PAGE, PAGE) for page in range(8)]
                assert read == [page.ljust(PAGE, b"\0") for page in content]
            kept = states(snapshot, addresses[2]).replace("z", "a")  # or known to be zeros
            assert kept == expected.replace("z", "a").replace("d", "a", 1)

    try:
        with Process(program.pid) as process:
            tracker = DirtyTracker(process) if how == "tracker" else None
            take(process, tmp_path / "0", method=method, tracker=tracker)
            check("0", "dddzzzzz", [b"file", b"mine", b"\1", b"", b"", b"", b"", b""])
            program.stdin.write(b"\n")
            program.stdin.flush()
            program.stdout.readline()
            parent = tmp_path / "0"
            take(process, tmp_path / "1", method=method, parent=parent, tracker=tracker)
            check("1", "ddzdzzzz", [b"file", b"mine", b"", b"more", b"", b"", b"", b""])
            if tracker is not None:
                tracker.close()
    finally:
        program.kill()
        program.communicate()


UNTOUCHED = """
import ctypes, mmap
areas = [mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
starts = [ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in areas]
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(starts[1]), ctypes.c_size_t(4 << 20), 0) == 0
print(*starts, flush=True)
input()
"""


def test_memory_that_was_never_touched(tmp_path: Path) -> None:
    """Nothing gives it pages, readable or not; their marks look like pages on swap."""
    pipe = subprocess.PIPE
    program = subprocess.Popen([sys.executable, "-c", UNTOUCHED], stdin=pipe, stdout=pipe)
    assert program.stdout is not None
    starts = [int(word) for word in program.stdout.readline().split()]
    try:
        with Process(program.pid) as process:
            for method in METHODS:
                take(process, tmp_path / method, method=method)
                core = tmp_path / f"core.{method}"
                limit = None if method == "stopped" else LIMIT_S
                write_core(process, core, method=method, max_stall_s=limit)
                for start in starts:
                    entries = process.pagemap.read(start, 4 << 20)
                    assert entries.count(PageBit.PRESENT) == 0, method
                with Snapshot.open(tmp_path / method) as snapshot:
                    assert {snapshot.state(start) for start in starts} == {RunState.ABSENT}
    finally:
        program.kill()
        program.communicate()


def protected_on_swap() -> None:
    features = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
    with Region.memfd(4 * PAGE, shared=False) as region, Userfaultfd(features=features) as uffd:
        region.fill(1)
        uffd.register(region, mode=RegisterMode.WP)
        uffd.writeprotect(region)
        swap_out(region)
        for _ in range(2):
            with Process(os.getpid()) as process:
                own = _own_pages.own(process, region.start, region.start + region.length)
                assert own.bytes == region.length
            drop_capability("CAP_SYS_ADMIN")


@needs_swap()
def test_a_protected_page_on_swap_is_content() -> None:
    """Also for those from whom the kernel hides what a page on swap is."""
    run_child(protected_on_swap)


@pytest.mark.parametrize("how", ["cp", "tar", "cat"])
def test_copies_without_holes(how: str, taken: Path, tmp_path: Path) -> None:
    """Holes save space, and mean nothing."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for file in ("manifest.json", "runs", "pages", "notes"):
            source, target = taken / name / file, tmp_path / name / file
            if how == "cp":
                subprocess.run(["cp", "--sparse=never", source, target], check=True)
            elif how == "cat":
                with open(target, "wb") as out:
                    subprocess.run(["cat", source], stdout=out, check=True)
        if how == "tar":
            packed = subprocess.run(
                ["tar", "-C", taken, "-cf", "-", name], check=True, capture_output=True
            ).stdout
            subprocess.run(["tar", "-C", tmp_path, "-xf", "-"], input=packed, check=True)
    read_all(tmp_path / "second")


def test_compression(program: str, tmp_path: Path) -> None:
    with counters(program, 2, 400, "s") as target, Process(target.pid) as process:
        take(process, tmp_path / "packed", compress=3)
        with Snapshot.open(tmp_path / "packed") as snapshot:
            target.check(snapshot.read)
            snapshot.verify()
            snapshot.flatten(tmp_path / "flat", durable=False)
        with Snapshot.open(tmp_path / "flat") as flat:
            target.check(flat.read)
    sizes = [os.stat(tmp_path / name / "pages").st_blocks for name in ("packed", "flat")]
    assert 4 * sizes[0] < sizes[1]
    flipped(tmp_path / "packed" / "pages", 100, 3)
    with pytest.raises(SnapshotFormatError):
        read_all(tmp_path / "packed")


def test_the_checksum_of_the_standard_library(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with counters(program, 1, 40, "s") as target, Process(target.pid) as process:
        take(process, tmp_path / "one")
    with Snapshot.open(tmp_path / "one") as snapshot:
        assert snapshot.manifest["checksum"] == "crc32"
        snapshot.verify()
    assert [name for name in _sums._SUMS] == ["xxh3_64", "crc32"]


MUCH_SHARED = """
import mmap
memory = mmap.mmap(-1, 8 << 20)
memory.write(b"x" * (8 << 20))
print(0, flush=True)
input()
"""


@pytest.mark.parametrize("method", ["precopy", "cow", "auto"])
def test_shared_memory_has_the_limit_that_was_given(method: Method, tmp_path: Path) -> None:
    limit_s = 0.2 * SCALE
    stops: list[float] = []

    def slow(progress: SnapshotProgress) -> None:
        """Make the first step as long as the limit."""
        if progress.phase == "stop" and progress.total == 8 << 20:
            stops.append(time.monotonic())
            while time.monotonic() < stops[-1] + limit_s:
                pass

    with python(MUCH_SHARED) as (process, _):
        with pytest.raises(SnapshotError, match="of its shared memory") as caught:
            take(
                process,
                tmp_path / "0",
                method=method,
                shared="pause",
                max_stall_s=limit_s,
                progress=slow,
            )
        assert caught.value.reason == "stalled"
        assert len(stops) == 1, "another method would not be faster"
        assert status(process.pid)["TracerPid"] == "0"
        assert shared_memory(process) == 8 << 20
        told = limited_pause(process, 1, shared=shared_memory(process))
        assert told == (
            "for at most 1 s, and then while its shared memory is read again: 8 MiB, 0.00 s or more"
        )


RESERVED = """
import mmap
memory = mmap.mmap(-1, 64 << 20)
memory.write(b"x" * (2 << 20))
print(0, flush=True)
input()
"""


def test_shared_memory_without_content_is_not_expected_to_be_copied() -> None:
    with python(RESERVED) as (process, _):
        assert shared_memory(process) == 2 << 20


@pytest.mark.parametrize(("value", "has"), [("0x33", False), ("0x3f", True)])
def test_files_that_a_core_has_are_expected_to_be_copied(value: str, has: bool) -> None:
    with python(MAPPED_FILE) as (process, _):
        Path(f"/proc/{process.pid}/coredump_filter").write_text(value)
        assert has_shared_files(process) is has
        assert shared_memory(process) == 0
        assert shared_memory(process, files=True) >= PAGE


MAPPED_FILE = """
import mmap
file = open("/proc/self/exe", "rb")
memory = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
memory[0]
print(0, flush=True)
input()
"""


@pytest.mark.parametrize("full", [True, False])
def test_mapped_files_have_the_limit_that_was_given(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of files, which a full core has, are copied in the stop by cow."""
    limit_s = 0.2 * SCALE
    stops: list[float] = []

    def slow(name: str) -> None:
        if name == "stopped":
            stops.append(time.monotonic())
            while time.monotonic() < stops[-1] + 1.1 * limit_s:
                pass

    with python(MAPPED_FILE) as (process, _):
        monkeypatch.setattr(_capture, "barrier", slow)
        with pytest.raises(SnapshotError) as caught:
            write_core(process, tmp_path / "core", method="cow", full=full, max_stall_s=limit_s)
    assert caught.value.reason == "stalled"
    assert stops


# The commands


def test_the_commands(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    with counters(program, 2, 200, "s") as target:
        pid, one, two = str(target.pid), str(tmp_path / "one"), str(tmp_path / "two")
        options = ("--max-stall", str(LIMIT_S), "--no-sync")
        code, out, _ = run("snapshot", pid, "-o", one, *options)
        assert (code, out.splitlines()[0].split("; ")[1]) == (
            0,
            f"it will be stopped for at most {LIMIT_S:g} s",
        )
        code, out, error = run("snapshot", pid, "-o", two, "--parent", one, "--json", *options)
        assert (code, json.loads(out)["path"], error) == (0, two, "")
        info = json.loads(run("info", two, "--json")[1])
        assert (info["depth"], info["target"]["pid"]) == (1, target.pid)
        assert info["bytes"]["parent"] > 0
        assert "incremental, 1 parent" in run("info", two)[1]
        assert run("verify", two)[:2] == (0, f"{two}: good\n")
        flat = str(tmp_path / "flat")
        code, out, _ = run("flatten", two, "-o", flat, "--no-sync", "--json")
        assert (code, json.loads(out)["depth"]) == (0, 1)
        assert run("flatten", two, "-o", flat)[0] == 2
        flipped(tmp_path / "one" / "runs", 60, 1)
        code, out, error = run("verify", two)
        assert (code, out, "SHA-256" in error) == (1, "", True)
        assert not json.loads(run("verify", two, "--json")[1])["good"]
        assert run("snapshot", pid, "-o", one)[0] == 2
        assert run("snapshot", pid, "-o", str(tmp_path / "x"), "--compress", "99")[0] == 2
        unharmed(target)
    assert run("snapshot", pid, "-o", str(tmp_path / "gone"))[0] == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command(
    number: signal.Signals, code: int, program: str, tmp_path: Path
) -> None:
    """While it copies at a low rate; the process continues and there is no directory."""
    with counters(program, 2, 400, "s") as target:
        words = ["snapshot", str(target.pid), "-o", str(tmp_path / "one"), "--rate", "0.0001"]
        popen = subprocess.Popen(
            [sys.executable, "-m", "pyuffd", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert popen.stdout is not None
        popen.stdout.readline()
        wait_until(lambda: bool(list(tmp_path.glob(".one.*/pages"))))
        popen.send_signal(number)
        popen.communicate(timeout=limit_s(10))
        assert popen.returncode == code
        assert os.listdir(tmp_path) == []
        unharmed(target)


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10 * SCALE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_a_tracker_of_other_memory(program: str, tmp_path: Path) -> None:
    """What such a tracker does not see would be missing, or taken for unchanged."""
    with (
        counters(program, 1, 16, "s") as target,
        counters(program, 1, 16, "s") as other,
        Process(target.pid) as process,
        Process(other.pid) as stranger,
        DirtyTracker(stranger) as strange,
    ):
        with pytest.raises(ValueError, match=f"does not track process {target.pid}"):
            take(process, tmp_path / "1", tracker=strange)
        whole = [m for m in process.mappings() if m.kind is MappingKind.ANONYMOUS]
        part = whole[:1]
        with DirtyTracker(process, part) as tracker:
            with pytest.raises(ValueError, match="tracks parts"):
                take(process, tmp_path / "1", tracker=tracker)
            with pytest.raises(ValueError, match="does not track all"):
                take(process, tmp_path / "1", ranges=whole, tracker=tracker)
            take(process, tmp_path / "1", ranges=part, tracker=tracker)
        with pytest.raises(ClosedError):
            take(process, tmp_path / "2", ranges=part, tracker=tracker)
        with pytest.raises(TypeError, match="must be a DirtyTracker"):
            take(process, tmp_path / "2", tracker="1")
        with pytest.raises(TypeError, match="must be a function"):
            take(process, tmp_path / "2", progress="print")
        unharmed(target)
    assert os.listdir(tmp_path) == ["1"]


def test_a_process_that_has_ended(program: str, tmp_path: Path) -> None:
    with counters(program, 1, 16, "s") as target, Process(target.pid) as process:
        os.kill(target.pid, signal.SIGKILL)
        wait_until(lambda: not process.is_running)
        with pytest.raises(SnapshotError) as caught:
            take(process, tmp_path / "1")
        assert caught.value.reason == "ended"
    assert not os.listdir(tmp_path)
