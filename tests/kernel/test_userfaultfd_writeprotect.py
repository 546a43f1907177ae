"""UFFDIO_WRITEPROTECT on every memory type, and its Linux 7.3 siblings on older kernels."""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from pyuffd import (
    Feature,
    LayoutChangedError,
    PageBit,
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
from pyuffd.testing._need import Need, kernel_features
from pyuffd.testing._needs import marked, needs_kernel_faults
from tests._memory import Memory
from tests.kernel._faults import (
    WAIT_S,
    Task,
    next_events,
    next_fault,
    no_events,
    open_files,
    readable,
    registered,
)

pytestmark = needs(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)

PAGE = 4096
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
OFF = WriteprotectMode(0)
WP_FAULT = PagefaultFlag.WP | PagefaultFlag.WRITE


def protected(pagemap: Pagemap, address: int) -> bool:
    return PageBit.UFFD_WP in pagemap.read(address, PAGE).at(address)


def test_write_to_a_protected_page(memory: Memory) -> None:
    region = memory.pages(2)
    size = memory.page_size
    region.fill(1)
    with registered(region, WP) as uffd, Pagemap() as pagemap:
        uffd.writeprotect(region)
        assert region.read(0, 1) == b"\x01"
        assert no_events(uffd)
        task = Task(region.write, size + 9, b"\x02")
        fault = next_fault(uffd)
        assert (fault.address, fault.flags) == (region.start + size, WP_FAULT)
        assert region.read(size + 9, 1) == b"\x01"
        uffd.writeprotect(region.start + size, size, mode=OFF)
        task.result()
        assert region.read(size + 9, 1) == b"\x02"
        region.write(size, b"\x03")
        assert no_events(uffd)
        assert protected(pagemap, region.start)
        assert not protected(pagemap, region.start + size)


def test_unprotect_without_waking(memory: Memory) -> None:
    region = memory.pages(1)
    region.fill(1)
    with registered(region, WP) as uffd:
        uffd.writeprotect(region)
        task = Task(region.write, 0, b"\x02")
        next_fault(uffd)
        uffd.writeprotect(region, mode=WriteprotectMode.DONTWAKE)
        assert task.running
        assert region.read(0, 1) == b"\x01"
        uffd.wake(region)
        task.result()
        assert region.read(0, 1) == b"\x02"
        assert no_events(uffd)


def test_waking_without_unprotecting_faults_again(memory: Memory) -> None:
    region = memory.pages(1)
    region.fill(1)
    with registered(region, WP) as uffd:
        uffd.writeprotect(region)
        task = Task(region.write, 0, b"\x02")
        first = next_fault(uffd)
        uffd.wake(region)
        assert next_fault(uffd) == first
        uffd.writeprotect(region, mode=OFF)
        task.result()


def test_missing_and_protected(memory: Memory) -> None:
    """A write to a hole is one missing fault: the new page is not protected."""
    region = memory.pages(1)
    with registered(region, MISSING | WP) as uffd:
        task = Task(region.write, 0, b"\x02")
        assert next_fault(uffd).flags == PagefaultFlag.WRITE
        uffd.copy(region.start, bytes(memory.page_size))
        task.result()
        assert no_events(uffd)


@needs_kernel_faults()
def test_kernel_writes_fault_too(memory: Memory) -> None:
    region = memory.pages(1)
    region.fill(1)
    zeros = os.open("/dev/zero", os.O_RDONLY)
    try:
        with registered(region, WP) as uffd:
            uffd.writeprotect(region)
            view = region.memoryview()
            task = Task(os.readv, zeros, [view[:8]])
            assert next_fault(uffd).flags == WP_FAULT
            uffd.writeprotect(region, mode=OFF)
            assert task.result() == 8
            del view
    finally:
        os.close(zeros)


def test_writes_through_another_mapping_are_not_seen(memory: Memory) -> None:
    if not memory.shared:
        return
    region = memory.pages(1)
    region.fill(1)
    with region.alias() as alias, registered(region, WP) as uffd, Pagemap() as pagemap:
        uffd.writeprotect(region)
        alias.write(0, b"\x02")
        assert no_events(uffd)
        assert protected(pagemap, region.start)
        assert region.read(0, 1) == b"\x02"


def test_dropped_pages(memory: Memory) -> None:
    """MADV_DONTNEED ends the protection of anonymous pages; a file's pages keep it."""
    region = memory.pages(1)
    region.fill(1)
    with registered(region, WP) as uffd, Pagemap() as pagemap:
        uffd.writeprotect(region)
        region.madvise(mmap.MADV_DONTNEED)
        assert protected(pagemap, region.start) is not memory.is_anon
        task = Task(region.write, 0, b"\x02")
        if not memory.is_anon:
            assert next_fault(uffd).flags == WP_FAULT
            uffd.writeprotect(region, mode=OFF)
        task.result()
        assert no_events(uffd)


def test_holes_of_a_file_are_protected(memory: Memory) -> None:
    if memory.is_anon:
        return
    region = memory.pages(1)
    with registered(region, WP) as uffd:
        uffd.writeprotect(region)
        task = Task(region.write, 0, b"\x02")
        assert next_fault(uffd).flags == WP_FAULT
        uffd.writeprotect(region, mode=OFF)
        task.result()


def test_holes_of_anonymous_memory_are_missed() -> None:
    with Region.anonymous(PAGE) as region, registered(region, WP) as uffd:
        uffd.writeprotect(region)
        region.write(0, b"\x02")
        assert no_events(uffd)


@needs(Feature.WP_UNPOPULATED)
def test_holes_of_anonymous_memory_with_the_feature() -> None:
    with (
        Region.anonymous(PAGE) as region,
        registered(region, WP, Feature.WP_UNPOPULATED) as uffd,
    ):
        uffd.writeprotect(region)
        assert region.read(0, 1) == b"\0"
        assert no_events(uffd)
        task = Task(region.write, 0, b"\x02")
        assert next_fault(uffd).flags == WP_FAULT
        uffd.writeprotect(region, mode=OFF)
        task.result()


@needs(Feature.WP_ASYNC)
def test_async_protection_lifts_itself(memory: Memory) -> None:
    region = memory.pages(2)
    region.fill(1)
    with registered(region, WP, Feature.WP_ASYNC) as uffd, Pagemap() as pagemap:
        uffd.writeprotect(region)
        region.write(0, b"\x02")
        assert no_events(uffd)
        assert not protected(pagemap, region.start)
        assert protected(pagemap, region.start + memory.page_size)


def test_protecting_and_not_waking_is_no_mode() -> None:
    both = WriteprotectMode.WP | WriteprotectMode.DONTWAKE
    uffd = Userfaultfd()
    uffd.close()
    with Region.anonymous(PAGE) as region, pytest.raises(ValueError) as caught:
        uffd.writeprotect(region, mode=both)
    assert type(caught.value) is ValueError


def test_unknown_mode(memory: Memory) -> None:
    region = memory.pages(1)
    region.fill(1)
    with registered(region, WP) as uffd, Pagemap() as pagemap:
        with pytest.raises(UffdOSError) as caught:
            uffd.writeprotect(region, mode=WriteprotectMode(1 << 40))
        assert caught.value.errno == errno.EINVAL
        assert hex(1 << 40) in str(caught.value)
        assert not protected(pagemap, region.start)


def test_partly_registered(memory: Memory) -> None:
    """The pages before the unregistered part have been changed."""
    region = memory.pages(2)
    size = memory.page_size
    region.fill(1)
    with Userfaultfd() as uffd, Pagemap() as pagemap:
        uffd.register(region.start, size, mode=WP)
        with pytest.raises(LayoutChangedError) as caught:
            uffd.writeprotect(region)
        assert caught.value.errno == errno.ENOENT
        assert (caught.value.start, caught.value.length) == (region.start, 2 * size)
        assert protected(pagemap, region.start)
        assert not protected(pagemap, region.start + size)


@needs(Feature.EVENT_REMOVE)
def test_while_an_event_is_unread(memory: Memory) -> None:
    region = memory.pages(2)
    region.fill(1)
    size = memory.page_size
    with registered(region, WP, Feature.EVENT_REMOVE) as uffd:
        task = Task(region.madvise, mmap.MADV_DONTNEED, size, size)
        assert readable(uffd, WAIT_S)
        with pytest.raises(PartialResolveError) as caught:
            uffd.writeprotect(region.start, size)
        assert caught.value.errno == errno.EAGAIN
        assert caught.value.completed == 0
        assert len(next_events(uffd)) == 1
        task.result()
        uffd.writeprotect(region.start, size)


# Linux 7.3


def lacks(feature: Feature) -> pytest.MarkDecorator:
    """The kernel lacks this feature: using it must be an error."""

    def missing() -> tuple[list[str], str]:
        has = kernel_features() & int(feature)
        return (["old-kernel"] if has else []), f"the kernel offers {kernel_features():#x}"

    return marked(Need(f"a kernel without {feature!r}", missing))


@lacks(Feature.RWP)
def test_rwp_on_a_kernel_without_it(memory: Memory) -> None:
    region = memory.pages(1)
    region.fill(1)
    before = open_files()
    with registered(region, WP) as uffd:
        with pytest.raises(UffdOSError) as caught:
            uffd.rwprotect(region)
        assert caught.value.errno in {errno.EINVAL, errno.ENOTTY}
        assert (caught.value.start, caught.value.length) == (region.start, region.length)
        with pytest.raises(UffdOSError) as caught:
            uffd.set_mode(enable=Feature.RWP_ASYNC)
        assert caught.value.errno in {errno.EINVAL, errno.ENOTTY}
        assert uffd.features == Feature(0)
        with pytest.raises(UffdOSError) as caught:
            uffd.register(region, mode=RegisterMode.RWP)
        assert caught.value.errno == errno.EINVAL
        # The refused registration has changed nothing.
        uffd.writeprotect(region)
    assert open_files() == before


def test_set_mode_both_ways() -> None:
    with Userfaultfd() as uffd, pytest.raises(ValueError):
        uffd.set_mode(enable=Feature.RWP_ASYNC, disable=Feature.RWP_ASYNC)
