"""The write-protect series: markers, which protect pages that are not mapped (layer L5)."""

from __future__ import annotations

import mmap

from pyuffd._abi import Feature, PageCategory, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import (
    ANON,
    FILE,
    HUGETLB,
    SHMEM,
    SMALL,
    minor_features,
    missing_wp_features,
    wp_features,
)
from pyuffd.conformance._wp import (
    DATA,
    HOLE,
    IN_FILE,
    MARKER,
    MISSING_READ,
    MISSING_WP,
    MISSING_WRITE,
    UNPROTECT,
    expect_fault,
    expect_read,
    expect_silent_write,
    expect_write_fault,
    in_one_place,
    in_page_cache,
    marker_features,
    mincore,
    missing_marker_features,
    page_out,
    present,
    protected,
    smaps_bytes,
)
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import needs_swap

AROUND_PAGES = 64
MINOR_READ = 4


def _protected_hole(ctx: Context, mode: RegisterMode = RegisterMode.WP, pages: int = 1) -> Region:
    region = ctx.make(pages)
    ctx.register(region, mode)
    ctx.uffd.writeprotect(region)
    for index in range(pages):
        ctx.expect_pagemap(region.start + index * ctx.page, MARKER[ctx.memory.name])
    return region


@case(
    "wp-series.04.hole-with-marker-is-missing",
    origin="patches 04, 05: a marker is neither none nor present",
    features=missing_marker_features,
)
def hole_is_missing(ctx: Context) -> None:
    """A protected hole is missing: a read sends message 0, a write message 1."""
    region = _protected_hole(ctx, MISSING_WP, 2)
    reading = ctx.start(ctx.read, region.start)
    expect_fault(ctx, reading, MISSING_READ, region.start)
    ctx.uffd.copy(region.start, bytes([DATA]) * ctx.page)
    ctx.expect("the read", reading.result(), bytes([DATA]))
    other = region.start + ctx.page
    writing = ctx.start(ctx.write, other, b"\1")
    expect_fault(ctx, writing, MISSING_WRITE, other)
    ctx.uffd.copy(other, bytes([DATA]) * ctx.page)
    ctx.expect("the write", writing.result(), None)
    ctx.expect_quiet()


@case(
    "wp-series.04.cached-page-with-marker-is-not-missing",
    origin="patches 04, 05: a marker is neither none nor present",
    memory=FILE,
    features=missing_wp_features,
)
def cached_is_not_missing(ctx: Context) -> None:
    """A marker over a page of the page cache is not missing: a read sends no message."""
    region = ctx.make(1)
    in_page_cache(region, IN_FILE)
    ctx.register(region, MISSING_WP)
    ctx.uffd.writeprotect(region)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    expect_read(ctx, region.start, IN_FILE)
    ctx.expect("uffd-wp bit after the read", ctx.is_protected(region.start), True)
    expect_write_fault(ctx, region.start)


@case(
    "wp-series.05.mincore",
    origin="patch 05: mincore",
    features=marker_features,
)
def mincore_of_marker(ctx: Context) -> None:
    """mincore(2) treats a marker as a hole: a page is resident only if the page cache has it."""
    region = ctx.make(2)
    is_cached = ctx.memory.is_shmem
    if is_cached:
        with Region.file(region.fd or 0, ctx.page) as view:
            view.fill(IN_FILE)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    for index in range(2):
        ctx.expect_pagemap(region.start + index * ctx.page, MARKER[ctx.memory.name])
    seen = mincore(region.start, region.length)
    per_page = ctx.page // SMALL_PAGE
    ctx.expect("mincore of the first page", seen[:per_page], [int(is_cached)] * per_page)
    ctx.expect("mincore of the hole", seen[per_page:], [0] * per_page)


def _dropped(ctx: Context) -> tuple[Region, int]:
    """Make two markers; return the region and the byte that a read finds below them."""
    if ctx.memory.is_anon:
        return _protected_hole(ctx, pages=2), 0
    region = protected(ctx, 2)
    region.madvise(mmap.MADV_DONTNEED)
    return region, DATA if ctx.memory.shared else IN_FILE


@case(
    "wp-series.06.read-marker",
    origin="patch 06: handle faults on a marker",
    memory=SMALL,
    features=marker_features,
)
@case(
    "wp-series.21.read-marker",
    origin="patch 21: hugetlb: faults on a marker",
    memory=HUGETLB,
    features=marker_features,
)
def read_marker(ctx: Context) -> None:
    """A read of a marker sends no message and maps the page protected; a write sends message 3."""
    region, value = _dropped(ctx)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    expect_read(ctx, region.start, value)
    ctx.expect_pagemap(region.start, "P-?W?")
    ctx.expect_pagemap(region.start + ctx.page, MARKER[ctx.memory.name])
    expect_write_fault(ctx, region.start)
    ctx.expect("rest of the page", ctx.read(region.start + 1, 8), bytes([value]) * 8)
    expect_silent_write(ctx, region.start)


