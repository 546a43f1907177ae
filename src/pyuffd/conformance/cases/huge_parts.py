"""Transparent huge pages: missing, protected, forked, mapped by small pages (layer L5)."""

from __future__ import annotations

import mmap

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._thp import collapse, huge_file, mapped_huge, sizes, switched_on
from pyuffd.conformance._types import ANON, ANY, SHMEM, missing_features, wp_features
from pyuffd.conformance._wp import (
    DATA,
    HOLE,
    MARKER,
    MISSING_READ,
    MISSING_WRITE,
    READ_WRITE,
    UNPROTECT,
    WP_WRITE,
    expect_fault,
    expect_read,
    expect_silent_write,
    expect_write_fault,
    in_one_place,
    in_page_cache,
    page_out,
)
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import needs_privilege, needs_swap, needs_thp

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
PAGES = HUGE_PAGE // SMALL_PAGE
MADV_HUGEPAGE, MADV_PAGEOUT = 14, 21
FORK = Feature.EVENT_FORK
MOVED, OTHER = 0x4D, 0x4E
SWAP_BATCH = 8


def aligned(start: int) -> int:
    """Round an address up to a multiple of a huge page."""
    return -(-start // HUGE_PAGE) * HUGE_PAGE


def protected_pages(start: int, length: int = HUGE_PAGE, pid: int | None = None) -> list[int]:
    """Return the numbers of the pages in a range that pagemap shows as protected."""
    with Pagemap(pid) as pagemap:
        return [index for index, entry in enumerate(pagemap.read(start, length)) if entry >> 57 & 1]


# Missing pages in memory that allows huge pages


@case(
    "fault.missing.where-a-huge-page-could-be",
    origin="mm/huge_memory.c: do_huge_pmd_anonymous_page",
    memory=ANON,
    features=missing_features,
    needs=[needs_thp()],
)
def missing_huge(ctx: Context) -> None:
    """In memory that allows huge pages, each small page still faults by itself."""
    region = ctx.make(4 * PAGES)
    region.advise_thp()
    ctx.register(region, MISSING)
    first = aligned(region.start)
    for start, writes in ((first, False), (first + HUGE_PAGE, True)):
        at = start + 5 * SMALL_PAGE
        access = ctx.start(ctx.write, at, b"\1") if writes else ctx.start(ctx.read, at)
        expect_fault(ctx, access, MISSING_WRITE if writes else MISSING_READ, at)
        ctx.uffd.copy(at, bytes([DATA]) * SMALL_PAGE)
        access.result()
        for other in (start, at - SMALL_PAGE, at + SMALL_PAGE):
            ctx.expect_pagemap(other, HOLE)
        reading = ctx.start(ctx.read, at + SMALL_PAGE)
        expect_fault(ctx, reading, MISSING_READ, at + SMALL_PAGE)
        ctx.uffd.zeropage(at + SMALL_PAGE, SMALL_PAGE)
        ctx.expect("the next byte", reading.result(), b"\0")


# Protected huge pages


def _protected(ctx: Context, *, parts: bool = False) -> int:
    """Protect a huge page whole, or every second page of it, which splits it."""
    start = huge_area(ctx, 1)
    _memory.fill(start, HUGE_PAGE, DATA)
    ctx.open().register(start, HUGE_PAGE, mode=WP)
    if not parts:
        ctx.uffd.writeprotect(start, HUGE_PAGE)
        return start
    for index in range(1, PAGES, 2):
        ctx.uffd.writeprotect(start + index * SMALL_PAGE, SMALL_PAGE)
    return start


@case(
    "thp.protected.mprotect-and-back",
    origin="mm/huge_memory.c: can_change_pmd_writable",
    memory=ANON,
    features=wp_features,
    needs=[needs_thp()],
)
def mprotected(ctx: Context) -> None:
    """A protected huge page stays protected through mprotect to PROT_READ, PROT_NONE and back."""
    start = _protected(ctx)
    for protection in (mmap.PROT_READ, 0, READ_WRITE):
        _memory.mprotect(start, HUGE_PAGE, protection)
    ctx.expect("protected pages", len(protected_pages(start)), PAGES)
    expect_write_fault(ctx, start + 3 * SMALL_PAGE)
    expect_read(ctx, start + 4 * SMALL_PAGE, DATA)


def _add_fork(*, parts: bool, has_event: bool) -> None:
    def run(ctx: Context) -> None:
        start = _protected(ctx, parts=parts)
        wanted = list(range(1, PAGES, 2)) if parts else list(range(PAGES))
        child = ctx.fork()
        ctx.expect(
            "whether the same pages are protected in the parent",
            protected_pages(start) == wanted,
            True,
        )
        seen = protected_pages(start, pid=child.pid)
        ctx.expect("protected pages in the child", len(seen), len(wanted) if has_event else 0)
        if has_event:
            ctx.expect("whether the same pages are protected in the child", seen == wanted, True)
            assert child.uffd is not None
            expect_write_fault(ctx, start + SMALL_PAGE, child.uffd, child.write)
        else:
            write = ctx.silently(child.write, start + SMALL_PAGE, b"\1")
            ctx.expect("the child's write", write, None)
        expect_write_fault(ctx, start + 3 * SMALL_PAGE)
        ctx.expect("the parent's data", ctx.read(start + SMALL_PAGE), bytes([DATA]))

    what = "every second page of a huge page" if parts else "a huge page"
    name = f"{'parts' if parts else 'whole'}{'-with-event' if has_event else ''}"
    case(
        f"thp.fork.protected-{name}",
        summary=f"After a fork, {what} is protected "
        + ("in the child too" if has_event else "in the parent only"),
        origin="mm/huge_memory.c: copy_huge_pmd; mm/memory.c: copy_present_ptes",
        memory=ANON,
        features=lambda memory: wp_features(memory) | (FORK if has_event else Feature(0)),
        needs=[needs_thp()],
    )(run)


for _parts in (False, True):
    for _has_event in (False, True):
        _add_fork(parts=_parts, has_event=_has_event)


# Many entries that are zapped at once


@case(
    "thp.zap.leaves-every-marker",
    origin="mm/memory.c: zap_install_uffd_wp_if_needed",
    memory=SHMEM,
    features=wp_features,
    needs=[needs_thp()],
)
def zapped(ctx: Context) -> None:
    """MADV_DONTNEED of a file's huge page leaves a marker for each protected small page."""
    region = huge_file(ctx, DATA)
    ctx.register(region, WP)
    _memory.touch(region.start, region.length, SMALL_PAGE, write=False)
    gap = 100
    ctx.uffd.writeprotect(region)
    # Not by a write, which in a private mapping would replace this part of the huge page by a copy.
    ctx.uffd.writeprotect(region.start + gap * SMALL_PAGE, SMALL_PAGE, mode=UNPROTECT)
    _memory.touch(region.start, region.length, SMALL_PAGE, write=False)
    wanted = [index for index in range(PAGES) if index != gap]
    ctx.expect("protected pages before", len(protected_pages(region.start)), len(wanted))
    region.madvise(mmap.MADV_DONTNEED)
    seen = protected_pages(region.start)
    ctx.expect("protected pages after MADV_DONTNEED", len(seen), len(wanted))
    ctx.expect("whether they are the same pages", seen == wanted, True)
    for index in (0, gap - 1, gap + 1, PAGES - 1):
        ctx.expect_pagemap(region.start + index * SMALL_PAGE, MARKER[ctx.memory.name])
    expect_write_fault(ctx, region.start + (PAGES - 1) * SMALL_PAGE)
    expect_silent_write(ctx, region.start + gap * SMALL_PAGE)


@case(
    "reclaim.zap.leaves-every-marker",
    origin="mm/memory.c: zap_pte_range, swap_pte_batch",
    memory=("shmem-private",),
    features=wp_features,
    needs=[needs_swap()],
)
def zapped_in_swap(ctx: Context) -> None:
    """MADV_DONTNEED of neighbouring protected pages in swap leaves a marker for each."""
    in_one_place(ctx)
    region = ctx.make(SWAP_BATCH + 2)
    in_page_cache(region, OTHER)
    ctx.register(region, WP)
    region.fill(DATA)
    ctx.uffd.writeprotect(region.start, SWAP_BATCH * SMALL_PAGE)
    page_out(ctx, region)
    region.madvise(mmap.MADV_DONTNEED)
    seen = protected_pages(region.start, region.length)
    ctx.expect("protected pages", seen, list(range(SWAP_BATCH)))
    for index in range(SWAP_BATCH):
        ctx.expect_pagemap(region.start + index * SMALL_PAGE, MARKER[ctx.memory.name])
    expect_read(ctx, region.start, OTHER)
    expect_write_fault(ctx, region.start + (SWAP_BATCH - 1) * SMALL_PAGE)
    expect_silent_write(ctx, region.start + SWAP_BATCH * SMALL_PAGE)


@case(
    "thp.collapse.alias-keeps-markers",
    origin="mm/khugepaged.c: retract_page_tables",
    memory=("shmem",),
    features=wp_features,
    needs=[needs_thp()],
)
def collapse_alias(ctx: Context) -> None:
    """MADV_COLLAPSE of another mapping of the file keeps the markers of this mapping."""
    region = ctx.make(PAGES)
    assert region.fd is not None
    ctx.register(region, WP)
    with Region.file(region.fd, region.length) as view:
        view.fill(DATA)
        for index in (0, 7, PAGES - 1):
            ctx.uffd.writeprotect(region.start + index * SMALL_PAGE, SMALL_PAGE)
        expect_read(ctx, region.start + 7 * SMALL_PAGE, DATA)
        collapse(ctx, view)
        ctx.expect("bytes of the other mapped huge", mapped_huge(view.start), HUGE_PAGE)
    ctx.expect("protected pages", protected_pages(region.start), [0, 7, PAGES - 1])
    for index in (0, 7, PAGES - 1):
        expect_write_fault(ctx, region.start + index * SMALL_PAGE)
    expect_silent_write(ctx, region.start + SMALL_PAGE)


# Huge pages of other sizes


SIZE = 64 << 10


@case(
    "thp.sizes.one-page-for-each-write",
    origin="mm/memory.c: alloc_anon_folio",
    memory=ANON,
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED,
    needs=[needs_thp(), needs_privilege("CAP_SYS_ADMIN")],
)
def one_page_each(ctx: Context) -> None:
    """In registered memory a write maps one page, also where the kernel could map 64 KiB."""
    if SIZE not in sizes():
        ctx.lack("THP-64k", "no huge pages of 64 KiB")
    ctx.enter(switched_on(SIZE, shared=False))
    region = ctx.make(4 * SIZE // SMALL_PAGE)
    at = -(-region.start // SIZE) * SIZE + SIZE
    region.advise_thp()
    ctx.register(region, WP)
    ctx.expect("a write", ctx.silently(ctx.write, at + 3 * SMALL_PAGE, b"\1"), None)
    there = [index for index in range(16) if ctx.bits(at + index * SMALL_PAGE) >> 63 & 1]
    ctx.expect("pages that are mapped after the write", there, [3])


@case(
    "thp.sizes.one-page-for-each-read",
    origin="mm/memory.c: finish_fault",
    memory=ANY,
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM,
    needs=[needs_thp(), needs_privilege("CAP_SYS_ADMIN")],
)
def one_page_read(ctx: Context) -> None:
    """In registered shared memory a read maps one page, also of a folio of 64 KiB."""
    if SIZE not in sizes():
        ctx.lack("THP-64k", "no huge pages of 64 KiB")
    try:
        ctx.enter(switched_on(SIZE, shared=True))
    except OSError:
        ctx.lack("THP-64k-shmem", "64 KiB cannot be switched on for shared memory")
    length = 4 * SIZE
    start = _memory.mmap(length, READ_WRITE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    ctx.callback(_memory.munmap, start, length)
    _memory.madvise(start, length, MADV_HUGEPAGE)
    _memory.fill(start, length, DATA)
    _memory.madvise(start, length, mmap.MADV_DONTNEED)
    ctx.open().register(start, length, mode=WP)
    at = -(-start // SIZE) * SIZE + SIZE
    ctx.expect("a read", ctx.silently(ctx.read, at + 3 * SMALL_PAGE), bytes([DATA]))
    there = [index for index in range(16) if ctx.bits(at + index * SMALL_PAGE) >> 63 & 1]
    ctx.expect("pages that are mapped after the read", there, [3])
    ctx.uffd.writeprotect(at + 4 * SMALL_PAGE, SMALL_PAGE)
    write = ctx.start(ctx.write, at + 4 * SMALL_PAGE, b"\1")
    expect_fault(ctx, write, WP_WRITE, at + 4 * SMALL_PAGE)
    ctx.uffd.writeprotect(at + 4 * SMALL_PAGE, SMALL_PAGE, mode=UNPROTECT)
    ctx.expect("the write", write.result(), None)
