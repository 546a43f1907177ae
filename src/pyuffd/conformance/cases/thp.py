"""The write-protect series, patch 12: transparent huge pages (layer L5)."""

from __future__ import annotations

import errno
import mmap
import signal

from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._thp import MADV_COLLAPSE, mapped_huge
from pyuffd.conformance._types import (
    ANON,
    minor_features,
    missing_features,
    poison_features,
    wp_features,
)
from pyuffd.conformance._wp import (
    DATA,
    HOLE,
    MARKER,
    MISSING_READ,
    UNPROTECT,
    WRITTEN,
    expect_fault,
    expect_read,
    expect_silent_write,
    expect_write_fault,
    marker_features,
    page_out,
)
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE, MemoryType
from pyuffd.testing._need import needs_swap, needs_thp

ORIGIN = "patch 12: write-protect huge pages of shmem"
PAGES = HUGE_PAGE // SMALL_PAGE
SHMEM = ("shmem",)


def _huge(ctx: Context, count: int = 1) -> Region:
    """Make memory that is mapped by huge pages."""
    region = ctx.make(count * PAGES)
    if ctx.memory.is_anon:
        region.advise_thp()
    region.fill(DATA)
    if not ctx.memory.is_anon:
        _collapse(ctx, region)
    if mapped_huge(region.start) != region.length:
        ctx.lack("THP", "the kernel gave no transparent huge page")
    return region


def _collapse(ctx: Context, region: Region) -> None:
    try:
        region.madvise(MADV_COLLAPSE)
    except OSError as error:
        ctx.lack("collapse", f"MADV_COLLAPSE: {error.strerror}")


def _expect_collapse(ctx: Context) -> None:
    """Skip the case if memory that is not registered cannot be collapsed; unmap that again."""
    with _small(ctx) as region:
        _collapse(ctx, region)


def _protected_pages(ctx: Context, region: Region) -> int:
    ctx.is_protected(region.start)  # skips the case if this kernel does not show bit 57
    with Pagemap() as pagemap:
        return sum(entry >> 57 & 1 for entry in pagemap.read(region))


@case(
    "wp-series.12.shmem-part",
    origin=ORIGIN,
    memory=SHMEM,
    features=wp_features,
    needs=[needs_thp()],
)
def shmem_part(ctx: Context) -> None:
    """Protecting 4 KiB of a huge page unmaps it and leaves one marker and no other."""
    region = _huge(ctx, 2)
    ctx.register(region, RegisterMode.WP)
    ctx.expect("bytes mapped huge before", mapped_huge(region.start), 2 * HUGE_PAGE)
    first, second, third = (region.start + index * ctx.page for index in range(3))
    ctx.uffd.writeprotect(second, ctx.page)
    ctx.expect("bytes mapped huge after", mapped_huge(region.start), HUGE_PAGE)
    ctx.expect_pagemap(second, MARKER["shmem"])
    for at in (first, third):
        ctx.expect_pagemap(at, HOLE)
        expect_silent_write(ctx, at)
    expect_read(ctx, third + ctx.page, DATA)
    expect_write_fault(ctx, second)
    ctx.expect("rest of the page", ctx.read(second + 1, 8), bytes([DATA]) * 8)
    ctx.expect("protected pages", _protected_pages(ctx, region), 0)


@case(
    "wp-series.12.shmem-whole",
    origin=ORIGIN,
    memory=SHMEM,
    features=wp_features,
    needs=[needs_thp()],
)
def shmem_whole(ctx: Context) -> None:
    """Protecting a whole huge page unmaps it and leaves a marker for each 4 KiB."""
    region = _huge(ctx)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    ctx.expect("bytes mapped huge", mapped_huge(region.start), 0)
    ctx.expect("protected pages", _protected_pages(ctx, region), PAGES)
    middle = region.start + PAGES // 2 * ctx.page
    ctx.expect_pagemap(middle, MARKER["shmem"])
    expect_read(ctx, middle, DATA)
    expect_write_fault(ctx, middle)
    ctx.expect("protected pages after one write", _protected_pages(ctx, region), PAGES - 1)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect("protected pages after unprotecting", _protected_pages(ctx, region), 0)
    expect_silent_write(ctx, region.start)


