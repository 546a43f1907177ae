"""Huge pages and swap of this machine, and what to do when they are too few."""

from __future__ import annotations

import os
from pathlib import Path

from pyuffd._pages import PAGE_SIZE

POOLS = Path("/sys/kernel/mm/hugepages")
MAP_HUGETLB = 0x40000
MFD_HUGETLB = 0x4
SIZE_SHIFT = 26  # MAP_HUGE_SHIFT and MFD_HUGE_SHIFT: log2 of the page size sits above it


def sizes() -> list[int]:
    """Return the huge page sizes of this machine in bytes, smallest first."""
    prefix, suffix = "hugepages-", "kB"
    return sorted(
        int(pool.name.removeprefix(prefix).removesuffix(suffix)) << 10
        for pool in POOLS.glob(f"{prefix}*{suffix}")
    )


def page_size_for(huge_page_size: int | None) -> int:
    """Return the page size that a constructor's `huge_page_size` asks for, if it exists here."""
    if huge_page_size is None:
        return PAGE_SIZE
    known = sizes()
    if huge_page_size not in known:
        has = ", ".join(map(hex, known)) or "no huge pages"
        raise ValueError(f"huge page size {huge_page_size:#x}: this machine has {has}")
    return huge_page_size


def size_bits(page_size: int) -> int:
    """Return the page size as mmap(2) and memfd_create(2) take it in their flags."""
    return (page_size.bit_length() - 1) << SIZE_SHIFT


def free_pages(page_size: int) -> int:
    """Return how many huge pages of this size are neither used nor promised to a mapping."""
    return _count(page_size, "free_hugepages") - _count(page_size, "resv_hugepages")


def shortage(page_size: int, needed: int, fd: int) -> str:
    """Say how many pages are free of how many, and the command that would provide the rest."""
    total, free = _count(page_size, "nr_hugepages"), free_pages(page_size)
    kib = page_size >> 10
    text = f"{free} of {total} huge pages of {kib} KiB are free, {needed} are needed"
    if free < needed:
        wanted = total + needed - free
        if page_size == _meminfo("Hugepagesize"):
            return f"{text}: `sysctl vm.nr_hugepages={wanted}`"
        return f"{text}: `echo {wanted} > {_pool(page_size)}/nr_hugepages`"
    if fd >= 0:
        mount = os.fstatvfs(fd)
        if mount.f_blocks:
            left = f"{mount.f_bfree} of its {mount.f_blocks} pages left"
            text += f"; the mount has {left}: `mount -o remount,size=...`"
    return text


def swap_problem() -> str:
    """Return why nothing can be swapped out, or an empty string."""
    if _meminfo("SwapFree"):
        return ""
    if total := _meminfo("SwapTotal"):
        return f"all {total >> 20} MiB of swap are used"
    return "this machine has no swap: `swapon FILE` (see mkswap(8)) provides it"


def _pool(page_size: int) -> Path:
    return POOLS / f"hugepages-{page_size >> 10}kB"


def _count(page_size: int, name: str) -> int:
    try:
        return int((_pool(page_size) / name).read_text())
    except FileNotFoundError:
        return 0


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return 0
