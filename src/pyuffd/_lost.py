"""Find out why an access met SIGBUS: a poisoned page, or another reason (layer L2)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress

from pyuffd import _huge_pages, _machine
from pyuffd._abi import PageBit, PageCategory
from pyuffd._errors import PagePoisonedError, UffdOSError, limit_met
from pyuffd._pages import PAGE_SIZE, round_down
from pyuffd._residency import PageResidency, residency
from pyuffd._vmas import Vma, overlapping
from pyuffd.pagemap import Pagemap

Madvise = Callable[[int, int, int], int]

MADV_POPULATE_READ = 22  # Linux 5.14: EHWPOISON for a poisoned page
EHWPOISON = 133  # in Python's errno since 3.14
# The bits of an entry that tell the marker of a poisoned page from other markers.
_MARKER = PageBit.PRESENT | PageBit.SWAP | PageBit.UFFD_WP | PageBit.GUARD_REGION

_SERVED = (
    "SIGBUS: the handler of driver='inline' that serves it now did not serve it then, or could not"
    " resolve its fault: stop() raises the reason"
)
_NOT_SERVED = (
    "SIGBUS: its userfaultfd has Feature.SIGBUS, and no started handler of driver='inline' serves"
    " it"
)


def lost_error(op: str, address: int, *, is_served: bool, madvise: Madvise) -> UffdOSError:
    """Return the exception for an access to `address` that met SIGBUS.

    `is_served`: a started handler of driver="inline" serves it now. `madvise`: madvise(2), which
    returns 0 or -errno.
    """
    try:
        vma = next(overlapping(address, address + 1, details=True), None)
    except OSError as error:  # no descriptor is left, perhaps
        return _without_procfs(op, address, error, madvise)
    if vma is None:
        return UffdOSError(errno.EFAULT, op, address, hint="it has been unmapped")
    page = round_down(address, vma.page_size)
    reason = _other_reason(vma, page, is_served=is_served)
    if reason:
        return UffdOSError(errno.EFAULT, op, page, vma.page_size, hint=reason)
    return _poisoned(op, address, page, vma.page_size)


def _poisoned(op: str, address: int, page: int, page_size: int) -> PagePoisonedError:
    return PagePoisonedError(
        EHWPOISON,
        op,
        page,
        page_size,
        hint="its content could not be read, or its handler stopped before it was loaded",
        address=address,
        offset=None,
    )


def _without_procfs(op: str, address: int, error: OSError, madvise: Madvise) -> UffdOSError:
    """Return what can be told of an access that met SIGBUS if /proc cannot be read."""
    page = round_down(address, PAGE_SIZE)
    if madvise(page, PAGE_SIZE, MADV_POPULATE_READ) == -EHWPOISON:
        return _poisoned(op, address, page, PAGE_SIZE)
    why = f"SIGBUS, and why is not known, as /proc cannot be read: {error.strerror}"
    limit = limit_met(error.errno or 0)
    return UffdOSError(errno.EFAULT, op, page, PAGE_SIZE, hint=f"{why}; {limit}" if limit else why)


def _other_reason(vma: Vma, page: int, *, is_served: bool) -> str:
    """Return why the access met SIGBUS; "" if the page is poisoned."""
    is_poison: bool | None = None  # unknown
    with suppress(OSError):
        is_poison = _is_poison(vma, page)
    if is_poison:
        return ""
    size = _file_size(vma)
    if size is not None and vma.offset + (page - vma.start) >= size:
        return f"SIGBUS: the file {vma.path} was truncated to {size:#x} bytes"
    is_huge = vma.page_size > PAGE_SIZE
    if is_huge and is_poison is None and _free_huge_pages(vma.page_size):
        return ""
    by_userfaultfd = _is_by_userfaultfd(vma, page)
    if is_huge and (not by_userfaultfd or _meets_a_limit(vma)):
        poisoned = ", or it is poisoned" if is_poison is None else ""
        return f"SIGBUS: no huge page is free{poisoned}: {_huge_pages.why_none(vma)}"
    if by_userfaultfd:
        return _SERVED if is_served else _NOT_SERVED
    if vma.path:
        return f"SIGBUS: {vma.path} could not be read, or its file system is full"
    return "SIGBUS: a memory error, or no memory"


def _is_by_userfaultfd(vma: Vma, page: int) -> bool:
    if vma.flags & {"um", "ui"}:
        return True
    with suppress(OSError), Pagemap() as pagemap:
        return "uw" in vma.flags and bool(pagemap.read(page, PAGE_SIZE)[0] & PageBit.UFFD_WP)
    return False


def _meets_a_limit(vma: Vma) -> bool:
    with suppress(OSError, ValueError):
        return bool(_huge_pages.limits_met(vma))
    return True


def _is_poison(vma: Vma, page: int) -> bool:
    with Pagemap() as pagemap:
        if vma.page_size > PAGE_SIZE:
            # An entry of pagemap shows no poison of hugetlb memory. PAGEMAP_SCAN (Linux 6.7) does:
            # such pages are never swapped, and a marker of write-protection is not WRITTEN. Only
            # memory registered for it has such markers, and with Feature.RWP nothing else can be
            # WRITTEN.
            mask = PageCategory.SWAPPED
            if "uw" in vma.flags:
                mask |= PageCategory.WRITTEN
            found = pagemap.scan(page, vma.page_size, category_mask=mask)
            return bool(len(found.ranges))
        entry = pagemap.read(page, PAGE_SIZE)[0]
    states = residency(page, vma.page_size, page_size=vma.page_size, fd=None).states
    if states[0] in (PageResidency.POISON, PageResidency.SWAPPED):
        # Without CAP_SYS_ADMIN they look the same; a page on swap causes no SIGBUS.
        return True
    # Shared memory has no swap entries in the page table, so this entry is a marker.
    return entry & _MARKER.value == PageBit.SWAP.value


def _file_size(vma: Vma) -> int | None:
    if not vma.has_file:
        return None
    with suppress(OSError):  # needs a capability; finds files without a name too
        return os.stat(f"/proc/self/map_files/{vma.start:x}-{vma.end:x}").st_size
    with suppress(OSError):
        found = os.stat(vma.path)
        if (found.st_ino, found.st_dev) == (vma.inode, vma.device):
            return found.st_size
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found = os.fstat(int(fd))
            if (found.st_ino, found.st_dev) == (vma.inode, vma.device):
                return found.st_size
    return None


def _free_huge_pages(page_size: int) -> int:
    with suppress(OSError, ValueError):
        if page_size in _machine.sizes():  # empty if /sys is hidden
            return _machine.free_pages(page_size)
    return 1
