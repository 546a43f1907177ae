"""Ranges that cross mappings, page tables and huge pages, or end with user space (layer L5)."""

from __future__ import annotations

import errno
import mmap
import os

from pyuffd import _memory
from pyuffd._abi import Feature, MoveMode, PageBit, RegisterMode, WriteprotectMode
from pyuffd._events import Unmap
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._starve import small_file_system
from pyuffd.conformance._types import ANON, ANY
from pyuffd.conformance._wp import (
    HOLE,
    MAP_NORESERVE,
    READ_WRITE,
    expect_fault,
    expect_write_fault,
)
from pyuffd.conformance.cases.errno_fill import DATA, MOVE, OPS, Op, Target
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import needs_privilege, needs_swap, needs_thp

MISSING = RegisterMode.MISSING
GIB = 1 << 30
ENDS = ((1 << 56) - SMALL_PAGE, (1 << 47) - SMALL_PAGE)
MADV_PAGEOUT, MAP_HUGETLB = 21, 0x40000
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE


@case(
    "event.munmap-two-modes.one-unmap",
    origin="fs/userfaultfd.c: has_unmap_ctx",
    memory=ANON,
    features=Feature.EVENT_UNMAP | Feature.PAGEFAULT_FLAG_WP,
)
def two_modes(ctx: Context) -> None:
    """munmap(2) of mappings of one userfaultfd with different modes sends one event."""
    start = _memory.mmap(3 * SMALL_PAGE, READ_WRITE, PRIVATE)
    ctx.open().register(start, SMALL_PAGE, mode=MISSING)
    ctx.uffd.register(start + SMALL_PAGE, SMALL_PAGE, mode=MISSING | RegisterMode.WP)
    ctx.uffd.register(start + 2 * SMALL_PAGE, SMALL_PAGE, mode=MISSING)
    unmapping = ctx.start(_memory.munmap, start, 3 * SMALL_PAGE)
    event = ctx.expect_event(Unmap)
    ctx.expect("the event", event, Unmap(start, start + 3 * SMALL_PAGE))
    unmapping.result()
    ctx.expect_quiet()


@case(
    "UFFDIO_MOVE.ok.same-mapping",
    origin="mm/userfaultfd.c: uffd_move_lock",
    memory=ANON,
    features=Feature.MOVE,
)
def same_mapping(ctx: Context) -> None:
    """A page can be moved within one registered mapping; its old place is then missing."""
    region = ctx.make(4)
    region.madvise(mmap.MADV_DONTFORK)
    ctx.register(region, MISSING)
    ctx.uffd.copy(region.start, DATA * ctx.page)
    to = region.start + 2 * ctx.page
    answer = ctx.ioctl("MOVE", to, region.start, ctx.page)
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, ctx.page))
    ctx.expect("byte", ctx.silently(ctx.read, to), DATA)
    ctx.expect_pagemap(region.start, HOLE)
    reading = ctx.start(ctx.read, region.start)
    expect_fault(ctx, reading, 0, region.start)
    ctx.uffd.zeropage(region.start, ctx.page)
    ctx.expect("byte of the source", reading.result(), b"\0")


@case(
    "UFFDIO_MOVE.ENOENT.src-hole-without-table",
    origin="mm/userfaultfd.c: move_pages",
    memory=ANON,
    features=Feature.MOVE,
)
def far_hole(ctx: Context) -> None:
    """A source without a page or PMD table is ENOENT; ALLOW_SRC_HOLES accepts it as a hole."""
    target = Target(ctx, MOVE)
    start = _memory.mmap(3 * GIB, READ_WRITE, PRIVATE)
    ctx.callback(_memory.munmap, start, 3 * GIB)
    first = -(-start // GIB) * GIB + GIB // 2
    for source in (first, first + 2 * HUGE_PAGE):
        target.expect(errno.ENOENT, -errno.ENOENT, source=source)
        target.expect(0, ctx.page, source=source, mode=int(MoveMode.ALLOW_SRC_HOLES))
        ctx.expect_pagemap(target.start, HOLE)
    target.expect(0, ctx.page)


def _add_other_file(op: Op) -> None:
    def run(ctx: Context) -> None:
        source = ctx.make(1, "anon")
        source.fill(DATA[0])
        file = ctx.enter(small_file_system("ramfs", SMALL_PAGE))
        os.ftruncate(file, SMALL_PAGE)
        start = _memory.mmap(SMALL_PAGE, READ_WRITE, mmap.MAP_SHARED, file)
        ctx.callback(_memory.munmap, start, SMALL_PAGE)
        ctx.open().register(start, SMALL_PAGE, mode=RegisterMode.WP)
        answer = ctx.ioctl(op.name, *op.words(start, source.start, SMALL_PAGE, 0))
        ctx.expect(
            f"errno and result of {op.name}",
            (answer.errno, answer.result),
            (errno.EINVAL, -errno.EINVAL),
        )
        ctx.expect("byte", ctx.silently(ctx.read, start), b"\0")

    case(
        f"UFFDIO_{op.name}.EINVAL.other-file-system",
        origin="mm/userfaultfd.c: mfill_atomic",
        memory=ANY,
        features=Feature.WP_ASYNC | Feature.MOVE | Feature.POISON,
        needs=[needs_privilege("CAP_SYS_ADMIN")],
        summary="A file that only WP_ASYNC can register (here on ramfs) cannot be filled",
    )(run)


for _op in OPS:
    _add_other_file(_op)


@case(
    "UFFDIO_MOVE.ok.src-huge-swapped",
    origin="mm/userfaultfd.c: move_pages_pte, swap cache",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp(), needs_swap()],
)
def huge_swapped(ctx: Context) -> None:
    """A page of a huge page in swap is moved, or EBUSY while the huge page is being swapped out."""
    start = huge_area(ctx, 1)
    _memory.fill(start, HUGE_PAGE, DATA[0])
    _memory.madvise(start, HUGE_PAGE, mmap.MADV_DONTFORK)
    region = ctx.make(1)
    ctx.register(region, MISSING)
    _memory.madvise(start, HUGE_PAGE, MADV_PAGEOUT)
    source = start + SMALL_PAGE
    answer = ctx.ioctl("MOVE", region.start, source, SMALL_PAGE)
    seen = (answer.errno, answer.result)
    ctx.expect("errno and .move", seen, (0, SMALL_PAGE), (errno.EBUSY, -errno.EBUSY))
    where = source if answer.errno else region.start
    ctx.expect("content of the page", ctx.silently(ctx.read, where, SMALL_PAGE), DATA * SMALL_PAGE)
    ctx.expect("byte of its neighbour", ctx.read(start, 1), DATA)
    if answer.errno:
        ctx.expect_pagemap(region.start, HOLE)


