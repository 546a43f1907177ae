"""The write-protect series, patch 05: swap, swapoff, migration, memory pressure (layer L5)."""

from __future__ import annotations

import re
from bisect import bisect_right
from pathlib import Path

from pyuffd._abi import Feature, PageBit, RegisterMode
from pyuffd.conformance import _swap
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Child, Context
from pyuffd.conformance._memcg import limited_memory, needs_memcg
from pyuffd.conformance._types import SMALL, wp_features
from pyuffd.conformance._wp import (
    DATA,
    HOLE,
    MARKER,
    PFN_MASK,
    UNPROTECT,
    WRITTEN,
    expect_read,
    expect_silent_write,
    expect_write_fault,
    in_one_place,
    page_out,
    present,
    protected,
)
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.testing._memory_types import MemoryType
from pyuffd.testing._need import needs_privilege, needs_swap

ORIGIN = "patch 05: swap entries and markers"
AREA_BYTES = 16 << 20
# The kernel continues for a while to use the swap area that it used last on this CPU.
FILLER_BYTES = 4 << 20
SWAPOFF_TRIES = 4
COMPACT = Path("/proc/sys/vm/compact_memory")
ZONES, MEMINFO = Path("/proc/zoneinfo"), Path("/proc/meminfo")
# A write makes each CPU keep an eighth fewer free pages, down to a minimum.
REFRESH = Path("/proc/sys/vm/stat_refresh")
MIGRATION_REFRESHES = 64
MIGRATION_PAGES, MIGRATION_KEPT = 1 << 16, 1024
MIGRATION_SHARE = 8  # use an eighth of the available memory at most
MIGRATION_TRIES = 8  # more than one is needed only where others take the free pages
LIMIT = 4 << 20
CHUNK = 64 << 10  # what a child writes at once


@case(
    "wp-series.05.swap-in-by-read",
    origin=ORIGIN,
    memory=SMALL,
    features=wp_features,
    needs=[needs_swap()],
)
def swap_in_by_read(ctx: Context) -> None:
    """A protected page that a read swaps in stays protected; the read sends no message."""
    in_one_place(ctx)
    region = protected(ctx, 2)
    page_out(ctx, region)
    ctx.expect_pagemap(region.start, "-?-W-")
    expect_read(ctx, region.start, DATA)
    ctx.expect_pagemap(region.start, "P-?W?")
    expect_write_fault(ctx, region.start)
    ctx.expect("rest of the page", ctx.read(region.start + 1, 8), bytes([DATA]) * 8)


@case(
    "wp-series.05.swap-in-by-write",
    origin=ORIGIN,
    memory=SMALL,
    features=wp_features,
    needs=[needs_swap()],
)
def swap_in_by_write(ctx: Context) -> None:
    """A write to a protected page in swap sends one message 3 and no other; the data is kept."""
    in_one_place(ctx)
    region = protected(ctx, 2)
    page_out(ctx, region)
    expect_write_fault(ctx, region.start)
    ctx.expect_pagemap(region.start, present(ctx, protected=False))
    ctx.expect("rest of the page", ctx.read(region.start + 1, 8), bytes([DATA]) * 8)
    expect_write_fault(ctx, region.start + ctx.page)


@case(
    "wp-series.05.protect-in-swap",
    origin=ORIGIN,
    memory=SMALL,
    features=wp_features,
    needs=[needs_swap()],
)
def protect_in_swap(ctx: Context) -> None:
    """Pages that are protected or unprotected while in swap are so after swap-in."""
    in_one_place(ctx)
    region = ctx.make(2)
    ctx.register(region, RegisterMode.WP)
    region.fill(DATA)
    page_out(ctx, region)
    ctx.expect_pagemap(region.start, HOLE if ctx.memory.shared else "-S---")
    ctx.uffd.writeprotect(region)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    other = region.start + ctx.page
    ctx.uffd.writeprotect(other, ctx.page, mode=UNPROTECT)
    expect_read(ctx, region.start, DATA)
    expect_read(ctx, other, DATA)
    expect_write_fault(ctx, region.start)
    expect_silent_write(ctx, other)


