"""UFFDIO_MOVE of huge pages: whole if possible, otherwise in small pages, or refused (layer L5)."""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections.abc import Callable

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import Pin, needs_pin, syscall
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._thp import mapped_huge
from pyuffd.conformance._types import ANON
from pyuffd.conformance._wp import HOLE, expect_read, expect_silent_write
from pyuffd.conformance.cases.huge_parts import (
    MADV_PAGEOUT,
    MISSING,
    PAGES,
    WP,
    aligned,
    protected_pages,
)
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import needs_swap, needs_thp
from pyuffd.testing._run import SCALE

MOVED, OTHER = 0x4D, 0x4E
# Longer than a call that does not wait takes, also on a busy machine.
AT_ONCE_S = 3.0


def _target(ctx: Context) -> int:
    """Register memory for a huge page and one small page; return its address."""
    region = ctx.make(3 * PAGES)
    region.advise_thp()
    ctx.register(region, MISSING)
    return aligned(region.start)


def _source(ctx: Context) -> int:
    start = huge_area(ctx, 2)
    _memory.madvise(start, 2 * HUGE_PAGE, mmap.MADV_DONTFORK)
    for index in range(PAGES):
        _memory.fill(start + index * SMALL_PAGE, SMALL_PAGE, index % 251 + 1)
    _memory.fill(start + HUGE_PAGE, HUGE_PAGE, MOVED)
    return start


def _expect_all_there(ctx: Context, to: int) -> None:
    for index in (0, 1, 255, 256, PAGES - 1):
        expect_read(ctx, to + index * SMALL_PAGE, index % 251 + 1)


@case(
    "UFFDIO_MOVE.ok.whole-huge-page",
    origin="mm/huge_memory.c: move_pages_huge_pmd",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def whole(ctx: Context) -> None:
    """A MOVE of a huge page and one page more keeps the first huge, and splits the second."""
    to, start = _target(ctx), _source(ctx)
    answer = ctx.ioctl("MOVE", to, start, HUGE_PAGE + SMALL_PAGE)
    seen = (answer.errno, answer.result)
    ctx.expect("errno and .move", seen, (0, HUGE_PAGE + SMALL_PAGE))
    ctx.expect("bytes mapped huge", mapped_huge(to), HUGE_PAGE)
    _expect_all_there(ctx, to)
    expect_read(ctx, to + HUGE_PAGE, MOVED)
    for hole in (start, start + HUGE_PAGE - SMALL_PAGE, start + HUGE_PAGE):
        ctx.expect_pagemap(hole, HOLE)
    ctx.expect("byte of the next page", ctx.read(start + HUGE_PAGE + SMALL_PAGE), bytes([MOVED]))
    expect_silent_write(ctx, to + 5 * SMALL_PAGE)
    ctx.expect("byte of the source", ctx.read(start), b"\0")


@case(
    "UFFDIO_MOVE.ok.whole-huge-page-reclaimed",
    origin="mm/huge_memory.c: move_pages_huge_pmd",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp(), needs_swap()],
)
def whole_reclaimed(ctx: Context) -> None:
    """A huge page that was moved whole keeps its content through swap."""
    to, start = _target(ctx), _source(ctx)
    answer = ctx.ioctl("MOVE", to, start, HUGE_PAGE)
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, HUGE_PAGE))
    _memory.madvise(to, HUGE_PAGE, MADV_PAGEOUT)
    _expect_all_there(ctx, to)
    ctx.uffd.unregister(to, HUGE_PAGE)
    _memory.fill(to, HUGE_PAGE, OTHER)
    _memory.madvise(to, HUGE_PAGE, MADV_PAGEOUT)
    expect_read(ctx, to + 9 * SMALL_PAGE, OTHER)


