"""Residency: where the content of each page of a mapping is (layer L2).

pagemap says what is mapped; for the rest this module asks the page cache and the file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from pyuffd import _vmas, lowlevel
from pyuffd._enums import Number
from pyuffd._errors import raise_errno
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
from pyuffd.pagemap import Pagemap, PageRanges


class PageResidency(Number):
    """Where the content of a page is, as seen from one mapping of it.

    Attributes:
        HOLE: Nowhere: never written, or dropped. It reads as zeros (or is missing, where
            registered).
        SWAPPED: On swap (and perhaps in the swap cache still), or on disk for a file of a disk
            filesystem.
        RESIDENT: In the page cache, but not mapped here: the next access maps it without reading
            it in.
        MAPPED: Mapped here.
        PRIVATE: Mapped here, and a copy of its own: a private file mapping that was written to.
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
    """The state of each page of a range, one byte each in `states` (values of PageResidency)."""

    __slots__ = ("page_size", "start", "states")

    def __init__(self, start: int, page_size: int, states: bytes) -> None:
        self.start = start
        self.page_size = page_size
        self.states = states

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
        return self.states.count(state)

    def counts(self) -> dict[PageResidency, int]:
        """Return the number of pages in each state that occurs."""
        return {state: n for state in PageResidency if (n := self.count(state))}

    def where(self, state: PageResidency) -> PageRanges:
        """Return the runs of pages in a state; their `categories` are 0.

        GIL: released.
        """
        return PageRanges(
            lowlevel.pagemap_state_runs(self.states, self.start, self.page_size, state)
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
    """Tell for each page of this process's memory where its content is.

    pagemap alone cannot: a page of shared memory that is swapped out looks like a hole, and a
    write-protected one like a swapped one wherever it is.  So pages that are not mapped are asked
    for at the page cache (mincore(2), cachestat(2)) and the file (SEEK_DATA).  It is a picture of
    a moment: pages that move meanwhile may be told by their old or new state.

    What the kernel does not tell is UNKNOWN:
    - write-protected private pages that are not mapped (swapped or a hole), without CAP_SYS_ADMIN;
      a poisoned private page shows as SWAPPED then, a poisoned shared one as UNKNOWN;
    - hugetlb pages that are not mapped (resident or a hole), unless the file has either no page
      or all of them allocated, or all of those it has are mapped here;
    - file pages that are not mapped, if the caller may not write the file nor owns it (mincore(2)
      then claims that all are resident) or if the file cannot be opened.

    Args:
        range_or_start: A range object, or an address; a multiple of the page size.
        length: Bytes, a multiple of the page size; with an address only.
        page_size: Page size of the mapping; None for that of the range object, else 4 KiB.
        fd: The file mapped there; None for that of the range object. It is opened a second time
            and its position left alone. Without one the mapping's own file is opened, which
            needs CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN).

    Raises:
        UffdOSError: ENOMEM - part of the range is not mapped.
        ValueError: a range that is not aligned, or an fd of another file.

    Kernel: before Linux 6.5 (no cachestat) shared pages on swap show as RESIDENT as long as they
        stay in the swap cache too.
    GIL: released, but for reading /proc/self/maps.
    Blocks: no.
    """
    if page_size is None:
        page_size = page_size_of(range_or_start)
    if fd is None:
        fd = getattr(range_or_start, "fd", None)
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
    if not mapping.inode:
        lowlevel.pagemap_residency(
            pagemap_fd, mapping.start, length, page_size, states, mapping=kind
        )
        return
    file_fd, status = _open_mapped(mapping, fd)
    try:
        huge = page_size != PAGE_SIZE
        if status is None or stat.S_ISREG(status.st_mode):  # /dev/zero is as good as anonymous
            kind |= lowlevel.MAPPING_FILE
            huge |= status is not None and status.st_blksize in (HUGE_PAGE_2M, HUGE_PAGE_1G)
            if not huge:
                kind |= lowlevel.MAPPING_SEEK if status is not None else 0
                if _mincore_is_true(mapping, status, file_fd):
                    kind |= lowlevel.MAPPING_MINCORE
        lowlevel.pagemap_residency(
            pagemap_fd,
            mapping.start,
            length,
            page_size,
            states,
            file_fd=file_fd,
            offset=mapping.offset,
            mapping=kind,
        )
        if huge and status is not None:
            _decide_huge(mapping, status, page_size, states)
    finally:
        if file_fd >= 0:
            os.close(file_fd)


def _open_mapped(mapping: _Mapping, fd: int | None) -> tuple[int, os.stat_result | None]:
    """Open the mapped file anew, so that seeking moves nobody's position; (-1, None) if refused."""
    path = mapping.link
    if fd is not None:
        if not _is_mapped(os.fstat(fd), mapping):
            raise ValueError(f"fd {fd} is not the file that is mapped at {mapping.start:#x}")
        path = f"/proc/self/fd/{fd}"
    try:
        file_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1, None
    return file_fd, os.fstat(file_fd)


def _is_mapped(status: os.stat_result, mapping: _Mapping) -> bool:
    """Compare inodes, and devices where maps shows the one that stat does (btrfs: another)."""
    if (status.st_dev, status.st_ino) == (mapping.device, mapping.inode):
        return True
    try:
        return os.path.samestat(status, os.stat(mapping.link))
    except OSError:
        return status.st_ino == mapping.inode


def _mincore_is_true(mapping: _Mapping, status: os.stat_result | None, file_fd: int) -> bool:
    """mincore(2) answers only who may write the file or owns it; to others all is resident."""
    if status is None:
        return mapping.name.startswith("/dev/zero")  # MAP_SHARED|MAP_ANONYMOUS: its maker's
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
