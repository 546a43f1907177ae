"""The write-protect series: UFFDIO_COPY and the other fill ioctls (layer L5)."""

from __future__ import annotations

import errno

from pyuffd._abi import ContinueMode, CopyMode, Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import (
    ANON,
    FILE,
    HUGETLB,
    SHARED,
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
    missing_marker_features,
    page_out,
    present,
    smaps_bytes,
)
from pyuffd.regions import Region
from pyuffd.testing._memory_types import MemoryType
from pyuffd.testing._need import needs_swap


def _poison(memory: MemoryType) -> Feature:
    return missing_marker_features(memory) | Feature.POISON


@case(
    "wp-series.01.copied-data-survives-reclaim",
    origin="patch 01: always set the dirty bit in the ioctls' pages",
    memory=SMALL,
    features=missing_wp_features,
    needs=[needs_swap()],
)
def copied_data_survives(ctx: Context) -> None:
    """A page that COPY filled, protected or not, keeps its content through reclaim."""
    in_one_place(ctx)
    region = ctx.make(2)
    ctx.register(region, MISSING_WP)
    ctx.uffd.copy(region.start, bytes([DATA]) * ctx.page)
    ctx.uffd.copy(region.start + ctx.page, bytes([IN_FILE]) * ctx.page, mode=CopyMode.WP)
    page_out(ctx, region)
    expect_read(ctx, region.start, DATA)
    expect_read(ctx, region.start + ctx.page, IN_FILE)
    ctx.expect(
        "uffd-wp bit of the page copied with MODE_WP",
        ctx.is_protected(region.start + ctx.page),
        True,
    )
    ctx.expect("uffd-wp bit of the page copied without", ctx.is_protected(region.start), False)


@case(
    "wp-series.01.copied-pages-are-dirty",
    origin="patch 01: always set the dirty bit in the ioctls' pages",
    memory=SMALL,
    features=missing_wp_features,
)
def copied_pages_are_dirty(ctx: Context) -> None:
    """A page that COPY filled counts as dirty in smaps, protected or not."""
    region = ctx.make(2)
    ctx.register(region, MISSING_WP)
    ctx.uffd.copy(region.start, bytes([DATA]) * ctx.page)
    ctx.uffd.copy(region.start + ctx.page, bytes([DATA]) * ctx.page, mode=CopyMode.WP)
    dirty = smaps_bytes(region.start, "Private_Dirty")
    ctx.expect("Private_Dirty in smaps", dirty, 2 * ctx.page)


@case(
    "wp-series.02.copy-mode-wp",
    origin="patch 02: UFFDIO_COPY_MODE_WP on shmem",
    memory=SMALL,
    features=missing_wp_features,
)
@case(
    "wp-series.18.copy-mode-wp",
    origin="patch 18: UFFDIO_COPY_MODE_WP on hugetlb",
    memory=HUGETLB,
    features=missing_wp_features,
)
def copy_mode_wp(ctx: Context) -> None:
    """After COPY with MODE_WP, the first write sends one message 3; without MODE_WP, none."""
    region = ctx.make(2)
    ctx.register(region, MISSING_WP)
    other = region.start + ctx.page
    reading = ctx.start(ctx.read, region.start)
    expect_fault(ctx, reading, MISSING_READ, region.start)
    ctx.uffd.copy(region.start, bytes([DATA]) * ctx.page, mode=CopyMode.WP)
    ctx.expect("the read", reading.result(), bytes([DATA]))
    ctx.expect_pagemap(region.start, present(ctx))
    expect_read(ctx, region.start, DATA)
    expect_write_fault(ctx, region.start)
    expect_silent_write(ctx, region.start)
    ctx.uffd.copy(other, bytes([DATA]) * ctx.page)
    ctx.expect_pagemap(other, present(ctx, protected=False))
    expect_silent_write(ctx, other)


def _marker(ctx: Context, mode: RegisterMode = MISSING_WP, pages: int = 1) -> Region:
    """Make memory without pages and protect it."""
    region = ctx.make(pages)
    ctx.register(region, mode)
    ctx.uffd.writeprotect(region)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    return region


