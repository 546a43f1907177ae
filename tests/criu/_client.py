"""A process that is "restored": it does what CRIU's restorer does, and then checks its memory.

    python -m tests.criu._client PAGES...

It maps a region for each number of pages and prints the addresses. Then it reads commands, one JSON
list per line, and prints one line of JSON for each. `connect PATH PID ZOMBIES` does what CRIU does.
"""

from __future__ import annotations

import array
import ctypes
import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from pyuffd import Feature, Region, Userfaultfd

PAGE = 4096
MAYMOVE, FIXED = 1, 2
FIXED_NOREPLACE = 0x100000
BASE, APART = 0x1000_0000_0000, 1 << 30
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = LIBC.mremap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
FINISHED = struct.pack("<I", 0x52535446)
EVENTS = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_UNMAP | Feature.EVENT_REMOVE


class Restored:
    """The process."""

    def __init__(self, pages: list[int]) -> None:
        self.uffd = Userfaultfd(features=EVENTS)
        self.regions = [
            mapped(BASE + number * APART, count * PAGE) for number, count in enumerate(pages)
        ]

    def begin(self, path: str, pid: int, zombies: list[int]) -> None:
        """Send the userfaultfd, register, and touch a page before the end of the restore."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(path)
        for zombie in zombies:
            self.sock.sendall(struct.pack("<i", -zombie))
        self.sock.sendall(struct.pack("<i", pid))
        rights = array.array("i", [self.uffd.fileno()])
        self.sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        for region in self.regions:
            self.uffd.register(region)
        # As CRIU does, so that the server has the only descriptor.
        self.uffd.close()

    def connect(self, path: str, pid: int, zombies: list[int]) -> None:
        """Do what CRIU does."""
        self.begin(path, pid, zombies)
        self.regions[0].read(0, 1)
        self.end()

    def end(self) -> None:
        """Say that the restore is finished."""
        self.sock.sendall(FINISHED)
        self.sock.close()

    def digest(self) -> list[str]:
        """Return a digest of each region."""
        return [region.digest("sha256").hex() for region in self.regions]

    def stamps(self, number: int = 0) -> list[int]:
        """Return the first eight bytes of each page."""
        region = self.regions[number]
        return [
            int.from_bytes(region.read(at, 8), "little") for at in range(0, region.length, PAGE)
        ]

    def page(self, number: int, page: int) -> int:
        """Return the first eight bytes of one page."""
        return int.from_bytes(self.regions[number].read(page * PAGE, 8), "little")

    def registered(self) -> int:
        """Return how many mappings are still registered."""
        with open("/proc/self/smaps", encoding="ascii") as smaps:
            return sum("um" in line.split() for line in smaps if line.startswith("VmFlags"))

    def fork(self) -> list[list[int]]:
        """Let a child, and then the parent, read everything; return what they see."""
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(there, json.dumps(self.stamps()).encode())
            os._exit(0)
        os.close(there)
        with open(here, "rb") as pipe:
            seen = json.loads(pipe.read())
        os.waitpid(child, 0)
        return [seen, self.stamps()]

    def change(self) -> dict[str, list[int]]:
        """Drop, unmap and move a quarter each of the first region; return what is seen."""
        region = self.regions[0]
        quarter = region.length // 4
        where = LIBC.mmap(None, quarter, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        region.madvise(mmap.MADV_DONTNEED, 0, quarter)
        assert LIBC.munmap(region.start + quarter, quarter) == 0
        moved = LIBC.mremap(region.start + 2 * quarter, quarter, quarter, MAYMOVE | FIXED, where)
        assert moved == where
        return {
            "dropped": stamps(region.start, quarter),
            "moved": stamps(where, quarter),
            "kept": stamps(region.start + 3 * quarter, quarter),
        }


def mapped(start: int, length: int) -> Region:
    """Map memory at this address, which is the same in every such process."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | FIXED_NOREPLACE
    assert LIBC.mmap(start, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == start
    return Region.at(start, length)


def stamps(start: int, length: int) -> list[int]:
    """Return the first eight bytes of each page; the handler is another process."""
    return [
        int.from_bytes(ctypes.string_at(at, 8), "little")
        for at in range(start, start + length, PAGE)
    ]


def main() -> None:
    """Run the commands from stdin."""
    process = Restored([int(word) for word in sys.argv[1:]])
    print(json.dumps([region.start for region in process.regions]), flush=True)
    for line in sys.stdin:
        name, *args = json.loads(line)
        do: Callable[..., Any] = getattr(process, name)
        print(json.dumps(do(*args)), flush=True)


if __name__ == "__main__":
    main()
