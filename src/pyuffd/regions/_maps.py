"""What /proc/self/maps and smaps say about memory that somebody else mapped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pyuffd._pages import PAGE_SIZE

_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ")


@dataclass(frozen=True, slots=True)
class Found:
    """Facts that hold for a whole range; `offset` is that of its first byte in its file."""

    page_size: int
    shared: bool
    writable: bool
    offset: int


@dataclass(slots=True)
class _Vma:
    start: int
    end: int
    permissions: str
    offset: int
    page_size: int = PAGE_SIZE


def describe(address: int, length: int, *, ask_page_size: bool) -> Found:
    """Describe a mapped, readable range of one kind; raise ValueError if it is not that.

    smaps walks page tables, so the page size is asked for only where the caller needs it; nothing
    is faulted in either way.
    """
    vmas = list(_overlapping(address, address + length, "smaps" if ask_page_size else "maps"))
    at = address
    for vma in vmas:
        if vma.start > at:
            break
        at = vma.end
    if at < address + length:
        raise ValueError(f"[{address:#x}, +{length:#x}) is not mapped at {at:#x}")
    first = vmas[0]
    for vma in vmas:
        if "r" not in vma.permissions:
            raise ValueError(f"[{vma.start:#x}, {vma.end:#x}) is not readable")
        if (vma.page_size, vma.permissions[3]) != (first.page_size, first.permissions[3]):
            raise ValueError(
                f"[{address:#x}, +{length:#x}) changes its kind at {vma.start:#x}:"
                " page size, or shared and private"
            )
    return Found(
        first.page_size,
        first.permissions[3] == "s",
        all("w" in vma.permissions for vma in vmas),
        first.offset + address - first.start,
    )


def _overlapping(start: int, end: int, source: str) -> Iterator[_Vma]:
    """Yield the mappings that overlap [start, end), in address order, reading no further."""
    vma: _Vma | None = None
    with open(f"/proc/self/{source}") as lines:
        for line in lines:
            if head := _HEAD.match(line):
                if vma is not None:
                    yield vma
                first, last, offset = (int(head[group], 16) for group in (1, 2, 4))
                if first >= end:
                    return
                vma = _Vma(first, last, head[3], offset) if last > start else None
            elif vma is not None and line.startswith("KernelPageSize:"):
                vma.page_size = int(line.split()[1]) << 10
    if vma is not None:
        yield vma
