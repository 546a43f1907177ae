"""PAGEMAP_SCAN: its argument, where a walk ends, and how categories match (layer L5).

From pagemap_ioctl of the kernel's selftests. `scan` makes a single ioctl, so that the cases see the
result of one walk. `pagemap_scan_memory` has the cases of what counts as written.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import struct
from dataclasses import dataclass

from pyuffd._abi import Feature, PageCategory, RegisterMode, ScanFlag
from pyuffd.conformance import _raw
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._types import ALL, ANON, ANY
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE

PAGEMAP_SCAN = 0xC0606610
SIZE = 96
FEATURES = Feature.WP_UNPOPULATED | Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM
WRITTEN, PRESENT = PageCategory.WRITTEN, PageCategory.PRESENT
WP_SCAN = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC
# The categories that every kernel with PAGEMAP_SCAN knows; the selftest's "all bits".
ALL_BITS = (
    PageCategory.WPALLOWED
    | WRITTEN
    | PageCategory.FILE
    | PRESENT
    | PageCategory.SWAPPED
    | PageCategory.PFNZERO
    | PageCategory.HUGE
    | PageCategory.SOFT_DIRTY
)
ORIGIN = "pagemap_ioctl"
ROOM = 1024  # ranges; the selftests' "big" vector


@dataclass(frozen=True)
class Scan:
    """The outcome of one ioctl: errno, result, ranges (start, end, categories), and walk_end."""

    errno: int
    count: int
    ranges: tuple[tuple[int, int, int], ...]
    walk_end: int

    @property
    def pages(self) -> int:
        """The number of small pages in all ranges."""
        return sum(end - start for start, end, _ in self.ranges) // SMALL_PAGE


def scan(
    ctx: Context,
    start: int,
    end: int,
    *,
    flags: int = 0,
    room: int = ROOM,
    vec: int | None = None,
    vec_len: int | None = None,
    max_pages: int = 0,
    inverted: int = 0,
    mask: int = WRITTEN,
    anyof: int = 0,
    returned: int = WRITTEN,
    size: int = SIZE,
    pid: int | None = None,
) -> Scan:
    """Make one PAGEMAP_SCAN of a process, by default this one.

    `room` makes a vector for this many ranges; `vec` and `vec_len` replace its address and length.
    """
    ranges = (ctypes.c_uint64 * (3 * room))()
    at = ctypes.addressof(ranges) if room else 0
    words = (
        size,
        flags,
        start,
        end,
        0,
        at if vec is None else vec,
        room if vec_len is None else vec_len,
        max_pages,
        inverted,
        mask,
        anyof,
        returned,
    )
    argument = bytearray(struct.pack("=12Q", *words))
    fd = os.open(f"/proc/{pid or 'self'}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        count = _raw.call(fd, PAGEMAP_SCAN, argument)
    finally:
        os.close(fd)
    code, count = max(-count, 0), max(count, 0)
    found = tuple((ranges[i], ranges[i + 1], ranges[i + 2]) for i in range(0, 3 * count, 3))
    result = Scan(code, count, found, struct.unpack("=12Q", argument)[4])
    ctx.note(f"PAGEMAP_SCAN {[hex(word) for word in words[1:4]]}: {result}")
    return result


def tracked(ctx: Context, pages: int) -> Region:
    """Make memory that is registered in mode WP with WP_ASYNC, and protected."""
    region = ctx.make(pages)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    return region


def written(ctx: Context, pages: int, step: int = 1) -> Region:
    """Make tracked memory and write every `step`th page."""
    region = tracked(ctx, pages)
    write(region, range(0, pages, step))
    return region


def write(region: Region, pages: range) -> None:
    """Write a byte of these pages."""
    for index in pages:
        region.write(index * region.page_size, b"\1")


def end_of(region: Region) -> int:
    """Return the end address of a region."""
    return region.start + region.length


# Argument sanity


def _add_argument(name: str, text: str, code: int, *changes: dict[str, int]) -> None:
    def run(ctx: Context) -> None:
        region = written(ctx, 10)
        for change in changes:
            result = scan(ctx, region.start, end_of(region), **change)
            ctx.expect(f"errno with {change}", result.errno, code)
        left = scan(ctx, region.start, end_of(region))
        ctx.expect("pages still written", left.pages, 10)

    case(
        f"PAGEMAP_SCAN.{errno.errorcode[code]}.{name}",
        origin=f"{ORIGIN}: argument sanity",
        memory=ANY,
        features=FEATURES,
        summary=text,
    )(run)


_add_argument("vec-null", "A vec_len without a vec is refused", errno.EINVAL, {"vec": 0})
_add_argument(
    "flags-unknown",
    "An unknown flag is refused",
    errno.EINVAL,
    {"flags": (1 << 64) - 1},
    {"flags": WP_SCAN | 0xFF},
)
_add_argument(
    "categories-unknown",
    "An unknown category in any of the four masks is refused",
    errno.EINVAL,
    {"returned": 1 << 12},
    {"mask": 1 << 12},
    {"anyof": 1 << 12},
    {"inverted": 1 << 12},
)
_add_argument(
    "size",
    "A size other than that of the structure is refused",
    errno.EINVAL,
    {"size": 0},
    {"size": SIZE - 8},
    {"size": SIZE + 8},
)


@case(
    "PAGEMAP_SCAN.EINVAL.start-unaligned",
    origin="fs/proc/task_mmu.c",
    memory=ANY,
    features=FEATURES,
)
def start_unaligned(ctx: Context) -> None:
    """A start that is not a multiple of the page size is refused; an end is rounded up."""
    region = written(ctx, 2)
    result = scan(ctx, region.start + 1, end_of(region))
    ctx.expect("errno of start + 1", result.errno, errno.EINVAL)
    result = scan(ctx, region.start, region.start + 1)
    ctx.expect("errno and pages up to start + 1", (result.errno, result.pages), (0, 1))


@case("PAGEMAP_SCAN.EFAULT.range", origin="fs/proc/task_mmu.c", memory=ANY, features=FEATURES)
def range_invalid(ctx: Context) -> None:
    """A range with its end before its start, or outside user space, is EFAULT."""
    region = written(ctx, 2)
    for start, end in ((end_of(region), region.start), (1 << 63, (1 << 63) + SMALL_PAGE)):
        ctx.expect("errno of the scan", scan(ctx, start, end).errno, errno.EFAULT)


@case("PAGEMAP_SCAN.EFAULT.vec", origin="fs/proc/task_mmu.c", memory=ANY, features=FEATURES)
def vec_invalid(ctx: Context) -> None:
    """A vector outside user space, or larger than user space, is EFAULT."""
    region = written(ctx, 2)
    for asked in ({"vec": 1 << 63}, {"vec_len": 1 << 60}, {"vec_len": (1 << 64) - 1}):
        result = scan(ctx, region.start, end_of(region), **asked)
        ctx.expect(f"errno with {asked}", result.errno, errno.EFAULT)


@case("PAGEMAP_SCAN.EPERM.not-async", origin="fs/proc/task_mmu.c", features=FEATURES)
def not_async(ctx: Context) -> None:
    """CHECK_WPASYNC refuses memory without mode WP and WP_ASYNC; WP_MATCHING alone skips it."""
    region = ctx.make(2)
    region.fill(1)
    ctx.open(FEATURES & ~Feature.WP_ASYNC)
    # Not registered, registered in another mode, and in mode WP without WP_ASYNC.
    for mode in (None, RegisterMode.MISSING, RegisterMode.WP):
        if mode is not None:
            ctx.uffd.register(region, mode=mode)
        for flags in (WP_SCAN, ScanFlag.CHECK_WPASYNC):
            result = scan(ctx, region.start, end_of(region), flags=flags)
            ctx.expect(f"errno of {flags!r}, registered {mode!r}", result.errno, errno.EPERM)
        result = scan(ctx, region.start, end_of(region), flags=ScanFlag.WP_MATCHING)
        ctx.expect(f"errno of WP_MATCHING, registered {mode!r}", result.errno, 0)
        ctx.expect_pagemap(region.start, "P??-?")


@case("PAGEMAP_SCAN.ok.wpallowed", origin="fs/proc/task_mmu.c", features=FEATURES)
def wpallowed(ctx: Context) -> None:
    """WPALLOWED is the category of memory registered in mode WP with WP_ASYNC."""
    region = ctx.make(2)
    region.fill(1)
    allowed = PageCategory.WPALLOWED
    query = {"mask": int(allowed), "returned": int(allowed)}
    ctx.expect(
        "ranges before REGISTER", scan(ctx, region.start, end_of(region), **query).ranges, ()
    )
    ctx.register(region, RegisterMode.WP, 1)
    wanted = ((region.start, region.start + ctx.page, int(allowed)),)
    ctx.expect("ranges after it", scan(ctx, region.start, end_of(region), **query).ranges, wanted)


# Name, summary, errno and arguments, in the selftest's order.
_SANITY: tuple[tuple[str, str, int, dict[str, int]], ...] = (
    ("empty-range", "A scan of an empty range succeeds and finds nothing", 0, {"empty": 1}),
    ("vec-null", "A vec_len without a vec is EINVAL", errno.EINVAL, {"vec": 0}),
    ("vec-len-zero", "A scan with a vec_len of 0 succeeds and finds nothing", 0, {"vec_len": 0}),
    ("no-vec", "A scan with neither vec nor vec_len succeeds and finds nothing", 0, {"room": 0}),
    ("flags-all", "All flags at once are EINVAL", errno.EINVAL, {"flags": (1 << 64) - 1}),
    (
        "flags-more",
        "Unknown flags among known ones are EINVAL",
        errno.EINVAL,
        {"flags": int(WP_SCAN) | 0xFF},
    ),
    ("mask-zero", "A scan with a category_mask of 0 succeeds", 0, {"mask": 0}),
    (
        "return-zero",
        "A scan with a return_mask of 0 finds nothing if nothing is written",
        0,
        {"anyof": int(WRITTEN), "returned": 0},
    ),
    (
        "return-unknown",
        "An unknown category in return_mask is EINVAL",
        errno.EINVAL,
        {"returned": 0x1000},
    ),
    (
        "mask-unknown",
        "Unknown categories in category_mask are EINVAL",
        errno.EINVAL,
        {"mask": 0xFFF},
    ),
    (
        "inverted-all",
        "A scan that protects may invert every category",
        0,
        {"mask": 0, "inverted": int(ALL_BITS), "flags": int(WP_SCAN)},
    ),
)


def _add_sanity(name: str, text: str, code: int, change: dict[str, int]) -> None:
    def run(ctx: Context) -> None:
        region = tracked(ctx, 1000)
        asked = dict(change)
        end = region.start if asked.pop("empty", 0) else end_of(region)
        result = scan(ctx, region.start, end, **asked)
        ctx.expect("errno of the scan", result.errno, code)
        if not code and name not in ("mask-zero", "inverted-all"):
            ctx.expect("ranges of the scan", result.count, 0)

    case(
        f"kselftest.pagemap-ioctl.sanity.{name}",
        origin=f"{ORIGIN}: 1-11",
        memory=ANON,
        features=FEATURES,
        summary=text,
    )(run)


for _sanity in _SANITY:
    _add_sanity(*_sanity)


@case("kselftest.pagemap-ioctl.unmapped", origin=f"{ORIGIN}: 114", memory=ANY, features=FEATURES)
def unmapped(ctx: Context) -> None:
    """A scan of a range in which nothing is mapped finds nothing."""
    result = scan(ctx, 0x10000000, 0x10020000, flags=ScanFlag(0), mask=ALL_BITS, returned=ALL_BITS)
    ctx.expect("errno and count", (result.errno, result.count), (0, 0))


# Limits of a walk

N = 1000
SMALL_VEC_TURNS = 10  # the selftest has 100; a turn writes 5000 pages
# Name, step of the pages written, vec_len, max_pages, and then ranges found and pages walked.
_WALKS = (
    ("dense-big-vec", 1, N, 0, 1, N),
    ("dense-vec-1", 1, 1, 0, 1, N),
    ("dense-vec-1-max-all", 1, 1, N, 1, N),
    ("dense-max-unlimited", 1, N, (1 << 64) - 1, 1, N),
    ("dense-max-half", 1, N, N // 2, 1, N // 2),
    ("dense-max-1", 1, N, 1, 1, 1),
    ("sparse-big-vec", 2, N, 0, N // 2, N),
    ("sparse-vec-1", 2, 1, 0, 1, 2),
    ("sparse-vec-1-max-all", 2, 1, N, 1, 2),
    ("sparse-vec-half-max-all", 2, N // 2, N, N // 2, N),
    ("sparse-vec-all-max-all", 2, N, N, N // 2, N),
    ("sparse-max-half", 2, N, N // 2, N // 2, N),
    ("sparse-max-1", 2, N, 1, 1, 2),
)


def _add_walk(name: str, step: int, room: int, max_pages: int, count: int, pages: int) -> None:
    def run(ctx: Context) -> None:
        region = written(ctx, N, step)
        result = scan(ctx, region.start, end_of(region), room=room, max_pages=max_pages)
        seen = (result.count, (result.walk_end - region.start) // SMALL_PAGE)
        ctx.expect("ranges found, and pages walked", seen, (count, pages))

    case(
        f"kselftest.pagemap-ioctl.walk-end.{name}",
        origin=f"{ORIGIN}: 20-35",
        memory=ANON,
        features=FEATURES,
        summary=f"walk_end is right with every {'page' if step == 1 else 'second page'} written, "
        f"vec_len {room}, max_pages {'-1' if max_pages >> 63 else max_pages}",
    )(run)


for _walk in _WALKS:
    _add_walk(*_walk)


def _add_empty_walk(name: str, flags: int, room: int) -> None:
    def run(ctx: Context) -> None:
        region = written(ctx, 2)
        result = scan(ctx, region.start, region.start, flags=int(flags), room=room)
        ctx.expect("count and walk_end", (result.count, result.walk_end), (0, region.start))

    case(
        f"kselftest.pagemap-ioctl.walk-end.{name}",
        origin=f"{ORIGIN}: 20-35",
        memory=ANON,
        features=FEATURES,
        summary=f"walk_end of an empty range is its start, flags {int(flags)}, vec_len {room}",
    )(run)


for _empty in (
    ("empty", 0, N),
    ("empty-protecting", WP_SCAN, N),
    ("empty-without-room", WP_SCAN, 0),
):
    _add_empty_walk(*_empty)


@case(
    "kselftest.pagemap-ioctl.limits.clear",
    origin=f"{ORIGIN}: 12",
    memory=ANON,
    features=FEATURES,
)
def clear(ctx: Context) -> None:
    """After a scan that protects, with room for all ranges, nothing is written."""
    region = written(ctx, N)
    start, end = region.start, end_of(region)
    ctx.expect("errno of the scan", scan(ctx, start, end, flags=WP_SCAN).errno, 0)
    ctx.expect("ranges written afterwards", scan(ctx, start, end).count, 0)


@case(
    "kselftest.pagemap-ioctl.limits.every-second",
    origin=f"{ORIGIN}: 13",
    memory=ANON,
    features=FEATURES,
)
def every_second(ctx: Context) -> None:
    """If every second page is written, each is a range of its own."""
    region = written(ctx, N, 2)
    result = scan(ctx, region.start, end_of(region))
    ctx.expect("ranges and pages", (result.count, result.pages), (500, 500))


@case(
    "kselftest.pagemap-ioctl.limits.parts",
    origin=f"{ORIGIN}: 14",
    memory=ANON,
    features=FEATURES,
)
def parts(ctx: Context) -> None:
    """Scans in parts find each of many ranges once."""
    region = written(ctx, N, 2)
    start, end = region.start, end_of(region)
    ctx.expect(
        "ranges of the first part", scan(ctx, start, end, flags=WP_SCAN, max_pages=498).count, 498
    )
    ctx.expect("ranges with room for two", scan(ctx, start, end, room=2).count, 2)
    ctx.expect("ranges of the rest", scan(ctx, start, end, flags=WP_SCAN).count, 2)
    ctx.expect("ranges written afterwards", scan(ctx, start, end).count, 0)


@case(
    "kselftest.pagemap-ioctl.limits.max-pages",
    origin=f"{ORIGIN}: 15",
    memory=ANON,
    features=FEATURES,
)
def max_pages(ctx: Context) -> None:
    """A scan stops after max_pages pages, and the next scan finds the one that is left."""
    region = written(ctx, N, 2)
    write(region, range(N - 1, N))
    start, end = region.start, end_of(region)
    found = [scan(ctx, start, end, flags=WP_SCAN, max_pages=500).pages for _ in range(2)]
    ctx.expect("pages found by each scan", found, [500, 1])
    ctx.expect("ranges written afterwards", scan(ctx, start, end).count, 0)


@case(
    "kselftest.pagemap-ioctl.limits.smaller-max-pages",
    origin=f"{ORIGIN}: 18",
    memory=ANON,
    features=FEATURES,
)
def smaller_max_pages(ctx: Context) -> None:
    """Three scans limited to 210 pages find all 525 that are written."""
    region = written(ctx, 1050, 2)
    start, end = region.start, end_of(region)
    found = [scan(ctx, start, end, flags=WP_SCAN, max_pages=210).pages for _ in range(3)]
    ctx.expect("pages found by each scan", found, [210, 210, 105])
    ctx.expect("ranges written afterwards", scan(ctx, start, end).count, 0)


@case(
    "kselftest.pagemap-ioctl.limits.sub-range",
    origin=f"{ORIGIN}: 16",
    memory=ANON,
    features=FEATURES,
)
def sub_range(ctx: Context) -> None:
    """A scan that protects two pages leaves the ones around them written."""
    region = written(ctx, N)
    page = [region.start + index * SMALL_PAGE for index in range(N + 1)]
    result = scan(ctx, page[1], page[3], flags=WP_SCAN)
    ctx.expect("ranges that the scan protected", result.ranges, ((page[1], page[3], int(WRITTEN)),))
    result = scan(ctx, page[0], page[N])
    wanted = ((page[0], page[1], int(WRITTEN)), (page[3], page[N], int(WRITTEN)))
    ctx.expect("ranges still written", result.ranges, wanted)


@case(
    "kselftest.pagemap-ioctl.limits.two-mappings",
    origin=f"{ORIGIN}: 17",
    memory=ANON,
    features=FEATURES,
)
def two_mappings(ctx: Context) -> None:
    """Protecting one mapping leaves another one written."""
    first, second = written(ctx, 100), ctx.make(100)
    ctx.uffd.register(second, mode=RegisterMode.WP)
    ctx.uffd.writeprotect(second)
    write(second, range(100))
    scan(ctx, first.start, end_of(first), flags=WP_SCAN, room=0)
    ctx.expect("pages written of the first mapping", scan(ctx, first.start, end_of(first)).pages, 0)
    result = scan(ctx, second.start, end_of(second))
    ctx.expect("ranges and pages written of the second", (result.count, result.pages), (1, 100))


@case(
    "kselftest.pagemap-ioctl.limits.small-vec",
    origin=f"{ORIGIN}: 19",
    memory=ANON,
    features=FEATURES,
)
def small_vec(ctx: Context) -> None:
    """Scans with little room that continue at walk_end find every written page once."""
    pages = 10000
    region = tracked(ctx, pages)
    for seed in range(SMALL_VEC_TURNS):
        numbers = random.Random(seed)
        wanted = sorted(numbers.sample(range(pages), pages // 2))
        for index in wanted:
            region.write(index * SMALL_PAGE, b"\1")
        start, found = region.start, []
        while start < end_of(region):
            result = scan(ctx, start, end_of(region), flags=WP_SCAN, room=50)
            for first, last, _ in result.ranges:
                found += [
                    (at - region.start) // SMALL_PAGE for at in range(first, last, SMALL_PAGE)
                ]
            start = result.walk_end
        ctx.expect(f"whether all pages were found once, seed {seed}", found == wanted, True)


# How categories match


# Name, words for the summary, flags, masks.
_MASKS: tuple[tuple[str, str, int, dict[str, int]], ...] = (
    ("protecting", "category_mask of a scan that protects", WP_SCAN, {"mask": ALL_BITS}),
    ("mask", "category_mask", 0, {"mask": ALL_BITS}),
    ("anyof", "category_anyof_mask", 0, {"mask": 0, "anyof": ALL_BITS}),
    ("inverted", "category_inverted", 0, {"mask": 0, "inverted": ALL_BITS}),
    ("mask-anyof", "category_mask and anyof_mask", 0, {"mask": ALL_BITS, "anyof": ALL_BITS}),
)


def _add_masks(name: str, text: str, flags: int, masks: dict[str, int]) -> None:
    def run(ctx: Context) -> None:
        region = written(ctx, 10)
        numbers = {key: int(value) for key, value in masks.items()}
        result = scan(
            ctx, region.start, end_of(region), flags=int(flags), returned=ALL_BITS, **numbers
        )
        ctx.expect("errno of the scan", result.errno, 0)

    case(
        f"kselftest.pagemap-ioctl.masks.{name}",
        origin=f"{ORIGIN}: 101-105",
        memory=ANON,
        features=FEATURES,
        summary=f"Every category may be in {text}",
    )(run)


for _mask in _MASKS:
    _add_masks(*_mask)


_BOTH = WRITTEN | PRESENT
# Name, summary, masks, return_mask, and the categories of the one range, or 0 for no range.
_MATCHES: tuple[tuple[str, str, dict[str, int], int, int], ...] = (
    (
        "anyof",
        "A page with two of the categories in category_anyof_mask matches",
        {"mask": 0, "anyof": ALL_BITS},
        _BOTH,
        _BOTH,
    ),
    ("mask", "A page with all categories of category_mask matches", {"mask": _BOTH}, _BOTH, _BOTH),
    (
        "mask-and-anyof",
        "category_mask and category_anyof_mask must both match",
        {"mask": WRITTEN, "anyof": PRESENT},
        _BOTH,
        _BOTH,
    ),
    (
        "written-inverted",
        "With WRITTEN inverted, written pages do not match",
        {"mask": _BOTH, "inverted": WRITTEN},
        _BOTH,
        0,
    ),
    (
        "present-inverted",
        "With PRESENT inverted, present pages do not match",
        {"mask": _BOTH, "inverted": PRESENT},
        _BOTH,
        0,
    ),
    (
        "anyof-protecting",
        "A scan that protects returns only the categories in return_mask",
        {"mask": 0, "anyof": ALL_BITS, "flags": WP_SCAN},
        WRITTEN,
        WRITTEN,
    ),
)


def _add_match(name: str, text: str, masks: dict[str, int], returned: int, found: int) -> None:
    def run(ctx: Context) -> None:
        region = written(ctx, 10 if ctx.page == SMALL_PAGE else 2)
        whole = (region.start, end_of(region))
        numbers = {key: int(value) for key, value in masks.items()}
        result = scan(ctx, *whole, returned=int(returned), **numbers)
        ctx.expect("errno of the scan", result.errno, 0)
        ctx.expect("ranges of the scan", result.ranges, ((*whole, int(found)),) if found else ())
        if "flags" in masks:
            ctx.expect("ranges written afterwards", scan(ctx, *whole).count, 0)

    case(
        f"kselftest.pagemap-ioctl.categories.{name}",
        origin=f"{ORIGIN}: 106-111",
        memory=ALL,
        features=FEATURES,
        summary=text,
    )(run)


for _match in _MATCHES:
    _add_match(*_match)
