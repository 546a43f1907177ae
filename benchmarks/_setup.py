"""The settings of every benchmark module, and the memory it needs: backed pages, huge pages."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from benchmarks._build import Programs
from pyuffd.testing import _huge_pages

_HUGE = 2 << 20
#: `warm_memory` keeps a page in each block of this size, far below 2 MiB.
_KEPT_EVERY = 512 << 10


@dataclass(frozen=True)
class Setup:
    """How to run.

    Attributes:
        programs: the bare C programs.
        rounds: counted runs of each pair.
        quick: smaller memory and fewer faults, to see that everything runs.
        faulter_cpu: CPU of the faulting thread.
        other_cpu: another CPU; None if there is only one.
    """

    programs: Programs
    rounds: int
    quick: bool
    faulter_cpu: int
    other_cpu: int | None

    def member(self, *words: object, module: str = "_members") -> list[str]:
        """Return the command of a pyuffd member of a pair."""
        return [
            sys.executable,
            "-m",
            f"benchmarks.{module}",
            self.programs.toucher,
            *(str(word) for word in words),
        ]


def command(program: str, *words: object) -> list[str]:
    """Return the command of a C member of a pair."""
    return [program, *(str(word) for word in words)]


def available_memory() -> int:
    """Return how many bytes programs can still have, the page cache's included."""
    return int(psutil.virtual_memory().available)


@contextmanager
def warm_memory(length: int) -> Iterator[None]:
    """Have about `length` bytes of free memory that the hypervisor has backed.

    A guest may report free blocks of 2 MiB and more to its hypervisor (free page reporting), which
    takes them away at any time; the first use after that is several times slower. So this maps and
    touches the memory, and gives back all but one page in each 512 KiB: the blocks between these
    are too small to be reported, and the allocator prefers small ones.
    """
    length -= length % _HUGE
    with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for offset in range(0, length, _HUGE):
            memory[offset : offset + _HUGE] = b"\1" * _HUGE
        for offset in range(0, length, _KEPT_EVERY):
            first = offset + mmap.PAGESIZE
            memory.madvise(mmap.MADV_DONTNEED, first, _KEPT_EVERY - mmap.PAGESIZE)
        yield


@contextmanager
def huge_pages(pages: int) -> Iterator[str]:
    """Have `pages` free 2 MiB pages inside the ``with`` block; restore the pool after it.

    Yields:
        An empty string, or why there are too few.
    """
    if not _huge_pages.POOL.exists():
        yield "this kernel has no 2 MiB huge pages"
        return
    with _huge_pages.huge_pages(pages):
        lacking = pages - _huge_pages.free_hugepages()
        why = f"{lacking} more free 2 MiB huge pages needed (vm.nr_hugepages)"
        yield why if lacking > 0 else ""
