"""The memory types that cases run on."""

from __future__ import annotations

from dataclasses import dataclass

from pyuffd._abi import Feature
from pyuffd.regions import Region

SMALL_PAGE = 4096
HUGE_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class MemoryType:
    """One kind of memory, and how to map it.

    Attributes:
        name: The last part of a case's id.
        page_size: The unit of its faults and of every ioctl, in bytes.
        shared: Writes go to the file, where other mappings see them.
        is_anon: No file is behind it.
    """

    name: str
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

    def make(self, length: int) -> Region:
        """Map `length` bytes, a multiple of the page size; the caller closes it."""
        if self.is_anon:
            return Region.anonymous(length)
        huge = self.page_size if self.is_hugetlb else None
        return Region.memfd(length, shared=self.shared, huge_page_size=huge)


TYPES = {
    memory.name: memory
    for memory in (
        MemoryType("anon", SMALL_PAGE, shared=False, is_anon=True),
        MemoryType("shmem", SMALL_PAGE, shared=True),
        MemoryType("shmem-private", SMALL_PAGE, shared=False),
        MemoryType("hugetlb", HUGE_PAGE, shared=True),
        MemoryType("hugetlb-private", HUGE_PAGE, shared=False),
    )
}

# Groups for `case(memory=...)`.
ALL = tuple(TYPES)
ANON = ("anon",)
SHMEM = ("shmem", "shmem-private")
HUGETLB = ("hugetlb", "hugetlb-private")
SMALL = ANON + SHMEM
FILE = SHMEM + HUGETLB
SHARED = ("shmem", "hugetlb")
PRIVATE = ("anon", "shmem-private", "hugetlb-private")
# A case that touches no registered memory, such as one about UFFDIO_API.
ANY = ("any",)


def missing_features(memory: MemoryType) -> Feature:
    """Return what the kernel must have to register this memory for missing faults."""
    if memory.is_anon:
        return Feature(0)
    return Feature.MISSING_HUGETLBFS if memory.is_hugetlb else Feature.MISSING_SHMEM


def minor_features(memory: MemoryType) -> Feature:
    """Return what the kernel must have to register this memory for minor faults."""
    return Feature.MINOR_HUGETLBFS if memory.is_hugetlb else Feature.MINOR_SHMEM


def wp_features(memory: MemoryType) -> Feature:
    """Return what the kernel must have to write-protect this memory."""
    return (
        Feature.PAGEFAULT_FLAG_WP
        if memory.is_anon
        else Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
    )


def missing_wp_features(memory: MemoryType) -> Feature:
    """Return what the kernel must have for missing faults and write-protection together."""
    return missing_features(memory) | wp_features(memory)


def poison_features(memory: MemoryType) -> Feature:
    """Return what the kernel must have to poison this memory."""
    return missing_features(memory) | Feature.POISON
