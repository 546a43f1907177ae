"""What kind of memory somebody else mapped, for `Region.at`."""

from __future__ import annotations

from dataclasses import dataclass

from pyuffd import _vmas


@dataclass(frozen=True, slots=True)
class Found:
    """Facts that hold for a whole range; `offset` is that of its first byte in its file."""

    page_size: int
    shared: bool
    writable: bool
    offset: int


def describe(address: int, length: int, *, ask_page_size: bool) -> Found:
    """Describe a mapped, readable range of one kind; raise ValueError if it is not that.

    smaps walks page tables, so the page size is asked for only where the caller needs it; nothing
    is faulted in either way.
    """
    vmas = list(_vmas.overlapping(address, address + length, details=ask_page_size))
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
            raise ValueError(f"{vma} is not readable")
        if (vma.page_size, vma.shared) != (first.page_size, first.shared):
            raise ValueError(
                f"[{address:#x}, +{length:#x}) changes its kind at {vma.start:#x}:"
                " page size, or shared and private"
            )
    return Found(
        first.page_size,
        first.shared,
        all(vma.writable for vma in vmas),
        first.offset + address - first.start,
    )
