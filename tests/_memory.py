"""The memory types that userfaultfd serves, as factories of regions for parametrised tests."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

import pytest

from pyuffd import Region
from tests._need import HUGE_PAGE, needs_hugepages

PAGE = os.sysconf("SC_PAGE_SIZE")
# What a test of the hugetlb types may use without saying so with needs_hugepages().
DEFAULT_HUGE_PAGES = 16


@dataclass
class Memory:
    """Makes regions of one memory type and closes them when the test ends.

    Attributes:
        name: anon, shmem, shmem-private, hugetlb or hugetlb-private.
        page_size: the unit of faults and of every ioctl, in bytes.
        shared: writes go to the object that other mappings see.
    """

    name: str
    page_size: int
    shared: bool
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def is_anon(self) -> bool:
        """Whether no file is behind it."""
        return self.name == "anon"

    @property
    def is_hugetlb(self) -> bool:
        """Whether it is made of huge pages."""
        return self.page_size == HUGE_PAGE

    def make(self, length: int) -> Region:
        """Map a new region of `length` bytes, a multiple of the page size."""
        if self.is_anon:
            region = Region.anonymous(length)
        else:
            huge = self.page_size if self.is_hugetlb else None
            region = Region.memfd(length, shared=self.shared, huge_page_size=huge)
        return self._open.enter_context(region)

    def pages(self, count: int) -> Region:
        """Map a new region of `count` pages."""
        return self.make(count * self.page_size)

    def close(self) -> None:
        """Close every region this made."""
        self._open.close()


TYPES = {
    "anon": (PAGE, False),
    "shmem": (PAGE, True),
    "shmem-private": (PAGE, False),
    "hugetlb": (HUGE_PAGE, True),
    "hugetlb-private": (HUGE_PAGE, False),
}


def memory_of(name: str) -> Memory:
    """Return a factory by name, for code in a child process; the caller closes it."""
    page_size, shared = TYPES[name]
    return Memory(name, page_size, shared)


def memory_params(*names: str) -> list[object]:
    """Return pytest parameters for these memory types (all if none is named)."""
    return [
        pytest.param(
            name,
            id=name,
            marks=[needs_hugepages(DEFAULT_HUGE_PAGES)] if name.startswith("hugetlb") else [],
        )
        for name in names or TYPES
    ]
