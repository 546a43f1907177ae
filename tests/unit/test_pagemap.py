"""The packed results of pagemap, made from arrays here, without the kernel."""

from __future__ import annotations

import os
import pickle
import random
from array import array

import pytest

from pyuffd import (
    ClosedError,
    PageBit,
    PageCategory,
    PageEntries,
    Pagemap,
    PageRange,
    PageRanges,
    PageResidency,
    ProcessGoneError,
    Residency,
)

START = 0x7F0000000000
PAGE = 4096


def entries(*values: int) -> PageEntries:
    return PageEntries(START, memoryview(array("Q", values)))


def ranges(*values: int) -> PageRanges:
    return PageRanges(memoryview(array("Q", values)))


P, S, W = PageBit.PRESENT, PageBit.SWAP, PageBit.UFFD_WP
TWO = (0x1000, 0x3000, PageCategory.WRITTEN, 0x8000, 0x9000, PageCategory.PRESENT | 1 << 40)


@pytest.mark.parametrize(
    ("bits", "clear", "expected"),
    [
        (P, PageBit(0), [(0, 2), (4, 5)]),
        (W, PageBit(0), [(1, 4)]),
        (P | W, PageBit(0), [(1, 2)]),
        (P, W, [(0, 1), (4, 5)]),
        (W, P, [(2, 4)]),
        (PageBit(0), P | S | W, [(5, 6)]),
        (PageBit(0), PageBit(0), [(0, 6)]),
        (PageBit.FILE, PageBit(0), []),
    ],
)
def test_count_and_where(bits: PageBit, clear: PageBit, expected: list[tuple[int, int]]) -> None:
    packed = entries(P | 0x123, P | W, S | W, W, P, 0)
    assert packed.count(bits, clear=clear) == sum(end - first for first, end in expected)
    assert list(packed.where(bits, clear=clear)) == [
        (START + first * PAGE, START + end * PAGE, PageCategory(0)) for first, end in expected
    ]


def test_a_bit_both_set_and_clear() -> None:
    for use in (entries(P).count, entries(P).where):
        with pytest.raises(ValueError):
            use(P | W, clear=P)


def test_many_runs_grow_the_array() -> None:
    packed = entries(*[P, 0] * 5000)
    found = packed.where(P)
    assert len(found) == 5000
    assert found[4999] == (START + 9998 * PAGE, START + 9999 * PAGE, 0)


def test_entries_by_index_and_address() -> None:
    packed = entries(P | 0x123, S | W | 0x5F)
    assert (len(packed), packed.start, packed.length) == (2, START, 2 * PAGE)
    assert packed[0] == P | 0x123
    assert packed[-1] == S | W | 0x5F
    assert list(packed) == [packed[0], packed[1]]
    assert packed.at(START + PAGE + 17) == S | W
    for outside in (START - 1, START + 2 * PAGE):
        with pytest.raises(IndexError):
            packed.at(outside)


def test_ranges_by_index() -> None:
    packed = ranges(*TWO)
    assert packed[1] == PageRange(0x8000, 0x9000, PageCategory.PRESENT | PageCategory(1 << 40))
    assert packed[-2] == packed[0] == (0x1000, 0x3000, PageCategory.WRITTEN)
    assert [type(found.categories) for found in packed] == [PageCategory, PageCategory]
    for outside in (2, -3):
        with pytest.raises(IndexError):
            packed[outside]


def test_sizes_of_ranges() -> None:
    packed = ranges(*TWO)
    assert (packed.bytes, packed.pages(), packed.pages(0x2000)) == (0x3000, 3, 1)
    assert (ranges().bytes, len(ranges()), list(ranges())) == (0, 0, [])


def test_numbers_print_in_hex() -> None:
    assert repr(ranges(*TWO)[0]).startswith("PageRange(0x1000, 0x3000, ")


def test_ranges_compare_by_value() -> None:
    assert ranges(*TWO) == ranges(*TWO)
    assert ranges(*TWO) != ranges(*TWO[:3])
    assert ranges() != []


def test_results_pickle() -> None:
    assert pickle.loads(pickle.dumps(ranges(*TWO))) == ranges(*TWO)
    copied = pickle.loads(pickle.dumps(entries(P, S)))
    assert (copied.start, list(copied)) == (START, [P, S])


def test_numpy_takes_results_without_a_copy() -> None:
    numpy = pytest.importorskip("numpy")
    packed = ranges(*TWO)
    seen = numpy.asarray(packed)
    assert (seen.shape, seen.dtype) == ((2, 3), numpy.uint64)
    assert seen.tolist() == [list(TWO[:3]), list(TWO[3:])]
    assert numpy.shares_memory(seen, numpy.frombuffer(packed.memoryview(), numpy.uint64))
    assert numpy.asarray(ranges()).shape == (0, 3)
    assert numpy.asarray(entries(P, S)).tolist() == [P, S]
    assert numpy.asarray(Residency(START, PAGE, b"\0\3")).tolist() == [0, 3]


