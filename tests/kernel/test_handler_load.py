"""Handler.load, what is zeros by its source, and memory that its owner registers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
import threading
import time
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import pytest

from pyuffd import (
    CallableSource,
    Feature,
    FileSource,
    Handler,
    Ioctl,
    LayoutChangedError,
    OverlaySource,
    PageSource,
    Region,
    Userfaultfd,
    ZeroSource,
    _memory,
)
from pyuffd.handlers._threads import WorkedEngine
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._serving import content, is_lost, states, wait_for_stalled, wait_until
from tests.kernel._verbs import (
    ABSENT,
    CLEAN,
    PAGES,
    PYTHON,
    REMOVED,
    Driver,
    added,
    filling,
    handling,
)

PAGE = 4096
DRIVERS: tuple[Driver, ...] = ("native", "thread", "process")


def part_of(data: bytes, offset: int, length: int) -> bytes:
    return data[offset : offset + length]


def middle(data: bytes, size: int, python: bool) -> PageSource:
    """Content for pages 1 and 2 of four; the others are zeros."""
    part = data[: 2 * size]
    if python:
        inner: PageSource = CallableSource(partial(part_of, part))
    else:
        with tempfile.TemporaryFile() as file:
            file.write(part)
            file.flush()
            inner = opened = FileSource(file.fileno())
            opened._warns = False
    return OverlaySource([(size, 2 * size, inner)], gaps="zeros", length=PAGES * size)


def fills_what_has_content(handler: Handler, name: str, python: bool) -> None:
    """And unserve() then loses nothing; the rest is zeros, without a mark."""
    before = handler.stats()
    with filling(handler, name, middle(content(1 << 23), size_of(name), python)) as region:
        size, data = region.page_size, content(1 << 23)
        assert handler.load(region, 0, size) == 0
        assert handler.load(region) == 2 * size
        assert handler.load(region) == 0
        assert states(handler, region) == [ABSENT, CLEAN, CLEAN, ABSENT]
        assert added(handler, before, "filled_pages") == 2
        handler.unserve(region)
        assert region.read(0, region.length) == bytes(size) + data[: 2 * size] + bytes(size)
        assert added(handler, before, "poisoned_pages") == 0


def seals_only_what_has_content(handler: Handler, name: str, python: bool) -> None:
    with filling(handler, name, middle(content(1 << 23), size_of(name), python)) as region:
        size = region.page_size
        handler.unserve(region)
        assert [is_lost(region, page * size, size) for page in range(PAGES)] == [
            False,
            True,
            True,
            False,
        ]


def zeros_need_no_source(handler: Handler, name: str, python: bool) -> None:
    before = handler.stats()
    with filling(handler, name, middle(content(1 << 23), size_of(name), python)) as region:
        size = region.page_size
        assert region.read(3 * size, size) == bytes(size)
        assert added(handler, before, "requests") == 0
        region.madvise(9 if region.shared else 4, size, size)
        assert states(handler, region)[1] == REMOVED
        assert handler.load(region) == size
        assert region.read(size, size) == bytes(size)


def size_of(name: str) -> int:
    return (2 << 20) if name.startswith("hugetlb") else 4096


CASES = (fills_what_has_content, seals_only_what_has_content, zeros_need_no_source)


def check(name: str) -> None:
    for driver in DRIVERS:
        with handling(driver) as handler:
            for case, python in product(CASES, (False, True)):
                if python and driver not in PYTHON:
                    continue
                try:
                    case(handler, name, python)
                except BaseException as error:
                    error.add_note(f"{case.__name__}, {driver}, {python=}")
                    raise


@needs(Feature.EVENT_REMOVE)
@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb", "hugetlb-private"))
def test_load(name: str) -> None:
    run_child(check, name, budget_s=60)


def many_runs() -> None:
    """Pieces of a page with gaps between them, and a hole that was unmapped."""
    pages = 3000
    data = content(pages * PAGE)
    pieces = [(at, PAGE, data[at : at + PAGE]) for at in range(0, len(data), 2 * PAGE)]
    with (
        Userfaultfd(features=Feature.EVENT_UNMAP) as uffd,
        contextlib.closing(memory_of("anon", holes=True)) as memory,
        Region.anonymous(PAGE) as other,
        Handler(uffd) as handler,
    ):
        region = memory.make(len(data))
        handler.serve(region, OverlaySource(pieces, gaps="zeros", length=len(data)))
        handler.serve(other, ZeroSource())
        assert handler.load(other) == 0
        _memory.munmap(region.start + 1000 * PAGE, 500 * PAGE)
        assert handler.load(region) == (pages - 500) // 2 * PAGE
        for page in (998, 1500):
            at = page * PAGE
            assert region.read(at, PAGE) == data[at : at + PAGE]


@needs(Feature.EVENT_UNMAP)
def test_many_runs_and_a_hole() -> None:
    run_child(many_runs, budget_s=20)


def forks(driver: Driver) -> None:
    """What a fork lacks is filled too, and nothing of it is poisoned."""
    data = content(500 * PAGE)
    expected = data + bytes(len(data))
    with (
        open(os.memfd_create("data"), "w+b") as file,
        Userfaultfd(features=Feature.EVENT_FORK) as uffd,
        Region.anonymous(2 * len(data)) as region,
        Handler(uffd, driver=driver) as handler,
    ):
        file.write(data)
        file.flush()
        with FileSource(file) as inner:
            source = OverlaySource([(0, len(data), inner)], gaps="zeros", length=region.length)
            handler.serve(region, source)
        ready, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(ready, 1)
            # The handler's threads are the parent's.
            os._exit(ctypes.string_at(region.start, region.length) != expected)
        assert handler.load(region) == 2 * len(data)
        handler.unserve(region)
        os.write(go, b"x")
        assert os.waitpid(child, 0)[1] == 0
        assert region.read() == expected
        os.close(ready)
        os.close(go)


@needs(Feature.EVENT_FORK)
@pytest.mark.parametrize("driver", ["native", "process"])
def test_forks_are_filled(driver: Driver) -> None:
    run_child(forks, driver, budget_s=20)


def bad_arguments() -> None:
    with (
        Userfaultfd() as uffd,
        Region.anonymous(4 * PAGE) as region,
        Handler(uffd, driver="thread", autostart=False) as handler,
    ):
        handler.serve(region, CallableSource(lambda offset, length: bytes(length)))
        for options in ({"chunk": 1}, {"chunk": 0}, {"offset": 1}, {"length": 5 * PAGE}):
            with pytest.raises(ValueError):
                handler.load(region, **options)
        with pytest.raises(ValueError, match="start"):
            handler.load(region)
        with Userfaultfd() as unknown, pytest.raises(ValueError, match="nothing"):
            handler.space_of(unknown)
        assert handler.space_of(uffd) == 0
        with Region.anonymous(PAGE) as other, pytest.raises(ValueError, match="opened here"):
            handler.serve(other, bytes(PAGE), ioctls=Ioctl.COPY)
        handler.start()


def test_bad_arguments() -> None:
    run_child(bad_arguments)


def registered_later() -> None:
    """The owner registers the range after it is served, as CRIU does, and what it maps then."""
    with (
        Userfaultfd(features=Feature.EVENT_REMOVE) as owners,
        Region.anonymous(4 * PAGE) as region,
        Userfaultfd.from_fd(os.dup(owners.fileno())) as adopted,
        Handler(adopted) as handler,
    ):
        region.write(0, b"of somebody else")  # before the owner maps its own
        data = content(region.length)
        with pytest.raises(ValueError, match="COPY"):
            handler.serve(region, data, ioctls=Ioctl.WAKE)
        with pytest.raises(ValueError, match="present"):
            handler.serve(region, data, ioctls=Ioctl.COPY, present="drop")
        ioctls = Ioctl.COPY | Ioctl.WAKE | Ioctl.ZEROPAGE | Ioctl.POISON
        assert handler.serve(region, data, ioctls=ioctls) == ioctls
        assert states(handler, region) == [ABSENT] * 4
        region.madvise(4)  # as if it were mapped anew: not registered, so no event
        owners.register(region)
        assert region.read(0, PAGE) == data[:PAGE]
        assert handler.load(region) == 3 * PAGE
        assert region.read() == data


@needs(Feature.EVENT_REMOVE)
def test_memory_that_its_owner_registers_later() -> None:
    run_child(registered_later)


def faults_before_it_is_added() -> None:
    """A fault that comes in the middle of serve() finds the source."""
    added_, data = WorkedEngine._added, content(PAGE)

    def slowly(*args: Any) -> None:
        time.sleep(0.1)
        added_(*args)

    with (
        Userfaultfd() as owners,
        Region.anonymous(PAGE) as region,
        Userfaultfd.from_fd(os.dup(owners.fileno())) as adopted,
        Handler(adopted, driver="thread") as handler,
    ):
        owners.register(region)
        seen: list[bytes] = []
        thread = threading.Thread(target=lambda: seen.append(region.read()))
        thread.start()
        wait_for_stalled(owners, 1)
        with mock.patch.object(WorkedEngine, "_added", slowly):
            source = CallableSource(partial(part_of, data))
            toucher = threading.Thread(target=touch_after, args=(handler, adopted, region))
            toucher.start()
            handler.serve(region, source, ioctls=Ioctl.COPY | Ioctl.POISON | Ioctl.WAKE)
        toucher.join()
        thread.join()
        assert seen == [data]
        assert handler.stats().failed == 0


def touch_after(handler: Handler, uffd: Userfaultfd, region: Region) -> None:
    """Wake the thread that waits once the range is in, before serve() does."""
    for _ in range(50):
        time.sleep(0.002)
        uffd.wake(region)


def test_faults_that_come_before_serve_returns() -> None:
    run_child(faults_before_it_is_added)


def faults_come_first() -> None:
    """A page that a thread waits for is asked for before those that load() has queued."""
    asked: list[int] = []
    go = threading.Semaphore(0)

    def read(offset: int, length: int) -> bytes:
        asked.append(offset // PAGE)
        go.acquire()
        return bytes(length)

    with (
        Userfaultfd() as uffd,
        Region.anonymous(100 * PAGE) as region,
        Handler(uffd, driver="thread", stall_timeout_s=60) as handler,
    ):
        handler.serve(region, CallableSource(read))
        loads = threading.Thread(target=handler.load, args=(region,), kwargs={"chunk": PAGE})
        loads.start()
        wait_until(lambda: handler.stats().requests > 20, "the queue is filled")
        touches = threading.Thread(target=region.read, args=(90 * PAGE, 1))
        touches.start()
        wait_for_stalled(uffd, 1)
        wait_until(lambda: handler.stats().messages > 0, "the fault is queued")
        before = handler.stats().requests
        go.release()
        wait_until(lambda: len(asked) > 1 or handler.stats().requests > before, "the next one")
        go.release(1000)
        touches.join()
        loads.join()
    assert asked.index(90) <= 3, asked


def test_faults_come_before_what_load_has_queued() -> None:
    run_child(faults_come_first)


def never_registered() -> None:
    """An error after some time, and no endless loop."""
    with (
        Userfaultfd() as owners,
        Region.anonymous(4 * PAGE) as region,
        Userfaultfd.from_fd(os.dup(owners.fileno())) as adopted,
        Handler(adopted) as handler,
    ):
        handler.serve(region, content(region.length), ioctls=Ioctl.COPY | Ioctl.POISON)
        with pytest.raises(LayoutChangedError):
            handler.load(region)


def test_memory_that_is_never_registered() -> None:
    run_child(never_registered, budget_s=20)