@case(
    "wp-series.12.anon-whole",
    origin="patch 12, by contrast: anonymous huge pages",
    memory=ANON,
    features=wp_features,
    needs=[needs_thp()],
)
def anon_whole(ctx: Context) -> None:
    """Protecting a whole anonymous huge page does not split it; unprotecting 4 KiB of it does."""
    region = _huge(ctx, 2)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    ctx.expect("bytes mapped huge", mapped_huge(region.start), 2 * HUGE_PAGE)
    ctx.expect("protected pages", _protected_pages(ctx, region), 2 * PAGES)
    expect_read(ctx, region.start, DATA)
    at = region.start + 5 * ctx.page
    expect_write_fault(ctx, at)
    ctx.expect("bytes mapped huge after a write", mapped_huge(region.start), HUGE_PAGE)
    ctx.expect("protected pages after a write", _protected_pages(ctx, region), 2 * PAGES - 1)
    expect_write_fault(ctx, at + ctx.page)
    ctx.expect("rest of the page", ctx.read(at + 1, 8), bytes([DATA]) * 8)


@case(
    "wp-series.12.anon-part",
    origin="patch 12, by contrast: anonymous huge pages",
    memory=ANON,
    features=wp_features,
    needs=[needs_thp()],
)
def anon_part(ctx: Context) -> None:
    """Protecting 4 KiB of an anonymous huge page splits it; all of it stays mapped."""
    region = _huge(ctx, 2)
    ctx.register(region, RegisterMode.WP)
    at = region.start + ctx.page
    ctx.uffd.writeprotect(at, ctx.page)
    ctx.expect("bytes mapped huge", mapped_huge(region.start), HUGE_PAGE)
    ctx.expect("protected pages", _protected_pages(ctx, region), 1)
    for other in (region.start, at + ctx.page):
        ctx.expect_pagemap(other, "P----", "P---X")
        expect_silent_write(ctx, other)
    expect_write_fault(ctx, at)


def _modes(memory: MemoryType) -> Feature:
    return wp_features(memory) | missing_features(memory) | minor_features(memory)


@case(
    "wp-series.12.shmem-collapse",
    origin=ORIGIN,
    memory=SHMEM,
    features=_modes,
    needs=[needs_thp()],
)
def shmem_collapse(ctx: Context) -> None:
    """MADV_COLLAPSE of shared memory works in modes MISSING and MINOR, and is EINVAL in mode WP."""
    _expect_collapse(ctx)
    for mode in (RegisterMode.MISSING, RegisterMode.MINOR):
        region = _small(ctx)
        ctx.register(region, mode)
        region.madvise(MADV_COLLAPSE)
        ctx.expect(f"bytes mapped huge, {mode!r}", mapped_huge(region.start), HUGE_PAGE)
    region = _small(ctx)
    ctx.register(region, RegisterMode.WP)
    ctx.expect_errno(errno.EINVAL, region.madvise, MADV_COLLAPSE)
    ctx.uffd.writeprotect(region.start, ctx.page)
    ctx.expect_errno(errno.EINVAL, region.madvise, MADV_COLLAPSE)
    ctx.expect("whether the page is still protected", ctx.is_protected(region.start), True)
    expect_write_fault(ctx, region.start)
    ctx.expect("rest of the page", ctx.read(region.start + 1, 8), bytes([DATA]) * 8)


def _small(ctx: Context) -> Region:
    """Make 2 MiB that are mapped by small pages."""
    region = ctx.make(PAGES)
    if ctx.memory.is_anon:
        region.advise_thp(False)
    region.fill(DATA)
    ctx.expect("bytes mapped huge at first", mapped_huge(region.start), 0)
    _allow_huge(ctx, region)
    return region


def _allow_huge(ctx: Context, region: Region) -> None:
    """Allow a collapse by MADV_COLLAPSE, and at any time by khugepaged."""
    if ctx.memory.is_anon:
        region.advise_thp()


