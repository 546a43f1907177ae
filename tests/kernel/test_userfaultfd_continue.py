"""UFFDIO_CONTINUE: minor faults, resolved after another mapping filled the page cache."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from pyuffd import (
    ContinueMode,
    Feature,
    LayoutChangedError,
    PageBit,
    PageExistsError,
    PagefaultFlag,
    Pagemap,
    PartialResolveError,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    WriteprotectMode,
)
from pyuffd.testing import needs
from tests._memory import Memory, memory_of, memory_params
from tests.kernel._faults import Task, next_fault, no_events, registered

pytestmark = needs(Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS)

MINOR, WP = RegisterMode.MINOR, RegisterMode.WP


@pytest.fixture(params=memory_params("shmem", "hugetlb"))
def shared(request: pytest.FixtureRequest) -> Iterator[Memory]:
    factory = memory_of(request.param)
    yield factory
    factory.close()


def with_alias(memory: Memory, pages: int) -> tuple[Region, Region]:
    """Return a region whose file has every page, and an empty mapping of it."""
    filled = memory.pages(pages)
    for number in range(pages):
        filled.write(number * memory.page_size, bytes([number + 1]))
    return filled, filled.alias()


def test_minor_fault(shared: Memory) -> None:
    filled, region = with_alias(shared, 2)
    with region, registered(region, MINOR) as uffd:
        task = Task(region.read, shared.page_size, 1)
        fault = next_fault(uffd)
        assert fault.address == region.start + shared.page_size
        assert fault.flags == PagefaultFlag.MINOR
        filled.write(shared.page_size, b"\x63")
        assert uffd.continue_(fault.address, shared.page_size) == shared.page_size
        assert task.result() == b"\x63"
        assert no_events(uffd)


def test_unregister_lets_a_waiter_go(shared: Memory) -> None:
    _, region = with_alias(shared, 1)
    with region, registered(region, MINOR) as uffd:
        task = Task(region.read, 0, 1)
        next_fault(uffd)
        uffd.unregister(region)
        assert task.result() == b"\x01"


def test_minor_write_fault(shared: Memory) -> None:
    filled, region = with_alias(shared, 1)
    with region, registered(region, MINOR) as uffd:
        task = Task(region.write, 0, b"\x63")
        assert next_fault(uffd).flags == PagefaultFlag.MINOR | PagefaultFlag.WRITE
        uffd.continue_(region)
        task.result()
        assert filled.read(0, 1) == b"\x63"
        assert no_events(uffd)


def test_several_pages(shared: Memory) -> None:
    _, region = with_alias(shared, 3)
    with region, registered(region, MINOR) as uffd:
        assert uffd.continue_(region) == region.length
        assert [region.read(at, 1)[0] for at in range(0, len(region), shared.page_size)] == [
            1,
            2,
            3,
        ]
        assert no_events(uffd)


def test_already_mapped(shared: Memory) -> None:
    _, region = with_alias(shared, 1)
    with region, registered(region, MINOR) as uffd:
        uffd.continue_(region)
        with pytest.raises(PageExistsError) as caught:
            uffd.continue_(region)
        assert caught.value.errno == errno.EEXIST
        assert caught.value.start == region.start


def test_stopped_by_a_mapped_page(shared: Memory) -> None:
    _, region = with_alias(shared, 3)
    size = shared.page_size
    with region, registered(region, MINOR) as uffd:
        uffd.continue_(region.start + size, size)
        with pytest.raises(PartialResolveError) as caught:
            uffd.continue_(region)
        assert caught.value.completed == size
        result = uffd.fill_continue(region)
        assert (result.done, result.already_present, result.deferred) == (size, 2 * size, 0)
        assert region.read(2 * size, 1) == b"\x03"


def test_no_page_in_the_file(shared: Memory) -> None:
    region = shared.pages(2)
    with registered(region, MINOR) as uffd:
        for call in (uffd.continue_, uffd.fill_continue):
            with pytest.raises(UffdOSError) as caught:
                call(region)
            assert caught.value.errno == errno.EFAULT
            assert caught.value.start == region.start


def test_fill_says_which_page_the_file_lacks(shared: Memory) -> None:
    filled, region = with_alias(shared, 3)
    size = shared.page_size
    filled.punch_hole(size, size)
    with region, registered(region, MINOR) as uffd:
        with pytest.raises(UffdOSError) as caught:
            uffd.fill_continue(region)
        error = caught.value
        assert error.errno == errno.EFAULT
        assert (error.start, error.length) == (region.start + size, 2 * size)
        assert error.data["completed"] == size


def test_without_waking(shared: Memory) -> None:
    _, region = with_alias(shared, 1)
    with region, registered(region, MINOR) as uffd:
        task = Task(region.read, 0, 1)
        next_fault(uffd)
        uffd.continue_(region, mode=ContinueMode.DONTWAKE)
        with pytest.raises(PageExistsError):
            uffd.continue_(region)
        assert task.running
        # fill_continue finds it present and wakes.
        result = uffd.fill_continue(region)
        assert (result.done, result.already_present) == (0, shared.page_size)
        assert task.result() == b"\x01"


@needs(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED)
def test_write_protected(shared: Memory) -> None:
    filled, region = with_alias(shared, 1)
    with region, registered(region, MINOR | WP) as uffd, Pagemap() as pagemap:
        uffd.continue_(region, mode=ContinueMode.WP)
        assert PageBit.UFFD_WP in pagemap.read(region).at(region.start)
        assert region.read(0, 1) == b"\x01"
        assert no_events(uffd)
        task = Task(region.write, 0, b"\x07")
        assert next_fault(uffd).flags == PagefaultFlag.WP | PagefaultFlag.WRITE
        assert filled.read(0, 1) == b"\x01"
        uffd.writeprotect(region, mode=WriteprotectMode(0))
        task.result()
        assert filled.read(0, 1) == b"\x07"


def test_unknown_mode(shared: Memory) -> None:
    _, region = with_alias(shared, 1)
    with region, registered(region, MINOR) as uffd:
        with pytest.raises(UffdOSError) as caught:
            uffd.continue_(region, mode=ContinueMode(1 << 40))
        assert caught.value.errno == errno.EINVAL
        assert uffd.continue_(region) == shared.page_size


def test_unregistered(shared: Memory) -> None:
    _, region = with_alias(shared, 1)
    with region, Userfaultfd() as uffd, pytest.raises(LayoutChangedError) as caught:
        uffd.continue_(region)
    assert caught.value.errno == errno.ENOENT