@case("UFFDIO_WAKE.ok.up-to-the-end", origin="fs/userfaultfd.c: validate_range", memory=ANY)
def last_page(ctx: Context) -> None:
    """A range may end at the end of user space, but not beyond it."""
    ctx.open()
    # With page tables of five levels, and of four.
    ends = [end for end in ENDS if not ctx.ioctl("WAKE", end - SMALL_PAGE, SMALL_PAGE).errno]
    ctx.expect("whether WAKE accepts the last page of user space", bool(ends), True)
    end = ends[0]
    for start, length in ((end - SMALL_PAGE, 2 * SMALL_PAGE), (end, SMALL_PAGE)):
        answer = ctx.ioctl("WAKE", start, length)
        ctx.expect("errno of a range that ends beyond user space", answer.errno, errno.EINVAL)
    ctx.expect("errno of all of user space", ctx.ioctl("WAKE", 0, end).errno, 0)


@case(
    "UFFDIO_WRITEPROTECT.ok.huge-zero-page",
    origin="mm/huge_memory.c: __split_huge_zero_page_pmd",
    memory=ANON,
    features=Feature.PAGEFAULT_FLAG_WP,
    needs=[needs_thp()],
)
def huge_zero(ctx: Context) -> None:
    """If a part of a protected huge zero page is unprotected, the rest stays protected."""
    region = ctx.make(2 * HUGE_PAGE // SMALL_PAGE)
    region.advise_thp()
    start = -(-region.start // HUGE_PAGE) * HUGE_PAGE
    ctx.register(region, RegisterMode.WP)
    ctx.expect("byte", ctx.read(start), b"\0")
    ctx.uffd.writeprotect(start, HUGE_PAGE)
    second = start + SMALL_PAGE
    ctx.uffd.writeprotect(second, SMALL_PAGE, mode=WriteprotectMode(0))
    if not ctx.bits(start) & PageBit.PRESENT:
        ctx.lack("THP", "the kernel gave no huge zero page")
    bits = [ctx.is_protected(at) for at in (start, second, second + SMALL_PAGE)]
    ctx.expect("which pages are protected", bits, [True, False, True])
    ctx.expect("a write to the unprotected page", ctx.silently(ctx.write, second, b"\1"), None)
    expect_write_fault(ctx, start)


@case(
    "UFFDIO_WRITEPROTECT.ok.hugetlb-hole-without-table",
    origin="mm/hugetlb.c: hugetlb_change_protection",
    memory=("hugetlb-private",),
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM,
)
def hugetlb_without_table(ctx: Context) -> None:
    """A hole without a page table can be protected; unprotecting such a hole succeeds too."""
    start = _memory.mmap(4 * GIB, READ_WRITE, PRIVATE | MAP_HUGETLB)
    ctx.callback(_memory.munmap, start, 4 * GIB)
    first = -(-start // GIB) * GIB + GIB // 2
    ctx.open()
    for at, is_wanted in ((first, True), (first + GIB, False)):
        ctx.uffd.register(at, ctx.page, mode=RegisterMode.WP)
        ctx.uffd.writeprotect(at, ctx.page, mode=WriteprotectMode(int(is_wanted)))
        ctx.expect("whether the hole is protected", ctx.is_protected(at), is_wanted)