@case(
    "wp-series.12.anon-collapse",
    origin="patch 12, by contrast: anonymous huge pages",
    memory=ANON,
    features=wp_features,
    needs=[needs_thp()],
)
def anon_collapse(ctx: Context) -> None:
    """MADV_COLLAPSE of anonymous memory is EINVAL while one page is protected."""
    _expect_collapse(ctx)
    region = _small(ctx)
    ctx.register(region, RegisterMode.WP)
    at = region.start + ctx.page
    ctx.uffd.writeprotect(at, ctx.page)
    ctx.expect_errno(errno.EINVAL, region.madvise, MADV_COLLAPSE)
    ctx.expect("whether the page is still protected", ctx.is_protected(at), True)
    expect_write_fault(ctx, at)
    region.madvise(MADV_COLLAPSE)
    ctx.expect("bytes mapped huge", mapped_huge(region.start), HUGE_PAGE)
    expect_read(ctx, at + ctx.page, DATA)
    ctx.uffd.writeprotect(region)
    expect_write_fault(ctx, at)


@case(
    "thp.collapse.swapped-protected",
    origin="mm/khugepaged.c: hpage_collapse_scan_pmd",
    memory=ANON,
    features=wp_features,
    needs=[needs_thp(), needs_swap()],
)
def collapse_swapped(ctx: Context) -> None:
    """MADV_COLLAPSE over a protected page in swap is EINVAL, and the page stays protected."""
    _expect_collapse(ctx)
    region = _small(ctx)
    ctx.register(region, RegisterMode.WP)
    at = region.start + ctx.page
    ctx.uffd.writeprotect(at, ctx.page)
    page_out(ctx, region)
    ctx.expect_errno(errno.EINVAL, region.madvise, MADV_COLLAPSE)
    ctx.expect("whether the page is still protected", ctx.is_protected(at), True)
    expect_read(ctx, at, DATA)
    expect_write_fault(ctx, at)


@case(
    "thp.collapse.protected-hole",
    origin="mm/khugepaged.c: hpage_collapse_scan_pmd, pte_swp_uffd_wp_any",
    memory=ANON,
    features=marker_features,
    needs=[needs_thp()],
)
def collapse_marker(ctx: Context) -> None:
    """MADV_COLLAPSE over a protected hole is EINVAL, and the hole stays protected."""
    _expect_collapse(ctx)
    region = _small(ctx)
    ctx.register(region, RegisterMode.WP)
    at = region.start + ctx.page
    region.madvise(mmap.MADV_DONTNEED, ctx.page, ctx.page)
    ctx.uffd.writeprotect(at, ctx.page)
    ctx.expect_errno(errno.EINVAL, region.madvise, MADV_COLLAPSE)
    ctx.expect_pagemap(at, MARKER["anon"])
    expect_read(ctx, at, 0)
    expect_write_fault(ctx, at)


@case(
    "thp.collapse.poison-stays",
    origin="mm/khugepaged.c: hpage_collapse_scan_pmd, __collapse_huge_page_swapin",
    memory=ANON,
    features=poison_features,
    needs=[needs_thp()],
)
def collapse_poison(ctx: Context) -> None:
    """MADV_COLLAPSE over a poisoned page fails, and the page stays poisoned."""
    _expect_collapse(ctx)
    region = _small(ctx)
    ctx.register(region, RegisterMode.MISSING)
    at = region.start + ctx.page
    region.madvise(mmap.MADV_DONTNEED, ctx.page, ctx.page)
    ctx.uffd.poison(at, ctx.page)
    try:
        region.madvise(MADV_COLLAPSE)
    except OSError as error:
        ctx.note(f"MADV_COLLAPSE: {error}")
    ctx.expect("bytes mapped huge", mapped_huge(region.start), 0)
    seen = ctx.silently(ctx.read, at)
    ctx.expect("signal of a read", getattr(seen, "number", None), signal.SIGBUS)
    expect_read(ctx, region.start, DATA)


