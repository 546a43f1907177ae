"""The `fill_*` calls: mixed ranges, waking, a layout that keeps changing."""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable

import pytest

from pyuffd import (
    CopyMode,
    Feature,
    FillResult,
    LayoutChangedError,
    PageBit,
    Pagemap,
    PartialResolveError,
    Region,
    RegisterMode,
    Remove,
    UffdOSError,
    Userfaultfd,
)
from pyuffd import _memory as raw
from pyuffd.testing import needs
from tests._memory import Memory
from tests.kernel._faults import (
    WAIT_S,
    Task,
    next_fault,
    no_events,
    readable,
    registered,
)

pytestmark = needs(Feature(0))

PAGE = 4096
PROT_NONE = 0


def firsts(region: Region) -> list[int]:
    return [region.read(at, 1)[0] for at in range(0, region.length, region.page_size)]


@pytest.mark.crossing
@pytest.mark.parametrize("present", [[], [0], [3], [1, 2], [0, 2], [0, 1, 2, 3]])
def test_copy_over_mixed_pages(memory: Memory, present: list[int]) -> None:
    region = memory.pages(4)
    size = memory.page_size
    for number in present:
        region.write(number * size, b"\x09")
    with registered(region) as uffd:
        result = uffd.fill_copy(region, b"\x01" * (4 * size))
        assert result == FillResult((4 - len(present)) * size, len(present) * size, 0)
        assert firsts(region) == [9 if number in present else 1 for number in range(4)]
        assert no_events(uffd)


@pytest.mark.parametrize("present", [[], [1], [0, 1, 2]])
def test_zero_over_mixed_pages(memory: Memory, present: list[int]) -> None:
    region = memory.pages(3)
    size = memory.page_size
    for number in present:
        region.write(number * size, b"\x09")
    with registered(region) as uffd:
        result = uffd.fill_zero(region)
        assert result == FillResult((3 - len(present)) * size, len(present) * size, 0)
        assert firsts(region) == [9 if number in present else 0 for number in range(3)]
        region.fill(1)
        assert no_events(uffd)


def test_offsets_are_kept_over_skipped_pages(memory: Memory) -> None:
    """Each page gets its own part of the source, even if pages before it were skipped."""
    region = memory.pages(4)
    size = memory.page_size
    region.write(size, b"\x09")
    data = b"".join(bytes([number + 1]) * size for number in range(4))
    with registered(region) as uffd:
        uffd.fill_copy(region, data)
        assert firsts(region) == [1, 9, 3, 4]


def test_a_longer_source_and_a_shorter_length() -> None:
    with Region.anonymous(3 * PAGE) as region, registered(region) as uffd:
        data = b"\x01" * (8 * PAGE)
        assert uffd.fill_copy(region.start, data, PAGE) == FillResult(PAGE, 0, 0)
        assert uffd.fill_copy(region, data) == FillResult(2 * PAGE, PAGE, 0)


@pytest.mark.parametrize(
    ("source", "length", "shown"),
    [
        (bytes(2 * PAGE - 1), None, "0x1fff"),
        (bytes(4 * PAGE), 3 * PAGE, "0x3000"),
        (b"", None, "0x0"),
    ],
)
def test_source_or_length_that_do_not_fit_the_region(
    source: bytes, length: int | None, shown: str
) -> None:
    with Region.anonymous(2 * PAGE) as region, registered(region) as uffd:
        with pytest.raises(ValueError, match=shown):
            uffd.fill_copy(region, source, length)
        assert uffd.fill_zero(region) == FillResult(2 * PAGE, 0, 0)


def test_negative_retry() -> None:
    with Region.anonymous(PAGE) as region, registered(region) as uffd:
        with pytest.raises(ValueError):
            uffd.fill_zero(region, retry_s=-1)
        assert uffd.fill_zero(region).done == PAGE


def test_copy_wakes_who_waits_for_a_present_page(memory: Memory) -> None:
    """After a fill with DONTWAKE a thread still sleeps; EEXIST alone would not wake it."""
    region = memory.pages(2)
    size = memory.page_size
    with registered(region) as uffd:
        task = Task(region.read, size, 1)
        next_fault(uffd)
        uffd.copy(region.start, b"\x04" * (2 * size), mode=CopyMode.DONTWAKE)
        assert task.running
        result = uffd.fill_copy(region, bytes(2 * size))
        assert result == FillResult(0, 2 * size, 0)
        assert task.result() == b"\x04"


