"""UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, and the checks of their ranges."""

from __future__ import annotations

import errno
import mmap
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pyuffd import (
    Feature,
    Ioctl,
    LayoutChangedError,
    PageBit,
    Pagefault,
    PagefaultFlag,
    Pagemap,
    RangeBusyError,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    WriteprotectMode,
)
from pyuffd import _memory as raw
from pyuffd.testing import needs
from pyuffd.testing._need import kernel_features, range_ioctls
from tests._child import run_child
from tests._memory import Memory, memory_of, memory_params
from tests.kernel._faults import Task, next_fault, no_events, registered, wait_for_pending
from tests.kernel.test_userfaultfd_open import CALLS

pytestmark = needs(Feature(0))

PAGE = 4096
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
NEEDS_WP = needs(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)

# What Linux 6.18 answers in modes 1 to 7; 0 stands for EINVAL.
ANON = [0x13C, 0x17C, 0x17C, 0, 0, 0, 0]
SHMEM = [0x13C, 0x17C, 0x17C, 0x1BC, 0x1BC, 0x1FC, 0x1FC]
HUGETLB = [0x10C, 0x14C, 0x14C, 0x18C, 0x18C, 0x1CC, 0x1CC]
MASKS = {
    "anon": ANON,
    "shmem": SHMEM,
    "shmem-private": SHMEM,
    "hugetlb": HUGETLB,
    "hugetlb-private": HUGETLB,
}
# Ioctls and modes that came with a feature, and are absent without it.
IOCTL_FEATURES = {
    Ioctl.POISON: Feature.POISON,
    Ioctl.MOVE: Feature.MOVE,
    Ioctl.WRITEPROTECT: Feature.PAGEFAULT_FLAG_WP,
}


def has(feature: Feature) -> bool:
    return int(feature) & ~kernel_features() == 0


def expected_mask(memory: str, mode: int) -> Ioctl:
    mask = Ioctl(MASKS[memory][mode - 1])
    minor = Feature.MINOR_HUGETLBFS if memory.startswith("hugetlb") else Feature.MINOR_SHMEM
    if mode & MINOR and not has(minor):
        return Ioctl(0)
    if mode & WP and memory != "anon" and not has(Feature.WP_HUGETLBFS_SHMEM):
        return Ioctl(0)
    for bit, feature in IOCTL_FEATURES.items():
        if not has(feature):
            mask &= ~bit
    return mask


