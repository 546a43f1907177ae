"""Snapshots on disks that fail or are slow: the errno, no files, and the process continues."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyuffd import Process, Snapshot
from pyuffd.testing._run import SCALE
from tests._child import limit_s
from tests.process._attach import status
from tests.process._counters import compiled, counters
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
# (method, errno, bytes that the disk has room for, microseconds of each write)
DISKS = [
    ("stopped", errno.EIO, 0, 0),
    ("precopy", errno.EIO, 1 << 19, 0),
    ("precopy", errno.ENOSPC, 0, 0),
    ("cow", errno.EIO, 0, 0),
    ("cow", errno.ENOSPC, 1 << 19, 0),
    ("cow", 0, 0, 2000),
    ("precopy", 0, 0, 2000),
]


def whole(path: str, code: int) -> str:
    """Return what a command says of a file that could not be written, as an expression."""
    room = r"; its file system has [\d.]+ \w+ free of [\d.]+ \w+" if code == errno.ENOSPC else ""
    return rf"pyuffd: {path}: write: {os.strerror(code)}{room}\n"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("disks")
    library = folder / "disk_faults.so"
    source = Path(__file__).parent / "disk_faults.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return compiled(folder), str(library)


@pytest.mark.parametrize(("method", "code", "room", "wait_us"), DISKS)
def test_disk(
    method: str, code: int, room: int, wait_us: int, programs: tuple[str, str], tmp_path: Path
) -> None:
    program, library = programs
    with counters(program, 2, 400, "s") as target:
        words = ["snapshot", str(target.pid), "-o", str(tmp_path / "one"), "--method", method]
        if method != "stopped":
            # What is tried is the disk; a busy machine may need a second to stop the process.
            words += ["--max-stall", str(5.0 * SCALE)]
        done = subprocess.run(
            [sys.executable, "-m", "pyuffd", *words, "--no-sync"],
            capture_output=True,
            text=True,
            timeout=limit_s(30),
            env={
                **os.environ,
                "LD_PRELOAD": library,
                "DISK_ERRNO": str(code),
                "DISK_BYTES": str(room),
                "DISK_US": str(wait_us),
            },
        )
        target.works_on()
        assert status(target.pid)["TracerPid"] == "0"
    if code:
        said = whole(f"{tmp_path}/one/pages", code)
        assert (done.returncode, bool(re.fullmatch(said, done.stderr))) == (2, True), done.stderr
        assert os.listdir(tmp_path) == []
    else:
        assert done.returncode == 0, done.stderr
        checked = subprocess.run(
            [sys.executable, "-m", "pyuffd", "verify", str(tmp_path / "one")],
            capture_output=True,
            check=False,
        )
        assert checked.returncode == 0


def test_a_disk_that_is_too_slow(programs: tuple[str, str], tmp_path: Path) -> None:
    """The memory between the process and the file is full: the snapshot ends, not the process."""
    program, library = programs
    with counters(program, 2, 6000, "s") as target:
        limit = ("--max-stall", str(0.1 * SCALE))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pyuffd", "snapshot", str(target.pid)),
                *("-o", str(tmp_path / "one"), "--method", "cow", *limit, "--no-sync"),
            ],
            capture_output=True,
            text=True,
            timeout=limit_s(60),
            env={**os.environ, "LD_PRELOAD": library, "DISK_US": str(int(1e6 * SCALE))},
        )
        target.works_on()
        assert status(target.pid)["TracerPid"] == "0"
    assert (done.returncode, "longer than max_stall_s" in done.stderr) == (2, True), done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_is_full_when_it_is_flattened(
    code: int, programs: tuple[str, str], tmp_path: Path
) -> None:
    """The error names the file that would be there."""
    program, library = programs
    with counters(program, 1, 200, "s") as target, Process(target.pid) as process:
        Snapshot.take(process, tmp_path / "one", method="stopped", durable=False)
    for room in (0, 100 * 4096):
        done = subprocess.run(
            [sys.executable, "-m", "pyuffd", "flatten", "one", "-o", "two", "--no-sync"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=limit_s(30),
            env={
                **os.environ,
                "LD_PRELOAD": library,
                "DISK_ERRNO": str(code),
                "DISK_BYTES": str(room),
            },
        )
        said = whole(f"{tmp_path}/two/pages", code)
        assert (done.returncode, bool(re.fullmatch(said, done.stderr))) == (2, True), done.stderr
        assert os.listdir(tmp_path) == ["one"]
