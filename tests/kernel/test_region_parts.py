"""`region[a:b]`: a part of a region is a region, wherever one is expected."""

from __future__ import annotations

import copy
import gc
import mmap
from typing import Any

import numpy as np
import pytest

from pyuffd import (
    BufferSource,
    ClosedError,
    Feature,
    Pagemap,
    PagePoisonedError,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
    residency,
)
from tests._memory import PAGE, Memory
from tests.kernel._serving import content, everywhere, serving

DRIVERS: Any = ("native", "inline", "process")

# slice, offset, length in a region of 0x3000 bytes
SLICES = [
    (slice(None), 0, 0x3000),
    (slice(0, 0x1000), 0, 0x1000),
    (slice(0x1000, None), 0x1000, 0x2000),
    (slice(-0x1000, None), 0x2000, 0x1000),
    (slice(None, -0x2000), 0, 0x1000),
    (slice(-0x2000, -0x1000, 1), 0x1000, 0x1000),
    (slice(5, 7), 5, 2),
    (slice(np.int64(5), np.int64(7)), 5, 2),
]
BAD_SLICES: list[tuple[Any, type[Exception], str]] = [
    (slice(0, 0x3001), ValueError, "outside"),
    (slice(0x4000, None), ValueError, "outside"),
    (slice(-0x3001, None), ValueError, "outside"),
    (slice(5, 5), ValueError, "empty"),
    (slice(7, 5), ValueError, "empty"),
    (slice(0x3000, None), ValueError, "empty"),
    (slice(0, 5, 2), ValueError, "step"),
    (slice(5, 0, -1), ValueError, "step"),
    (slice(0, 5, 0), ValueError, "step"),
    (slice("a", None), TypeError, "start"),
    (slice(None, 1.5), TypeError, "stop"),
    (0, TypeError, "read"),
    (-1, TypeError, "read"),
    ("a", TypeError, "read"),
    ((slice(0, 5), 0), TypeError, "read"),
]


@pytest.mark.parametrize(("part", "offset", "length"), SLICES, ids=str)
def test_offset_and_length(part: slice, offset: int, length: int) -> None:
    with Region.memfd(0x3000) as region:
        found = region[part]
        assert isinstance(found, Region)
        assert (found.start, found.length, len(found)) == (region.start + offset, length, length)
        assert (found.offset, found.page_size, found.kind) == (offset, PAGE, region.kind)
        assert (found.shared, found.writable, found.fd) == (True, True, region.fd)
        region.write(offset, b"ab")
        assert found.read(0, 2) == b"ab"
        found.write(length - 1, b"z")
        assert region.read(offset + length - 1, 1) == b"z"


@pytest.mark.parametrize(("part", "error", "named"), BAD_SLICES, ids=str)
def test_bad_slices(part: Any, error: type[Exception], named: str) -> None:
    with Region.anonymous(0x3000) as region, pytest.raises(error, match=named):
        region[part]


def test_a_region_is_no_sequence() -> None:
    with Region.anonymous(PAGE) as region:
        uses: list[Any] = [iter, list, bytes, reversed, lambda it: b"x" in it, lambda it: 0 in it]
        for use in uses:
            with pytest.raises(TypeError):
                use(region)
        assert len(region) == PAGE


def test_a_part_of_a_part(memory: Memory) -> None:
    region = memory.pages(3)
    part = region[memory.page_size :][: memory.page_size][16:32]
    assert (part.start, part.length) == (region.start + memory.page_size + 16, 16)
    part.fill(7)
    assert region.read(memory.page_size + 15, 18) == b"\0" + b"\7" * 16 + b"\0"
    assert part.digest() == region.digest(offset=memory.page_size + 16, length=16)


def test_its_views(memory: Memory) -> None:
    region = memory.pages(1)
    part = region[8:24]
    array = np.asarray(part)
    array[:] = range(16)
    assert region.read(8, 16) == bytes(range(16)) == part.memoryview().tobytes()
    assert region[8:].outlives_close()
    region.close()
    assert array[3] == 3  # the view keeps the memory mapped
    with pytest.raises(ClosedError):
        part.read()


def test_it_keeps_the_region_alive() -> None:
    part = Region.memfd(2 * PAGE)[PAGE:]
    gc.collect()
    part.write(0, b"alive")
    assert part.read(0, 5) == b"alive"
    whole = part._root
    part.close()
    part.close()
    assert part.closed
    assert not whole.closed
    whole.close()


def test_it_ends_with_the_region() -> None:
    region = Region.memfd(2 * PAGE)
    part = region[PAGE:]
    with part:
        assert "part" in repr(part)
        region.close()
        assert part.closed
        assert part.fd is None
        assert "closed" in repr(part)
    for use in (part.read, part.memoryview, lambda: part.start, lambda: part[:5], part.alias):
        with pytest.raises(ClosedError):
            use()


