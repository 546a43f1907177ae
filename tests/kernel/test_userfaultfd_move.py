"""UFFDIO_MOVE: pages move without being copied."""

from __future__ import annotations

import errno
import os

import pytest

from pyuffd import (
    Feature,
    LayoutChangedError,
    MoveMode,
    PageExistsError,
    PartialResolveError,
    RangeBusyError,
    Region,
    UffdOSError,
    Userfaultfd,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._faults import Task, fork, next_fault, no_events, registered

pytestmark = needs(Feature.MOVE)

PAGE = 4096


def two(pages: int) -> tuple[Region, Region]:
    """Return a source with a byte per page, and an empty destination."""
    source = Region.anonymous(pages * PAGE)
    for number in range(pages):
        source.write(number * PAGE, bytes([number + 1]))
    return source, Region.anonymous(pages * PAGE)


def firsts(region: Region) -> list[int]:
    return [region.read(at, 1)[0] for at in range(0, region.length, PAGE)]


def moving(region: Region) -> Userfaultfd:
    uffd = Userfaultfd(features=Feature.MOVE)
    uffd.register(region)
    return uffd


def test_move() -> None:
    source, region = two(4)
    with source, region, moving(region) as uffd:
        assert uffd.move(region.start, source.start, 4 * PAGE) == 4 * PAGE
        assert firsts(region) == [1, 2, 3, 4]
        assert firsts(source) == [0, 0, 0, 0]
        assert no_events(uffd)


def test_move_resolves_a_fault() -> None:
    source, region = two(1)
    with source, region, moving(region) as uffd:
        task = Task(region.read, 0, 1)
        assert uffd.move(next_fault(uffd).address, source.start, PAGE) == PAGE
        assert task.result() == b"\x01"


def test_move_without_waking() -> None:
    source, region = two(1)
    with source, region, moving(region) as uffd:
        task = Task(region.read, 0, 1)
        next_fault(uffd)
        uffd.move(region.start, source.start, PAGE, mode=MoveMode.DONTWAKE)
        with pytest.raises(PageExistsError):
            uffd.copy(region.start, bytes(PAGE))
        assert task.running
        uffd.wake(region)
        assert task.result() == b"\x01"


def test_hole_in_the_source() -> None:
    with Region.anonymous(2 * PAGE) as source, Region.anonymous(2 * PAGE) as region:
        source.write(PAGE, b"\x02")
        with moving(region) as uffd:
            with pytest.raises(LayoutChangedError) as caught:
                uffd.move(region.start, source.start, 2 * PAGE)
            assert caught.value.errno == errno.ENOENT
            done = uffd.move(region.start, source.start, 2 * PAGE, mode=MoveMode.ALLOW_SRC_HOLES)
            assert done == 2 * PAGE
            assert region.read(PAGE, 1) == b"\x02"


def test_hole_behind_a_page() -> None:
    with Region.anonymous(2 * PAGE) as source, Region.anonymous(2 * PAGE) as region:
        source.write(0, b"\x01")
        with moving(region) as uffd, pytest.raises(PartialResolveError) as caught:
            uffd.move(region.start, source.start, 2 * PAGE)
        assert caught.value.errno == errno.EAGAIN
        assert caught.value.completed == PAGE


def test_present_destination() -> None:
    source, region = two(2)
    region.write(0, b"\x09")
    with source, region, moving(region) as uffd:
        with pytest.raises(PageExistsError) as caught:
            uffd.move(region.start, source.start, 2 * PAGE)
        assert caught.value.errno == errno.EEXIST
        assert firsts(source) == [1, 2]
        assert region.read(0, 1) == b"\x09"


def test_unregistered_destination() -> None:
    source, region = two(1)
    with source, region, Userfaultfd(features=Feature.MOVE) as uffd:
        with pytest.raises(UffdOSError) as caught:
            uffd.move(region.start, source.start, PAGE)
        assert caught.value.errno in {errno.EINVAL, errno.ENOENT}
        assert firsts(source) == [1]


@pytest.mark.parametrize("name", memory_params("shmem"))
def test_shared_memory_does_not_move(name: str) -> None:
    factory = memory_of(name)
    source, region = factory.pages(1), factory.pages(1)
    source.fill(1)
    with moving(region) as uffd, pytest.raises(UffdOSError) as caught:
        uffd.move(region.start, source.start, PAGE)
    assert caught.value.errno == errno.EINVAL
    factory.close()


def test_overlap() -> None:
    with Region.anonymous(4 * PAGE) as region, registered(region, features=Feature.MOVE) as uffd:
        for call in (uffd.move, uffd.fill_move):
            for src in (region.start, region.start + PAGE):
                with pytest.raises(ValueError, match=hex(src)):
                    call(region.start, src, 2 * PAGE)
                with pytest.raises(ValueError, match=hex(src)):
                    call(src, region.start, 2 * PAGE)


def shared_by_fork() -> int:
    """Try to move a page that a fork shares, or shared until it ended."""
    source, region = two(1)
    with source, region, moving(region) as uffd:
        reader, writer = os.pipe()
        pid = fork()
        if not pid:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        codes = []
        for end_first in (False, True):
            if end_first:
                os.close(writer)
                os.waitpid(pid, 0)
            with pytest.raises(RangeBusyError) as caught:
                uffd.move(region.start, source.start, PAGE)
            codes.append(caught.value.errno)
        os.close(reader)
        assert firsts(source) == [1]
        assert codes == [errno.EBUSY] * 2
        # A write makes the page this process's own again.
        source.write(0, b"\x07")
        return uffd.move(region.start, source.start, PAGE)


def test_page_shared_by_fork() -> None:
    assert run_child(shared_by_fork).value == PAGE


def test_fill_move_leaves_what_has_no_room() -> None:
    source, region = two(3)
    region.write(PAGE, b"\x09")
    with source, region, moving(region) as uffd:
        result = uffd.fill_move(region, source.start)
        assert (result.done, result.already_present, result.deferred) == (2 * PAGE, PAGE, 0)
        assert firsts(region) == [1, 9, 3]
        assert firsts(source) == [0, 2, 0]


def test_fill_move_says_where_the_hole_is() -> None:
    with Region.anonymous(3 * PAGE) as source, Region.anonymous(3 * PAGE) as region:
        source.write(0, b"\x01")
        with moving(region) as uffd:
            with pytest.raises(LayoutChangedError) as caught:
                uffd.fill_move(region, source.start)
            assert caught.value.start == region.start + PAGE
            assert caught.value.length == 2 * PAGE
            assert caught.value.data["completed"] == PAGE
            rest = uffd.fill_move(
                region.start + PAGE,
                source.start + PAGE,
                2 * PAGE,
                mode=MoveMode.ALLOW_SRC_HOLES,
            )
            assert rest.done == 2 * PAGE
