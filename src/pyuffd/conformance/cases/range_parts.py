"""REGISTER over mappings of different kinds, and UNREGISTER of a part (layer L5).

A range is registered whole or not at all. UNREGISTER of a part does not change the rest.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

from pyuffd import _memory
from pyuffd._abi import CopyMode, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._raw import Answer
from pyuffd.conformance._types import SMALL, missing_features, missing_wp_features
from pyuffd.conformance._wp import (
    DATA,
    PROT_NONE,
    READ_WRITE,
    expect_fault,
    expect_silent_write,
    expect_write_fault,
    reserve,
)
from pyuffd.conformance.cases.errno_register import disk_page, vm_flags
from pyuffd.conformance.cases.masks import KNOWN, wanted
from pyuffd.testing._memory_types import HUGE_PAGE, MEMORY_TYPES, SMALL_PAGE
from pyuffd.testing._need import Need, needs_hugepages

MAP_FIXED, MREMAP_TO = 0x10, 3
MFD_HUGETLB = 4
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
MISSING_READ = 0
ORIGIN = "fs/userfaultfd.c: userfaultfd_register"
PART = HUGE_PAGE  # so that a part can be of any kind


@dataclass(frozen=True)
class Part:
    """What is mapped in one part of a range.

    Attributes:
        name: Its name in the case's id.
        text: Its name in the case's summary.
        make: Maps PART bytes at an address.
        like: The memory type with the same register modes, or "" if it cannot be registered.
        code: The errno if it cannot be registered.
        needs: The needs of `make`.
    """

    name: str
    text: str
    make: Callable[[Context, int], None]
    like: str
    code: int = errno.EINVAL
    needs: tuple[Need, ...] = ()


def _map(start: int, prot: int, flags: int, fd: int = -1) -> None:
    _memory.mmap(PART, prot, flags | MAP_FIXED, fd, 0, start)


def _anonymous(prot: int) -> Callable[[Context, int], None]:
    return lambda _, start: _map(start, prot, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _memfd(flags: int, *, huge: bool = False) -> Callable[[Context, int], None]:
    def make(_: Context, start: int) -> None:
        fd = _memory.memfd_create("pyuffd-part", MFD_HUGETLB if huge else 0)
        try:
            os.ftruncate(fd, PART)
            _map(start, READ_WRITE, flags, fd)
        finally:
            os.close(fd)

    return make


def _read_only_file(_: Context, start: int) -> None:
    fd = _memory.memfd_create("pyuffd-part", 0)
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, PART)
        _map(start, mmap.PROT_READ, mmap.MAP_SHARED, reader)
    finally:
        os.close(reader)
        os.close(fd)


def _disk_file(ctx: Context, start: int) -> None:
    page = disk_page(ctx, mmap.MAP_PRIVATE)
    _memory.munmap(start, PART)
    _memory.mremap(page, SMALL_PAGE, SMALL_PAGE, MREMAP_TO, start)
    _map_rest(start)


def _map_rest(start: int) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    _memory.mmap(PART - SMALL_PAGE, READ_WRITE, flags, -1, 0, start + SMALL_PAGE)


_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
HUGE = (needs_hugepages(2),)
PARTS = (
    Part("anon", "anonymous memory", _anonymous(READ_WRITE), "anon"),
    Part("read-only", "read-only anonymous memory", _anonymous(mmap.PROT_READ), "anon"),
    Part("no-access", "memory without access (PROT_NONE)", _anonymous(PROT_NONE), "anon"),
    Part("shmem", "a shared mapping of a memfd", _memfd(mmap.MAP_SHARED), "shmem"),
    Part(
        "shmem-private", "a private mapping of a memfd", _memfd(mmap.MAP_PRIVATE), "shmem-private"
    ),
    Part("hugetlb", "huge pages", _memfd(mmap.MAP_SHARED, huge=True), "hugetlb", needs=HUGE),
    Part("disk-file", "a file on a disk file system", _disk_file, ""),
    Part(
        "read-only-file",
        "a shared mapping of a file opened read-only",
        _read_only_file,
        "",
        errno.EPERM,
    ),
)


def _range(ctx: Context, part: Part) -> tuple[int, int]:
    """Map a part of the case's memory type and then another part; return both addresses."""
    first = reserve(ctx, 2 * PART, PART)
    own = next((one for one in PARTS if one.name == ctx.memory.name), None)
    if own is not None:
        own.make(ctx, first)
    else:
        _memfd(mmap.MAP_PRIVATE, huge=True)(ctx, first)
    part.make(ctx, first + PART)
    return first, first + PART


