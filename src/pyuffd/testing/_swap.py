"""Move pages to swap, and retry until they are there; MADV_PAGEOUT tries only once."""

from __future__ import annotations

import os
import time

from pyuffd._residency import PageResidency
from pyuffd.regions import Region

WAIT_S = 5.0
IN_MEMORY = frozenset({PageResidency.RESIDENT, PageResidency.MAPPED, PageResidency.PRIVATE})


def swap_out(region: Region, offset: int = 0, length: int | None = None) -> None:
    """Move whole pages of a region to swap, and return when they are there.

    `Region.pageout()` tries once, and the kernel keeps pages that it cannot move at that moment: a
    page that is still in another CPU's batch of newly touched pages, or a page of shared memory
    whose writeback is not finished. This function retries on each CPU in turn. It needs swap, see
    `needs_swap()`. Holes stay holes.

    Args:
        region: Memory in small pages. No thread may use the pages meanwhile.
        offset: Where to begin, in bytes, a multiple of the page size.
        length: How many bytes, a multiple of the page size; None is up to the end.

    Raises:
        ValueError, UffdOSError: as `Region.pageout()`.
        TimeoutError: some pages are still in memory after 5 s: locked, pinned, or in use.

    Kernel: MADV_PAGEOUT drains the batch of the CPU it runs on only (measured on Linux 6.18).
    GIL: released.  Threads: moves the calling thread from CPU to CPU, and restores its CPUs.
    Blocks: while pages are written.

    Example:
        >>> from pyuffd import Region
        >>> from pyuffd.testing import needs_swap, swap_out
        >>> @needs_swap()
        ... def test_content_comes_back():
        ...     with Region.anonymous(4096) as region:
        ...         region.write(0, b"x")
        ...         swap_out(region)
        ...         assert region.read(0, 1) == b"x"
    """
    until = time.monotonic() + WAIT_S
    first = offset // region.page_size
    end = None if length is None else first + length // region.page_size
    cpus = os.sched_getaffinity(0)
    try:
        while True:
            for cpu in sorted(cpus):
                os.sched_setaffinity(0, {cpu})
                region.pageout(offset, length)
                kept = sum(state in IN_MEMORY for state in list(region.residency())[first:end])
                if kept == 0:
                    return
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{kept} pages of {region!r} are still in memory after {WAIT_S:g} s of "
                    "MADV_PAGEOUT: locked, pinned, or in use"
                )
            time.sleep(0.01)
    finally:
        os.sched_setaffinity(0, cpus)
