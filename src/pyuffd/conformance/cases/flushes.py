"""TLB flushes: a thread sees a change of page tables at once on the CPU that it runs on (layer L5).

A thread stays on one CPU. It uses pages, protects, moves, drops or collapses them, and uses them
again. If the kernel has not flushed the TLB, the old access rights or the old page are still used.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

from pyuffd import _memory
from pyuffd._abi import Feature, PageCategory, RegisterMode
from pyuffd._events import Remap
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._thp import MADV_COLLAPSE, mapped_huge
from pyuffd.conformance._types import ALL, ANON, SMALL, missing_features, wp_features
from pyuffd.conformance._wp import (
    MISSING_READ,
    PUNCH_HOLE,
    READ_WRITE,
    UNPROTECT,
    WP_WRITE,
    expect_fault,
    in_one_place,
    page_out,
    reserve,
)
from pyuffd.conformance.cases.moved_tables import DONTUNMAP, FIXED, MAP_FIXED, MAYMOVE
from pyuffd.conformance.cases.pagemap_scan import FEATURES, WP_SCAN, WRITTEN, end_of, scan
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import Need, needs_swap, needs_thp

PAGES = 6
OLD, NEW = 0x31, 0x32
PER_HUGE = HUGE_PAGE // SMALL_PAGE


@case(
    "UFFDIO_WRITEPROTECT.ok.own-thread-sees-it",
    origin="mm/mprotect.c: tlb_flush_pte_range; mm/hugetlb.c: tlb_remove_huge_tlb_entry",
    features=wp_features,
)
def protects(ctx: Context) -> None:
    """A thread that protects pages just after it wrote them faults when it writes them again."""
    in_one_place(ctx)
    region = ctx.make(3)
    ctx.register(region, RegisterMode.WP)
    pages = [region.start + index * ctx.page for index in range(3)]

    def work() -> object:
        for at in pages:
            ctx.write(at, b"\1")
        ctx.uffd.writeprotect(region)
        return [ctx.write(at, b"\2") for at in pages]

    writing = ctx.start(work)
    for at in pages:
        ctx.expect_fault(WP_WRITE, at)
        ctx.uffd.writeprotect(at, ctx.page, mode=UNPROTECT)
    ctx.expect("the writes", writing.result(), [None] * 3)


@case(
    "UFFDIO_WRITEPROTECT.ok.own-thread-sees-it-huge",
    origin="mm/huge_memory.c: tlb_flush_pmd_range",
    memory=ANON,
    features=wp_features,
    needs=[needs_thp()],
)
def protects_huge(ctx: Context) -> None:
    """A thread that protects a transparent huge page just after a write faults on the next."""
    in_one_place(ctx)
    start = huge_area(ctx, 1)
    ctx.open().register(start, HUGE_PAGE, mode=RegisterMode.WP)

    def work() -> object:
        ctx.write(start, b"\1")
        ctx.uffd.writeprotect(start, HUGE_PAGE)
        return ctx.write(start, b"\2")

    writing = ctx.start(work)
    ctx.expect_fault(WP_WRITE, start)
    ctx.uffd.writeprotect(start, SMALL_PAGE, mode=UNPROTECT)
    ctx.expect("the write", writing.result(), None)


@case(
    "UFFDIO_WRITEPROTECT.ok.own-thread-sees-it-swapped",
    origin="mm/rmap.c: try_to_unmap_flush; mm/mprotect.c: change_pte_range",
    memory=SMALL,
    features=wp_features,
    needs=[needs_swap()],
)
def protects_swapped(ctx: Context) -> None:
    """A thread that protects a page just after a write and swap-out faults on the next write."""
    in_one_place(ctx)
    region = ctx.make(1)
    # Swap it out once before, so that the file has the page, and it has been in swap.
    region.fill(OLD)
    page_out(ctx, region)
    ctx.register(region, RegisterMode.WP)

    def work() -> object:
        ctx.write(region.start, b"\1")
        # Do nothing else in between, or other entries replace that of the page in the TLB.
        region.pageout()
        ctx.uffd.writeprotect(region)
        return ctx.write(region.start, b"\2")

    writing = ctx.start(work)
    expect_fault(ctx, writing, WP_WRITE, region.start)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect("the write", writing.result(), None)


# PAGEMAP_SCAN with WP_MATCHING, by each of its loops

QUESTIONS: tuple[tuple[str, dict[str, int]], ...] = (
    ("nothing", {"room": 0}),
    ("written", {}),
    ("more", {"returned": int(WRITTEN | PageCategory.PRESENT)}),
    ("part", {"max_pages": 3}),
)


def _add_scan(name: str, asked: dict[str, int]) -> None:
    def run(ctx: Context) -> None:
        in_one_place(ctx)
        region = ctx.make(PAGES)
        ctx.register(region, RegisterMode.WP)
        per_page = ctx.page // SMALL_PAGE
        limit = {
            key: value * per_page if key == "max_pages" else value for key, value in asked.items()
        }
        _memory.touch(region.start, region.length, ctx.page, write=True)
        scan(ctx, region.start, end_of(region), flags=int(WP_SCAN), **limit)
        count = asked.get("max_pages", PAGES)
        # All pages: a flush of too small a range may still include the first and the last.
        _memory.touch(region.start, region.length, ctx.page, write=True)
        seen = scan(ctx, region.start, end_of(region))
        ctx.expect("pages written again", seen.pages, PAGES * per_page)
        ctx.note(f"of which {count} were protected in between")

    case(
        f"PAGEMAP_SCAN.ok.own-thread-sees-it-{name}",
        summary=f"After a scan that protects ({name} reported), the thread's next writes are seen",
        origin="fs/proc/task_mmu.c: flush_tlb_range",
        memory=ALL if name != "part" else SMALL,
        features=FEATURES,
    )(run)


for _question in QUESTIONS:
    _add_scan(*_question)


@case(
    "PAGEMAP_SCAN.ok.own-thread-sees-it-huge",
    origin="fs/proc/task_mmu.c: pagemap_scan_thp_entry",
    memory=ANON,
    features=FEATURES,
    needs=[needs_thp()],
)
def scan_huge(ctx: Context) -> None:
    """After a scan that protects a transparent huge page, the thread's next write is seen."""
    in_one_place(ctx)
    start = huge_area(ctx, 1)
    ctx.open().register(start, HUGE_PAGE, mode=RegisterMode.WP)
    _memory.touch(start, HUGE_PAGE, SMALL_PAGE, write=True)
    scan(ctx, start, start + HUGE_PAGE, flags=int(WP_SCAN))
    ctx.expect("bytes mapped huge", mapped_huge(start), HUGE_PAGE)
    _memory.touch(start, SMALL_PAGE, SMALL_PAGE, write=True)
    seen = scan(ctx, start, start + HUGE_PAGE)
    ctx.expect("whether the first page counts as written", seen.pages > 0, True)


