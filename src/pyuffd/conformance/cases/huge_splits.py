"""Huge pages that the kernel splits, or marks for reclaim (layer L5).

Advice for a part of a transparent huge page splits the page itself, not only its mapping. Each
entry becomes a migration entry and then an entry again, and a page of zeros becomes the zero page.
All of them must keep their protection.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

from pyuffd import _memory
from pyuffd._abi import RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._thp import huge_file, mapped_huge
from pyuffd.conformance._types import ANON, SHMEM, wp_features
from pyuffd.conformance._wp import (
    DATA,
    PUNCH_HOLE,
    UNPROTECT,
    expect_read,
    expect_silent_write,
    expect_write_fault,
)
from pyuffd.conformance.cases.huge_parts import protected_pages
from pyuffd.conformance.cases.pagemap_scan_memory import huge_area
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import needs_thp

PAGES = HUGE_PAGE // SMALL_PAGE
MADV_COLD = 20
# The pages that stay writable in the cases of parts, where the mapping is split before the page.
WRITABLE = (5, 6, 300)
ZEROS = (5, 9, 10, PAGES - 1)
ADVISED = 40


@dataclass(frozen=True)
class Advice:
    """A call of madvise(2).

    Attributes:
        name: Its name in ids.
        text: Its text in summaries.
        number: The advice.
        length: The length in bytes, from page ADVISED on; from the start if it is the whole page.
    """

    name: str
    text: str
    number: int
    length: int

    @property
    def offset(self) -> int:
        """The offset at which it begins."""
        return ADVISED * SMALL_PAGE if self.length < HUGE_PAGE else 0


ADVICE = (
    Advice("cold", "MADV_COLD of one page", MADV_COLD, SMALL_PAGE),
    Advice("free", "MADV_FREE of one page", mmap.MADV_FREE, SMALL_PAGE),
    Advice("cold-whole", "MADV_COLD of all", MADV_COLD, HUGE_PAGE),
    Advice("free-whole", "MADV_FREE of all", mmap.MADV_FREE, HUGE_PAGE),
)


def _expect_all_kept(ctx: Context, start: int, wanted: list[int]) -> None:
    seen = protected_pages(start)
    missing, more = sorted({*wanted} - {*seen}), sorted({*seen} - {*wanted})
    ctx.expect("pages that lost their protection", missing[:10], [])
    ctx.expect("other pages that became protected", more[:10], [])


def _add(advice: Advice, *, parts: bool) -> None:
    is_freed = advice.number == mmap.MADV_FREE

    def run(ctx: Context) -> None:
        start = huge_area(ctx, 1)
        _memory.fill(start, HUGE_PAGE, DATA)
        for index in ZEROS:
            _memory.fill(start + index * SMALL_PAGE, SMALL_PAGE, 0)
        ctx.open().register(start, HUGE_PAGE, mode=RegisterMode.WP)
        ctx.uffd.writeprotect(start, HUGE_PAGE)
        writable = WRITABLE if parts else ()
        for index in writable:
            ctx.uffd.writeprotect(start + index * SMALL_PAGE, SMALL_PAGE, mode=UNPROTECT)
        wanted = [index for index in range(PAGES) if index not in writable]
        _expect_all_kept(ctx, start, wanted)
        _memory.madvise(start + advice.offset, advice.length, advice.number)
        ctx.note(f"KiB mapped huge after {advice.text}: {mapped_huge(start) >> 10}")
        _expect_all_kept(ctx, start, wanted)
        if is_freed and advice.length == HUGE_PAGE:
            return  # reclaim may drop all of it at any time
        for index in (ZEROS[1], ZEROS[1] - 1, PAGES - 1, ADVISED + 1):
            at = start + index * SMALL_PAGE
            expect_read(ctx, at, 0 if index in ZEROS else DATA)
            expect_write_fault(ctx, at)
            ctx.expect("the next byte", ctx.read(at + 1), bytes([0 if index in ZEROS else DATA]))
        for index in writable:
            expect_read(ctx, start + index * SMALL_PAGE, 0 if index in ZEROS else DATA)
            expect_silent_write(ctx, start + index * SMALL_PAGE)

    what = "a huge page protected in part" if parts else "a protected huge page"
    case(
        f"thp.advice.{advice.name}{'-of-parts' if parts else ''}",
        summary=f"{advice.text} of {what} keeps all protection, also that of pages of zeros",
        origin="mm/huge_memory.c: split_folio; mm/rmap.c: try_to_migrate_one; mm/migrate.c: "
        "remove_migration_pte, try_to_map_unused_to_zeropage",
        memory=ANON,
        features=wp_features,
        needs=[needs_thp()],
    )(run)


for _advice in ADVICE:
    for _parts in (False, True):
        _add(_advice, parts=_parts)


@case(
    "thp.punch-hole.keeps-other-markers",
    origin="mm/huge_memory.c: split_folio; mm/rmap.c: try_to_unmap_one",
    memory=SHMEM,
    features=wp_features,
    needs=[needs_thp()],
)
def punched(ctx: Context) -> None:
    """Punching a hole in a huge page of a file splits it; other protected pages stay protected."""
    region = huge_file(ctx, DATA)
    assert region.fd is not None
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    # Map the small pages of the huge one.
    _memory.touch(region.start, region.length, SMALL_PAGE, write=False)
    everything = list(range(PAGES))
    _expect_all_kept(ctx, region.start, everything)
    _memory.fallocate(region.fd, PUNCH_HOLE, ADVISED * SMALL_PAGE, SMALL_PAGE)
    seen = protected_pages(region.start)
    left = [index for index in everything if index != ADVISED]
    lost = sorted({*left} - {*seen})
    ctx.expect("pages that lost their protection", lost[:10], [])
    for index in (0, ADVISED - 1, ADVISED + 1, PAGES - 1):
        at = region.start + index * SMALL_PAGE
        expect_read(ctx, at, DATA)
        expect_write_fault(ctx, at)
