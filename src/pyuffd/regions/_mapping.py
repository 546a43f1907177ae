"""What one mapping is, and how it gets its place in the address space."""

from __future__ import annotations

import errno
import mmap
from dataclasses import dataclass
from math import ceil
from typing import NoReturn

from pyuffd import _machine, _memory
from pyuffd._enums import Word
from pyuffd._errors import UffdOSError, raise_errno
from pyuffd._pages import HUGE_PAGE_2M, PAGE_SIZE, round_up

PROT_NONE = 0  # not in the mmap module
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
ADDRESS_SPACE = 1 << 56  # user addresses with five levels of page tables
ALIGN_TRIES = 8  # each fails only if another thread maps into the gap at that very moment


class RegionKind(Word):
    """What is behind a region; `Region.page_size` tells huge pages from base pages.

    Attributes:
        ANONYMOUS: Private memory with no file (`Region.anonymous`).
        MEMFD: A memfd, made here (`Region.memfd`) or received.
        SHM: POSIX shared memory (`Region.shm`).
        HUGETLBFS: A file on a hugetlbfs mount (`Region.hugetlbfs`).
        FILE: Any other file (`Region.file`).
        ADDRESS: Memory that somebody else mapped (`Region.at`).
    """

    ANONYMOUS = "anonymous"
    MEMFD = "memfd"
    SHM = "shm"
    HUGETLBFS = "hugetlbfs"
    FILE = "file"
    ADDRESS = "address"


@dataclass(frozen=True, slots=True)
class Mapping:
    """One range of the address space; `fd` belongs to it, and `unlink` is removed at its end."""

    start: int
    length: int
    page_size: int
    kind: RegionKind
    fd: int | None
    shared: bool
    writable: bool
    offset: int = 0
    noreserve: bool = False
    owned: bool = True
    unlink: str | None = None


def check_length(length: int, page_size: int) -> None:
    """Raise ValueError unless `length` is a positive multiple of the page size."""
    if length <= 0:
        raise ValueError(f"length {length:#x} must be above zero")
    if length >= ADDRESS_SPACE:
        raise ValueError(f"length {length:#x} is more than an address space")
    if length % page_size:
        raise ValueError(f"length {length:#x} is not a multiple of the page size {page_size:#x}")


def map_memory(
    length: int,
    page_size: int,
    flags: int,
    *,
    prot: int = READ_WRITE,
    fd: int = -1,
    offset: int = 0,
) -> int:
    """mmap(2), aligned so that transparent huge pages fit; say what there is too little of."""
    try:
        if page_size == PAGE_SIZE and length >= HUGE_PAGE_2M:
            return _map_aligned(length, prot, flags, fd, offset)
        return _memory.mmap(length, prot, flags, fd, offset)
    except UffdOSError as error:
        if error.errno == errno.EAGAIN:
            raise_errno("mmap", errno.EAGAIN, None, length, hint=_machine.why_locked())
        if error.errno != errno.ENOMEM:
            raise
        if page_size > PAGE_SIZE:
            _raise_shortage(length, page_size, fd)
        private = bool(flags & mmap.MAP_PRIVATE and prot & mmap.PROT_WRITE)
        accounted = private and not flags & _machine.MAP_NORESERVE
        hint = _machine.why_no_memory(length, accounted=accounted)
        raise_errno("mmap", errno.ENOMEM, None, length, hint=hint)


def _raise_shortage(length: int, page_size: int, fd: int) -> NoReturn:
    needed = ceil(length / page_size)
    raise_errno(
        "mmap",
        errno.ENOMEM,
        None,
        length,
        hint=_machine.shortage(page_size, needed, fd),
        page_size=page_size,
        needed_pages=needed,
        free_pages=_machine.free_pages(page_size),
    )


def _map_aligned(length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    """Map so that address and file offset are equal modulo 2 MiB, as a huge page needs it."""
    shift = offset % HUGE_PAGE_2M
    nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    for _ in range(ALIGN_TRIES):
        gap = _memory.mmap(length + 2 * HUGE_PAGE_2M, PROT_NONE, nothing)
        _memory.munmap(gap, length + 2 * HUGE_PAGE_2M)
        # A hint, not MAP_FIXED: whoever takes the gap first keeps it.
        wanted = round_up(gap, HUGE_PAGE_2M) + shift
        start = _memory.mmap(length, prot, flags, fd, offset, wanted)
        if start % HUGE_PAGE_2M == shift:
            return start
        _memory.munmap(start, length)
    return _memory.mmap(length, prot, flags, fd, offset)