@case(
    "wp-series.06.write-marker",
    origin="patch 06: handle faults on a marker",
    memory=SMALL,
    features=marker_features,
)
@case(
    "wp-series.21.write-marker",
    origin="patch 21: hugetlb: faults on a marker",
    memory=HUGETLB,
    features=marker_features,
)
def write_marker(ctx: Context) -> None:
    """A write to a marker sends exactly one message 3, and completes after unprotecting."""
    region, value = _dropped(ctx)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    expect_write_fault(ctx, region.start)
    ctx.expect_pagemap(region.start, present(ctx, protected=False))
    ctx.expect("rest of the page", ctx.read(region.start + 1, 8), bytes([value]) * 8)
    ctx.expect_pagemap(region.start + ctx.page, MARKER[ctx.memory.name])


def _mapped_by_one_read(ctx: Context, mode: RegisterMode) -> int:
    region = ctx.make(AROUND_PAGES)
    in_page_cache(region, IN_FILE)
    if mode:
        ctx.register(region, mode)
    at = region.start + AROUND_PAGES // 2 * ctx.page
    if RegisterMode.MINOR in mode:
        access = ctx.start(ctx.read, at)
        expect_fault(ctx, access, MINOR_READ, at)
        ctx.uffd.continue_(at, ctx.page)
        ctx.expect("the read", access.result(), bytes([IN_FILE]))
    else:
        ctx.expect("the read", ctx.silently(ctx.read, at), bytes([IN_FILE]))
    pages = range(region.start, region.start + region.length, ctx.page)
    return sum(ctx.pagemap(page).startswith("P") for page in pages)


def _fault_around(ctx: Context) -> int:
    """Return how many pages one read maps in memory that is not registered."""
    ctx.open()
    around = _mapped_by_one_read(ctx, RegisterMode(0))
    if around < 2:
        ctx.lack("fault-around", "fault_around_bytes is one page")
    return around


@case(
    "wp-series.06.no-fault-around",
    origin="patch 06: fault-around",
    memory=SHMEM,
    features=missing_wp_features,
)
def no_fault_around(ctx: Context) -> None:
    """In mode WP, one read maps one page; without WP, it maps the neighbours too."""
    around = _fault_around(ctx)
    ctx.expect("pages mapped, WP", _mapped_by_one_read(ctx, RegisterMode.WP), 1)
    ctx.expect("pages mapped, MISSING|WP", _mapped_by_one_read(ctx, MISSING_WP), 1)
    ctx.expect("pages mapped, MISSING", _mapped_by_one_read(ctx, RegisterMode.MISSING), around)


@case(
    "wp-series.06.no-fault-around-minor",
    origin="patch 06: fault-around",
    memory=SHMEM,
    features=lambda memory: minor_features(memory) | wp_features(memory),
)
def no_fault_around_minor(ctx: Context) -> None:
    """Resolving one minor fault maps one page, with and without mode WP."""
    _fault_around(ctx)
    for mode in (RegisterMode.MINOR, RegisterMode.MINOR | RegisterMode.WP):
        ctx.expect(f"pages mapped, {mode!r}", _mapped_by_one_read(ctx, mode), 1)


@case(
    "wp-series.06.no-fault-around-minor-neighbour",
    origin="patch 06: fault-around",
    memory=SHMEM,
    features=minor_features,
)
def no_fault_around_neighbour(ctx: Context) -> None:
    """A neighbour of a mapped page still sends its own minor fault."""
    _fault_around(ctx)
    region = ctx.make(AROUND_PAGES)
    in_page_cache(region, IN_FILE)
    ctx.register(region, RegisterMode.MINOR)
    middle = region.start + AROUND_PAGES // 2 * ctx.page
    for at in (middle, middle + ctx.page, middle - ctx.page):
        access = ctx.start(ctx.read, at)
        expect_fault(ctx, access, MINOR_READ, at)
        ctx.uffd.continue_(at, ctx.page)
        ctx.expect("the read", access.result(), bytes([IN_FILE]))
        ctx.expect_quiet()


