"""`Snapshot.write_core`: debuggers see in it what they see in a core of the process itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyuffd import (
    Process,
    Region,
    RunState,
    Snapshot,
    SnapshotError,
    SnapshotFormatError,
    write_core,
)
from pyuffd.cli import main
from pyuffd.snapshot import _core_elf, _core_notes, _format
from pyuffd.snapshot._capture import Used
from pyuffd.testing._run import SCALE
from tests.process._attach import status, wait_until
from tests.process._core import PAGE, Core, Target
from tests.process._tracking import METHODS, OF_OTHERS
from tests.process.test_core import program as program
from tests.process.test_core_readers import THREADS, gdb, run
from tests.process.test_track_process import needs_program

pytestmark = OF_OTHERS
LIMIT_S = 1.0 * SCALE
R12 = struct.Struct("<136xQ")  # in NT_PRSTATUS
# How the snapshot of a core came about.
WAYS = (*METHODS, "incremental", "flat", "compressed")


@dataclass
class Written:
    target: Target
    folder: Path
    tids: list[int]

    def core(self, name: str) -> Path:
        return self.folder / f"{name}.core"


def take(process: Process, path: Path, **options: object) -> None:
    kept: dict[str, object] = {"max_stall_s": LIMIT_S, "durable": False, "shared": "skip"}
    Snapshot.take(process, path, **kept | options)  # type: ignore[arg-type]


def core_of(snapshot: Path, path: Path) -> object:
    with Snapshot.open(snapshot) as opened:
        return opened.write_core(path)


@pytest.fixture(scope="module")
def stopped(program: str, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Snapshots of a target that a signal has stopped, their cores, and a core of the target."""
    with pytest.MonkeyPatch.context() as patch:
        # The kernel writes the number of the CPU to rseq's memory when a thread runs on.
        patch.setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
        target = Target.start(program, "threads", THREADS)
    wait_until("all threads wait", target.all_pause)
    target.popen.send_signal(signal.SIGSTOP)
    wait_until("it is stopped", lambda: status(target.pid)["State"][0] == "T")
    folder = tmp_path_factory.mktemp("cores")
    with Process(target.pid) as process:
        tids = [thread.tid for thread in process.threads()]
        write_core(process, folder / "live.core", method="stopped")
        for method in METHODS:
            take(process, folder / method, method=method)
        take(process, folder / "incremental", parent=folder / "stopped")
        take(process, folder / "compressed", compress=1)
    with Snapshot.open(folder / "incremental") as snapshot:
        snapshot.flatten(folder / "flat", durable=False)
    target.end()  # none of it needs the process
    for way in WAYS:
        core_of(folder / way, folder / f"{way}.core")
    return Written(target, folder, tids)


@needs_program("gdb")
@pytest.mark.parametrize("way", WAYS)
def test_gdb_sees_what_it_sees_in_a_core_of_the_process(way: str, stopped: Written) -> None:
    commands = (
        "thread apply all -s bt",
        "thread apply all -s info registers",
        "thread apply all -s p $xmm0",
        "info threads",
        "print answer",
    )
    found, expected = (
        gdb(stopped.target.program, stopped.core(name), *commands) for name in (way, "live")
    )
    assert found == expected
    text = "\n".join(found)
    assert len(re.findall(r"\bin last_step \(number=", text)) == THREADS + 1
    assert text.endswith(" = 4242")


@needs_program("eu-stack")
@pytest.mark.parametrize("way", WAYS)
def test_eu_stack(way: str, stopped: Written) -> None:
    text = run("eu-stack", "--core", stopped.core(way), "--executable", stopped.target.program)
    for tid in stopped.tids:
        assert f"TID {tid}:" in text
    assert len(re.findall(r" last_step$", text, re.MULTILINE)) == THREADS + 1
    assert len(re.findall(r" first_step$", text, re.MULTILINE)) == THREADS + 1


@needs_program("eu-unstrip")
def test_eu_unstrip_finds_every_build_id(stopped: Written) -> None:
    text = run("eu-unstrip", "-n", "--core", stopped.core("flat"))
    for name in (stopped.target.program, "/libc.so.6", "linux-vdso.so.1"):
        (line,) = (line for line in text.splitlines() if name in line)
        assert re.match(r"0x[0-9a-f]+\+0x[0-9a-f]+ [0-9a-f]{40}@", line), line


