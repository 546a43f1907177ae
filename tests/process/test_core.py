"""`write_core`: what is in the file, the states of targets, and every way to fail."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from pyuffd import (
    Feature,
    Process,
    ProcessGoneError,
    RegisterMode,
    Snapshot,
    SnapshotError,
    SnapshotProgress,
    StopTimeoutError,
    UffdOSError,
    write_core,
)
from pyuffd.snapshot import _core, _core_file
from pyuffd.snapshot._core_places import CoreLayout
from pyuffd.snapshot._core_plan import read_filter
from pyuffd.testing import needs_hugepages, needs_privilege
from pyuffd.testing._run import SCALE
from tests._child import limit_s, run_child
from tests.kernel._mounts import mounted
from tests.process._attach import status, wait_until
from tests.process._core import PAGE, Core, Target, pages
from tests.process._counters import compiled, counters
from tests.process.test_track_process import needs_program

pytestmark = needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")
STOP_S = 10.0
METHODS = ("stopped", "precopy", "cow")
# No test depends on how busy the machine is.
LONG_S = 5.0 * SCALE


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    source = Path(__file__).parent / "core_target.c"
    path = tmp_path_factory.mktemp("core") / "core_target"
    words = ["cc", "-O1", "-g", "-Wall", "-Werror", "-fno-omit-frame-pointer", "-pthread"]
    subprocess.run([*words, "-o", path, source], check=True)
    return str(path)


@pytest.fixture
def start(program: str) -> Iterator[Callable[..., Target]]:
    targets: list[Target] = []

    def begin(*words: object) -> Target:
        targets.append(Target.start(program, *words))
        return targets[-1]

    yield begin
    for target in targets:
        target.end()


@pytest.fixture(scope="module")
def sleeper(program: str) -> Iterator[Target]:
    """One that no test changes."""
    target = Target.start(program, "threads", 3)
    yield target
    target.end()


# What is in it


def contents(core: Core, target: Target) -> dict[str, bytes | None]:
    return {
        name: core.read(start, min(length, 16 * PAGE))
        for name, (start, length) in target.places.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_memory_of_all_kinds(start: Callable[..., Target], tmp_path: Path, method: str) -> None:
    target = start("memory", tmp_path)
    path = tmp_path / "core"
    with Process(target.pid) as process:
        shmem = process.mappings().at(target.places["memfd"][0])
        assert shmem is not None
        mapped = f"/proc/{target.pid}/map_files/{shmem.start:x}-{shmem.end:x}"
        before = os.stat(mapped).st_blocks
        written = write_core(process, path, method=method, max_stall_s=LONG_S)
        assert written.method == method
        assert os.stat(mapped).st_blocks == before, "reading a sparse file made it larger"
    anonymous = bytearray(pages(16 * PAGE, 0))
    anonymous[4 * PAGE : 8 * PAGE] = bytes(4 * PAGE)
    shared = bytearray(16 * PAGE)
    shared[:PAGE] = pages(PAGE, 40)
    shared[3 * PAGE : 3 * PAGE + 6] = b"behind"
    private = bytearray(shared[: 8 * PAGE])
    private[PAGE : 2 * PAGE] = pages(PAGE, 50)
    modified = bytearray(pages(8 * PAGE, 70))
    modified[-100:] = bytes(100)
    modified[PAGE : 2 * PAGE] = pages(PAGE, 80)
    expected = {
        "anonymous": bytes(anonymous),
        "untouched": bytes(8 * PAGE),
        "unreadable": pages(8 * PAGE, 10),
        "dontdump": None,
        "reserved": None,
        "scattered": pages(2 * PAGE, 30),
        "memfd": bytes(shared),
        "memfd_private": bytes(private),
        "shared_anonymous": pages(8 * PAGE, 60),
        "modified_file": bytes(modified),
        "unwritten_file": None,
        "file": None,
        "shared_file": None,
    }
    with Core(path) as core:
        found = contents(core, target)
        found.pop("hugetlb", None)
        assert found == expected
        names = core.notes("NT_FILE")[0]["n_desc"]["filename"]
        assert any(name.endswith(b"/data\nwith a newline") for name in names)
        # Each mapping has a segment, also one without content.
        start_, length = target.places["reserved"]
        assert (core.load(start_)["p_memsz"], core.load(start_)["p_filesz"]) == (length, 0)
    assert written.length == path.stat().st_size < 20 << 30
    # What the filter leaves out costs nothing, nor do a terabyte reserved and two sparse mappings.
    # The two pages behind the end of a file cannot be read.
    assert written.bytes < 8 << 20
    assert path.stat().st_blocks * 512 < written.bytes + (1 << 20)
    assert written.lost.bytes == 2 * PAGE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not written.unseen
    assert target.runs()


@pytest.mark.parametrize(
    ("dump_filter", "full", "there"),
    [
        # Bit by bit; the header of an ELF file is in `test_first_pages`.
        (0x00, False, set()),
        (0x01, False, {"anonymous", "untouched", "unreadable", "memfd_private", "modified_file"}),
        (0x02, False, {"memfd", "shared_anonymous"}),
        (0x04, False, {"memfd_private", "modified_file", "unwritten_file", "file"}),
        (0x08, False, {"shared_file"}),
        (
            0x00,
            True,
            {
                *("anonymous", "untouched", "unreadable", "memfd_private", "modified_file"),
                *("memfd", "shared_anonymous", "file", "shared_file", "dontdump", "unwritten_file"),
            },
        ),
    ],
)
def test_coredump_filter(
    start: Callable[..., Target], tmp_path: Path, dump_filter: int, full: bool, there: set[str]
) -> None:
    target = start("memory", tmp_path)
    Path(f"/proc/{target.pid}/coredump_filter").write_text(f"{dump_filter:#x}")
    with Process(target.pid) as process:
        written = write_core(process, tmp_path / "core", method="stopped", full=full)
    assert ("anonymous private memory" in written.filtered) == (not full and not dump_filter & 1)
    with Core(tmp_path / "core") as core:
        found = {name for name, content in contents(core, target).items() if content is not None}
    assert found - {"scattered", "hugetlb"} == there
    assert ("scattered" in found) == ("anonymous" in there)


def test_what_a_filter_leaves_out_is_said(start: Callable[..., Target], tmp_path: Path) -> None:
    """Some programs (stress-ng) set theirs to 0: nothing but the vdso is in their core."""
    target = start("memory", tmp_path)
    file = Path(f"/proc/{target.pid}/coredump_filter")
    for text, more, is_said in (
        ("0x0", (), True),
        ("0x0", ("--full",), False),
        ("0x33", (), False),
    ):
        file.write_text(text)
        done = command(target.pid, "-o", tmp_path / "core", *more)
        said = "left out  anonymous private memory" in done.stdout
        assert (done.returncode, said) == (0, is_said), done.stdout
        (tmp_path / "core").unlink()


@needs_hugepages(1)
@pytest.mark.parametrize(("dump_filter", "is_there"), [(0x20, True), (0x5F, False)])
def test_huge_pages(
    start: Callable[..., Target], tmp_path: Path, dump_filter: int, is_there: bool
) -> None:
    target = start("memory", tmp_path)
    Path(f"/proc/{target.pid}/coredump_filter").write_text(f"{dump_filter:#x}")
    place = target.places["hugetlb"]
    with Process(target.pid) as process:
        write_core(process, tmp_path / "core")
    with Core(tmp_path / "core") as core:
        assert core.read(*place) == (pages(place[1], 90) if is_there else None)


def test_memory_registered_with_a_userfaultfd(start: Callable[..., Target], tmp_path: Path) -> None:
    """A read of a missing page through the mapping would wait for a handler that is stopped."""
    target = start("registered")
    assert command(target.pid, "-o", tmp_path / "core").returncode == 0
    with Core(tmp_path / "core") as core:
        shared = core.read(*target.places["registered"])
        assert shared == bytes(2 * PAGE) + b"\7" * PAGE + bytes(5 * PAGE)
        assert core.read(*target.places["anonymous"]) == pages(PAGE, 0) + bytes(7 * PAGE)


@needs_hugepages(2)
def test_huge_pages_of_a_file(start: Callable[..., Target], tmp_path: Path) -> None:
    """Also one that is not in the process's page table."""
    target = start("huge_file")
    Path(f"/proc/{target.pid}/coredump_filter").write_text("0x40")
    with Process(target.pid) as process:
        write_core(process, tmp_path / "core")
    address, length = target.places["huge"]
    with Core(tmp_path / "core") as core:
        expected = pages(PAGE, 0).ljust(length // 2, b"\0")
        assert core.read(address, length) == (expected + pages(PAGE, 1)).ljust(length, b"\0")
    assert (tmp_path / "core").stat().st_blocks * 512 < 3 << 20


def test_first_pages_of_elf_files_and_the_vdso(sleeper: Target, tmp_path: Path) -> None:
    with Process(sleeper.pid) as process:
        write_core(process, tmp_path / "core")
        mappings = list(process.mappings())
    with Core(tmp_path / "core") as core:
        heads = [m for m in mappings if m.inode and not m.offset]
        assert len(heads) >= 3  # the program, libc, ld.so
        for mapping in heads:
            assert (core.read(mapping.start, 4) or b"")[:4] == b"\x7fELF", mapping
        vdso = next(m for m in mappings if m.path == "[vdso]")
        assert (core.read(vdso.start, vdso.length) or b"")[:4] == b"\x7fELF"


def test_notes(sleeper: Target, tmp_path: Path) -> None:
    with Process(sleeper.pid) as process:
        written = write_core(process, tmp_path / "core")
        # What malloc has reserved for threads is 64 MiB for each.
        assert written.length < 32 << 20
        tids = [thread.tid for thread in process.threads()]
    found = status(sleeper.pid)
    assert written.threads == len(tids) == 4
    with Core(tmp_path / "core") as core:
        states = core.notes("NT_PRSTATUS")
        assert [struct.unpack_from("<i", n["n_descdata"], 32)[0] for n in states] == tids
        for kind in ("NT_FPREGSET", "NT_SIGINFO", 0x202):
            assert len(core.notes(kind)) == 4, kind
        (about,) = core.notes("NT_PRPSINFO")
        info = about["n_desc"]
        assert info["pr_pid"] == sleeper.pid
        assert info["pr_ppid"] == os.getpid()
        assert info["pr_uid"] == os.getuid()
        assert info["pr_sid"] == os.getsid(sleeper.pid)
        assert info["pr_fname"].rstrip(b"\0") == found["Name"].encode()
        assert info["pr_psargs"].startswith(sleeper.program.encode()[:60])
        (auxv,) = core.notes("NT_AUXV")
        assert auxv["n_descdata"] == Path(f"/proc/{sleeper.pid}/auxv").read_bytes()


def test_registers(start: Callable[..., Target], tmp_path: Path) -> None:
    """The upper half of a vector register, and the instruction pointer, of a thread that runs."""
    target = start("vector")
    wait_until("it is in its loop", target.vector_is_loaded)
    with Process(target.pid) as process:
        with process.stopped(STOP_S) as stop:
            (registers,) = stop.registers()
        write_core(process, tmp_path / "core")
    high = registers.extended[576 + 9 * 16 :][:16]
    assert struct.unpack("<2Q", high) == (0x3333, 0x4444)
    with Core(tmp_path / "core") as core:
        (note,) = core.notes(0x202)
        assert note["n_descdata"][576 + 9 * 16 :][:16] == high
        (state,) = core.notes("NT_PRSTATUS")
        general = struct.unpack_from("<27Q", state["n_descdata"], 112)
        assert abs(general[16] - struct.unpack_from("<27Q", registers.general)[16]) < 16


class Changing(CoreLayout):
    """Lets the target go on after its mappings were read, and before it is stopped."""

    target: ClassVar[Target]

    def __init__(self, process: Process, first: int, *, full: bool) -> None:
        super().__init__(process, first, full=full)
        self.target.go_on()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("full", [False, True])
def test_memory_that_is_new_and_not_to_be_dumped(
    start: Callable[..., Target],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full: bool,
    method: str,
) -> None:
    """Its mark is read when the process runs again; nothing of it stays in the file."""
    target = Changing.target = start("later")
    monkeypatch.setattr(_core, "CoreLayout", Changing)
    with Process(target.pid) as process:
        write_core(process, tmp_path / "core", method=method, full=full, max_stall_s=LONG_S)
    secret = bytes([1]) * 100
    with Core(tmp_path / "core") as core:
        found = core.read(*target.places["later"])
    assert (found is None) == (not full)
    assert (secret in (tmp_path / "core").read_bytes()) == full


# Methods that copy while the process runs


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(tmp_path_factory.mktemp("counters"))


@pytest.mark.parametrize("how", ["s", "dms"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_of_one_instant(counting: str, tmp_path: Path, method: str, how: str) -> None:
    """Its threads write, drop, move and map memory meanwhile; the core shows one moment of that."""
    with counters(counting, 3, 300, how) as target, Process(target.pid) as process:
        written = write_core(process, tmp_path / "core", method=method, max_stall_s=LONG_S)
        target.works_on()
        assert status(target.pid)["TracerPid"] == "0"
    assert written.method == method
    with Core(tmp_path / "core") as core:

        def read(address: int, length: int) -> bytes:
            found = core.read(address, length)
            if found is None:
                raise LookupError(hex(address))
            return found

        target.check(read)


def test_the_process_writes_too_fast(counting: str, tmp_path: Path) -> None:
    """Named if a limit was given; otherwise it is stopped in the end."""
    with counters(counting, 2, 3000) as target, Process(target.pid) as process:
        for method in ("precopy", "auto"):
            with pytest.raises(SnapshotError) as caught:
                write_core(process, tmp_path / "core", method=method, max_stall_s=1e-6)
            assert caught.value.reason == "stalled"
            assert list(tmp_path.iterdir()) == []
            target.works_on()


def test_auto_stops_it_in_the_end(
    counting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precopy does not get ahead; then cow does only if nobody writes during its sweep."""
    monkeypatch.setattr(_core, "STALL_S", 1e-6)
    with counters(counting, 2, 3000) as target, Process(target.pid) as process:
        written = write_core(process, tmp_path / "core")
        assert written.method in ("cow", "stopped")
        assert written.reason.startswith("precopy did not get ahead: ")
        target.works_on()
        with Core(tmp_path / "core") as core:
            target.check(lambda address, length: core.read(address, length) or b"")
    assert os.listdir(tmp_path) == ["core"]


def test_auto_without_tracking(start: Callable[..., Target], tmp_path: Path) -> None:
    """Its memory is registered with a userfaultfd in all ways already."""
    target = start("threads", 0)
    with Process(target.pid) as process, process.attach(Feature.WP_ASYNC) as uffd:
        for mapping in process.mappings():
            if mapping.writable and not mapping.inode:
                uffd.register(mapping.start, mapping.length, mode=RegisterMode.WP)
        written = write_core(process, tmp_path / "core")
    assert not written.lost
    with Core(tmp_path / "core") as core:
        assert core.notes("NT_PRSTATUS")


def test_two_at_once(sleeper: Target, tmp_path: Path) -> None:
    """The second is refused, with the first's name."""
    said: list[str] = []

    def second(_progress: SnapshotProgress) -> None:
        with Process(sleeper.pid) as other, pytest.raises(SnapshotError) as caught:
            write_core(other, tmp_path / "other")
        assert caught.value.reason == "busy"
        said.append(str(caught.value))

    with Process(sleeper.pid) as process:
        write_core(process, tmp_path / "core", progress=second)
    assert str(os.getpid()) in said[0]
    assert os.listdir(tmp_path) == ["core"]


# States of targets


def first_status(path: Path) -> tuple[int, int, int, int]:
    """Return (signal, pending, blocked, tid) of the first thread."""
    with Core(path) as core:
        data = core.notes("NT_PRSTATUS")[0]["n_descdata"]
        (info,) = core.notes("NT_SIGINFO")[:1]
    number = struct.unpack_from("<i", info["n_descdata"])[0]
    return number, *struct.unpack_from("<QQ", data, 16), struct.unpack_from("<i", data, 32)[0]


def test_pending_signals(start: Callable[..., Target], tmp_path: Path) -> None:
    target = start("pending")
    with Process(target.pid) as process:
        write_core(process, tmp_path / "core")
    both = 1 << (signal.SIGUSR1 - 1) | 1 << (signal.SIGUSR2 - 1)
    only = 1 << (signal.SIGUSR1 - 1)
    assert first_status(tmp_path / "core") == (0, only, both, target.pid)
    assert int(status(target.pid)["SigPnd"], 16) == only, "still pending"


def test_stopped_by_a_signal(start: Callable[..., Target], tmp_path: Path) -> None:
    target = start("threads", 2)
    target.popen.send_signal(signal.SIGSTOP)
    wait_until("it is stopped", lambda: status(target.pid)["State"][0] == "T")
    with Process(target.pid) as process:
        written = write_core(process, tmp_path / "core")
    assert written.threads == 3
    assert first_status(tmp_path / "core")[0] == signal.SIGSTOP
    wait_until("it is stopped again", lambda: status(target.pid)["State"][0] == "T")


def test_many_threads(start: Callable[..., Target], tmp_path: Path) -> None:
    target = start("threads", 300)
    with Process(target.pid) as process:
        assert write_core(process, tmp_path / "core").threads == 301
    with Core(tmp_path / "core") as core:
        pointers = {
            struct.unpack_from("<27Q", note["n_descdata"], 112)[19]
            for note in core.notes("NT_PRSTATUS")
        }
        assert len(pointers) == 301, "each has a stack of its own"
    assert target.runs()


def test_a_thread_that_waits_in_vfork(start: Callable[..., Target], tmp_path: Path) -> None:
    """It cannot be stopped; the registers of its system call are known."""
    target = start("vfork")
    children = psutil.Process(target.pid).children
    wait_until("the child", children)
    (child,) = (each.pid for each in children())
    try:
        with Process(target.pid) as process:
            written = write_core(process, tmp_path / "core")
            assert written.partial == (target.pid,)
            assert written.threads == 1
            words = Path(f"/proc/{target.pid}/syscall").read_text().split()
            with Core(tmp_path / "core") as core:
                (note,) = core.notes("NT_PRSTATUS")
                general = struct.unpack_from("<27Q", note["n_descdata"], 112)
                assert general[15] == int(words[0])
                assert (general[19], general[16]) == (int(words[7], 16), int(words[8], 16))
    finally:
        os.kill(child, signal.SIGKILL)


def test_many_mappings(start: Callable[..., Target], tmp_path: Path) -> None:
    target = start("many", 10_000)
    with Process(target.pid) as process:
        assert write_core(process, tmp_path / "core").mappings > 10_000
    address, length = target.places["many"]
    with Core(tmp_path / "core") as core:
        for at in (0, 1, 4999, length // PAGE - 1):
            assert core.read(address + at * PAGE, PAGE) == bytes([at % 100 + 1]) * PAGE


@pytest.mark.stress
def test_more_mappings_than_a_header_counts(start: Callable[..., Target], tmp_path: Path) -> None:
    limit = Path("/proc/sys/vm/max_map_count")
    before = limit.read_text()
    limit.write_text("200000")
    try:
        target = start("many", 70_000)
        with Process(target.pid) as process:
            assert write_core(process, tmp_path / "core").mappings > 70_000
        address, _ = target.places["many"]
        with Core(tmp_path / "core") as core:
            assert core.elf.num_segments() > 70_000
            assert core.read(address + 69_999 * PAGE, PAGE) == bytes([69_999 % 100 + 1]) * PAGE
    finally:
        limit.write_text(before)


@needs_program("java")
@pytest.mark.stress
def test_a_java_virtual_machine_with_a_terabyte_reserved(tmp_path: Path) -> None:
    source = tmp_path / "Sleeper.java"
    source.write_text(
        "public class Sleeper { public static void main(String[] a) throws Exception {\n"
        'System.out.println("ready"); Thread.sleep(10000000); } }\n'
    )
    for collector in ("G1", "Z"):
        words = ["java", f"-XX:+Use{collector}GC", "-Xms64m", "-Xmx1000g", str(source)]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as machine:
            try:
                assert machine.stdout is not None
                assert b"ready\n" in iter(machine.stdout.readline, b"")  # after warnings
                assert int(status(machine.pid)["VmSize"].split()[0]) > 1000 << 20
                path = tmp_path / f"core.{collector}"
                with Process(machine.pid) as process:
                    written = write_core(process, path)
                assert written.threads > 10
                assert path.stat().st_blocks * 512 < 1 << 30
                assert path.stat().st_size < 8 << 30
            finally:
                machine.kill()


THIRTY_TWO = """
.globl _start
_start: mov $29, %eax
int $0x80
jmp _start
"""


def test_a_program_of_32_bits(tmp_path: Path) -> None:
    """It has other registers; refused, and it runs on."""
    program = tmp_path / "program"
    (tmp_path / "program.s").write_text(THIRTY_TWO)
    subprocess.run(["as", "--32", "-o", tmp_path / "o", tmp_path / "program.s"], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-o", program, tmp_path / "o"], check=True)
    try:
        popen = subprocess.Popen([program])
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error}")
    target = Target(str(program), popen, {})
    try:
        wait_until("it waits", lambda: status(popen.pid)["State"][0] == "S")
        fails(target, tmp_path / "core", UffdOSError, errno.ENOEXEC)
        assert not (tmp_path / "core").exists()
    finally:
        target.end()


def test_ids_inside_a_pid_namespace(program: str, tmp_path: Path) -> None:
    """As in a core that the kernel writes: what the process itself sees."""
    words = ["unshare", "--pid", "--fork", program, "threads", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline() == b"ready\n"
        (pid,) = (child.pid for child in psutil.Process(popen.pid).children())
        try:
            with Process(pid) as process:
                write_core(process, tmp_path / "core")
        finally:
            os.kill(pid, signal.SIGKILL)
        with Core(tmp_path / "core") as core:
            states = core.notes("NT_PRSTATUS")
            assert [struct.unpack_from("<i", n["n_descdata"], 32)[0] for n in states] == [1, 2]
            assert core.notes("NT_PRPSINFO")[0]["n_desc"]["pr_pid"] == 1


# Every way to fail: there is no file, and the target runs


def fails(
    target: Target,
    path: Path | str,
    expected: type[Exception],
    code: int | None = None,
    *,
    runs: bool = True,
    progress: Callable[[SnapshotProgress], None] | None = None,
    method: str = "stopped",
    max_stall_s: float | None = None,
) -> BaseException:
    with Process(target.pid) as process, pytest.raises(expected) as caught:
        write_core(process, path, method=method, progress=progress, max_stall_s=max_stall_s)
    if code is not None:
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == code
    assert target.runs() is runs
    return caught.value


def test_a_file_of_that_name(sleeper: Target, tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_text("precious")
    fails(sleeper, path, FileExistsError, errno.EEXIST)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_of_that_name(sleeper: Target, tmp_path: Path, exists: bool) -> None:
    path, other = tmp_path / "core", tmp_path / "other"
    if exists:
        other.write_text("precious")
    path.symlink_to(other)
    fails(sleeper, path, FileExistsError, errno.EEXIST)
    assert path.is_symlink()
    assert other.exists() == exists


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("event", ["file", "link", "removed"])
def test_the_name_is_taken_meanwhile(
    sleeper: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: bool, event: str
) -> None:
    if hidden:  # a file system without O_TMPFILE
        monkeypatch.setattr(_core_file, "_unnamed", lambda _folder: None)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "core"

    def meanwhile(_progress: SnapshotProgress) -> None:
        if event == "removed":
            for name in folder.iterdir():
                name.unlink()
            if folder.exists():
                folder.rmdir()
        elif event == "file" and not path.exists():
            path.write_text("precious")
        elif event == "link" and not path.is_symlink():
            path.symlink_to(tmp_path / "other")

    code = errno.ENOENT if event == "removed" else errno.EEXIST
    fails(sleeper, path, OSError, code, progress=meanwhile)
    assert not (tmp_path / "other").exists()
    if event == "removed":
        assert not folder.exists()
    else:
        assert list(folder.iterdir()) == [path], "nothing else is left"
        assert path.is_symlink() or path.read_text() == "precious"


def test_a_file_system_without_unnamed_files(
    sleeper: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core_file, "_unnamed", lambda _folder: None)
    with Process(sleeper.pid) as process:
        write_core(process, tmp_path / "core", durable=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "core"]
    assert stat.S_IMODE((tmp_path / "core").stat().st_mode) == 0o600


def test_a_umask_changes_nothing(sleeper: Target, tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        with Process(sleeper.pid) as process:
            write_core(process, tmp_path / "core", durable=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "core").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nowhere/core", errno.ENOENT),
        ("/proc/core", None),  # a folder in which nobody makes files
        ("file/core", errno.ENOTDIR),
    ],
)
def test_a_folder_that_cannot_be_written(
    sleeper: Target, tmp_path: Path, path: str, code: int | None
) -> None:
    (tmp_path / "file").touch()
    fails(sleeper, tmp_path / path, OSError, code)


@pytest.mark.parametrize("path", ["", ".", "..", "x/"])
def test_no_name_for_a_file(sleeper: Target, tmp_path: Path, path: str) -> None:
    fails(sleeper, f"{tmp_path}/{path}", ValueError)


@pytest.mark.parametrize("reaped", [False, True], ids=["zombie", "reaped"])
def test_the_filter_of_a_process_that_ends(reaped: bool) -> None:
    """Of a process without memory the kernel shows none."""
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    with pytest.raises(ProcessGoneError):
        read_filter(ended.pid)
    ended.wait()


def test_disk_full(start: Callable[..., Target]) -> None:
    target = start("big", 8)
    with mounted("tmpfs", size="1M") as folder:
        error = fails(target, f"{folder}/core", UffdOSError, errno.ENOSPC)
        assert isinstance(error, UffdOSError)
        assert error.filename == f"{folder}/core"
        assert error.hint.endswith("free of 1 MiB")
        assert os.listdir(folder) == []
        assert os.statvfs(folder).f_bfree > 0, "its space is free again"


def test_a_file_larger_than_allowed(start: Callable[..., Target], tmp_path: Path) -> None:
    target = start("big", 8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        fails(target, tmp_path / "core", UffdOSError, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


def test_an_exception_in_the_middle(start: Callable[..., Target], tmp_path: Path) -> None:
    """As Ctrl-C raises one there: the target is stopped at that moment."""
    target = start("big", 200)
    calls = []

    def interrupt(progress: SnapshotProgress) -> None:
        calls.append((progress.bytes, progress.total))
        assert status(target.pid)["State"][0] == "t"
        if len(calls) == 2:
            raise Interrupted

    with Process(target.pid) as process, pytest.raises(Interrupted):
        write_core(process, tmp_path / "core", method="stopped", progress=interrupt)
    assert calls[1][0] > calls[0][0] > 0
    assert calls[1][1] >= 200 << 20
    assert list(tmp_path.iterdir()) == []
    assert target.runs()


def test_stands_too_long(start: Callable[..., Target], tmp_path: Path) -> None:
    target = start("big", 200)
    fails(target, tmp_path / "core", UffdOSError, errno.ETIMEDOUT, max_stall_s=1e-6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_killed_in_the_middle(start: Callable[..., Target], tmp_path: Path, method: str) -> None:
    target = start("big", 200)

    def kill(_progress: SnapshotProgress) -> None:
        target.popen.kill()
        target.popen.wait()

    with Process(target.pid) as process, pytest.raises(ProcessGoneError, match="has exited"):
        write_core(process, tmp_path / "core", method=method, progress=kill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_another_program_in_the_middle(
    start: Callable[..., Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    target = Changing.target = start("other")
    monkeypatch.setattr(_core, "CoreLayout", Changing)
    fails(target, tmp_path / "core", ProcessGoneError, errno.ESRCH, method=method)
    assert list(tmp_path.iterdir()) == []


def test_traced_by_a_debugger(start: Callable[..., Target], tmp_path: Path) -> None:
    target = start("threads", 1)
    with Process(target.pid) as process, Process(target.pid) as other:
        with other.stopped(STOP_S), pytest.raises(UffdOSError) as caught:
            write_core(process, tmp_path / "core")
        assert caught.value.errno == errno.EPERM
        assert not isinstance(caught.value, StopTimeoutError)
    assert list(tmp_path.iterdir()) == []


def test_gone_before(sleeper: Target, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as popen, Process(popen.pid) as process:
        popen.kill()
        popen.wait()
        with pytest.raises(ProcessGoneError):
            write_core(process, tmp_path / "core")
    assert list(tmp_path.iterdir()) == []


def test_this_process(tmp_path: Path) -> None:
    with Process(os.getpid()) as process, pytest.raises(ValueError):
        write_core(process, tmp_path / "core")


@pytest.mark.parametrize("bad", [{"method": "x"}, {"max_stall_s": 0.0}, {"max_stall_s": -1.0}])
def test_bad_arguments(sleeper: Target, tmp_path: Path, bad: dict[str, object]) -> None:
    with Process(sleeper.pid) as process, pytest.raises(ValueError):
        write_core(process, tmp_path / "core", **bad)  # type: ignore[arg-type]


def as_nobody(pid: int, folder: str) -> str:
    """Run in a child process."""
    with Process(pid) as process:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            write_core(process, f"{folder}/core")
        except OSError as error:
            return f"{type(error).__name__} {error.errno}"
    return "written"


def test_without_the_privilege(sleeper: Target) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # other users get there
        os.chmod(folder, 0o777)
        said = run_child("tests.process.test_core:as_nobody", sleeper.pid, folder).value
        assert said in (f"UffdPermissionError {errno.EPERM}", f"UffdPermissionError {errno.EACCES}")
        assert os.listdir(folder) == []
    assert sleeper.runs()


def as_nobody_its_own(program: str, folder: str) -> tuple[int, bool, str | None]:
    """Run in a child process: a core of a process of the same user, without capabilities."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    target = Target.start(program, "memory", folder)
    try:
        with Process(target.pid) as process:
            written = write_core(process, f"{folder}/core")
        with Core(f"{folder}/core") as core:
            start, _ = target.places["memfd"]
            touched = core.read(start, PAGE) == pages(PAGE, 40)
            there = core.read(start + 3 * PAGE, 6)
            return len(written.unseen), touched, None if there is None else there.decode()
    finally:
        target.end()


def test_shared_memory_that_cannot_be_seen(program: str) -> None:
    """It is named; what the process has touched is there."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o777)
        copy = shutil.copy(program, folder)
        child = run_child("tests.process.test_core:as_nobody_its_own", copy, folder)
    # Two of the memfd, and the shared anonymous one.
    assert child.value == [3, True, "\0" * 6]


# The command


def command(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyuffd", "core", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=limit_s(120),
        cwd=cwd,
    )


def test_command(sleeper: Target, tmp_path: Path) -> None:
    result = command(sleeper.pid, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    path = tmp_path / f"core.{sleeper.pid}"
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"process {sleeper.pid} (core_target), 4 threads, ")
    assert any(line.startswith("pause ") for line in lines)
    assert path.stat().st_size > 0
    again = command(sleeper.pid, cwd=tmp_path)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)


def test_command_json(sleeper: Target, tmp_path: Path) -> None:
    import json

    path = tmp_path / "c"
    result = command(sleeper.pid, "-o", path, "--json", "--full", "--method", "stopped", "--sync")
    found = json.loads(result.stdout)
    assert found["threads"] == 4
    assert found["length"] == path.stat().st_size
    assert 0 < found["pause_s"] < found["seconds"]
    assert found["method"] == "stopped"


@pytest.mark.parametrize(
    "words", [[], ["x"], ["1", "--method", "x"], ["1", "--max-stall", "0"], ["0"], ["999999999"]]
)
def test_command_with_bad_arguments(words: list[str], tmp_path: Path) -> None:
    result = command(*words, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr
    assert list(tmp_path.iterdir()) == []


def is_under_way(pid: int, target: int, method: str) -> bool:
    """Whether the target is stopped, or its writes are tracked."""
    if method == "stopped":
        return status(target)["TracerPid"] != "0"
    try:
        fds = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:  # one is closed meanwhile
        return False
    return "anon_inode:[userfaultfd]" in fds


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_command_and_signals(
    start: Callable[..., Target], tmp_path: Path, number: int, expected: int, method: str
) -> None:
    """While the target is stopped; a full pipe would not delay it, so its memory is large."""
    target = start("big", 256 if method == "stopped" else 64)
    words = [sys.executable, "-m", "pyuffd", "core", str(target.pid), "--method", method, "--json"]
    for _ in range(10):  # where the machine is so busy that the signal comes too late
        with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE) as popen:
            while popen.poll() is None and not is_under_way(popen.pid, target.pid, method):
                pass
            popen.send_signal(number)
            popen.communicate(timeout=limit_s(120))
        if popen.returncode == expected:
            break
        (tmp_path / f"core.{target.pid}").unlink()
    assert popen.returncode == expected
    assert list(tmp_path.iterdir()) == []
    wait_until("it runs", target.runs)


# Where a signal comes, of the steps at the end of a command.
LATE = """
import os, signal, sys
import pyuffd.cli
from pyuffd.snapshot import _capture, _core_file, _files

place, number, *words = sys.argv[1:]


def comes(at):
    if at == place:
        os.kill(os.getpid(), int(number))


def around(owner, name):
    real = getattr(owner, name)

    def call(*args, **more):
        comes(f"before {name}")
        result = real(*args, **more)
        comes(f"after {name}")
        return result

    setattr(owner, name, call)


_capture.barrier = comes
around(_core_file.NewFile, "publish")
around(_files.NewDirectory, "settle")
around(os, "link")
around(os, "rename")
sys.argv[1:] = words
status = pyuffd.cli.main()
comes("end")
sys.exit(status)
"""
LATE_COMMANDS = ("core", "core --from", "snapshot", "flatten")
# By whether it makes a file, or a directory.
BEFORE_IT = {True: ["written", "before publish"], False: ["written"]}
AFTER_IT = {
    True: ["before link", "after publish", "end"],
    False: ["before rename", "after settle", "end"],
}


def makes_a_file(name: str) -> bool:
    return name.startswith("core")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A snapshot."""
    path = tmp_path_factory.mktemp("image") / "one"
    with subprocess.Popen(["sleep", "600"]) as popen:
        try:
            with Process(popen.pid) as process:
                Snapshot.take(process, path, method="stopped", max_stall_s=60, durable=False)
        finally:
            popen.kill()
    return str(path)


@pytest.mark.parametrize(
    ("command_", "place", "status_"),
    [
        (name, place, status_)
        for status_, places in ((143, BEFORE_IT), (0, AFTER_IT))
        for name in LATE_COMMANDS
        for place in places[makes_a_file(name)]
    ],
)
def test_a_signal_near_the_end(
    sleeper: Target, image: str, tmp_path: Path, command_: str, place: str, status_: int
) -> None:
    """There is a file if and only if the exit status is that of success."""
    given = [str(sleeper.pid), "--method", "stopped"]
    if command_ not in ("core", "snapshot"):
        given = [image]
    words = [*command_.split(), *given, "-o", str(tmp_path / "it")]
    result = subprocess.run(
        [sys.executable, "-c", LATE, place, str(int(signal.SIGTERM)), *words],
        capture_output=True,
        text=True,
        timeout=limit_s(60),
    )
    assert (result.returncode, result.stderr) == (status_, "")
    assert os.listdir(tmp_path) == ([] if status_ else ["it"])
    told = result.stdout.partition("\n")[2] if command_ in ("core", "snapshot") else result.stdout
    assert bool(told) == (not status_)
    wait_until("it runs", sleeper.runs)