def _expect_mask(ctx: Context, answer: Answer, part: Part, mode: RegisterMode) -> bool:
    """Check a REGISTER of both parts; return whether it had to succeed."""
    masks = [wanted(ctx.memory, mode, ctx.offered)]
    masks.append(wanted(MEMORY_TYPES[part.like], mode, ctx.offered) if part.like else None)
    if None in masks:
        # The errno is that of the first part that cannot be registered.
        code = errno.EINVAL if masks[0] is None else part.code
        ctx.expect(f"errno in mode {mode!r}", answer.errno, code)
        return False
    ctx.expect(f"errno in mode {mode!r}", answer.errno, 0)
    both = int(masks[0] or 0) & int(masks[1] or 0)
    ctx.expect(f"known ioctls in mode {mode!r}", hex(answer.words[3] & int(KNOWN)), hex(both))
    return True


def _flags(mode: RegisterMode) -> set[str]:
    names = {MISSING: "um", WP: "uw", MINOR: "ui"}
    return {name for bit, name in names.items() if bit in mode}


def _add_part(part: Part) -> None:
    def run(ctx: Context) -> None:
        starts = _range(ctx, part)
        ctx.open()
        for bits in range(1, 8):
            mode = RegisterMode(bits)
            answer = ctx.ioctl("REGISTER", starts[0], 2 * PART, mode)
            is_registered = _expect_mask(ctx, answer, part, mode)
            for name, start in zip(("first", "second"), starts, strict=True):
                flags = _flags(mode) if is_registered else set()
                ctx.expect(f"VmFlags of the {name} part, {mode!r}", vm_flags(start), flags)
            if is_registered:
                answer = ctx.ioctl("UNREGISTER", starts[0], 2 * PART)
                ctx.expect("errno of UNREGISTER", answer.errno, 0)

    case(
        f"UFFDIO_REGISTER.ok.then-{part.name}"
        if part.like
        else f"UFFDIO_REGISTER.{errno.errorcode[part.code]}.then-{part.name}",
        summary=f"A mapping and then {part.text} are registered only in modes that both support",
        origin=ORIGIN,
        needs=part.needs,
    )(run)


for _part in PARTS:
    _add_part(_part)


@case("UFFDIO_REGISTER.ok.across-a-gap", origin=ORIGIN, features=missing_features)
def across_gap(ctx: Context) -> None:
    """A range with a gap is registered and unregistered on both sides of the gap."""
    region = ctx.make(3)
    first, gap, last = (region.start + index * ctx.page for index in range(3))
    _memory.munmap(gap, ctx.page)
    hold = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    ctx.callback(_memory.mmap, ctx.page, PROT_NONE, hold, -1, 0, gap)
    ctx.register(region, MISSING)
    for at in (first, last):
        reading = ctx.start(ctx.read, at)
        expect_fault(ctx, reading, MISSING_READ, at)
        ctx.uffd.copy(at, bytes([DATA]) * ctx.page)
        ctx.expect("byte", reading.result(), bytes([DATA]))
    ctx.uffd.unregister(region)
    for at in (first, last):
        ctx.expect("VmFlags", vm_flags(at), set())


@case("UFFDIO_REGISTER.ok.between-gaps", origin=ORIGIN, features=missing_features)
def between_gaps(ctx: Context) -> None:
    """A range with a gap at its start and one at its end is registered between them."""
    region = ctx.make(4)
    pages = [region.start + index * ctx.page for index in range(4)]
    hold = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    for at in (pages[0], pages[3]):
        _memory.munmap(at, ctx.page)
        ctx.callback(_memory.mmap, ctx.page, PROT_NONE, hold, -1, 0, at)
    ctx.register(region, MISSING)
    ctx.expect("VmFlags", [vm_flags(at) for at in pages[1:3]], [{"um"}] * 2)
    for at in pages[1:3]:
        reading = ctx.start(ctx.read, at)
        expect_fault(ctx, reading, MISSING_READ, at)
        ctx.uffd.copy(at, bytes([DATA]) * ctx.page)
        ctx.expect("byte", reading.result(), bytes([DATA]))
    ctx.uffd.unregister(region)
    ctx.expect("VmFlags", [vm_flags(at) for at in pages[1:3]], [set()] * 2)


@case("UFFDIO_REGISTER.ok.fills-the-gap", origin=ORIGIN, features=missing_features)
def fills_gap(ctx: Context) -> None:
    """A range is registered whole if its ends are registered already."""
    region = ctx.make(5)
    pages = [region.start + index * ctx.page for index in range(5)]
    ctx.open()
    for at in (pages[1], pages[3]):
        ctx.uffd.register(at, ctx.page, mode=MISSING)
    ctx.uffd.register(pages[1], 3 * ctx.page, mode=MISSING)
    ctx.expect("VmFlags", [vm_flags(at) for at in pages], [set(), *[{"um"}] * 3, set()])
    for at in pages[1:4]:
        reading = ctx.start(ctx.read, at)
        expect_fault(ctx, reading, MISSING_READ, at)
        ctx.uffd.copy(at, bytes([DATA]) * ctx.page)
        ctx.expect("byte", reading.result(), bytes([DATA]))
    for at in (pages[0], pages[4]):
        ctx.expect("byte of a neighbour", ctx.silently(ctx.read, at), b"\0")


