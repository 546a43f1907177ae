"""The demo's second half: an image, restored lazily into every type of memory (layer L6)."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from pyuffd import Feature, FileSource, Handler, PageState, Region, UffdOSError
from pyuffd.cli import _cgroup
from pyuffd.cli._demo_work import HUGE_PAGE, PAGE, DemoError, open_userfaultfd
from pyuffd.testing import MemoryType

Driver = Literal["native", "inline"]
DRIVERS: tuple[Driver, ...] = ("native", "inline")

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

# Small, so that many random reads find their page missing.
PREFETCH = 64 << 10
# With fewer huge pages there would be nothing to prefetch.
PREFETCH_HUGE = 2 * HUGE_PAGE
RANDOM_READS = 512


class NotAllowedError(DemoError):
    """This kernel, user or machine does not allow a memory type or driver; the text says why."""


# The names in the table's rows.
LABELS = {
    "anon": "anonymous",
    "shmem": "shmem shared",
    "shmem-private": "shmem private",
    "hugetlb": "hugetlb shared",
    "hugetlb-private": "hugetlb private",
}


@dataclass(frozen=True)
class Restored:
    """The result of one restore.

    Attributes:
        memory: Name of the memory type.
        driver: The handler's driver.
        faults: Faults resolved.
        latencies_ns: Sorted times of single reads of missing pages, in random order, measured by
            the Python code that read them.
        prefetched: Pages filled before they were accessed.
        bytes_per_s: The speed of reading the rest in order; 0 if nothing was left.
        verified: The region's SHA-256 is the expected one.
    """

    memory: str
    driver: str
    faults: int
    latencies_ns: list[int]
    prefetched: int
    bytes_per_s: float
    verified: bool

    def latency_ns(self, percent: float) -> int:
        """Return the time that `percent` of the random reads did not exceed."""
        rank = -(-len(self.latencies_ns) * percent // 100)
        return self.latencies_ns[max(int(rank) - 1, 0)]


def restore(
    image: IO[bytes], length: int, expected: str, memory: MemoryType, driver: Driver, seed: int
) -> Restored:
    """Restore an image lazily into new memory, read all of it and compare.

    Args:
        image: The file.
        length: Its size in bytes, a multiple of the memory's page size.
        expected: SHA-256 of the image, in hexadecimal.
        memory: The type of memory to restore into.
        driver: The handler's driver.
        seed: The seed of the random order.

    Raises:
        NotAllowedError: the memory cannot be mapped, or cannot be registered in this way.
        HandlerError: a fault could not be resolved.
    """
    features = memory.missing_feature | (Feature.SIGBUS if driver == "inline" else Feature(0))
    prefetch = PREFETCH if memory.page_size == PAGE else PREFETCH_HUGE
    with contextlib.ExitStack() as stack:
        try:
            uffd, _ = open_userfaultfd(features)
            stack.enter_context(uffd)
            source = stack.enter_context(FileSource(image))
            region = stack.enter_context(memory.make(length))
            handler = stack.enter_context(Handler(uffd, driver=driver, prefetch=prefetch))
            handler.serve(region, source)
        except UffdOSError as error:
            raise NotAllowedError(error.hint or str(error)) from error
        latencies = _read_at_random(region, max(prefetch, memory.page_size), seed)
        absent = handler.page_states(region).count(PageState.ABSENT)
        began = time.perf_counter()
        region.touch()
        seconds = time.perf_counter() - began
        verified = is_restored(region, expected)
        handler.stop()
        stats = handler.stats()  # a fault is counted after its thread was woken
    return Restored(
        memory=LABELS[memory.name],
        driver=driver,
        faults=stats.faults["missing"],
        latencies_ns=latencies,
        prefetched=stats.prefetched_pages,
        bytes_per_s=absent * memory.page_size / seconds,
        verified=verified,
    )


def is_restored(region: Region, expected: str) -> bool:
    """Return whether the SHA-256 of the whole region is the expected one."""
    return region.digest("sha256").hex() == expected


def _read_at_random(region: Region, stride: int, seed: int) -> list[int]:
    """Read one page in some of the chunks of `stride` bytes; return the sorted times in ns.

    It reads at most half of the chunks, so that the other half is left to be read in order.
    """
    rng = random.Random(seed)
    chunks = range(0, region.length, stride)
    pages = min(stride, region.length) // region.page_size
    times = []
    for chunk in rng.sample(chunks, min(RANDOM_READS, -(-len(chunks) // 2))):
        last = min(pages, (region.length - chunk) // region.page_size)
        offset = chunk + rng.randrange(last) * region.page_size
        began = time.perf_counter_ns()
        region.touch(offset, 1)
        times.append(time.perf_counter_ns() - began)
    return sorted(times)


def why_no_huge_pages(length: int) -> str:
    """Return why `length` bytes of huge pages can never be used here, or ""."""
    if not POOL.exists():
        return "this machine has no huge pages of 2 MiB"
    limit = _cgroup.limits().hugetlb_2m
    if limit is not None and limit < length:
        return f"the control group allows {limit >> 20} MiB of huge pages"
    return ""
