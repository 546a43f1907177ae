"""A function as the content of memory: each page is computed when it is first touched.

A helper process calls the function (the "process" driver), so a thread may touch the memory while
it holds the GIL. The helper finds the function by its name in this module, so the program's
statements are under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import struct

import pyuffd

NUMBERS = 1 << 20


def squares(offset: int, length: int) -> bytes:
    """Return `length` bytes of a table of square numbers, 8 bytes each, from `offset` on."""
    first = offset // 8
    return struct.pack(f"<{length // 8}Q", *(n * n for n in range(first, first + length // 8)))


def main() -> None:
    """Look up a few squares in 8 MiB, of which only a few pages are computed."""
    with pyuffd.lazy(squares, NUMBERS * 8) as memory:
        table = memory.memoryview().cast("Q")
        for number in (12, 1000, NUMBERS - 1):
            print(f"{number} squared is {table[number]}")
        faults = memory.handler.stats().faults["missing"]
        print(f"{faults} of {memory.length // memory.page_size} pages were computed")
        table.release()


if __name__ == "__main__":
    main()
