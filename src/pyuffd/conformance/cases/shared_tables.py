"""Page tables that hugetlb mappings share, but registered mappings must not (layer L5).

Two mappings of the same GiB of a hugetlb file share a PMD table, so that a page that one of them
touches is mapped in both. A mapping registered in mode WP or MINOR must have a table of its own.
"""

from __future__ import annotations

import mmap
import os

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import minor_features, wp_features
from pyuffd.conformance._wp import (
    DATA,
    HOLE,
    MAP_NORESERVE,
    READ_WRITE,
    UNPROTECT,
    WP_WRITE,
    WRITTEN,
    expect_fault,
    expect_write_fault,
    reserve,
)
from pyuffd.conformance.cases.waiters import MINOR_READ
from pyuffd.testing._memory_types import HUGE_PAGE
from pyuffd.testing._need import needs_hugepages

GIB = 1 << 30
MFD_HUGETLB, MAP_FIXED = 4, 0x10
ORIGIN = "mm/hugetlb.c: want_pmd_share, hugetlb_unshare_all_pmds"
MEMORY = ("hugetlb",)
SHARED = Variant("shared", "mappings share tables, and REGISTER ends that")
OWN = Variant("own", "this kernel shares no tables")


def _two(ctx: Context) -> tuple[int, int]:
    """Map a GiB of a file of huge pages twice; return both addresses."""
    fd = _memory.memfd_create("pyuffd-gib", MFD_HUGETLB)
    ctx.callback(os.close, fd)
    os.ftruncate(fd, GIB)
    starts = []
    for _ in range(2):
        start = reserve(ctx, GIB, GIB)
        _memory.mmap(GIB, READ_WRITE, mmap.MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, 0, start)
        starts.append(start)
    return starts[0], starts[1]


def _is_mapped(ctx: Context, at: int) -> bool:
    return ctx.pagemap(at)[0] == "P"


def _shared_before(ctx: Context) -> tuple[int, int]:
    """Touch the first page in both mappings, so that they share a table if they can."""
    first, second = _two(ctx)
    _memory.fill(first, HUGE_PAGE, DATA)
    ctx.expect("byte in the second mapping", ctx.read(second), bytes([DATA]))
    # A page that only the first mapping touches tells whether they do.
    _memory.fill(first + HUGE_PAGE, HUGE_PAGE, DATA)
    is_shared = _is_mapped(ctx, second + HUGE_PAGE)
    ctx.expect_variant(
        "whether a page that the other touched is mapped", is_shared, shared=True, own=False
    )
    return first, second


@case(
    "UFFDIO_REGISTER.ok.ends-sharing-wp",
    origin=ORIGIN,
    memory=MEMORY,
    features=wp_features,
    needs=[needs_hugepages(3)],
    variants=[SHARED, OWN],
)
def ends_sharing_wp(ctx: Context) -> None:
    """Protecting a mapping whose table was shared does not change the other mapping."""
    first, second = _shared_before(ctx)
    ctx.open().register(second, GIB, mode=RegisterMode.WP)
    ctx.uffd.writeprotect(second, 2 * HUGE_PAGE)
    for at in (first, first + HUGE_PAGE):
        ctx.expect("whether the other mapping is protected", ctx.is_protected(at), False)
        ctx.expect(
            "a write to the other mapping", ctx.silently(ctx.write, at, bytes([WRITTEN])), None
        )
    for at in (second, second + HUGE_PAGE):
        ctx.expect("whether this mapping is protected", ctx.is_protected(at), True)
        expect_write_fault(ctx, at)


@case(
    "UFFDIO_REGISTER.ok.ends-sharing-minor",
    origin=ORIGIN,
    memory=MEMORY,
    features=minor_features,
    needs=[needs_hugepages(3)],
    variants=[SHARED, OWN],
)
def ends_sharing_minor(ctx: Context) -> None:
    """A page that the other mapping touches is mapped only there; here it is a minor fault."""
    first, second = _shared_before(ctx)
    ctx.open().register(second, GIB, mode=RegisterMode.MINOR)
    at = second + 2 * HUGE_PAGE
    _memory.fill(first + 2 * HUGE_PAGE, HUGE_PAGE, DATA)
    ctx.expect_pagemap(at, HOLE)
    reading = ctx.start(ctx.read, at)
    expect_fault(ctx, reading, MINOR_READ, at)
    ctx.uffd.continue_(at, HUGE_PAGE)
    ctx.expect("the byte", reading.result(), bytes([DATA]))


def _add_never(name: str, mode: RegisterMode, features: Feature) -> None:
    def run(ctx: Context) -> None:
        first, second = _two(ctx)
        ctx.open().register(second, GIB, mode=mode)
        _memory.fill(first, HUGE_PAGE, DATA)
        _resolve_first(ctx, second, mode)
        # The next page of the first mapping must not be mapped in the second.
        at = second + HUGE_PAGE
        _memory.fill(first + HUGE_PAGE, HUGE_PAGE, DATA)
        ctx.expect_pagemap(at, HOLE)

    case(
        f"UFFDIO_REGISTER.ok.never-shares-{name}",
        summary=f"A mapping registered {mode.name} before it has pages shares no page table",
        origin=ORIGIN,
        memory=MEMORY,
        features=features,
        needs=[needs_hugepages(2)],
    )(run)


def _resolve_first(ctx: Context, at: int, mode: RegisterMode) -> None:
    """Give the second mapping a page, and so a table."""
    if mode is RegisterMode.MINOR:
        ctx.uffd.continue_(at, HUGE_PAGE)
        return
    ctx.uffd.writeprotect(at, HUGE_PAGE)
    write = ctx.start(ctx.write, at, bytes([WRITTEN]))
    expect_fault(ctx, write, WP_WRITE, at)
    ctx.uffd.writeprotect(at, HUGE_PAGE, mode=UNPROTECT)
    ctx.expect("the write", write.result(), None)


_add_never("wp", RegisterMode.WP, Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)
_add_never("minor", RegisterMode.MINOR, Feature.MINOR_HUGETLBFS)
