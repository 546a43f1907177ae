"""Errors of UFFDIO_WRITEPROTECT, and what it has changed when it fails (layer L5)."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

from pyuffd._abi import Feature, RegisterMode, WriteprotectMode
from pyuffd._events import Remove
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import ALL, HUGETLB, missing_wp_features, wp_features
from pyuffd.conformance.cases.errno_fill import KERNEL_ADDRESS, LAYOUT, UNKNOWN_MODE, orphan
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType

ORIGIN = "UFFDIO_WRITEPROTECT(2const): "
ON, OFF, DONTWAKE = WriteprotectMode.WP, WriteprotectMode(0), WriteprotectMode.DONTWAKE
LIMIT = 1 << 64

# Returns the arguments of a call that is refused, given the region's start and its page size.
Words = Callable[[int, int], tuple[int, int, int]]
_ARGUMENTS: tuple[tuple[str, str, tuple[str, ...], Words], ...] = (
    (
        "start-unaligned",
        "A start that is not a multiple of the page size is refused",
        ALL,
        lambda start, page: (start + 1, page, ON),
    ),
    (
        "length-unaligned",
        "A len that is not a multiple of the page size is refused",
        ALL,
        lambda start, page: (start, page - 1, ON),
    ),
    ("length-zero", "A len of 0 is refused", ALL, lambda start, page: (start, 0, ON)),
    (
        "length-wraps",
        "A range that wraps around the end of all addresses is refused",
        ALL,
        lambda start, page: (start, LIMIT - page, ON),
    ),
    (
        "start-not-user",
        "A start outside user space is refused",
        ALL,
        lambda start, page: (KERNEL_ADDRESS, page, ON),
    ),
    (
        "mode-unknown",
        "An unknown mode bit is refused",
        ALL,
        lambda start, page: (start, page, ON | UNKNOWN_MODE),
    ),
    (
        "mode-wp-dontwake",
        "MODE_WP with MODE_DONTWAKE is refused: protecting wakes nobody",
        ALL,
        lambda start, page: (start, page, ON | DONTWAKE),
    ),
    (
        "start-small-page",
        "A start inside a huge page is refused",
        HUGETLB,
        lambda start, page: (start + SMALL_PAGE, page, ON),
    ),
    (
        "length-small-page",
        "A len smaller than a huge page is refused",
        HUGETLB,
        lambda start, page: (start, SMALL_PAGE, ON),
    ),
)


def _region(ctx: Context, mode: RegisterMode = RegisterMode.WP, pages: int = 2) -> Region:
    """Make two pages with data, and register the first `pages` of them."""
    region = ctx.make(2)
    region.fill(1)
    if pages:
        ctx.register(region, mode, pages)
    else:
        ctx.open()
    return region


def _expect(ctx: Context, code: int, *words: int, uffd: int | None = None) -> None:
    answer = ctx.ioctl("WRITEPROTECT", *words, uffd=uffd)
    ctx.expect("errno of WRITEPROTECT", answer.errno, code)


def _add(name: str, text: str, memory: tuple[str, ...], words: Words) -> None:
    def run(ctx: Context) -> None:
        region = _region(ctx)
        _expect(ctx, errno.EINVAL, *words(region.start, ctx.page))
        ctx.expect_pagemap(region.start, "P??-?")

    case(
        f"UFFDIO_WRITEPROTECT.EINVAL.{name}",
        origin=ORIGIN + "EINVAL",
        memory=memory,
        features=wp_features,
        summary=text,
    )(run)


for _row in _ARGUMENTS:
    _add(*_row)


@case("UFFDIO_WRITEPROTECT.ok.page", origin=ORIGIN + "DESCRIPTION", features=wp_features)
def page(ctx: Context) -> None:
    """Protecting and unprotecting a page does not change its neighbour."""
    region = _region(ctx)
    for mode, letter in ((ON, "W"), (OFF, "-"), (OFF, "-"), (ON, "W"), (DONTWAKE, "-")):
        _expect(ctx, 0, region.start, ctx.page, mode)
        ctx.expect_pagemap(region.start, f"P??{letter}?")
        ctx.expect_pagemap(region.start + ctx.page, "P??-?")


@case("UFFDIO_WRITEPROTECT.ENOENT.unregistered", origin=ORIGIN + "ENOENT", features=wp_features)
def unregistered(ctx: Context) -> None:
    """A range that is not registered is refused."""
    region = _region(ctx, pages=0)
    _expect(ctx, errno.ENOENT, region.start, ctx.page, ON)


@case(
    "UFFDIO_WRITEPROTECT.ok.two-mappings",
    origin="mm/userfaultfd.c: mwriteprotect_range",
    features=missing_wp_features,
    variants=[
        Variant("both", "a range may span several mappings"),
        Variant("refused", "a range must lie in one mapping: ENOENT", lacks=Feature.WP_UNPOPULATED),
    ],
)
def two_mappings(ctx: Context) -> None:
    """Protecting the end of one mapping and the start of the next protects just these pages."""
    region = ctx.make(4)
    region.fill(1)
    pages = [region.start + index * ctx.page for index in range(4)]
    ctx.register(region, RegisterMode.WP, 2)
    ctx.uffd.register(pages[2], 2 * ctx.page, mode=RegisterMode.WP | RegisterMode.MISSING)
    answer = ctx.ioctl("WRITEPROTECT", pages[1], 2 * ctx.page, ON)
    ctx.expect_variant("errno of protecting", answer.errno, both=0, refused=errno.ENOENT)
    if answer.errno:
        return
    bits = [ctx.is_protected(at) for at in pages]
    ctx.expect("which pages are protected", bits, [False, True, True, False])
    writes = [ctx.start(ctx.write, at, b"\2") for at in pages[1:3]]
    seen = sorted(ctx.expect_fault(3).address for _ in writes)
    ctx.expect("addresses of the messages", seen, pages[1:3])
    answer = ctx.ioctl("WRITEPROTECT", pages[1], 2 * ctx.page, OFF)
    ctx.expect("errno of unprotecting", answer.errno, 0)
    for write in writes:
        ctx.expect("the write", write.result(), None)
    bits = [ctx.is_protected(at) for at in pages]
    ctx.expect("which pages are protected afterwards", bits, [False] * 4)


@case("UFFDIO_WRITEPROTECT.ENOENT.unmapped", origin=ORIGIN + "ENOENT", features=wp_features)
def unmapped(ctx: Context) -> None:
    """A range that is no longer mapped is refused."""
    region = _region(ctx)
    start = region.start
    region.close()
    _expect(ctx, errno.ENOENT, start, ctx.page, ON)


@case("UFFDIO_WRITEPROTECT.ENOENT.mode-missing", origin=ORIGIN + "ENOENT", features=wp_features)
def not_wp(ctx: Context) -> None:
    """A range that is registered without mode WP is refused."""
    region = _region(ctx, RegisterMode.MISSING)
    _expect(ctx, errno.ENOENT, region.start, ctx.page, ON)


@case(
    "UFFDIO_WRITEPROTECT.ENOENT.past-end",
    origin=ORIGIN + "ENOENT",
    features=wp_features,
    variants=[
        Variant("some", "the pages before the first mapping that is not registered are protected"),
        Variant(
            "none",
            "a range must lie in one mapping, so nothing is protected",
            lacks=Feature.WP_UNPOPULATED,
        ),
    ],
)
def past_end(ctx: Context) -> None:
    """A range whose end is not registered is ENOENT; the pages before it may be protected."""
    region = _region(ctx, pages=1)
    _expect(ctx, errno.ENOENT, region.start, 2 * ctx.page, ON)
    ctx.expect_pagemap(region.start + ctx.page, "P??-?")
    ctx.expect_variant("pagemap", ctx.pagemap(region.start), some="P??W?", none="P??-?")


@case(
    "UFFDIO_WRITEPROTECT.EAGAIN.layout-changing",
    origin=ORIGIN + "EAGAIN",
    features=lambda memory: wp_features(memory) | LAYOUT,
)
def layout_changing(ctx: Context) -> None:
    """Nothing is protected while a layout event is unread."""
    region = _region(ctx)
    other = ctx.make(1, "anon")
    ctx.register(other, RegisterMode.MISSING)
    dropping = ctx.start(other.madvise, mmap.MADV_DONTNEED)
    ctx.wait_readable()
    _expect(ctx, errno.EAGAIN, region.start, ctx.page, ON)
    ctx.expect_pagemap(region.start, "P??-?")
    ctx.expect_event(Remove)
    dropping.result()
    for _ in range(1000):
        answer = ctx.ioctl("WRITEPROTECT", region.start, ctx.page, ON)
        if answer.errno != errno.EAGAIN:
            break
        os.sched_yield()
    ctx.expect("errno afterwards", answer.errno, 0)
    ctx.expect_pagemap(region.start, "P??W?")


def _with_fork(memory: MemoryType) -> Feature:
    return wp_features(memory) | Feature.EVENT_FORK


@case("UFFDIO_WRITEPROTECT.ESRCH.owner-gone", origin=ORIGIN + "ESRCH", features=_with_fork)
def owner_gone(ctx: Context) -> None:
    """After the process has ended, nothing can be protected."""
    region = _region(ctx)
    child = ctx.fork()
    assert child.uffd is not None
    fd = child.uffd.fileno()
    _expect(ctx, 0, region.start, ctx.page, ON, uffd=fd)
    _expect(ctx, errno.ENOENT, region.start + region.length, ctx.page, ON, uffd=fd)
    _expect(ctx, errno.ESRCH, region.start, ctx.page, ON, uffd=orphan(ctx, child))


@case(
    "UFFDIO_WRITEPROTECT.ok.async",
    origin="UFFDIO_API(2const): UFFD_FEATURE_WP_ASYNC",
    features=lambda memory: wp_features(memory) | Feature.WP_ASYNC,
)
def writeprotect_async(ctx: Context) -> None:
    """With WP_ASYNC a write removes the protection of its page without a message."""
    region = ctx.make(3)
    ctx.register(region, RegisterMode.WP)
    region.write(0, b"\1")
    # With WP_ASYNC, holes of anonymous memory are protected too.
    ctx.uffd.writeprotect(region)
    pages = [region.start + index * ctx.page for index in range(3)]
    ctx.expect("which are protected", [ctx.is_protected(page) for page in pages], [True] * 3)
    for page in pages[:2]:
        ctx.expect("the write", ctx.silently(ctx.write, page, b"\2"), None)
    ctx.expect(
        "protected afterwards", [ctx.is_protected(page) for page in pages], [False, False, True]
    )
    ctx.uffd.writeprotect(region, mode=WriteprotectMode(0))
    ctx.expect(
        "whether the third page is protected after mode 0", ctx.is_protected(pages[2]), False
    )