def test_zero_wakes_who_waits_for_a_present_page(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        task = Task(region.read, 0, 1)
        next_fault(uffd)
        uffd.copy(region.start, b"\x04" * memory.page_size, mode=CopyMode.DONTWAKE)
        assert uffd.fill_zero(region) == FillResult(0, memory.page_size, 0)
        assert task.result() == b"\x04"


def test_zero_wakes_who_waits_for_a_missing_page(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        task = Task(region.read, 0, 8)
        next_fault(uffd)
        assert uffd.fill_zero(region) == FillResult(memory.page_size, 0, 0)
        assert task.result() == bytes(8)


@needs(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)
def test_copy_write_protected(memory: Memory) -> None:
    region = memory.pages(1)
    mode = RegisterMode.MISSING | RegisterMode.WP
    with registered(region, mode) as uffd, Pagemap() as pagemap:
        uffd.fill_copy(region, bytes(memory.page_size), mode=CopyMode.WP)
        assert PageBit.UFFD_WP in pagemap.read(region).at(region.start)


def test_unregistered_part(memory: Memory) -> None:
    region = memory.pages(3)
    size = memory.page_size
    with Userfaultfd() as uffd:
        uffd.register(region.start, 2 * size)
        with pytest.raises(LayoutChangedError) as caught:
            uffd.fill_copy(region, bytes(3 * size))
        assert caught.value.errno == errno.ENOENT
        # One ioctl stays within one mapping; the whole registered range is filled anyway.
        assert caught.value.start == region.start + 2 * size
        assert caught.value.data["completed"] == 2 * size
        assert uffd.fill_zero(region_part(region, 2)) == FillResult(0, 2 * size, 0)


class region_part:
    def __init__(self, region: Region, pages: int) -> None:
        self.start, self.page_size = region.start, region.page_size
        self.length = pages * region.page_size


def test_source_that_ends_early(memory: Memory) -> None:
    region = memory.pages(3)
    size = memory.page_size
    region.write(0, b"\x09")
    with Region.anonymous(3 * size) as source, registered(region) as uffd:
        source.fill(1)
        raw.mprotect(source.start + 2 * size, size, PROT_NONE)
        with pytest.raises(UffdOSError) as caught:
            uffd.fill_copy(region, source.start)
        error = caught.value
        assert error.errno == errno.EFAULT
        assert (error.start, error.length) == (region.start + 2 * size, size)
        assert error.data["completed"] == size
        raw.mprotect(source.start + 2 * size, size, mmap.PROT_READ)
        # The page that could not be read is still missing, not zero.
        assert uffd.fill_copy(region, source.start) == FillResult(size, 2 * size, 0)
        assert firsts(region) == [9, 1, 1]


# EAGAIN: a REMOVE event that was not read


FILLS: dict[str, Callable[[Userfaultfd, Region, float], FillResult]] = {
    "copy": lambda uffd, region, limit: uffd.fill_copy(region, bytes(region.length), retry_s=limit),
    "zero": lambda uffd, region, limit: uffd.fill_zero(region, retry_s=limit),
}


@needs(Feature.EVENT_REMOVE)
@pytest.mark.parametrize("limit", [0, 0.02])
@pytest.mark.parametrize("fill", FILLS)
def test_unread_event_defers_everything(memory: Memory, fill: str, limit: float) -> None:
    region, other = memory.pages(2), memory.pages(1)
    other.fill(1)
    with registered(region, features=Feature.EVENT_REMOVE) as uffd:
        uffd.register(other)
        task = Task(other.madvise, mmap.MADV_DONTNEED)
        assert readable(uffd, WAIT_S)
        assert FILLS[fill](uffd, region, limit) == FillResult(0, 0, region.length)
        assert task.running
        assert uffd.read_events() == [Remove(other.start, other.start + other.length)]
        task.result()
        assert FILLS[fill](uffd, region, 1) == FillResult(region.length, 0, 0)


@needs(Feature.EVENT_REMOVE)
def test_unread_event_hides_what_is_present() -> None:
    """EAGAIN comes before the kernel looks at the pages, so present ones are deferred too."""
    with Region.anonymous(3 * PAGE) as region:
        region.write(0, b"\x01")
        with registered(region, features=Feature.EVENT_REMOVE) as uffd:
            task = Task(region.madvise, mmap.MADV_DONTNEED, 2 * PAGE, PAGE)
            assert readable(uffd, WAIT_S)
            assert uffd.fill_zero(region, retry_s=0) == FillResult(0, 0, 3 * PAGE)
            uffd.read_events()
            task.result()
            assert uffd.fill_zero(region) == FillResult(2 * PAGE, PAGE, 0)


@needs(Feature.EVENT_REMOVE)
@pytest.mark.parametrize("fill", FILLS)
def test_goes_on_when_another_thread_reads_the_event(memory: Memory, fill: str) -> None:
    """The fill starts while the event is unread; only then may the reader read it."""
    region, other = memory.pages(2), memory.pages(1)
    other.fill(1)
    with registered(region, features=Feature.EVENT_REMOVE) as uffd:
        uffd.register(other)
        changer = Task(other.madvise, mmap.MADV_DONTNEED)
        assert readable(uffd, WAIT_S)
        go = threading.Event()

        def fill_it() -> FillResult:
            with pytest.raises(PartialResolveError):
                uffd.copy(region.start, bytes(memory.page_size))
            go.set()
            return FILLS[fill](uffd, region, WAIT_S)

        filler = Task(fill_it)
        assert go.wait(WAIT_S)
        assert uffd.read_events() == [Remove(other.start, other.start + other.length)]
        changer.result()
        assert filler.result() == FillResult(region.length, 0, 0)


def test_result_is_a_value() -> None:
    result = FillResult(1, 2, 3)
    assert result == FillResult(done=1, already_present=2, deferred=3)
    with pytest.raises(AttributeError):
        result.done = 5  # type: ignore[misc]