def mappings(start: int, length: int) -> int:
    """Return how many mappings a range has."""
    found = 0
    with open("/proc/self/maps") as lines:
        for line in lines:
            first, end = (int(part, 16) for part in line.split()[0].split("-"))
            found += first < start + length and end > start
    return found


def _add_joins(name: str, *, closes: bool) -> None:
    def run(ctx: Context) -> None:
        # Write first, so that the parts share an anon_vma and can be merged again.
        region = ctx.make(3)
        region.fill(1)
        before = mappings(region.start, region.length)
        for mode in (MISSING, WP, MISSING | WP):
            uffd = ctx.open()
            uffd.register(region.start + ctx.page, ctx.page, mode=mode)
            seen = mappings(region.start, region.length)
            ctx.expect(f"mappings, the middle registered {mode!r}", seen, before + 2)
            if closes:
                uffd.close()
            else:
                uffd.unregister(region.start + ctx.page, ctx.page)
            seen = mappings(region.start, region.length)
            ctx.expect("mappings afterwards", seen, before)

    case(
        f"{name}.ok.joins-mappings",
        summary="A part that is no longer registered is merged with its neighbours again",
        origin="mm/userfaultfd.c: userfaultfd_clear_vma",
        memory=SMALL,
        features=missing_wp_features,
    )(run)


_add_joins("UFFDIO_UNREGISTER", closes=False)
_add_joins("close", closes=True)


@case(
    "UFFDIO_REGISTER.EINVAL.then-part-of-a-huge-page",
    origin=ORIGIN,
    memory=("hugetlb", "hugetlb-private"),
    features=missing_features,
)
def part_of_huge(ctx: Context) -> None:
    """A range that ends inside a huge page of its second mapping is not registered at all."""
    first, second = _range(ctx, next(part for part in PARTS if part.name == "anon"))
    # Swap the parts: anonymous memory and then huge pages.
    _memory.mmap(PART, READ_WRITE, _ANONYMOUS | MAP_FIXED, -1, 0, first)
    flags = mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE
    _memfd(flags, huge=True)(ctx, second)
    ctx.open()
    answer = ctx.ioctl("REGISTER", first, PART + SMALL_PAGE, MISSING)
    ctx.expect("errno of REGISTER", answer.errno, errno.EINVAL)
    ctx.expect("VmFlags", (vm_flags(first), vm_flags(second)), (set(), set()))
    answer = ctx.ioctl("REGISTER", first, 2 * PART, MISSING)
    ctx.expect("errno of both parts", answer.errno, 0)


# UNREGISTER of a part

PAGES = 5
UNREGISTERED = (
    ("first", "the first page", range(1)),
    ("middle", "a page in the middle", range(2, 3)),
    ("last", "the last page", range(4, 5)),
    ("most", "all but the ends", range(1, 4)),
)


def _add_unregistered(name: str, text: str, part: range) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(PAGES)
        ctx.register(region, MISSING | WP)
        pages = [region.start + index * ctx.page for index in range(PAGES)]
        # Protected pages and holes alternate.
        for at in pages[::2]:
            ctx.uffd.copy(at, bytes([DATA]) * ctx.page, mode=CopyMode.WP)
        length = len(part) * ctx.page
        answer = ctx.ioctl("UNREGISTER", pages[part[0]], length)
        ctx.expect("errno of UNREGISTER", answer.errno, 0)
        rest = [index for index in range(PAGES) if index not in part]
        seen = [index for index in rest if vm_flags(pages[index]) != {"um", "uw"}]
        ctx.expect("other pages whose VmFlags changed", seen, [])
        bits = [index for index in rest if index % 2 == 0 and not ctx.is_protected(pages[index])]
        ctx.expect("other pages that lost their protection", bits, [])
        for index in part:
            ctx.expect("VmFlags of an unregistered page", vm_flags(pages[index]), set())
            ctx.expect(
                "whether an unregistered page is protected", ctx.is_protected(pages[index]), False
            )
            expect_silent_write(ctx, pages[index])
        for index in rest:
            _expect_served(ctx, pages[index], is_present=index % 2 == 0)

    case(
        f"UFFDIO_UNREGISTER.ok.part-{name}",
        summary=f"UNREGISTER of {text} of five keeps the modes, protection and holes of the rest",
        origin="fs/userfaultfd.c: userfaultfd_unregister",
        features=missing_wp_features,
    )(run)


def _expect_served(ctx: Context, at: int, *, is_present: bool) -> None:
    if is_present:
        expect_write_fault(ctx, at)
        return
    reading = ctx.start(ctx.read, at)
    expect_fault(ctx, reading, MISSING_READ, at)
    ctx.uffd.copy(at, bytes([DATA]) * ctx.page)
    ctx.expect("byte", reading.result(), bytes([DATA]))


for _unregistered in UNREGISTERED:
    _add_unregistered(*_unregistered)
