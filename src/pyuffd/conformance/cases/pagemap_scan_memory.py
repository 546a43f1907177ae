"""PAGEMAP_SCAN with WP_ASYNC: what counts as written, by memory type and history (layer L5).

From pagemap_ioctl of the kernel's selftests. Its "init" is `Area.track` here, its "reset"
`Area.protect`.
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
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._thp import MADV_COLLAPSE
from pyuffd.conformance._types import ALL, ANON, ANY
from pyuffd.conformance.cases.errno_register import disk_page
from pyuffd.conformance.cases.pagemap_scan import FEATURES, ORIGIN, WP_SCAN, WRITTEN
from pyuffd.pagemap import Pagemap, PageRanges
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import Need, needs_hugepages, needs_thp

PROT_NONE = 0
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MAP_HUGETLB, MAP_FIXED = 0x40000, 0x10
SYS_SHMGET, SYS_SHMAT, SYS_SHMCTL, SYS_SHMDT = 29, 30, 31, 67
IPC_PRIVATE, IPC_RMID, SHM_HUGETLB = 0, 0, 0o4000
NO_FLAGS = ScanFlag(0)
LARGE_PAGES = 5120


class Area:
    """A range of this process that is registered in mode WP with WP_ASYNC, and protected."""

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
        """Write some pages, by default all; no message may be sent."""
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
        """Protect the written pages again."""
        self.scan(first, count, flags=WP_SCAN, vec_len=0)

    def expect(self, when: str, *wanted: tuple[int, int]) -> None:
        """Check the written ranges: first page and count of each."""
        self._ctx.expect(when, self.runs(self.scan()), list(wanted))

    def runs(self, ranges: PageRanges) -> list[tuple[int, int]]:
        """Return ranges as first page and count."""
        return [
            ((item.start - self.start) // self.page, (item.end - item.start) // self.page)
            for item in ranges
        ]

    def _at(self, index: int) -> int:
        return self.start + index * self.page


# The base tests: six on each kind of memory. Each first repeats what the earlier ones leave behind.


def _new(_ctx: Context, area: Area, _whole: bool) -> None:
    area.expect("ranges written of new memory")


def _all(_ctx: Context, area: Area, _whole: bool) -> None:
    area.write()
    area.expect("ranges after a write to all", (0, area.pages))


def _all_but_ends(_ctx: Context, area: Area, whole: bool) -> None:
    area.write()
    area.protect()
    # With only two pages there is none between the ends, so write the first one.
    first, count = (1, area.pages - 2) if area.pages > 2 else (0, 1)
    area.write(first, count)
    area.expect("ranges after a write to some", (0, area.pages) if whole else (first, count))


def _protecting(_ctx: Context, area: Area, _whole: bool) -> None:
    area.write()
    area.scan(flags=WP_SCAN)
    area.expect("ranges after a scan that protects")


def _middle(ctx: Context, area: Area, whole: bool) -> None:
    area.write()
    area.protect()
    middle = area.pages // 2
    area.write(middle, 1)
    seen = area.runs(area.scan())
    ctx.expect(
        "ranges after a write to the middle page",
        seen,
        [(0, area.pages)] if whole else [(middle, 1)],
    )


def _two_middle(ctx: Context, area: Area, _whole: bool) -> None:
    area.write()
    area.protect()
    middle = area.pages // 2 - 1
    area.write(middle, 2)
    ctx.expect("ranges of a scan of two pages", area.runs(area.scan(middle, 2)), [(middle, 2)])


BASE: tuple[tuple[str, str, Callable[[Context, Area, bool], None]], ...] = (
    ("new", "Pages that are protected and never written do not count as written", _new),
    ("all", "If all pages are written, they are one range", _all),
    ("all-but-ends", "If all pages but the ends are written, they are one range", _all_but_ends),
    ("protecting", "After a scan that protects, no page counts as written", _protecting),
    ("middle", "If only the middle page is written, it is one range", _middle),
    ("two-middle", "A scan of the two middle pages alone finds one range of two", _two_middle),
)


def huge_area(ctx: Context, count: int) -> int:
    """Return the address of this many transparent huge pages, each mapped by a PMD."""
    length = count * HUGE_PAGE
    region = ctx.make((length + HUGE_PAGE) // SMALL_PAGE, "anon")
    region.advise_thp()
    start = -(-region.start // HUGE_PAGE) * HUGE_PAGE
    _memory.fill(start, length, 1)
    if _thp.mapped_huge(start) < length:
        _memory.madvise(start, length, MADV_COLLAPSE)
    if (mapped := _thp.mapped_huge(start)) < length:
        ctx.lack("THP", f"{mapped >> 10} of {length >> 10} KiB are huge pages")
    # Keep khugepaged from filling the holes that a case makes in them.
    _memory.madvise(region.start, region.length, mmap.MADV_NOHUGEPAGE)
    return start


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


def _make(ctx: Context) -> Area:
    pages = 4 if ctx.memory.is_hugetlb else 10
    return Area(ctx, ctx.make(pages).start, pages, ctx.page)


def _large(ctx: Context) -> Area:
    return Area(ctx, ctx.make(LARGE_PAGES).start, LARGE_PAGES)


def _huge(ctx: Context) -> Area:
    return Area(ctx, huge_area(ctx, 1), HUGE_PAGE // SMALL_PAGE)


# Name, words for the summary, memory types, a function that makes it, needs, and whether a write to
# one page may count for all pages.
_KINDS: tuple[
    tuple[str, str, tuple[str, ...], Callable[[Context], Area], tuple[Need, ...], bool], ...
] = (
    ("base", "", ALL, _make, (), False),
    ("base-large", " (more pages than one page table has)", ANON, _large, (), False),
    ("base-thp", " (a transparent huge page)", ANY, _huge, (needs_thp(),), True),
    (
        "base-sysv-hugetlb",
        " (SysV shared memory of huge pages)",
        ANY,
        lambda ctx: Area(ctx, _sysv_hugetlb(ctx), 2, HUGE_PAGE),
        (needs_hugepages(2),),
        False,
    ),
    (
        "base-map-hugetlb",
        " (MAP_HUGETLB)",
        ANY,
        lambda ctx: Area(ctx, _map_hugetlb(ctx), 2, HUGE_PAGE),
        (needs_hugepages(2),),
        False,
    ),
    (
        "base-disk-file",
        " (a private mapping of a file on a disk)",
        ANY,
        lambda ctx: Area(ctx, disk_page(ctx, mmap.MAP_PRIVATE, pages=10), 10),
        (),
        False,
    ),
)


def _write_counts_for_all(area: Area) -> bool:
    area.write(1, 1)
    whole = area.runs(area.scan()) == [(0, area.pages)]
    area.protect()
    return whole


def _add_base() -> None:
    for kind, where, memory, make, needs, may_be_whole in _KINDS:
        for step, text, check in BASE:

            def run(
                ctx: Context,
                make: Callable[[Context], Area] = make,
                check: Callable[[Context, Area, bool], None] = check,
                may_be_whole: bool = may_be_whole,
                is_first: bool = step == "new",
            ) -> None:
                area = make(ctx)
                # A written huge page is tracked in parts afterwards, so "new" needs a new one.
                whole = may_be_whole and not is_first and _write_counts_for_all(area)
                check(ctx, area, whole)

            case(
                f"kselftest.pagemap-ioctl.{kind}.{step}",
                origin=f"{ORIGIN}: 36-83",
                memory=memory,
                features=FEATURES,
                needs=needs,
                summary=f"{text}{where}",
            )(run)


_add_base()


# Transparent huge pages


def _thp_area(ctx: Context) -> Area:
    return Area(ctx, huge_area(ctx, THP_COUNT), THP_COUNT * (HUGE_PAGE // SMALL_PAGE))


def _thp_new(ctx: Context, area: Area) -> None:
    ranges = area.runs(area.scan(flags=WP_SCAN))
    ctx.expect("ranges written of new memory", ranges, [])


def _thp_again(_ctx: Context, area: Area) -> None:
    area.scan(flags=WP_SCAN)
    area.expect("ranges after a scan that protects")


def _thp_all(ctx: Context, area: Area) -> None:
    area.write()
    found = [(item.categories, item.end - item.start) for item in area.scan(flags=WP_SCAN)]
    ctx.expect(
        "categories and length after a write to all", found, [(WRITTEN, area.pages * SMALL_PAGE)]
    )
    area.expect("ranges after that scan")


def _thp_middle(ctx: Context, area: Area) -> None:
    middle = area.pages // 2
    area.write(middle, 1)
    seen = area.runs(area.scan())
    ctx.expect("ranges of one write", len(seen), 1)
    first, count = seen[0]
    ctx.expect(
        "whether the range has the page that was written", first <= middle < first + count, True
    )


def _thp_first_half(_ctx: Context, area: Area) -> None:
    half = area.pages // 2
    area.write()
    area.protect(0, half)
    area.expect("ranges after protecting the first half", (half, half))


def _thp_max_pages(_ctx: Context, area: Area) -> None:
    half = area.pages // 2
    area.write()
    area.scan(flags=WP_SCAN, max_pages=half)
    area.expect("ranges after a scan with max_pages of one half", (half, half))


def _thp_second_half(_ctx: Context, area: Area) -> None:
    half = area.pages // 2
    area.write()
    area.scan(half, half, flags=WP_SCAN, max_pages=half)
    area.expect("ranges after protecting the second half", (0, half))


def _half_of_a_page(area: Area) -> list[tuple[int, int]]:
    area.write()
    return area.runs(area.scan(flags=WP_SCAN, max_pages=HALF_PAGE, vec_len=1))


def _thp_part(ctx: Context, area: Area) -> None:
    ctx.expect("ranges with max_pages of half a huge page", _half_of_a_page(area), [(0, HALF_PAGE)])


def _thp_rest(_ctx: Context, area: Area) -> None:
    _half_of_a_page(area)
    area.expect("ranges still written", (HALF_PAGE, area.pages - HALF_PAGE))


THP_COUNT = 4  # the selftest has ten
HALF_PAGE = HUGE_PAGE // SMALL_PAGE // 2
THP: tuple[tuple[str, str, Callable[[Context, Area], None]], ...] = (
    ("new", "Huge pages that were never written do not count as written", _thp_new),
    ("again", "Huge pages that were never written do not count after a scan either", _thp_again),
    ("all", "If all huge pages are written, they are one WRITTEN range until protected", _thp_all),
    ("middle", "A write to one page is one range with that page", _thp_middle),
    ("first-half", "Protecting the first half leaves only the second written", _thp_first_half),
    ("max-pages", "max_pages of one half leaves only the second half written", _thp_max_pages),
    ("second-half", "Protecting the second half leaves only the first written", _thp_second_half),
    ("part", "max_pages of half a huge page finds just that half, and splits the page", _thp_part),
    ("rest", "max_pages of half a huge page leaves just the rest written", _thp_rest),
)


def _add_thp(name: str, text: str, check: Callable[[Context, Area], None]) -> None:
    def run(ctx: Context) -> None:
        check(ctx, _thp_area(ctx))

    case(
        f"kselftest.pagemap-ioctl.thp.{name}",
        origin=f"{ORIGIN}: 84-92",
        memory=ANY,
        features=FEATURES,
        needs=[needs_thp()],
        summary=text,
    )(run)


for _thp_case in THP:
    _add_thp(*_thp_case)


# Histories


@case("kselftest.pagemap-ioctl.simple", origin=f"{ORIGIN}: 93", memory=ALL, features=FEATURES)
def simple(ctx: Context) -> None:
    """A page counts as written after each write, and not after each scan that protects."""
    area = Area(ctx, ctx.make(1).start, 1, ctx.page)
    for turn in range(20):
        area.protect()
        area.expect(f"ranges after protecting, turn {turn}")
        area.write()
        area.expect(f"ranges after a write, turn {turn}", (0, 1))


def _remapped(area: Area) -> None:
    """Write and protect two pages, map new memory over the second, and call mprotect on both."""
    area.write()
    area.protect()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    _memory.mmap(SMALL_PAGE, READ_WRITE, flags, address=area.start + SMALL_PAGE)
    area.track(1, 1)
    for protection in (PROT_NONE, mmap.PROT_READ, READ_WRITE):
        _memory.mprotect(area.start, 2 * SMALL_PAGE, protection)


@case(
    "kselftest.pagemap-ioctl.mprotect.written",
    origin=f"{ORIGIN}: 94",
    memory=ANON,
    features=FEATURES,
)
def mprotect_written(ctx: Context) -> None:
    """If two pages are written, they are one range."""
    area = Area(ctx, ctx.make(2).start, 2)
    area.write()
    area.expect("ranges after a write", (0, 2))


@case(
    "kselftest.pagemap-ioctl.mprotect.protected",
    origin=f"{ORIGIN}: 95",
    memory=ANON,
    features=FEATURES,
)
def mprotect_protected(ctx: Context) -> None:
    """Protected pages do not count as written, also after a new mapping and mprotect."""
    area = Area(ctx, ctx.make(2).start, 2)
    area.write()
    area.protect()
    area.expect("ranges after protecting")
    _remapped(area)
    area.expect("ranges after a new mapping and mprotect")


@case(
    "kselftest.pagemap-ioctl.mprotect.remapped",
    origin=f"{ORIGIN}: 96",
    memory=ANON,
    features=FEATURES,
)
def mprotect_remapped(ctx: Context) -> None:
    """Pages written after a new mapping and mprotect count as written, also after mprotect."""
    area = Area(ctx, ctx.make(2).start, 2)
    _remapped(area)
    area.write()
    for protection in (PROT_NONE, mmap.PROT_READ, READ_WRITE):
        _memory.mprotect(area.start, SMALL_PAGE, protection)
    area.expect("ranges after another mprotect", (0, 2))


@case(
    "kselftest.pagemap-ioctl.mprotect.again",
    origin=f"{ORIGIN}: 97",
    memory=ANON,
    features=FEATURES,
)
def mprotect_again(ctx: Context) -> None:
    """After a new mapping and mprotect, pages protected and written again count as written."""
    area = Area(ctx, ctx.make(2).start, 2)
    _remapped(area)
    area.write()
    area.protect()
    area.write()
    area.expect("ranges after the second write", (0, 2))


@case("kselftest.pagemap-ioctl.prot-none", origin=f"{ORIGIN}: 115", memory=ANON, features=FEATURES)
def prot_none(ctx: Context) -> None:
    """mprotect(2) of pages, some of them never touched, does not make them count as written."""
    pages = 16
    region = ctx.make(pages)
    region.fill(1, 0, pages // 2 * SMALL_PAGE)
    area = Area(ctx, region.start, pages)
    for index in range(0, pages, 2):
        _memory.mprotect(area.start + index * SMALL_PAGE, SMALL_PAGE, PROT_NONE)
    area.expect("ranges after PROT_NONE of some pages")
    _memory.mprotect(area.start, pages * SMALL_PAGE, READ_WRITE)
    area.expect("ranges after PROT_READ | PROT_WRITE of all")


THREADS, PER_THREAD, TURNS = 4, 8, 50


def _protected_after_writing(ctx: Context) -> Area:
    area = Area(ctx, ctx.make(THREADS * PER_THREAD).start, THREADS * PER_THREAD)
    area.write()
    return area


@case(
    "kselftest.pagemap-ioctl.transact.written",
    origin=f"{ORIGIN}: 98",
    memory=ANON,
    features=FEATURES,
)
def transact_written(ctx: Context) -> None:
    """A scan that protects finds the pages that were written before."""
    area = _protected_after_writing(ctx)
    ctx.expect("ranges of the scan", area.runs(area.scan(flags=WP_SCAN)), [(0, area.pages)])


@case(
    "kselftest.pagemap-ioctl.transact.protected",
    origin=f"{ORIGIN}: 99",
    memory=ANON,
    features=FEATURES,
)
def transact_protected(ctx: Context) -> None:
    """After a scan that protects, the next one finds nothing."""
    area = _protected_after_writing(ctx)
    area.scan(flags=WP_SCAN)
    ctx.expect("ranges of the second scan", area.runs(area.scan(flags=WP_SCAN)), [])


@case(
    "kselftest.pagemap-ioctl.transact.threads",
    origin=f"{ORIGIN}: 100",
    memory=ANON,
    features=FEATURES,
)
def transact(ctx: Context) -> None:
    """Of scans that protect while threads write, this or the next reports each page written."""
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
    ctx.expect("pages that no scan reported, by turn", lost, [])
    ctx.expect("turns with fewer faults than pages", too_few, [])
    ctx.expect_quiet()


def _categories(start: int, length: int, wanted: PageCategory) -> list[tuple[int, int]]:
    """Return the runs of pages in a category, as offset in bytes and number of pages."""
    with Pagemap() as pagemap:
        ranges = pagemap.scan(start, length, category_mask=wanted).ranges
    return [((item.start - start), (item.end - item.start) // SMALL_PAGE) for item in ranges]


FILE_PAGES = 10


@case("kselftest.pagemap-ioctl.file.mapped", origin=f"{ORIGIN}: 112", memory=ANY, features=FEATURES)
def file_mapped(ctx: Context) -> None:
    """Pages of a file mapped read-only are FILE."""
    length = FILE_PAGES * SMALL_PAGE
    start = disk_page(ctx, mmap.MAP_PRIVATE, FILE_PAGES)
    _memory.mprotect(start, length, mmap.PROT_READ)
    _memory.touch(start, length, SMALL_PAGE, write=False)
    ctx.expect(
        "runs of FILE pages", _categories(start, length, PageCategory.FILE), [(0, FILE_PAGES)]
    )


@case(
    "kselftest.pagemap-ioctl.file.written", origin=f"{ORIGIN}: 113", memory=ANY, features=FEATURES
)
def file_written(ctx: Context) -> None:
    """Private copies of a file's pages are WRITTEN, whether they were protected before or not."""
    length = FILE_PAGES * SMALL_PAGE
    area = Area(ctx, disk_page(ctx, mmap.MAP_PRIVATE, FILE_PAGES), FILE_PAGES)
    area.write()
    area.expect("ranges after a write", (0, FILE_PAGES))
    never = disk_page(ctx, mmap.MAP_PRIVATE, FILE_PAGES)
    _memory.fill(never, length, 2)
    seen = _categories(never, length, WRITTEN)
    ctx.expect("runs of WRITTEN pages, never registered", seen, [(0, FILE_PAGES)])