# Holes in memory registered in mode MISSING

HOLES = (0, 5, PAGES - 1)


@case(
    "thp.collapse.holes-stay-missing",
    origin="mm/khugepaged.c: hpage_collapse_scan_pmd, collapse_file",
    memory=("anon", "shmem"),
    features=missing_features,
    needs=[needs_thp()],
)
def collapse_holes(ctx: Context) -> None:
    """MADV_COLLAPSE over holes registered in mode MISSING is EBUSY; the holes stay missing."""
    _expect_collapse(ctx)
    region = ctx.make(PAGES)
    _fill_around(ctx, region, HOLES)
    ctx.register(region, RegisterMode.MISSING)
    _allow_huge(ctx, region)
    _expect_not_collapsed(ctx, region, region, HOLES)


@case(
    "thp.collapse.zero-pages-stay",
    origin="mm/khugepaged.c: hpage_collapse_scan_pmd",
    memory=ANON,
    features=missing_features,
    needs=[needs_thp()],
)
def collapse_zero_pages(ctx: Context) -> None:
    """MADV_COLLAPSE over zero pages that ZEROPAGE mapped is EBUSY."""
    _expect_collapse(ctx)
    region = ctx.make(PAGES)
    _fill_around(ctx, region, HOLES)
    ctx.register(region, RegisterMode.MISSING)
    _allow_huge(ctx, region)
    for index in HOLES:
        ctx.uffd.zeropage(region.start + index * ctx.page, ctx.page)
    ctx.expect_errno(errno.EBUSY, region.madvise, MADV_COLLAPSE)
    ctx.expect("bytes mapped huge", mapped_huge(region.start), 0)
    for index in HOLES:
        expect_read(ctx, region.start + index * ctx.page, 0)


@case(
    "thp.collapse.through-an-alias",
    origin="mm/khugepaged.c: collapse_file",
    memory=SHMEM,
    features=missing_features,
    needs=[needs_thp()],
)
def collapse_alias(ctx: Context) -> None:
    """MADV_COLLAPSE of another mapping does not fill holes of the registered one."""
    _expect_collapse(ctx)
    region = ctx.make(PAGES)
    _fill_around(ctx, region, HOLES)
    alias = ctx.alias(region)
    ctx.register(region, RegisterMode.MISSING)
    _expect_not_collapsed(ctx, alias, region, HOLES)


@case(
    "thp.collapse.complete-memory",
    origin="mm/khugepaged.c: hpage_collapse_scan_pmd, collapse_file",
    memory=("anon", "shmem"),
    features=missing_features,
    needs=[needs_thp()],
)
def collapse_complete(ctx: Context) -> None:
    """MADV_COLLAPSE of memory without holes works in mode MISSING, and keeps the content."""
    _expect_collapse(ctx)
    region = _small(ctx)
    ctx.register(region, RegisterMode.MISSING)
    ctx.silently(region.madvise, MADV_COLLAPSE)
    ctx.expect("bytes mapped huge", mapped_huge(region.start), HUGE_PAGE)
    expect_read(ctx, region.start + 5 * ctx.page, DATA)


@case(
    "thp.collapse.private-file",
    origin="mm/khugepaged.c: collapse_pte_mapped_thp",
    memory=("shmem-private",),
    features=missing_features,
    needs=[needs_thp()],
)
def collapse_private_file(ctx: Context) -> None:
    """MADV_COLLAPSE maps a huge page of the file in a private mapping that has a page table."""
    region = _huge_file_below(ctx)
    ctx.silently(region.madvise, MADV_COLLAPSE)
    ctx.expect("bytes mapped huge", mapped_huge(region.start), HUGE_PAGE)
    for index in HOLES:
        expect_read(ctx, region.start + index * ctx.page, DATA)
    at = region.start + 5 * ctx.page
    ctx.silently(ctx.write, at, bytes([WRITTEN]) * ctx.page)
    expect_read(ctx, at, WRITTEN)
    expect_read(ctx, at + ctx.page, DATA)


