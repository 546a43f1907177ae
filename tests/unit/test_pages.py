"""Page arithmetic, and the checks of a range before it reaches the kernel."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pyuffd._pages import (
    HUGE_PAGE_1G,
    HUGE_PAGE_2M,
    PAGE_SIZE,
    RangeLike,
    check_page_size,
    check_range,
    page_size_of,
    resolve_range,
    round_down,
    round_up,
)

TOP = 1 << 64


@dataclass
class Range:
    start: int
    length: int


@dataclass
class HugeRange(Range):
    page_size: int = HUGE_PAGE_2M


@pytest.mark.parametrize(
    ("start", "length", "page_size", "shown"),
    [
        (0x1001, 0x1000, PAGE_SIZE, ["0x1001", "0x1000"]),
        (0x1000, 0x1001, PAGE_SIZE, ["0x1001", "0x1000"]),
        (0x1000, 0, PAGE_SIZE, ["0x0"]),
        (0x1000, -0x1000, PAGE_SIZE, ["-0x1000"]),
        (-0x1000, 0x1000, PAGE_SIZE, ["-0x1000"]),
        (TOP, 0x1000, PAGE_SIZE, ["0x10000000000000000"]),
        (TOP - 0x1000, 0x2000, PAGE_SIZE, ["0xfffffffffffff000", "0x2000"]),
        (0x1000, TOP, PAGE_SIZE, ["0x1000", "0x10000000000000000"]),
        (0x201000, HUGE_PAGE_2M, HUGE_PAGE_2M, ["0x201000", "0x200000"]),
        (0x200000, 0x1000, HUGE_PAGE_2M, ["0x1000", "0x200000"]),
        (HUGE_PAGE_2M, HUGE_PAGE_1G, HUGE_PAGE_1G, ["0x200000", "0x40000000"]),
    ],
)
def test_bad_ranges(start: int, length: int, page_size: int, shown: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        check_range(start, length, page_size)
    for value in shown:
        assert value in str(caught.value)


@pytest.mark.parametrize(
    ("start", "length", "page_size"),
    [
        (0, PAGE_SIZE, PAGE_SIZE),
        (TOP - PAGE_SIZE, PAGE_SIZE, PAGE_SIZE),
        (0, TOP - PAGE_SIZE, PAGE_SIZE),
        (HUGE_PAGE_2M, 3 * HUGE_PAGE_2M, HUGE_PAGE_2M),
    ],
)
def test_good_ranges(start: int, length: int, page_size: int) -> None:
    check_range(start, length, page_size)


def test_the_argument_is_named() -> None:
    with pytest.raises(ValueError, match="dst 0x1"):
        check_range(1, PAGE_SIZE, name="dst")


@pytest.mark.parametrize("size", [PAGE_SIZE, HUGE_PAGE_2M, HUGE_PAGE_1G])
def test_page_sizes(size: int) -> None:
    assert check_page_size(size) == size


@pytest.mark.parametrize("size", [0, -4096, 1, 2048, 8192, 1 << 22, 1 << 40])
def test_other_page_sizes(size: int) -> None:
    with pytest.raises(ValueError) as caught:
        check_page_size(size)
    assert hex(size) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "down", "up"),
    [(0, 0, 0), (1, 0, 4096), (4095, 0, 4096), (4096, 4096, 4096), (TOP - 1, TOP - 4096, TOP)],
)
def test_rounding(value: int, down: int, up: int) -> None:
    assert (round_down(value, PAGE_SIZE), round_up(value, PAGE_SIZE)) == (down, up)


def test_range_objects() -> None:
    assert isinstance(Range(1, 2), RangeLike)
    assert resolve_range(Range(0x1000, 0x2000), None) == (0x1000, 0x2000)
    assert resolve_range(0x1000, 0x2000) == (0x1000, 0x2000)
    assert page_size_of(Range(0, 1)) == PAGE_SIZE
    assert page_size_of(HugeRange(0, 1)) == HUGE_PAGE_2M
    assert page_size_of(0x1000) == PAGE_SIZE


def test_a_length_beside_a_range_object() -> None:
    with pytest.raises(ValueError):
        resolve_range(Range(0x1000, 0x2000), 0x1000)


def test_an_address_without_a_length() -> None:
    with pytest.raises(ValueError, match="0x1000"):
        resolve_range(0x1000, None)
