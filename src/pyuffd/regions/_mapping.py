"""The description of one mapping, and mmap(2) with alignment and hints."""

from __future__ import annotations

import errno
import mmap
from dataclasses import dataclass, field, replace
from math import ceil
from typing import NoReturn

from pyuffd import _machine
from pyuffd._arguments import check_int
from pyuffd._enums import Word
from pyuffd._errors import UffdOSError, raise_errno
from pyuffd._owned import Descriptor, FileName, MappedMemory
from pyuffd._pages import HUGE_PAGE_2M, PAGE_SIZE, round_up

PROT_NONE = 0  # not in the mmap module
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
ADDRESS_SPACE = 1 << 56  # user addresses with five levels of page tables
ALIGN_TRIES = 8  # a try fails only if another thread maps into the gap at that moment


class RegionKind(Word):
    """The kind of memory of a region. `Region.page_size` tells huge pages from base pages.

    Attributes:
        ANONYMOUS: Private memory with no file (`Region.anonymous`).
        MEMFD: A memfd, made here (`Region.memfd`) or received.
        SHM: POSIX shared memory (`Region.shm`).
        HUGETLBFS: A file on a hugetlbfs mount (`Region.hugetlbfs`).
        FILE: Any other file (`Region.file`).
        ADDRESS: Memory that other code mapped (`Region.at`), or where a restore has mapped its
            content (`Snapshot.restore` with mode "map" or "minor").
    """

    ANONYMOUS = "anonymous"
    MEMFD = "memfd"
    SHM = "shm"
    HUGETLBFS = "hugetlbfs"
    FILE = "file"
    ADDRESS = "address"


@dataclass(frozen=True, slots=True)
class Mapping:
    """One range of the address space, with the owners of its memory, its file and its name.

    All three owners are empty for memory that other code mapped.
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
        """The descriptor of its file, or None."""
        return self.file.number if self.file.is_open else None

    @property
    def span(self) -> tuple[int, int]:
        """The first address, and the one behind the last."""
        return self.start, self.start + self.length

    def part(self, offset: int, length: int) -> Mapping:
        """Return the description of a part, which owns no memory and shares file and name."""
        return replace(
            self,
            start=self.start + offset,
            length=length,
            offset=self.offset + offset,
            memory=MappedMemory(),
        )

    def without_memory(self) -> Mapping:
        """Return a copy that does not own the memory, which its other owners keep mapped."""
        return replace(self, memory=MappedMemory())

    def close(self) -> None:
        """Close all three, even if closing one of them raises; may be called again."""
        with self.file, self.name, self.memory:
            pass


def check_length(length: int, page_size: int) -> None:
    """Raise ValueError unless `length` is a positive multiple of the page size."""
    check_int("length", length)
    if length <= 0:
        raise ValueError(f"length {length:#x} must be above zero")
    if length >= ADDRESS_SPACE:
        raise ValueError(f"length {length:#x} is larger than the address space")
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
    """mmap(2), aligned so that transparent huge pages fit; an error's hint names what ran out."""
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
    """Map with address and file offset equal modulo 2 MiB, as huge pages require."""
    shift = offset % HUGE_PAGE_2M
    nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    for _ in range(ALIGN_TRIES):
        with MappedMemory.map(length + 2 * HUGE_PAGE_2M, PROT_NONE, nothing) as gap:
            # A hint, not MAP_FIXED: another thread may map into the gap first.
            wanted = round_up(gap.start, HUGE_PAGE_2M) + shift
        with MappedMemory.map(length, prot, flags, fd, offset, wanted) as memory:
            if memory.start % HUGE_PAGE_2M == shift:
                return memory.moved()
    return MappedMemory.map(length, prot, flags, fd, offset)