@pytest.mark.parametrize("way", WAYS)
def test_memory_and_notes_are_those_of_a_core_of_the_process(way: str, stopped: Written) -> None:
    """Of files that the process has not written it has the first page only."""
    kinds = ("NT_PRSTATUS", "NT_FPREGSET", 0x202, "NT_SIGINFO", "NT_AUXV", "NT_FILE")
    compared = 0
    with (
        Core(stopped.core(way)) as ours,
        Core(stopped.core("live")) as theirs,
        Snapshot.open(stopped.folder / way) as snapshot,
    ):
        for kind in kinds:
            assert len(ours.notes(kind)) in (1, THREADS + 1)
            # Of NT_PRSTATUS only what does not change: no times.
            of, behind = (112, None) if kind == "NT_PRSTATUS" else (0, None)
            pairs = zip(ours.notes(kind), theirs.notes(kind), strict=True)
            for mine, other in pairs:
                assert mine["n_descdata"][of:behind] == other["n_descdata"][of:behind], kind
        for load in theirs.loads:
            for at in range(load["p_vaddr"], load["p_vaddr"] + load["p_filesz"], PAGE):
                mine = ours.read(at, PAGE)
                if mine is None:
                    assert snapshot.state(at) is RunState.ABSENT, hex(at)
                    continue
                assert mine == theirs.read(at, PAGE), hex(at)
                compared += 1
    assert compared > 50


@pytest.mark.parametrize("method", METHODS)
def test_registers_are_of_the_instant_of_the_memory(
    method: Used, program: str, tmp_path: Path
) -> None:
    """A program that runs counts in a register, and writes that to memory one step later."""
    target = Target.start(program, "count")
    try:
        with Process(target.pid) as process:
            for number in range(3):
                take(process, tmp_path / str(number), method=method)
    finally:
        target.end()
    counts = []
    for number in range(3):
        core_of(tmp_path / str(number), tmp_path / f"{number}.core")
        with Core(tmp_path / f"{number}.core") as core:
            (state,) = core.notes("NT_PRSTATUS")
            (register,) = R12.unpack_from(state["n_descdata"])
            memory = core.read(*target.places["counter"])
        assert memory is not None
        assert register - int.from_bytes(memory, "little") in (0, 1)
        counts.append(register)
    assert 0 < counts[0] < counts[1] < counts[2]


# Without registers


def without_notes(path: Path) -> None:
    """Make a snapshot as it was before there were notes."""
    manifest = json.loads((path / "manifest.json").read_text())
    for key in ("manifest_sha256", "notes_bytes", "notes_sha256"):
        del manifest[key]
    (path / "manifest.json").write_bytes(_format.seal(manifest))
    (path / "notes").unlink()


def of_ranges(path: Path, stopped: Written) -> None:
    target = Target.start(stopped.target.program, "count")
    try:
        with Process(target.pid) as process:
            start, _ = target.places["counter"]
            mapping = next(m for m in process.mappings() if m.start <= start < m.end)
            take(process, path, ranges=[mapping])
    finally:
        target.end()


def of_ones_own(path: Path, _: Written) -> None:
    with Region.anonymous(PAGE) as region:
        region.write(0, b"data")
        Snapshot.take(region, path, durable=False, max_stall_s=LIMIT_S)


def of_an_earlier_pyuffd(path: Path, stopped: Written) -> None:
    shutil.copytree(stopped.folder / "stopped", path)
    without_notes(path)


@pytest.mark.parametrize("make", [of_ranges, of_ones_own, of_an_earlier_pyuffd])
def test_a_snapshot_without_registers(
    make: Callable[[Path, Written], None], stopped: Written, tmp_path: Path
) -> None:
    """It is read, checked and flattened as ever; only a core is refused."""
    make(tmp_path / "one", stopped)
    assert not (tmp_path / "one" / "notes").exists()
    with Snapshot.open(tmp_path / "one") as snapshot:
        snapshot.verify()
        snapshot.flatten(tmp_path / "flat", durable=False)
    for name in ("one", "flat"):
        with pytest.raises(SnapshotError, match="has no registers") as caught:
            core_of(tmp_path / name, tmp_path / "core")
        assert caught.value.reason == "registers"
    assert sorted(os.listdir(tmp_path)) == ["flat", "one"]


# Damage


