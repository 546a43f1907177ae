"""The memory types that userfaultfd supports, as factories of regions for parametrised tests."""

from __future__ import annotations

import contextlib

import pytest

from pyuffd import Region, _memory
from pyuffd.testing import MEMORY_TYPES, MemoryType, needs_hugepages
from pyuffd.testing._memory_types import SMALL_PAGE
from tests._rooms import region_in_room

PAGE = SMALL_PAGE
# A test of the hugetlb types may use this many without needs_hugepages().
DEFAULT_HUGE_PAGES = 16


class Memory:
    """Makes regions of one memory type and closes them when the test ends.

    Attributes:
        name: anon, shmem, shmem-private, hugetlb or hugetlb-private.
        page_size: the unit of faults and of every ioctl, in bytes.
        shared: writes go to the object that other mappings see.
        is_anon: no file is behind it.
        is_hugetlb: it is made of huge pages.

    With `holes` the test may unmap parts of its regions or move them away: no other memory is
    placed there.
    """

    def __init__(self, of: MemoryType, *, holes: bool = False) -> None:
        self.name, self.page_size, self.shared = of.name, of.page_size, of.shared
        self.is_anon, self.is_hugetlb = of.is_anon, of.is_hugetlb
        self._of, self._holes = of, holes
        self._open = contextlib.ExitStack()

    def make(self, length: int) -> Region:
        """Map a new region of `length` bytes, a multiple of the page size."""
        if not self._holes:
            return self._open.enter_context(self._of.make(length))
        region = region_in_room(self._of, length)
        self._open.callback(_memory.munmap, region.start, length)
        return self._open.enter_context(region)

    def pages(self, count: int) -> Region:
        """Map a new region of `count` pages."""
        return self.make(count * self.page_size)

    def close(self) -> None:
        """Close every region that this object made."""
        self._open.close()


def memory_of(name: str, *, holes: bool = False) -> Memory:
    """Return a factory by name, for code in a child process; the caller closes it."""
    return Memory(MEMORY_TYPES[name], holes=holes)


def memory_params(*names: str) -> list[object]:
    """Return pytest parameters for these memory types (all if none is named)."""
    return [
        pytest.param(
            name,
            id=name,
            marks=[needs_hugepages(DEFAULT_HUGE_PAGES)] if name.startswith("hugetlb") else [],
        )
        for name in names or MEMORY_TYPES
    ]
