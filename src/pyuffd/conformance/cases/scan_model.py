"""PAGEMAP_SCAN compared with a model: many questions about pages in all states (layer L5).

One scan for all categories tells the model the categories of each page. For any other question the
model computes the ranges, `walk_end`, and the pages that become protected.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pyuffd import _memory
from pyuffd._abi import Feature, PageCategory, RegisterMode, ScanFlag, WriteprotectMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._page_model import Entry, Page
from pyuffd.conformance._page_states import STATES, State, prepare
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import ANON, SMALL, missing_wp_features
from pyuffd.conformance.cases.pagemap_scan import FEATURES, WP_SCAN, WRITTEN, end_of, scan
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType

PRESENT, SWAPPED, FILE = PageCategory.PRESENT, PageCategory.SWAPPED, PageCategory.FILE
PFNZERO, HUGE = PageCategory.PFNZERO, PageCategory.HUGE
WPALLOWED = PageCategory.WPALLOWED
# SOFT_DIRTY depends on the kernel's configuration, and on other users of clear_refs.
ASKED = WRITTEN | PRESENT | SWAPPED | FILE | PFNZERO | HUGE | WPALLOWED
SEED = 20
QUESTIONS = 250
NEARLY_SIMPLE = 0.3
STEPS = 60
PAGES = 40
ORIGIN = "fs/proc/task_mmu.c: pagemap_scan_pmd_entry"
MADV_DONTNEED = 4


# The categories of each state


def _categories(page: Page, memory: MemoryType) -> int:
    """Return the categories of a page; for a hole, kernels differ and the case has variants."""
    found = PageCategory(0)
    match page.entry:
        case Entry.PAGE:
            found |= PRESENT
            if memory.shared or (page.cache is not None and page.value == page.cache):
                found |= FILE
        case Entry.ZERO:
            found |= PRESENT | PFNZERO
        case Entry.NONE:
            return int(HUGE if memory.is_hugetlb else 0)
        case _:
            found |= SWAPPED
    if not page.wp:
        found |= WRITTEN
    return int(found | (HUGE if memory.is_hugetlb else PageCategory(0)))


HOLES = (
    Variant("nothing", "a hole is in no category"),
    Variant("written", "a hole is not protected, so it counts as written"),
)


def _add_state(state: State) -> None:
    def run(ctx: Context) -> None:
        features = missing_wp_features(ctx.memory) | state.features
        subject, page = prepare(ctx, state, features)
        asked = {"mask": 0, "returned": int(ASKED)}
        seen = scan(ctx, subject.at, subject.at + ctx.page, **asked)
        ctx.expect("errno of the scan", seen.errno, 0)
        found = {categories for _, _, categories in seen.ranges}
        ctx.expect("ranges of the scan", seen.count, 1)
        (categories,) = found
        wanted = _categories(page, ctx.memory)
        if state.pages > 1 and ctx.memory.is_anon:
            wanted |= int(HUGE)
        name = "categories"
        if page.entry is not Entry.NONE:
            ctx.expect(name, hex(categories), hex(wanted))
            return
        # A hugetlb hole without a page table is not HUGE, so ignore that category.
        seen_as = categories & ~int(HUGE)
        ctx.expect_variant(name, hex(seen_as), nothing=hex(0), written=hex(int(WRITTEN)))

    case(
        f"PAGEMAP_SCAN.of.{state.name}",
        summary=f"A scan reports the right categories of a page {state.text}",
        origin="fs/proc/task_mmu.c: pagemap_page_category",
        memory=state.memory,
        features=lambda memory: missing_wp_features(memory) | state.features | FEATURES,
        needs=state.needs,
        variants=HOLES,
    )(run)


for _state in STATES:
    _add_state(_state)


# Questions


@dataclass(frozen=True)
class Question:
    """The masks and limits of one scan."""

    mask: int
    anyof: int
    inverted: int
    returned: int
    room: int
    max_pages: int
    first: int
    last: int

    @property
    def is_simple(self) -> bool:
        """Whether it asks for WRITTEN only: the kernel has a loop of its own for that."""
        masks = (self.mask, self.anyof, self.inverted, self.returned)
        return masks == (int(WRITTEN), 0, 0, int(WRITTEN))

    def matches(self, categories: int) -> bool:
        """Return whether a page with these categories matches."""
        categories ^= self.inverted
        if categories & self.mask != self.mask:
            return False
        return not self.anyof or bool(categories & self.anyof)


@dataclass
class Answer:
    """The expected result of a scan: ranges (first page, end, categories), its end, its pages."""

    ranges: list[tuple[int, int, int]]
    end: int
    pages: list[int]


def _answer(question: Question, pages: list[int]) -> Answer:
    found = Answer([], question.last, [])
    for index in range(question.first, question.last):
        if not question.matches(pages[index]):
            continue
        shown = pages[index] & question.returned
        if question.max_pages and len(found.pages) == question.max_pages:
            found.end = index
            break
        if found.ranges and found.ranges[-1][1:] == (index, shown):
            found.ranges[-1] = (found.ranges[-1][0], index + 1, shown)
        elif len(found.ranges) == question.room:
            found.end = index
            break
        else:
            found.ranges.append((index, index + 1, shown))
        found.pages.append(index)
    return found


def _question(dice: random.Random) -> Question:
    def masks(chance: float) -> int:
        bits = [bit for bit in ASKED if dice.random() < chance]
        return sum(int(bit) for bit in bits)

    # Mostly few categories at a time: with many of them hardly any page matches.
    asked = {
        "mask": masks(0.15) & ~int(HUGE),
        "anyof": masks(0.3) if dice.random() < 0.5 else 0,
        "inverted": masks(0.3) & ~int(WPALLOWED | HUGE),
        "returned": masks(0.5),
    }
    if dice.random() < NEARLY_SIMPLE:
        # One mask away from the question that the kernel has a loop of its own for.
        name = dice.choice(list(asked))
        asked = {"mask": int(WRITTEN), "anyof": 0, "inverted": 0, "returned": int(WRITTEN)} | {
            name: asked[name]
        }
    first = dice.randrange(PAGES)
    return Question(
        **asked,
        room=dice.choice((1, 2, 3, 5, PAGES)),
        max_pages=dice.choice((0, 0, 1, 2, 7, PAGES)),
        first=first if dice.random() < 0.5 else 0,
        last=dice.randrange(first + 1, PAGES + 1) if dice.random() < 0.5 else PAGES,
    )


def _ask(ctx: Context, region: Region, question: Question, flags: int) -> Answer:
    seen = scan(
        ctx,
        region.start + question.first * ctx.page,
        region.start + question.last * ctx.page,
        flags=flags,
        room=question.room,
        max_pages=question.max_pages,
        mask=question.mask,
        anyof=question.anyof,
        inverted=question.inverted,
        returned=question.returned,
    )
    ctx.expect("errno of the scan", seen.errno, 0)

    def index(at: int) -> int:
        return (at - region.start) // ctx.page

    ranges = [(index(start), index(end), categories) for start, end, categories in seen.ranges]
    return Answer(ranges, index(seen.walk_end), [])


def _mixed(ctx: Context) -> Region:
    """Make pages in many states: written, protected, read, dropped, and combinations."""
    region = ctx.make(PAGES)
    ctx.register(region, RegisterMode.WP)
    for index in range(PAGES):
        at = region.start + index * ctx.page
        kind = index % 10 if index < PAGES // 2 else index * 7 % 10
        if kind in (0, 1, 2, 6):
            ctx.write(at, b"\1")
        if kind in (3, 4):
            ctx.read(at)
        if kind in (2, 4, 5):
            ctx.uffd.writeprotect(at, ctx.page)
        if kind == 6:
            region.madvise(MADV_DONTNEED, at - region.start, ctx.page)
    return region


def _states_of(ctx: Context, region: Region) -> list[int]:
    """Return the categories of each page, found by one scan for all categories."""
    whole = Question(0, 0, 0, int(ASKED), PAGES, 0, 0, PAGES)
    found = _ask(ctx, region, whole, 0)
    pages = [0] * PAGES
    covered = 0
    for first, end, categories in found.ranges:
        for index in range(first, end):
            pages[index] = categories
            covered += 1
    ctx.expect("pages that a scan for anything reports", covered, PAGES)
    return pages


def _as_seen_by(ctx: Context, region: Region, question: Question, pages: list[int]) -> list[int]:
    """Return the categories that a question sees: on kernels with a bug, loops differ for holes."""
    if not question.is_simple:
        return pages
    found = {
        (at - region.start) // ctx.page
        for start, end, _ in scan(ctx, region.start, end_of(region)).ranges
        for at in range(start, end, ctx.page)
    }
    return [int(WRITTEN) if index in found else 0 for index in range(PAGES)]


def _compare(ctx: Context, question: Question, seen: Answer, wanted: Answer) -> None:
    ctx.note(f"{question}")
    ctx.expect("ranges, in pages", seen.ranges, wanted.ranges)
    ctx.expect("page of walk_end", seen.end, wanted.end)


@case(
    "PAGEMAP_SCAN.ok.questions",
    origin=ORIGIN,
    memory=SMALL,
    features=FEATURES,
)
def questions(ctx: Context) -> None:
    """For random questions (of a fixed seed), ranges and walk_end are those of a model."""
    region = _mixed(ctx)
    pages = _states_of(ctx, region)
    dice = random.Random(SEED)
    for _ in range(QUESTIONS):
        question = _question(dice)
        wanted = _answer(question, _as_seen_by(ctx, region, question, pages))
        _compare(ctx, question, _ask(ctx, region, question, 0), wanted)
    after = _states_of(ctx, region)
    ctx.expect("whether the states are unchanged", after == pages, True)


@case(
    "PAGEMAP_SCAN.ok.questions-protecting",
    origin=ORIGIN,
    memory=SMALL,
    features=FEATURES,
)
def questions_protecting(ctx: Context) -> None:
    """With WP_MATCHING, random questions protect just the pages that are reported and written."""
    region = _mixed(ctx)
    dice = random.Random(SEED + 1)
    for _ in range(STEPS):
        pages = _states_of(ctx, region)
        question = _question(dice)
        view = _as_seen_by(ctx, region, question, pages)
        wanted = _answer(question, view)
        _compare(ctx, question, _ask(ctx, region, question, int(WP_SCAN)), wanted)
        after = _states_of(ctx, region)
        changed = [index for index in wanted.pages if view[index] & int(WRITTEN)]
        for index in range(PAGES):
            is_written = bool(after[index] & int(WRITTEN))
            if index in changed and is_written:
                ctx.fail(f"page {index} afterwards", "written", f"protected; {question}")
            if index not in changed and after[index] != pages[index]:
                seen = hex(after[index])
                ctx.fail(f"page {index} afterwards", seen, f"{pages[index]:#x} as before")
        # Change some pages for the next question.
        for _ in range(6):
            at = region.start + dice.randrange(PAGES) * ctx.page
            match dice.randrange(3):
                case 0:
                    ctx.write(at, b"\2")
                case 1:
                    ctx.uffd.writeprotect(at, ctx.page, mode=WriteprotectMode(0))
                case _:
                    region.madvise(MADV_DONTNEED, at - region.start, ctx.page)


# Several mappings, page tables and processes


@case(
    "PAGEMAP_SCAN.ok.two-mappings-one-range",
    origin="fs/proc/task_mmu.c: pagemap_scan_push_range",
    memory=ANON,
    features=FEATURES,
    variants=(
        Variant("anywhere", "memory that is not registered counts as written", lacks=Feature.RWP),
        Variant(
            "registered",
            "only memory registered in mode WP counts as written",
            features=Feature.RWP,
        ),
    ),
)
def two_mappings(ctx: Context) -> None:
    """Pages of two mappings are one range if they have the same categories, else two ranges."""
    region = ctx.make(4)
    region.fill(1)
    middle = region.start + 2 * ctx.page
    ctx.register(region, RegisterMode.WP)
    _memory.madvise(middle, 2 * ctx.page, 10)  # MADV_DONTFORK makes it another mapping
    seen = scan(ctx, region.start, end_of(region))
    whole = (region.start, end_of(region), int(WRITTEN))
    ctx.expect("ranges of the scan", seen.ranges, (whole,))
    both = int(WRITTEN | WPALLOWED)
    ctx.uffd.unregister(middle, 2 * ctx.page)
    seen = scan(ctx, region.start, end_of(region), returned=both)
    first, second = (region.start, middle, both), (middle, end_of(region), int(WRITTEN))
    ctx.expect_variant(
        "ranges, the second not registered",
        seen.ranges,
        anywhere=(first, second),
        registered=(first,),
    )
    inverted = {"mask": int(WPALLOWED), "inverted": int(WPALLOWED)}
    seen = scan(ctx, region.start, end_of(region), returned=int(PRESENT | WRITTEN), **inverted)
    ctx.expect_variant(
        "ranges that are not WPALLOWED",
        seen.ranges,
        anywhere=((middle, end_of(region), int(PRESENT | WRITTEN)),),
        registered=((middle, end_of(region), int(PRESENT)),),
    )
    seen = scan(ctx, region.start, end_of(region), flags=int(ScanFlag.WP_MATCHING))
    ctx.expect("pages found by a scan that protects", seen.pages, 2)
    bits = [ctx.is_protected(region.start + index * ctx.page) for index in range(4)]
    ctx.expect("which pages are protected", bits, [True, True, False, False])


@case(
    "PAGEMAP_SCAN.ok.untouched-in-part",
    origin="fs/proc/task_mmu.c: pagemap_scan_pte_hole",
    memory=ANON,
    features=FEATURES,
    variants=(
        Variant("written", "memory that was never touched counts as written"),
        Variant("nothing", "memory that was never touched is in no category; no feature bit tells"),
    ),
)
def untouched_in_part(ctx: Context) -> None:
    """With max_pages inside memory without a page table, a scan protects just that many pages."""
    region = ctx.make(1536)
    start = -(-region.start // (512 * SMALL_PAGE)) * 512 * SMALL_PAGE
    ctx.register(region, RegisterMode.WP)
    # In the next page table, where a scan that ignores the limit would stop.
    ctx.write(start + 600 * SMALL_PAGE, b"\1")
    end = start + 1024 * SMALL_PAGE
    seen = scan(ctx, start, end, flags=int(WP_SCAN), max_pages=100)
    if ctx.expect_variant("pages found", seen.pages, written=100, nothing=1) == "nothing":
        return
    ctx.expect("pages walked", (seen.walk_end - start) // SMALL_PAGE, 100)
    bits = [ctx.is_protected(start + index * SMALL_PAGE) for index in (0, 99, 100, 511)]
    ctx.expect("which pages are protected", bits, [True, True, False, False])


@case(
    "PAGEMAP_SCAN.ok.other-process",
    origin="fs/proc/task_mmu.c: do_pagemap_scan",
    memory=SMALL,
    features=lambda memory: FEATURES | Feature.EVENT_FORK,
)
def other_process(ctx: Context) -> None:
    """A scan of another process finds and protects the pages of that process only."""
    region = ctx.make(4)
    ctx.register(region, RegisterMode.WP)
    region.fill(1)
    child = ctx.fork()
    ctx.uffd.writeprotect(region)
    for at in (1, 3):
        ctx.expect(
            "the write", ctx.silently(child.write, region.start + at * ctx.page, b"\2"), None
        )
    flags = int(WP_SCAN)
    seen = scan(ctx, region.start, end_of(region), flags=flags, pid=child.pid)
    ctx.expect("errno and pages", (seen.errno, seen.pages), (0, 4))
    bits = [ctx.is_protected(region.start + at * ctx.page, pid=child.pid) for at in range(4)]
    ctx.expect("which pages of the child are protected", bits, [True] * 4)
    middle = region.start + ctx.page
    ctx.expect("the write", ctx.silently(child.write, middle, b"\3"), None)
    seen = scan(ctx, region.start, end_of(region), pid=child.pid)
    ctx.expect(
        "ranges written in the child", seen.ranges, ((middle, middle + ctx.page, int(WRITTEN)),)
    )
    ctx.expect("ranges written in the parent", scan(ctx, region.start, end_of(region)).count, 0)


@case(
    "PAGEMAP_SCAN.ok.protects-without-room",
    origin=ORIGIN,
    memory=SMALL,
    features=FEATURES,
    variants=(
        Variant("asked", "only pages that match are protected"),
        Variant(
            "everything", "without room for ranges all pages are protected, which is a kernel bug"
        ),
    ),
)
def without_room(ctx: Context) -> None:
    """A scan without room for ranges that protects swapped pages leaves present pages alone."""
    region = ctx.make(3)
    ctx.register(region, RegisterMode.WP)
    region.fill(1)
    seen = scan(ctx, region.start, end_of(region), flags=int(WP_SCAN), room=0, mask=int(SWAPPED))
    ctx.expect("errno and count", (seen.errno, seen.count), (0, 0))
    bits = [ctx.is_protected(region.start + index * ctx.page) for index in range(3)]
    ctx.expect_variant("which pages are protected", bits, asked=[False] * 3, everything=[True] * 3)
