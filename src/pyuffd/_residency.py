"""Residency: where the content of each page of a mapping is (layer L2).

pagemap tells which pages are mapped; for the others this module asks the page cache and the file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from pyuffd import _vmas, lowlevel
from pyuffd._arguments import check_fd, check_int
from pyuffd._enums import Number
from pyuffd._errors import raise_errno
from pyuffd._owned import Descriptor
from pyuffd._pages import (
    HUGE_PAGE_1G,
    HUGE_PAGE_2M,
    PAGE_SIZE,
    RangeLike,
    check_page_size,
    check_range,
    page_size_of,
    resolve_range,
)
from pyuffd._rows import state_runs
from pyuffd.pagemap import Pagemap, PageRanges


class PageResidency(Number):
    """Where the content of a page is, as seen from one mapping of it.

    Attributes:
        HOLE: Nowhere: the page was never written, or it was dropped. It reads as zeros, or in a
            registered range causes a missing fault.
        SWAPPED: On swap (perhaps also in the swap cache), or for a file of a disk file system on
            disk.
        RESIDENT: In the page cache but not mapped: the next access maps it without I/O.
        MAPPED: Mapped by this mapping.
        PRIVATE: Mapped, and a copy of its own: a private file mapping that was written to.
        POISON: Poisoned (UFFDIO_POISON): an access raises SIGBUS.
        UNKNOWN: The kernel does not tell; see `residency`.
    """

    HOLE = 0
    SWAPPED = 1
    RESIDENT = 2
    MAPPED = 3
    PRIVATE = 4
    POISON = 5
    UNKNOWN = 6


class Residency:
    """The state of each page of a range.

    `numpy.asarray` of it is an array of shape (len,) and dtype uint8.

    Attributes:
        start: First address.
        page_size: Bytes of a page.
        states: One byte for each page, a value of `PageResidency`.
    """

    __slots__ = ("page_size", "start", "states")

    def __init__(self, start: int, page_size: int, states: bytes) -> None:
        self.start: int = start
        self.page_size: int = page_size
        self.states: bytes = states

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> PageResidency:
        return PageResidency(self.states[index])

    def __iter__(self) -> Iterator[PageResidency]:
        return map(PageResidency, self.states)

    def __repr__(self) -> str:
        counts = ", ".join(f"{state.name} {n}" for state, n in self.counts().items())
        return f"<Residency from {self.start:#x}, pages of {self.page_size:#x}: {counts}>"

    def count(self, state: PageResidency) -> int:
        """Return the number of pages in a state."""
        return self.states.count(check_int("state", state, 0, 256))

    def counts(self) -> dict[PageResidency, int]:
        """Return the number of pages in each state that occurs."""
        return {state: n for state in PageResidency if (n := self.count(state))}

    def where(self, state: PageResidency) -> PageRanges:
        """Return the runs of pages in a state; their `categories` are 0.

        GIL: released.
        """
        return PageRanges(
            state_runs(self.states, self.start, self.page_size, check_int("state", state, 0, 256))
        )

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self.states)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": (len(self),), "typestr": "|u1", "data": self.states}


def residency(
    range_or_start: RangeLike | int,
    length: int | None = None,
    *,
    page_size: int | None = None,
    fd: int | None = None,
) -> Residency:
    """Return where the content of each page of a range of this process's memory is.

    pagemap alone does not tell: a page of shared memory that is swapped out looks like a hole, and
    a write-protected page that is not mapped always looks like a swapped one.  So for pages that
    are not mapped this asks the page cache (mincore(2), cachestat(2)) and the file (SEEK_DATA).
    If a page moves during the call, its old or its new state may be returned.

    UNKNOWN are:

    - write-protected private pages that are not mapped (swapped or a hole), without CAP_SYS_ADMIN;
      a poisoned private page is then SWAPPED, and a poisoned shared page UNKNOWN;
    - hugetlb pages that are not mapped (resident or a hole), unless the file has either no page
      or all pages allocated, or unless all its allocated pages are mapped here;
    - file pages that are not mapped, if the caller can neither write the file nor owns it
      (mincore(2) then returns that all are resident), or if the file cannot be opened.

    Args:
        range_or_start: A range object, or an address; a multiple of the page size.
        length: Bytes, a multiple of the page size; with an address only.
        page_size: Page size of the mapping; None for that of the range object, else 4 KiB.
        fd: The mapped file; None for that of the range object. The file is opened again, so the
            position of `fd` does not change. Without an fd the mapping's own file is opened, which
            needs CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN).

    Raises:
        UffdOSError: ENOMEM - part of the range is not mapped.
        ValueError: a range that is not aligned, or an fd of another file.

    Kernel: before Linux 6.5 (no cachestat) shared pages on swap show as RESIDENT as long as they
        stay in the swap cache too.
    GIL: released, except while /proc/self/maps is read.
    Blocks: no.
    """
    if page_size is None:
        page_size = page_size_of(range_or_start)
    if fd is None:
        fd = getattr(range_or_start, "fd", None)
    else:
        check_fd("fd", fd)
    start, length = resolve_range(range_or_start, length)
    check_page_size(page_size)
    check_range(start, length, page_size)
    states = bytearray(length // page_size)
    at = start
    with Pagemap() as pagemap:
        for mapping in _mappings(start, start + length):
            if mapping.start != at:
                break
            first = (at - start) // page_size
            part = memoryview(states)[first : first + (mapping.end - at) // page_size]
            _fill(pagemap.fileno(), mapping, page_size, fd, part)
            at = mapping.end
    if at != start + length:
        raise_errno("residency", errno.ENOMEM, start, length, unmapped=at)
    return Residency(start, page_size, bytes(states))


class _Mapping(NamedTuple):
    """The part of one line of /proc/self/maps that lies in a range; offset is that part's."""

    start: int
    end: int
    shared: bool
    offset: int
    device: int
    inode: int
    name: str
    link: str