@case(
    "wp-series.06.no-fault-around-marker",
    origin="patch 06: fault-around",
    memory=SHMEM,
    features=wp_features,
)
def no_fault_around_marker(ctx: Context) -> None:
    """Reading a page does not change the markers beside it: each still sends message 3."""
    region = ctx.make(AROUND_PAGES)
    in_page_cache(region, IN_FILE)
    ctx.register(region, RegisterMode.WP)
    middle = region.start + AROUND_PAGES // 2 * ctx.page
    ctx.uffd.writeprotect(region)
    ctx.uffd.writeprotect(middle, ctx.page, mode=UNPROTECT)
    expect_read(ctx, middle, IN_FILE)
    for at in (middle - ctx.page, middle + ctx.page):
        ctx.expect_pagemap(at, MARKER[ctx.memory.name])
        expect_write_fault(ctx, at)


@case(
    "wp-series.09.dontneed-drops-swap-entry",
    origin="patch 09: ZAP_FLAG_SKIP_SWAP",
    memory=SMALL,
    features=wp_features,
    needs=[needs_swap()],
)
def dontneed_drops_swap(ctx: Context) -> None:
    """MADV_DONTNEED of a swapped page drops its bit if anonymous; file memory keeps a marker."""
    in_one_place(ctx)
    region = protected(ctx)
    page_out(ctx, region)
    ctx.expect_pagemap(region.start, "-?-W-")
    region.madvise(mmap.MADV_DONTNEED)
    if ctx.memory.is_anon:
        ctx.expect_pagemap(region.start, HOLE)
        expect_read(ctx, region.start, 0)
        expect_silent_write(ctx, region.start)
    else:
        ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
        expect_read(ctx, region.start, DATA if ctx.memory.shared else IN_FILE)
        expect_write_fault(ctx, region.start)


@case(
    "wp-series.11.protect-hole",
    origin="patch 11: write-protect none ptes",
    memory=SMALL,
    features=marker_features,
)
@case(
    "wp-series.22.protect-hole",
    origin="patch 22: hugetlb: write-protect none ptes",
    memory=HUGETLB,
    features=marker_features,
)
def protect_hole(ctx: Context) -> None:
    """A hole can be protected: its first write sends message 3."""
    region = _protected_hole(ctx, pages=2)
    expect_write_fault(ctx, region.start)
    ctx.expect_pagemap(region.start, present(ctx, protected=False))
    ctx.expect("rest of the page", ctx.read(region.start + 1, 8), bytes(8))
    expect_read(ctx, region.start + ctx.page, 0)
    ctx.expect("uffd-wp bit after a read", ctx.is_protected(region.start + ctx.page), True)
    expect_write_fault(ctx, region.start + ctx.page)


@case(
    "wp-series.11.protect-cached-hole",
    origin="patch 11: write-protect none ptes",
    memory=SHMEM,
    features=wp_features,
)
@case(
    "wp-series.22.protect-cached-hole",
    origin="patch 22: hugetlb: write-protect none ptes",
    memory=HUGETLB,
    features=wp_features,
)
def protect_cached_hole(ctx: Context) -> None:
    """A page in the page cache that is not mapped can be protected."""
    region = ctx.make(1)
    in_page_cache(region, IN_FILE)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    expect_write_fault(ctx, region.start)
    ctx.expect("rest of the page", ctx.read(region.start + 1, 8), bytes([IN_FILE]) * 8)


@case(
    "wp-series.11.unprotect-hole",
    origin="patch 11: write-protect none ptes",
    memory=SMALL,
    features=marker_features,
)
@case(
    "wp-series.22.unprotect-hole",
    origin="patch 22: hugetlb: write-protect none ptes",
    memory=HUGETLB,
    features=marker_features,
)
def unprotect_hole(ctx: Context) -> None:
    """Unprotecting a marker leaves a hole without one: its first write sends no message."""
    region = _protected_hole(ctx)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect_pagemap(region.start, HOLE)
    expect_silent_write(ctx, region.start)


