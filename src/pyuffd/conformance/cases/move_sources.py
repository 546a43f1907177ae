"""UFFDIO_MOVE of a page in every state it can have, and what becomes of it afterwards (layer L5).

What is moved must still be there after reclaim: a page that was in swap, came back and was written
is clean in the swap cache until its page table entry says otherwise.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

from pyuffd import _memory
from pyuffd._abi import Feature, PageBit, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import Pin, needs_pin, syscall
from pyuffd.conformance._thp import mapped_huge
from pyuffd.conformance._types import ANON
from pyuffd.conformance._wp import HOLE, in_one_place, page_out
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE
from pyuffd.testing._need import Need, needs_swap, needs_thp

OLD, NEW, LATER = 0x61, 0x62, 0x63
ORIGIN = "mm/userfaultfd.c: move_pages_pte"


@dataclass(frozen=True)
class State:
    """A state of a page; `make` brings it about and returns the byte the page is full of."""

    name: str
    text: str
    make: Callable[[Context, Region], int]
    needs: tuple[Need, ...] = ()


def _written(_: Context, source: Region) -> int:
    source.fill(NEW)
    return NEW


def _zero(ctx: Context, source: Region) -> int:
    ctx.read(source.start)
    return 0


def _swapped(ctx: Context, source: Region) -> int:
    source.fill(NEW)
    page_out(ctx, source)
    return NEW


def _read_back(ctx: Context, source: Region) -> int:
    _swapped(ctx, source)
    ctx.expect("byte back from swap", ctx.read(source.start), bytes([NEW]))
    return NEW


def _written_back(ctx: Context, source: Region) -> int:
    source.fill(OLD)
    page_out(ctx, source)
    ctx.expect("byte back from swap", ctx.read(source.start), bytes([OLD]))
    source.fill(NEW)
    return NEW


def _written_in_swap(ctx: Context, source: Region) -> int:
    source.fill(OLD)
    page_out(ctx, source)
    source.fill(NEW)
    return NEW


def _written_twice(ctx: Context, source: Region) -> int:
    _written_back(ctx, source)
    page_out(ctx, source)
    ctx.expect("byte back from swap", ctx.read(source.start), bytes([NEW]))
    source.fill(LATER)
    return LATER


def _cold(ctx: Context, source: Region) -> int:
    source.fill(NEW)
    source.madvise(20)  # MADV_COLD
    return NEW


def _read_only_and_back(ctx: Context, source: Region) -> int:
    source.fill(NEW)
    _memory.mprotect(source.start, source.length, mmap.PROT_READ)
    _memory.mprotect(source.start, source.length, mmap.PROT_READ | mmap.PROT_WRITE)
    return NEW


SWAP = (needs_swap(),)
STATES = (
    State("written", "that was written", _written),
    State("zero", "of zeros that was only read", _zero),
    State("swapped", "that is swapped out", _swapped, SWAP),
    State("read-back", "that came back from swap by a read", _read_back, SWAP),
    State(
        "written-back", "that came back from swap by a read and was written", _written_back, SWAP
    ),
    State("written-in-swap", "that came back from swap by a write", _written_in_swap, SWAP),
    State("written-twice", "that was written after its second time in swap", _written_twice, SWAP),
    State("cold", "that is to be reclaimed soon", _cold),
    State("read-only-and-back", "that was read-only for a while", _read_only_and_back),
)


def _moved(ctx: Context, state: State) -> tuple[Region, Region, int]:
    in_one_place(ctx)
    region, source = ctx.make(1), ctx.make(1)
    source.madvise(mmap.MADV_DONTFORK)
    ctx.register(region, RegisterMode.MISSING)
    value = state.make(ctx, source)
    answer = ctx.ioctl("MOVE", region.start, source.start, ctx.page)
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, ctx.page))
    ctx.expect_pagemap(source.start, HOLE)
    return region, source, value


def _content(ctx: Context, region: Region, when: str, value: int) -> None:
    seen = ctx.silently(ctx.read, region.start, ctx.page)
    ctx.expect(f"content {when}", seen, bytes([value]) * ctx.page)


def _then_read(ctx: Context, state: State) -> None:
    region, source, value = _moved(ctx, state)
    _content(ctx, region, "after MOVE", value)
    _content(ctx, source, "of the source after MOVE", 0)
    ctx.expect("a write", ctx.silently(ctx.write, region.start, bytes([LATER])), None)
    ctx.expect("the byte", ctx.silently(ctx.read, region.start, 2), bytes([LATER, value]))


def _then_reclaimed(ctx: Context, state: State) -> None:
    region, _, value = _moved(ctx, state)
    # A page in swap is brought back first, which maps it clean.
    if PageBit.PRESENT not in ctx.bits(region.start):
        _content(ctx, region, "after MOVE", value)
    if value:
        page_out(ctx, region)
    else:
        region.pageout()  # a zero page stays
    _content(ctx, region, "after MOVE and reclaim", value)
    region.fill(LATER)
    page_out(ctx, region)
    _content(ctx, region, "written, and reclaimed again", LATER)


def _then_back(ctx: Context, state: State) -> None:
    region, source, value = _moved(ctx, state)
    ctx.uffd.register(source, mode=RegisterMode.MISSING)
    answer = ctx.ioctl("MOVE", source.start, region.start, ctx.page)
    ctx.expect("errno and .move, back", (answer.errno, answer.result), (0, ctx.page))
    _content(ctx, source, "after MOVE and back", value)
    ctx.expect_pagemap(region.start, HOLE)
    reading = ctx.start(ctx.read, region.start)
    ctx.expect_fault(0, region.start)
    ctx.uffd.zeropage(region.start, ctx.page)
    ctx.expect("byte", reading.result(), b"\0")


Run = Callable[[Context, State], None]
AFTER: tuple[tuple[str, str, Run, tuple[Need, ...]], ...] = (
    ("", "arrives whole, can be written, and leaves a hole", _then_read, ()),
    (
        "-reclaimed",
        "is there after reclaim, and after the next write and reclaim",
        _then_reclaimed,
        SWAP,
    ),
    ("-and-back", "can be moved back", _then_back, ()),
)


def _add(state: State, name: str, text: str, run: Run, needs: tuple[Need, ...]) -> None:
    case(
        f"UFFDIO_MOVE.ok.page-{state.name}{name}",
        summary=f"A page {state.text} {text}",
        origin=ORIGIN,
        memory=ANON,
        features=Feature.MOVE,
        needs=state.needs or needs,
    )(lambda ctx: run(ctx, state))


for _state in STATES:
    for _after in AFTER:
        _add(_state, *_after)


# Busy pages of a transparent huge page, of which one small page is to be moved


def _huge_source(ctx: Context) -> tuple[Region, int]:
    start = huge_area(ctx, 1)
    _memory.fill(start, HUGE_PAGE, NEW)
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    return region, start


def _expect_busy(ctx: Context, region: Region, start: int, when: str) -> None:
    # In a thread: a kernel that tries again and again does so until this one gives up.
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
    """A page of a huge page that a fork has shared is busy, and the huge page stays one."""
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
)
def pinned_huge(ctx: Context) -> None:
    """A page of a huge page that is pinned elsewhere is busy; unpinned, it can be moved."""
    region, start = _huge_source(ctx)
    _memory.madvise(start, HUGE_PAGE, mmap.MADV_DONTFORK)
    pin = Pin(start, ctx.page)
    ring = pin.take(syscall)
    ctx.callback(os.close, ring)
    _expect_busy(ctx, region, start, "pinned")
    pin.drop(syscall, ring)
    answer = ctx.ioctl("MOVE", region.start, start + ctx.page, ctx.page)
    ctx.expect("errno and .move, unpinned", (answer.errno, answer.result), (0, ctx.page))
    _content(ctx, region, "after MOVE", NEW)


@case(
    "UFFDIO_MOVE.ok.first-page-of-huge",
    origin="mm/userfaultfd.c: move_splits_huge_pmd",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def first_of_huge(ctx: Context) -> None:
    """The first page of a huge page is moved alone, even to where a huge page could be."""
    start = huge_area(ctx, 1)
    _memory.fill(start, HUGE_PAGE, NEW)
    _memory.madvise(start, HUGE_PAGE, mmap.MADV_DONTFORK)
    region = ctx.make(2 * HUGE_PAGE // ctx.page)
    ctx.register(region, RegisterMode.MISSING)
    to = -(-region.start // HUGE_PAGE) * HUGE_PAGE
    answer = ctx.ioctl("MOVE", to, start, ctx.page)
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, ctx.page))
    seen = ctx.silently(ctx.read, to, ctx.page)
    ctx.expect("content", seen, bytes([NEW]) * ctx.page)
    ctx.expect_pagemap(to + ctx.page, HOLE)
    ctx.expect_pagemap(start, HOLE)
    ctx.expect("the next page", ctx.read(start + ctx.page), bytes([NEW]))


@case(
    "UFFDIO_MOVE.ok.src-huge-zero",
    origin="mm/userfaultfd.c: move_pages",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def huge_zero(ctx: Context) -> None:
    """A page of a huge zero page is moved as a zero page, and leaves a hole in it."""
    source, region = ctx.make(2 * HUGE_PAGE // ctx.page), ctx.make(1)
    source.advise_thp()
    source.madvise(mmap.MADV_DONTFORK)
    start = -(-source.start // HUGE_PAGE) * HUGE_PAGE
    ctx.expect("byte", ctx.read(start), b"\0")
    ctx.register(region, RegisterMode.MISSING)
    answer = ctx.ioctl("MOVE", region.start, start + ctx.page, ctx.page)
    # Without a huge zero page there was one small page, and no second.
    if answer.errno == errno.ENOENT:
        ctx.lack("THP", "the kernel gave no huge zero page")
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, ctx.page))
    _content(ctx, region, "after MOVE", 0)
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
    """Nothing is moved onto a huge page, which stays one."""
    start, source = huge_area(ctx, 1), ctx.make(1)
    source.madvise(mmap.MADV_DONTFORK)
    source.fill(NEW)
    ctx.open().register(start, HUGE_PAGE, mode=RegisterMode.MISSING)
    answer = ctx.ioctl("MOVE", start + ctx.page, source.start, ctx.page)
    ctx.expect("errno and .move", (answer.errno, answer.result), (errno.EEXIST, -errno.EEXIST))
    ctx.expect("bytes mapped huge", mapped_huge(start), HUGE_PAGE)
    _content(ctx, source, "of the source", NEW)
