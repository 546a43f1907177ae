"""Which pages a process has, by PAGEMAP_SCAN.

The mark of a userfaultfd on a page that is not there looks as a page on swap does: a process whose
writes are tracked has many. They have no content.
"""

from __future__ import annotations

from pyuffd._abi import PageBit, PageCategory
from pyuffd.pagemap import PageRanges
from pyuffd.remote import Process

# Bits of a pagemap entry on swap: 5 of the type, then the offset. Types from 16 on are not swap
# files, and the mark has the offset 1. Without CAP_SYS_ADMIN all of them are zero, and a mark is
# taken for a page on swap: to read one too many costs a page of zeros, to read none would lose one.
_FRAME = (1 << 55) - 1
_MARK = PageBit(1 << 4 | 1 << 5)
_NOT_IN_A_MARK = PageBit(_FRAME & ~0xF & ~_MARK)

_FILE = PageCategory.FILE
_NONE = PageCategory(0)


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
    scan = process.pagemap.scan
    found = scan(
        start,
        end - start,
        category_mask=_FILE | PageCategory.PRESENT,
        category_inverted=_FILE,
        return_mask=_NONE,
        max_pages=int(any_will_do),
    ).ranges
    if any_will_do and len(found):
        return found
    swapped = scan(
        start,
        end - start,
        category_mask=_FILE | PageCategory.SWAPPED,
        category_inverted=_FILE,
        return_mask=_NONE,
    ).ranges
    return found | (swapped - marks(process, swapped))


def marks(process: Process, swapped: PageRanges) -> PageRanges:
    """Return the pages that are not on swap, though they look so: they have a mark."""
    found = PageRanges.of([])
    for part in swapped:
        entries = process.pagemap.read(part.start, part.length)
        found |= entries.where(_MARK, clear=_NOT_IN_A_MARK)
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
