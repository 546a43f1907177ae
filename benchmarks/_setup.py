"""What every benchmark module is given, and the memory they need: backed pages, huge pages."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks._build import Programs

_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_HUGE = 2 << 20
#: One page in so many is kept by `warm_memory`; the blocks between stay far below 2 MiB.
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


@contextmanager
def warm_memory(length: int) -> Iterator[None]:
    """Have about `length` bytes of free memory that the hypervisor has backed.

    A guest may report free blocks of 2 MiB and more to its hypervisor (free page reporting), which
    takes them away; the first use after that is several times slower, at times of its own choosing.
    So this maps and touches the memory and gives it back but for one page in each 512 KiB:
    the blocks between these are too small to be reported, and the allocator prefers small ones.
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
    """Have `pages` free 2 MiB pages inside the ``with`` block and put the pool back after it.

    Yields:
        An empty string, or why there are too few.
    """
    pool = _HUGE_PAGES / "nr_hugepages"
    free = _HUGE_PAGES / "free_hugepages"
    if not pool.exists():
        yield "this kernel has no 2 MiB huge pages"
        return
    missing = pages - int(free.read_text())
    if missing <= 0:
        yield ""
        return
    if os.geteuid() != 0:
        yield f"{missing} more free 2 MiB huge pages needed (vm.nr_hugepages)"
        return
    before = int(pool.read_text())
    pool.write_text(str(before + missing))
    try:
        have = int(free.read_text())
        yield "" if have >= pages else f"only {have} of {pages} 2 MiB huge pages could be reserved"
    finally:
        pool.write_text(str(before))
