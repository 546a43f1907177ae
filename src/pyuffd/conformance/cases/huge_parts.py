"""Transparent huge pages: missing, protected, in forks, mapped by parts, moved whole (layer L5)."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import Pin, needs_pin, syscall
from pyuffd.conformance._thp import mapped_huge, sizes, switched_on
from pyuffd.conformance._types import ANON, ANY, SHMEM, missing_features, wp_features
from pyuffd.conformance._wp import (
    DATA,
    HOLE,
    MARKER,
    MISSING_READ,
    MISSING_WRITE,
    READ_WRITE,
    UNPROTECT,
    WP_WRITE,
    expect_fault,
    expect_read,
    expect_silent_write,
    expect_write_fault,
    in_one_place,
    in_page_cache,
    page_out,
)
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import needs_privilege, needs_swap, needs_thp

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
PAGES = HUGE_PAGE // SMALL_PAGE
MADV_HUGEPAGE, MADV_PAGEOUT, MADV_COLLAPSE = 14, 21, 25
FORK = Feature.EVENT_FORK
MOVED, OTHER = 0x4D, 0x4E
SWAP_BATCH = 8


def _aligned(start: int) -> int:
    return -(-start // HUGE_PAGE) * HUGE_PAGE


def _bits(start: int, length: int = HUGE_PAGE, pid: int | None = None) -> list[int]:
    """Return which pages of a range pagemap shows as protected."""
    with Pagemap(pid) as pagemap:
        return [index for index, entry in enumerate(pagemap.read(start, length)) if entry >> 57 & 1]


# Missing pages where a huge page could be


@case(
    "fault.missing.where-a-huge-page-could-be",
    origin="mm/huge_memory.c: do_huge_pmd_anonymous_page",
    memory=ANON,
    features=missing_features,
    needs=[needs_thp()],
)
def missing_huge(ctx: Context) -> None:
    """Where a huge page could be each small page is missing by itself, read or written first."""
    region = ctx.make(4 * PAGES)
    region.advise_thp()
    ctx.register(region, MISSING)
    first = _aligned(region.start)
    for start, writes in ((first, False), (first + HUGE_PAGE, True)):
        at = start + 5 * SMALL_PAGE
        access = ctx.start(ctx.write, at, b"\1") if writes else ctx.start(ctx.read, at)
        expect_fault(ctx, access, MISSING_WRITE if writes else MISSING_READ, at)
        ctx.uffd.copy(at, bytes([DATA]) * SMALL_PAGE)
        access.result()
        for other in (start, at - SMALL_PAGE, at + SMALL_PAGE):
            ctx.expect_pagemap(other, HOLE)
        reading = ctx.start(ctx.read, at + SMALL_PAGE)
        expect_fault(ctx, reading, MISSING_READ, at + SMALL_PAGE)
        ctx.uffd.zeropage(at + SMALL_PAGE, SMALL_PAGE)
        ctx.expect("the next byte", reading.result(), b"\0")


# Protected, and then


def _protected(ctx: Context, *, parts: bool = False) -> int:
    """Protect a huge page whole, or every second page of it, which splits it."""
    start = huge_area(ctx, 1)
    _memory.fill(start, HUGE_PAGE, DATA)
    ctx.open().register(start, HUGE_PAGE, mode=WP)
    if not parts:
        ctx.uffd.writeprotect(start, HUGE_PAGE)
        return start
    for index in range(1, PAGES, 2):
        ctx.uffd.writeprotect(start + index * SMALL_PAGE, SMALL_PAGE)
    return start


@case(
    "thp.protected.mprotect-and-back",
    origin="mm/huge_memory.c: can_change_pmd_writable",
    memory=ANON,
    features=wp_features,
    needs=[needs_thp()],
)
def mprotected(ctx: Context) -> None:
    """A huge page that is protected stays so through mprotect to READ, NONE and back."""
    start = _protected(ctx)
    for protection in (mmap.PROT_READ, 0, READ_WRITE):
        _memory.mprotect(start, HUGE_PAGE, protection)
    ctx.expect("protected pages", len(_bits(start)), PAGES)
    expect_write_fault(ctx, start + 3 * SMALL_PAGE)
    expect_read(ctx, start + 4 * SMALL_PAGE, DATA)


def _add_fork(*, parts: bool, has_event: bool) -> None:
    def run(ctx: Context) -> None:
        start = _protected(ctx, parts=parts)
        wanted = list(range(1, PAGES, 2)) if parts else list(range(PAGES))
        child = ctx.fork()
        ctx.expect("protected in the parent", _bits(start) == wanted, True)
        seen = _bits(start, pid=child.pid)
        ctx.expect("protected in the child", len(seen), len(wanted) if has_event else 0)
        if has_event:
            ctx.expect("the same pages in the child", seen == wanted, True)
            assert child.uffd is not None
            expect_write_fault(ctx, start + SMALL_PAGE, child.uffd, child.write)
        else:
            write = ctx.silently(child.write, start + SMALL_PAGE, b"\1")
            ctx.expect("the child's write", write, None)
        expect_write_fault(ctx, start + 3 * SMALL_PAGE)
        ctx.expect("the parent's data", ctx.read(start + SMALL_PAGE), bytes([DATA]))

    what = "Every second page of a huge page" if parts else "A huge page"
    name = f"{'parts' if parts else 'whole'}{'-with-event' if has_event else ''}"
    case(
        f"thp.fork.protected-{name}",
        summary=f"{what} is protected: after a fork "
        + ("the child's are so, too" if has_event else "the child's are not"),
        origin="mm/huge_memory.c: copy_huge_pmd; mm/memory.c: copy_present_ptes",
        memory=ANON,
        features=lambda memory: wp_features(memory) | (FORK if has_event else Feature(0)),
        needs=[needs_thp()],
    )(run)


for _parts in (False, True):
    for _has_event in (False, True):
        _add_fork(parts=_parts, has_event=_has_event)


# Many entries that go at once


@case(
    "thp.zap.leaves-every-marker",
    origin="mm/memory.c: zap_install_uffd_wp_if_needed",
    memory=SHMEM,
    features=wp_features,
    needs=[needs_thp()],
)
def zapped(ctx: Context) -> None:
    """Of a file's huge page that is mapped by parts MADV_DONTNEED leaves a marker for each."""
    region = ctx.make(PAGES)
    assert region.fd is not None
    with Region.file(region.fd, region.length) as view:
        view.fill(DATA)
        try:
            view.madvise(MADV_COLLAPSE)
        except OSError as error:
            ctx.lack("collapse", f"MADV_COLLAPSE: {error.strerror}")
    ctx.register(region, WP)
    _memory.touch(region.start, region.length, SMALL_PAGE, write=False)
    gap = 100
    ctx.uffd.writeprotect(region)
    # A write to a private mapping would be a copy, which is no part of the huge page.
    ctx.uffd.writeprotect(region.start + gap * SMALL_PAGE, SMALL_PAGE, mode=UNPROTECT)
    _memory.touch(region.start, region.length, SMALL_PAGE, write=False)
    wanted = [index for index in range(PAGES) if index != gap]
    ctx.expect("protected before", len(_bits(region.start)), len(wanted))
    region.madvise(mmap.MADV_DONTNEED)
    seen = _bits(region.start)
    ctx.expect("protected afterwards", len(seen), len(wanted))
    ctx.expect("the same pages", seen == wanted, True)
    for index in (0, gap - 1, gap + 1, PAGES - 1):
        ctx.expect_pagemap(region.start + index * SMALL_PAGE, MARKER[ctx.memory.name])
    expect_write_fault(ctx, region.start + (PAGES - 1) * SMALL_PAGE)
    expect_silent_write(ctx, region.start + gap * SMALL_PAGE)