@case(
    "UFFDIO_MOVE.ok.huge-page-onto-table",
    origin="mm/userfaultfd.c: move_pages, pmd_none(dst_pmdval)",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def onto_table(ctx: Context) -> None:
    """If the destination has a page table already, all of a huge page is moved in small pages."""
    to, start = _target(ctx), _source(ctx)
    ctx.uffd.copy(to + SMALL_PAGE, bytes([OTHER]) * SMALL_PAGE)
    _memory.madvise(to + SMALL_PAGE, SMALL_PAGE, mmap.MADV_DONTNEED)
    answer = ctx.ioctl("MOVE", to, start, HUGE_PAGE)
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, HUGE_PAGE))
    _expect_all_there(ctx, to)
    ctx.expect_pagemap(start, HOLE)
    ctx.expect_pagemap(start + HUGE_PAGE - SMALL_PAGE, HOLE)


@case(
    "UFFDIO_MOVE.EAGAIN.huge-page-onto-page",
    origin="mm/userfaultfd.c: move_pages",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def onto_page(ctx: Context) -> None:
    """If the destination has a page, a huge page is moved up to there, and the rest stays."""
    to, start = _target(ctx), _source(ctx)
    ctx.uffd.copy(to + 9 * SMALL_PAGE, bytes([OTHER]) * SMALL_PAGE)
    answer = ctx.ioctl("MOVE", to, start, HUGE_PAGE)
    ctx.expect("errno and .move", (answer.errno, answer.result), (errno.EAGAIN, 9 * SMALL_PAGE))
    expect_read(ctx, to + 8 * SMALL_PAGE, 9)
    expect_read(ctx, to + 9 * SMALL_PAGE, OTHER)
    ctx.expect_pagemap(to + 10 * SMALL_PAGE, HOLE)
    ctx.expect("byte of the rest of the source", ctx.read(start + 9 * SMALL_PAGE), bytes([10]))


@case(
    "UFFDIO_MOVE.ok.whole-huge-zero-page",
    origin="mm/huge_memory.c: move_pages_huge_pmd",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def whole_zero(ctx: Context) -> None:
    """A huge zero page is moved whole, reads as zeros and can be written."""
    to = _target(ctx)
    source = ctx.make(2 * PAGES)
    source.advise_thp()
    start = aligned(source.start)
    ctx.expect("byte", ctx.read(start), b"\0")
    answer = ctx.ioctl("MOVE", to, start, HUGE_PAGE)
    if answer.errno == errno.EAGAIN or answer.errno == errno.ENOENT:
        ctx.lack("THP", "the kernel gave no huge zero page")
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, HUGE_PAGE))
    ctx.expect_pagemap(start, HOLE)
    ctx.expect_pagemap(to + 3 * SMALL_PAGE, "P????")
    expect_read(ctx, to + 3 * SMALL_PAGE, 0)
    expect_silent_write(ctx, to + 4 * SMALL_PAGE)
    expect_read(ctx, to + 5 * SMALL_PAGE, 0)


def _add_busy(name: str, text: str, make: Callable[[Context, int], Callable[[], object]]) -> None:
    def run(ctx: Context) -> None:
        to = _target(ctx)
        start = huge_area(ctx, 1)
        _memory.fill(start, HUGE_PAGE, MOVED)
        undo = make(ctx, start)
        moving = ctx.start(ctx.ioctl, "MOVE", to, start, HUGE_PAGE)
        answer = moving.result()
        seen = (answer.errno, answer.result)
        ctx.expect("errno and .move", seen, (errno.EBUSY, -errno.EBUSY))
        ctx.expect_pagemap(to, HOLE)
        ctx.expect("bytes of the source mapped huge", mapped_huge(start), HUGE_PAGE)
        ctx.expect("byte of the source", ctx.read(start), bytes([MOVED]))
        undo()

    case(
        f"UFFDIO_MOVE.EBUSY.src-{name}-whole-huge",
        summary=f"A huge page that {text} is EBUSY, and nothing of it is moved",
        origin="mm/huge_memory.c: move_pages_huge_pmd",
        memory=ANON,
        features=Feature.MOVE,
        needs=[needs_thp(), *((needs_pin(),) if name == "pinned" else ())],
    )(run)


