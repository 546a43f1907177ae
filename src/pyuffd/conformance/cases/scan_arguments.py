"""PAGEMAP_SCAN: read-only arguments, special mappings, and soft-dirty and huge pages (layer L5)."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from pathlib import Path

from pyuffd import _memory
from pyuffd._abi import PageCategory
from pyuffd._vmas import overlapping
from pyuffd.conformance import _thp
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._thp import MADV_COLLAPSE
from pyuffd.conformance._types import ANON, ANY, SMALL
from pyuffd.conformance.cases.pagemap_scan import (
    FEATURES,
    PAGEMAP_SCAN,
    PRESENT,
    SIZE,
    WP_SCAN,
    WRITTEN,
    end_of,
    scan,
    written,
)
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import needs_thp

SYS_IOCTL = 16
UNKNOWN_IOCTL = 0xC0606611
ORIGIN = "fs/proc/task_mmu.c: do_pagemap_scan"
SOFT_DIRTY_BIT = 55
PAGES = 4


def _pagemap(ctx: Context, pid: int | str = "self") -> int:
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    ctx.callback(os.close, fd)
    return fd


def _argument(start: int, end: int, vec: int, room: int, flags: int = 0) -> bytes:
    words = (SIZE, flags, start, end, 0, vec, room, 0, 0, int(WRITTEN), 0, int(WRITTEN))
    return struct.pack("=12Q", *words)


@case("PAGEMAP_SCAN.EFAULT.argument", origin=ORIGIN, memory=ANY, features=FEATURES)
def argument(ctx: Context) -> None:
    """An argument outside user space is EFAULT."""
    seen = syscall(SYS_IOCTL, _pagemap(ctx), PAGEMAP_SCAN, 1 << 63)
    ctx.expect("result of PAGEMAP_SCAN", seen, -errno.EFAULT)


@case("PAGEMAP_SCAN.EFAULT.argument-read-only", origin=ORIGIN, memory=ANY, features=FEATURES)
def argument_read_only(ctx: Context) -> None:
    """If walk_end cannot be written, the call is EFAULT although the ranges are written."""
    region = written(ctx, PAGES)
    page, vector = ctx.make(1, "anon"), ctx.make(1, "anon")
    page.write(0, _argument(region.start, end_of(region), vector.start, 1))
    _memory.mprotect(page.start, SMALL_PAGE, mmap.PROT_READ)
    seen = syscall(SYS_IOCTL, _pagemap(ctx), PAGEMAP_SCAN, page.start)
    ctx.expect("result of PAGEMAP_SCAN", seen, -errno.EFAULT)
    found = struct.unpack("=3Q", vector.read(0, 24))
    ctx.expect("the range", found, (region.start, end_of(region), int(WRITTEN)))


@case("PAGEMAP_SCAN.EFAULT.vec-read-only", origin=ORIGIN, memory=ANY, features=FEATURES)
def vec_read_only(ctx: Context) -> None:
    """A read-only vector is EFAULT."""
    region = written(ctx, PAGES)
    vector = ctx.make(1, "anon")
    vector.fill(0)
    _memory.mprotect(vector.start, SMALL_PAGE, mmap.PROT_READ)
    result = scan(ctx, region.start, end_of(region), vec=vector.start, vec_len=PAGES, room=0)
    ctx.expect("errno of the scan", result.errno, errno.EFAULT)
    ctx.expect("pages written", scan(ctx, region.start, end_of(region)).pages, PAGES)


@case(
    "PAGEMAP_SCAN.ESRCH.owner-gone",
    origin=ORIGIN,
    memory=ANY,
    features=FEATURES,
    variants=[
        Variant("told", "ESRCH"),
        Variant("empty", "0 ranges, as if nothing were mapped; no feature bit tells"),
    ],
)
def owner_gone(ctx: Context) -> None:
    """A scan of a process that has ended reports nothing."""
    region = written(ctx, PAGES)
    child = ctx.fork_only()
    fd = _pagemap(ctx, child.pid)
    page = ctx.make(1, "anon")
    # If one of these scans leaked a reference, the address space would outlive its process.
    for end, seen in ((end_of(region), 0), (0, -errno.EFAULT)):
        page.write(0, _argument(region.start, end, 0, 0))
        result = syscall(SYS_IOCTL, fd, PAGEMAP_SCAN, page.start)
        ctx.expect("result while the process lives", min(result, 0), seen)
    child.close()
    page.write(0, _argument(region.start, end_of(region), 0, 0))
    result = syscall(SYS_IOCTL, fd, PAGEMAP_SCAN, page.start)
    ctx.expect_variant("result afterwards", result, told=-errno.ESRCH, empty=0)


@case("PAGEMAP_SCAN.EINVAL.ioctl-unknown", origin=ORIGIN, memory=ANY, features=FEATURES)
def unknown(ctx: Context) -> None:
    """/proc/PID/pagemap refuses every request but PAGEMAP_SCAN."""
    seen = syscall(SYS_IOCTL, _pagemap(ctx), UNKNOWN_IOCTL, 0)
    ctx.expect("result of the ioctl", seen, -errno.EINVAL)


def special_mapping(ctx: Context, name: str) -> tuple[int, int]:
    """Return the bounds of a mapping that the kernel makes in every process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f"[{name}]"):
            start, _, end = line.partition(" ")[0].partition("-")
            return int(start, 16), int(end, 16)
    ctx.lack(name, f"this kernel has no [{name}]")


