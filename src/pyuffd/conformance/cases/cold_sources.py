"""UFFDIO_COPY in each mode from a source that is not mapped in the page tables yet (layer L5).

The kernel first copies with page faults disabled. If the source is not mapped, it releases its
locks, faults the source in, and starts again, and must then use the same mode and range.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from pyuffd import _memory
from pyuffd._abi import CopyMode, Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._types import HUGETLB, missing_features, missing_wp_features
from pyuffd.conformance._wp import (
    expect_read,
    expect_silent_write,
    expect_write_fault,
    in_one_place,
    present,
)
from pyuffd.conformance.cases.errno_read import counters
from pyuffd.regions import Region
from pyuffd.testing._huge_pages import free_hugepages
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType
from pyuffd.testing._need import Need, needs_swap

PAGES = 2
FIRST, SECOND = 0x51, 0x52
MISSING_WRITE = 1
MADV_PAGEOUT = 21
ORIGIN = "mm/userfaultfd.c: mfill_copy_folio_retry"


@dataclass(frozen=True)
class Source:
    """Memory of which one page or both are not mapped in the page tables.

    `make` returns its address and the byte that fills each of its two pages.
    """

    name: str
    text: str
    make: Callable[[Context], tuple[int, tuple[int, int]]]
    needs: tuple[Need, ...] = ()


def _small_pages(ctx: Context) -> int:
    return PAGES * ctx.page // SMALL_PAGE


def _fresh(ctx: Context) -> tuple[int, tuple[int, int]]:
    return ctx.make(_small_pages(ctx), "anon").start, (0, 0)


def _second_fresh(ctx: Context) -> tuple[int, tuple[int, int]]:
    region = ctx.make(_small_pages(ctx), "anon")
    region.advise_thp(False)
    region.fill(FIRST, 0, ctx.page)
    return region.start, (FIRST, 0)


def _fill_pages(ctx: Context, region: Region) -> None:
    region.fill(FIRST, 0, ctx.page)
    region.fill(SECOND, ctx.page, ctx.page)


def _memfd(ctx: Context) -> tuple[int, tuple[int, int]]:
    region = ctx.make(_small_pages(ctx), "shmem")
    assert region.fd is not None
    with Region.file(region.fd, region.length) as view:
        _fill_pages(ctx, view)
    return region.start, (FIRST, SECOND)


def numbered_file(ctx: Context, length: int) -> int:
    """Map a memfd without faulting its pages in; each page begins with its number, from 1 on."""
    region = ctx.make(length // SMALL_PAGE, "shmem")
    assert region.fd is not None
    pages = range(1, length // SMALL_PAGE + 1)
    os.pwrite(region.fd, b"".join(n.to_bytes(SMALL_PAGE, "little") for n in pages), 0)
    return region.start


def _second_memfd(ctx: Context) -> tuple[int, tuple[int, int]]:
    start, values = _memfd(ctx)
    # Without MADV_RANDOM, one read would map the neighbours too.
    _memory.madvise(start, PAGES * ctx.page, mmap.MADV_RANDOM)
    _memory.touch(start, ctx.page, SMALL_PAGE, write=False)
    return start, values


def _file(ctx: Context, *, evicted: bool) -> tuple[int, tuple[int, int]]:
    length = PAGES * ctx.page
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.write(bytes([FIRST]) * ctx.page + bytes([SECOND]) * ctx.page)
        file.flush()
        if evicted:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = _memory.mmap(length, mmap.PROT_READ, mmap.MAP_PRIVATE, file.fileno())
    ctx.callback(_memory.munmap, start, length)
    return start, (FIRST, SECOND)


def _disk_file(ctx: Context) -> tuple[int, tuple[int, int]]:
    return _file(ctx, evicted=False)


def _evicted_file(ctx: Context) -> tuple[int, tuple[int, int]]:
    return _file(ctx, evicted=True)


def _swapped(ctx: Context) -> tuple[int, tuple[int, int]]:
    in_one_place(ctx)
    region = ctx.make(_small_pages(ctx), "anon")
    region.advise_thp(False)
    _fill_pages(ctx, region)
    _memory.madvise(region.start, region.length, MADV_PAGEOUT)
    return region.start, (FIRST, SECOND)


SOURCES = (
    Source("fresh", "anonymous memory that was never touched", _fresh),
    Source("second-fresh", "anonymous memory whose second page was never touched", _second_fresh),
    Source("memfd", "unmapped pages of a memfd", _memfd),
    Source("second-memfd", "two pages of a memfd, the second of them not mapped,", _second_memfd),
    Source("disk-file", "pages of a file that are cached but not mapped", _disk_file),
    Source("evicted-file", "pages of a file that are not cached", _evicted_file),
    Source("swapped", "swapped-out anonymous memory", _swapped, (needs_swap(),)),
)


def _plain(ctx: Context, source: Source) -> None:
    region = ctx.make(PAGES)
    ctx.register(region, RegisterMode.MISSING)
    start, values = source.make(ctx)
    answer = ctx.ioctl("COPY", region.start, start, region.length, 0)
    ctx.expect("errno and .copy", (answer.errno, answer.result), (0, region.length))
    for index, value in enumerate(values):
        expect_read(ctx, region.start + index * ctx.page, value)


def _protected(ctx: Context, source: Source) -> None:
    region = ctx.make(PAGES)
    ctx.register(region, RegisterMode.MISSING | RegisterMode.WP)
    start, values = source.make(ctx)
    answer = ctx.ioctl("COPY", region.start, start, region.length, CopyMode.WP)
    ctx.expect("errno and .copy", (answer.errno, answer.result), (0, region.length))
    pages = [region.start + index * ctx.page for index in range(PAGES)]
    states = [ctx.pagemap(at) for at in pages]
    for index, state in enumerate(states):
        ctx.expect(f"pagemap of page {index} after COPY with MODE_WP", state, present(ctx))
    for at, value in zip(pages, values, strict=True):
        expect_read(ctx, at, value)
        expect_write_fault(ctx, at)
        expect_silent_write(ctx, at)


def _asleep(ctx: Context, source: Source) -> None:
    region = ctx.make(PAGES)
    ctx.register(region, RegisterMode.MISSING)
    start, values = source.make(ctx)
    write = ctx.start(ctx.write, region.start, bytes([values[0]]))
    ctx.expect_fault(MISSING_WRITE, region.start)
    answer = ctx.ioctl("COPY", region.start, start, region.length, CopyMode.DONTWAKE)
    ctx.expect("errno and .copy", (answer.errno, answer.result), (0, region.length))
    ctx.expect("pending and total after COPY with DONTWAKE", counters(ctx.uffd), (0, 1))
    ctx.uffd.wake(region)
    ctx.expect("the write", write.result(), None)
    for index, value in enumerate(values):
        expect_read(ctx, region.start + index * ctx.page, value)


Run = Callable[[Context, Source], None]
MODES: tuple[tuple[str, str, Callable[[MemoryType], Feature], Run], ...] = (
    ("plain", "fills both pages", missing_features, _plain),
    ("wp", "with MODE_WP fills both pages and protects both", missing_wp_features, _protected),
    ("dontwake", "with DONTWAKE fills both pages and wakes nobody", missing_features, _asleep),
)


def _add(
    source: Source, name: str, text: str, features: Callable[[MemoryType], Feature], run: Run
) -> None:
    case(
        f"UFFDIO_COPY.ok.cold-{source.name}-{name}",
        summary=f"COPY from {source.text} {text}",
        origin=ORIGIN,
        features=features,
        needs=source.needs,
    )(lambda ctx: run(ctx, source))


for _source in SOURCES:
    for _mode in MODES:
        _add(_source, *_mode)


TIMES = 8


@case(
    "UFFDIO_COPY.EFAULT.frees-its-huge-page",
    origin="mm/userfaultfd.c: mfill_atomic_hugetlb",
    memory=HUGETLB,
    features=missing_features,
    alone=True,
)
def frees_its_huge_page(ctx: Context) -> None:
    """A COPY that fails frees the huge page that it has allocated."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    source = ctx.make(ctx.page // SMALL_PAGE, "anon")
    _memory.mprotect(source.start, source.length, 0)
    before = free_hugepages()
    for _ in range(TIMES):
        answer = ctx.ioctl("COPY", region.start, source.start, ctx.page)
        ctx.expect("errno of COPY", answer.errno, errno.EFAULT)
    # Other programs may take some huge pages meanwhile.
    lost = before - free_hugepages()
    ctx.expect("whether each COPY lost a huge page", lost >= TIMES, False)
