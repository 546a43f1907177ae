"""Which pages a process has, by PAGEMAP_SCAN.

The mark of a userfaultfd on a page that is not there looks as a page on swap does: a process whose
writes are tracked has many. So do the marks of guard pages, which stacks of threads have. They have
no content.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyuffd._abi import PageBit, PageCategory
from pyuffd._pages import PAGE_SIZE
from pyuffd.pagemap import PageRanges
from pyuffd.remote import Process

# Bits of a pagemap entry on swap: 5 of the type, then the offset. Types from 16 on are not swap
# files, and the mark has the offset 1, that of poison 2. Without CAP_SYS_ADMIN all of them are
# zero, and a mark is taken for a page on swap: to read one too many costs a page of zeros, to read
# none would lose one.
_FRAME = (1 << 55) - 1
_MARK = PageBit(1 << 4 | 1 << 5)
_NOT_IN_A_MARK = PageBit(_FRAME & ~0xF & ~_MARK)
_POISON = PageBit(1 << 4 | 1 << 6)
_NOT_IN_POISON = PageBit(_FRAME & ~0xF & ~_POISON)
_NO_BITS = PageBit(0)
_NOT_HIDDEN = PageBit(_FRAME) | PageBit.UFFD_WP | PageBit.GUARD_REGION | PageBit.PRESENT

_FILE = PageCategory.FILE
_NONE = PageCategory(0)

# The entries of a gap between two pages are read too, up to this many bytes: 512 entries.
_GAP = 512 * PAGE_SIZE


def present(process: Process, start: int, end: int) -> PageRanges:
    """Return the pages that are in memory, of files too."""
    scan = process.pagemap.scan
    length = end - start
    return scan(start, length, category_mask=PageCategory.PRESENT, return_mask=_NONE).ranges


def own(process: Process, start: int, end: int, *, any_will_do: bool = False) -> PageRanges:
    """Return the pages that are the process's own: anonymous, or copied on write.

    Args:
        process: The process.
        start: First address.
        end: The address behind the last.
        any_will_do: Return one of them, if there is one.
    """
    found = _of_no_file(process, start, end, PageCategory.PRESENT, most=int(any_will_do))
    if any_will_do and len(found):
        return found
    swapped = _of_no_file(process, start, end, PageCategory.SWAPPED)
    return found | (swapped - marks(process, swapped))


def _of_no_file(
    process: Process, start: int, end: int, category: PageCategory, most: int = 0
) -> PageRanges:
    """Return pages of a category that are not a file's, `most` of them; 0 is all."""
    return process.pagemap.scan(
        start,
        end - start,
        category_mask=_FILE | category,
        category_inverted=_FILE,
        return_mask=_NONE,
        max_pages=most,
    ).ranges


def marks(process: Process, swapped: PageRanges, *, doubtful: bool = False) -> PageRanges:
    """Return the pages that look as if they were on swap, but have no content.

    Args:
        process: The process.
        swapped: The pages.
        doubtful: Also those where the kernel hides what they are.
    """
    found = PageRanges.of([])
    for start, end in _windows(swapped):
        entries = process.pagemap.read(start, end - start)
        found |= entries.where(_MARK, clear=_NOT_IN_A_MARK)
        found |= entries.where(PageBit.GUARD_REGION)
        # The mark of a huge page.
        found |= entries.where(PageBit.UFFD_WP, clear=PageBit.PRESENT | PageBit.SWAP)
        if doubtful:
            found |= entries.where(PageBit.SWAP, clear=PageBit(_FRAME))
    return found & swapped


def _windows(pages: PageRanges) -> Iterator[tuple[int, int]]:
    """Yield ranges with all of some pages, and few others: reading an entry is cheap."""
    start = end = 0
    for part in pages:
        if part.start - end > _GAP:
            if end:
                yield start, end
            start = part.start
        end = part.end
    if end:
        yield start, end


def poisoned(process: Process, start: int, end: int) -> PageRanges:
    """Return the pages of shared memory that the process cannot read (UFFDIO_POISON).

    Those have marks too, and no page of shared memory looks as if it was on swap.
    """
    marked = _of_no_file(process, start, end, PageCategory.SWAPPED)
    found = PageRanges.of([])
    for part in marked:
        entries = process.pagemap.read(part.start, part.length)
        found |= entries.where(_POISON, clear=_NOT_IN_POISON)
        # An entry tells the kind of a mark neither for hugetlb pages nor without CAP_SYS_ADMIN.
        found |= entries.where(_NO_BITS, clear=_NOT_HIDDEN)
    return found


def first(process: Process, start: int, end: int) -> int | None:
    """Return the first page from an address on that is there, or has a mark."""
    found = process.pagemap.scan(
        start,
        end - start,
        category_anyof_mask=PageCategory.PRESENT | PageCategory.SWAPPED,
        return_mask=_NONE,
        max_pages=1,
    ).ranges
    return found[0].start if len(found) else None