def test_it_is_not_copied() -> None:
    with Region.anonymous(PAGE) as region, pytest.raises(TypeError, match="alias"):
        copy.copy(region[:5])


def test_pages_of_a_part(memory: Memory) -> None:
    page = memory.page_size
    region = memory.pages(3)
    part = region[page : 2 * page]
    region.fill(1)
    part.punch_hole()
    if not memory.is_anon and not memory.shared:
        assert part.residency().states[0] is not None
    assert [region.read(at * page, 1) for at in range(3)] == [b"\1", b"\0", b"\1"]
    with pytest.raises(ValueError, match="address"):
        region[8:].madvise(mmap.MADV_NORMAL, 0, page)
    with pytest.raises(ValueError, match="offset"):
        part.madvise(mmap.MADV_NORMAL, 8, page)
    if memory.shared:
        with part.alias() as alias:
            part.write(0, b"seen twice")
            assert alias.read(0, 10) == b"seen twice"
            assert alias.length == page
        with pytest.raises(ValueError):
            region[8:].alias()


def registered(driver: Any, name: str) -> None:
    del driver
    with Userfaultfd() as uffd, serving("native", name) as (_, memory), Pagemap() as pagemap:
        page = memory.page_size
        region = memory.pages(3)
        part = region[page : 2 * page]
        uffd.register(part)
        uffd.copy(part.start, b"x" * page)
        assert part.read(0, 2) == b"xx"
        assert len(pagemap.read(part)) == page // PAGE
        assert len(residency(part).states) == 1
        region.touch(0, page)  # not registered
        uffd.unregister(part)
        with pytest.raises(ValueError):
            uffd.register(region[8:])


test_userfaultfd_and_pagemap = pytest.mark.crossing(everywhere(registered, drivers=("native",)))


def served(driver: Any, name: str) -> None:
    with serving(driver, name) as (handler, memory):
        handler.start()
        page = memory.page_size
        data = content(PAGE).ljust(page, b"-")
        region = memory.pages(4)
        first, second = region[page : 2 * page], region[2 * page :]
        handler.serve(first, data)
        assert region.read(page, page) == data
        assert region.read(0, 1) == b"\0"  # not served
        assert list(handler.page_states(first)) == [PageState.CLEAN]
        handler.unserve(first)
        assert first.was_served
        assert region.was_served
        assert not second.was_served
        handler.serve(second, BufferSource(data * 2))
        assert second.read(page) == data
        second.close()  # this stops serving it, and the page that was never loaded is lost
        with pytest.raises(PagePoisonedError):
            region.read(2 * page, 1)
        assert region.read(3 * page, page) == data
        # Pages that a handler has filled are kept when it is served again.
        handler.serve(region[3 * page :], data)
        third = region[:page]
        with pytest.raises(ValueError, match="already present"):
            handler.serve(third, data)
        handler.serve(third, data, present="keep")
        region.close()
        assert not handler._served


test_parts_are_served = pytest.mark.crossing(everywhere(served, drivers=("native", "inline")))


def parts_of_a_served_region(driver: Any, name: str) -> None:
    """What a handler does to a region it does to a part of it, by offsets in the part."""
    mode = RegisterMode.MISSING | RegisterMode.WP
    features = Feature.WP_UNPOPULATED if name == "anon" else Feature.WP_HUGETLBFS_SHMEM
    with serving(driver, name, features) as (handler, memory):
        handler.start()
        page = memory.page_size
        region = memory.pages(4)
        handler.serve(region, ZeroSource(), mode=mode)
        part = region[page : 3 * page]
        assert handler.populate(part, page) == page
        assert list(handler.page_states(region)) == [0, 0, PageState.CLEAN, 0]
        assert list(handler.page_states(part)) == [0, PageState.CLEAN]
        assert list(handler.page_states(region[:page])) == [0]
        part.write(page, b"x")
        assert list(handler.writeprotect(part, page)) == [PageState.DIRTY]
        assert list(handler.page_states(part)) == [0, PageState.CLEAN]
        for offset, length in ((2 * page, page), (0, 3 * page), (-page, page), (page, 2 * page)):
            with pytest.raises(ValueError):
                handler.page_states(part, offset, length)
        with pytest.raises(ValueError):
            handler.page_states(region[8 : page + 8])
        handler.unserve(part)
        assert list(handler.page_states(region[:page])) == [0]
        with memory.pages(1) as other, pytest.raises(ValueError, match="no range"):
            handler.page_states(other[:])


test_parts_of_a_served_region = pytest.mark.crossing(
    everywhere(parts_of_a_served_region, drivers=DRIVERS)
)