def _add_zero_page(name: str, text: str, huge: bool) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(2 * HUGE_PAGE // SMALL_PAGE)
        start = -(-region.start // HUGE_PAGE) * HUGE_PAGE
        region.advise_thp(huge)
        _memory.touch(start, HUGE_PAGE, SMALL_PAGE, write=False)
        seen = _categories(start, HUGE_PAGE, PageCategory.PFNZERO)
        ctx.expect("runs of PFNZERO pages", seen, [(0, HUGE_PAGE // SMALL_PAGE)])

    case(
        f"kselftest.pagemap-ioctl.{name}",
        origin=f"{ORIGIN}: {117 if huge else 116}",
        memory=ANON,
        features=FEATURES,
        needs=[needs_thp()] if huge else (),
        summary=text,
    )(run)


_add_zero_page("zero-page", "Pages that were only read are PFNZERO", huge=False)
_add_zero_page(
    "zero-page-thp", "Pages that were only read are PFNZERO, also as a huge zero page", huge=True
)


_HOLES = (
    Variant("written", "a page that was dropped is not protected, so it counts as written"),
    Variant("not-written", "its empty page table was freed, so it is in no category"),
)


def _expect_dropped(ctx: Context, area: Area) -> None:
    length = area.pages * SMALL_PAGE
    _memory.madvise(area.start, length, mmap.MADV_DONTNEED)
    with Pagemap() as pagemap:
        fast = area.runs(area.scan())
        anyof = pagemap.scan(area.start, length, category_anyof_mask=WRITTEN).ranges
    generic, whole = area.runs(anyof), [(0, area.pages)]
    # CONFIG_PT_RECLAIM frees an empty page table, perhaps between the two scans.
    if fast != generic:
        ctx.expect("ranges of the fast query", fast, whole)
    ctx.expect_variant("ranges of the generic query", generic, written=whole, not_written=[])


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
    """A dropped huge page counts as written, in the fast and the generic query."""
    _expect_dropped(ctx, Area(ctx, huge_area(ctx, 1), HUGE_PAGE // SMALL_PAGE))