def _shared(ctx: Context, _start: int) -> Callable[[], object]:
    return ctx.fork().close


def _pinned(ctx: Context, start: int) -> Callable[[], object]:
    _memory.madvise(start, HUGE_PAGE, mmap.MADV_DONTFORK)
    pin = Pin(start, SMALL_PAGE)
    ring = pin.take(syscall)
    ctx.callback(os.close, ring)
    return lambda: pin.drop(syscall, ring)


_add_busy("shared", "is shared by fork", _shared)
_add_busy("pinned", "is pinned", _pinned)


@case(
    "UFFDIO_MOVE.ok.src-protected",
    origin="mm/userfaultfd.c: move_present_pte",
    memory=ANON,
    features=Feature.MOVE | Feature.PAGEFAULT_FLAG_WP,
    needs=[needs_thp()],
)
def source_protected(ctx: Context) -> None:
    """Protected pages, small and huge, are not protected at their destination."""
    to = _target(ctx)
    small, start = ctx.make(1), huge_area(ctx, 1)
    small.fill(MOVED)
    _memory.fill(start, HUGE_PAGE, MOVED)
    for at, length in ((small.start, SMALL_PAGE), (start, HUGE_PAGE)):
        ctx.uffd.register(at, length, mode=WP)
        ctx.uffd.writeprotect(at, length)
    for place, source, length in (
        (to, start, HUGE_PAGE),
        (to + HUGE_PAGE, small.start, SMALL_PAGE),
    ):
        answer = ctx.ioctl("MOVE", place, source, length)
        ctx.expect("errno and .move", (answer.errno, answer.result), (0, length))
        ctx.expect("protected pages", protected_pages(place, length), [])
        expect_silent_write(ctx, place)
        ctx.expect("byte behind the written one", ctx.read(place + 1), bytes([MOVED]))


# MOVE of one small page of a transparent huge page


def _huge_source(ctx: Context) -> tuple[Region, int]:
    start = huge_area(ctx, 1)
    _memory.fill(start, HUGE_PAGE, MOVED)
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    return region, start


def _expect_busy(ctx: Context, region: Region, start: int, when: str) -> None:
    # In a thread, since a kernel with a bug tries again and again and never returns.
    moving = ctx.start(ctx.ioctl, "MOVE", region.start, start + ctx.page, ctx.page)
    answer = moving.result()
    seen = answer.errno, answer.result
    ctx.expect(f"errno and .move, {when}", seen, (errno.EBUSY, -errno.EBUSY))
    ctx.expect_pagemap(region.start, HOLE)


@case(
    "UFFDIO_MOVE.EBUSY.src-shared-huge",
    origin="mm/userfaultfd.c: move_pages",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def shared_huge(ctx: Context) -> None:
    """A page of a huge page that is shared by fork is EBUSY, and the huge page is not split."""
    region, start = _huge_source(ctx)
    child = ctx.fork()
    _expect_busy(ctx, region, start, "child alive")
    ctx.expect("bytes mapped huge", mapped_huge(start), HUGE_PAGE)
    child.close()
    _expect_busy(ctx, region, start, "child ended")


@case(
    "UFFDIO_MOVE.EBUSY.src-pinned-huge",
    origin="mm/userfaultfd.c: move_pages_pte, split_folio",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp(), needs_pin()],
    variants=[
        Variant("busy", "EBUSY, at once"),
        Variant("endless", "MOVE tries again until the page is unpinned, which is a kernel bug"),
    ],
)
def pinned_huge(ctx: Context) -> None:
    """A page of a huge page of which another page is pinned is EBUSY until that is unpinned."""
    region, start = _huge_source(ctx)
    _memory.madvise(start, HUGE_PAGE, mmap.MADV_DONTFORK)
    pin = Pin(start, ctx.page)
    ring = pin.take(syscall)
    ctx.callback(os.close, ring)
    moving = ctx.start(ctx.ioctl, "MOVE", region.start, start + ctx.page, ctx.page)
    is_over = bool(select.select([moving], [], [], AT_ONCE_S * SCALE)[0])
    if is_over:
        ctx.expect_pagemap(region.start, HOLE)
    pin.drop(syscall, ring)
    answer = moving.result()
    variant = ctx.expect_variant(
        "whether MOVE returned while the page was pinned, errno and .move",
        (is_over, answer.errno, answer.result),
        busy=(True, errno.EBUSY, -errno.EBUSY),
        endless=(False, 0, ctx.page),
    )
    if variant == "busy":
        answer = ctx.ioctl("MOVE", region.start, start + ctx.page, ctx.page)
        ctx.expect("errno and .move after unpinning", (answer.errno, answer.result), (0, ctx.page))
    expect_read(ctx, region.start, MOVED)


