"""Snapshots for benchmarks: of a program with random content, dropped from memory when needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pyuffd import Process, Snapshot

# No two pages are alike, and none is zeros.
_PROGRAM = """
import mmap, os, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(memory), 1 << 20):
    memory[at : at + (1 << 20)] = os.urandom(1 << 20)
print(flush=True)
sys.stdin.read()
"""


def take(image: Path, length: int) -> None:
    """Take a snapshot of a program with this many bytes in one mapping."""
    program = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(length)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert program.stdout is not None
    program.stdout.readline()
    with Process(program.pid) as target:
        # On the disk, so that its pages can be dropped from memory.
        Snapshot.take(target, image, method="stopped", durable=True)
    program.communicate()


def start_of(snapshot: Snapshot, length: int) -> int:
    """Return where the program's memory is in the snapshot."""
    return next(region.start for region in snapshot.regions if region.length >= length)


def drop(image: str | Path) -> None:
    """Drop an image's pages from the page cache."""
    with open(f"{image}/pages", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(image: str | Path) -> None:
    """Read an image's pages into the page cache."""
    with open(f"{image}/pages", "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