@case(
    "thp.collapse.private-file-with-copy",
    origin="mm/khugepaged.c: collapse_pte_mapped_thp",
    memory=("shmem-private",),
    features=missing_features,
    needs=[needs_thp()],
)
def collapse_private_file_with_copy(ctx: Context) -> None:
    """MADV_COLLAPSE of a private mapping of a huge file page is EINVAL if COPY filled a page."""
    region = _huge_file_below(ctx)
    at = region.start + 5 * ctx.page
    ctx.uffd.copy(at, bytes([WRITTEN]) * ctx.page)
    ctx.expect_errno(errno.EINVAL, region.madvise, MADV_COLLAPSE)
    ctx.expect("bytes mapped huge", mapped_huge(region.start), 0)
    expect_read(ctx, at, WRITTEN)
    for address in (region.start, at - ctx.page, at + ctx.page):
        expect_read(ctx, address, DATA)


@case(
    "thp.collapse.private-file-after-copy",
    origin="mm/khugepaged.c: collapse_pte_mapped_thp",
    memory=("shmem-private",),
    features=missing_features,
    needs=[needs_thp()],
)
def collapse_private_file_after_copy(ctx: Context) -> None:
    """After a page that COPY filled is dropped, MADV_COLLAPSE maps the huge page of the file."""
    region = _huge_file_below(ctx)
    at = region.start + 5 * ctx.page
    ctx.uffd.copy(at, bytes([WRITTEN]) * ctx.page)
    region.madvise(mmap.MADV_DONTNEED, at - region.start, ctx.page)
    # Map a page of the file through the page table, which MADV_COLLAPSE must then remove.
    expect_read(ctx, region.start, DATA)
    ctx.silently(region.madvise, MADV_COLLAPSE)
    ctx.expect("bytes mapped huge", mapped_huge(region.start), HUGE_PAGE)
    for address in (region.start, at - ctx.page, at, at + ctx.page):
        expect_read(ctx, address, DATA)
    ctx.silently(ctx.write, at, bytes([WRITTEN]) * ctx.page)
    expect_read(ctx, at, WRITTEN)
    expect_read(ctx, at + ctx.page, DATA)


def _huge_file_below(ctx: Context) -> Region:
    """Register a private mapping, give it a page table, and then make the file's page huge."""
    region = ctx.make(PAGES)
    assert region.fd is not None
    ctx.register(region, RegisterMode.MISSING)
    with Region.file(region.fd, region.length) as view:
        view.fill(DATA)
        expect_read(ctx, region.start + ctx.page, DATA)
        ctx.expect("bytes mapped huge at first", mapped_huge(region.start), 0)
        _collapse(ctx, view)
    return region


def _fill_around(ctx: Context, region: Region, holes: tuple[int, ...]) -> None:
    """Fill a region with small pages except for holes; keep khugepaged from filling those."""
    if ctx.memory.is_anon:
        region.advise_thp(False)
    for index in range(PAGES):
        if index not in holes:
            region.fill(DATA, index * ctx.page, ctx.page)
    ctx.expect("bytes mapped huge at first", mapped_huge(region.start), 0)


def _expect_not_collapsed(
    ctx: Context, collapsed: Region, region: Region, holes: tuple[int, ...]
) -> None:
    ctx.expect_errno(errno.EBUSY, collapsed.madvise, MADV_COLLAPSE)
    ctx.expect("bytes mapped huge", mapped_huge(region.start), 0)
    for index in holes:
        at = region.start + index * ctx.page
        ctx.expect_pagemap(at, HOLE)
        reading = ctx.start(ctx.read, at)
        expect_fault(ctx, reading, MISSING_READ, at)
        ctx.uffd.copy(at, bytes([WRITTEN]) * ctx.page)
        ctx.expect("the read", reading.result(), bytes([WRITTEN]))
    for index in range(PAGES):
        value = WRITTEN if index in holes else DATA
        if index in holes or index - 1 in holes or index + 1 in holes:
            expect_read(ctx, region.start + index * ctx.page, value)
