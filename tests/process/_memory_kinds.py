"""Memory of all kinds with each page in a known state, which a snapshot must show.

States, one letter per page: d content, z zeros, a absent (the process has no copy), l unknown. The
states in a snapshot do not depend on the method.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass

from pyuffd import Feature, Region, RegisterMode, RunState, Snapshot, Userfaultfd
from pyuffd.testing import swap_out
from tests._memory import PAGE

HUGE = 2 << 20
SHARED, PRIVATE, NORESERVE = mmap.MAP_SHARED, mmap.MAP_PRIVATE, 0x4000
ANONYMOUS, HUGETLB = mmap.MAP_ANONYMOUS, 0x40000
MFD_HUGETLB = 4
SHM_HUGETLB, SHM_NORESERVE = 0o4000, 0o10000
CLONE_NEWIPC = 0x08000000
MADV_DONTDUMP, MADV_GUARD_INSTALL, MADV_HUGEPAGE = 16, 102, 14
READ, WRITE = 1, 2
STATES = {"d": RunState.DATA, "z": RunState.ZERO, "a": RunState.ABSENT, "l": RunState.LOST}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.shmat.restype = ctypes.c_void_p
_kept: list[object] = []  # descriptors that stay open until the process ends


@dataclass(frozen=True)
class Kind:
    """Memory at an address; `content` is the byte that fills each page."""

    name: str
    start: int
    unit: int
    states: str
    content: list[int]
    has_file: bool = False

    @property
    def length(self) -> int:
        return len(self.states) * self.unit


def _called(function: str, *arguments: int) -> int:
    result = getattr(_libc, function)(*map(ctypes.c_size_t, arguments))
    if result in (-1, None, (1 << 64) - 1):
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return int(result)


def mapped(pages: int, flags: int, fd: int = -1, offset: int = 0, unit: int = PAGE) -> int:
    """Map memory; -1 as a descriptor needs ANONYMOUS."""
    every = (1 << 64) - 1
    return _called("mmap", 0, pages * unit, READ | WRITE, flags, fd & every, offset)


def fill(start: int, page: int, byte: int, unit: int = PAGE) -> None:
    ctypes.memset(start + page * unit, byte, unit)


def look(start: int, page: int) -> None:
    assert ctypes.c_char.from_address(start + page * PAGE).value == b"\0"


def in_another_process(write: Callable[[], None]) -> None:
    if not (pid := os.fork()):
        write()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def anonymous() -> Iterator[Kind]:
    start = mapped(4, PRIVATE | ANONYMOUS)
    fill(start, 0, 1)
    look(start, 1)
    fill(start, 2, 0)
    yield Kind("anonymous", start, PAGE, "dzza", [1, 0, 0, 0])

    start = mapped(3, PRIVATE | ANONYMOUS)
    fill(start, 0, 2)
    fill(start, 1, 3)
    _called("mprotect", start, 3 * PAGE, 0)
    yield Kind("without access", start, PAGE, "dda", [2, 3, 0])

    start = mapped(2, PRIVATE | ANONYMOUS)
    fill(start, 0, 4)
    _called("madvise", start, 2 * PAGE, MADV_DONTDUMP)
    yield Kind("not to be dumped", start, PAGE, "da", [4, 0])

    start = mapped(2, PRIVATE | ANONYMOUS)
    fill(start, 0, 5)
    _called("mlock", start, 2 * PAGE)
    yield Kind("locked", start, PAGE, "dz", [5, 0])

    start = mapped(2, PRIVATE | ANONYMOUS, unit=2 * HUGE)
    aligned = -(-start // HUGE) * HUGE
    _called("madvise", aligned, 2 * HUGE, MADV_HUGEPAGE)
    ctypes.memset(aligned, 6, 2 * HUGE)
    yield Kind("transparent huge", aligned, HUGE, "dd", [6, 6])

    start = mapped(3, PRIVATE | ANONYMOUS)
    fill(start, 0, 7)
    with_guard = Kind("guard pages", start, PAGE, "daa", [7, 0, 0])
    try:
        _called("madvise", start + PAGE, PAGE, MADV_GUARD_INSTALL)
    except OSError:
        return  # before Linux 6.13
    yield with_guard


def swapped() -> Iterator[Kind]:
    start = mapped(3, PRIVATE | ANONYMOUS)
    fill(start, 0, 8)
    fill(start, 1, 9)
    swap_out(Region.at(start, 2 * PAGE))
    yield Kind("on swap", start, PAGE, "dda", [8, 9, 0])


def poisoned() -> Iterator[Kind]:
    for name, flags in (("poisoned", PRIVATE), ("poisoned, shared", SHARED)):
        start = mapped(3, flags | ANONYMOUS)
        fill(start, 0, 10)
        with Userfaultfd(features=Feature.POISON) as uffd:
            region = Region.at(start, 3 * PAGE)
            uffd.register(region, mode=RegisterMode.MISSING)
            uffd.poison(start + PAGE, PAGE)
        states = "dla" if flags == PRIVATE else "dlz"
        yield Kind(name, start, PAGE, states, [10, 0, 0])


def zero_device() -> Iterator[Kind]:
    """Map /dev/zero privately, which gives memory without a file."""
    fd = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
    start = mapped(3, PRIVATE, fd)
    fill(start, 0, 26)
    look(start, 1)
    yield Kind("/dev/zero, private", start, PAGE, "dza", [26, 0, 0])
    start = mapped(2, SHARED, fd)
    fill(start, 0, 27)
    yield Kind("/dev/zero, shared", start, PAGE, "dz", [27, 0], True)


def memfds() -> Iterator[Kind]:
    fd = os.memfd_create("kinds")
    os.ftruncate(fd, 4 * PAGE)
    os.pwrite(fd, bytes([12]) * PAGE, PAGE)
    start = mapped(5, SHARED, fd)
    fill(start, 0, 11)
    look(start, 3)
    yield Kind("memfd", start, PAGE, "ddzzl", [11, 12, 0, 0, 0], True)
    start = mapped(2, SHARED, fd, PAGE)
    yield Kind("a part of a memfd, again", start, PAGE, "dz", [12, 0], True)
    start = mapped(5, PRIVATE, fd)
    ctypes.c_char.from_address(start + PAGE).value  # noqa: B018
    fill(start, 0, 13)
    yield Kind("memfd, private", start, PAGE, "ddzzl", [13, 12, 0, 0, 0], True)


def shared() -> Iterator[Kind]:
    start = mapped(3, SHARED | ANONYMOUS)
    fill(start, 0, 14)
    in_another_process(lambda: fill(start, 1, 15))
    yield Kind("shared, anonymous", start, PAGE, "ddz", [14, 15, 0], True)
    # The first segment of a namespace has the inode 0, like memory without a file.
    with suppress(OSError):
        _called("unshare", CLONE_NEWIPC)
    for name in ("System V, first", "System V"):
        start = segment(2 * PAGE)
        fill(start, 0, 16)
        yield Kind(name, start, PAGE, "dz", [16, 0], True)


def segment(length: int, flags: int = 0) -> int:
    """Return the address of System V shared memory, which is removed when the process ends."""
    number = _called("shmget", 0, length, 0o1600 | flags)
    start = _called("shmat", number, 0, 0)
    _called("shmctl", number, 0, 0)
    return start


def waiting() -> Iterator[Kind]:
    """Map memory whose reads would wait for a handler, although there is none."""
    fd = os.memfd_create("waiting")
    os.ftruncate(fd, 3 * PAGE)
    os.pwrite(fd, bytes([18]) * PAGE, PAGE)
    start = mapped(3, SHARED, fd)
    fill(start, 0, 17)
    uffd = Userfaultfd(features=Feature.MISSING_SHMEM | Feature.MINOR_SHMEM)
    uffd.register(Region.at(start, 3 * PAGE), mode=RegisterMode.MISSING | RegisterMode.MINOR)
    _kept.append(uffd)
    yield Kind("shared, and lazily filled", start, PAGE, "ddl", [17, 18, 0], True)


def files(folder: str) -> Iterator[Kind]:
    for name, flags, states in (
        ("file, private", PRIVATE, "ddzl"),
        ("file, shared", SHARED, "ddzl"),
    ):
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.pwrite(file.fileno(), bytes([20]) * PAGE, PAGE)
            os.ftruncate(file.fileno(), 3 * PAGE)
            start = mapped(4, flags, file.fileno())
            fill(start, 0, 19)
            yield Kind(name, start, PAGE, states, [19, 20, 0, 0], True)


def huge() -> Iterator[Kind]:
    start = mapped(2, PRIVATE | ANONYMOUS | HUGETLB | NORESERVE, unit=HUGE)
    fill(start, 0, 21, HUGE)
    yield Kind("hugetlb", start, HUGE, "da", [21, 0])
    start = segment(2 * HUGE, SHM_HUGETLB | SHM_NORESERVE)
    fill(start, 0, 25, HUGE)
    yield Kind("System V, huge", start, HUGE, "dz", [25, 0], True)
    fd = os.memfd_create("huge", MFD_HUGETLB)
    os.ftruncate(fd, 4 * HUGE)
    start = mapped(4, SHARED | NORESERVE, fd, unit=HUGE)
    fill(start, 0, 22, HUGE)
    in_another_process(lambda: fill(start, 1, 23, HUGE))
    yield Kind("hugetlb, shared", start, HUGE, "ddzz", [22, 23, 0, 0], True)
    start = mapped(2, SHARED | NORESERVE, fd, HUGE, HUGE)
    yield Kind("a part of it, again", start, HUGE, "dz", [23, 0], True)
    start = mapped(2, PRIVATE | NORESERVE, fd, HUGE, HUGE)
    fill(start, 1, 24, HUGE)
    yield Kind("hugetlb memfd, private", start, HUGE, "dd", [23, 24], True)


def made(folder: str, *, with_huge: bool, with_swap: bool) -> list[Kind]:
    """Map memory of all kinds in this process."""
    makers = [anonymous(), zero_device(), memfds(), shared(), waiting(), files(folder), poisoned()]
    if with_huge:
        makers.append(huge())
    if with_swap:
        makers.append(swapped())
    return [kind for maker in makers for kind in maker]


def check(snapshot: Snapshot, kinds: list[Kind]) -> list[str]:
    """Return what is wrong in a snapshot."""
    wrong = []
    for kind in kinds:
        found = ""
        for index, state in enumerate(kind.states):
            at = kind.start + index * kind.unit
            # The last page of a huge page is in the same state as its first.
            seen = {snapshot.state(at), snapshot.state(at + kind.unit - PAGE)}
            found += next((x for x, one in STATES.items() if seen == {one}), "?")
            expected: bytes | None = bytes([kind.content[index]]) * kind.unit
            if state == "l" or (state == "a" and kind.has_file):
                expected = None
            try:
                content: bytes | None = snapshot.read(at, kind.unit)
            except LookupError:
                content = None
            if content != expected:
                wrong.append(f"{kind.name}: the content of page {index}")
        if found != kind.states:
            wrong.append(f"{kind.name}: {found} instead of {kind.states}")
    return wrong


def main(folder: str, with_huge: str, with_swap: str) -> None:
    """Map the memory, print where it is, and wait."""
    kinds = made(folder, with_huge=with_huge == "1", with_swap=with_swap == "1")
    print(json.dumps([asdict(kind) for kind in kinds]), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