@case(
    "UFFDIO_MOVE.ok.first-page-of-huge",
    origin="mm/userfaultfd.c: move_splits_huge_pmd",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def first_of_huge(ctx: Context) -> None:
    """The first page of a huge page is moved alone, also to memory that allows a huge page."""
    start = huge_area(ctx, 1)
    _memory.fill(start, HUGE_PAGE, MOVED)
    _memory.madvise(start, HUGE_PAGE, mmap.MADV_DONTFORK)
    region = ctx.make(2 * HUGE_PAGE // ctx.page)
    ctx.register(region, RegisterMode.MISSING)
    to = -(-region.start // HUGE_PAGE) * HUGE_PAGE
    answer = ctx.ioctl("MOVE", to, start, ctx.page)
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, ctx.page))
    seen = ctx.silently(ctx.read, to, ctx.page)
    ctx.expect("content", seen, bytes([MOVED]) * ctx.page)
    ctx.expect_pagemap(to + ctx.page, HOLE)
    ctx.expect_pagemap(start, HOLE)
    ctx.expect("byte of the next page", ctx.read(start + ctx.page), bytes([MOVED]))


@case(
    "UFFDIO_MOVE.ok.src-huge-zero",
    origin="mm/userfaultfd.c: move_pages",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def huge_zero(ctx: Context) -> None:
    """A page of a huge zero page is moved as the zero page, and leaves a hole in the source."""
    source, region = ctx.make(2 * HUGE_PAGE // ctx.page), ctx.make(1)
    source.advise_thp()
    source.madvise(mmap.MADV_DONTFORK)
    start = -(-source.start // HUGE_PAGE) * HUGE_PAGE
    ctx.expect("byte", ctx.read(start), b"\0")
    ctx.register(region, RegisterMode.MISSING)
    answer = ctx.ioctl("MOVE", region.start, start + ctx.page, ctx.page)
    # Without a huge zero page, the read has mapped only the first small page.
    if answer.errno == errno.ENOENT:
        ctx.lack("THP", "the kernel gave no huge zero page")
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, ctx.page))
    expect_read(ctx, region.start, 0)
    ctx.expect_pagemap(start + ctx.page, HOLE)
    ctx.expect_pagemap(start, "P????")


@case(
    "UFFDIO_MOVE.EEXIST.dst-huge",
    origin="mm/userfaultfd.c: move_pages",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def onto_huge(ctx: Context) -> None:
    """MOVE onto a page of a huge page is EEXIST, and the huge page is not split."""
    start, source = huge_area(ctx, 1), ctx.make(1)
    source.madvise(mmap.MADV_DONTFORK)
    source.fill(MOVED)
    ctx.open().register(start, HUGE_PAGE, mode=RegisterMode.MISSING)
    answer = ctx.ioctl("MOVE", start + ctx.page, source.start, ctx.page)
    ctx.expect("errno and .move", (answer.errno, answer.result), (errno.EEXIST, -errno.EEXIST))
    ctx.expect("bytes mapped huge", mapped_huge(start), HUGE_PAGE)
    expect_read(ctx, source.start, MOVED)
