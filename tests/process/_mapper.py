"""A program that maps and writes memory at random, and a check of its images by its own notes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from tests._memory import PAGE

THREADS = 4
SLOTS = 6
PAGES_MOST = 200
HEAD = 8  # words of a slot before those of its pages
KINDS = ("anonymous", "shared", "private memfd", "private file", "huge pages", "hugetlb")
OF_A_FILE = (2, 3)  # pages are not zeros as they are mapped
Read = Callable[[int, int], bytes]


def compiled(folder: Path) -> str:
    """Compile mapper.c."""
    program = folder / "mapper"
    source = Path(__file__).parent / "mapper.c"
    subprocess.run(["cc", "-O2", "-Wall", "-pthread", "-o", program, source], check=True)
    return str(program)


@dataclass
class Checked:
    """What a check of an image found."""

    compared: int = 0
    lost: list[str] = field(default_factory=list)


class Mapper:
    """The running program; it has up to `huge_pages` of hugetlb memory."""

    def __init__(self, program: str, seed: int, folder: Path, huge_pages: int = 0) -> None:
        self._popen = subprocess.Popen(
            [program, str(THREADS), str(seed), str(folder), str(huge_pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._popen.pid
        self.notes = int(self._line(), 16)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        is_running = self._popen.poll() is None
        self._popen.kill()
        self._popen.communicate()
        assert is_running, self._popen.returncode

    def _line(self) -> str:
        assert self._popen.stdout is not None
        return self._popen.stdout.readline()

    def longest_s(self) -> float:
        """Return how long an operation of the program has taken, of those since the last call."""
        assert self._popen.stdin is not None
        self._popen.stdin.write("\n")
        self._popen.stdin.flush()
        return int(self._line()) / 1e6

    def check(self, read: Read, is_lost: Callable[[int], bool]) -> Checked:
        """Compare an image with the notes in it; return how many pages were compared, and lost."""
        shape = (THREADS, SLOTS, HEAD + PAGES_MOST)
        notes = np.frombuffer(read(self.notes, 8 * int(np.prod(shape))), "=u8").reshape(shape)
        checked = Checked()
        for thread, slots in enumerate(notes):
            for number, slot in enumerate(slots):
                address, pages, kind, is_remapped, first, count, left, left_pages = map(
                    int, slot[:HEAD]
                )
                if is_remapped:
                    continue
                places = [(address + page * PAGE, page) for page in range(pages)]
                places += [(left + page * PAGE, page) for page in range(left_pages)]
                is_whole = not count and not any(is_lost(at) for at, _ in places)
                parts = [(address, pages), (left, left_pages)]
                content = b"".join(read(at, n * PAGE) for at, n in parts if n) if is_whole else b""
                for index, (at, page) in enumerate(places):
                    is_left = index >= pages
                    if first <= page < first + count and not is_left:
                        continue
                    where = f"thread {thread}, slot {number} ({KINDS[kind]}), page {page}"
                    if is_lost(at):
                        checked.lost.append(f"{where} at {at:#x}")
                        continue
                    version = 0 if is_left else int(slot[HEAD + page]) & 0xFFFF_FFFF
                    word = thread + 1 << 56 | number + 1 << 48 | page << 32 | version
                    if not version and kind not in OF_A_FILE:
                        word = 0
                    raw = content[index * PAGE : (index + 1) * PAGE] if is_whole else read(at, PAGE)
                    found = np.frombuffer(raw, "=u8")
                    if is_left:
                        where += ", where it was before it was moved"
                    assert (found == word).all(), f"{where}: {found[0]:#x} is not {word:#x}"
                    checked.compared += 1
        return checked