def vm_flags(address: int) -> set[str]:
    """Return the VmFlags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(head[1], 16) <= address < int(head[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"nothing is mapped at {address:#x}")


def modes_at(address: int) -> RegisterMode:
    flags = vm_flags(address)
    letters = {"um": MISSING, "uw": WP, "ui": MINOR}
    mode = RegisterMode(0)
    for letter, bit in letters.items():
        if letter in flags:
            mode |= bit
    return mode


# What a range supports


@pytest.mark.parametrize("mode", range(1, 8))
def test_masks(memory: Memory, mode: int) -> None:
    region = memory.pages(1)
    expected = expected_mask(memory.name, mode)
    with Userfaultfd() as uffd:
        if expected:
            ioctls = uffd.register(region, mode=RegisterMode(mode))
            assert ioctls == expected
            assert int(ioctls) == range_ioctls(memory.name, mode)
            assert modes_at(region.start) == RegisterMode(mode)
            uffd.unregister(region)
            assert modes_at(region.start) == RegisterMode(0)
        else:
            with pytest.raises(UffdOSError) as caught:
                uffd.register(region, mode=RegisterMode(mode))
            error = caught.value
            assert error.errno == errno.EINVAL
            assert (error.start, error.length) == (region.start, region.length)
            assert range_ioctls(memory.name, mode) == 0


def test_unknown_mode_goes_to_the_kernel(memory: Memory) -> None:
    region = memory.pages(1)
    with Userfaultfd() as uffd, pytest.raises(UffdOSError) as caught:
        uffd.register(region, mode=RegisterMode(1 << 40) | MISSING)
    assert caught.value.errno == errno.EINVAL
    assert hex(1 << 40 | 1) in str(caught.value)


def test_no_mode() -> None:
    with Region.anonymous(PAGE) as region, Userfaultfd() as uffd, pytest.raises(ValueError):
        uffd.register(region, mode=RegisterMode(0))


def test_by_address_or_by_region(memory: Memory) -> None:
    region = memory.pages(2)
    with Userfaultfd() as uffd:
        first = uffd.register(region)
        uffd.unregister(region.start, region.length)
        assert uffd.register(region.start, region.length) == first
        assert modes_at(region.start) == MISSING


# Bad input: a closed userfaultfd would be ClosedError, if the range were not checked first


TOP = 1 << 64
BAD = {
    "start-unaligned": (PAGE + 1, PAGE, "0x1001"),
    "length-unaligned": (PAGE, PAGE + 7, "0x1007"),
    "length-zero": (PAGE, 0, "0x0"),
    "length-negative": (PAGE, -PAGE, "-0x1000"),
    "start-negative": (-PAGE, PAGE, "-0x1000"),
    "start-beyond": (TOP, PAGE, "0x10000000000000000"),
    "crossing": (TOP - PAGE, 2 * PAGE, "0xfffffffffffff000"),
}
SOURCE = bytes(4 * PAGE)
WITH_RANGE: dict[str, Callable[[Userfaultfd, int, int], object]] = {
    "register": lambda uffd, start, length: uffd.register(start, length),
    "unregister": lambda uffd, start, length: uffd.unregister(start, length),
    "wake": lambda uffd, start, length: uffd.wake(start, length),
    "copy": lambda uffd, start, length: uffd.copy(start, SOURCE, length),
    "copy-address": lambda uffd, start, length: uffd.copy(start, PAGE, length),
    "zeropage": lambda uffd, start, length: uffd.zeropage(start, length),
    "move": lambda uffd, start, length: uffd.move(start, 64 * PAGE, length),
    "move-src": lambda uffd, start, length: uffd.move(64 * PAGE, start, length),
    "continue_": lambda uffd, start, length: uffd.continue_(start, length),
    "poison": lambda uffd, start, length: uffd.poison(start, length),
    "writeprotect": lambda uffd, start, length: uffd.writeprotect(start, length),
    "rwprotect": lambda uffd, start, length: uffd.rwprotect(start, length),
    "fill_copy": lambda uffd, start, length: uffd.fill_copy(start, SOURCE, length),
    "fill_zero": lambda uffd, start, length: uffd.fill_zero(start, length),
    "fill_continue": lambda uffd, start, length: uffd.fill_continue(start, length),
    "fill_poison": lambda uffd, start, length: uffd.fill_poison(start, length),
    "fill_move": lambda uffd, start, length: uffd.fill_move(start, 64 * PAGE, length),
    "fill_move-src": lambda uffd, start, length: uffd.fill_move(64 * PAGE, start, length),
}


def test_every_call_with_a_range_is_checked() -> None:
    without = {"fileno", "detach", "read_events", "set_mode"}
    assert {name.partition("-")[0] for name in WITH_RANGE} == CALLS.keys() - without


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("call", WITH_RANGE)
def test_bad_range_reaches_no_syscall(call: str, bad: str) -> None:
    start, length, shown = BAD[bad]
    uffd = Userfaultfd()
    uffd.close()
    with pytest.raises(ValueError) as caught:
        WITH_RANGE[call](uffd, start, length)
    assert type(caught.value) is ValueError
    assert shown in str(caught.value)


@pytest.mark.parametrize("memory", memory_params("hugetlb", "hugetlb-private"))
def test_small_pages_of_a_huge_region(memory: str) -> None:
    factory = memory_of(memory)
    region = factory.pages(1)

    class Part:
        start, length, page_size = region.start, PAGE, region.page_size

    with Userfaultfd() as uffd:
        with pytest.raises(ValueError, match=r"0x1000 .*0x200000"):
            uffd.register(Part())
        with pytest.raises(ValueError, match=r"0x1000 .*0x200000"):
            uffd.fill_zero(Part())
        # By address the page size is not known: the kernel refuses.
        with pytest.raises(UffdOSError) as caught:
            uffd.register(region.start, PAGE)
        assert caught.value.errno == errno.EINVAL
        assert hex(region.start) in str(caught.value)
        assert modes_at(region.start) == RegisterMode(0)
    factory.close()


def test_a_range_object_beside_a_length() -> None:
    with Region.anonymous(PAGE) as region, Userfaultfd() as uffd:
        with pytest.raises(ValueError):
            uffd.register(region, PAGE)
        with pytest.raises(ValueError, match=hex(region.start)):
            uffd.register(region.start)


def test_a_closed_region() -> None:
    region = Region.anonymous(PAGE)
    region.close()
    with Userfaultfd() as uffd, pytest.raises(ValueError):
        uffd.register(region)


@pytest.mark.parametrize("count", [0, -1])
def test_no_events_asked_for(count: int) -> None:
    with Userfaultfd() as uffd, pytest.raises(ValueError):
        uffd.read_events(count)


# What the kernel refuses


def test_unmapped() -> None:
    region = Region.anonymous(PAGE)
    start = region.start
    region.close()
    with Userfaultfd() as uffd, pytest.raises(UffdOSError) as caught:
        uffd.register(start, PAGE)
    assert caught.value.errno in {errno.EINVAL, errno.ENOMEM}
    assert hex(start) in str(caught.value)


def test_busy(memory: Memory) -> None:
    region = memory.pages(2)
    second = region.start + memory.page_size
    with Userfaultfd() as owner, Userfaultfd() as other:
        owner.register(second, memory.page_size)
        with pytest.raises(RangeBusyError) as caught:
            other.register(region)
        assert caught.value.errno == errno.EBUSY
        assert (caught.value.start, caught.value.length) == (region.start, region.length)
        # Nothing before the busy part was registered.
        assert modes_at(region.start) == RegisterMode(0)
        owner.unregister(second, memory.page_size)
        other.register(region)


def test_another_s_range_is_not_unregistered(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region), Userfaultfd() as other:
        with pytest.raises(UffdOSError) as caught:
            other.unregister(region)
        assert caught.value.errno == errno.EINVAL
        assert modes_at(region.start) == MISSING


def test_a_file_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(PAGE))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), PAGE) as mapping:
        view = memoryview(mapping)
        address, _, owner = raw.buffer_address(view)
        with Userfaultfd() as uffd, pytest.raises(UffdOSError) as caught:
            uffd.register(address, PAGE)
        assert caught.value.errno == errno.EINVAL
        del owner
        view.release()


# Unregistering


def test_unregister_twice(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        uffd.unregister(region)
        uffd.unregister(region)


def test_unregister_lets_a_waiter_go_with_zeros(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        task = Task(region.read, 0, 8)
        next_fault(uffd)
        uffd.unregister(region)
        assert task.result() == bytes(8)


@NEEDS_WP
def test_unregister_lets_a_writer_go(memory: Memory) -> None:
    """Linux by itself wakes only those that wait for a missing page."""
    region = memory.pages(1)
    region.fill(1)
    with registered(region, WP) as uffd:
        uffd.writeprotect(region)
        task = Task(region.write, 0, b"\x02")
        next_fault(uffd)
        uffd.unregister(region)
        task.result()
        assert region.read(0, 1) == b"\x02"


def test_closing_lets_a_waiter_go_with_zeros(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        task = Task(region.read, 0, 8)
        next_fault(uffd)
    assert task.result() == bytes(8)


@NEEDS_WP
def test_unregister_takes_protection_off(memory: Memory) -> None:
    region = memory.pages(2)
    region.fill(1)
    with registered(region, WP) as uffd, Pagemap() as pagemap:
        uffd.writeprotect(region)
        uffd.unregister(region.start, memory.page_size)
        entries = pagemap.read(region)
        assert PageBit.UFFD_WP not in entries.at(region.start)
        assert PageBit.UFFD_WP in entries.at(region.start + memory.page_size)
        region.write(0, b"\x02")
        assert no_events(uffd)


# Registering again


@NEEDS_WP
def test_other_modes_replace(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region, MISSING) as uffd:
        uffd.register(region, mode=WP)
        assert modes_at(region.start) == WP
        uffd.register(region, mode=MISSING | WP)
        assert modes_at(region.start) == MISSING | WP


@NEEDS_WP
def test_a_subset_changes_nothing(memory: Memory) -> None:
    """It changes neither the modes nor the protection, although WP was not asked for."""
    region = memory.pages(1)
    region.fill(1)
    with registered(region, MISSING | WP) as uffd, Pagemap() as pagemap:
        uffd.writeprotect(region)
        uffd.register(region, mode=MISSING)
        assert modes_at(region.start) == MISSING | WP
        assert PageBit.UFFD_WP in pagemap.read(region).at(region.start)
        task = Task(region.write, 0, b"\x02")
        assert next_fault(uffd).flags == PagefaultFlag.WP | PagefaultFlag.WRITE
        uffd.writeprotect(region, mode=WriteprotectMode(0))
        task.result()


def lose_wp(memory: str, pages: int, first: int, count: int) -> dict[str, object]:
    """Protect a region, register part of it for missing faults only, and write to all of it."""
    factory = memory_of(memory)
    region = factory.pages(pages)
    size = factory.page_size
    region.fill(1)
    part = region.start + first * size, count * size
    with registered(region, WP) as uffd, Pagemap() as pagemap:
        uffd.writeprotect(region)
        uffd.register(*part, mode=MISSING)
        entries = pagemap.read(region)
        protected = [
            PageBit.UFFD_WP in entries.at(region.start + number * size) for number in range(pages)
        ]
        modes = [int(modes_at(region.start + number * size)) for number in range(pages)]
        region.fill(2, first * size, count * size)
        silent = no_events(uffd)
        content = region.read(first * size, 1)[0]
    factory.close()
    return {"protected": protected, "modes": modes, "silent": silent, "content": content}


@NEEDS_WP
@pytest.mark.parametrize("memory", memory_params())
def test_protection_goes_with_its_registration(memory: str) -> None:
    """On hugetlb memory the write would never return if a page stayed protected."""
    assert run_child(lose_wp, memory, 4, 1, 2, budget_s=8).value == {
        "protected": [True, False, False, True],
        "modes": [WP, MISSING, MISSING, WP],
        "silent": True,
        "content": 2,
    }


@NEEDS_WP
def test_modes_of_a_mapping_that_is_gone() -> None:
    """A registration does not apply to the next mapping at the same address."""
    with Userfaultfd() as uffd:
        region = Region.anonymous(4 * PAGE)
        start, length = region.start, region.length
        uffd.register(region, mode=WP)
        region.close()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        assert raw.mmap(length, prot, flags, address=start) == start
        try:
            assert Ioctl.COPY in uffd.register(start, length, mode=MISSING)
            assert modes_at(start) == MISSING
            assert uffd.copy(start, bytes(length)) == length
        finally:
            raw.munmap(start, length)


# Faults and waking


def test_missing_fault(memory: Memory) -> None:
    region = memory.pages(2)
    with registered(region) as uffd:
        for offset, function, flags in (
            (5, lambda: region.read(5, 1), PagefaultFlag(0)),
            (
                memory.page_size,
                lambda: region.write(memory.page_size, b"\x09"),
                PagefaultFlag.WRITE,
            ),
        ):
            task = Task(function)
            fault = next_fault(uffd)
            assert fault == Pagefault(region.start + offset - offset % PAGE, flags, 0)
            uffd.copy(fault.address, b"\x03" * memory.page_size)
            task.result()
        assert region.read(5, 1) == b"\x03"
        assert region.read(memory.page_size, 2) == b"\x09\x03"
        assert no_events(uffd)


@needs(Feature.THREAD_ID | Feature.EXACT_ADDRESS)
def test_exact_address_and_thread(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region, features=Feature.THREAD_ID | Feature.EXACT_ADDRESS) as uffd:
        task = Task(region.read, 0x123, 1)
        fault = next_fault(uffd)
        assert fault == Pagefault(region.start + 0x123, PagefaultFlag(0), task.native_id)
        uffd.fill_zero(region)
        assert task.result() == b"\0"


def test_wake_without_resolving_sends_the_fault_again(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        task = Task(region.read, 0, 1)
        first = next_fault(uffd)
        uffd.wake(region)
        assert next_fault(uffd) == first
        assert task.running
        uffd.copy(region.start, b"\x01" * memory.page_size)
        assert task.result() == b"\x01"


def test_wake_of_nobody(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        uffd.wake(region)
        assert no_events(uffd)


def test_two_threads_on_a_page_send_two_faults(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region) as uffd:
        tasks = [Task(region.read, 0, 1), Task(region.read, 1, 1)]
        wait_for_pending(uffd, 2)
        assert uffd.read_events() == [Pagefault(region.start, PagefaultFlag(0), 0)] * 2
        uffd.copy(region.start, b"\x04" * memory.page_size)
        assert [task.result() for task in tasks] == [b"\x04"] * 2


def test_events_by_ones_and_twos() -> None:
    with Region.anonymous(3 * PAGE) as region, registered(region) as uffd:
        tasks = [Task(region.read, number * PAGE, 1) for number in range(3)]
        wait_for_pending(uffd, 3)
        assert [len(uffd.read_events(count)) for count in (1, 2, 1)] == [1, 2, 0]
        uffd.fill_zero(region)
        assert [task.result() for task in tasks] == [b"\0"] * 3


def test_not_registered_for_write_protection(memory: Memory) -> None:
    region = memory.pages(1)
    region.fill(1)
    with registered(region) as uffd, pytest.raises(LayoutChangedError) as caught:
        uffd.writeprotect(region)
    assert caught.value.errno == errno.ENOENT
