"""A file that is made shorter beneath a served range: its end can be neither filled nor poisoned.

Linux refuses both with EFAULT there, and sends no message. What threads read of it is SIGBUS until
the file grows again.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    HandlerError,
    PagePoisonedError,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    _memory,
)
from pyuffd.testing import MEMORY_TYPES, needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._serving import AnyDriver, wait_for_stalled
from tests.process.test_killed_keeper import filled

End = Literal["stop", "unserve", "part", "close", "uffd"]
ENDS: tuple[End, ...] = ("stop", "unserve", "part", "close", "uffd")
DRIVERS: tuple[AnyDriver, ...] = ("native", "inline", "thread", "process")
PAGES, LEFT = 8, 2
EVENTS = Feature.EVENT_UNMAP | Feature.EVENT_REMOVE | Feature.EVENT_REMAP
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
LATE_S = 5.0  # a hang lasts until the child is killed

pytestmark = needs(Feature(0))


def features_of(driver: AnyDriver, name: str, *, events: bool, mode: RegisterMode) -> Feature:
    features = EVENTS if events else Feature(0)
    if MEMORY_TYPES[name].is_hugetlb:
        features |= Feature.MISSING_HUGETLBFS
    if mode & WP:
        features |= Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
    return features | (Feature.SIGBUS if driver == "inline" else Feature(0))


def cut(region: Region, pages: int) -> None:
    assert region.fd is not None
    os.ftruncate(region.fd, pages * region.page_size)


def soon(what: Callable[[], object]) -> None:
    began = time.monotonic()
    what()
    assert time.monotonic() - began < LATE_S


def ends(driver: AnyDriver, name: str, how: End, events: bool, mode: int) -> None:
    """Nothing of it stays registered, so that nobody has to read the event of its unmapping."""
    memory, modes = memory_of(name), RegisterMode(mode)
    size = memory.page_size
    source = CallableSource(filled) if driver in ("thread", "process") else None
    with ExitStack() as stack:
        region = memory.pages(PAGES)
        features = features_of(driver, name, events=events, mode=modes)
        uffd = stack.enter_context(Userfaultfd(features=features))
        handler = stack.enter_context(Handler(uffd, driver=driver))
        handler.serve(region, source or BufferSource(b"x" * region.length), mode=modes)
        assert region.read(0, size) == b"x" * size
        region.write((PAGES - 1) * size, b"cut off")
        cut(region, LEFT)
        if how == "stop":
            soon(handler.stop)
        elif how == "unserve":
            soon(lambda: handler.unserve(region))
        elif how == "part":
            soon(lambda: handler.unserve(region[size:]))
            assert region.read(0, size) == b"x" * size
            soon(lambda: handler.unserve(region[:size]))
        elif how == "uffd":
            soon(uffd.close)
        if how != "close":
            assert region.read(0, size) == b"x" * size
            with pytest.raises(PagePoisonedError):  # there is no content, and no zeros
                region.read((LEFT - 1) * size, 1)
            with pytest.raises(UffdOSError):
                region.read(LEFT * size, 1)
            if not region.shared or not MEMORY_TYPES[name].is_hugetlb:
                region.madvise(mmap.MADV_DONTNEED, 0, size)
        assert not uffd.closed or how == "uffd"
        soon(region.close)
        if how not in ("close", "uffd"):
            assert not uffd._registered_ranges()


def ends_in_each_way(driver: AnyDriver, name: str) -> None:
    for turn, how in enumerate(ENDS if driver != "process" else ENDS[:2]):
        for events in (False,) if driver == "inline" else (True, False):
            for mode in (MISSING, MISSING | WP) if turn < 1 else (MISSING | WP,):
                ends(driver, name, how, events, int(mode))


@needs(EVENTS)
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "name", memory_params("shmem", "shmem-private", "hugetlb", "hugetlb-private")
)
def test_the_end_of_serving(driver: AnyDriver, name: str) -> None:
    run_child(ends_in_each_way, driver, name, budget_s=15)


def changed_afterwards(driver: AnyDriver) -> None:
    """After stop() nobody reads events, and none is sent: the range is unregistered."""
    memory = memory_of("shmem")
    with Userfaultfd(features=features_of(driver, "shmem", events=True, mode=MISSING)) as uffd:
        region = memory.pages(PAGES)
        with Handler(uffd, driver=driver) as handler:
            is_here = driver == "native"
            data = BufferSource(b"x" * region.length) if is_here else CallableSource(filled)
            handler.serve(region, data)
            region.touch(0, region.page_size)
            cut(region, LEFT)
        changes: list[Callable[[], object]] = [
            lambda: region.madvise(mmap.MADV_DONTNEED, 0, region.page_size),
            lambda: region.madvise(mmap.MADV_REMOVE, 0, region.page_size),
            lambda: _memory.mremap(region.start, region.length, region.length, 1 | 4),
            lambda: _memory.munmap(region.start + region.page_size, region.page_size),
            region.close,
        ]
        for change in changes:
            thread = threading.Thread(target=change, daemon=True)
            thread.start()
            thread.join(LATE_S)
            assert not thread.is_alive()


@needs(EVENTS)
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_changes_after_the_end(driver: AnyDriver) -> None:
    run_child(changed_afterwards, driver, budget_s=8)


def cut_beneath_a_wait(driver: AnyDriver, name: str) -> None:
    """A thread waits for the content of a page that is cut off: it must not hang."""
    memory = memory_of(name)
    entered, let_go = threading.Event(), threading.Event()

    def slow(offset: int, length: int) -> bytes:
        entered.set()
        let_go.wait()
        return b"x" * length

    caught: list[BaseException] = []

    def read() -> None:
        try:
            region.read(LEFT * region.page_size, 1)
        except UffdOSError as error:
            caught.append(error)

    with (
        Userfaultfd(features=features_of(driver, name, events=True, mode=MISSING)) as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        region = memory.pages(PAGES)
        handler.serve(region, CallableSource(slow))
        thread = threading.Thread(target=read)
        thread.start()
        entered.wait()
        wait_for_stalled(uffd, 1)
        cut(region, LEFT)
        let_go.set()
        thread.join(LATE_S)
        assert not thread.is_alive()
        assert caught
        assert region.read(0, 1) == b"x"
        with pytest.raises(HandlerError, match="Bad address"):
            handler.stop()
        region.close()


@needs(EVENTS)
@pytest.mark.parametrize("name", memory_params("shmem", "shmem-private", "hugetlb"))
def test_a_waiting_thread(name: str) -> None:
    run_child(cut_beneath_a_wait, "thread", name, budget_s=8)