@case(
    "wp-series.11.protect-large-hole",
    origin="patch 11: write-protect none ptes",
    memory=SMALL,
    features=marker_features,
)
def protect_large_hole(ctx: Context) -> None:
    """Protecting a range without page tables makes tables, and a marker for every page."""
    pages = 2 * HUGE_PAGE // SMALL_PAGE
    region = ctx.make(pages)
    region.advise_thp(False)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    with Pagemap() as pagemap:
        entries = pagemap.read(region)
    ctx.expect("protected pages", sum(bool(entry >> 57 & 1) for entry in entries), pages)
    expect_write_fault(ctx, region.start + (pages // 2 + 1) * ctx.page)


@case(
    "wp-series.11.anon-hole-without-feature",
    origin="patch 11: write-protect none ptes; file-backed memory only",
    memory=ANON,
    features=wp_features,
)
def anon_hole(ctx: Context) -> None:
    """Without WP_UNPOPULATED, protecting an anonymous hole succeeds and does nothing."""
    region = ctx.make(2)
    region.fill(DATA, 0, ctx.page)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    ctx.expect_pagemap(region.start, present(ctx))
    ctx.expect_pagemap(region.start + ctx.page, HOLE)
    expect_silent_write(ctx, region.start + ctx.page)
    expect_write_fault(ctx, region.start)


@case(
    "wp-series.24.bit-present-zapped",
    origin="patch 24: pagemap for shmem and hugetlb",
    features=wp_features,
)
def bit_in_pagemap(ctx: Context) -> None:
    """Bit 57 of pagemap is set for a protected page, and for a zapped one of file memory."""
    region = protected(ctx)
    ctx.expect("uffd-wp bit of the page", ctx.is_protected(region.start), True)
    region.madvise(mmap.MADV_DONTNEED)
    kept = not ctx.memory.is_anon
    ctx.expect("uffd-wp bit after MADV_DONTNEED", ctx.is_protected(region.start), kept)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect_pagemap(region.start, HOLE)


@case(
    "wp-series.24.bit-swapped",
    origin="patch 24: pagemap for shmem and hugetlb",
    memory=SMALL,
    features=wp_features,
    needs=[needs_swap()],
)
def bit_swapped(ctx: Context) -> None:
    """Bit 57 of pagemap is set for a protected page that is swapped out."""
    in_one_place(ctx)
    region = protected(ctx)
    page_out(ctx, region)
    ctx.expect("uffd-wp bit of the swapped page", ctx.is_protected(region.start), True)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect("uffd-wp bit after unprotecting", ctx.is_protected(region.start), False)
    expect_silent_write(ctx, region.start)
    ctx.expect("rest of the page", ctx.read(region.start + 1, 8), bytes([DATA]) * 8)


@case(
    "wp-series.24.marker-bits",
    origin="patch 24: pagemap for shmem and hugetlb",
    features=marker_features,
    variants=[
        Variant("marker", "a PTE marker: bit 57, and the swap bit 62 except on hugetlb"),
        Variant(
            "special-pte",
            "as in v5 of the series: bit 57 alone; a kernel with WP_UNPOPULATED has markers",
            lacks=Feature.WP_UNPOPULATED,
        ),
    ],
)
def marker_bits(ctx: Context) -> None:
    """A protected hole shows bit 57 in pagemap, and bit 62, which does not mean swap here."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    state = ctx.pagemap(region.start)
    marker = "---W-" if ctx.memory.is_hugetlb else "-S-W-"
    ctx.expect_variant("pagemap of a protected hole", state, marker=marker, special_pte="---W-")


@case(
    "wp-series.24.scan-marker",
    origin="patch 24: pagemap for shmem and hugetlb; PAGEMAP_SCAN came later",
    # PAGEMAP_SCAN came with WP_ASYNC, and its handling of holes depends on WP_UNPOPULATED.
    features=lambda memory: marker_features(memory) | Feature.WP_ASYNC | Feature.WP_UNPOPULATED,
)
def scan_marker(ctx: Context) -> None:
    """PAGEMAP_SCAN reports a marker as SWAPPED, and a protected page as PRESENT, not WRITTEN."""
    region = ctx.make(2)
    region.fill(DATA, 0, ctx.page)
    ctx.open(marker_features(ctx.memory))
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    everything = PageCategory.WRITTEN | PageCategory.PRESENT | PageCategory.SWAPPED
    with Pagemap() as pagemap:
        for index, wanted in enumerate((PageCategory.PRESENT, PageCategory.SWAPPED)):
            at = region.start + index * ctx.page
            ranges = pagemap.scan(
                at, ctx.page, category_anyof_mask=everything, return_mask=everything
            ).ranges
            seen = [(found.start, found.end, int(found.categories)) for found in ranges]
            ctx.expect(f"scan of page {index}", seen, [(at, at + ctx.page, int(wanted))])


@case(
    "wp-series.24.swap-is-not-in-pagemap",
    origin="discussion of patch 24: PM_SWAP for shmem",
    memory=("shmem",),
    features=wp_features,
    needs=[needs_swap()],
)
def shmem_swap(ctx: Context) -> None:
    """Swapped-out shared memory looks in pagemap like a hole, or like a marker if protected."""
    in_one_place(ctx)
    region = ctx.make(2)
    ctx.register(region, RegisterMode.WP)
    region.fill(DATA)
    ctx.uffd.writeprotect(region.start, ctx.page)
    page_out(ctx, region)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    ctx.expect_pagemap(region.start + ctx.page, HOLE)
    ctx.expect("Swap in smaps", smaps_bytes(region.start, "Swap"), 2 * ctx.page, ctx.page)
    expect_read(ctx, region.start + ctx.page, DATA)
    expect_read(ctx, region.start, DATA)
    expect_write_fault(ctx, region.start)
