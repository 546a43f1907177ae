"""Written content of which only the dirty bit in the page table tells (layer L5).

A page that was swapped in is clean, with a copy in swap. If it is then written, only the dirty bit
in its page table entry shows that. A change of the entry that loses the bit loses the content:
reclaim drops the page, and the next access swaps the old copy in.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd._events import Remap
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._spec import NO_FEATURE
from pyuffd.conformance._types import missing_features, wp_features
from pyuffd.conformance._wp import (
    DATA,
    HOLE,
    MISSING_READ,
    MISSING_WRITE,
    READ_WRITE,
    UNPROTECT,
    WRITTEN,
    expect_fault,
    expect_read,
    in_one_place,
    move_mapping,
    page_out,
    reserve,
)
from pyuffd.conformance.cases.cold_sources import numbered_file
from pyuffd.conformance.cases.flushes import QUESTIONS
from pyuffd.conformance.cases.huge_splits import MADV_COLD
from pyuffd.conformance.cases.other_bits import clear_refs
from pyuffd.conformance.cases.pagemap_scan import FEATURES, WP_SCAN, end_of, scan
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE
from pyuffd.testing._need import needs_swap

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
MEMORY = ("anon", "shmem-private")
SKEW = 24  # bytes from the page boundary to an unaligned source
CODE = ctypes.CFUNCTYPE(ctypes.c_int)
RETURNS_42 = b"\xb8\x2a\0\0\0\xc3"  # mov $42, %eax; ret


@dataclass(frozen=True)
class Change:
    """A change of the entry of a protected page; `act` returns the new address of the page."""

    name: str
    text: str
    act: Callable[[Context, Region], int]
    features: Feature = NO_FEATURE


def _nothing(_: Context, region: Region) -> int:
    return region.start


def _unprotect(ctx: Context, region: Region) -> int:
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    return region.start


def _unregister(ctx: Context, region: Region) -> int:
    ctx.uffd.unregister(region)
    return region.start


def _close(ctx: Context, region: Region) -> int:
    ctx.uffd.close()
    return region.start


def _mprotect(_: Context, region: Region) -> int:
    for protection in (mmap.PROT_READ, 0, READ_WRITE):
        _memory.mprotect(region.start, region.length, protection)
    return region.start


def _clear_refs(_: Context, region: Region) -> int:
    clear_refs()
    return region.start


def _cold(_: Context, region: Region) -> int:
    region.madvise(MADV_COLD)
    return region.start


def _fork(ctx: Context, region: Region) -> int:
    ctx.fork().close()
    return region.start


def _mremap(ctx: Context, region: Region) -> int:
    target = reserve(ctx, region.length)
    moving = ctx.start(move_mapping, ctx, region, target)
    if ctx.uffd.features & Feature.EVENT_REMAP:
        ctx.expect_event(Remap)
    moving.result()
    return target


CHANGES = (
    Change("UFFDIO_WRITEPROTECT.ok.keeps-written", "protected", _nothing),
    Change("UFFDIO_WRITEPROTECT.ok.off-keeps-written", "protected and unprotected", _unprotect),
    Change("UFFDIO_UNREGISTER.ok.keeps-written", "protected and unregistered", _unregister),
    Change("close.ok.keeps-written", "protected until the userfaultfd was closed", _close),
    Change("mprotect.ok.keeps-written", "protected and made inaccessible for a while", _mprotect),
    Change("clear_refs.ok.keeps-written", "protected and cleared by clear_refs", _clear_refs),
    Change("madvise.ok.keeps-written", "protected and marked cold by MADV_COLD", _cold),
    Change("fork.ok.keeps-written", "protected and shared by fork", _fork, Feature.EVENT_FORK),
    Change("mremap.without-event.keeps-written", "protected and moved", _mremap),
    Change("mremap.with-event.keeps-written", "protected and moved", _mremap, Feature.EVENT_REMAP),
)


def _written_over_its_copy(ctx: Context) -> Region:
    """Make a page that was swapped in and then written, so that swap may have its old content."""
    in_one_place(ctx)
    region = ctx.make(1)
    region.fill(DATA)
    ctx.register(region, WP)
    page_out(ctx, region)
    expect_read(ctx, region.start, DATA)
    region.fill(WRITTEN)
    return region


def _add(change: Change) -> None:
    def run(ctx: Context) -> None:
        region = _written_over_its_copy(ctx)
        ctx.uffd.writeprotect(region)
        at = change.act(ctx, region)
        page_out(ctx, Region.at(at, ctx.page))
        expect_read(ctx, at, WRITTEN)

    case(
        change.name,
        summary=f"A page with an old copy in swap, written and then {change.text}, keeps the new"
        " content through reclaim",
        origin="mm/mprotect.c, mm/mremap.c, mm/memory.c: the dirty bit of what they change",
        memory=MEMORY,
        features=lambda memory: wp_features(memory) | change.features,
        needs=[needs_swap()],
    )(run)


for _change in CHANGES:
    _add(_change)


def _add_scan(name: str, asked: dict[str, int]) -> None:
    def run(ctx: Context) -> None:
        region = _written_over_its_copy(ctx)
        scan(ctx, region.start, end_of(region), flags=int(WP_SCAN), **asked)
        ctx.expect("whether the page is protected", ctx.is_protected(region.start), True)
        page_out(ctx, region)
        expect_read(ctx, region.start, WRITTEN)

    case(
        f"PAGEMAP_SCAN.ok.keeps-written-{name}",
        summary="A page with an old copy in swap, written and then protected by a scan"
        f" ({name} reported), keeps the new content through reclaim",
        origin="fs/proc/task_mmu.c: make_uffd_wp_pte",
        memory=MEMORY,
        features=FEATURES,
        needs=[needs_swap()],
    )(run)


for _name, _asked in QUESTIONS:
    if "max_pages" not in _asked:
        _add_scan(_name, _asked)


# COPY from a source that is not mapped yet, checked small page by small page


@case(
    "UFFDIO_COPY.ok.cold-numbered",
    origin="mm/userfaultfd.c: copy_folio_from_user; mm/memory.c: copy_user_large_folio",
    features=missing_features,
)
def cold_numbered(ctx: Context) -> None:
    """COPY puts each small page of an unmapped source in its place, aligned or not."""
    for skew in (0, SKEW):
        region = ctx.make(2)
        ctx.register(region, MISSING)
        start = numbered_file(ctx, region.length + SMALL_PAGE)
        answer = ctx.ioctl("COPY", region.start, start + skew, region.length)
        ctx.expect("errno and .copy", (answer.errno, answer.result), (0, region.length))
        steps = range(0, region.length, SMALL_PAGE)
        seen = [int.from_bytes(region.read(at, 8), "little") for at in steps]
        wanted = [0 if skew else index + 1 for index in range(len(seen))]
        ctx.expect("whether the first words of the small pages are right", seen == wanted, True)
        at = SMALL_PAGE - skew
        if skew:
            last = [int.from_bytes(region.read(each + at, 8), "little") for each in steps[:-1]]
            wanted = [index + 2 for index in range(len(last))]
            ctx.expect(
                "whether the words from the source's page starts are right", last == wanted, True
            )
        ctx.release()


# Other missing pages


@case(
    "fault.missing.freed",
    origin="mm/rmap.c: try_to_unmap_one, of what MADV_FREE has made clean",
    memory=("anon",),
    features=lambda memory: missing_features(memory) | wp_features(memory),
    needs=[needs_swap()],
)
def freed(ctx: Context) -> None:
    """A page that reclaim drops after MADV_FREE, protected or not, is missing."""
    in_one_place(ctx)
    region = ctx.make(2)
    region.advise_thp(False)
    region.fill(DATA)
    ctx.register(region, MISSING | WP)
    ctx.uffd.writeprotect(region.start, ctx.page)
    region.madvise(mmap.MADV_FREE)
    page_out(ctx, region)
    for at in (region.start, region.start + ctx.page):
        ctx.expect_pagemap(at, HOLE)
        writing = ctx.start(ctx.write, at, bytes([WRITTEN]))
        expect_fault(ctx, writing, MISSING_WRITE, at)
        ctx.uffd.copy(at, bytes([DATA]) * ctx.page)
        ctx.expect("the write", writing.result(), None)
        ctx.expect_quiet()


@case("fault.missing.execute", origin="arch/x86/mm/fault.c", features=missing_features)
def execute(ctx: Context) -> None:
    """Executing code in a missing page sends the message of a read."""
    region = ctx.make(1)
    ctx.register(region, MISSING)
    _memory.mprotect(region.start, region.length, mmap.PROT_READ | mmap.PROT_EXEC)
    running = ctx.start(CODE(region.start))
    expect_fault(ctx, running, MISSING_READ, region.start)
    ctx.uffd.copy(region.start, RETURNS_42.ljust(ctx.page, b"\0"))
    ctx.expect("return value of the code", running.result(), 42)
