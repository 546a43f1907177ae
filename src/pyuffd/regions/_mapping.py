"""What one mapping is, and how it gets its place in the address space."""

from __future__ import annotations

import errno
import mmap
from dataclasses import dataclass, field, replace
from math import ceil
from typing import NoReturn

from pyuffd import _machine
from pyuffd._enums import Word
from pyuffd._errors import UffdOSError, raise_errno
from pyuffd._owned import Descriptor, FileName, MappedMemory
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
    """One range of the address space, and what ends with it: its memory, its file, its name.

    Of memory that somebody else mapped all three are empty.
    """

    start: int
    length: int
    page_size: int
    kind: RegionKind
    shared: bool
    writable: bool
    offset: int = 0
    noreserve: bool = False
    memory: MappedMemory = field(default_factory=MappedMemory)
    file: Descriptor = field(default_factory=Descriptor)
    name: FileName = field(default_factory=FileName)

    @property
    def fd(self) -> int | None:
        """The descriptor of the file behind it, or None."""
        return self.file.number if self.file.is_open else None

    def without_memory(self) -> Mapping:
        """Return the same without the memory, which stays mapped while others refer to it."""
        return replace(self, memory=MappedMemory())

    def close(self) -> None:
        """End all three, whatever one of them raises; again without complaint."""
        with self.file, self.name, self.memory:
            pass


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
) -> MappedMemory:
    """mmap(2), aligned so that transparent huge pages fit; say what there is too little of."""
    try:
        if page_size == PAGE_SIZE and length >= HUGE_PAGE_2M:
            return _map_aligned(length, prot, flags, fd, offset)
        return MappedMemory.map(length, prot, flags, fd, offset)
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


def _map_aligned(length: int, prot: int, flags: int, fd: int, offset: int) -> MappedMemory:
    """Map so that address and file offset are equal modulo 2 MiB, as a huge page needs it."""
    shift = offset % HUGE_PAGE_2M
    nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    for _ in range(ALIGN_TRIES):
        with MappedMemory.map(length + 2 * HUGE_PAGE_2M, PROT_NONE, nothing) as gap:
            # A hint, not MAP_FIXED: whoever takes the gap first keeps it.
            wanted = round_up(gap.start, HUGE_PAGE_2M) + shift
        with MappedMemory.map(length, prot, flags, fd, offset, wanted) as memory:
            if memory.start % HUGE_PAGE_2M == shift:
                return memory.moved()
    return MappedMemory.map(length, prot, flags, fd, offset)
