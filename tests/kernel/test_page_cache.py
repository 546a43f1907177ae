"""The content of a page that the page cache has already, for each way of filling it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    PageSource,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
)
from pyuffd.testing import MEMORY_TYPES
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._serving import content, states, wait_until

MINOR, MISSING, WP = RegisterMode.MINOR, RegisterMode.MISSING, RegisterMode.WP
PAGES = 8
IN_CACHE = (3, 4)

Driver = Literal["native", "inline", "thread", "process"]
Way = Literal["fault", "prefetch", "populate"]
MODES = (MINOR, MINOR | WP, MISSING | MINOR, MISSING | MINOR | WP, MISSING)


@contextmanager
def source_for(driver: Driver, data: bytes) -> Iterator[PageSource]:
    if driver == "thread":
        yield CallableSource(lambda offset, length: data[offset : offset + length], len(data))
    elif driver == "process":
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            with FileSource(file.name) as source:
                yield source
    else:
        yield BufferSource(data)


def fd_of(region: Region) -> int:
    assert region.fd is not None
    return region.fd


def check(driver: Driver, name: str) -> None:
    private = not MEMORY_TYPES[name].shared
    # The source's content is written to the file, which must be shared for that.
    for mode in [mode for mode in MODES if mode & MISSING or not private]:
        for way in get_args(Way):
            one_way(driver, name, mode, way)


def one_way(driver: Driver, name: str, mode: RegisterMode, way: Way) -> None:
    memory = memory_of(name)
    size = memory.page_size
    features = Feature.MINOR_HUGETLBFS if memory.is_hugetlb else Feature.MINOR_SHMEM
    if mode & WP:
        features |= Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
    if driver == "inline":
        features |= Feature.SIGBUS
    data = content(PAGES * size)
    prefetch = PAGES * size if way == "prefetch" else 0
    with (
        Userfaultfd(features=features) as uffd,
        memory.pages(PAGES) as region,
        source_for(driver, data) as source,
        Handler(uffd, driver=driver, prefetch=prefetch) as handler,
    ):
        expected = bytearray(data)
        with Region.file(fd_of(region)) as other:
            for page in IN_CACHE:
                other.write(page * size, b"in the page cache")
                if mode & MISSING:  # the page is present, and its content is not asked for
                    expected[page * size : (page + 1) * size] = other.read(page * size, size)
        # Without MINOR Linux maps them without a word, which serve() refuses by default.
        handler.serve(region, source, mode=mode, present="keep" if mode == MISSING else None)
        handler.start()
        if way == "populate":
            handler.populate(region)
        if way == "prefetch":
            region.touch(0, size)
            filled = {*range(PAGES)}
            if mode == MISSING and memory.is_hugetlb:
                # EEXIST for a page that is not mapped may mean that no huge page is free.
                filled -= {*IN_CACHE}
            wait_until(
                lambda: PageState.ABSENT not in {states(handler, region)[page] for page in filled},
                "all is filled",
            )
        for page in range(PAGES):
            assert region.read(page * size, size) == expected[page * size :][:size], (way, page)
        seen = {*states(handler, region)}
        assert seen == {PageState.CLEAN} if mode != MISSING else PageState.DIRTY not in seen
        if mode & WP:
            region.write(3 * size, b"new")
            region.write(5 * size, b"new")
            found = states(handler, region)
            assert [page for page in range(PAGES) if found[page] != PageState.CLEAN] == [3, 5]


@pytest.mark.crossing
@pytest.mark.parametrize("driver", get_args(Driver))
@pytest.mark.parametrize(
    "name", memory_params("shmem", "shmem-private", "hugetlb", "hugetlb-private")
)
def test_pages_in_the_cache(driver: Driver, name: str) -> None:
    run_child(check, driver, name, budget_s=40)


def filled_beside(driver: Driver, name: str) -> None:
    """A page that another mapping has written keeps that content, whatever comes later."""
    memory = memory_of(name)
    size = memory.page_size
    features = Feature.MINOR_HUGETLBFS if memory.is_hugetlb else Feature.MINOR_SHMEM
    if driver == "inline":
        features |= Feature.SIGBUS
    data = content(PAGES * size)
    fills: list[Callable[[Handler, Region], object]] = [
        lambda handler, region: region.touch(0, size),
        lambda handler, region: handler.populate(region),
    ]
    for mode in (MINOR, MISSING | MINOR, MISSING):
        for fill in fills:
            with (
                Userfaultfd(features=features) as uffd,
                memory.pages(PAGES) as region,
                source_for(driver, data) as source,
                Handler(uffd, driver=driver, prefetch=PAGES * size) as handler,
            ):
                handler.serve(region, source, mode=mode)
                if mode & MISSING:
                    uffd.copy(region.start + 3 * size, bytes(size))
                else:
                    with region.alias() as other:
                        other.write(3 * size, b"there")
                    uffd.continue_(region.start + 3 * size, size)
                region.write(3 * size, b"written")
                handler.start()
                fill(handler, region)
                for page in range(PAGES):
                    if page != 3:
                        assert region.read(page * size, size) == data[page * size :][:size]
                assert region.read(3 * size, 7) == b"written", mode


@pytest.mark.crossing
@pytest.mark.parametrize("driver", get_args(Driver))
@pytest.mark.parametrize("name", memory_params("shmem", "hugetlb"))
def test_filled_beside(driver: Driver, name: str) -> None:
    run_child(filled_beside, driver, name, budget_s=20)
