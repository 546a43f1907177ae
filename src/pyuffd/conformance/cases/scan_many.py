"""PAGEMAP_SCAN with more ranges than the kernel's buffer holds, and where such a walk ends (L5).

The kernel collects up to 512 ranges, copies them to user space, and continues the walk.
"""

from __future__ import annotations

from pyuffd import _memory
from pyuffd._abi import ScanFlag
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import SMALL
from pyuffd.conformance.cases.pagemap_scan import (
    FEATURES,
    WP_SCAN,
    WRITTEN,
    Scan,
    end_of,
    scan,
    tracked,
)
from pyuffd.regions import Region

GATHERED = 512  # fs/proc/task_mmu.c: PAGEMAP_WALK_SIZE >> PAGE_SHIFT
PAGES = 2048
RANGES = PAGES // 2
ORIGIN = "fs/proc/task_mmu.c: do_pagemap_scan"
WALK_END = (
    Variant("end", "walk_end is the end of the range"),
    Variant("short", "walk_end stays where the last full buffer was copied, which is a kernel bug"),
)


def _ranges(region: Region, pages: range) -> list[tuple[int, int, int]]:
    """Return the ranges that a scan finds if these single pages are written."""
    starts = [region.start + index * region.page_size for index in pages]
    return [(at, at + region.page_size, int(WRITTEN)) for at in starts]


def _every_second(ctx: Context, pages: int = PAGES) -> tuple[Region, list[tuple[int, int, int]]]:
    region = tracked(ctx, pages)
    _memory.touch(region.start, region.length, 2 * region.page_size, write=True)
    return region, _ranges(region, range(0, pages, 2))


def _expect_ranges(ctx: Context, seen: Scan, wanted: list[tuple[int, int, int]]) -> None:
    ctx.expect("errno and number of ranges", (seen.errno, seen.count), (0, len(wanted)))
    pairs = enumerate(zip(seen.ranges, wanted, strict=True))
    wrong = [index for index, (found, want) in pairs if found != want]
    ctx.expect("indexes of wrong ranges", wrong, [])


# Name, pages, and room for ranges; one call finds all ranges.
_COUNTS = (
    ("one-buffer", 2 * GATHERED, GATHERED),
    ("one-more", 2 * GATHERED + 2, GATHERED + 1),
    ("two-buffers", PAGES, RANGES),
    ("more-room", PAGES, RANGES + GATHERED),
    ("two-and-a-half", PAGES + GATHERED, RANGES + GATHERED),
)


def _add(name: str, pages: int, room: int, flags: int) -> None:
    def run(ctx: Context) -> None:
        region, wanted = _every_second(ctx, pages)
        seen = scan(ctx, region.start, end_of(region), room=room, flags=flags)
        _expect_ranges(ctx, seen, wanted)
        left = scan(ctx, region.start, end_of(region), room=room)
        ctx.expect("ranges afterwards", left.count, 0 if flags else len(wanted))

    verb = "protects and finds" if flags else "finds"
    case(
        f"PAGEMAP_SCAN.ok.many-{name}{'-protecting' if flags else ''}",
        summary=f"One call {verb} each of {pages // 2} ranges once, with room for {room}",
        origin=ORIGIN,
        memory=SMALL,
        features=FEATURES,
    )(run)


for _count in _COUNTS:
    for _flags in (0, int(WP_SCAN)):
        _add(*_count, _flags)


@case(
    "PAGEMAP_SCAN.ok.many-walk-end",
    origin=ORIGIN,
    memory=SMALL,
    features=FEATURES,
    variants=WALK_END,
)
def walk_end(ctx: Context) -> None:
    """After a complete walk, walk_end is the end of the range, however many ranges were found."""
    region, wanted = _every_second(ctx)
    seen = scan(ctx, region.start, end_of(region), room=RANGES + 1)
    _expect_ranges(ctx, seen, wanted)
    pages = (seen.walk_end - region.start) // ctx.page
    ctx.expect_variant("pages walked", pages, end=PAGES, short=RANGES)


# Name, room, max_pages, and the ranges that the first call finds.
_PARTS = (
    ("room-511", GATHERED - 1, 0, GATHERED - 1),
    ("room-512", GATHERED, 0, GATHERED),
    ("room-513", GATHERED + 1, 0, GATHERED + 1),
    ("room-700", 700, 0, 700),
    ("max-512", RANGES, GATHERED, GATHERED),
    ("max-513", RANGES, GATHERED + 1, GATHERED + 1),
    ("max-700", RANGES, 700, 700),
    ("max-700-room-600", 600, 700, 600),
)


def _add_part(name: str, room: int, max_pages: int, count: int) -> None:
    def run(ctx: Context) -> None:
        region, wanted = _every_second(ctx)
        start = region.start
        found: list[tuple[int, int, int]] = []
        while start < end_of(region) and len(found) < len(wanted):
            flags = int(WP_SCAN)
            seen = scan(ctx, start, end_of(region), room=room, max_pages=max_pages, flags=flags)
            ctx.expect("errno of the scan", seen.errno, 0)
            if not found:
                ctx.expect("ranges of the first call", seen.count, count)
            found += seen.ranges
            ctx.expect("whether walk_end moved on", seen.walk_end > start, True)
            start = seen.walk_end
        same = sorted(found) == wanted
        ctx.expect(f"whether all {len(wanted)} ranges were found once", same, True)
        ctx.expect("ranges afterwards", scan(ctx, region.start, end_of(region)).count, 0)

    limit = f"max_pages {max_pages}" if max_pages else "no max_pages"
    case(
        f"PAGEMAP_SCAN.ok.many-in-parts-{name}",
        summary=f"Calls that continue at walk_end find and protect each range once: room for {room}"
        f", {limit}",
        origin=ORIGIN,
        memory=SMALL,
        features=FEATURES,
    )(run)


for _part in _PARTS:
    _add_part(*_part)


@case("PAGEMAP_SCAN.ok.many-inverted", origin=ORIGIN, memory=SMALL, features=FEATURES)
def inverted(ctx: Context) -> None:
    """With WRITTEN inverted, one call finds each of the ranges that are not written."""
    region = tracked(ctx, PAGES)
    _memory.touch(region.start, region.length, 2 * region.page_size, write=True)
    seen = scan(
        ctx,
        region.start,
        end_of(region),
        room=RANGES,
        inverted=int(WRITTEN),
        returned=0,
        flags=int(ScanFlag(0)),
    )
    wanted = [(start, end, 0) for start, end, _ in _ranges(region, range(1, PAGES, 2))]
    _expect_ranges(ctx, seen, wanted)
