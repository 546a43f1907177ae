"""Transparent huge pages: see what is mapped, and switch sizes on for a while."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE

if TYPE_CHECKING:
    from pyuffd.conformance._context import Context

MADV_COLLAPSE = 25  # Linux 6.1

THP = Path("/sys/kernel/mm/transparent_hugepage")
_COMPOUND_HEAD, _COMPOUND_TAIL = 1 << 15, 1 << 16  # Documentation/admin-guide/mm/pagemap.rst
_PFN_MASK = (1 << 55) - 1


def mapped_huge(address: int) -> int:
    """Return how many bytes of the mapping at `address` are mapped by huge page table entries."""
    total, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(head[1], 16) <= address < int(head[2], 16)
            elif inside and line.startswith(("AnonHugePages:", "ShmemPmdMapped:")):
                total += int(line.split()[1]) << 10
    return total


def collapse(ctx: Context, region: Region) -> None:
    """Collapse a region's pages into huge pages; skip the case if the kernel cannot."""
    try:
        region.madvise(MADV_COLLAPSE)
    except OSError as error:
        ctx.lack("collapse", f"MADV_COLLAPSE: {error.strerror}")


def huge_file(ctx: Context, value: int) -> Region:
    """Make a huge page of a file, filled with `value`; the region does not map it yet."""
    region = ctx.make(HUGE_PAGE // SMALL_PAGE)
    assert region.fd is not None
    with Region.file(region.fd, region.length) as view:
        view.fill(value)
        collapse(ctx, view)
    return region


def sizes() -> list[int]:
    """Return the sizes that can be switched individually, in bytes."""
    names = (re.fullmatch(r"hugepages-(\d+)kB", path.name) for path in THP.glob("hugepages-*kB"))
    return sorted(int(name[1]) << 10 for name in names if name)


@contextlib.contextmanager
def switched_on(size: int, *, shared: bool) -> Iterator[None]:
    """Enable huge pages of `size` for memory that asks for them; one user at a time."""
    lock = Path(tempfile.gettempdir(), f"pyuffd-thp-{os.geteuid()}.lock")
    knob = THP / f"hugepages-{size >> 10}kB" / ("shmem_enabled" if shared else "enabled")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = re.search(r"\[(\w+)\]", knob.read_text())
        assert found is not None
        knob.write_text("advise" if shared else "madvise")
        try:
            yield
        finally:
            knob.write_text(found[1])


def folio_bytes(address: int) -> int:
    """Return the size of the folio that begins at `address`, 4096 for a single page."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entry = int.from_bytes(os.pread(pagemap.fileno(), 8, address // 4096 * 8), "little")
    pages = 1
    with open("/proc/kpageflags", "rb", buffering=0) as flags:
        first = _flags(flags.fileno(), entry & _PFN_MASK)
        if first & _COMPOUND_HEAD:
            while _flags(flags.fileno(), (entry & _PFN_MASK) + pages) & _COMPOUND_TAIL:
                pages += 1
    return pages * 4096


def _flags(fd: int, pfn: int) -> int:
    return int.from_bytes(os.pread(fd, 8, pfn * 8), "little")