@case(
    "wp-series.05.swapoff",
    origin="patch 05: unuse_pte_range",
    memory=SMALL,
    features=wp_features,
    needs=[needs_privilege("CAP_SYS_ADMIN")],
    alone=True,
)
def swapoff(ctx: Context) -> None:
    """swapoff(2) keeps pages protected that it swaps in; shared memory keeps a marker."""
    in_one_place(ctx)
    region = protected(ctx, 2)
    other = region.start + ctx.page
    ctx.uffd.writeprotect(other, ctx.page, mode=UNPROTECT)
    filler = ctx.make(FILLER_BYTES // ctx.page, "anon")
    filler.advise_thp(False)
    for _ in range(SWAPOFF_TRIES):
        with _swap.own_area(AREA_BYTES) as area:
            filler.fill(1)
            filler.pageout()
            page_out(ctx, region)
            ctx.expect_pagemap(region.start, "-?-W-")
            area.off()
        if ctx.memory.shared or ctx.pagemap(region.start).startswith("P"):
            break
        # The page was in another swap area.
        ctx.expect_pagemap(region.start, "-S-W-")
        ctx.silently(ctx.read, region.start)
        ctx.silently(ctx.read, other)
    wanted = MARKER[ctx.memory.name] if ctx.memory.shared else present(ctx)
    ctx.expect_pagemap(region.start, wanted)
    expect_read(ctx, region.start, DATA)
    expect_read(ctx, other, DATA)
    expect_write_fault(ctx, region.start)
    expect_silent_write(ctx, other)


@case(
    "wp-series.05.migration",
    origin="discussion of patch 05 (Alistair Popple): migration entries",
    memory=SMALL,
    features=wp_features,
    needs=[needs_privilege("CAP_SYS_ADMIN")],
    budget_s=120,
    alone=True,
    noisy=True,
)
def migration(ctx: Context) -> None:
    """Pages that compaction moves stay protected, and keep their data."""
    if not COMPACT.exists():
        ctx.lack("compaction", "there is no CONFIG_COMPACTION")
    in_one_place(ctx)
    ctx.open()
    for _ in range(MIGRATION_TRIES):
        region = _below_free_pages(ctx)
        ctx.uffd.register(region, mode=RegisterMode.WP)
        ctx.uffd.writeprotect(region)
        before = _frames(region)
        COMPACT.write_text("1")
        after = _frames(region)
        if moved := [at for at, new in after.items() if before[at] != new]:
            break
    else:
        ctx.lack("migration", f"compaction moved none of {MIGRATION_TRIES} x {len(before)} pages")
    ctx.note(f"compaction moved {len(moved)} of {len(before)} pages")
    lost = [hex(at) for at in before if not ctx.is_protected(at)]
    ctx.expect("pages that lost their uffd-wp bit", lost, [])
    for at in {moved[0], moved[-1]}:
        ctx.expect("content", ctx.silently(ctx.read, at, ctx.page), bytes([DATA]) * ctx.page)
        expect_write_fault(ctx, at)


def _below_free_pages(ctx: Context) -> Region:
    """Make memory at the lowest frames of a zone, below free pages, for compaction to move it up.

    Compaction moves the lowest pages of a zone first, also those of others, until no free pages are
    left in the zone. On a machine that is short of free pages, memory comes from several zones.
    """
    pages = min(MIGRATION_PAGES, _available() // MIGRATION_SHARE // ctx.page)
    region = ctx.make(pages)
    if not region.shared:
        region.advise_thp(False)
    region.fill(DATA)
    frames = _frames(region)
    zones = _zone_starts()
    by_zone: dict[int, list[int]] = {}
    for frame in frames.values():
        by_zone.setdefault(bisect_right(zones, frame), []).append(frame)
    most = max(by_zone, key=lambda zone: len(by_zone[zone]))
    lowest = set(sorted(by_zone[most])[:MIGRATION_KEPT])
    run = region.start
    for at in [*frames, region.start + region.length]:
        if at not in frames or frames[at] in lowest:
            if at > run:
                region.punch_hole(run - region.start, at - run)
            run = at + ctx.page
    # Each CPU keeps some freed pages, which compaction does not see. Since Linux 6.7 their number
    # adapts; make it fall to its minimum.
    kept = _pages_with_cpus("high_min" if "high_min" in ZONES.read_text() else "high")
    for _ in range(MIGRATION_REFRESHES):
        REFRESH.write_text("1")
        if _pages_with_cpus("count") <= kept:
            break
    return region


def _zone_starts() -> list[int]:
    """Return the first page frame of each zone."""
    return sorted(map(int, re.findall(r"^ +start_pfn: *(\d+)", ZONES.read_text(), re.MULTILINE)))


def _available() -> int:
    """Return the available memory in bytes."""
    found = re.search(r"MemAvailable: *(\d+) kB", MEMINFO.read_text())
    assert found is not None
    return int(found[1]) << 10


def _pages_with_cpus(field: str) -> int:
    """Return the largest value of a field of the per-CPU free lists, over all CPUs and zones."""
    return max(map(int, re.findall(rf"^ +{field}: *(\d+)", ZONES.read_text(), re.MULTILINE)))


def _frames(region: Region) -> dict[int, int]:
    """Return the page frame of each present page, by address."""
    with Pagemap() as pagemap:
        entries = pagemap.read(region)
    return {
        region.start + index * region.page_size: entry & PFN_MASK
        for index, entry in enumerate(entries)
        if entry & PageBit.PRESENT
    }


def _pressed_features(memory: MemoryType) -> Feature:
    return wp_features(memory) | Feature.EVENT_FORK


def _write_all(child: Child, region: Region, value: int) -> None:
    for at in range(region.start, region.start + region.length, CHUNK):
        child.write(at, bytes([value]) * CHUNK)


@case(
    "wp-series.05.memory-pressure",
    origin="cover letter: umapsort with swapping",
    memory=SMALL,
    features=_pressed_features,
    needs=[needs_swap(), needs_memcg()],
)
def memory_pressure(ctx: Context) -> None:
    """Pages that a control group's memory limit swaps out stay protected and keep their data."""
    region = ctx.make(LIMIT // 2 // ctx.page)
    filler = ctx.make(2 * LIMIT // ctx.page, "anon")
    for each in (region, filler):
        if not each.shared:
            each.advise_thp(False)
    ctx.register(region, RegisterMode.WP)
    child = ctx.fork()
    uffd = child.uffd
    assert uffd is not None
    with limited_memory(LIMIT, child.pid):
        _write_all(child, region, DATA)
        uffd.writeprotect(region)
        ctx.expect("child's uffd-wp bit", ctx.is_protected(region.start, pid=child.pid), True)
        _write_all(child, filler, WRITTEN)
        pages = range(region.start, region.start + region.length, ctx.page)
        states = [child.pagemap(at) for at in pages]
        ctx.expect("pages that lost their uffd-wp bit", [s for s in states if s[3] != "W"], [])
        out = [at for at, state in zip(pages, states, strict=True) if not state.startswith("P")]
        if not out:
            ctx.lack("memory-pressure", "no page was swapped out")
        ctx.note(f"{len(out)} of {len(pages)} pages were swapped out")
        for at in (out[0], out[-1]):
            seen = ctx.silently(child.read, at, ctx.page)
            ctx.expect(f"content of {at:#x}", seen, bytes([DATA]) * ctx.page)
            expect_write_fault(ctx, at, uffd, child.write)
        child.close()
