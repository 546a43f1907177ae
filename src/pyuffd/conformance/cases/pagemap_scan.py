"""PAGEMAP_SCAN: its argument, where a walk ends, and how categories match (layer L5).

From pagemap_ioctl of the kernel's selftests.  One ioctl each, so that what the kernel's single walk
returns is what is looked at; `pagemap_scan_memory` has the cases about what counts as written.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import struct
from dataclasses import dataclass

from pyuffd._abi import Feature, PageCategory, RegisterMode, ScanFlag
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._types import ALL, ANON, ANY, SMALL_PAGE
from pyuffd.regions import Region

PAGEMAP_SCAN = 0xC0606610
SIZE = 96
FEATURES = Feature.WP_UNPOPULATED | Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM
WRITTEN, PRESENT = PageCategory.WRITTEN, PageCategory.PRESENT
WP_SCAN = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC
# What every kernel with PAGEMAP_SCAN knows; the selftest's "all bits".
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
    """What one ioctl did: errno, its result, its ranges (start, end, categories), walk_end."""

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
) -> Scan:
    """Make one PAGEMAP_SCAN of this process; `vec` and `vec_len` replace those of `room`."""
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
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    code = count = 0
    try:
        count = fcntl.ioctl(fd, PAGEMAP_SCAN, argument)
    except OSError as error:
        code = error.errno or errno.EIO
    finally:
        os.close(fd)
    found = tuple((ranges[i], ranges[i + 1], ranges[i + 2]) for i in range(0, 3 * count, 3))
    result = Scan(code, count, found, struct.unpack("=12Q", argument)[4])
    ctx.note(f"PAGEMAP_SCAN {[hex(word) for word in words[1:4]]}: {result}")
    return result


def tracked(ctx: Context, pages: int) -> Region:
    """Return memory registered WP with WP_ASYNC, all of it protected."""
    region = ctx.make(pages)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    return region


def written(ctx: Context, pages: int, step: int = 1) -> Region:
    """Return tracked memory of which every `step`th page has been written since."""
    region = tracked(ctx, pages)
    write(region, range(0, pages, step))
    return region


def write(region: Region, pages: range) -> None:
    """Write a byte of these pages."""
    for index in pages:
        region.write(index * region.page_size, b"\1")


def end_of(region: Region) -> int:
    """Return the address behind a region."""
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


_add_argument("vec-null", "There is room for ranges, and no vector", errno.EINVAL, {"vec": 0})
_add_argument(
    "flags-unknown",
    "A flag is unknown",
    errno.EINVAL,
    {"flags": (1 << 64) - 1},
    {"flags": WP_SCAN | 0xFF},
)
_add_argument(
    "categories-unknown",
    "A category is unknown, in any of the four masks",
    errno.EINVAL,
    {"returned": 1 << 12},
    {"mask": 1 << 12},
    {"anyof": 1 << 12},
    {"inverted": 1 << 12},
)
_add_argument(
    "size", "size is not that of the structure", errno.EINVAL, {"size": 0}, {"size": SIZE - 8}
)


@case(
    "PAGEMAP_SCAN.EINVAL.start-unaligned",
    origin="fs/proc/task_mmu.c",
    memory=ANY,
    features=FEATURES,
)
def start_unaligned(ctx: Context) -> None:
    """A start that is no multiple of the page size is refused; an end is rounded up."""
    region = written(ctx, 2)
    result = scan(ctx, region.start + 1, end_of(region))
    ctx.expect("errno of start + 1", result.errno, errno.EINVAL)
    result = scan(ctx, region.start, region.start + 1)
    ctx.expect("errno and pages up to start + 1", (result.errno, result.pages), (0, 1))


@case("PAGEMAP_SCAN.EFAULT.range", origin="fs/proc/task_mmu.c", memory=ANY, features=FEATURES)
def range_invalid(ctx: Context) -> None:
    """The end is before the start, or no address of user space."""
    region = written(ctx, 2)
    for start, end in ((end_of(region), region.start), (1 << 63, (1 << 63) + SMALL_PAGE)):
        ctx.expect("errno", scan(ctx, start, end).errno, errno.EFAULT)


@case("PAGEMAP_SCAN.EFAULT.vec", origin="fs/proc/task_mmu.c", memory=ANY, features=FEATURES)
def vec_invalid(ctx: Context) -> None:
    """The vector is no memory that can be written."""
    region = written(ctx, 2)
    result = scan(ctx, region.start, end_of(region), vec=1 << 63)
    ctx.expect("errno", result.errno, errno.EFAULT)


@case("PAGEMAP_SCAN.EPERM.not-async", origin="fs/proc/task_mmu.c", features=FEATURES)
def not_async(ctx: Context) -> None:
    """CHECK_WPASYNC refuses memory not registered WP with WP_ASYNC; alone WP_MATCHING skips it."""
    region = ctx.make(2)
    region.fill(1)
    ctx.open(FEATURES & ~Feature.WP_ASYNC)
    # Not registered, registered for something else, and registered WP without WP_ASYNC.
    for mode in (None, RegisterMode.MISSING, RegisterMode.WP):
        if mode is not None:
            ctx.uffd.register(region, mode=mode)
        result = scan(ctx, region.start, end_of(region), flags=WP_SCAN)
        ctx.expect(f"errno, registered {mode!r}", result.errno, errno.EPERM)
        result = scan(ctx, region.start, end_of(region), flags=ScanFlag.WP_MATCHING)
        ctx.expect(f"errno of WP_MATCHING, registered {mode!r}", result.errno, 0)
        ctx.expect_pagemap(region.start, "P??-?")


@case("PAGEMAP_SCAN.ok.wpallowed", origin="fs/proc/task_mmu.c", features=FEATURES)
def wpallowed(ctx: Context) -> None:
    """WPALLOWED is the category of memory registered WP with WP_ASYNC."""
    region = ctx.make(2)
    region.fill(1)
    allowed = PageCategory.WPALLOWED
    query = {"mask": int(allowed), "returned": int(allowed)}
    ctx.expect("before", scan(ctx, region.start, end_of(region), **query).ranges, ())
    ctx.register(region, RegisterMode.WP, 1)
    wanted = ((region.start, region.start + ctx.page, int(allowed)),)
    ctx.expect("ranges", scan(ctx, region.start, end_of(region), **query).ranges, wanted)


@case("kselftest.pagemap-ioctl.sanity", origin=f"{ORIGIN}: 1-11", memory=ANON, features=FEATURES)
def sanity(ctx: Context) -> None:
    """Accept an empty range, no vector, no room and empty masks; refuse what is unknown."""
    region = tracked(ctx, 1000)
    start, end = region.start, end_of(region)
    ctx.expect("empty range", scan(ctx, start, start, flags=WP_SCAN).count, 0)
    for name, change in (
        ("vector without room", {"vec_len": 0}),
        ("no vector", {"room": 0}),
        ("return_mask 0", {"returned": 0}),
    ):
        result = scan(ctx, start, end, flags=WP_SCAN, **change)
        ctx.expect(name, (result.errno, result.count), (0, 0))
    for change in ({"mask": 0}, {"inverted": int(ALL_BITS), "returned": int(ALL_BITS)}):
        ctx.expect(f"errno of {change}", scan(ctx, start, end, flags=WP_SCAN, **change).errno, 0)
    for change in ({"vec": 0}, {"returned": 0x1000}, {"mask": 0xFFF}):
        result = scan(ctx, start, end, flags=WP_SCAN, **change)
        ctx.expect(f"errno of {change}", result.errno, errno.EINVAL)
    for flags in ((1 << 64) - 1, WP_SCAN | 0xFF):
        ctx.expect(
            f"errno of flags {flags:#x}", scan(ctx, start, end, flags=flags).errno, errno.EINVAL
        )


@case("kselftest.pagemap-ioctl.unmapped", origin=f"{ORIGIN}: 114", memory=ANY, features=FEATURES)
def unmapped(ctx: Context) -> None:
    """A range where nothing is mapped has no pages."""
    result = scan(ctx, 0x10000000, 0x10020000, flags=ScanFlag(0), mask=ALL_BITS, returned=ALL_BITS)
    ctx.expect("errno and count", (result.errno, result.count), (0, 0))


# Limits of a walk

N = 1000
# Pages written, vec_len, max_pages: ranges and pages walked.
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
        ctx.expect("ranges, and pages walked", seen, (count, pages))

    case(
        f"kselftest.pagemap-ioctl.walk-end.{name}",
        origin=f"{ORIGIN}: 20-35",
        memory=ANON,
        features=FEATURES,
        summary=f"walk_end with every {'page' if step == 1 else 'second page'} written, "
        f"vec_len {room}, max_pages {'-1' if max_pages >> 63 else max_pages}",
    )(run)


for _walk in _WALKS:
    _add_walk(*_walk)


@case(
    "kselftest.pagemap-ioctl.walk-end.empty",
    origin=f"{ORIGIN}: 20-35",
    memory=ANON,
    features=FEATURES,
)
def walk_empty(ctx: Context) -> None:
    """walk_end of an empty range is its start, with any limits."""
    region = written(ctx, 2)
    for room, max_pages in ((ROOM, 0), (0, 0), (ROOM, 1)):
        result = scan(ctx, region.start, region.start, room=room, max_pages=max_pages)
        ctx.expect("count and walk_end", (result.count, result.walk_end), (0, region.start))


@case(
    "kselftest.pagemap-ioctl.limits.parts",
    origin=f"{ORIGIN}: 12-14",
    memory=ANON,
    features=FEATURES,
)
def parts(ctx: Context) -> None:
    """Every second page written is a range of its own; scans in parts find each of them once."""
    region = written(ctx, N, 2)
    start, end = region.start, end_of(region)
    ctx.expect("all", scan(ctx, start, end).count, 500)
    ctx.expect("first part", scan(ctx, start, end, flags=WP_SCAN, max_pages=498).count, 498)
    ctx.expect("room for two", scan(ctx, start, end, room=2).count, 2)
    ctx.expect("rest", scan(ctx, start, end, flags=WP_SCAN).count, 2)
    ctx.expect("afterwards", scan(ctx, start, end).count, 0)


@case(
    "kselftest.pagemap-ioctl.limits.max-pages",
    origin=f"{ORIGIN}: 15, 18",
    memory=ANON,
    features=FEATURES,
)
def max_pages(ctx: Context) -> None:
    """max_pages bounds what one scan finds, and the next one finds the rest."""
    region = written(ctx, 1050, 2)
    region.write(1049 * SMALL_PAGE, b"\1")
    start, end = region.start, end_of(region)
    found = [scan(ctx, start, end, flags=WP_SCAN, max_pages=limit).pages for limit in (210,) * 3]
    ctx.expect("pages", found, [210, 210, 106])
    ctx.expect("afterwards", scan(ctx, start, end).count, 0)


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
    ctx.expect("protected", result.ranges, ((page[1], page[3], int(WRITTEN)),))
    result = scan(ctx, page[0], page[N])
    wanted = ((page[0], page[1], int(WRITTEN)), (page[3], page[N], int(WRITTEN)))
    ctx.expect("left", result.ranges, wanted)


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
    ctx.expect("first", scan(ctx, first.start, end_of(first)).pages, 0)
    result = scan(ctx, second.start, end_of(second))
    ctx.expect("second", (result.count, result.pages), (1, 100))


@case(
    "kselftest.pagemap-ioctl.limits.small-vec",
    origin=f"{ORIGIN}: 19",
    memory=ANON,
    features=FEATURES,
)
def small_vec(ctx: Context) -> None:
    """Walking on from walk_end with little room finds every page once, in any pattern."""
    pages = 2000
    region = tracked(ctx, pages)
    for seed in range(5):
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
        ctx.expect(f"all pages found once, seed {seed}", found == wanted, True)


# How categories match


@case("kselftest.pagemap-ioctl.masks", origin=f"{ORIGIN}: 101-105", memory=ANON, features=FEATURES)
def all_masks(ctx: Context) -> None:
    """Every category may be in every mask."""
    region = written(ctx, 10)
    for change in (
        {"mask": ALL_BITS},
        {"mask": 0, "anyof": ALL_BITS},
        {"mask": 0, "inverted": ALL_BITS},
        {"mask": ALL_BITS, "anyof": ALL_BITS, "inverted": ALL_BITS},
    ):
        for flags in (0, int(WP_SCAN)):
            numbers = {key: int(value) for key, value in change.items()}
            result = scan(
                ctx, region.start, end_of(region), flags=flags, returned=ALL_BITS, **numbers
            )
            ctx.expect(f"errno of {numbers}", result.errno, 0)


@case(
    "kselftest.pagemap-ioctl.categories", origin=f"{ORIGIN}: 106-111", memory=ALL, features=FEATURES
)
def categories(ctx: Context) -> None:
    """All of category_mask and any of category_anyof_mask must match, after the inversion."""
    region = written(ctx, 2)
    both = int(WRITTEN | PRESENT)
    whole = (region.start, end_of(region))

    def query(**masks: int) -> Scan:
        return scan(ctx, *whole, **masks)

    for masks in (
        {"mask": 0, "anyof": ALL_BITS},
        {"mask": both},
        {"mask": WRITTEN, "anyof": PRESENT},
    ):
        numbers = {key: int(value) for key, value in masks.items()}
        ctx.expect(
            f"ranges of {numbers}", query(**numbers, returned=both).ranges, ((*whole, both),)
        )
    for bit in (WRITTEN, PRESENT):
        result = query(mask=both, inverted=int(bit), returned=both)
        ctx.expect(f"count with {bit!r} inverted", result.count, 0)
    result = query(mask=0, anyof=int(ALL_BITS), flags=WP_SCAN)
    ctx.expect("ranges of the scan that protects", result.ranges, ((*whole, int(WRITTEN)),))
    ctx.expect("afterwards", query().count, 0)
