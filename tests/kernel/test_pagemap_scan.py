"""PAGEMAP_SCAN: all arguments, and the loop around the ioctl."""

from __future__ import annotations

import errno
import mmap
import random
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pyuffd import (
    Feature,
    PageBit,
    PageCategory,
    Pagemap,
    PageRanges,
    ProcessGoneError,
    Region,
    RegisterMode,
    ScanFlag,
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
    Userfaultfd,
    lowlevel,
)
from pyuffd.testing import needs, needs_hugepages, needs_privilege, needs_swap, swap_out
from pyuffd.testing._memory_types import HUGE_PAGE
from tests._memory import PAGE, Memory

PRESENT, WRITTEN = PageCategory.PRESENT, PageCategory.WRITTEN
EVERYTHING = PageCategory(0x1FF)
PROTECT = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC

pytestmark = needs(Feature.WP_ASYNC)


@pytest.fixture
def pagemap() -> Iterator[Pagemap]:
    with Pagemap() as own:
        yield own


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    with Userfaultfd(features=Feature.WP_ASYNC | Feature.WP_UNPOPULATED) as own:
        yield own


def small_pages(count: int) -> Region:
    region = Region.anonymous(count * PAGE)
    region.madvise(mmap.MADV_NOHUGEPAGE)
    return region


