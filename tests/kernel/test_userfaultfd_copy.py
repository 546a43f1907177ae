"""UFFDIO_COPY and UFFDIO_ZEROPAGE: results, partial counts, errors, wake-ups."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator

import pytest

from pyuffd import (
    CopyMode,
    Feature,
    Ioctl,
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
    ZeropageMode,
)
from pyuffd import _memory as raw
from pyuffd.testing import needs, needs_ioctl
from pyuffd.testing._needs import needs_kernel_faults
from tests._memory import Memory, memory_of, memory_params
from tests.kernel._faults import Task, next_fault, no_events, registered, wait_for_pending

pytestmark = needs(Feature(0))

PAGE = 4096
PROT_NONE = 0
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
NEEDS_WP = needs(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)
SMALL = pytest.mark.parametrize("memory", memory_params("anon", "shmem", "shmem-private"))


# UFFDIO_COPY


def test_copy(memory: Memory) -> None:
    region = memory.pages(3)
    data = bytes(range(256)) * (2 * memory.page_size // 256)
    with registered(region) as uffd:
        assert uffd.copy(region.start, data) == len(data)
        assert region.read(0, len(data)) == data
        assert no_events(uffd)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: array("Q", data)])
def test_sources(kind: type) -> None:
    data = bytes(range(256)) * 16
    with Region.anonymous(PAGE) as region, registered(region) as uffd:
        assert uffd.copy(region.start, kind(data)) == PAGE
        assert region.read() == data


def test_a_source_needs_no_alignment(memory: Memory) -> None:
    region = memory.pages(1)
    with Region.anonymous(memory.page_size + PAGE) as source, registered(region) as uffd:
        source.write(123, b"\x07" * memory.page_size)
        assert uffd.copy(region.start, source.start + 123, memory.page_size) == memory.page_size
        assert region.digest() == source.digest(offset=123, length=memory.page_size)


def test_part_of_a_source() -> None:
    with Region.anonymous(2 * PAGE) as region, registered(region) as uffd:
        assert uffd.copy(region.start, b"\x01" * (2 * PAGE), PAGE) == PAGE
        task = Task(region.read, PAGE, 1)
        assert next_fault(uffd).address == region.start + PAGE
        uffd.zeropage(region.start + PAGE, PAGE)
        assert task.result() == b"\0"


@pytest.mark.parametrize(
    ("source", "length", "shown"),
    [
        (bytes(PAGE - 1), PAGE, "0xfff"),
        (bytes(PAGE), 2 * PAGE, "0x2000"),
        (b"", PAGE, "0x0"),
        (b"", None, "0x0"),
        (bytes(PAGE + 1), None, "0x1001"),
        (0x1000, None, "0x1000"),
        (-1, PAGE, "-0x1"),
        ((1 << 64) - PAGE + 1, PAGE, hex((1 << 64) - PAGE + 1)),
    ],
)
def test_bad_sources(source: bytes | int, length: int | None, shown: str) -> None:
    with Region.anonymous(2 * PAGE) as region, registered(region) as uffd:
        for call in (uffd.copy, uffd.fill_copy):
            with pytest.raises(ValueError, match=shown):
                call(region.start, source, length)
        # Nothing was filled: the page is still missing.
        assert uffd.copy(region.start, bytes(PAGE)) == PAGE


def test_copy_to_a_present_page(memory: Memory) -> None:
    region = memory.pages(1)
    region.fill(1)
    with registered(region) as uffd:
        with pytest.raises(PageExistsError) as caught:
            uffd.copy(region.start, bytes(memory.page_size))
        error = caught.value
        assert isinstance(error, FileExistsError)
        assert error.errno == errno.EEXIST
        assert (error.start, error.length) == (region.start, memory.page_size)
        assert hex(region.start) in str(error)
        assert region.read(0, 1) == b"\x01"


def test_copy_stopped_by_a_present_page(memory: Memory) -> None:
    region = memory.pages(4)
    size = memory.page_size
    region.write(2 * size, b"\x01")
    with registered(region) as uffd:
        with pytest.raises(PartialResolveError) as caught:
            uffd.copy(region.start, b"\x02" * (4 * size))
        assert isinstance(caught.value, BlockingIOError)
        assert caught.value.errno == errno.EAGAIN
        assert caught.value.completed == 2 * size
        with pytest.raises(PageExistsError):
            uffd.copy(region.start + 2 * size, bytes(2 * size))
        assert uffd.copy(region.start + 3 * size, b"\x02" * size) == size
        assert [region.read(number * size, 1)[0] for number in range(4)] == [2, 2, 1, 2]


def test_copy_one_of_two_pages(memory: Memory) -> None:
    region = memory.pages(2)
    region.write(memory.page_size, b"\x01")
    with registered(region) as uffd, pytest.raises(PartialResolveError) as caught:
        uffd.copy(region.start, bytes(2 * memory.page_size))
    assert caught.value.completed == memory.page_size


def test_source_that_cannot_be_read(memory: Memory) -> None:
    size = memory.page_size
    region = memory.pages(2)
    with Region.anonymous(2 * size) as source, registered(region) as uffd:
        source.fill(3)
        raw.mprotect(source.start + size, size, PROT_NONE)
        with pytest.raises(PartialResolveError) as caught:
            uffd.copy(region.start, source.start, 2 * size)
        assert caught.value.completed == size
        with pytest.raises(UffdOSError) as caught_too:
            uffd.copy(region.start + size, source.start + size, size)
        assert caught_too.value.errno == errno.EFAULT
        assert region.read(0, 1) == b"\x03"


def test_copy_to_unregistered_memory(memory: Memory) -> None:
    region = memory.pages(2)
    size = memory.page_size
    with Userfaultfd() as uffd:
        uffd.register(region.start, size)
        for start, length in ((region.start + size, size), (region.start, 2 * size)):
            with pytest.raises(LayoutChangedError) as caught:
                uffd.copy(start, bytes(length))
            assert isinstance(caught.value, FileNotFoundError)
            assert caught.value.errno == errno.ENOENT
        assert uffd.copy(region.start, bytes(size)) == size


def test_copy_to_unmapped_memory() -> None:
    region = Region.anonymous(PAGE)
    start = region.start
    with Userfaultfd() as uffd:
        uffd.register(region)
        region.close()
        with pytest.raises(LayoutChangedError) as caught:
            uffd.copy(start, bytes(PAGE))
        assert caught.value.errno == errno.ENOENT


def test_unknown_mode() -> None:
    with Region.anonymous(PAGE) as region, registered(region) as uffd:
        with pytest.raises(UffdOSError) as caught:
            uffd.copy(region.start, bytes(PAGE), mode=CopyMode(1 << 40))
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(UffdOSError) as caught:
            uffd.zeropage(region, mode=ZeropageMode(1 << 40))
        assert caught.value.errno == errno.EINVAL
        assert uffd.copy(region.start, bytes(PAGE)) == PAGE


@pytest.mark.parametrize("name", memory_params("hugetlb", "hugetlb-private"))
def test_less_than_a_huge_page(name: str) -> None:
    factory = memory_of(name)
    region = factory.pages(1)
    with registered(region) as uffd:
        for call in (uffd.copy, uffd.fill_copy):
            with pytest.raises(UffdOSError) as caught:
                call(region.start, bytes(PAGE))
            assert caught.value.errno == errno.EINVAL
            assert hex(region.start) in str(caught.value)
        assert uffd.copy(region.start, bytes(factory.page_size)) == factory.page_size
    factory.close()


@needs_kernel_faults()
def test_a_source_that_is_itself_missing(memory: Memory) -> None:
    region, source = memory.pages(1), memory.pages(1)
    size = memory.page_size
    with registered(region) as uffd, registered(source) as other:
        task = Task(uffd.copy, region.start, source.start, size)
        assert next_fault(other).address == source.start
        other.copy(source.start, b"\x08" * size)
        assert task.result() == size
        assert region.read(0, 1) == b"\x08"


@NEEDS_WP
def test_copy_write_protected(memory: Memory) -> None:
    region = memory.pages(2)
    size = memory.page_size
    with registered(region, MISSING | WP) as uffd, Pagemap() as pagemap:
        uffd.copy(region.start, b"\x01" * size, mode=CopyMode.WP)
        uffd.copy(region.start + size, b"\x01" * size)
        entries = pagemap.read(region)
        assert PageBit.UFFD_WP in entries.at(region.start)
        assert PageBit.UFFD_WP not in entries.at(region.start + size)
        assert region.read(0, 1) == b"\x01"
        region.write(size, b"\x02")
        assert no_events(uffd)
        task = Task(region.write, 0, b"\x02")
        fault = next_fault(uffd)
        assert fault.address == region.start
        assert fault.flags == PagefaultFlag.WP | PagefaultFlag.WRITE
        assert region.read(0, 1) == b"\x01"
        uffd.writeprotect(region.start, size, mode=WriteprotectMode(0))
        task.result()
        assert region.read(0, 1) == b"\x02"
        assert no_events(uffd)


def test_copy_without_waking(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        task = Task(region.read, 0, 1)
        next_fault(uffd)
        uffd.copy(region.start, b"\x06" * memory.page_size, mode=CopyMode.DONTWAKE)
        # EEXIST does not wake either.
        with pytest.raises(PageExistsError):
            uffd.copy(region.start, bytes(memory.page_size))
        assert task.running
        uffd.wake(region)
        assert task.result() == b"\x06"
        assert no_events(uffd)


def test_one_copy_wakes_everyone(memory: Memory) -> None:
    region = memory.pages(4)
    size = memory.page_size
    with registered(region) as uffd:
        tasks = [Task(region.read, number * size, 1) for number in range(4)]
        wait_for_pending(uffd, 4)
        faults = uffd.read_events()
        assert {fault.address for fault in faults} == {  # type: ignore[union-attr]
            region.start + number * size for number in range(4)
        }
        uffd.copy(region.start, b"\x05" * (4 * size))
        assert [task.result() for task in tasks] == [b"\x05"] * 4


def test_nobody_saw_the_page_half_filled(memory: Memory) -> None:
    """A waiting thread always reads the whole page as it was copied."""
    region = memory.pages(1)
    data = bytes(range(256)) * (memory.page_size // 256)
    with registered(region) as uffd:
        task = Task(region.read)
        next_fault(uffd)
        uffd.copy(region.start, data)
        assert task.result() == data


# UFFDIO_ZEROPAGE


@SMALL
@needs_ioctl(Ioctl.ZEROPAGE)
class TestZeropage:
    @pytest.fixture
    def factory(self, memory: str) -> Iterator[Memory]:
        factory = memory_of(memory)
        yield factory
        factory.close()

    def test_zeropage(self, factory: Memory) -> None:
        region = factory.pages(2)
        with registered(region) as uffd:
            task = Task(region.read, PAGE, 4)
            next_fault(uffd)
            assert uffd.zeropage(region) == 2 * PAGE
            assert task.result() == bytes(4)
            region.write(0, b"\x01")
            assert region.read(0, 2) == b"\x01\0"
            assert no_events(uffd)

    def test_present(self, factory: Memory) -> None:
        region = factory.pages(1)
        region.fill(1)
        with registered(region) as uffd:
            with pytest.raises(PageExistsError) as caught:
                uffd.zeropage(region)
            assert caught.value.errno == errno.EEXIST
            assert region.read(0, 1) == b"\x01"

    def test_stopped_by_a_present_page(self, factory: Memory) -> None:
        region = factory.pages(3)
        region.write(PAGE, b"\x01")
        with registered(region) as uffd:
            with pytest.raises(PartialResolveError) as caught:
                uffd.zeropage(region)
            assert caught.value.completed == PAGE

    def test_unregistered(self, factory: Memory) -> None:
        region = factory.pages(1)
        with Userfaultfd() as uffd, pytest.raises(LayoutChangedError) as caught:
            uffd.zeropage(region)
        assert caught.value.errno == errno.ENOENT

    def test_without_waking(self, factory: Memory) -> None:
        region = factory.pages(1)
        with registered(region) as uffd:
            task = Task(region.read, 0, 1)
            next_fault(uffd)
            uffd.zeropage(region, mode=ZeropageMode.DONTWAKE)
            with pytest.raises(PageExistsError):
                uffd.zeropage(region)
            assert task.running
            uffd.wake(region)
            assert task.result() == b"\0"


@pytest.mark.parametrize("name", memory_params("hugetlb", "hugetlb-private"))
def test_huge_pages_take_no_zeropage(name: str) -> None:
    factory = memory_of(name)
    region = factory.pages(1)
    with registered(region) as uffd:
        with pytest.raises(UffdOSError) as caught:
            uffd.zeropage(region)
        assert caught.value.errno == errno.EINVAL
        assert caught.value.data["completed"] == 0
    factory.close()
