"""PAGEMAP_SCAN with WP_ASYNC: what counts as written, by memory and by history (layer L5).

From pagemap_ioctl of the kernel's selftests, whose "init" is `tracked` here and whose "reset" is
`protect`.
"""

from __future__ import annotations

import mmap
import os
import resource
import threading
from collections.abc import Callable

from pyuffd import _memory
from pyuffd._abi import PageCategory, RegisterMode, ScanFlag
from pyuffd.conformance import _thp
from pyuffd.conformance._case import Variant, case
from pyuffd.conformance._context import Context
from pyuffd.conformance._need import Need, needs_hugepages, needs_thp
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._types import ALL, ANON, ANY, HUGE_PAGE, SMALL_PAGE
from pyuffd.conformance.cases.errno_register import disk_page
from pyuffd.conformance.cases.pagemap_scan import FEATURES, ORIGIN, WP_SCAN, WRITTEN
from pyuffd.pagemap import Pagemap, PageRanges

PROT_NONE = 0
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MAP_HUGETLB, MAP_FIXED = 0x40000, 0x10
MADV_COLLAPSE = 25
SYS_SHMGET, SYS_SHMAT, SYS_SHMCTL, SYS_SHMDT = 29, 30, 31, 67
IPC_PRIVATE, IPC_RMID, SHM_HUGETLB = 0, 0, 0o4000
NO_FLAGS = ScanFlag(0)


