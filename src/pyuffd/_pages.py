"""Page arithmetic, and the checks of every range before it reaches the kernel (layer L1)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from pyuffd._arguments import check_int, shown

PAGE_SIZE = 4096
HUGE_PAGE_2M = 2 << 20
HUGE_PAGE_1G = 1 << 30
ADDRESS_LIMIT = 1 << 64


@runtime_checkable
class RangeLike(Protocol):
    """An object with an address and a length, such as a `Region`; it may have a `page_size`."""

    @property
    def start(self) -> int:
        """First address."""

    @property
    def length(self) -> int:
        """Size in bytes."""


def round_down(value: int, page_size: int) -> int:
    """Return the page boundary at or below `value`."""
    return value - value % page_size


def round_up(value: int, page_size: int) -> int:
    """Return the page boundary at or above `value`."""
    return -(-value // page_size) * page_size


def check_page_size(page_size: int) -> int:
    """Return `page_size` if x-86-64 maps pages of it, else raise ValueError."""
    check_int("page_size", page_size)
    if page_size not in (PAGE_SIZE, HUGE_PAGE_2M, HUGE_PAGE_1G):
        raise ValueError(f"page_size {page_size:#x} is not one of 0x1000, 0x200000, 0x40000000")
    return page_size


def check_range(
    start: int, length: int, page_size: int = PAGE_SIZE, *, name: str = "start"
) -> None:
    """Raise ValueError unless [start, start + length) is a non-empty, aligned range of memory."""
    if (
        type(start) is type(length) is int
        and start >= 0
        and length > 0
        and start + length <= ADDRESS_LIMIT
        and start % page_size == length % page_size == 0
    ):
        return
    check_aligned(name, start, page_size)
    check_int("length", length)
    if length <= 0:
        raise ValueError(f"length {length:#x} must be above zero")
    check_aligned("length", length, page_size)
    if start + length > ADDRESS_LIMIT:
        raise ValueError(f"range {start:#x} + {length:#x} crosses the end of the address space")


def check_aligned(name: str, value: int, page_size: int) -> None:
    """Raise ValueError unless `value` is a non-negative multiple of the page size."""
    check_int(name, value)
    if value < 0:
        raise ValueError(f"{name} {value:#x} is negative")
    if value >= ADDRESS_LIMIT:
        raise ValueError(f"{name} {value:#x} does not fit in 64 bits")
    if value % page_size:
        raise ValueError(f"{name} {value:#x} is not a multiple of the page size {page_size:#x}")


def resolve_range(
    range_or_start: RangeLike | int, length: int | None, *, name: str = "range_or_start"
) -> tuple[int, int]:
    """Return (start, length) of a range object, or of two numbers."""
    if is_address(range_or_start):
        start = check_int("start", range_or_start)
        if length is None:
            raise ValueError(f"start {start:#x} needs a length")
        return start, check_int("length", length)
    check_region(range_or_start, name)
    if length is not None:
        raise ValueError("pass a range object, or start and length, but not both")
    return range_or_start.start, range_or_start.length  # type: ignore[union-attr]


def checked_range(range_or_start: RangeLike | int, length: int | None) -> tuple[int, int]:
    """Return start and length of a range that is aligned to its pages, or raise ValueError."""
    start, size = resolve_range(range_or_start, length)
    check_range(start, size, page_size_of(range_or_start))
    return start, size


def is_address(value: object) -> bool:
    """Return whether this is a number, and no range object."""
    if isinstance(value, int):
        return True
    is_object = isinstance(value, type) or hasattr(value, "length")
    return hasattr(value, "__index__") and not is_object


def check_region(region: object, name: str = "region") -> None:
    """Raise TypeError unless this is a range object."""
    start, length = getattr(region, "start", None), getattr(region, "length", None)
    if type(start) is int and type(length) is int and not isinstance(region, type):
        return
    if isinstance(region, type) or not (hasattr(region, "start") and hasattr(region, "length")):
        raise TypeError(
            f"{name}: {shown(region)} is not a region: Region.at(address, length) describes memory"
            " that other code mapped"
        )
    check_int(f"{name}.start", region.start)
    check_int(f"{name}.length", region.length)


def start_of(region: RangeLike | int, name: str = "region") -> int:
    """Return the address of a range object, or the one that is given itself."""
    start, length = getattr(region, "start", None), getattr(region, "length", None)
    if type(start) is int and type(length) is int and not isinstance(region, int | type):
        return start
    if is_address(region):
        return check_int(name, region)
    check_region(region, name)
    return region.start  # type: ignore[union-attr]


def page_size_of(range_or_start: RangeLike | int) -> int:
    """Return the page size of a range object that has one, else the base page size."""
    return check_int("page_size", getattr(range_or_start, "page_size", PAGE_SIZE))
