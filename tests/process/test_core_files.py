"""Cores of processes with private mappings of files: what was not written is in the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyuffd import Process, write_core
from pyuffd._owned import Descriptor
from pyuffd.snapshot import _capture, _private_files
from pyuffd.testing import needs_privilege
from tests.process._core import PAGE, Core

pytestmark = needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")

LENGTH = 1024 * PAGE
LONG_S = 5.0

TARGET = """
import ctypes, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
area = mmap.mmap(fd, 1024 * 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
for page in 1, 2, 3:
    area[page * 4096] = page
area[40 * 4096]
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for _ in sys.stdin:
    for page in 5, 6:
        area[page * 4096] = page
    for page in 2, 3, 6:
        area.madvise(mmap.MADV_DONTNEED, page * 4096, 4096)
    area[3 * 4096]
    print(flush=True)
    sys.stdin.readline()
    for page in 1, 8:
        area[page * 4096] = 99
    print(flush=True)
"""


def nothing_opens(_name: str, _key: object = None) -> Descriptor | None:
    return None


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize(
    ("method", "before"), [("cow", "armed"), ("precopy", "round 0"), ("stopped", "")]
)
def test_a_private_mapping(
    method: str, before: str, opens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are written, dropped and read before the stop, and written after it.

    Only the written ones are copied in the stop; where the file cannot be opened, all.
    """
    original = b"".join(bytes([65 + page % 26]) * PAGE for page in range(1024))
    (tmp_path / "file").write_bytes(original)
    words = [sys.executable, "-c", TARGET, str(tmp_path / "file")]
    pipe = subprocess.PIPE
    if not opens:
        monkeypatch.setattr(_private_files, "_regular", nothing_opens)
    with subprocess.Popen(words, stdin=pipe, stdout=pipe) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        address = int(program.stdout.readline())
        done: list[str] = []

        def go_on(step: str) -> None:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.write(b"\n")
            program.stdin.flush()
            program.stdout.readline()
            done.append(step)

        def at(name: str) -> None:
            if (name == before and not done) or (name == "resumed" and done == ["before"]):
                go_on("after" if done else "before")

        monkeypatch.setattr(_capture, "barrier", at)
        if not before:
            go_on("before")
        with Process(program.pid) as process:
            written = write_core(process, tmp_path / "core", method=method, max_stall_s=LONG_S)
        program.kill()
    assert done == ["before", "after"][: 1 + bool(before)]
    if method == "cow":
        assert (written.stop_bytes < LENGTH) == opens
    expected = bytearray(original)
    expected[PAGE], expected[5 * PAGE] = 1, 5
    with Core(tmp_path / "core") as core:
        assert core.read(address, LENGTH) == bytes(expected)