class Area:
    """A range of this process that is registered WP with WP_ASYNC and protected, and its pages."""

    def __init__(self, ctx: Context, start: int, pages: int, page: int = SMALL_PAGE) -> None:
        self._ctx = ctx
        self.start = start
        self.page = page
        self.pages = pages
        self._pagemap = ctx.enter(Pagemap())
        self._uffd = ctx.open()
        self.track(0, pages)

    def track(self, first: int, count: int) -> None:
        """Register and protect some pages."""
        self._uffd.register(self._at(first), count * self.page, mode=RegisterMode.WP)
        self._uffd.writeprotect(self._at(first), count * self.page)

    def write(self, first: int = 0, count: int | None = None) -> None:
        """Write some pages, all of them unless told otherwise; nobody may be asked."""
        length = (self.pages if count is None else count) * self.page
        self._ctx.silently(_memory.fill, self._at(first), length, 1)

    def scan(
        self,
        first: int = 0,
        count: int | None = None,
        *,
        flags: ScanFlag = NO_FLAGS,
        max_pages: int = 0,
        vec_len: int | None = None,
    ) -> PageRanges:
        """Return the ranges that were written."""
        length = (self.pages - first if count is None else count) * self.page
        result = self._pagemap.scan(
            self._at(first),
            length,
            category_mask=WRITTEN,
            return_mask=WRITTEN,
            flags=flags,
            max_pages=max_pages,
            vec_len=vec_len,
        )
        return result.ranges

    def protect(self, first: int = 0, count: int | None = None) -> None:
        """Protect again what was written."""
        self.scan(first, count, flags=WP_SCAN, vec_len=0)

    def expect(self, when: str, *wanted: tuple[int, int]) -> None:
        """The written ranges must be these: first page, count."""
        self._ctx.expect(when, self.runs(self.scan()), list(wanted))

    def runs(self, ranges: PageRanges) -> list[tuple[int, int]]:
        """Return ranges as first page and count."""
        return [
            ((item.start - self.start) // self.page, (item.end - item.start) // self.page)
            for item in ranges
        ]

    def _at(self, index: int) -> int:
        return self.start + index * self.page


# The base tests


def _base(ctx: Context, area: Area, *, whole: bool = False) -> None:
    """Run the six base tests; `whole` where a write counts for the whole of a huge page."""
    pages = area.pages
    middle = pages // 2
    area.expect("new")
    area.write()
    area.expect("all written", (0, pages))
    area.protect()
    area.write(1, pages - 2)
    area.expect("all but the first and the last", (0, pages) if whole else (1, pages - 2))
    area.scan(flags=WP_SCAN)
    area.expect("right after a scan that protects")
    area.write(middle, 1)
    seen = area.runs(area.scan())
    ctx.expect("middle page", seen, [(middle, 1)], *([[(0, pages)]] if whole else []))
    area.protect()
    area.write(middle, 2)
    ctx.expect("two middle pages alone", area.runs(area.scan(middle, 2)), [(middle, 2)])


@case("kselftest.pagemap-ioctl.base", origin=f"{ORIGIN}: 36-83", memory=ALL, features=FEATURES)
def base(ctx: Context) -> None:
    """Exactly the pages written since the last protecting scan are reported."""
    pages = 4 if ctx.memory.is_hugetlb else 10
    _base(ctx, Area(ctx, ctx.make(pages).start, pages, ctx.page))


@case(
    "kselftest.pagemap-ioctl.base-large", origin=f"{ORIGIN}: 36-83", memory=ANON, features=FEATURES
)
def base_large(ctx: Context) -> None:
    """The base tests on more pages than one page table has."""
    _base(ctx, Area(ctx, ctx.make(5120).start, 5120))


def huge_area(ctx: Context, count: int) -> int:
    """Return the address of this many transparent huge pages, mapped as such."""
    length = count * HUGE_PAGE
    region = ctx.make((length + HUGE_PAGE) // SMALL_PAGE, "anon")
    region.advise_thp()
    start = -(-region.start // HUGE_PAGE) * HUGE_PAGE
    _memory.fill(start, length, 1)
    if _thp.mapped_huge(start) < length:
        _memory.madvise(start, length, MADV_COLLAPSE)
    if (mapped := _thp.mapped_huge(start)) < length:
        ctx.lack("THP", f"{mapped >> 10} of {length >> 10} KiB are huge pages")
    return start


@case(
    "kselftest.pagemap-ioctl.base-thp",
    origin=f"{ORIGIN}: 36-83",
    memory=ANY,
    features=FEATURES,
    needs=[needs_thp()],
)
def base_thp(ctx: Context) -> None:
    """The base tests on a transparent huge page: a write may count for all of it."""
    area = Area(ctx, huge_area(ctx, 1), HUGE_PAGE // SMALL_PAGE)
    _base(ctx, area, whole=_write_counts_for_all(area))


def _write_counts_for_all(area: Area) -> bool:
    area.write(1, 1)
    whole = area.runs(area.scan()) == [(0, area.pages)]
    area.protect()
    return whole


def _sysv_hugetlb(ctx: Context) -> int:
    key = syscall(SYS_SHMGET, IPC_PRIVATE, 2 * HUGE_PAGE, SHM_HUGETLB | 0o600)
    if key < 0:
        ctx.lack("SHM_HUGETLB", f"shmget: {os.strerror(-key)}")
    address = syscall(SYS_SHMAT, key, 0, 0)
    syscall(SYS_SHMCTL, key, IPC_RMID, 0)
    ctx.callback(syscall, SYS_SHMDT, address)
    return address


def _map_hugetlb(ctx: Context) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB
    address = _memory.mmap(2 * HUGE_PAGE, READ_WRITE, flags)
    ctx.callback(_memory.munmap, address, 2 * HUGE_PAGE)
    return address


def _disk_file(ctx: Context) -> int:
    return disk_page(ctx, mmap.MAP_PRIVATE, pages=10)


def _add_base(
    name: str,
    what: str,
    pages: int,
    page: int,
    make: Callable[[Context], int],
    needs: tuple[Need, ...] = (),
) -> None:
    def run(ctx: Context) -> None:
        area = Area(ctx, make(ctx), pages, page)
        area.expect("new")
        area.write()
        area.expect("all written", (0, pages))
        area.protect()
        area.expect("right after a scan that protects")
        area.write(pages - 1, 1)
        area.expect("last page", (pages - 1, 1))

    case(
        f"kselftest.pagemap-ioctl.base-{name}",
        origin=f"{ORIGIN}: 36-83",
        memory=ANY,
        features=FEATURES,
        needs=needs,
        summary=f"The base tests on {what}",
    )(run)


_add_base("disk-file", "a private mapping of a file on a disk", 10, SMALL_PAGE, _disk_file)
_HUGE = (needs_hugepages(2),)
_add_base("sysv-hugetlb", "SysV shared memory of huge pages", 2, HUGE_PAGE, _sysv_hugetlb, _HUGE)
_add_base("map-hugetlb", "MAP_HUGETLB", 2, HUGE_PAGE, _map_hugetlb, _HUGE)


# Transparent huge pages


@case(
    "kselftest.pagemap-ioctl.thp",
    origin=f"{ORIGIN}: 84-92",
    memory=ANY,
    features=FEATURES,
    needs=[needs_thp()],
)
def thp(ctx: Context) -> None:
    """Scans of huge pages protect and report exactly the part that they are asked for."""
    count = 4
    per_page = HUGE_PAGE // SMALL_PAGE
    area = Area(ctx, huge_area(ctx, count), count * per_page)
    pages, half = area.pages, area.pages // 2
    area.expect("new")
    area.expect("after a scan")
    area.write()
    found = [(item.categories, item.end - item.start) for item in area.scan(flags=WP_SCAN)]
    ctx.expect("all written", found, [(WRITTEN, pages * SMALL_PAGE)])
    area.expect("cleared")
    area.write(half, 1)
    ctx.expect("ranges of one write", len(area.scan()), 1)
    area.write()
    area.protect(0, half)
    area.expect("first half protected", (half, half))
    area.protect()
    area.write()
    area.scan(flags=WP_SCAN, max_pages=half)
    area.expect("max_pages of one half", (half, half))
    area.write()
    area.protect(half, half)
    area.expect("second half protected", (0, half))
    area.write()
    part = per_page // 2
    seen = area.runs(area.scan(flags=WP_SCAN, max_pages=part, vec_len=1))
    ctx.expect("half of a huge page", seen, [(0, part)])
    area.expect("the rest", (part, pages - part))


# Histories


@case("kselftest.pagemap-ioctl.simple", origin=f"{ORIGIN}: 93", memory=ALL, features=FEATURES)
def simple(ctx: Context) -> None:
    """A page is written after a write and not after a scan that protects, again and again."""
    area = Area(ctx, ctx.make(1).start, 1, ctx.page)
    for turn in range(20):
        area.protect()
        area.expect(f"protected, turn {turn}")
        area.write()
        area.expect(f"written, turn {turn}", (0, 1))


@case("kselftest.pagemap-ioctl.mprotect", origin=f"{ORIGIN}: 94-97", memory=ANON, features=FEATURES)
def mprotect(ctx: Context) -> None:
    """Neither mprotect nor a new mapping in between loses what is written or protected."""
    area = Area(ctx, ctx.make(2).start, 2)
    area.write()
    area.expect("written", (0, 2))
    area.protect()
    area.expect("protected")
    second = area.start + SMALL_PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    _memory.mmap(SMALL_PAGE, READ_WRITE, flags, address=second)
    area.track(1, 1)
    for protection in (PROT_NONE, mmap.PROT_READ, READ_WRITE):
        _memory.mprotect(area.start, 2 * SMALL_PAGE, protection)
    area.expect("protected, after mprotect")
    area.write()
    for protection in (PROT_NONE, READ_WRITE):
        _memory.mprotect(area.start, 2 * SMALL_PAGE, protection)
    area.expect("written, after mprotect", (0, 2))
    area.protect()
    area.write()
    area.expect("written again", (0, 2))


@case("kselftest.pagemap-ioctl.prot-none", origin=f"{ORIGIN}: 115", memory=ANON, features=FEATURES)
def prot_none(ctx: Context) -> None:
    """Changing the protection of mixed pages, some of them never touched, writes none of them."""
    pages = 16
    region = ctx.make(pages)
    region.fill(1, 0, pages // 2 * SMALL_PAGE)
    area = Area(ctx, region.start, pages)
    for index in range(0, pages, 2):
        _memory.mprotect(area.start + index * SMALL_PAGE, SMALL_PAGE, PROT_NONE)
    area.expect("some PROT_NONE")
    _memory.mprotect(area.start, pages * SMALL_PAGE, READ_WRITE)
    area.expect("writable again")


THREADS, PER_THREAD, TURNS = 4, 8, 50


@case(
    "kselftest.pagemap-ioctl.transact",
    origin=f"{ORIGIN}: 98-100",
    memory=ANON,
    features=FEATURES,
)
def transact(ctx: Context) -> None:
    """Scans that protect while threads write report every page written, now or the next time."""
    pages = THREADS * PER_THREAD
    area = Area(ctx, ctx.make(pages).start, pages)
    barrier = threading.Barrier(THREADS + 1, timeout=ctx.case.budget_s)
    too_few = []

    def work(number: int) -> None:
        first = area.start + number * PER_THREAD * SMALL_PAGE
        for turn in range(TURNS):
            barrier.wait()
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            _memory.touch(first, PER_THREAD * SMALL_PAGE, SMALL_PAGE, write=True)
            faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
            if faults < PER_THREAD:
                too_few.append((turn, number, faults))
            barrier.wait()

    workers = [ctx.start(work, number) for number in range(THREADS)]
    lost = []
    for turn in range(TURNS):
        barrier.wait()
        found = area.runs(area.scan(flags=WP_SCAN))
        barrier.wait()
        found += area.runs(area.scan(flags=WP_SCAN))
        seen = {index for first, count in found for index in range(first, first + count)}
        if missing := set(range(pages)) - seen:
            lost.append((turn, sorted(missing)))
    for worker in workers:
        worker.result()
    ctx.expect("pages written and not reported, by turn", lost, [])
    ctx.expect("turns with fewer faults than pages", too_few, [])
    ctx.expect_quiet()


def _categories(start: int, length: int, wanted: PageCategory) -> list[tuple[int, int]]:
    """Return the runs of pages that have a category, as offset and pages."""
    with Pagemap() as pagemap:
        ranges = pagemap.scan(start, length, category_mask=wanted).ranges
    return [((item.start - start), (item.end - item.start) // SMALL_PAGE) for item in ranges]


@case("kselftest.pagemap-ioctl.file", origin=f"{ORIGIN}: 112-113", memory=ANY, features=FEATURES)
def file(ctx: Context) -> None:
    """Pages of a file are FILE; private copies of them, never protected, are WRITTEN."""
    pages = 4
    length = pages * SMALL_PAGE
    start = disk_page(ctx, mmap.MAP_PRIVATE, pages)
    _memory.mprotect(start, length, mmap.PROT_READ)
    _memory.touch(start, length, SMALL_PAGE, write=False)
    ctx.expect("FILE", _categories(start, length, PageCategory.FILE), [(0, pages)])
    _memory.mprotect(start, length, READ_WRITE)
    _memory.fill(start, length, 2)
    ctx.expect("WRITTEN", _categories(start, length, WRITTEN), [(0, pages)])


@case(
    "kselftest.pagemap-ioctl.zero-page", origin=f"{ORIGIN}: 116-117", memory=ANON, features=FEATURES
)
def zero_page(ctx: Context) -> None:
    """Pages that were only read are PFNZERO, also where a huge zero page may be."""
    length = HUGE_PAGE
    region = ctx.make(2 * length // SMALL_PAGE)
    start = -(-region.start // HUGE_PAGE) * HUGE_PAGE
    for huge in (False, True):
        if huge:
            region.advise_thp()
        region.madvise(mmap.MADV_DONTNEED)
        _memory.touch(start, length, SMALL_PAGE, write=False)
        seen = _categories(start, length, PageCategory.PFNZERO)
        ctx.expect(f"PFNZERO, huge {huge}", seen, [(0, length // SMALL_PAGE)])


_HOLES = (
    Variant("written", "a page that was dropped is not protected, so it counts as written"),
    Variant("not-written", "without its page table it counts as nothing"),
)


def _expect_dropped(ctx: Context, area: Area) -> None:
    length = area.pages * SMALL_PAGE
    _memory.madvise(area.start, length, mmap.MADV_DONTNEED)
    with Pagemap() as pagemap:
        fast = area.runs(area.scan())
        anyof = pagemap.scan(area.start, length, category_anyof_mask=WRITTEN).ranges
    for name, seen in (("fast", fast), ("generic", area.runs(anyof))):
        ctx.expect_variant(f"{name} query", seen, written=[(0, area.pages)], not_written=[])


@case(
    "kselftest.pagemap-ioctl.dropped",
    origin=f"{ORIGIN}: 118",
    memory=ANON,
    features=FEATURES,
    variants=_HOLES,
)
def dropped(ctx: Context) -> None:
    """Pages that MADV_DONTNEED dropped count as written, in the fast and the generic query."""
    region = ctx.make(16)
    region.fill(1)
    _expect_dropped(ctx, Area(ctx, region.start, 16))


@case(
    "kselftest.pagemap-ioctl.dropped-thp",
    origin=f"{ORIGIN}: 119",
    memory=ANY,
    features=FEATURES,
    needs=[needs_thp()],
    variants=_HOLES,
)
def dropped_thp(ctx: Context) -> None:
    """A huge page that was dropped is reported alike by the fast and the generic query."""
    _expect_dropped(ctx, Area(ctx, huge_area(ctx, 1), HUGE_PAGE // SMALL_PAGE))