@case(
    "wp-series.13.copy-over-marker",
    origin="patch 13: left-over markers",
    features=missing_marker_features,
)
def copy_over_marker(ctx: Context) -> None:
    """COPY fills a protected hole; the page is protected afterwards only with MODE_WP."""
    region = _marker(ctx, pages=2)
    other = region.start + ctx.page
    ctx.uffd.copy(region.start, bytes([DATA]) * ctx.page)
    ctx.expect_pagemap(region.start, present(ctx, protected=False))
    expect_silent_write(ctx, region.start)
    ctx.uffd.copy(other, bytes([DATA]) * ctx.page, mode=CopyMode.WP)
    ctx.expect_pagemap(other, present(ctx))
    expect_read(ctx, other, DATA)
    expect_write_fault(ctx, other)


@case(
    "wp-series.13.zeropage-over-marker",
    origin="patch 13: left-over markers",
    memory=SMALL,
    features=missing_marker_features,
)
def zeropage_over_marker(ctx: Context) -> None:
    """ZEROPAGE fills and unprotects a protected hole of shared memory; on private it is EEXIST."""
    region = _marker(ctx)
    answer = ctx.ioctl("ZEROPAGE", region.start, ctx.page)
    if ctx.memory.shared:
        ctx.expect("errno and .zeropage", (answer.errno, answer.result), (0, ctx.page))
        ctx.expect("whether the page is protected", ctx.is_protected(region.start), False)
        expect_silent_write(ctx, region.start)
    else:
        wanted = (errno.EEXIST, -errno.EEXIST)
        ctx.expect("errno and .zeropage", (answer.errno, answer.result), wanted)
        ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])


@case("wp-series.13.poison-over-marker", origin="patch 13: left-over markers", features=_poison)
def poison_over_marker(ctx: Context) -> None:
    """POISON of a protected hole is EEXIST, and the hole stays protected."""
    region = _marker(ctx)
    answer = ctx.ioctl("POISON", region.start, ctx.page)
    wanted = (errno.EEXIST, -errno.EEXIST)
    ctx.expect("errno and .updated", (answer.errno, answer.result), wanted)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])


@case(
    "wp-series.13.move-over-marker",
    origin="patch 13: left-over markers",
    memory=ANON,
    features=lambda memory: missing_marker_features(memory) | Feature.MOVE,
)
def move_over_marker(ctx: Context) -> None:
    """MOVE onto a protected hole is EEXIST, and the source keeps its page."""
    region, source = _marker(ctx), ctx.make(1)
    source.fill(DATA)
    answer = ctx.ioctl("MOVE", region.start, source.start, ctx.page)
    wanted = (errno.EEXIST, -errno.EEXIST)
    ctx.expect("errno and .move", (answer.errno, answer.result), wanted)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    expect_read(ctx, source.start, DATA)


