"""The memory fixture makes the type that its name says, as the kernel sees it."""

from __future__ import annotations

import re
from pathlib import Path

from pyuffd import Region
from tests._memory import Memory


def mapping(region: Region) -> tuple[str, int]:
    """Return permissions and kernel page size (bytes) of the mapping that holds a region."""
    permissions = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ", line):
            # The kernel merges an anonymous mapping with its neighbours.
            inside = int(head[1], 16) <= region.start < int(head[2], 16)
            permissions = head[3] if inside else None
        elif permissions and line.startswith("KernelPageSize:"):
            return permissions, int(line.split()[1]) << 10
    raise AssertionError(f"nothing is mapped at {region.start:#x}")


def test_kind_of_mapping(memory: Memory) -> None:
    permissions, page_size = mapping(memory.pages(2))
    assert page_size == memory.page_size
    assert permissions == ("rw-s" if memory.shared else "rw-p")


def test_length_in_pages(memory: Memory) -> None:
    assert memory.pages(3).length == 3 * memory.page_size
