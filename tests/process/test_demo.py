"""`pyuffd demo` as a program: what it verifies, leaves out, and leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import psutil
import pytest

from pyuffd import Region
from pyuffd.cli import _demo_program, _demo_restore, _demo_snapshot, _demo_work, demo, main
from pyuffd.testing import MEMORY_TYPES, _huge_pages, needs_hugepages, needs_privilege
from tests._child import ROOT, limit_s, run_child

TIMEOUT_S = 60
NOBODY = "65534"
MIB = 1 << 20

NAMES = ["anonymous", "shmem shared", "shmem private", "hugetlb shared", "hugetlb private"]
SMALL_ROWS = {(name, driver) for name in NAMES[:3] for driver in ("native", "inline")}
ALL_ROWS = {(name, driver) for name in NAMES for driver in ("native", "inline")}
ROW = re.compile(
    rf"^  ({'|'.join(NAMES)}) +(native|inline) +([\d,]+) +([\d,.]+) +([\d,.]+) +([\d,]+)"
    r" +([\d,]+|-)  (yes|NO)$",
    re.MULTILINE,
)


def command(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-m", "pyuffd", "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=limit_s(TIMEOUT_S),
        check=False,
    )


def rows(text: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the rows of the table, by memory type and driver."""
    return {(row[1], row[2]): row.groups()[2:] for row in ROW.finditer(text)}


def flat(text: str) -> str:
    """Undo the wrapping."""
    return re.sub(r"\n {12}", " ", text)


def number(text: str) -> float:
    return float(text.replace(",", ""))


@needs_privilege("CAP_SYS_PTRACE")
@needs_hugepages(32)
def test_every_memory_type_with_both_drivers_is_verified_in_time() -> None:
    started = time.monotonic()
    done = command()
    seconds = time.monotonic() - started
    assert (done.returncode, done.stderr) == (0, "")
    found = rows(done.stdout)
    assert set(found) == ALL_ROWS
    assert {row[-1] for row in found.values()} == {"yes"}
    for (name, _), (faults, p50, p99, _prefetched, rate, _verified) in found.items():
        assert number(faults) > 0, name
        assert 0 < number(p50) <= number(p99), name
        assert number(rate) > 0, name
    assert "Verified: the image, and all of its 10 restored copies." in done.stdout
    assert "Left out" not in done.stdout
    text = flat(done.stdout)
    for what in ("Snapshot", "Increment", "Core"):
        assert re.search(rf"^{what} .*; read back and compared: same$", text, re.MULTILINE), what
    sizes = {
        what: number(size)
        for what, size in re.findall(r"^(Snapshot|Increment) +([\d.]+) MiB by precopy", text, re.M)
    }
    assert sizes["Increment"] < sizes["Snapshot"] / 2
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "\x1b" not in done.stdout
    assert seconds < limit_s(20)


@needs_privilege("CAP_SYS_PTRACE")
def test_child_goes_on_while_its_memory_is_saved() -> None:
    text = flat(command("--size", "16").stdout)
    saved = re.search(r"Saved +([\d,]+) pages just before .*?, ([\d,]+) in the background", text)
    assert saved is not None
    by_faults, behind = number(saved[1]), number(saved[2])
    assert by_faults > 0
    assert by_faults + behind == 16 * MIB / 4096
    meanwhile = re.search(r"while the child made ([\d,]+) more edits", text)
    assert meanwhile is not None
    assert number(meanwhile[1]) > 0
    assert re.search(r"the child was paused for [\d.]+ ms", text)


def test_input_of_a_few_bytes(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"nine byte")
    done = command("--input", str(small), "--seed", "7")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(rows(done.stdout)) >= SMALL_ROWS
    assert f"1 file, 0.0 MiB, of {small}; in 2 MiB" in flat(done.stdout)


def test_input_directory(tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/d"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode() * 1000)
    (tmp_path / "link").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    done = command("--input", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"3 files, 0.0 MiB, of {tmp_path}" in flat(done.stdout)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("/nonexistent", "/nonexistent: No such file or directory"),
        ("/dev/zero", "/dev/zero is neither a regular file nor a directory"),
        ("/dev/null", "/dev/null is neither a regular file nor a directory"),
    ],
)
def test_input_that_cannot_be_used(path: str, complaint: str) -> None:
    done = command("--input", path)
    assert (done.returncode, done.stderr) == (2, f"pyuffd: {complaint}\n")