@case(
    "reclaim.zap.leaves-every-marker",
    origin="mm/memory.c: zap_pte_range, swap_pte_batch",
    memory=("shmem-private",),
    features=wp_features,
    needs=[needs_swap()],
)
def zapped_in_swap(ctx: Context) -> None:
    """Of neighbours in swap that are protected MADV_DONTNEED leaves a marker for each."""
    in_one_place(ctx)
    region = ctx.make(SWAP_BATCH + 2)
    in_page_cache(region, OTHER)
    ctx.register(region, WP)
    region.fill(DATA)
    ctx.uffd.writeprotect(region.start, SWAP_BATCH * SMALL_PAGE)
    page_out(ctx, region)
    region.madvise(mmap.MADV_DONTNEED)
    seen = _bits(region.start, region.length)
    ctx.expect("protected pages", seen, list(range(SWAP_BATCH)))
    for index in range(SWAP_BATCH):
        ctx.expect_pagemap(region.start + index * SMALL_PAGE, MARKER[ctx.memory.name])
    expect_read(ctx, region.start, OTHER)
    expect_write_fault(ctx, region.start + (SWAP_BATCH - 1) * SMALL_PAGE)
    expect_silent_write(ctx, region.start + SWAP_BATCH * SMALL_PAGE)


# Moved whole


def _target(ctx: Context) -> int:
    """Register a place for a huge page and one more; return its address."""
    region = ctx.make(3 * PAGES)
    region.advise_thp()
    ctx.register(region, MISSING)
    return _aligned(region.start)


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
    """A huge page and one page more: the first stays huge, the other is split off, both count."""
    to, start = _target(ctx), _source(ctx)
    answer = ctx.ioctl("MOVE", to, start, HUGE_PAGE + SMALL_PAGE)
    seen = (answer.errno, answer.result)
    ctx.expect("errno and .move", seen, (0, HUGE_PAGE + SMALL_PAGE))
    ctx.expect("bytes mapped huge", mapped_huge(to), HUGE_PAGE)
    _expect_all_there(ctx, to)
    expect_read(ctx, to + HUGE_PAGE, MOVED)
    for hole in (start, start + HUGE_PAGE - SMALL_PAGE, start + HUGE_PAGE):
        ctx.expect_pagemap(hole, HOLE)
    ctx.expect("the next page", ctx.read(start + HUGE_PAGE + SMALL_PAGE), bytes([MOVED]))
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
    """A huge page that was moved whole goes to swap and comes back."""
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
    """Where there is a page table already, a huge page arrives in parts, all of them."""
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
    """A huge page that meets a page half-way is moved up to there, and the rest stays."""
    to, start = _target(ctx), _source(ctx)
    ctx.uffd.copy(to + 9 * SMALL_PAGE, bytes([OTHER]) * SMALL_PAGE)
    answer = ctx.ioctl("MOVE", to, start, HUGE_PAGE)
    ctx.expect("errno and .move", (answer.errno, answer.result), (errno.EAGAIN, 9 * SMALL_PAGE))
    expect_read(ctx, to + 8 * SMALL_PAGE, 9)
    expect_read(ctx, to + 9 * SMALL_PAGE, OTHER)
    ctx.expect_pagemap(to + 10 * SMALL_PAGE, HOLE)
    ctx.expect("the rest of the source", ctx.read(start + 9 * SMALL_PAGE), bytes([10]))


