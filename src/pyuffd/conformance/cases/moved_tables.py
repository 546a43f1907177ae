"""mremap(2) of registered memory: by page tables, with MREMAP_DONTUNMAP, to another size (L5).

Where the alignment allows it, the kernel moves whole page tables instead of entries. It must not do
so without EVENT_REMAP, since then each entry has to lose its protection.
"""

from __future__ import annotations

import mmap
import select
from typing import Any

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd._events import Remap, Unmap
from pyuffd._uffd import Event
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._thp import mapped_huge
from pyuffd.conformance._types import ANON, SMALL, missing_features, missing_wp_features
from pyuffd.conformance._wp import (
    DATA,
    MAP_NORESERVE,
    MISSING_READ,
    READ_WRITE,
    UNPROTECT,
    WP_WRITE,
    expect_fault,
    expect_read,
    expect_silent_write,
    marker_features,
    reserve,
)
from pyuffd.conformance.cases.errno_register import vm_flags
from pyuffd.pagemap import Pagemap
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE, MemoryType
from pyuffd.testing._need import needs_thp

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4
MAP_FIXED = 0x10
SYS_MREMAP = 25
MADV_HUGEPAGE, MADV_NOHUGEPAGE = 14, 15
GIB = 1 << 30
ORIGIN = "mm/mremap.c: move_page_tables"
TABLE_PAGES = HUGE_PAGE // SMALL_PAGE


def _protected_pages(start: int, length: int) -> int:
    with Pagemap() as pagemap:
        return sum(entry >> 57 & 1 for entry in pagemap.read(start, length))


