"""The table of the memory types that userfaultfd supports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyuffd._abi import Feature
from pyuffd._pages import HUGE_PAGE_2M as HUGE_PAGE
from pyuffd._pages import PAGE_SIZE as SMALL_PAGE
from pyuffd.regions import Region

__all__ = ["HUGE_PAGE", "MEMORY_TYPES", "SMALL_PAGE", "MemoryName", "MemoryType"]

MemoryName = Literal["anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private"]


@dataclass(frozen=True, slots=True)
class MemoryType:
    """One kind of memory, and how to map it.

    Attributes:
        name: As in `MEMORY_TYPES`.
        page_size: The unit of its faults and of every ioctl, in bytes.
        shared: Writes go to the file, where other mappings see them.
        is_anon: No file is behind it.
    """

    name: MemoryName
    page_size: int
    shared: bool
    is_anon: bool = False

    @property
    def is_hugetlb(self) -> bool:
        """Whether it is made of hugetlb pages."""
        return self.page_size != SMALL_PAGE

    @property
    def is_shmem(self) -> bool:
        """Whether a memfd of small pages is behind it."""
        return not self.is_anon and not self.is_hugetlb

    @property
    def missing_feature(self) -> Feature:
        """The features that the kernel needs to register it for missing faults."""
        if self.is_anon:
            return Feature(0)
        return Feature.MISSING_HUGETLBFS if self.is_hugetlb else Feature.MISSING_SHMEM

    def make(self, length: int) -> Region:
        """Map `length` bytes, a multiple of the page size; the caller closes it."""
        if self.is_anon:
            return Region.anonymous(length)
        huge = self.page_size if self.is_hugetlb else None
        return Region.memfd(length, shared=self.shared, huge_page_size=huge)


MEMORY_TYPES: dict[str, MemoryType] = {
    memory.name: memory
    for memory in (
        MemoryType("anon", SMALL_PAGE, shared=False, is_anon=True),
        MemoryType("shmem", SMALL_PAGE, shared=True),
        MemoryType("shmem-private", SMALL_PAGE, shared=False),
        MemoryType("hugetlb", HUGE_PAGE, shared=True),
        MemoryType("hugetlb-private", HUGE_PAGE, shared=False),
    )
}