@case(
    "PAGEMAP_SCAN.ok.vvar",
    origin="fs/proc/task_mmu.c: VM_PFNMAP",
    memory=ANY,
    features=FEATURES,
    variants=(
        Variant(
            "left-out", "[vvar] is a mapping of page frames (pf in smaps), like that of a device"
        ),
        Variant("reported", "[vvar] is a mapping of pages (mm in smaps), which are reported"),
    ),
)
def vvar(ctx: Context) -> None:
    """Pages of [vvar] are reported only if it is a mapping of pages."""
    start, end = special_mapping(ctx, "vvar")
    time.monotonic()  # reads the first page of [vvar], so that it is present
    vma = next(overlapping(start, end, details=True))
    seen = scan(ctx, start, end, mask=int(PRESENT), returned=int(PRESENT))
    ctx.expect("errno of the scan", seen.errno, 0)
    first = seen.ranges[0][0] - start if seen.ranges else None
    looks = (sorted(vma.flags & {"pf", "mm"}), first)
    ctx.expect_variant(
        "VmFlags and first page", looks, left_out=(["pf"], None), reported=(["mm"], 0)
    )


# clear_refs does not support hugetlb.
@case("PAGEMAP_SCAN.ok.soft-dirty", origin="fs/proc/task_mmu.c", memory=SMALL, features=FEATURES)
def soft_dirty(ctx: Context) -> None:
    """A page of a new mapping, or written since clear_refs, is SOFT_DIRTY; a read one is not."""
    region = ctx.make(2)
    region.fill(1)
    if not ctx.bits(region.start) & (1 << SOFT_DIRTY_BIT):
        ctx.lack("soft-dirty", "the kernel has no CONFIG_MEM_SOFT_DIRTY")
    category = int(PageCategory.SOFT_DIRTY)

    def pages() -> list[int]:
        seen = scan(ctx, region.start, end_of(region), mask=category, returned=category)
        return [(start - region.start) // ctx.page for start, *_ in seen.ranges]

    ctx.expect("pages of a new mapping", pages(), [0])
    Path("/proc/self/clear_refs").write_text("4")
    ctx.expect("pages after clear_refs", pages(), [])
    ctx.read(region.start)
    ctx.expect("pages after a read", pages(), [])
    ctx.write(region.start + ctx.page, b"\1")
    ctx.expect("pages after a write", pages(), [1])


@case(
    "PAGEMAP_SCAN.ok.soft-dirty-huge",
    origin="fs/proc/task_mmu.c: pagemap_thp_category, clear_soft_dirty_pmd",
    memory=ANON,
    features=FEATURES,
    needs=[needs_thp()],
)
def soft_dirty_huge(ctx: Context) -> None:
    """A transparent huge page is SOFT_DIRTY as a whole if a part was written since clear_refs."""
    start = huge_area(ctx, 1)
    if not ctx.bits(start) & (1 << SOFT_DIRTY_BIT):
        ctx.lack("soft-dirty", "the kernel has no CONFIG_MEM_SOFT_DIRTY")
    category = int(PageCategory.SOFT_DIRTY)

    def pages() -> int:
        asked = {"mask": category, "returned": category}
        return scan(ctx, start, start + HUGE_PAGE, **asked).pages

    everything = HUGE_PAGE // SMALL_PAGE
    ctx.expect("pages of a new mapping", pages(), everything)
    Path("/proc/self/clear_refs").write_text("4")
    ctx.expect("pages after clear_refs", pages(), 0)
    ctx.read(start)
    ctx.expect("pages after a read", pages(), 0)
    ctx.write(start + SMALL_PAGE, b"\2")
    ctx.expect("bytes mapped huge", _thp.mapped_huge(start), HUGE_PAGE)
    ctx.expect("pages after a write", pages(), everything)


@case(
    "PAGEMAP_SCAN.ok.huge-page-of-a-file",
    origin="fs/proc/task_mmu.c: pagemap_thp_category",
    memory=("shmem",),
    features=FEATURES,
    needs=[needs_thp()],
)
def huge_file(ctx: Context) -> None:
    """A transparent huge page of shared memory is FILE, PRESENT and HUGE, in one range."""
    region = ctx.make(2 * HUGE_PAGE // SMALL_PAGE)
    start = -(-region.start // HUGE_PAGE) * HUGE_PAGE
    region.fill(1)
    try:
        _memory.madvise(start, HUGE_PAGE, MADV_COLLAPSE)
    except OSError as error:
        ctx.lack("collapse", f"MADV_COLLAPSE: {error.strerror}")
    if not _thp.mapped_huge(start):
        ctx.lack("THP", "the kernel gave no transparent huge page")
    wanted = int(PageCategory.FILE | PRESENT | PageCategory.HUGE)
    seen = scan(ctx, start, start + HUGE_PAGE, mask=int(PageCategory.FILE), returned=wanted)
    ctx.expect("ranges of the scan", seen.ranges, ((start, start + HUGE_PAGE, wanted),))


@case(
    "PAGEMAP_SCAN.ok.hugetlb-part",
    origin="fs/proc/task_mmu.c: pagemap_scan_hugetlb_entry",
    memory=("hugetlb", "hugetlb-private"),
    features=FEATURES,
)
def hugetlb_part(ctx: Context) -> None:
    """With max_pages inside a huge page, a scan that protects stops before that page."""
    region = written(ctx, 2)
    whole = ctx.page // SMALL_PAGE
    seen = scan(ctx, region.start, end_of(region), flags=int(WP_SCAN), max_pages=whole + whole // 2)
    ctx.expect("errno and pages", (seen.errno, seen.pages), (0, whole))
    ctx.expect("pages walked", (seen.walk_end - region.start) // SMALL_PAGE, whole)
    left = scan(ctx, region.start, end_of(region))
    wanted = ((region.start + ctx.page, end_of(region), int(WRITTEN)),)
    ctx.expect("ranges still written", left.ranges, wanted)