@case(
    "UFFDIO_MOVE.ok.whole-huge-zero-page",
    origin="mm/huge_memory.c: move_pages_huge_pmd",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def whole_zero(ctx: Context) -> None:
    """A huge zero page is moved whole; it reads zeros, and can be written."""
    to = _target(ctx)
    source = ctx.make(2 * PAGES)
    source.advise_thp()
    start = _aligned(source.start)
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
        summary=f"A huge page that {text} is busy, and nothing of it is moved",
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


_add_busy("shared", "a fork has shared", _shared)
_add_busy("pinned", "is pinned", _pinned)


@case(
    "UFFDIO_MOVE.ok.src-protected",
    origin="mm/userfaultfd.c: move_present_pte",
    memory=ANON,
    features=Feature.MOVE | Feature.PAGEFAULT_FLAG_WP,
    needs=[needs_thp()],
)
def source_protected(ctx: Context) -> None:
    """Pages, small and huge, that are protected where they come from are not where they go."""
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
        ctx.expect("protected pages", _bits(place, length), [])
        expect_silent_write(ctx, place)
        ctx.expect("the next byte", ctx.read(place + 1), bytes([MOVED]))


# Huge pages of other sizes


SIZE = 64 << 10


@case(
    "thp.sizes.one-page-for-each-write",
    origin="mm/memory.c: alloc_anon_folio",
    memory=ANON,
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED,
    needs=[needs_thp(), needs_privilege("CAP_SYS_ADMIN")],
)
def one_page_each(ctx: Context) -> None:
    """In registered memory a write brings one page, also where 64 KiB could come at once."""
    if SIZE not in sizes():
        ctx.lack("THP-64k", "no huge pages of 64 KiB")
    ctx.enter(switched_on(SIZE, shared=False))
    region = ctx.make(4 * SIZE // SMALL_PAGE)
    at = -(-region.start // SIZE) * SIZE + SIZE
    region.advise_thp()
    ctx.register(region, WP)
    ctx.expect("a write", ctx.silently(ctx.write, at + 3 * SMALL_PAGE, b"\1"), None)
    there = [index for index in range(16) if ctx.bits(at + index * SMALL_PAGE) >> 63 & 1]
    ctx.expect("pages that are there", there, [3])


@case(
    "thp.sizes.one-page-for-each-read",
    origin="mm/memory.c: finish_fault",
    memory=ANY,
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM,
    needs=[needs_thp(), needs_privilege("CAP_SYS_ADMIN")],
)
def one_page_read(ctx: Context) -> None:
    """A read of shared memory maps one page of 64 KiB that the kernel has in one piece."""
    if SIZE not in sizes():
        ctx.lack("THP-64k", "no huge pages of 64 KiB")
    try:
        ctx.enter(switched_on(SIZE, shared=True))
    except OSError:
        ctx.lack("THP-64k-shmem", "64 KiB cannot be switched on for shared memory")
    length = 4 * SIZE
    start = _memory.mmap(length, READ_WRITE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    ctx.callback(_memory.munmap, start, length)
    _memory.madvise(start, length, MADV_HUGEPAGE)
    _memory.fill(start, length, DATA)
    _memory.madvise(start, length, mmap.MADV_DONTNEED)
    ctx.open().register(start, length, mode=WP)
    at = -(-start // SIZE) * SIZE + SIZE
    ctx.expect("a read", ctx.silently(ctx.read, at + 3 * SMALL_PAGE), bytes([DATA]))
    there = [index for index in range(16) if ctx.bits(at + index * SMALL_PAGE) >> 63 & 1]
    ctx.expect("pages that are mapped", there, [3])
    ctx.uffd.writeprotect(at + 4 * SMALL_PAGE, SMALL_PAGE)
    write = ctx.start(ctx.write, at + 4 * SMALL_PAGE, b"\1")
    expect_fault(ctx, write, WP_WRITE, at + 4 * SMALL_PAGE)
    ctx.uffd.writeprotect(at + 4 * SMALL_PAGE, SMALL_PAGE, mode=UNPROTECT)
    ctx.expect("the write", write.result(), None)
