"""Residency: hole, swapped out, in the page cache, mapped, for every kind of mapping."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyuffd import (
    Feature,
    PageResidency,
    Region,
    RegisterMode,
    Residency,
    UffdOSError,
    Userfaultfd,
    residency,
)
from pyuffd.testing import needs, needs_hugepages, needs_privilege, needs_swap, swap_out
from pyuffd.testing._memory_types import HUGE_PAGE
from tests._child import run_child
from tests._memory import PAGE, Memory

HOLE, SWAPPED, RESIDENT, MAPPED, PRIVATE, POISON, UNKNOWN = PageResidency
NOBODY = 65534

WP = needs(Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM)


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    with Userfaultfd(features=Feature.WP_UNPOPULATED) as own:
        yield own


def fd_of(region: Region) -> int:
    assert region.fd is not None
    return region.fd


def states(region: Region) -> list[PageResidency]:
    return list(residency(region))


def test_holes_and_mapped_pages(memory: Memory) -> None:
    region = memory.pages(4)
    assert states(region) == [HOLE] * 4
    region.fill(1, memory.page_size, 1)
    own = MAPPED if memory.is_anon or memory.shared else PRIVATE
    assert states(region) == [HOLE, own, HOLE, HOLE]
    found = region.residency()
    assert (found.start, found.page_size) == (region.start, memory.page_size)
    assert list(found) == states(region)
    (run,) = found.where(own)
    assert run.start == region.start + memory.page_size
    assert run.end == region.start + 2 * memory.page_size


def test_page_cache_of_another_mapping() -> None:
    with Region.memfd(4 * PAGE) as region, region.alias() as alias:
        alias.fill(1, PAGE, 2 * PAGE)
        assert states(region) == [HOLE, RESIDENT, RESIDENT, HOLE]
        assert states(alias) == [HOLE, MAPPED, MAPPED, HOLE]
        region.fill(1, 2 * PAGE, 1)
        assert states(region)[2] == MAPPED


@needs_swap()
def test_swapped_shared_memory() -> None:
    with Region.memfd(6 * PAGE) as region, region.alias() as alias:
        alias.fill(7, PAGE, 4 * PAGE)
        swap_out(alias, 2 * PAGE, 2 * PAGE)
        assert states(region) == [HOLE, RESIDENT, SWAPPED, SWAPPED, RESIDENT, HOLE]
        assert states(alias) == [HOLE, MAPPED, SWAPPED, SWAPPED, MAPPED, HOLE]
        # residency() did not bring them back; reading does.
        assert alias.read(2 * PAGE, 1) == b"\7"
        assert states(alias)[2] == MAPPED


@needs_swap()
def test_swapped_anonymous_memory() -> None:
    with Region.anonymous(4 * PAGE) as region:
        region.fill(1, 0, 3 * PAGE)
        swap_out(region, PAGE, PAGE)
        assert states(region) == [MAPPED, SWAPPED, MAPPED, HOLE]


@WP
@needs_swap()
@needs_privilege()
def test_markers_are_not_swap(uffd: Userfaultfd) -> None:
    """Pagemap shows the same two bits for pages 1 to 3."""
    with Region.anonymous(5 * PAGE) as region:
        region.fill(1, 2 * PAGE, 3 * PAGE)
        uffd.register(region, mode=RegisterMode.WP)
        uffd.writeprotect(region.start + PAGE, 3 * PAGE)
        swap_out(region, 2 * PAGE, 2 * PAGE)
        assert states(region) == [HOLE, HOLE, SWAPPED, SWAPPED, MAPPED]


@WP
@needs_swap()
def test_markers_in_shared_memory(uffd: Userfaultfd) -> None:
    with Region.memfd(4 * PAGE) as region, region.alias() as alias:
        alias.fill(1, 0, 2 * PAGE)
        uffd.register(region, mode=RegisterMode.WP)
        uffd.writeprotect(region)
        swap_out(alias, PAGE, PAGE)
        assert states(region) == [RESIDENT, SWAPPED, HOLE, HOLE]
        region.touch(0, PAGE)
        assert states(region)[0] == MAPPED


@needs_swap()
def test_private_mapping_of_shared_memory() -> None:
    with Region.memfd(6 * PAGE, shared=False) as region:
        os.pwrite(fd_of(region), b"x" * 3 * PAGE, 0)
        region.fill(1, PAGE, 1)
        region.fill(1, 4 * PAGE, 2 * PAGE)
        swap_out(region, 5 * PAGE, PAGE)
        assert states(region) == [RESIDENT, PRIVATE, RESIDENT, HOLE, PRIVATE, SWAPPED]
        region.touch(0, PAGE)
        assert states(region)[:2] == [MAPPED, PRIVATE]


@needs(Feature.POISON)
@needs_privilege()
@pytest.mark.parametrize("shared", [False, True])
def test_poisoned_pages(shared: bool, uffd: Userfaultfd) -> None:
    with contextlib.ExitStack() as stack:
        region = stack.enter_context(
            Region.memfd(2 * PAGE) if shared else Region.anonymous(2 * PAGE)
        )
        uffd.register(region, mode=RegisterMode.MISSING)
        uffd.poison(region.start + PAGE, PAGE)
        assert states(region) == [HOLE, POISON]


def test_file_of_a_disk() -> None:
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.truncate(4 * PAGE)
        os.pwrite(file.fileno(), b"x" * 2 * PAGE, PAGE)
        os.fsync(file.fileno())
        address = mmap.mmap(file.fileno(), 4 * PAGE, mmap.MAP_PRIVATE)
        try:
            with Region.at(address_of(address), 4 * PAGE) as region:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert list(residency(region, fd=file.fileno())) == [HOLE, SWAPPED, SWAPPED, HOLE]
                os.pread(file.fileno(), 1, PAGE)
                assert residency(region, fd=file.fileno())[1] == RESIDENT
        finally:
            address.close()


def address_of(mapping: mmap.mmap) -> int:
    import ctypes

    anchor = ctypes.c_char.from_buffer(mapping)
    try:
        return ctypes.addressof(anchor)
    finally:
        del anchor


@needs_swap()
@needs_privilege()
def test_shared_memory_without_a_descriptor() -> None:
    """The kernel's link to the mapped file is used instead."""
    with Region.memfd(4 * PAGE) as region, region.alias() as alias:
        alias.fill(1, 0, 2 * PAGE)
        swap_out(alias, PAGE, PAGE)
        found = residency(region.start, region.length)
        assert list(found) == [RESIDENT, SWAPPED, HOLE, HOLE]


