"""Missing pages that Linux would leave unprotected, after their mapping was moved."""

from __future__ import annotations

import contextlib
import mmap
from typing import Literal, get_args

import pytest

from pyuffd import Feature, Handler, PageState, Region, RegisterMode, Userfaultfd, _memory
from pyuffd.testing import FaultingChild, needs
from tests._child import run_child
from tests._memory import PAGE, memory_of
from tests.kernel._serving import states

Driver = Literal["native", "thread", "process"]
WP = Feature.PAGEFAULT_FLAG_WP
LAYOUT = WP | Feature.EVENT_REMAP | Feature.EVENT_UNMAP
MAYMOVE, FIXED = 1, 2
PROT_NONE = 0  # not in the mmap module


def move(start: int, length: int) -> int:
    """Move memory to an unused place."""
    place = _memory.mmap(length, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return _memory.mremap(start, length, length, MAYMOVE | FIXED, place)


def moved(driver: Driver) -> None:
    """The engine does not touch the old place, whether it is unmapped or other memory."""
    with (
        Userfaultfd(features=LAYOUT) as uffd,
        contextlib.closing(memory_of("anon", holes=True)) as memory,
        Handler(uffd, driver=driver) as handler,
    ):
        region = memory.pages(4)
        handler.serve(region, None, mode=RegisterMode.WP)
        at = move(region.start + 2 * PAGE, PAGE)
        handler.writeprotect(region)
        assert states(handler, region) == [PageState.CLEAN] * 4
        _memory.write(at, b"new")
        region.write(0, b"new")
        found = [state is PageState.DIRTY for state in states(handler, region)]
        assert found == [True, False, True, False]
        handler.stop()
        _memory.munmap(at, PAGE)


@needs(LAYOUT)
@pytest.mark.parametrize("driver", get_args(Driver))
def test_moved(driver: Driver) -> None:
    run_child(moved, driver)


def only_what_is_asked_for() -> None:
    """Pages that are not to be protected are not mapped either."""
    with (
        Userfaultfd(features=WP) as uffd,
        Region.anonymous(4 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, None, mode=RegisterMode.WP)
        handler.writeprotect(region, PAGE, PAGE)
        found = [state.name for state in region.residency()]
        assert [name != "HOLE" for name in found] == [False, True, False, False], found


@needs(WP)
def test_only_what_is_asked_for() -> None:
    run_child(only_what_is_asked_for)


def unreadable() -> None:
    """Unreadable memory cannot be mapped by reading it: an error, and no SIGSEGV."""
    with (
        Userfaultfd(features=WP) as uffd,
        Region.anonymous(4 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, None, mode=RegisterMode.WP)
        _memory.mprotect(region.start + PAGE, PAGE, PROT_NONE)
        with pytest.raises(OSError):
            handler.writeprotect(region)
        _memory.mprotect(region.start + PAGE, PAGE, mmap.PROT_READ)
        handler.writeprotect(region)


@needs(WP)
def test_unreadable() -> None:
    run_child(unreadable)


def in_another_process(driver: Driver) -> None:
    """The same in the memory of a child, which moves it."""
    with (
        FaultingChild(4, mode=RegisterMode.WP, features=LAYOUT) as child,
        Handler(child.uffd, driver=driver) as handler,
    ):
        handler.serve(child.region, None, mode=RegisterMode.WP)
        child.run("mremap", 2 * PAGE, PAGE)
        handler.writeprotect(child.region)
        assert states(handler, child.region) == [PageState.CLEAN] * 4


@needs(LAYOUT)
@pytest.mark.parametrize("driver", get_args(Driver))
def test_in_another_process(driver: Driver) -> None:
    run_child(in_another_process, driver, budget_s=20)
