"""PAGEMAP_SCAN with WP_MATCHING protects what is not protected: pages, holes, swap entries (L5).

The kernel has three loops for this: one that reports nothing, one for WRITTEN alone, and one for
any other question.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

from pyuffd import _memory
from pyuffd._abi import PageCategory, RegisterMode, ScanFlag
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._thp import mapped_huge
from pyuffd.conformance._types import ANON, ANY, HUGETLB
from pyuffd.conformance._wp import MAP_NORESERVE, MARKER, READ_WRITE, page_out
from pyuffd.conformance.cases.pagemap_scan import (
    FEATURES,
    PRESENT,
    WP_SCAN,
    WRITTEN,
    Scan,
    end_of,
    scan,
    written,
)
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import Need, needs_swap, needs_thp

ORIGIN = "fs/proc/task_mmu.c: pagemap_scan_pmd_entry"
PAGES = 3
HUGE = PageCategory.HUGE
SWAPPED = int(PageCategory.SWAPPED)
PER_HUGE = HUGE_PAGE // SMALL_PAGE
GIB = 1 << 30
MAP_HUGETLB = 0x40000
DISPOSABLE = "PYUFFD_TESTS_DISPOSABLE"


def _pages(_ctx: Context, _region: Region) -> None:
    pass


def _hole(_ctx: Context, region: Region) -> None:
    region.madvise(mmap.MADV_DONTNEED, SMALL_PAGE, SMALL_PAGE)


def _zero(ctx: Context, region: Region) -> None:
    _hole(ctx, region)
    ctx.read(region.start + SMALL_PAGE)


# Name, words for the summary, a function that makes the state, and its needs.
_STATES: tuple[tuple[str, str, Callable[[Context, Region], None], tuple[Need, ...]], ...] = (
    ("pages", "pages", _pages, ()),
    ("hole", "a page that was dropped", _hole, ()),
    ("zero", "a page that was dropped and read", _zero, ()),
    ("swapped", "pages in swap", page_out, (needs_swap(),)),
)
# Name, arguments of the scan, and whether it reports ranges.
_QUESTIONS: tuple[tuple[str, dict[str, int], bool], ...] = (
    ("reporting-nothing", {"room": 0}, False),
    ("reporting-written", {}, True),
    ("reporting-more", {"returned": int(WRITTEN) | SWAPPED | int(PageCategory.FILE)}, True),
)


def _add(
    state: str,
    text: str,
    make: Callable[[Context, Region], None],
    needs: tuple[Need, ...],
    question: tuple[str, dict[str, int], bool],
) -> None:
    name, asked, can_say = question

    def run(ctx: Context) -> None:
        region = ctx.make(PAGES)
        ctx.register(region, RegisterMode.WP)
        region.fill(1)
        make(ctx, region)
        seen = scan(ctx, region.start, end_of(region), flags=int(WP_SCAN), **asked)
        ctx.expect("errno of the scan", seen.errno, 0)
        if can_say:
            ctx.expect("pages found", seen.pages, PAGES)
        if "returned" in asked:
            swapped = any(categories & SWAPPED for *_, categories in seen.ranges)
            # For shared memory, the page is in swap only in the file; its entry is empty.
            is_wanted = state == "swapped" and ctx.memory.is_anon
            ctx.expect("whether a range is SWAPPED", swapped, is_wanted)
        bits = [ctx.is_protected(region.start + at * SMALL_PAGE) for at in range(PAGES)]
        ctx.expect("which pages are protected", bits, [True] * PAGES)
        ctx.expect("ranges written afterwards", scan(ctx, region.start, end_of(region)).count, 0)
        middle = region.start + SMALL_PAGE
        ctx.expect("a write", ctx.silently(ctx.write, middle, b"\2"), None)
        left = scan(ctx, region.start, end_of(region)).ranges
        ctx.expect(
            "ranges written after the write", left, ((middle, middle + SMALL_PAGE, int(WRITTEN)),)
        )

    case(
        f"PAGEMAP_SCAN.ok.protects-{state}-{name}",
        origin=ORIGIN,
        memory=("anon", "shmem"),
        features=FEATURES,
        needs=needs,
        summary=f"A scan {name.replace('-', ' ')} protects {text}; the next scan sees a write",
    )(run)


for _state in _STATES:
    for _question in _QUESTIONS:
        _add(*_state, _question)


_HOLES = (
    Variant("written", "memory that was never touched counts as written"),
    Variant("nothing", "memory that was never touched is in no category; no feature bit tells"),
)


@case(
    "PAGEMAP_SCAN.ok.protects-untouched",
    origin="fs/proc/task_mmu.c: pagemap_scan_pte_hole",
    memory=ANON,
    features=FEATURES,
    variants=_HOLES,
)
def untouched(ctx: Context) -> None:
    """If memory without a page table counts as written, a scan protects it."""
    region = ctx.make(3 * PER_HUGE)
    start = -(-region.start // HUGE_PAGE) * HUGE_PAGE
    ctx.register(region, RegisterMode.WP)
    seen = scan(ctx, start, start + HUGE_PAGE, flags=int(WP_SCAN))
    ctx.expect_variant("pages found", seen.pages, written=PER_HUGE, nothing=0)
    bits = {ctx.is_protected(start + at * SMALL_PAGE) for at in (0, PER_HUGE // 2, PER_HUGE - 1)}
    ctx.expect("whether pages are protected", bits, {seen.pages > 0})
    ctx.expect("ranges written afterwards", scan(ctx, start, start + HUGE_PAGE).count, 0)


# Transparent huge pages that were written and never protected


def _huge(ctx: Context, count: int) -> int:
    start = huge_area(ctx, count)
    _memory.fill(start, count * HUGE_PAGE, 1)
    ctx.open().register(start, count * HUGE_PAGE, mode=RegisterMode.WP)
    return start


def _protect(ctx: Context, start: int, count: int, **asked: int) -> Scan:
    seen = scan(ctx, start, start + count * HUGE_PAGE, flags=int(WP_SCAN), **asked)
    ctx.expect("errno of the scan", seen.errno, 0)
    return seen


def _expect_left(ctx: Context, start: int, count: int, first: int) -> None:
    """Check that only the pages from `first` on are still written."""
    end = start + count * HUGE_PAGE
    left = scan(ctx, start, end).ranges
    wanted = ((start + first * SMALL_PAGE, end, int(WRITTEN)),)
    ctx.expect("ranges written afterwards", left, wanted if first < count * PER_HUGE else ())


@case(
    "PAGEMAP_SCAN.ok.protects-huge",
    origin="fs/proc/task_mmu.c: pagemap_scan_thp_entry",
    memory=ANY,
    features=FEATURES,
    needs=[needs_thp()],
)
def huge(ctx: Context) -> None:
    """A scan protects huge pages without splitting them; the next finds them not written."""
    start = _huge(ctx, 2)
    both = int(WRITTEN | HUGE)
    seen = _protect(ctx, start, 2, returned=both)
    ctx.expect("ranges of the scan", seen.ranges, ((start, start + 2 * HUGE_PAGE, both),))
    ctx.expect("bytes mapped huge", mapped_huge(start), 2 * HUGE_PAGE)
    _expect_left(ctx, start, 2, 2 * PER_HUGE)
    seen = _protect(ctx, start, 2, mask=int(PRESENT), returned=int(PRESENT | WRITTEN))
    ctx.expect(
        "PRESENT ranges of the second scan",
        seen.ranges,
        ((start, start + 2 * HUGE_PAGE, int(PRESENT)),),
    )
    ctx.expect("bytes mapped huge after the second scan", mapped_huge(start), 2 * HUGE_PAGE)


@case(
    "PAGEMAP_SCAN.ok.protects-huge-in-part",
    origin="fs/proc/task_mmu.c: pagemap_scan_thp_entry",
    memory=ANY,
    features=FEATURES,
    needs=[needs_thp()],
)
def huge_in_part(ctx: Context) -> None:
    """A scan with max_pages inside a huge page splits it, and the rest of it stays written."""
    start = _huge(ctx, 2)
    seen = _protect(ctx, start, 2, max_pages=100)
    ctx.expect("pages found and walk_end", (seen.pages, seen.walk_end), (100, start + 100 * 4096))
    ctx.expect("bytes mapped huge", mapped_huge(start), HUGE_PAGE)
    _expect_left(ctx, start, 2, 100)


@case(
    "PAGEMAP_SCAN.ok.protects-huge-up-to-the-next",
    origin="fs/proc/task_mmu.c: pagemap_scan_thp_entry",
    memory=ANY,
    features=FEATURES,
    needs=[needs_thp()],
)
def huge_limit(ctx: Context) -> None:
    """A scan with max_pages between two huge pages leaves the second whole and written."""
    start = _huge(ctx, 2)
    seen = _protect(ctx, start, 2, max_pages=PER_HUGE)
    ctx.expect(
        "pages found and walk_end", (seen.pages, seen.walk_end), (PER_HUGE, start + HUGE_PAGE)
    )
    ctx.expect("bytes mapped huge", mapped_huge(start), 2 * HUGE_PAGE)
    _expect_left(ctx, start, 2, PER_HUGE)


# hugetlb


@case(
    "PAGEMAP_SCAN.ok.protects-hugetlb-one",
    origin="fs/proc/task_mmu.c: pagemap_scan_hugetlb_entry",
    memory=HUGETLB,
    features=FEATURES,
)
def hugetlb_one(ctx: Context) -> None:
    """A scan with max_pages of one huge page protects the first of two, and stops after it."""
    region = written(ctx, 2)
    seen = scan(ctx, region.start, end_of(region), flags=int(WP_SCAN), max_pages=PER_HUGE)
    ctx.expect("errno and pages", (seen.errno, seen.pages), (0, PER_HUGE))
    ctx.expect("walk_end", seen.walk_end, region.start + ctx.page)
    _expect_left(ctx, region.start, 2, PER_HUGE)


@case(
    "PAGEMAP_SCAN.ok.protects-hugetlb-less-than-one",
    origin="fs/proc/task_mmu.c: pagemap_scan_hugetlb_entry",
    memory=HUGETLB,
    features=FEATURES,
    variants=(
        Variant("stays", "walk_end is before the first huge page"),
        Variant("passes", "walk_end is before the last one: others are missed, a kernel bug"),
    ),
)
def hugetlb_less(ctx: Context) -> None:
    """A scan with max_pages below a huge page finds and protects nothing, and walk_end says so."""
    region = written(ctx, 3)
    seen = scan(ctx, region.start, end_of(region), flags=int(WP_SCAN), max_pages=PER_HUGE // 2)
    ctx.expect("errno and pages", (seen.errno, seen.pages), (0, 0))
    pages = (seen.walk_end - region.start) // ctx.page
    ctx.expect_variant("huge pages walked", pages, stays=0, passes=2)
    _expect_left(ctx, region.start, 3, 0)


@case(
    "PAGEMAP_SCAN.ok.protects-hugetlb-again",
    origin="fs/proc/task_mmu.c: pagemap_scan_hugetlb_entry",
    memory=HUGETLB,
    features=FEATURES,
)
def hugetlb_again(ctx: Context) -> None:
    """A scan for PRESENT that protects also finds huge pages that are protected already."""
    region = written(ctx, 2)
    whole = region.start, end_of(region)
    scan(ctx, *whole, flags=int(WP_SCAN))
    asked = {"mask": int(PRESENT), "returned": int(PRESENT | WRITTEN)}
    seen = scan(ctx, *whole, flags=int(WP_SCAN), **asked)
    ctx.expect("ranges of the second scan", seen.ranges, ((*whole, int(PRESENT)),))


def _needs_disposable() -> Need:
    def missing() -> tuple[list[str], str]:
        is_one = bool(os.environ.get(DISPOSABLE))
        return ([] if is_one else ["disposable"]), f"{DISPOSABLE} is not set"

    return Need("a machine that may hang, such as a guest", missing)


@case(
    "PAGEMAP_SCAN.ok.protects-hugetlb-hole",
    origin="fs/proc/task_mmu.c: pagemap_scan_hugetlb_hole_wp",
    memory=HUGETLB,
    features=FEATURES,
    needs=[_needs_disposable()],
    slow=True,
)
def hugetlb_hole(ctx: Context) -> None:
    """A scan protects a hole without a page table; kernels without a fix hang here."""
    flags = mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE
    flags |= mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_HUGETLB
    start = _memory.mmap(3 * GIB, READ_WRITE, flags)
    ctx.callback(_memory.munmap, start, 3 * GIB)
    edge = -(-start // GIB) * GIB + GIB // 2
    ctx.open().register(edge, ctx.page, mode=RegisterMode.WP)
    asked = {"flags": int(ScanFlag.WP_MATCHING), "mask": 0, "returned": 0}
    seen = scan(ctx, edge, edge + ctx.page, **asked)
    ctx.expect("errno of the scan", seen.errno, 0)
    ctx.expect_pagemap(edge, MARKER[ctx.memory.name])
    # With max_pages inside the first of two holes, the scan stops there.
    first = edge + GIB
    ctx.uffd.register(first, 2 * ctx.page, mode=RegisterMode.WP)
    seen = scan(ctx, first, first + 2 * ctx.page, max_pages=100, **asked)
    ctx.expect("errno with a limit", seen.errno, 0)
    ctx.expect("pages walked", (seen.walk_end - first) // SMALL_PAGE, 100)
