"""A process that changes its memory when it is told to, and the same here, to know what it has."""

from __future__ import annotations

import ctypes
import mmap
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Self

PAGE = 4096
SIZES = (1, 3, 40, 257, 600)
STEPS = 30


def sizes_of(seed: int) -> list[int]:
    """Return how many pages each area has."""
    rng = random.Random(seed)
    return [rng.choice(SIZES) for _ in range(rng.choice((1, 2, 4)))]


def change(areas: Sequence[mmap.mmap | bytearray], rng: random.Random) -> None:
    """Write some of it, and drop some pages."""
    for _ in range(STEPS):
        area = rng.choice(areas)
        pages = len(area) // PAGE
        first = rng.randrange(pages)
        count = min(rng.choice((1, 1, 2, 30)), pages - first)
        start, end = first * PAGE, (first + count) * PAGE
        if rng.random() < 0.8:
            area[start:end] = rng.randbytes(PAGE) * count
        elif isinstance(area, mmap.mmap):
            area.madvise(mmap.MADV_DONTNEED, start, end - start)
        else:
            area[start:end] = bytes(end - start)


class Changing:
    """Such a process.

    Attributes:
        pid: Its id.
        areas: The address of each part of its memory, and what it has.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests._changing", str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        starts = map(int, self._process.stdout.readline().split())
        self.areas = [
            (start, bytearray(pages * PAGE))
            for start, pages in zip(starts, sizes_of(seed), strict=True)
        ]

    def change(self) -> None:
        """Have it change its memory."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "done\n"
        change([content for _, content in self.areas], self._rng)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    seed = int(sys.argv[1])
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    areas = [mmap.mmap(-1, pages * PAGE, flags) for pages in sizes_of(seed)]
    print(*(ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in areas), flush=True)
    rng = random.Random(seed)
    for _ in sys.stdin:
        change(areas, rng)
        print("done", flush=True)


if __name__ == "__main__":
    main()