def _mappings(start: int, end: int) -> Iterator[_Mapping]:
    for vma in _vmas.overlapping(start, end):
        inside = max(vma.start, start)
        yield _Mapping(
            inside,
            min(vma.end, end),
            vma.shared,
            vma.offset + inside - vma.start,
            vma.device,
            vma.inode,
            vma.path,
            f"/proc/self/map_files/{vma.start:x}-{vma.end:x}",
        )


def _fill(
    pagemap_fd: int, mapping: _Mapping, page_size: int, fd: int | None, states: memoryview
) -> None:
    """Write the states of one mapping's pages to `states`."""
    length = mapping.end - mapping.start
    kind = lowlevel.MAPPING_SHARED if mapping.shared else 0
    if not mapping.device:
        lowlevel.pagemap_residency(
            pagemap_fd, mapping.start, length, page_size, states, mapping=kind
        )
        return
    file, status = _open_mapped(mapping, fd)
    with file:
        huge = page_size != PAGE_SIZE
        if status is None or stat.S_ISREG(status.st_mode):  # treat /dev/zero as anonymous
            kind |= lowlevel.MAPPING_FILE
            huge |= status is not None and status.st_blksize in (HUGE_PAGE_2M, HUGE_PAGE_1G)
            if not huge:
                kind |= lowlevel.MAPPING_SEEK if status is not None else 0
                if _mincore_is_true(mapping, status, file.number):
                    kind |= lowlevel.MAPPING_MINCORE
        lowlevel.pagemap_residency(
            pagemap_fd,
            mapping.start,
            length,
            page_size,
            states,
            file_fd=file.number,
            offset=mapping.offset,
            mapping=kind,
        )
        if huge and status is not None:
            _decide_huge(mapping, status, page_size, states)


def _open_mapped(mapping: _Mapping, fd: int | None) -> tuple[Descriptor, os.stat_result | None]:
    """Open the mapped file again, to leave other positions alone; an empty one if refused."""
    path = mapping.link
    if fd is not None:
        if not _is_mapped(os.fstat(fd), mapping):
            raise ValueError(f"fd {fd} is not the file that is mapped at {mapping.start:#x}")
        path = f"/proc/self/fd/{fd}"
    try:
        file = Descriptor.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return Descriptor(), None
    return file, os.fstat(file.number)


def _is_mapped(status: os.stat_result, mapping: _Mapping) -> bool:
    """Compare inode and device; on btrfs the device in maps differs from that of stat(2)."""
    if (status.st_dev, status.st_ino) == (mapping.device, mapping.inode):
        return True
    try:
        return os.path.samestat(status, os.stat(mapping.link))
    except OSError:
        return status.st_ino == mapping.inode


def cached_states(pagemap_fd: int, start: int, length: int, fd: int, offset: int) -> bytes:
    """Return the states of a mapping's pages that the caller has just made of a file, MAP_SHARED.

    As `residency` does, without a look at /proc/self/maps. It moves the position of `fd`.
    """
    status = os.fstat(fd)
    kind = lowlevel.MAPPING_SHARED | lowlevel.MAPPING_FILE
    if status.st_blksize not in (HUGE_PAGE_2M, HUGE_PAGE_1G):
        kind |= lowlevel.MAPPING_SEEK
        kind |= lowlevel.MAPPING_MINCORE if _is_true_of(status, fd) else 0
    states = bytearray(length // PAGE_SIZE)
    lowlevel.pagemap_residency(
        pagemap_fd,
        start,
        length,
        PAGE_SIZE,
        memoryview(states),
        file_fd=fd,
        offset=offset,
        mapping=kind,
    )
    return bytes(states)


def _mincore_is_true(mapping: _Mapping, status: os.stat_result | None, file_fd: int) -> bool:
    """Return whether mincore(2) tells the truth: the caller owns the file or can write it."""
    if status is None:
        return mapping.name.startswith("/dev/zero")  # MAP_SHARED|MAP_ANONYMOUS: the caller's
    return _is_true_of(status, file_fd)


def _is_true_of(status: os.stat_result, file_fd: int) -> bool:
    return status.st_uid == os.geteuid() or os.access(
        f"/proc/self/fd/{file_fd}", os.W_OK, effective_ids=True
    )


def _decide_huge(
    mapping: _Mapping, status: os.stat_result, page_size: int, states: memoryview
) -> None:
    """Decide UNKNOWN pages of a hugetlb file, which has no SEEK_DATA, by its allocated size."""
    allocated = status.st_blocks * 512
    mapped = bytes(states).count(PageResidency.MAPPED) * page_size
    if allocated <= (mapped if mapping.shared else 0):
        state = PageResidency.HOLE
    elif allocated >= status.st_size:
        state = PageResidency.RESIDENT
    else:
        return
    states[:] = bytes(states).replace(bytes([PageResidency.UNKNOWN]), bytes([state]))