@case(
    "wp-series.13.continue-over-marker",
    origin="patch 13: left-over markers",
    memory=FILE,
    # CONTINUE_MODE_WP has no feature bit, but every kernel with WP_UNPOPULATED has it.
    features=lambda memory: minor_features(memory) | wp_features(memory) | Feature.WP_UNPOPULATED,
)
def continue_over_marker(ctx: Context) -> None:
    """CONTINUE maps a page over a marker; the page stays protected only with MODE_WP."""
    region = ctx.make(2)
    in_page_cache(region, IN_FILE)
    ctx.register(region, RegisterMode.MINOR | RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    other = region.start + ctx.page
    ctx.uffd.continue_(region.start, ctx.page)
    ctx.uffd.continue_(other, ctx.page, mode=ContinueMode.WP)
    ctx.expect("uffd-wp bit after CONTINUE", ctx.is_protected(region.start), False)
    ctx.expect("uffd-wp bit after CONTINUE with MODE_WP", ctx.is_protected(other), True)
    for at in (region.start, other):
        expect_read(ctx, at, IN_FILE)
    expect_silent_write(ctx, region.start)
    expect_write_fault(ctx, other)


@case(
    "wp-series.13.stale-marker-is-missing",
    origin="patch 13: left-over markers",
    memory=SHARED,
    features=missing_wp_features,
)
def stale_marker(ctx: Context) -> None:
    """A protected page whose data was removed is missing: a read sends message 0, a write 1."""
    region = ctx.make(2)
    region.fill(DATA)
    ctx.register(region, MISSING_WP)
    ctx.uffd.writeprotect(region)
    region.punch_hole()
    other = region.start + ctx.page
    reading = ctx.start(ctx.read, region.start)
    expect_fault(ctx, reading, MISSING_READ, region.start)
    ctx.uffd.copy(region.start, bytes([IN_FILE]) * ctx.page)
    ctx.expect("the read", reading.result(), bytes([IN_FILE]))
    expect_silent_write(ctx, region.start)
    writing = ctx.start(ctx.write, other, b"\1")
    expect_fault(ctx, writing, MISSING_WRITE, other)
    ctx.uffd.copy(other, bytes([IN_FILE]) * ctx.page)
    ctx.expect("the write", writing.result(), None)
    ctx.expect_quiet()


def _expect_clean(ctx: Context, region: Region, when: str) -> None:
    for index in range(2):
        at = region.start + index * ctx.page
        ctx.expect(f"uffd-wp bit of page {index} {when}", ctx.is_protected(at), False)
        expect_silent_write(ctx, at)


def _page_and_marker(ctx: Context) -> Region:
    """Make and protect memory of two pages, of which only the first is present."""
    region = ctx.make(2)
    region.fill(DATA, 0, ctx.page)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    ctx.expect_pagemap(region.start, present(ctx))
    ctx.expect_pagemap(region.start + ctx.page, MARKER[ctx.memory.name])
    return region


@case(
    "wp-series.13.unregister-clears",
    origin="patch 13: left-over markers; the walk that UNREGISTER makes",
    features=marker_features,
)
def unregister_clears(ctx: Context) -> None:
    """UNREGISTER removes bits and markers of its range only."""
    region = _page_and_marker(ctx)
    ctx.uffd.unregister(region.start, ctx.page)
    ctx.expect("uffd-wp bit of the unregistered half", ctx.is_protected(region.start), False)
    ctx.expect_pagemap(region.start + ctx.page, MARKER[ctx.memory.name])
    ctx.uffd.unregister(region.start + ctx.page, ctx.page)
    ctx.expect_pagemap(region.start + ctx.page, HOLE)
    _expect_clean(ctx, region, "after UNREGISTER")


@case(
    "wp-series.13.close-clears",
    origin="patch 13: left-over markers; the walk that close makes",
    features=marker_features,
)
def close_clears(ctx: Context) -> None:
    """Closing the userfaultfd removes bits and markers."""
    region = _page_and_marker(ctx)
    ctx.uffd.close()
    ctx.expect_pagemap(region.start + ctx.page, HOLE)
    _expect_clean(ctx, region, "after close")


@case(
    "wp-series.13.unregister-clears-swapped",
    origin="patch 13: left-over markers; the walk that UNREGISTER makes",
    memory=SMALL,
    features=wp_features,
    needs=[needs_swap()],
)
def unregister_clears_swapped(ctx: Context) -> None:
    """UNREGISTER removes the bits of swapped pages too, and keeps the data."""
    in_one_place(ctx)
    region = ctx.make(2)
    ctx.register(region, RegisterMode.WP)
    region.fill(DATA)
    ctx.uffd.writeprotect(region)
    page_out(ctx, region)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    ctx.uffd.unregister(region)
    expect_read(ctx, region.start, DATA)
    _expect_clean(ctx, region, "after UNREGISTER")


@case(
    "wp-series.13.unprotect-before-register",
    origin="patch 13: left-over markers; what pyuffd does about replaced modes",
    features=missing_wp_features,
    variants=[
        Variant("replaced", "REGISTER replaces the modes"),
        Variant("refused", "REGISTER does not replace modes: EBUSY"),
    ],
)
def unprotect_before_register(ctx: Context) -> None:
    """After the library registers again in mode MISSING only, no page is protected."""
    region = ctx.make(2)
    ctx.register(region, RegisterMode.WP)
    region.fill(DATA)
    ctx.uffd.writeprotect(region)
    code = 0
    try:
        ctx.register(region, RegisterMode.MISSING)
    except OSError as error:
        code = error.errno or 0
    ctx.expect_variant("errno of REGISTER", code, replaced=0, refused=errno.EBUSY)
    _expect_clean(ctx, region, "after REGISTER")
    if not code:
        protect = (region.start, ctx.page)
        ctx.expect_errno(errno.ENOENT, ctx.uffd.writeprotect, *protect, mode=UNPROTECT)
