"""The kind of an existing mapping, for `Region.at`."""

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
    """Describe a range; raise ValueError unless it is mapped, readable and of one kind.

    The page size comes from smaps, which walks page tables, so it is read only if the caller needs
    it. No page is faulted in either way.
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
