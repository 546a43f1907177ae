"""Groups of memory types for cases, and the features that each type needs."""

from __future__ import annotations

from pyuffd._abi import Feature
from pyuffd.testing._memory_types import MEMORY_TYPES, MemoryType

# Groups for `case(memory=...)`.
ALL = tuple(MEMORY_TYPES)
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
    return memory.missing_feature


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
