"""Memory by address: what a call leaves unchanged, besides its purpose."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from pyuffd import _memory
from pyuffd.testing import needs_hugepages, needs_privilege
from pyuffd.testing._memory_types import HUGE_PAGE
from pyuffd.testing._need import needs_hugetlb_mremap
from pyuffd.testing._needs import marked
from tests.kernel._mounts import mounted

PAGES = 4
PROT_NONE, PROT_RW = 0, mmap.PROT_READ | mmap.PROT_WRITE


@needs_privilege()
@needs_hugepages(PAGES)
@marked(needs_hugetlb_mremap())
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 2), (3, 1), (0, PAGES)])
def test_moved_private_huge_pages_are_given_back(first: int, count: int) -> None:
    length = count * HUGE_PAGE
    # A mount of its own, since all processes share the counters of the machine's pool.
    with mounted("hugetlbfs", pagesize="2M", size=str(PAGES * HUGE_PAGE)) as folder:

        def unreserved() -> int:
            return os.statvfs(folder).f_bfree

        room = _memory.mmap(length + HUGE_PAGE, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        to = -(-room // HUGE_PAGE) * HUGE_PAGE
        with Path(folder, "huge-file").open("w+b") as file:
            start = _memory.mmap(PAGES * HUGE_PAGE, PROT_RW, mmap.MAP_PRIVATE, file.fileno())
        part = start + first * HUGE_PAGE
        _memory.write(part, b"moved")
        assert unreserved() == 0
        _memory.move(part, length, to, HUGE_PAGE)
        assert unreserved() == 0
        assert _memory.read(to, 5) == b"moved"
        # Not as one: the move has left a hole, which another mapping may fill by now.
        for rest, end in (start, part), (part + length, start + PAGES * HUGE_PAGE):
            if rest < end:
                _memory.munmap(rest, end - rest)
        assert unreserved() == PAGES - count
        _memory.munmap(room, length + HUGE_PAGE)
        assert unreserved() == PAGES