def write_every(region: Region, step: int, first: int = 0) -> int:
    """Write every `step`-th page, return how many."""
    pages = range(first, region.length // PAGE, step)
    for page in pages:
        region.fill(1, page * PAGE, 8)
    return len(pages)


def track(uffd: Userfaultfd, region: Region) -> None:
    uffd.register(region, mode=RegisterMode.WP)
    uffd.writeprotect(region)


def indexes(ranges: PageRanges, region: Region) -> list[tuple[int, int]]:
    """Return the ranges as page numbers of the region."""
    return [
        ((found.start - region.start) // PAGE, (found.end - region.start) // PAGE)
        for found in ranges
    ]


def test_support_is_found_by_asking(pagemap: Pagemap) -> None:
    categories, flags = pagemap.scan_support()
    assert WRITTEN | PRESENT | PageCategory.HUGE in categories
    assert PROTECT in flags


def test_written_pages(memory: Memory, uffd: Userfaultfd, pagemap: Pagemap) -> None:
    region = memory.pages(8)
    track(uffd, region)
    assert len(pagemap.scan(region, category_mask=WRITTEN).ranges) == 0
    region.fill(1, 2 * memory.page_size, 3 * memory.page_size)
    result = pagemap.scan(region, category_mask=WRITTEN, flags=PROTECT)
    (found,) = result.ranges
    assert found.start == region.start + 2 * memory.page_size
    assert found.end == region.start + 5 * memory.page_size
    assert found.categories == WRITTEN
    assert result.walk_end == region.start + region.length
    assert len(pagemap.scan(region, category_mask=WRITTEN).ranges) == 0
    region.fill(2, 7 * memory.page_size, 1)
    assert pagemap.scan(region, category_mask=WRITTEN).ranges.pages(memory.page_size) == 1


def test_without_ranges_it_only_protects(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    with small_pages(100) as region:
        track(uffd, region)
        region.fill(1)
        result = pagemap.scan(region, category_mask=WRITTEN, flags=PROTECT, vec_len=0)
        assert (len(result.ranges), result.walk_end) == (0, region.start + region.length)
        assert len(pagemap.scan(region, category_mask=WRITTEN).ranges) == 0


def test_a_part_of_a_range(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    with small_pages(100) as region:
        track(uffd, region)
        region.fill(1)
        part = pagemap.scan(region.start + PAGE, 2 * PAGE, category_mask=WRITTEN, flags=PROTECT)
        assert indexes(part.ranges, region) == [(1, 3)]
        rest = pagemap.scan(region, category_mask=WRITTEN)
        assert indexes(rest.ranges, region) == [(0, 1), (3, 100)]


@pytest.mark.parametrize("count", [511, 512, 513, 1024, 26_215, 50_000])
def test_ranges_beyond_every_internal_limit(
    count: int, uffd: Userfaultfd, pagemap: Pagemap
) -> None:
    """The kernel returns 512 ranges at a time; the first ioctl has room for 43690."""
    with small_pages(2 * count) as region:
        track(uffd, region)
        for _ in range(2):
            assert write_every(region, 2) == count
            for flags in (ScanFlag(0), PROTECT):
                result = pagemap.scan(region, category_mask=WRITTEN, flags=flags)
                assert result.walk_end == region.start + region.length
                assert indexes(result.ranges, region) == [(2 * n, 2 * n + 1) for n in range(count)]
            assert len(pagemap.scan(region, category_mask=WRITTEN).ranges) == 0


def test_vec_len_pages_through_a_range(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    with small_pages(2000) as region:
        track(uffd, region)
        written = write_every(region, 3)
        seen: list[tuple[int, int]] = []
        at = region.start
        while at < region.start + region.length:
            result = pagemap.scan(
                at, region.start + region.length - at, category_mask=WRITTEN, vec_len=50
            )
            assert len(result.ranges) <= 50
            assert result.walk_end > at
            seen += indexes(result.ranges, region)
            at = result.walk_end
        assert seen == [(3 * n, 3 * n + 1) for n in range(written)]


@pytest.mark.parametrize(
    ("step", "limits", "found", "walk_end"),
    [
        (1, {}, 1, 1000),
        (1, {"vec_len": 1}, 1, 1000),
        (1, {"max_pages": 1000}, 1, 1000),
        (1, {"max_pages": 500}, 1, 500),
        (1, {"max_pages": 1}, 1, 1),
        (2, {}, 500, 1000),
        (2, {"vec_len": 1}, 1, 2),
        (2, {"vec_len": 1, "max_pages": 1000}, 1, 2),
        (2, {"vec_len": 500, "max_pages": 1000}, 500, 1000),
        (2, {"max_pages": 500}, 500, 1000),
        (2, {"max_pages": 1}, 1, 2),
    ],
)
def test_walk_end(
    step: int,
    limits: dict[str, int],
    found: int,
    walk_end: int,
    uffd: Userfaultfd,
    pagemap: Pagemap,
) -> None:
    with small_pages(1000) as region:
        track(uffd, region)
        write_every(region, step)
        result = pagemap.scan(region, category_mask=WRITTEN, **limits)  # type: ignore[arg-type]
        assert len(result.ranges) == found
        assert (result.walk_end - region.start) // PAGE == walk_end


def test_max_pages_with_protection(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    with small_pages(3000) as region:
        track(uffd, region)
        left = write_every(region, 2)
        while left:
            taken = min(left, 700)
            result = pagemap.scan(region, category_mask=WRITTEN, flags=PROTECT, max_pages=700)
            assert result.ranges.pages() == taken
            left -= taken
        assert len(pagemap.scan(region, category_mask=WRITTEN).ranges) == 0


@needs_hugepages(4)
def test_max_pages_and_hugetlb(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    """A page that would be protected only in part is left for the next call."""
    with Region.memfd(4 * HUGE_PAGE, huge_page_size=HUGE_PAGE) as region:
        track(uffd, region)
        region.fill(1)
        result = pagemap.scan(region, category_mask=WRITTEN, flags=PROTECT, max_pages=1100)
        assert indexes(result.ranges, region) == [(0, 1024)]
        assert result.walk_end == region.start + 2 * HUGE_PAGE
        with pytest.raises(UffdOSError) as caught:
            pagemap.scan(region, category_mask=WRITTEN, flags=PROTECT, max_pages=511)
        assert caught.value.errno == errno.ENOSPC
        rest = pagemap.scan(region, category_mask=WRITTEN, flags=PROTECT)
        assert indexes(rest.ranges, region) == [(1024, 2048)]


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({"category_anyof_mask": EVERYTHING, "return_mask": WRITTEN | PRESENT}, WRITTEN | PRESENT),
        ({"category_mask": WRITTEN | PRESENT}, WRITTEN | PRESENT),
        ({"category_mask": WRITTEN, "category_anyof_mask": PRESENT}, WRITTEN | PRESENT),
        ({"category_mask": WRITTEN, "return_mask": PRESENT}, PRESENT),
        ({"category_mask": WRITTEN, "return_mask": PageCategory.FILE}, PageCategory(0)),
        ({"category_mask": WRITTEN, "category_inverted": WRITTEN}, None),
        ({"category_mask": PRESENT, "category_inverted": PRESENT}, None),
        ({"category_anyof_mask": PageCategory.SWAPPED | PageCategory.HUGE}, None),
        (
            {"category_mask": PageCategory.SWAPPED, "category_inverted": PageCategory.SWAPPED},
            PageCategory(0),
        ),
        ({"category_mask": PageCategory.WPALLOWED}, PageCategory.WPALLOWED),
    ],
)
def test_masks(
    masks: dict[str, PageCategory],
    expected: PageCategory | None,
    uffd: Userfaultfd,
    pagemap: Pagemap,
) -> None:
    with small_pages(10) as region:
        track(uffd, region)
        region.fill(1)
        result = pagemap.scan(region, **masks)  # type: ignore[arg-type]
        assert [(found.categories, found.end - found.start) for found in result.ranges] == (
            [] if expected is None else [(expected, region.length)]
        )


def test_ranges_differ_by_the_returned_categories_only(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    with small_pages(10) as region:
        track(uffd, region)
        region.touch()
        region.fill(1, 4 * PAGE, PAGE)
        by_presence = pagemap.scan(region, category_mask=PRESENT)
        assert indexes(by_presence.ranges, region) == [(0, 10)]
        by_both = pagemap.scan(region, category_mask=PRESENT, return_mask=PRESENT | WRITTEN)
        assert indexes(by_both.ranges, region) == [(0, 4), (4, 5), (5, 10)]
        assert by_both.ranges[1].categories == PRESENT | WRITTEN


def test_files_and_zero_pages(pagemap: Pagemap) -> None:
    with Region.memfd(4 * PAGE) as region:
        region.touch(write=True)
        found = pagemap.scan(region, category_mask=PageCategory.FILE)
        assert indexes(found.ranges, region) == [(0, 4)]
    with small_pages(4) as region:
        region.touch()
        found = pagemap.scan(region, category_mask=PageCategory.PFNZERO)
        assert indexes(found.ranges, region) == [(0, 4)]


@needs_hugepages(2)
def test_huge_pages(pagemap: Pagemap) -> None:
    with Region.memfd(2 * HUGE_PAGE, huge_page_size=HUGE_PAGE) as region:
        region.fill(1, HUGE_PAGE, 1)
        wanted = PageCategory.HUGE | PRESENT
        found = pagemap.scan(region, category_mask=wanted)
        assert indexes(found.ranges, region) == [(512, 1024)]
        assert found.ranges[0].categories == wanted
        assert found.ranges.pages(HUGE_PAGE) == 1


@needs_swap()
def test_swapped_pages(pagemap: Pagemap) -> None:
    with small_pages(8) as region:
        region.fill(1)
        swap_out(region, 2 * PAGE, 3 * PAGE)
        found = pagemap.scan(region, category_mask=PageCategory.SWAPPED)
        assert indexes(found.ranges, region) == [(2, 5)]


def test_two_mappings_and_a_gap(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    with small_pages(30) as region:
        region.fill(1)
        uffd.register(region.start, 10 * PAGE, mode=RegisterMode.WP)
        uffd.register(region.start + 20 * PAGE, 10 * PAGE, mode=RegisterMode.WP)
        found = pagemap.scan(region, category_mask=PageCategory.WPALLOWED)
        assert indexes(found.ranges, region) == [(0, 10), (20, 30)]
        assert indexes(pagemap.scan(region, category_mask=PRESENT).ranges, region) == [(0, 30)]


def test_an_error_does_not_lose_what_was_protected(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    """The kernel protects the tracked part, then fails without telling how far it got."""
    with small_pages(20) as region:
        track(uffd, region)
        uffd.unregister(region.start + 10 * PAGE, 10 * PAGE)
        region.fill(1, 0, PAGE)
        region.fill(1, 4 * PAGE, 16 * PAGE)
        with pytest.raises(UffdPermissionError) as caught:
            pagemap.scan(region, category_mask=WRITTEN, flags=PROTECT)
        assert caught.value.errno == errno.EPERM
        partial = caught.value.data["partial"]
        assert indexes(partial.ranges, region) == [(0, 1), (4, 10)]
        assert partial.walk_end == region.start + 10 * PAGE
        tracked = pagemap.scan(region.start, 10 * PAGE, category_mask=WRITTEN)
        assert len(tracked.ranges) == 0


def test_an_error_behind_many_ranges_loses_none(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    """More ranges than are asked for by one ioctl, before the memory that is not tracked."""
    pages = 10_000
    with small_pages(2 * pages + 10) as region:
        track(uffd, region)
        uffd.unregister(region.start + 2 * pages * PAGE, 10 * PAGE)
        for page in range(0, 2 * pages, 2):
            region.write(page * PAGE, b"x")
        with pytest.raises(UffdPermissionError) as caught:
            pagemap.scan(region, category_mask=WRITTEN, flags=PROTECT)
        partial = caught.value.data["partial"]
        assert indexes(partial.ranges, region) == [(at, at + 1) for at in range(0, 2 * pages, 2)]
        assert partial.walk_end == region.start + (2 * pages - 1) * PAGE
        for page in range(0, 2 * pages, 2):
            region.write(page * PAGE, b"y")
        tracked = pagemap.scan(region.start, 2 * pages * PAGE, category_mask=WRITTEN, flags=PROTECT)
        assert len(tracked.ranges) == pages
        assert tracked.walk_end == region.start + 2 * pages * PAGE


def test_memory_that_is_not_wp_async_is_refused(pagemap: Pagemap) -> None:
    with small_pages(4) as region:
        region.fill(1)
        with pytest.raises(UffdPermissionError) as caught:
            pagemap.scan(region, category_mask=WRITTEN, flags=PROTECT)
        assert caught.value.errno == errno.EPERM
        assert "WP_ASYNC" in caught.value.hint
        assert len(caught.value.data["partial"].ranges) == 0
        # WP_MATCHING alone skips it.
        pagemap.scan(region, category_mask=WRITTEN, flags=ScanFlag.WP_MATCHING)
        assert pagemap.read(region).count(PageBit.UFFD_WP) == 0


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ({"return_mask": 1 << 40}, 1 << 40),
        ({"category_mask": 0x8_0002, "category_anyof_mask": 1 << 63}, 1 << 63 | 0x8_0000),
        ({"flags": ScanFlag(0x80)}, 0x80),
    ],
)
def test_unknown_bits_are_named(arguments: dict[str, int], missing: int, pagemap: Pagemap) -> None:
    with small_pages(1) as region:
        with pytest.raises(UnsupportedFeatureError) as caught:
            pagemap.scan(region, **arguments)  # type: ignore[arg-type]
        assert caught.value.errno == errno.EINVAL
        assert caught.value.missing == missing


@needs_privilege("CAP_SYS_PTRACE")
def test_another_process(pagemap: Pagemap) -> None:
    source = """
import sys
import threading
from pyuffd import Feature, Region, RegisterMode, Userfaultfd
with Region.anonymous(16 * 4096) as region, Userfaultfd(features=Feature.WP_ASYNC) as uffd:
    uffd.register(region, mode=RegisterMode.WP)
    uffd.writeprotect(region)
    for page in (3, 9):
        print(region.start, flush=True)
        region.fill(1, page * 4096, 1)
        print("written", flush=True)
        sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        with Pagemap(other.pid) as theirs:
            for page in (3, 9):
                start = int(other.stdout.readline())
                assert other.stdout.readline() == b"written\n"
                result = theirs.scan(start, 16 * PAGE, category_mask=WRITTEN, flags=PROTECT)
                assert [found.start - start for found in result.ranges] == [page * PAGE]
                other.stdin.write(b"\n")
                other.stdin.flush()
            other.wait()
            with pytest.raises(ProcessGoneError):
                theirs.scan(start, 16 * PAGE)


def test_one_ioctl(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    with small_pages(100) as region:
        track(uffd, region)
        write_every(region, 2)
        packed, walk_end = lowlevel.pagemap_scan(
            pagemap.fileno(),
            region.start,
            region.start + region.length,
            vec_len=3,
            category_mask=WRITTEN,
            return_mask=WRITTEN,
        )
        assert indexes(PageRanges(packed), region) == [(0, 1), (2, 3), (4, 5)]
        assert walk_end == region.start + 6 * PAGE
        nothing, walk_end = lowlevel.pagemap_scan(pagemap.fileno(), region.start, region.start)
        assert (len(nothing), walk_end) == (0, region.start)


def test_no_write_is_lost_while_threads_write(uffd: Userfaultfd, pagemap: Pagemap) -> None:
    """Copying what each scan reports, with one last scan at the end, gives a true copy."""
    stop = threading.Event()

    def write(region: Region, seed: int) -> None:
        random_ = random.Random(seed)
        while not stop.is_set():
            page = random_.randrange(region.length // PAGE)
            region.fill(random_.randrange(1, 256), page * PAGE, PAGE)

    with small_pages(2000) as region:
        track(uffd, region)
        copy = bytearray(region.length)
        threads = [threading.Thread(target=write, args=(region, seed)) for seed in range(3)]
        for thread in threads:
            thread.start()
        scans = 0
        try:
            for scans in range(200):
                copy_written(pagemap, region, copy, vec_len=None if scans % 2 else 7)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        copy_written(pagemap, region, copy, vec_len=None)
        assert scans == 199
        assert copy == region.read(0, region.length)


def copy_written(pagemap: Pagemap, region: Region, copy: bytearray, vec_len: int | None) -> None:
    result = pagemap.scan(region, category_mask=WRITTEN, flags=PROTECT, vec_len=vec_len)
    for start, end, _ in result.ranges:
        offset = start - region.start
        copy[offset : offset + end - start] = region.read(offset, end - start)
