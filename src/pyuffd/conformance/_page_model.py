"""What operations and events do to one page: the rules that the crossings are checked by (L5).

A page is what its entry in the page table leads to, whether userfaultfd protects it, and what the
file behind it has.  Each rule is one of the kernel's, in the words of its functions; where a rule
says that nothing happens, that is an expectation too.
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


# Entries with content of their own, and those that no access passes.
FULL = (Entry.PAGE, Entry.ZERO, Entry.SWAP)
CLOSED = (Entry.POISON, Entry.GUARD)


@dataclass(frozen=True)
class Page:
    """One page of a registered range.

    Attributes:
        entry: What the page table has.
        value: The byte that what the entry leads to is full of.
        wp: Whether it is write-protected by userfaultfd; a MARKER always is.
        cache: The byte the file's page is full of; None where the file has a hole, or none is.
        registered: Whether the range is.
    """

    entry: Entry = Entry.NONE
    value: int | None = None
    wp: bool = False
    cache: int | None = None
    registered: bool = True

    @property
    def content(self) -> int:
        """The byte that a read gives once no fault is in the way."""
        if self.entry in FULL:
            assert self.value is not None
            return self.value
        return self.cache or 0

    @property
    def is_missing(self) -> bool:
        """Whether an access finds no content, neither by the entry nor in the file."""
        return self.entry in (Entry.NONE, Entry.MARKER) and self.cache is None


# What an ioctl answers: errno and result in pages (or -errno), and the page afterwards.
Answer = tuple[int, int, Page]


def _refused(code: int, page: Page) -> Answer:
    return code, -code, page


def _mapped(page: Page, memory: MemoryType, value: int, *, wp: bool) -> Page:
    cache = value if memory.shared else page.cache
    return replace(page, entry=Entry.PAGE, value=value, wp=wp, cache=cache)


def copy(page: Page, memory: MemoryType, value: int, *, wp: bool = False) -> Answer:
    """COPY: over a hole, a marker, poison or a guard; a shared file must have no page either."""
    if page.entry in FULL or (memory.shared and page.cache is not None):
        return _refused(errno.EEXIST, page)
    return 0, 1, _mapped(page, memory, value, wp=wp)


def zeropage(page: Page, memory: MemoryType) -> Answer:
    """ZEROPAGE: a page of zeros in a shared file, as COPY does; else the zero page in a hole."""
    if memory.is_hugetlb:
        return _refused(errno.EINVAL, page)
    if memory.shared:
        return copy(page, memory, 0)
    if page.entry is not Entry.NONE:
        return _refused(errno.EEXIST, page)
    return 0, 1, replace(page, entry=Entry.ZERO, value=0, wp=False)


def continue_(page: Page, memory: MemoryType, *, wp: bool = False) -> Answer:
    """CONTINUE: what the file has, where COPY could copy; EFAULT if it has nothing."""
    if memory.is_anon:
        return _refused(errno.EINVAL, page)
    if page.cache is None:
        return _refused(errno.EFAULT, page)
    if page.entry in FULL:
        return _refused(errno.EEXIST, page)
    return 0, 1, replace(page, entry=Entry.PAGE, value=page.cache, wp=wp)


def move(page: Page, memory: MemoryType, value: int) -> Answer:
    """MOVE to here: anonymous memory only, and only where the page table has nothing."""
    if not memory.is_anon:
        return _refused(errno.EINVAL, page)
    if page.entry is not Entry.NONE:
        return _refused(errno.EEXIST, page)
    return 0, 1, replace(page, entry=Entry.PAGE, value=value, wp=False)


def poison(page: Page, memory: MemoryType) -> Answer:
    """POISON: only where the page table has nothing, whatever the file has."""
    if page.entry is not Entry.NONE:
        return _refused(errno.EEXIST, page)
    return 0, 1, replace(page, entry=Entry.POISON)


def protect(page: Page) -> Page:
    """WRITEPROTECT: a page, a swap entry, or a hole, which gets a marker; others stay."""
    if page.entry is Entry.NONE:
        return replace(page, entry=Entry.MARKER, wp=True)
    return page if page.entry in CLOSED else replace(page, wp=True)


def unprotect(page: Page) -> Page:
    """WRITEPROTECT with mode 0: a marker becomes a hole."""
    entry = Entry.NONE if page.entry is Entry.MARKER else page.entry
    return replace(page, entry=entry, wp=False)


def unregister(page: Page) -> Page:
    """UNREGISTER: as unprotecting; poison stays."""
    return replace(unprotect(page), registered=False)


# What the program, or memory management, does between


def _zapped(page: Page, *, keeps_marker: bool) -> Page:
    if page.entry is Entry.GUARD:
        return page
    if page.wp and keeps_marker:
        return replace(page, entry=Entry.MARKER, value=None)
    return replace(page, entry=Entry.NONE, value=None, wp=False)


def dontneed(page: Page, memory: MemoryType) -> Page:
    """MADV_DONTNEED: the entry goes, poison too; a guard stays, and protection of a file's page."""
    return _zapped(page, keeps_marker=not memory.is_anon)


def freed(page: Page) -> Page:
    """MADV_FREE: a swap entry and poison go at once, a page only when memory is short."""
    if page.entry in (Entry.SWAP, Entry.POISON):
        return _zapped(page, keeps_marker=False)
    return page


def _is_the_files(page: Page, memory: MemoryType) -> bool:
    return memory.shared or (page.cache is not None and page.value == page.cache)


def reclaimed(page: Page, memory: MemoryType) -> Page:
    """Reclaim: a page of its own goes to swap, a page of the file is unmapped."""
    if page.entry is not Entry.PAGE:
        return page
    if _is_the_files(page, memory):
        return _zapped(page, keeps_marker=True)
    return replace(page, entry=Entry.SWAP)


def hole_punched(page: Page, memory: MemoryType) -> Page:
    """A hole punched into the file: on shmem private copies stay, and only the zero page goes."""
    goes = page.entry in FULL and _is_the_files(page, memory)
    without = replace(page, cache=None)
    if memory.is_hugetlb or goes or page.entry is Entry.ZERO:
        return _zapped(without, keeps_marker=True)
    return without


def truncated(page: Page, memory: MemoryType) -> Page:
    """A file shortened and made longer again: copies go; hugetlb drops the protection as well."""
    without = replace(page, cache=None)
    return _zapped(without, keeps_marker=not memory.is_hugetlb)


def remapped(page: Page, *, has_event: bool) -> Page:
    """mremap: with EVENT_REMAP everything moves along; else registration and protection go."""
    return page if has_event else unregister(page)


def inherited(page: Page, memory: MemoryType, *, has_event: bool) -> Page:
    """The page in a forked child.

    Without EVENT_FORK the child's range is not registered, and then a page table whose pages could
    all be faulted in again is not copied (mm/memory.c: vma_needs_copy), poison or not; guards are.
    """
    if has_event or page.entry is Entry.GUARD:
        return page if has_event else unregister(page)
    page = unregister(page)
    if memory.shared or (page.entry is Entry.PAGE and _is_the_files(page, memory)):
        return replace(page, entry=Entry.NONE, value=None)
    return page