def test_residency_counts_and_runs() -> None:
    states = Residency(START, 0x200000, bytes([0, 3, 3, 1, 3]))
    assert states.counts() == {
        PageResidency.HOLE: 1,
        PageResidency.SWAPPED: 1,
        PageResidency.MAPPED: 3,
    }
    assert (len(states), states[3]) == (5, PageResidency.SWAPPED)
    assert list(states)[:2] == [PageResidency.HOLE, PageResidency.MAPPED]
    assert list(states.where(PageResidency.MAPPED)) == [
        (START + 0x200000, START + 0x600000, 0),
        (START + 0x800000, START + 0xA00000, 0),
    ]
    assert len(states.where(PageResidency.POISON)) == 0


@pytest.mark.parametrize(
    ("start", "length"),
    [
        (START + 1, PAGE),
        (START, PAGE - 1),
        (START, 0),
        (START, -PAGE),
        (-PAGE, PAGE),
        (1 << 64, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE),
        (START, None),
    ],
)
def test_bad_ranges(start: int, length: int | None) -> None:
    with Pagemap() as pagemap:
        with pytest.raises(ValueError):
            pagemap.read(start, length)
        with pytest.raises(ValueError):
            pagemap.scan(start, length)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_pages": -1},
        {"vec_len": -1},
        {"vec_len": 1 << 64},
        {"category_mask": 1 << 64},
        {"return_mask": -1},
        {"flags": -1},
        {"max_pages": 1, "vec_len": 0},
    ],
)
def test_bad_scan_arguments(bad: dict[str, int]) -> None:
    with Pagemap() as pagemap, pytest.raises(ValueError):
        pagemap.scan(START, PAGE, **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("pid", [0, -1])
def test_bad_pid(pid: int) -> None:
    with pytest.raises(ValueError):
        Pagemap(pid)


def test_use_after_close() -> None:
    pagemap = Pagemap()
    fd = pagemap.fileno()
    pagemap.close()
    pagemap.close()
    assert pagemap.closed
    with pytest.raises(OSError):
        os.fstat(fd)
    for use in (pagemap.fileno, lambda: pagemap.read(START, PAGE), pagemap.scan_support):
        with pytest.raises(ClosedError):
            use()
    with pytest.raises(ClosedError):
        pagemap.scan(START, PAGE)


def test_unclosed_warns() -> None:
    pagemap = Pagemap()
    with pytest.warns(ResourceWarning, match="unclosed"):
        pagemap.__del__()
    assert pagemap.closed


def test_no_such_process() -> None:
    with pytest.raises(ProcessGoneError):
        Pagemap(2**22 + 1)  # above the limit of kernel.pid_max


SETS = [
    # a, b, in either, in both, in a only
    ([(0, 2)], [(1, 3)], [(0, 3)], [(1, 2)], [(0, 1)]),
    ([(0, 1), (4, 6)], [(1, 4)], [(0, 6)], [], [(0, 1), (4, 6)]),
    ([(0, 9)], [(2, 3), (5, 6)], [(0, 9)], [(2, 3), (5, 6)], [(0, 2), (3, 5), (6, 9)]),
    ([(2, 3), (5, 6)], [(0, 9)], [(0, 9)], [(2, 3), (5, 6)], []),
    ([], [(1, 2)], [(1, 2)], [], []),
    ([(1, 2)], [], [(1, 2)], [], [(1, 2)]),
    ([(1, 2), (3, 4)], [(1, 2), (3, 4)], [(1, 2), (3, 4)], [(1, 2), (3, 4)], []),
]


def _pages(spans: list[tuple[int, int]]) -> PageRanges:
    return PageRanges.of((start * 4096, end * 4096) for start, end in spans)


def _spans(ranges: PageRanges) -> list[tuple[int, int]]:
    return [(item.start // 4096, item.end // 4096) for item in ranges]


@pytest.mark.parametrize(("a", "b", "either", "both", "only"), SETS)
def test_sets_of_pages(
    a: list[tuple[int, int]],
    b: list[tuple[int, int]],
    either: list[tuple[int, int]],
    both: list[tuple[int, int]],
    only: list[tuple[int, int]],
) -> None:
    assert _spans(_pages(a) | _pages(b)) == either
    assert _spans(_pages(b) | _pages(a)) == either
    assert _spans(_pages(a) & _pages(b)) == both
    assert _spans(_pages(a) - _pages(b)) == only


def test_sets_of_pages_by_chance() -> None:
    chance = random.Random(5)
    for _ in range(200):
        a, b = ({chance.randrange(40) for _ in range(chance.randrange(30))} for _ in range(2))
        first, second = (_pages([(page, page + 1) for page in pages]) for pages in (a, b))
        results = [(first | second, a | b), (first & second, a & b), (first - second, a - b)]
        for found, wanted in results:
            assert {p for start, end in _spans(found) for p in range(start, end)} == wanted
        spans = [(0, 7 * 4096), (7 * 4096, 20 * 4096), (30 * 4096, 40 * 4096)]
        assert first.bytes_in(spans) == [
            4096 * len(a & set(range(start // 4096, end // 4096))) for start, end in spans
        ]


def test_spans_are_joined_and_checked() -> None:
    assert _spans(PageRanges.of([(8192, 12288), (0, 4096), (4096, 8192), (0, 0)])) == [(0, 3)]
    for bad in [(0, 1), (1, 4096), (4096, 0), (-4096, 0)]:
        with pytest.raises(ValueError):
            PageRanges.of([bad])
