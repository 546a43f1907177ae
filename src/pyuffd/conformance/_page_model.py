"""What operations and events do to one page: the rules that crossings are checked against (L5).

The model of a page has three parts: what its page table entry leads to, whether userfaultfd
protects it, and what the file behind it holds.  Each rule is a rule of the kernel, named after its
functions.  A rule that says that nothing happens is an expectation too.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from enum import Enum

from pyuffd.testing._memory_types import MemoryType

OK = (0, 1)  # errno, and pages done


class Entry(Enum):
    """What the page table has for a page."""

    NONE = "none"
    PAGE = "a page"
    ZERO = "the zero page"
    MARKER = "a marker"
    POISON = "poison"
    SWAP = "a swap entry"
    GUARD = "a guard"


# Entries that have content, and entries that fail every access.
FULL = (Entry.PAGE, Entry.ZERO, Entry.SWAP)
CLOSED = (Entry.POISON, Entry.GUARD)


@dataclass(frozen=True)
class Page:
    """One page of a registered range.

    Attributes:
        entry: The page table entry.
        value: The byte that fills the memory or swap slot behind the entry.
        wp: Whether it is write-protected by userfaultfd; a MARKER always is.
        cache: The byte that fills the file's page; None for a hole, or if there is no file.
        registered: Whether the range is registered.
    """

    entry: Entry = Entry.NONE
    value: int | None = None
    wp: bool = False
    cache: int | None = None
    registered: bool = True

    @property
    def content(self) -> int:
        """The byte that a read returns once its faults are resolved."""
        if self.entry in FULL:
            assert self.value is not None
            return self.value
        return self.cache or 0

    @property
    def is_missing(self) -> bool:
        """Whether an access finds no content, neither through the entry nor in the file."""
        return self.entry in (Entry.NONE, Entry.MARKER) and self.cache is None


# The result of an ioctl: errno, result in pages (or -errno), and the page afterwards.
Answer = tuple[int, int, Page]


def _refused(code: int, page: Page) -> Answer:
    return code, -code, page


def _mapped(page: Page, memory: MemoryType, value: int, *, wp: bool) -> Page:
    cache = value if memory.shared else page.cache
    return replace(page, entry=Entry.PAGE, value=value, wp=wp, cache=cache)


def copy(page: Page, memory: MemoryType, value: int, *, wp: bool = False) -> Answer:
    """COPY fills a hole, a marker, poison or a guard; a shared file must lack the page too."""
    if page.entry in FULL or (memory.shared and page.cache is not None):
        return _refused(errno.EEXIST, page)
    return 0, 1, _mapped(page, memory, value, wp=wp)


def zeropage(page: Page, memory: MemoryType) -> Answer:
    """ZEROPAGE fills a shared file's page with zeros, as COPY would; else maps the zero page."""
    if memory.is_hugetlb:
        return _refused(errno.EINVAL, page)
    if memory.shared:
        return copy(page, memory, 0)
    if page.entry is not Entry.NONE:
        return _refused(errno.EEXIST, page)
    return 0, 1, replace(page, entry=Entry.ZERO, value=0, wp=False)


def continue_(page: Page, memory: MemoryType, *, wp: bool = False) -> Answer:
    """CONTINUE maps the file's page where COPY could copy; EFAULT if the file has none."""
    if memory.is_anon:
        return _refused(errno.EINVAL, page)
    if page.cache is None:
        return _refused(errno.EFAULT, page)
    if page.entry in FULL:
        return _refused(errno.EEXIST, page)
    return 0, 1, replace(page, entry=Entry.PAGE, value=page.cache, wp=wp)


def move(page: Page, memory: MemoryType, value: int) -> Answer:
    """MOVE to this page works on anonymous memory, and only without a page table entry."""
    if not memory.is_anon:
        return _refused(errno.EINVAL, page)
    if page.entry is not Entry.NONE:
        return _refused(errno.EEXIST, page)
    return 0, 1, replace(page, entry=Entry.PAGE, value=value, wp=False)


def poison(page: Page, memory: MemoryType) -> Answer:
    """POISON works only without a page table entry, whatever the file holds."""
    if page.entry is not Entry.NONE:
        return _refused(errno.EEXIST, page)
    return 0, 1, replace(page, entry=Entry.POISON)


def protect(page: Page) -> Page:
    """WRITEPROTECT protects pages and swap entries, and puts a marker in a hole; others stay."""
    if page.entry is Entry.NONE:
        return replace(page, entry=Entry.MARKER, wp=True)
    return page if page.entry in CLOSED else replace(page, wp=True)


def unprotect(page: Page) -> Page:
    """WRITEPROTECT with mode 0 removes the protection; a marker becomes a hole."""
    entry = Entry.NONE if page.entry is Entry.MARKER else page.entry
    return replace(page, entry=entry, wp=False)


def unregister(page: Page) -> Page:
    """UNREGISTER removes the protection; poison stays."""
    return replace(unprotect(page), registered=False)


# Events: what the program or memory management does before the operation


def _zapped(page: Page, *, keeps_marker: bool) -> Page:
    if page.entry is Entry.GUARD:
        return page
    if page.wp and keeps_marker:
        return replace(page, entry=Entry.MARKER, value=None)
    return replace(page, entry=Entry.NONE, value=None, wp=False)


def dontneed(page: Page, memory: MemoryType) -> Page:
    """MADV_DONTNEED drops the entry, even poison; guards and the protection of file pages stay."""
    return _zapped(page, keeps_marker=not memory.is_anon)


def freed(page: Page) -> Page:
    """MADV_FREE drops swap entries and poison at once, pages only when memory is short."""
    if page.entry in (Entry.SWAP, Entry.POISON):
        return _zapped(page, keeps_marker=False)
    return page


def _is_the_files(page: Page, memory: MemoryType) -> bool:
    return memory.shared or (page.cache is not None and page.value == page.cache)


def reclaimed(page: Page, memory: MemoryType) -> Page:
    """Reclaim moves an anonymous page to swap, and unmaps a page of the file."""
    if page.entry is not Entry.PAGE:
        return page
    if _is_the_files(page, memory):
        return _zapped(page, keeps_marker=True)
    return replace(page, entry=Entry.SWAP)


def hole_punched(page: Page, memory: MemoryType) -> Page:
    """Punching a hole unmaps the file's page; on shmem, private copies stay, the zero page goes."""
    goes = page.entry in FULL and _is_the_files(page, memory)
    without = replace(page, cache=None)
    if memory.is_hugetlb or goes or page.entry is Entry.ZERO:
        return _zapped(without, keeps_marker=True)
    return without


def truncated(page: Page, memory: MemoryType) -> Page:
    """Truncating the file drops private copies too; hugetlb drops the protection as well."""
    without = replace(page, cache=None)
    return _zapped(without, keeps_marker=not memory.is_hugetlb)


def remapped(page: Page, *, has_event: bool) -> Page:
    """Moving with mremap keeps all if EVENT_REMAP is on, else loses registration and protection."""
    return page if has_event else unregister(page)


def inherited(page: Page, memory: MemoryType, *, has_event: bool) -> Page:
    """Return the page in a forked child.

    Without EVENT_FORK the child's range is not registered. The kernel then does not copy a page
    table whose pages can all be faulted in again, poison included (mm/memory.c: vma_needs_copy);
    guards are copied.
    """
    if has_event or page.entry is Entry.GUARD:
        return page if has_event else unregister(page)
    page = unregister(page)
    if memory.shared or (page.entry is Entry.PAGE and _is_the_files(page, memory)):
        return replace(page, entry=Entry.NONE, value=None)
    return page
