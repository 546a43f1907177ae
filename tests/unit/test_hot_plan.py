"""Working sets as ranges of memory, in C: against a model, and with rows that nobody checked."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from pyuffd._image_calls import HotPlan, hot_plan, read_ahead
from pyuffd._working_set import ROW, Place, WorkingSet, parts
from pyuffd.testing._run import SCALE
from tests._memory import PAGE

WINDOW = 16 * PAGE
HUGE = 8 * PAGE  # of a memory with larger pages


def windows(plan: HotPlan) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return (memory, its ranges) of each window."""
    found = []
    for first, past, memory in plan.windows:
        words = plan.rows(first, past).cast("B").cast("Q").tolist()
        assert set(words[2::3]) == {memory}
        found.append((memory, list(zip(words[0::3], words[1::3], strict=True))))
    return found


def pages_of(ranges: list[tuple[int, int, int]], size: dict[int, int]) -> list[tuple[int, int]]:
    return [
        (memory, page)
        for memory, begin, end in ranges
        for page in range(begin // size[memory], end // size[memory])
    ]


@pytest.mark.parametrize("seed", range(12))
def test_the_same_pages_as_the_model(seed: int) -> None:
    rng = random.Random(seed)
    total = 4000
    rows, used = [], set[int]()
    for _ in range(300):
        page, pages = rng.randrange(total), rng.choice((1, 1, 1, 2, 7, 90))
        if page + pages > total or used & set(range(page, page + pages)):
            continue
        used |= set(range(page, page + pages))
        tried = rng.randint(1, 4)
        rows.append((page, pages, rng.randint(1, tried), tried))
    raw = b"".join(ROW.pack(*row) for row in rows)
    places, at = [], 0
    size = {0: PAGE, 1: PAGE, 2: HUGE}
    for memory in size:
        at += rng.randrange(5) * PAGE
        length = rng.randrange(800, 1200) * HUGE // (HUGE // PAGE)
        length -= length % size[memory]
        places.append(Place(at, length, memory, 0, size[memory]))
        at += length
    plan = hot_plan(raw, 50, places, WINDOW)
    found = [(memory, *pair) for memory, pairs in windows(plan) for pair in pairs]
    wanted = list(parts(WorkingSet(b"", total * PAGE, 4, raw).often(0.5), places))
    assert sorted(pages_of(found, size)) == sorted(pages_of(wanted, size))
    assert plan.bytes == sum(end - begin for _, begin, end in found)
    # In order, but for what is filled at once.
    place = {page: number for number, page in enumerate(pages_of(wanted, size))}
    for memory in size:
        order = [place[page] for page in pages_of([r for r in found if r[0] == memory], size)]
        assert order == sorted(order)
    for _, pairs in windows(plan):
        assert sum(end - begin for begin, end in pairs) < 2 * WINDOW


def test_rows_that_cannot_be() -> None:
    """Nothing outside of the places, however wrong the rows are; long ones come in parts."""
    places = [Place(0, 100 * PAGE, 0, 0, PAGE)]
    rows = [(0, 1 << 31, 1, 1), (1 << 63, 9, 1, 1), ((1 << 64) - 1, 1, 1, 1), (200, 5, 1, 1)]
    plan = hot_plan(b"".join(ROW.pack(*row) for row in rows), 50, places, WINDOW)
    pairs = [pair for _, some in windows(plan) for pair in some]
    assert pairs[0][0] == 0
    assert pairs[-1][1] == 100 * PAGE
    assert all(end - begin <= WINDOW for begin, end in pairs)
    assert sum(end - begin for begin, end in pairs) == 100 * PAGE
    empty = hot_plan(b"", 50, [], WINDOW)
    assert (len(empty.ranges), len(empty.windows), empty.bytes) == (0, 0, 0)
    with pytest.raises(OSError):
        hot_plan(b"", 50, places, PAGE + 1)


def test_files_are_read_ahead(tmp_path: Path) -> None:
    """The pages that the ranges name are in the page cache soon, those far from them are not."""
    from pyuffd import PageResidency, Region

    pages = 4096
    path = Path("/var/tmp") / f"pyuffd-ahead-{os.getpid()}"
    try:
        path.write_bytes(os.urandom(pages * PAGE))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with Region.file(file.fileno(), pages * PAGE, writable=False) as region:
                if region.residency().count(PageResidency.SWAPPED) < pages // 2:
                    pytest.skip("this file system keeps its pages in memory")
                # Memory: 100 pages of zeros, then the file from its page 1000 on.
                plan = hot_plan(
                    ROW.pack(110, 3, 1, 1) + ROW.pack(0, 5, 1, 1) + ROW.pack(400, 1, 1, 1),
                    50,
                    [Place(0, 2000 * PAGE, 0, 0, PAGE)],
                    WINDOW,
                )
                runs = memoryview(bytearray(48)).cast("Q")
                runs[3], runs[4], runs[5] = 100 * PAGE, 1, 1000 * PAGE
                read_ahead(plan.ranges, runs, 2000 * PAGE, [file.fileno()])
                wanted = [1010, 1011, 1012, 1300]
                until = time.monotonic() + 10 * SCALE
                states = region.residency()
                while any(states[page] is PageResidency.SWAPPED for page in wanted):
                    assert time.monotonic() < until, wanted
                    time.sleep(0.01)
                    states = region.residency()
                assert states.count(PageResidency.SWAPPED) > pages // 2
    finally:
        path.unlink(missing_ok=True)
