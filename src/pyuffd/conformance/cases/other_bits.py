"""Interfaces that change other bits of entries and mappings: clear_refs, mprotect and others (L5).

Writing /proc/PID/clear_refs, and mprotect(2), madvise(2) and mlock(2) of a part, must not change
protection and registration. Write-protecting must not change the soft-dirty bits.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._thp import mapped_huge
from pyuffd.conformance._types import (
    ANON,
    SMALL,
    missing_features,
    wp_features,
)
from pyuffd.conformance._wp import (
    DATA,
    MARKER,
    MISSING_READ,
    PUNCH_HOLE,
    READ_WRITE,
    UNPROTECT,
    expect_fault,
    expect_silent_write,
    expect_write_fault,
    in_one_place,
    page_out,
    present,
    protected,
    reserve,
)
from pyuffd.conformance.cases.errno_register import vm_flags
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.conformance.cases.range_parts import mappings
from pyuffd.conformance.cases.two_descriptors import neighbours_of_two, serves
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import Need, needs_privilege, needs_swap, needs_thp

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
SYS_BRK, SYS_MLOCK2, SYS_MUNLOCK = 12, 325, 150
MLOCK_ONFAULT, MAP_FIXED = 1, 0x10
SOFT_DIRTY = 1 << 55
CLEAR_REFS = Path("/proc/self/clear_refs")
REFERENCED, ALL_SOFT_DIRTY = "1", "4"
CLEARS = "fs/proc/task_mmu.c: clear_refs_pte_range, clear_soft_dirty"
MERGES = "mm/vma.c: is_mergeable_vma, is_mergeable_vm_userfaultfd_ctx"


# clear_refs


def clear_refs() -> None:
    """Clear the referenced and soft-dirty bits of all pages."""
    for kind in (REFERENCED, ALL_SOFT_DIRTY):
        CLEAR_REFS.write_text(kind)


@case("clear_refs.ok.keeps-protection", origin=CLEARS, features=wp_features)
def keeps_protection(ctx: Context) -> None:
    """clear_refs does not change protected pages and markers."""
    region = protected(ctx, 2)
    second = region.start + ctx.page
    if not ctx.memory.is_anon:
        region.madvise(mmap.MADV_DONTNEED, ctx.page, ctx.page)
    clear_refs()
    ctx.expect_pagemap(region.start, present(ctx))
    ctx.expect_pagemap(second, present(ctx) if ctx.memory.is_anon else MARKER[ctx.memory.name])
    for at in (region.start, second):
        expect_write_fault(ctx, at)
        expect_silent_write(ctx, at)


@case(
    "clear_refs.ok.keeps-protection-in-swap",
    origin=CLEARS,
    memory=SMALL,
    features=wp_features,
    needs=[needs_swap()],
)
def keeps_protection_in_swap(ctx: Context) -> None:
    """clear_refs does not change the protection of pages in swap."""
    in_one_place(ctx)
    region = protected(ctx)
    page_out(ctx, region)
    clear_refs()
    ctx.expect("whether the page is protected", ctx.is_protected(region.start), True)
    expect_write_fault(ctx, region.start)


@case(
    "clear_refs.ok.keeps-protection-huge",
    origin="fs/proc/task_mmu.c: clear_soft_dirty_pmd",
    memory=ANON,
    features=wp_features,
    needs=[needs_thp()],
)
def keeps_protection_huge(ctx: Context) -> None:
    """clear_refs does not change a transparent huge page that is protected whole."""
    start = huge_area(ctx, 1)
    ctx.open().register(start, HUGE_PAGE, mode=WP)
    ctx.uffd.writeprotect(start, HUGE_PAGE)
    clear_refs()
    ctx.expect("bytes mapped huge", mapped_huge(start), HUGE_PAGE)
    at = start + 5 * SMALL_PAGE
    ctx.expect("whether the page is protected", ctx.is_protected(at), True)
    expect_write_fault(ctx, at)


def _is_soft_dirty(ctx: Context, at: int) -> bool:
    return bool(int(ctx.bits(at)) & SOFT_DIRTY)


def _need_soft_dirty(ctx: Context, at: int) -> None:
    if not _is_soft_dirty(ctx, at):
        ctx.lack("soft-dirty", "the kernel has no CONFIG_MEM_SOFT_DIRTY")


@case(
    "UFFDIO_WRITEPROTECT.ok.soft-dirty",
    origin="mm/mprotect.c: can_change_pte_writable",
    memory=SMALL,
    features=wp_features,
)
def writeprotect_soft_dirty(ctx: Context) -> None:
    """Protecting and unprotecting a page does not make it soft-dirty; the next write does."""
    region = ctx.make(1)
    region.fill(DATA)
    ctx.register(region, WP)
    _need_soft_dirty(ctx, region.start)
    CLEAR_REFS.write_text(ALL_SOFT_DIRTY)
    ctx.expect("soft-dirty after clear_refs", _is_soft_dirty(ctx, region.start), False)
    ctx.uffd.writeprotect(region)
    ctx.expect("soft-dirty after protecting", _is_soft_dirty(ctx, region.start), False)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect("soft-dirty after unprotecting", _is_soft_dirty(ctx, region.start), False)
    expect_silent_write(ctx, region.start)
    ctx.expect("soft-dirty after a write", _is_soft_dirty(ctx, region.start), True)


@case(
    "UFFDIO_COPY.ok.soft-dirty",
    origin="mm/userfaultfd.c: mfill_atomic_install_pte, pte_mkdirty",
    memory=SMALL,
    features=missing_features,
)
def copy_soft_dirty(ctx: Context) -> None:
    """A page that COPY fills is soft-dirty."""
    region = ctx.make(2)
    ctx.register(region, MISSING)
    ctx.uffd.copy(region.start, bytes([DATA]) * ctx.page)
    _need_soft_dirty(ctx, region.start)
    CLEAR_REFS.write_text(ALL_SOFT_DIRTY)
    ctx.uffd.copy(region.start + ctx.page, bytes([DATA]) * ctx.page)
    seen = [_is_soft_dirty(ctx, region.start + at) for at in (0, ctx.page)]
    ctx.expect("soft-dirty, pages copied before and after clear_refs", seen, [False, True])


# Mappings that are split and merged again


@dataclass(frozen=True)
class Split:
    """A call that splits a mapping, and one that undoes it."""

    name: str
    call: Callable[[int, int], object]
    undo: Callable[[int, int], object]
    needs: tuple[Need, ...] = ()


def _advice(advice: int) -> Callable[[int, int], object]:
    return lambda start, length: _memory.madvise(start, length, advice)


def _protection(protection: int) -> Callable[[int, int], object]:
    return lambda start, length: _memory.mprotect(start, length, protection)


SPLITS = (
    Split("mprotect", _protection(mmap.PROT_READ), _protection(READ_WRITE)),
    Split("madvise", _advice(mmap.MADV_DONTFORK), _advice(mmap.MADV_DOFORK)),
    Split(
        "mlock",
        lambda start, length: syscall(SYS_MLOCK2, start, length, MLOCK_ONFAULT),
        lambda start, length: syscall(SYS_MUNLOCK, start, length),
        (needs_privilege("CAP_IPC_LOCK"),),
    ),
)


def _add_split(split: Split) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(3)
        region.fill(1)  # so that the parts share an anon_vma and can be merged again
        region.madvise(mmap.MADV_DONTNEED)
        if region.fd is not None:
            _memory.fallocate(region.fd, PUNCH_HOLE, 0, region.length)
        ctx.register(region, MISSING)
        pages = [region.start + index * ctx.page for index in range(3)]
        before = mappings(region.start, region.length)
        split.call(pages[1], ctx.page)
        ctx.expect("mappings after the split", mappings(region.start, region.length), before + 2)
        for at in pages:
            ctx.expect("VmFlags", vm_flags(at), {"um"})
            reading = ctx.start(ctx.read, at)
            expect_fault(ctx, reading, MISSING_READ, at)
            ctx.uffd.copy(at, bytes([DATA]) * ctx.page)
            ctx.expect("the byte", reading.result(), bytes([DATA]))
        split.undo(pages[1], ctx.page)
        ctx.expect("mappings after the undo", mappings(region.start, region.length), before)

    case(
        f"{split.name}.ok.part-of-registered",
        summary=f"All parts of a mapping that {split.name} splits stay registered, and merge again",
        origin=MERGES,
        memory=SMALL,
        features=missing_features,
        needs=split.needs,
    )(run)


for _split in SPLITS:
    _add_split(_split)


@case(
    "mprotect.ok.neighbours-of-two-descriptors",
    origin=MERGES,
    memory=SMALL,
    features=missing_features,
)
def two_descriptors(ctx: Context) -> None:
    """mprotect(2) does not merge neighbouring mappings of two userfaultfds."""
    first, second, pages = neighbours_of_two(ctx)
    _memory.mprotect(pages[1], ctx.page, mmap.PROT_READ)
    for protection in (mmap.PROT_READ, READ_WRITE):
        _memory.mprotect(pages[0], 4 * ctx.page, protection)
        ctx.expect("mappings", mappings(pages[0], 4 * ctx.page), 2)
    for index, at in enumerate(pages):
        own, other = (first, second) if index < 2 else (second, first)
        serves(ctx, own, other, at, DATA)


@case("mmap.ok.beside-registered", origin=MERGES, features=missing_features)
def beside(ctx: Context) -> None:
    """New mappings right before and after a registered mapping are not registered."""
    start = reserve(ctx, 3 * ctx.page)
    region = ctx.make(3)
    fd = -1 if region.fd is None else region.fd
    flags = MAP_FIXED | (mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE)
    flags |= mmap.MAP_ANONYMOUS if fd < 0 else 0
    for index in (1, 2, 0):
        at = start + index * ctx.page
        offset = 0 if fd < 0 else index * ctx.page
        _memory.mmap(ctx.page, READ_WRITE, flags, fd, offset, at)
        if index == 1:
            ctx.open().register(at, ctx.page, mode=MISSING)
    seen = [vm_flags(start + index * ctx.page) for index in range(3)]
    ctx.expect("VmFlags", seen, [set(), {"um"}, set()])
    for index in (0, 2):
        seen_byte = ctx.silently(ctx.read, start + index * ctx.page)
        ctx.expect("byte of a neighbour", seen_byte, b"\0")


@case(
    "brk.ok.beside-registered",
    origin="mm/vma.c: do_brk_flags",
    memory=ANON,
    features=Feature.EVENT_FORK,
)
def brk_beside(ctx: Context) -> None:
    """If the heap grows after a registered page, the new page is not registered."""
    ctx.register(ctx.make(1), MISSING)
    child = ctx.fork()
    assert child.uffd is not None
    start = -(-child.syscall(SYS_BRK, 0) // ctx.page) * ctx.page
    ctx.expect("brk, one page up", child.syscall(SYS_BRK, start + ctx.page), start + ctx.page)
    child.uffd.register(start, ctx.page, mode=MISSING)
    ctx.expect("brk, next page", child.syscall(SYS_BRK, start + 2 * ctx.page), start + 2 * ctx.page)
    seen = ctx.silently(child.read, start + ctx.page, 1)
    ctx.expect("byte of the next page", seen, b"\0")
    reading = ctx.start(child.read, start, 1)
    expect_fault(ctx, reading, MISSING_READ, start, child.uffd)
    child.uffd.copy(start, bytes([DATA]) * ctx.page)
    ctx.expect("the byte", reading.result(), bytes([DATA]))
