"""The write-protect series, patch 05: swap, swapoff, migration, memory pressure (layer L5)."""

from __future__ import annotations

from pathlib import Path

from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance import _swap
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Child, Context
from pyuffd.conformance._need import needs_privilege, needs_swap
from pyuffd.conformance._types import SMALL, MemoryType, wp_features
from pyuffd.conformance._wp import (
    DATA,
    HOLE,
    MARKER,
    UNPROTECT,
    WRITTEN,
    expect_read,
    expect_silent_write,
    expect_write_fault,
    frame,
    in_one_place,
    page_out,
    present,
    protected,
)
from pyuffd.conformance.cases.kselftest_stress import limited_memory, needs_memcg
from pyuffd.regions import Region

ORIGIN = "patch 05: swap entries and markers"
AREA_BYTES = 16 << 20
# The kernel goes on for a while with the swap area that it used last on this CPU.
FILLER_BYTES = 4 << 20
SWAPOFF_TRIES = 4
COMPACT = Path("/proc/sys/vm/compact_memory")
MIGRATION_PAGES = 1024
MIGRATION_TRIES = 32  # where the pages of this machine lie is luck
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
    """A protected page that is read back from swap is protected, without a message."""
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
    """A write to a protected page in swap gives one message 3 and no other; the data is kept."""
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
    """Protecting and unprotecting pages that are in swap is remembered when they come back."""
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
    """Swapoff brings pages back as protected as they were; a marker of shared memory stays."""
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
        # It lay in another area.
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
    slow=True,
    alone=True,
)
def migration(ctx: Context) -> None:
    """Pages that compaction moves stay protected, and keep their data."""
    if not COMPACT.exists():
        ctx.lack("compaction", "there is no CONFIG_COMPACTION")
    in_one_place(ctx)
    ctx.open()
    pages: list[int] = []
    for _ in range(MIGRATION_TRIES):
        # It moves pages up while there is room: those below have to be gone before these come.
        COMPACT.write_text("1")
        pages += _protected_pages(ctx)
        before = [frame(at) for at in pages]
        COMPACT.write_text("1")
        if moved := [at for at, old in zip(pages, before, strict=True) if frame(at) != old]:
            break
    else:
        ctx.lack("migration", f"compaction moved none of {len(pages)} pages")
    ctx.note(f"{len(moved)} of {len(pages)} pages were moved")
    lost = [hex(at) for at in pages if not ctx.is_protected(at)]
    ctx.expect("pages that lost their bit", lost, [])
    ctx.expect("content", ctx.silently(ctx.read, moved[0], ctx.page), bytes([DATA]) * ctx.page)
    expect_write_fault(ctx, moved[0])


def _protected_pages(ctx: Context) -> range:
    region = ctx.make(MIGRATION_PAGES)
    region.advise_thp(False)
    ctx.register(region, RegisterMode.WP)
    region.fill(DATA)
    ctx.uffd.writeprotect(region)
    return range(region.start, region.start + region.length, ctx.page)


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
    """Pages that a memory control group's limit drives out stay protected and keep their data."""
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
        ctx.expect("bit", ctx.is_protected(region.start, pid=child.pid), True)
        _write_all(child, filler, WRITTEN)
        pages = range(region.start, region.start + region.length, ctx.page)
        states = [child.pagemap(at) for at in pages]
        ctx.expect("pages that lost their bit", [s for s in states if s[3] != "W"], [])
        out = [at for at, state in zip(pages, states, strict=True) if not state.startswith("P")]
        if not out:
            ctx.lack("memory-pressure", "no page was driven out")
        ctx.note(f"{len(out)} of {len(pages)} pages were driven out")
        for at in (out[0], out[-1]):
            seen = ctx.silently(child.read, at, ctx.page)
            ctx.expect(f"content of {at:#x}", seen, bytes([DATA]) * ctx.page)
            expect_write_fault(ctx, at, uffd, child.write)
        child.close()