def test_notes_that_were_changed(stopped: Written, tmp_path: Path) -> None:
    """Whatever reads them says so, and leaves nothing."""
    shutil.copytree(stopped.folder / "stopped", tmp_path / "one")
    raw = bytearray((tmp_path / "one" / "notes").read_bytes())
    raw[len(raw) // 2] ^= 4
    (tmp_path / "one" / "notes").write_bytes(raw)
    with Snapshot.open(tmp_path / "one") as snapshot:
        for read in (
            snapshot.verify,
            lambda: snapshot.write_core(tmp_path / "core"),
            lambda: snapshot.flatten(tmp_path / "flat", durable=False),
        ):
            with pytest.raises(SnapshotFormatError, match="notes"):
                read()
    assert os.listdir(tmp_path) == ["one"]


def test_notes_cut_while_it_is_open(stopped: Written, tmp_path: Path) -> None:
    shutil.copytree(stopped.folder / "stopped", tmp_path / "one")
    with Snapshot.open(tmp_path / "one") as snapshot:
        os.truncate(tmp_path / "one" / "notes", 100)
        with pytest.raises(SnapshotFormatError, match="100 bytes instead of"):
            snapshot.write_core(tmp_path / "core")
    with pytest.raises(SnapshotFormatError, match="100 bytes instead of"):
        Snapshot.open(tmp_path / "one")


HEAD = struct.Struct("<2Q8s")
GOOD = _core_elf.note(1, HEAD.pack(PAGE, PAGE, b"r-xp") + bytes(PAGE), b"pyuffd")


@pytest.mark.parametrize(
    "raw",
    [
        b"\1",
        GOOD[:-4],
        struct.pack("<3I", 0xFFFFFFFF, 0, 1),
        struct.pack("<3I", 4, 0xFFFFFFFF, 1),
        _core_elf.note(1, b"short", b"CORE"),
        _core_elf.note(1, b"short", b"pyuffd"),
        _core_elf.note(1, HEAD.pack(PAGE, PAGE, b"r-xp"), b"pyuffd"),
        _core_elf.note(1, HEAD.pack(1, PAGE, b"r-xp") + bytes(PAGE), b"pyuffd"),
        _core_elf.note(1, HEAD.pack((1 << 64) - PAGE, 2 * PAGE, b"r-xp") + bytes(PAGE), b"pyuffd"),
        _core_elf.note(1, HEAD.pack(PAGE, PAGE, b"r-xp") + bytes(2 * PAGE), b"pyuffd"),
        _core_elf.note(1, HEAD.pack(PAGE, PAGE, b"\xff") + bytes(PAGE), b"pyuffd"),
    ],
)
def test_notes_that_are_none(raw: bytes) -> None:
    """Whoever can make the hashes right can write anything."""
    with pytest.raises(SnapshotFormatError, match="no table of ELF notes"):
        _core_notes.parse("notes", raw)


def test_nothing_is_replaced(stopped: Written, tmp_path: Path) -> None:
    (tmp_path / "core").write_text("mine")
    with pytest.raises(FileExistsError):
        core_of(stopped.folder / "cow", tmp_path / "core")
    assert (tmp_path / "core").read_text() == "mine"
    core_of(stopped.folder / "cow", tmp_path / "other")
    assert os.stat(tmp_path / "other").st_mode & 0o777 == 0o600


def test_a_damaged_chunk_leaves_no_core(stopped: Written, tmp_path: Path) -> None:
    shutil.copytree(stopped.folder, tmp_path / "all")
    with Snapshot.open(tmp_path / "all" / "stopped") as snapshot:
        run = next(run for run in snapshot.runs if run.state is RunState.DATA)
    with open(tmp_path / "all" / "stopped" / "pages", "r+b") as file:
        file.seek(run.offset)
        byte = file.read(1)
        file.seek(run.offset)
        file.write(bytes([byte[0] ^ 1]))
    for name in ("stopped", "incremental"):
        with pytest.raises(SnapshotFormatError, match="checksum"):
            core_of(tmp_path / "all" / name, tmp_path / "core")
    assert os.listdir(tmp_path) == ["all"]


def test_the_command(stopped: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = str(stopped.folder / "cow")
    assert main(["core", "--from", snapshot, "-o", str(tmp_path / "core"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], told["threads"]) == ("cow", THREADS + 1)
    assert told["length"] == os.path.getsize(tmp_path / "core")
    for words in (
        ["--from", snapshot],
        ["--from", snapshot, "-o", str(tmp_path / "core")],
        ["--from", snapshot, "-o", str(tmp_path / "other"), "--full"],
        ["--from", str(tmp_path / "none"), "-o", str(tmp_path / "other")],
    ):
        assert main(["core", *words]) == 2
        assert capsys.readouterr().err.startswith("pyuffd: ")
    assert os.listdir(tmp_path) == ["core"]


def test_a_core_of_this_process() -> None:
    """The helper that takes the snapshot reads the registers too."""
    with tempfile.TemporaryDirectory() as folder, Process(os.getpid()) as me:
        take(me, Path(folder) / "one")
        core = core_of(Path(folder) / "one", Path(folder) / "core")
        with Core(Path(folder) / "core") as read:
            assert len(read.notes("NT_PRSTATUS")) == core.threads  # type: ignore[attr-defined]
