"""A part of served memory is unmapped, or something else mapped over it, without any message.

What lies behind that part is still served. At the end of serving its absent pages are poisoned,
like those before: they are never zeros.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
import tempfile
from contextlib import ExitStack, closing
from typing import Literal

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    PagePoisonedError,
    RegisterMode,
    Userfaultfd,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._serving import AnyDriver
from tests.kernel.test_cut_files import features_of
from tests.process.test_killed_keeper import filled

pytestmark = needs(Feature.POISON)

How = Literal["unmapped", "file", "no descriptors"]
End = Literal["stop", "unserve", "close"]
DRIVERS: tuple[AnyDriver, ...] = ("native", "inline", "thread", "process")
PAGES, FIRST, COUNT = 8, 3, 2
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
MAP_FIXED = 0x10
_, HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def replace(start: int, length: int, how: How) -> None:
    """Unmap the memory, or map a file over it.

    Without a free descriptor the mappings cannot be read, as on Linux before 6.11.
    """
    if how != "file":
        assert LIBC.munmap(start, length) == 0
        return
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED
    with tempfile.TemporaryFile() as file:
        file.truncate(length)
        assert LIBC.mmap(start, length, protection, flags, file.fileno(), 0) == start


def ends(driver: AnyDriver, name: str, how: How, end: End, mode: int) -> None:
    modes = RegisterMode(mode)
    source = CallableSource(filled) if driver in ("thread", "process") else None
    with ExitStack() as stack:
        memory = stack.enter_context(closing(memory_of(name, holes=True)))
        region, size = memory.pages(PAGES), memory.page_size
        features = features_of(driver, name, events=False, mode=modes)
        uffd = stack.enter_context(Userfaultfd(features=features))
        handler = stack.enter_context(Handler(uffd, driver=driver))
        handler.serve(region, source or BufferSource(b"x" * region.length), mode=modes)
        present = (0, FIRST + COUNT + 1)
        for page in present:
            assert region.read(page * size, size) == b"x" * size
        replace(region.start + FIRST * size, COUNT * size, how)
        if how == "no descriptors":
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, HARD))
        if end == "stop":
            handler.stop()
        elif end == "unserve":
            handler.unserve(region)
        else:
            uffd.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (HARD, HARD))
        for page in range(PAGES):
            if FIRST <= page < FIRST + COUNT:
                continue
            if page in present:
                region.write(page * size, b"y")  # protected no longer
                assert region.read(page * size, 2) == b"yx"
            else:
                with pytest.raises(PagePoisonedError):
                    region.read(page * size, 1)


def ends_in_each_way(driver: AnyDriver, name: str, how: How) -> None:
    for end in ("stop", "unserve", "close"):
        for mode in (MISSING, MISSING | WP):
            ends(driver, name, how, end, int(mode))


@pytest.mark.parametrize("how", ["unmapped", "file", "no descriptors"])
@pytest.mark.parametrize("name", memory_params())
@pytest.mark.parametrize("driver", DRIVERS)
def test_what_lies_behind_is_poisoned(driver: AnyDriver, name: str, how: How) -> None:
    run_child(ends_in_each_way, driver, name, how, budget_s=30)


def fills_behind(driver: AnyDriver, name: str, how: How) -> None:
    """One request of a Python source reaches over the part; its fault is behind that."""
    some = (Feature(0), Feature.EVENT_REMOVE, Feature.EVENT_UNMAP)
    for events in some[:1] if driver == "process" else some:
        for populates in (False, True):
            fills_behind_once(driver, name, how, events, populates)


def fills_behind_once(
    driver: AnyDriver, name: str, how: How, events: Feature, populates: bool
) -> None:
    with ExitStack() as stack:
        memory = stack.enter_context(closing(memory_of(name, holes=True)))
        region, size = memory.pages(PAGES), memory.page_size
        uffd = stack.enter_context(Userfaultfd(features=events))
        prefetch = 2 * PAGES * size
        handler = stack.enter_context(Handler(uffd, driver=driver, prefetch=prefetch))
        handler.serve(region, CallableSource(filled))
        replace(region.start + FIRST * size, COUNT * size, how)
        if populates and not events & Feature.EVENT_UNMAP:
            handler.populate(region, chunk=PAGES * size)
        for page in (PAGES - 1, FIRST + COUNT, 0):
            assert region.read(page * size, size) == b"x" * size
        faults = handler.stats().faults["missing"]
        assert faults <= 3, faults


@pytest.mark.parametrize("how", ["unmapped", "file"])
@pytest.mark.parametrize("name", memory_params())
@pytest.mark.parametrize("driver", ["thread", "process"])
def test_what_lies_behind_is_filled(driver: AnyDriver, name: str, how: How) -> None:
    run_child(fills_behind, driver, name, how, budget_s=20)