def without_privilege() -> list[str]:
    """Residency of root's memory, for a user who may neither write its file nor reopen it."""
    with (
        Region.memfd(3 * PAGE) as region,
        region.alias() as alias,
        Region.anonymous(2 * PAGE) as anonymous,
        Userfaultfd(features=Feature.WP_UNPOPULATED) as uffd,
    ):
        alias.fill(1, PAGE, PAGE)
        region.fill(1, 2 * PAGE, 1)
        uffd.register(anonymous, mode=RegisterMode.WP)
        uffd.writeprotect(anonymous.start, PAGE)
        os.fchmod(fd_of(region), 0o600)
        os.setgroups([])
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # From now on only open descriptors work: dropping privilege hid /proc/self.
        make_dumpable()
        return [state.name for part in (region, anonymous) for state in residency(part)]


def make_dumpable() -> None:
    import ctypes

    assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE


@WP
@needs_privilege()
def test_what_is_not_told_is_unknown() -> None:
    assert run_child(without_privilege).value == ["UNKNOWN", "UNKNOWN", "MAPPED", "UNKNOWN", "HOLE"]


@needs_hugepages(3)
def test_hugetlb_page_cache() -> None:
    """Hugetlbfs supports neither mincore(2) nor seeking, but tells how much it has allocated."""
    with Region.memfd(3 * HUGE_PAGE, huge_page_size=HUGE_PAGE) as region, region.alias() as alias:
        assert states(region) == [HOLE] * 3
        alias.fill(1, 0, 1)
        assert states(alias) == [MAPPED, HOLE, HOLE]
        assert states(region) == [UNKNOWN] * 3
        alias.fill(1)
        assert states(region) == [RESIDENT] * 3


def test_part_of_a_region_and_its_alias_at_an_offset() -> None:
    with Region.memfd(600 * PAGE) as region:
        os.pwrite(fd_of(region), b"x", 500 * PAGE)
        part = residency(region.start + 499 * PAGE, 3 * PAGE, fd=region.fd)
        assert list(part) == [HOLE, RESIDENT, HOLE]
        assert region.residency(500 * PAGE, PAGE).states == bytes([RESIDENT])


def test_more_pages_than_one_step() -> None:
    with Region.memfd(10_000 * PAGE) as region:
        for page in range(0, 10_000, 100):
            os.pwrite(fd_of(region), b"x", page * PAGE)
        found = residency(region)
        assert found.counts() == {HOLE: 9900, RESIDENT: 100}
        assert [run.start for run in found.where(RESIDENT)] == [
            region.start + page * PAGE for page in range(0, 10_000, 100)
        ]


def test_several_mappings_in_one_range() -> None:
    with Region.anonymous(8 * PAGE) as region:
        region.fill(1, 0, 5 * PAGE)
        # Other flags split the mapping in three.
        region.madvise(mmap.MADV_DONTDUMP, 2 * PAGE, 2 * PAGE)
        assert states(region) == [MAPPED] * 5 + [HOLE] * 3


def test_position_of_the_descriptor_stays() -> None:
    with Region.memfd(4 * PAGE) as region:
        os.lseek(fd_of(region), 5, os.SEEK_SET)
        residency(region)
        assert os.lseek(fd_of(region), 0, os.SEEK_CUR) == 5


def test_unmapped_part() -> None:
    with Region.anonymous(4 * PAGE) as region:
        with Region.anonymous(PAGE) as gone:
            start = gone.start
        with pytest.raises(UffdOSError) as caught:
            residency(start, PAGE)
        assert caught.value.errno == errno.ENOMEM
        assert isinstance(residency(region), Residency)


def test_descriptor_of_another_file() -> None:
    with Region.memfd(PAGE) as region, Region.memfd(PAGE) as other:
        with pytest.raises(ValueError):
            residency(region.start, region.length, fd=other.fd)
        with Path("/proc/self/status").open() as file, pytest.raises(ValueError):
            residency(region.start, region.length, fd=file.fileno())


@pytest.mark.parametrize(
    ("start", "length", "page_size"),
    [
        (1, PAGE, None),
        (0, 0, None),
        (-PAGE, PAGE, None),
        (PAGE, PAGE, 8192),
        (PAGE, PAGE, HUGE_PAGE),
    ],
)
def test_bad_ranges(start: int, length: int, page_size: int | None) -> None:
    with pytest.raises(ValueError):
        residency(start, length, page_size=page_size)