# MOVE


def _add_move(name: str, length: int, needs: tuple[Need, ...]) -> None:
    def run(ctx: Context) -> None:
        in_one_place(ctx)
        region = ctx.make(2 * PER_HUGE if length > SMALL_PAGE else 1)
        to = region.start
        if length > SMALL_PAGE:
            region.advise_thp()
            to = -(-region.start // HUGE_PAGE) * HUGE_PAGE
            start = huge_area(ctx, 1)
        else:
            start = ctx.make(1).start
        _memory.madvise(start, length, mmap.MADV_DONTFORK)
        _memory.fill(start, length, NEW)
        ctx.register(region, RegisterMode.MISSING)
        ctx.expect("byte before", ctx.read(start), bytes([NEW]))
        answer = ctx.ioctl("MOVE", to, start, length)
        ctx.expect("byte of the source afterwards", ctx.read(start), b"\0")
        ctx.expect("errno and .move", (answer.errno, answer.result), (0, length))
        ctx.expect("byte of the destination", ctx.read(to), bytes([NEW]))
        ctx.write(start, bytes([OLD]))
        ctx.expect(
            "byte of the destination after a write to the source", ctx.read(to), bytes([NEW])
        )

    case(
        f"UFFDIO_MOVE.ok.own-thread-sees-it{name}",
        summary="A thread that moves a page just after using it reads zeros at the source",
        origin="mm/userfaultfd.c: ptep_clear_flush; mm/huge_memory.c: pmdp_huge_clear_flush",
        memory=ANON,
        features=Feature.MOVE,
        needs=needs,
    )(run)


_add_move("", SMALL_PAGE, ())
_add_move("-huge", HUGE_PAGE, (needs_thp(),))


@case(
    "UFFDIO_MOVE.ok.own-thread-sees-it-zero",
    origin="mm/userfaultfd.c: move_zeropage_pte",
    memory=ANON,
    features=Feature.MOVE,
)
def move_zero(ctx: Context) -> None:
    """A thread that moves the zero page just after using it finds its old place missing."""
    in_one_place(ctx)
    region = ctx.make(2)
    to, start = region.start, region.start + ctx.page
    ctx.register(region, RegisterMode.MISSING)
    ctx.uffd.zeropage(start, ctx.page)

    def work() -> object:
        before = ctx.read(start)
        answer = ctx.ioctl("MOVE", to, start, ctx.page)
        return before, answer.errno, ctx.read(start)

    _expect_missing(ctx, work, start, (b"\0", 0, bytes([NEW])))


# Pages that leave their place


def _expect_missing(ctx: Context, work: Callable[[], object], at: int, wanted: object) -> None:
    """Expect a missing fault of a thread that has just used the page."""
    working = ctx.start(work)
    expect_fault(ctx, working, MISSING_READ, at)
    ctx.uffd.copy(at, bytes([NEW]) * ctx.page)
    ctx.expect("what the thread saw", working.result(), wanted)


@case(
    "fault.missing.own-thread-sees-it",
    origin="mm/memory.c: zap_present_folio_ptes; mm/hugetlb.c: __unmap_hugepage_range",
    features=missing_features,
)
def drops(ctx: Context) -> None:
    """A thread that drops a page just after reading it finds it missing."""
    in_one_place(ctx)
    region = ctx.make(3)
    second = region.start + ctx.page

    def drop() -> None:
        if ctx.memory.shared:
            assert region.fd is not None
            _memory.fallocate(region.fd, PUNCH_HOLE, ctx.page, ctx.page)
        else:
            region.madvise(mmap.MADV_DONTNEED, ctx.page, ctx.page)

    try:
        drop()
    except OSError:
        ctx.lack("hugetlb-dontneed", "needs MADV_DONTNEED of hugetlb memory")
    ctx.register(region, RegisterMode.MISSING)
    ctx.uffd.copy(region.start, bytes([OLD]) * region.length)

    def work() -> object:
        before = ctx.read(second)
        drop()
        return before, ctx.read(second)

    _expect_missing(ctx, work, second, (bytes([OLD]), bytes([NEW])))


def _add_mremap(name: str, text: str, length: int, needs: tuple[Need, ...] = ()) -> None:
    is_huge = bool(needs)

    def run(ctx: Context) -> None:
        in_one_place(ctx)
        at = 3 * SMALL_PAGE if length > SMALL_PAGE else 0
        if is_huge:
            start = huge_area(ctx, 1)
            _memory.fill(start, length, OLD)
        else:
            region = ctx.make(2 * length // SMALL_PAGE)
            if region.fd is None:
                region.advise_thp(False)
            start = -(-region.start // length) * length
        to = reserve(ctx, length, length)
        uffd = ctx.open()
        # Close it before the ranges are unmapped, or munmap would wait for its event to be read.
        ctx.callback(uffd.close)
        uffd.register(start, length, mode=RegisterMode.MISSING)
        if not is_huge:
            uffd.copy(start + at, bytes([OLD]) * SMALL_PAGE)

        def work() -> object:
            before = ctx.read(start + at)
            _memory.mremap(start, length, length, MAYMOVE | FIXED | DONTUNMAP, to)
            return before, ctx.read(start + at), ctx.read(to + at)

        working = ctx.start(work)
        ctx.expect("the event", ctx.expect_event(Remap), Remap(start, to, length))
        expect_fault(ctx, working, MISSING_READ, start + at)
        uffd.copy(start + at, bytes([NEW]) * SMALL_PAGE)
        seen = [bytes([value]) for value in (OLD, NEW, OLD)]
        ctx.expect("what the thread saw", working.result(), tuple(seen))

    case(
        f"mremap.{name}.own-thread-sees-it",
        summary=f"A thread that moves {text} just after reading it finds the old place missing",
        origin="mm/mremap.c: move_ptes, move_normal_pmd; mm/huge_memory.c: move_huge_pmd",
        # With a shared file, the page would not be missing in the old place.
        memory=ANON if is_huge else ("anon", "shmem-private"),
        features=lambda memory: missing_features(memory) | Feature.EVENT_REMAP,
        needs=needs,
    )(run)


_add_mremap("page", "a page", SMALL_PAGE)
_add_mremap("page-table", "a page table with a page", HUGE_PAGE)
_add_mremap("huge-page", "a transparent huge page", HUGE_PAGE, (needs_thp(),))


@case(
    "mremap.hugetlb.own-thread-sees-it",
    origin="mm/hugetlb.c: move_hugetlb_page_tables",
    memory=("hugetlb",),
    features=missing_features,
)
def moves_hugetlb(ctx: Context) -> None:
    """A thread that moves a hugetlb page just after reading it no longer reads it at the source."""
    in_one_place(ctx)
    # In the middle, so that no page table is freed, which would flush everything.
    region = ctx.make(3)
    at = region.start + ctx.page
    ctx.register(region, RegisterMode.MISSING)
    ctx.uffd.copy(region.start, bytes([OLD]) * region.length)
    to = reserve(ctx, ctx.page)
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED

    def work() -> object:
        before = ctx.read(at)
        try:
            _memory.mremap(at, ctx.page, ctx.page, MAYMOVE | FIXED, to)
        except OSError:
            return None
        _memory.mmap(ctx.page, READ_WRITE, anonymous, -1, 0, at)
        return before, ctx.read(at), ctx.read(to)

    seen = ctx.start(work).result()
    if seen is None:
        ctx.lack("hugetlb-mremap", "needs mremap of hugetlb memory")
    ctx.expect("what the thread saw", seen, (bytes([OLD]), b"\0", bytes([OLD])))


@case(
    "thp.collapse.own-thread-sees-it",
    origin="mm/khugepaged.c: collapse_huge_page, collapse_file",
    memory=("anon", "shmem"),
    features=missing_features,
    needs=[needs_thp()],
)
def collapses(ctx: Context) -> None:
    """A thread that collapses pages just after writing them writes to the huge page next."""
    in_one_place(ctx)
    region = ctx.make(PER_HUGE)
    if ctx.memory.is_anon:
        region.advise_thp(False)
    region.fill(OLD)
    ctx.register(region, RegisterMode.MISSING)
    if ctx.memory.is_anon:
        region.advise_thp()
    pages = [region.start + index * SMALL_PAGE for index in (0, 7, PER_HUGE - 1)]

    def work() -> object:
        for at in pages:
            ctx.write(at, b"\1")
        region.madvise(MADV_COLLAPSE)
        return [ctx.write(at, bytes([NEW])) for at in pages]

    try:
        ctx.expect("the writes", ctx.start(work).result(), [None] * len(pages))
    except OSError as error:
        ctx.lack("collapse", f"MADV_COLLAPSE: {error.strerror}")
    # Read through the page tables, not through the CPU's TLB.
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        seen = [os.pread(memory.fileno(), 2, at) for at in pages]
    ctx.expect("bytes in /proc/self/mem", seen, [bytes([NEW, OLD])] * len(pages))
