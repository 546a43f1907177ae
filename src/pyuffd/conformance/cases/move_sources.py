"""UFFDIO_MOVE of a page in each state, and the page's content afterwards (layer L5).

A moved page must keep its content through reclaim. If a page was swapped in and then written, only
the dirty bit in its page table entry tells that the copy in swap is old, so MOVE must keep the bit.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyuffd import _memory
from pyuffd._abi import Feature, MoveMode, PageBit, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._types import ANON
from pyuffd.conformance._wp import HOLE, in_one_place, page_out
from pyuffd.regions import Region
from pyuffd.testing._need import Need, needs_swap

OLD, NEW, LATER = 0x61, 0x62, 0x63
ORIGIN = "mm/userfaultfd.c: move_pages_pte"
MADV_WILLNEED = 3
SOFT_DIRTY = 1 << 55


@dataclass(frozen=True)
class State:
    """A state of a page; `make` makes it and returns the byte that fills the page."""

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


def _ahead(ctx: Context, source: Region) -> int:
    _swapped(ctx, source)
    # Read into the swap cache; the page table keeps its swap entry.
    source.madvise(MADV_WILLNEED)
    ctx.expect_pagemap(source.start, "-S???")
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


def _copied(ctx: Context, source: Region) -> int:
    ctx.uffd.register(source, mode=RegisterMode.MISSING)
    ctx.uffd.copy(source.start, bytes([NEW]) * ctx.page)
    ctx.uffd.unregister(source)
    return NEW


def _forked_and_written(ctx: Context, source: Region) -> int:
    source.madvise(mmap.MADV_DOFORK)
    source.fill(OLD)
    child = ctx.fork()
    source.fill(NEW)
    ctx.expect("byte in the child", child.read(source.start, 1), bytes([OLD]))
    source.madvise(mmap.MADV_DONTFORK)
    return NEW


SWAP = (needs_swap(),)
STATES = (
    State("written", "that was written", _written),
    State("zero", "that was only read (the zero page)", _zero),
    State("swapped", "that is swapped out", _swapped, SWAP),
    State("read-ahead", "that is in the swap cache and not mapped", _ahead, SWAP),
    State("read-back", "swapped in by a read", _read_back, SWAP),
    State("written-back", "swapped in by a read and then written", _written_back, SWAP),
    State("written-in-swap", "swapped in by a write", _written_in_swap, SWAP),
    State("written-twice", "written after it was swapped in a second time", _written_twice, SWAP),
    State("copied", "filled by COPY", _copied),
    State("forked-and-written", "written after a fork shared it", _forked_and_written),
    State("cold", "marked cold by MADV_COLD", _cold),
    State("read-only-and-back", "that was made read-only and writable again", _read_only_and_back),
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
    # Swap the page in first, which maps it clean.
    if PageBit.PRESENT not in ctx.bits(region.start):
        _content(ctx, region, "after MOVE", value)
    if value:
        page_out(ctx, region)
    else:
        region.pageout()  # the zero page is not reclaimed
    _content(ctx, region, "after MOVE and reclaim", value)
    region.fill(LATER)
    page_out(ctx, region)
    _content(ctx, region, "after a write and reclaim again", LATER)


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
    ("", "is moved whole, can be written, and leaves a hole", _then_read, ()),
    (
        "-reclaimed",
        "keeps its content through reclaim after MOVE, and through the next write and reclaim",
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


@case(
    "UFFDIO_MOVE.ok.mixed-pages",
    origin="mm/userfaultfd.c: move_pages",
    memory=ANON,
    features=Feature.MOVE,
    needs=SWAP,
)
def mixed(ctx: Context) -> None:
    """One MOVE of pages in every state, and of holes, moves each of them correctly."""
    in_one_place(ctx)
    source, region = ctx.make(8), ctx.make(8)
    source.madvise(mmap.MADV_DONTFORK)
    ctx.register(region, RegisterMode.MISSING)
    pages = [source.start + index * ctx.page for index in range(8)]
    values = [11, 0, 0, 14, 15, 0, 0, 18]
    for index in (3, 4):
        source.fill(values[index], index * ctx.page, ctx.page)
    page_out(ctx, source)
    for index in (0, 7):
        source.fill(values[index], index * ctx.page, ctx.page)
    for index in (1, 5):
        ctx.read(pages[index])
    # 2 and 6 are holes.
    mode = int(MoveMode.ALLOW_SRC_HOLES)
    answer = ctx.ioctl("MOVE", region.start, source.start, region.length, mode)
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, region.length))
    for index, at in enumerate(pages):
        ctx.expect_pagemap(at, HOLE)
        to = region.start + index * ctx.page
        if index in (2, 6):
            ctx.expect_pagemap(to, HOLE)
            continue
        seen = ctx.silently(ctx.read, to, ctx.page)
        ctx.expect(f"content of page {index}", seen, bytes([values[index]]) * ctx.page)


@case(
    "UFFDIO_MOVE.ok.soft-dirty",
    origin="mm/userfaultfd.c: move_present_pte, move_swap_pte",
    memory=ANON,
    features=Feature.MOVE,
    needs=SWAP,
)
def soft_dirty(ctx: Context) -> None:
    """A moved page, mapped or swapped out, is soft-dirty at its destination."""
    in_one_place(ctx)
    source, region = ctx.make(2), ctx.make(2)
    source.madvise(mmap.MADV_DONTFORK)
    ctx.register(region, RegisterMode.MISSING)
    source.fill(NEW)
    if not int(ctx.bits(source.start)) & SOFT_DIRTY:
        ctx.lack("soft-dirty", "the kernel has no CONFIG_MEM_SOFT_DIRTY")
    page_out(ctx, source)
    source.fill(NEW, 0, ctx.page)
    Path("/proc/self/clear_refs").write_text("4")
    bits = [int(ctx.bits(source.start + at * ctx.page)) & SOFT_DIRTY for at in range(2)]
    ctx.expect("soft-dirty before", bits, [0, 0])
    answer = ctx.ioctl("MOVE", region.start, source.start, region.length)
    ctx.expect("errno and .move", (answer.errno, answer.result), (0, region.length))
    bits = [int(ctx.bits(region.start + at * ctx.page)) & SOFT_DIRTY for at in range(2)]
    ctx.expect("soft-dirty afterwards", bits, [SOFT_DIRTY] * 2)
