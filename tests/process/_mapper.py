"""A program that maps and writes memory at random, and a check of its images by its own notes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np

from tests._memory import PAGE

THREADS = 4
SLOTS = 6
PAGES_MOST = 200
HEAD = 6  # words of a slot before those of its pages
KINDS = ("anonymous", "shared", "private memfd", "private file")
OF_A_FILE = 2  # and above: pages are not zeros as they are mapped
Read = Callable[[int, int], bytes]


def compiled(folder: Path) -> str:
    """Compile mapper.c."""
    program = folder / "mapper"
    source = Path(__file__).parent / "mapper.c"
    subprocess.run(["cc", "-O2", "-Wall", "-pthread", "-o", program, source], check=True)
    return str(program)


class Mapper:
    """The running program."""

    def __init__(self, program: str, seed: int, folder: Path) -> None:
        self._popen = subprocess.Popen(
            [program, str(THREADS), str(seed), str(folder)], stdout=subprocess.PIPE, text=True
        )
        self.pid = self._popen.pid
        assert self._popen.stdout is not None
        self.notes = int(self._popen.stdout.readline(), 16)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        is_running = self._popen.poll() is None
        self._popen.kill()
        self._popen.communicate()
        assert is_running, self._popen.returncode

    def check(self, read: Read, is_lost: Callable[[int], bool]) -> int:
        """Compare an image with the notes in it; return how many pages were compared."""
        shape = (THREADS, SLOTS, HEAD + PAGES_MOST)
        notes = np.frombuffer(read(self.notes, 8 * int(np.prod(shape))), "=u8").reshape(shape)
        compared = 0
        for thread, slots in enumerate(notes):
            for number, slot in enumerate(slots):
                address, pages, kind, is_remapped, first, count = map(int, slot[:HEAD])
                if is_remapped:
                    continue
                for page in range(pages):
                    at = address + page * PAGE
                    if first <= page < first + count or is_lost(at):
                        continue
                    version = int(slot[HEAD + page]) & 0xFFFF_FFFF
                    word = thread + 1 << 56 | number + 1 << 48 | page << 32 | version
                    if not version and kind < OF_A_FILE:
                        word = 0
                    found = np.frombuffer(read(at, PAGE), "=u8")
                    where = f"thread {thread}, slot {number} ({KINDS[kind]}), page {page}"
                    assert (found == word).all(), f"{where}: {found[0]:#x} is not {word:#x}"
                    compared += 1
        return compared
