"""Changes of page tables that a thread sees at once, on the CPU that has old entries (layer L5).

A thread stays on one CPU, uses pages, has them protected or moved, and uses them again: where the
kernel forgot the CPU's copies of the entries, the old rights still hold.
"""

from __future__ import annotations

import mmap

from pyuffd import _memory
from pyuffd._abi import Feature, PageCategory, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._thp import mapped_huge
from pyuffd.conformance._types import ALL, ANON, SMALL, wp_features
from pyuffd.conformance._wp import UNPROTECT, WP_WRITE, in_one_place
from pyuffd.conformance.cases.pagemap_scan import FEATURES, WP_SCAN, WRITTEN, end_of, scan
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import Need, needs_thp

PAGES = 6
OLD, NEW = 0x31, 0x32
PER_HUGE = HUGE_PAGE // SMALL_PAGE


@case(
    "UFFDIO_WRITEPROTECT.ok.own-thread-sees-it",
    origin="mm/mprotect.c: tlb_flush_pte_range; mm/hugetlb.c: tlb_remove_huge_tlb_entry",
    features=wp_features,
)
def protects(ctx: Context) -> None:
    """A thread that protects pages that it has just written cannot write them any more."""
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
    """The same of a transparent huge page."""
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


# PAGEMAP_SCAN with WP_MATCHING: each of its loops

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
        # Not the first and the last, whose ranges are easily flushed too much.
        _memory.touch(region.start, region.length, ctx.page, write=True)
        seen = scan(ctx, region.start, end_of(region))
        ctx.expect("pages written again", seen.pages, PAGES * per_page)
        ctx.note(f"of which {count} were protected in between")

    case(
        f"PAGEMAP_SCAN.ok.own-thread-sees-it-{name}",
        summary=f"A thread that scans and protects ({name} reported) reports its next writes",
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
    """The same of a transparent huge page."""
    in_one_place(ctx)
    start = huge_area(ctx, 1)
    ctx.open().register(start, HUGE_PAGE, mode=RegisterMode.WP)
    _memory.touch(start, HUGE_PAGE, SMALL_PAGE, write=True)
    scan(ctx, start, start + HUGE_PAGE, flags=int(WP_SCAN))
    ctx.expect("bytes mapped huge", mapped_huge(start), HUGE_PAGE)
    _memory.touch(start, SMALL_PAGE, SMALL_PAGE, write=True)
    seen = scan(ctx, start, start + HUGE_PAGE)
    ctx.expect("the first page is written", seen.pages > 0, True)


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
        ctx.expect("byte where it is", ctx.read(to), bytes([NEW]))
        ctx.write(start, bytes([OLD]))
        ctx.expect("byte where it is, later", ctx.read(to), bytes([NEW]))

    case(
        f"UFFDIO_MOVE.ok.own-thread-sees-it{name}",
        summary="A thread that has just used a page and moves it finds zeros in its old place",
        origin="mm/userfaultfd.c: ptep_clear_flush; mm/huge_memory.c: pmdp_huge_clear_flush",
        memory=ANON,
        features=Feature.MOVE,
        needs=needs,
    )(run)


_add_move("", SMALL_PAGE, ())
_add_move("-huge", HUGE_PAGE, (needs_thp(),))
