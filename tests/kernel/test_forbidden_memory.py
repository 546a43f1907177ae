"""Memory that its owner may not read (mprotect(2)): what reads it says so, and loses nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from typing import Literal

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    HandlerError,
    PageState,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import PAGE

PAGES = 4
NONE, BOTH = 0, mmap.PROT_READ | mmap.PROT_WRITE
FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED
MISSING_WP = RegisterMode.MISSING | RegisterMode.WP
CLEAN, DIRTY, ABSENT, SAVED = PageState.CLEAN, PageState.DIRTY, PageState.ABSENT, PageState.SAVED

Driver = Literal["native", "thread"]
libc = ctypes.CDLL(None, use_errno=True)


def protect(region: Region, protection: int, first: int = 0, pages: int = PAGES) -> None:
    start = ctypes.c_void_p(region.start + first * PAGE)
    assert libc.mprotect(start, ctypes.c_size_t(pages * PAGE), protection) == 0


def _region(memory: str) -> Region:
    return Region.anonymous(PAGES * PAGE) if memory == "anon" else Region.memfd(PAGES * PAGE)


def states(handler: Handler, region: Region) -> list[PageState]:
    return [PageState(state) for state in handler.page_states(region)]


@contextlib.contextmanager
def _forbidden(region: Region, start: int, pages: int) -> Iterator[None]:
    with pytest.raises(UffdOSError, match=r"may not be read \(mprotect") as said:
        yield
    assert said.value.errno == errno.EFAULT
    assert (said.value.start, said.value.length) == (region.start + start, pages * PAGE)
    assert said.value.completed == 0  # type: ignore[attr-defined]


def evicted(driver: Driver, memory: str) -> None:
    store = {at: b"s" * PAGE for at in range(0, PAGES * PAGE, PAGE)}
    out = os.memfd_create("out")
    os.ftruncate(out, PAGES * PAGE)

    def read(offset: int, length: int) -> bytes:
        return b"".join(store[at] for at in range(offset, offset + length, PAGE))

    def write_back(offset: int, data: memoryview) -> None:
        for at in range(0, len(data), PAGE):
            store[offset + at] = bytes(data[at : at + PAGE])

    source = CallableSource(read) if driver == "thread" else BufferSource(b"s" * PAGES * PAGE)
    with (
        Userfaultfd(features=FEATURES) as uffd,
        _region(memory) as region,
        Handler(uffd, driver=driver) as handler,
    ):
        handler.serve(region, source, mode=MISSING_WP)
        handler.populate(region)
        region.write(PAGE, b"new")
        for forbidden, first in (((0, PAGES), 0), ((2, 1), 0)):
            protect(region, NONE, *forbidden)
            for write in (write_back, out):
                with _forbidden(region, first, PAGES):
                    handler.evict(region, write_back=write)
                # What was written and handed over to nobody stays known as written.
                assert states(handler, region)[3] == CLEAN
                assert ABSENT not in states(handler, region)
            protect(region, BOTH)
        assert region.read(PAGE, 3) == b"new"
        assert handler.evict(region, write_back=write_back) == PAGES * PAGE
        assert store[PAGE].startswith(b"new")
        assert states(handler, region) == [ABSENT] * PAGES
        protect(region, NONE)
        # None of these reads the memory.
        assert handler.fill(region, 0, b"f" * PAGE) == PAGE
        assert handler.populate(region) == (PAGES - 1) * PAGE
        handler.checkpoint(region)
        handler.unprotect(region)
        handler.writeprotect(region)
        assert handler.evict(region, write_back=None) == PAGES * PAGE
        protect(region, BOTH)
        assert region.read(0, 1) == b"s"


def preserved(driver: Driver, memory: str) -> None:
    with Userfaultfd(features=FEATURES) as uffd, _region(memory) as region:
        region.fill(7)
        kept = bytearray(region.length)
        handler = Handler(uffd, driver=driver)
        handler.serve(region, None, mode=RegisterMode.WP, preserve=kept)
        handler.writeprotect(region)
        handler.start()
        protect(region, NONE, 2, 1)
        assert handler.preserve(region, 0, PAGE) == PAGE
        with pytest.raises(UffdOSError, match="may not be read") as said:
            handler.preserve(region)
        assert said.value.start == region.start + 2 * PAGE
        assert said.value.completed == PAGE  # type: ignore[attr-defined]
        assert states(handler, region) == [SAVED, SAVED, CLEAN, CLEAN]
        with pytest.raises(HandlerError, match="could not be saved"):
            handler.stop()
        assert kept[: 2 * PAGE] == b"\7" * (2 * PAGE)


@needs(FEATURES)
@pytest.mark.parametrize("check", [evicted, preserved])
@pytest.mark.parametrize("memory", ["anon", "shmem"])
@pytest.mark.parametrize("driver", ["native", "thread"])
def test_forbidden(check: object, driver: Driver, memory: str) -> None:
    run_child(check, driver, memory)  # type: ignore[arg-type]
