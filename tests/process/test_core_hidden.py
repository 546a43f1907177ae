"""Memory that the process cannot read itself (PROT_NONE) is in its core, as in the kernel's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from pyuffd import Process, Snapshot, write_core
from pyuffd.testing import needs_privilege
from tests.process._core import PAGE, Core

pytestmark = needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")
PAGES = 8
OF_FILE = b"f" * PAGES * PAGE
WRITTEN = b"f" * PAGE + b"\7" * PAGE + b"f" * (PAGES - 2) * PAGE
# Shared and private, written and not: the shared memory is the same.
CONTENTS = [WRITTEN, WRITTEN, WRITTEN, OF_FILE]
TARGET = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
pages = int(sys.argv[1])
for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
    fd = os.memfd_create("hidden")
    os.write(fd, b"f" * pages * 4096)
    for is_written in (True, False):
        at = libc.mmap(None, pages * 4096, 3, flags, fd, 0)
        if is_written:
            ctypes.memset(at + 4096, 7, 4096)
        assert not libc.mprotect(at, pages * 4096, 0)
        print(at, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("method", ["precopy", "cow", "stopped"])
def test_memory_without_permissions(
    method: Literal["precopy", "cow", "stopped"], tmp_path: Path
) -> None:
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", TARGET, str(PAGES)]
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        places = [int(program.stdout.readline()) for _ in CONTENTS]
        with Process(program.pid) as process:
            write_core(process, tmp_path / "core", method=method, full=True, max_stall_s=5)
            Snapshot.take(process, tmp_path / "one", method=method, shared="pause", max_stall_s=5)
        program.stdin.close()
    with Core(tmp_path / "core") as core, Snapshot.open(tmp_path / "one") as snapshot:
        for place, content in zip(places, CONTENTS, strict=True):
            assert core.read(place, PAGES * PAGE) == content
            assert snapshot.read(place, PAGES * PAGE) == content