def test_empty_input(tmp_path: Path) -> None:
    done = command("--input", str(tmp_path))
    complaint = f"pyuffd: {tmp_path} has no content that can be read\n"
    assert (done.returncode, done.stderr) == (2, complaint)


@pytest.mark.parametrize("size", ["1", "0", "-2", "2000", "many"])
def test_size_out_of_range(size: str) -> None:
    done = command(f"--size={size}")
    assert done.returncode == 2
    assert f"{size} is not a number in 2..1024" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv")
def test_unprivileged_user_is_told_what_was_left_out() -> None:
    # The remaining capability lets this user reach the interpreter and the library, wherever they
    # are installed; it opens neither the device nor the pool of huge pages.
    keep = "-all,+dac_read_search"
    done = command(
        *("--size", "512"),  # of huge pages, more than the tests have reserved
        prefix=(
            *("setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"),
            *(f"--inh-caps={keep}", f"--ambient-caps={keep}", f"--bounding-set={keep}"),
        ),
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = rows(done.stdout)
    assert set(found) >= SMALL_ROWS
    assert {row[-1] for row in found.values()} == {"yes"}
    text = flat(done.stdout)
    # Its own child may be traced where Yama allows it, but no userfaultfd may be opened in it.
    looked_at = len(re.findall(r"read back and compared: same$", text, re.MULTILINE))
    refused = "Left out    snapshots and a core of a program that was not prepared: " in text
    assert looked_at == (0 if refused else 3)
    if not _may_fault_in_kernel():
        assert "Left out    faults of system calls: " in text
        assert "sysctl vm.unprivileged_userfaultfd=1" in text
    for name, driver in ALL_ROWS - set(found):
        assert re.search(
            rf"Left out .*{name} \({driver}\).*huge pages.*`sysctl vm.nr_hugepages=\d+`", text
        )


def _may_fault_in_kernel() -> bool:
    device = Path("/dev/userfaultfd")
    sysctl = Path("/proc/sys/vm/unprivileged_userfaultfd")
    return sysctl.read_text().strip() == "1" or (
        device.exists() and bool(device.stat().st_mode & 0o006)
    )


@pytest.mark.without_userfaultfd
def test_where_nothing_can_be_opened_it_says_what_doctor_says() -> None:
    refused = (sys.executable, str(ROOT / "tests" / "seccomp_deny.py"))
    done = command(prefix=refused)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    report = subprocess.run(
        [*refused, sys.executable, "-m", "pyuffd", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=limit_s(TIMEOUT_S),
        check=False,
    )
    ways = json.loads(report.stdout)["open"]
    assert not any(way["works"] for way in ways.values())
    for name in ("syscall", "device"):
        assert ways[name]["reason"] in done.stderr, name
        assert f"`{ways[name]['command']}`" in done.stderr, name
    # A profile that allows one more call, not the absence of one; and the device.
    assert "--security-opt seccomp=profile.json --device /dev/userfaultfd" in done.stderr
    assert "the runtime's own profile with userfaultfd among the allowed calls" in done.stderr
    assert "unconfined" not in done.stderr


# Wrong content is not called verified


def test_changed_byte_is_detected() -> None:
    with Region.anonymous(2 * MIB) as region, tempfile.TemporaryFile() as image:
        region.write(0, b"content")
        expected = region.digest("sha256").hex()
        assert _demo_restore.is_restored(region, expected)
        content = region.read()
        region.write(2 * MIB - 1, b"\1")
        assert not _demo_restore.is_restored(region, expected)
        image.write(content[:4096] + b"\1" + content[4097:])
        image.flush()
        row = _demo_restore.restore(image, 2 * MIB, expected, MEMORY_TYPES["anon"], "native", 1)
    assert not row.verified


def demo_with(damage: str) -> int:
    """Run the command with one part of it broken."""
    take = _demo_snapshot.take_snapshot

    def take_and_damage(*arguments: Any) -> _demo_snapshot.Snapshot:
        snapshot = take(*arguments)
        image: IO[bytes] = arguments[-1]
        os.pwrite(image.fileno(), b"\xff\x00\xff", snapshot.length // 2)
        return snapshot

    def replay_other(content: bytes, length: int, seed: int, edits: int) -> bytearray:
        return _demo_work.replay(content, length, seed, edits - 1)

    with contextlib.ExitStack() as stack:
        if damage == "image file":
            stack.enter_context(patch.object(demo, "take_snapshot", take_and_damage))
        else:
            stack.enter_context(patch.object(_demo_snapshot, "replay", replay_other))
        return main(["demo", "--size", "2"])


@pytest.mark.parametrize("damage", ["image file", "instant"])
def test_damage_gives_exit_status_1(damage: str) -> None:
    child = run_child(demo_with, damage, budget_s=TIMEOUT_S)
    assert child.value == 1
    assert {row[-1] for row in rows(child.stdout).values()} == {"NO"}
    assert "NOT VERIFIED" in child.stdout
    assert ("DIFFERENT" in child.stdout) == (damage == "instant")


def demo_without_tracking() -> int:
    """Run the command as on a kernel that cannot write-protect shared memory."""
    shake_hands = _demo_snapshot._shake_hands

    def shake_hands_without(*arguments: Any) -> tuple[dict[str, object], Region, None]:
        hello, memory, _ = shake_hands(*arguments)
        return {**hello, "untracked": "an old kernel"}, memory, None

    with patch.object(_demo_snapshot, "_shake_hands", shake_hands_without):
        return main(["demo", "--size", "2"])


def test_child_waits_where_it_cannot_be_tracked() -> None:
    child = run_child(demo_without_tracking, budget_s=TIMEOUT_S)
    assert child.value == 0
    assert {row[-1] for row in rows(child.stdout).values()} == {"yes"}
    assert "Left out    saving while the child runs: an old kernel" in child.stdout


def test_program_that_has_other_content() -> None:
    """One edit that is missing, and one byte elsewhere, are found."""
    content = bytes(range(256)) * 16 * 40
    found = _demo_program.replay(content, 123)
    assert _demo_program.check(content, found) == _demo_program.Check(123, True)
    at = 122 * _demo_program.STRIDE % _demo_program.edited_pages(content) * 4096
    for place in (at, len(content) - 1):
        wrong = bytearray(found)
        wrong[place] ^= 1
        assert not _demo_program.check(content, wrong).verified


def test_replayed_memory_is_that_of_step_by_step_edits() -> None:
    content, length = bytes(range(256)) * 40, 3 * 4096
    memory = bytearray(content.ljust(length, b"\0"))
    edit = _demo_work.edit_forever(memory, content, 5)
    assert [next(edit) for _ in range(50)] == list(range(1, 51))
    assert _demo_work.replay(content, length, 5, 50) == memory
    assert _demo_work.replay(content, length, 6, 50) != memory
    assert _demo_work.replay(content, length, 5, 49) != memory
    assert _demo_work.COUNTER.unpack(memory[-8:]) == (50,)


# Leaks


def start(*arguments: str, **how: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pyuffd", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def children(pid: int) -> list[psutil.Process]:
    """Wait until a process has a child, and return its children."""
    deadline = time.monotonic() + limit_s(TIMEOUT_S)
    while not (found := psutil.Process(pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.mark.crossing
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
@pytest.mark.parametrize("when", ["snapshot", "restore"])
def test_nothing_stays_when_it_is_ended(
    number: signal.Signals, status: int, when: str, tmp_path: Path
) -> None:
    process = start("--size", "64", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert process.stdout is not None
    with process:
        left = children(process.pid)
        if when == "restore":
            while "anonymous" not in process.stdout.readline():
                pass
        process.send_signal(number)
        _, errors = process.communicate(timeout=limit_s(TIMEOUT_S))
    assert (process.returncode, errors) == (status, "")
    assert psutil.wait_procs(left, timeout=limit_s(TIMEOUT_S))[1] == []
    assert list(tmp_path.iterdir()) == []


def test_child_that_dies_is_reported() -> None:
    process = start("--size", "64")
    with process:
        for child in children(process.pid):
            child.kill()
        _, errors = process.communicate(timeout=limit_s(TIMEOUT_S))
    assert (process.returncode, errors) == (2, "pyuffd: the child process ended by signal 9\n")


def test_reader_of_the_output_is_gone() -> None:
    process = start("--size", "2")
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(limit_s(TIMEOUT_S))
    assert (process.returncode, errors) == (141, "")


@needs_privilege("CAP_SYS_ADMIN")
@needs_hugepages(1)
def test_pool_grows_and_shrinks() -> None:
    grown = _huge_pages.add(1)
    if not grown.added:
        pytest.skip("there is no room for another huge page")
    _huge_pages.give_back(sum(grown))
    assert grown.added == 1