def _mapped_at(ctx: Context, start: int, length: int) -> None:
    """Map memory of the case's type over a reserved range."""
    if ctx.memory.is_anon:
        flags, fd = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1
    else:
        region = ctx.make(length // ctx.page)
        assert region.fd is not None
        flags, fd = mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE, region.fd
    _memory.mmap(length, READ_WRITE, flags | MAP_FIXED, fd, 0, start)
    if ctx.memory.is_anon:
        _memory.madvise(start, length, MADV_NOHUGEPAGE)


def _moved(ctx: Context, start: int, length: int, to: int, *, has_event: bool) -> None:
    moving = ctx.start(_memory.mremap, start, length, length, MAYMOVE | FIXED, to)
    if has_event:
        event = ctx.expect_event(Remap)
        ctx.expect("the event", event, Remap(start, to, length))
    moving.result()
    # Keep others from mapping something at the old address before the case ends.
    hold = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE
    _memory.mmap(length, 0, hold, -1, 0, start)


def _add_table(*, has_event: bool) -> None:
    extra = Feature.EVENT_REMAP if has_event else Feature(0)

    def run(ctx: Context) -> None:
        length = 2 * HUGE_PAGE
        start, to = reserve(ctx, length, HUGE_PAGE), reserve(ctx, length, HUGE_PAGE)
        _mapped_at(ctx, start, length)
        ctx.open().register(start, length, mode=WP)
        pages = (0, 5, TABLE_PAGES - 1, TABLE_PAGES, 2 * TABLE_PAGES - 1)
        for index in pages:
            _memory.fill(start + index * SMALL_PAGE, SMALL_PAGE, DATA)
        ctx.uffd.writeprotect(start, length)
        ctx.expect("protected pages before", _protected_pages(start, length), 2 * TABLE_PAGES)
        _moved(ctx, start, length, to, has_event=has_event)
        left = 2 * TABLE_PAGES if has_event else 0
        ctx.expect("protected pages after mremap", _protected_pages(to, length), left)
        ctx.expect("VmFlags", vm_flags(to), {"uw"} if has_event else set())
        for index in pages:
            at = to + index * SMALL_PAGE
            expect_read(ctx, at, DATA)
            if has_event:
                write = ctx.start(ctx.write, at, b"\1")
                expect_fault(ctx, write, WP_WRITE, at)
                ctx.uffd.writeprotect(at, SMALL_PAGE, mode=UNPROTECT)
                ctx.expect("the write", write.result(), None)
            else:
                expect_silent_write(ctx, at)

    name = "with-event" if has_event else "without-event"
    case(
        f"mremap.page-tables.{name}",
        summary="In memory whose page tables could be moved whole, every entry "
        + ("keeps its protection" if has_event else "loses its protection without EVENT_REMAP"),
        origin=ORIGIN,
        memory=SMALL,
        features=lambda memory: marker_features(memory) | extra,
    )(run)


def _add_directory(*, has_event: bool) -> None:
    def run(ctx: Context) -> None:
        start, to = reserve(ctx, GIB, GIB), reserve(ctx, GIB, GIB)
        _mapped_at(ctx, start, GIB)
        ctx.open().register(start, GIB, mode=WP)
        at = GIB // 2 + 3 * SMALL_PAGE
        _memory.fill(start + at, SMALL_PAGE, DATA)
        ctx.uffd.writeprotect(start + at, SMALL_PAGE)
        ctx.expect("whether the page is protected before", ctx.is_protected(start + at), True)
        _moved(ctx, start, GIB, to, has_event=has_event)
        ctx.expect(
            "whether the page is protected after mremap", ctx.is_protected(to + at), has_event
        )
        expect_read(ctx, to + at, DATA)

    name = "with-event" if has_event else "without-event"
    case(
        f"mremap.page-directories.{name}",
        summary="In a GiB, whose PMD table could be moved whole, an entry "
        + ("keeps its protection" if has_event else "loses its protection without EVENT_REMAP"),
        origin=ORIGIN,
        memory=ANON,
        features=Feature.PAGEFAULT_FLAG_WP | (Feature.EVENT_REMAP if has_event else Feature(0)),
    )(run)


def _add_huge(*, has_event: bool) -> None:
    def run(ctx: Context) -> None:
        start, to = reserve(ctx, HUGE_PAGE, HUGE_PAGE), reserve(ctx, HUGE_PAGE, HUGE_PAGE)
        _mapped_at(ctx, start, HUGE_PAGE)
        _memory.madvise(start, HUGE_PAGE, MADV_HUGEPAGE)
        _memory.fill(start, HUGE_PAGE, DATA)
        if mapped_huge(start) != HUGE_PAGE:
            ctx.lack("THP", "the kernel gave no transparent huge page")
        ctx.open().register(start, HUGE_PAGE, mode=WP)
        ctx.uffd.writeprotect(start, HUGE_PAGE)
        _moved(ctx, start, HUGE_PAGE, to, has_event=has_event)
        left = TABLE_PAGES if has_event else 0
        ctx.expect("protected pages after mremap", _protected_pages(to, HUGE_PAGE), left)
        at = to + 7 * SMALL_PAGE
        expect_read(ctx, at, DATA)
        if has_event:
            write = ctx.start(ctx.write, at, b"\1")
            expect_fault(ctx, write, WP_WRITE, at)
            ctx.uffd.writeprotect(at, SMALL_PAGE, mode=UNPROTECT)
            ctx.expect("the write", write.result(), None)
        else:
            expect_silent_write(ctx, at)

    name = "with-event" if has_event else "without-event"
    case(
        f"mremap.huge-page.{name}",
        summary="A transparent huge page that is protected whole "
        + ("keeps its protection" if has_event else "loses its protection without EVENT_REMAP"),
        origin="mm/huge_memory.c: move_huge_pmd",
        memory=ANON,
        features=Feature.PAGEFAULT_FLAG_WP | (Feature.EVENT_REMAP if has_event else Feature(0)),
        needs=[needs_thp()],
    )(run)


for _has_event in (False, True):
    _add_table(has_event=_has_event)
    _add_directory(has_event=_has_event)
    _add_huge(has_event=_has_event)


# MREMAP_DONTUNMAP


def _add_stays(*, has_event: bool) -> None:
    extra = Feature.EVENT_REMAP | Feature.EVENT_UNMAP if has_event else Feature(0)

    def run(ctx: Context) -> None:
        length = 2 * ctx.page
        start, to = reserve(ctx, length), reserve(ctx, length)
        _mapped_at(ctx, start, length)
        uffd = ctx.open()
        # Close it before the ranges are unmapped, or munmap would wait for its event to be read.
        ctx.callback(uffd.close)
        uffd.register(start, length, mode=MISSING | WP)
        ctx.uffd.copy(start, bytes([DATA]) * ctx.page)
        ctx.uffd.writeprotect(start, ctx.page)
        flags = MAYMOVE | FIXED | DONTUNMAP
        moving = ctx.start(_memory.mremap, start, length, length, flags, to)
        if has_event:
            event = ctx.expect_event(Remap)
            ctx.expect("the event", event, Remap(start, to, length))
        try:
            moving.result()
        except OSError as error:
            ctx.lack("MREMAP_DONTUNMAP", f"mremap: {error.strerror}")
        ctx.expect_quiet()
        ctx.expect("VmFlags of the new mapping", vm_flags(to), {"um", "uw"} if has_event else set())
        ctx.expect("VmFlags of the old mapping", vm_flags(start), {"um", "uw"})
        ctx.expect("whether the new page is protected", ctx.is_protected(to), has_event)
        ctx.expect("whether the old page is protected", ctx.is_protected(start), False)
        expect_read(ctx, to, DATA)
        if ctx.memory.shared:  # the file still has the page, so it is not missing
            return
        reading = ctx.start(ctx.read, start)
        expect_fault(ctx, reading, MISSING_READ, start)
        ctx.uffd.copy(start, b"\1" * ctx.page)
        ctx.expect("byte of the old mapping", reading.result(), b"\1")

    name = "with-event" if has_event else "without-event"
    case(
        f"mremap.dont-unmap.{name}",
        summary="MREMAP_DONTUNMAP leaves the old mapping empty and registered",
        origin="mm/mremap.c: mremap_userfaultfd_prep",
        memory=SMALL,
        features=lambda memory: missing_wp_features(memory) | extra,
    )(run)


_add_stays(has_event=False)
_add_stays(has_event=True)


# A move with another size

EVENTS = Feature.EVENT_REMAP | Feature.EVENT_UNMAP | Feature.EVENT_FORK
LENGTHS = (
    Variant("moved", "the length in the event is that of what was moved"),
    Variant("asked", "the length in the event is the old_size of the call"),
)


def _resized(ctx: Context, old: int, new: int) -> tuple[int, int, list[Event]]:
    region, target = ctx.make(3), ctx.make(2)
    ctx.register(region, MISSING)
    child = ctx.fork()
    uffd = child.uffd
    assert uffd is not None
    words = (
        SYS_MREMAP,
        region.start,
        old * ctx.page,
        new * ctx.page,
        MAYMOVE | FIXED,
        target.start,
    )
    moving = ctx.start(child.syscall, *words)
    found: list[Event] = []
    waited: list[Any] = [uffd, moving]
    while uffd in select.select(waited, [], [], WAIT_S)[0]:
        found += uffd.read_events(1)
    ctx.expect("mremap", moving.result(), target.start)
    ctx.expect_quiet(uffd)
    # The last page, which may be new, is registered too.
    last = target.start + (new - 1) * ctx.page
    reading = ctx.start(child.read, last, 1)
    expect_fault(ctx, reading, MISSING_READ, last, uffd)
    uffd.copy(last, b"\1" * ctx.page)
    ctx.expect("byte in the child", reading.result(), b"\1")
    return region.start, target.start, found


def _resize_features(memory: MemoryType) -> Feature:
    return missing_features(memory) | EVENTS


@case(
    "event.mremap-grow.remap-unmap",
    origin="mm/mremap.c: mremap_userfaultfd_complete",
    memory=SMALL,
    features=_resize_features,
)
def grown(ctx: Context) -> None:
    """mremap(2) from one page to two sends an event of one page; both are registered."""
    start, to, found = _resized(ctx, 1, 2)
    wanted = [Remap(start, to, ctx.page), Unmap(start, start + ctx.page)]
    ctx.expect("the events", found, wanted)


@case(
    "event.mremap-shrink-move.remap-unmap",
    origin="mm/mremap.c: mremap_userfaultfd_complete",
    memory=SMALL,
    features=_resize_features,
    variants=LENGTHS,
)
def shrunk(ctx: Context) -> None:
    """mremap(2) from two pages to one sends a Remap event, and an Unmap for each old page."""
    start, to, found = _resized(ctx, 2, 1)
    first, second = start + ctx.page, start + 2 * ctx.page
    unmaps = [Unmap(first, second), Unmap(start, first)]
    seen = [event for event in found if isinstance(event, Unmap)]
    ctx.expect("unmaps", sorted(seen, key=lambda event: -event.start), unmaps)
    moves = [event for event in found if isinstance(event, Remap)]
    ctx.expect_variant(
        "moves",
        moves,
        moved=[Remap(start, to, ctx.page)],
        asked=[Remap(start, to, 2 * ctx.page)],
    )
