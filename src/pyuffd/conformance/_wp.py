"""Helpers of the cases about write-protection."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyuffd import _memory
from pyuffd._abi import Feature, PageBit, RegisterMode, WriteprotectMode
from pyuffd._uffd import Userfaultfd
from pyuffd.conformance._context import WAIT_S, Access, Context, show
from pyuffd.conformance._types import HUGETLB, SHMEM, missing_features, wp_features
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType

UNPROTECT = WriteprotectMode(0)
MISSING_WP = RegisterMode.MISSING | RegisterMode.WP
MISSING_READ, MISSING_WRITE, WP_WRITE = 0, 1, 3  # flags of messages
DATA, IN_FILE, WRITTEN = 0x11, 0x22, 0x33  # bytes to tell contents apart
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MAP_FIXED_NOREPLACE = 0x100000
PUNCH_HOLE = 0x1 | 0x2  # FALLOC_FL_KEEP_SIZE
MAP_NORESERVE = 0x4000
PROT_NONE = 0
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
PAGEOUT_TRIES = 4
WRITEBACK_S = 0.001
PFN_MASK = (1 << 55) - 1

# A marker shows the swap bit, except on hugetlb. v5 of the series had a special entry instead, and
# that did not. `wp-series.24.marker-bits` checks which; all other cases accept both.
MARKER = {**dict.fromkeys(("anon", *SHMEM), "-?-W-"), **dict.fromkeys(HUGETLB, "---W-")}
# A hole, as pagemap shows it.
HOLE = "-----"


def marker_features(memory: MemoryType) -> Feature:
    """Return what the kernel must have to write-protect holes of this memory."""
    return wp_features(memory) | (Feature.WP_UNPOPULATED if memory.is_anon else Feature(0))


def missing_marker_features(memory: MemoryType) -> Feature:
    """Return what the kernel must have for missing faults and protected holes together."""
    return missing_features(memory) | marker_features(memory)


def present(ctx: Context, *, protected: bool = True) -> str:
    """Return what pagemap shows of a page that this process has written."""
    return f"P-{'F' if ctx.memory.shared else '-'}{'W' if protected else '-'}?"


def protected(ctx: Context, pages: int = 1) -> Region:
    """Make memory full of DATA and write-protect it; the file of private memory holds IN_FILE."""
    region = ctx.make(pages)
    if not region.shared and region.fd is not None:
        in_page_cache(region, IN_FILE)
    ctx.register(region, RegisterMode.WP)
    region.fill(DATA)
    ctx.uffd.writeprotect(region)
    for index in range(pages):
        ctx.expect_pagemap(region.start + index * ctx.page, present(ctx))
    return region


def in_page_cache(region: Region, value: int) -> None:
    """Fill the file behind a region, through a temporary mapping."""
    assert region.fd is not None
    with Region.file(region.fd, region.length) as view:
        view.fill(value)


def in_one_place(ctx: Context) -> None:
    """Stay on one CPU: new pages in the batch of another CPU cannot be swapped out."""
    before = os.sched_getaffinity(0)
    ctx.callback(os.sched_setaffinity, 0, before)
    os.sched_setaffinity(0, {min(before)})


def page_out(ctx: Context, region: Region) -> None:
    """Swap out every page of a region.

    Raises:
        Lack: the kernel keeps some, as it does with other memory: it lacks swap.
        Mismatch: it keeps some of these, but swaps out other memory.
    """
    if _paged_out(ctx, region):
        return
    with Region.anonymous(region.length) as other:
        other.advise_thp(False)
        other.fill(DATA)
        if not _paged_out(ctx, other):
            ctx.lack("swap", "MADV_PAGEOUT leaves pages where they are")
    # The other memory was swapped out, so this could be too.
    if not _paged_out(ctx, region):
        ctx.fail("pages after MADV_PAGEOUT", "still there", "in swap, as those of other memory")


def _paged_out(ctx: Context, region: Region) -> bool:
    pages = range(region.start, region.start + region.length, ctx.page)
    # A page that was made on another CPU may be in its batch of new pages, which only it drains.
    cpus = os.sched_getaffinity(0)
    try:
        for attempt in range(PAGEOUT_TRIES):
            for cpu in sorted(cpus):
                os.sched_setaffinity(0, {cpu})
                region.pageout()
                if not any(PageBit.PRESENT in ctx.bits(page) for page in pages):
                    return True
            # A page that was read back from swap may still be under writeback.
            time.sleep(WRITEBACK_S * 4**attempt)
    finally:
        os.sched_setaffinity(0, cpus)
    return False


def expect_fault(
    ctx: Context,
    access: Access[Any],
    flags: int,
    address: int,
    uffd: Userfaultfd | None = None,
) -> None:
    """Expect this message from a started access; fail at once if the access returns without one."""
    uffd = uffd or ctx.uffd
    waited: list[Any] = [access, uffd]
    if select.select(waited, [], [], WAIT_S)[0] == [access]:
        ctx.fail("the access", f"over ({show(access.result())}), no message", f"message {flags}")
    ctx.expect_fault(flags, address, uffd)


def expect_write_fault(
    ctx: Context,
    address: int,
    uffd: Userfaultfd | None = None,
    write: Callable[[int, bytes], object] | None = None,
) -> None:
    """Write at `address`: exactly one message 3 arrives, and unprotecting completes the write."""
    uffd = uffd or ctx.uffd
    access = ctx.start(write or ctx.write, address, bytes([WRITTEN]))
    page = address - address % ctx.page
    expect_fault(ctx, access, WP_WRITE, page, uffd)
    uffd.writeprotect(page, ctx.page, mode=UNPROTECT)
    ctx.expect("the write", access.result(), None)
    ctx.expect_quiet(uffd)


def expect_silent_write(ctx: Context, address: int) -> None:
    """Write at `address`: no message arrives."""
    ctx.expect("the write", ctx.silently(ctx.write, address, bytes([WRITTEN])), None)


def expect_read(ctx: Context, address: int, value: int) -> None:
    """Read the page at `address`: no message arrives, and every byte is `value`."""
    seen = ctx.silently(ctx.read, address, ctx.page)
    ctx.expect(f"content of {address:#x}", seen, bytes([value]) * ctx.page)


def reserve(ctx: Context, length: int, alignment: int = 0) -> int:
    """Reserve address space, aligned to the page size or more; return its address."""
    alignment = max(alignment, ctx.page)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    start = _memory.mmap(length + alignment, PROT_NONE, flags)
    ctx.callback(_memory.munmap, start, length + alignment)
    return -(-start // alignment) * alignment


def move_mapping(ctx: Context, region: Region, target: int) -> None:
    """Move the mapping of a region with mremap(2), and keep its old place reserved."""
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    _memory.mremap(region.start, region.length, region.length, flags, target)
    hold = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    _memory.mmap(region.length, PROT_NONE, hold, address=region.start)


def smaps(address: int) -> dict[str, str]:
    """Return the fields of /proc/self/smaps for the mapping at `address`."""
    fields: dict[str, str] = {}
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if " " in name:
            first, _, end = name.partition(" ")[0].partition("-")
            is_inside = int(first, 16) <= address < int(end, 16)
        elif is_inside:
            fields[name] = value.strip()
    return fields


def smaps_bytes(address: int, name: str) -> int:
    """Return a size from /proc/self/smaps."""
    return int(smaps(address)[name].split()[0]) << 10


def mincore(address: int, length: int) -> list[int]:
    """Return for each 4 KiB of a mapping whether it is in memory, by mincore(2)."""
    answer = ctypes.create_string_buffer(length // SMALL_PAGE)
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), answer):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "mincore")
    return [byte & 1 for byte in answer.raw]


def frame(address: int, *, pid: int | None = None) -> int:
    """Return the number of the page frame at `address`; 0 without CAP_SYS_ADMIN."""
    with open(f"/proc/{pid or 'self'}/pagemap", "rb", buffering=0) as pagemap:
        entry = os.pread(pagemap.fileno(), 8, address // SMALL_PAGE * 8)
    return int.from_bytes(entry, "little") & PFN_MASK


_libc = ctypes.CDLL(None, use_errno=True)
