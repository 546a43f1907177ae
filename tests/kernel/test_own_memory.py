"""A page source that reads memory of its own handler: an error at once if it waits for itself."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from pyuffd import (
    AsyncSource,
    CallableSource,
    Feature,
    Handler,
    HandlerError,
    PagePoisonedError,
    Region,
    Userfaultfd,
)
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._memory import PAGE, memory_of, memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import wait_until

pytestmark = needs(Feature.POISON)

PAGES = 4
# Far less than the limit of a source that does not answer, which would end the wait, too.
STALL_S = 30 * SCALE
SOON_S = 5 * SCALE

Access = Callable[[Region, int], object]

ACCESSES: dict[str, Access] = {
    "read": lambda region, page: region.read(page, 8),
    "read-across": lambda region, page: region.read(page - 4, 8) if page else region.read(0, 8),
    "write": lambda region, page: region.write(page, b"x"),
    "fill": lambda region, page: region.fill(1, page, 1),
    "touch": lambda region, page: region.touch(page, 1),
    "digest": lambda region, page: region.digest(offset=page, length=8),
}


class Reader:
    """A source that accesses the region whose pages it brings, while it brings one of them."""

    length = None

    def __init__(self, access: Callable[[], object], during: int = 0) -> None:
        self._access, self._during = access, during
        self.errors: list[BaseException] = []
        self.results: list[object] = []

    def read(self, offset: int, length: int) -> bytes:
        if offset <= self._during < offset + length:
            try:
                self.results.append(self._access())
            except BaseException as error:
                self.errors.append(error)
                raise
        return bytes([offset // length + 1]) * length


@contextlib.contextmanager
def serving(region: Region, source: Any, **options: Any) -> Iterator[Handler]:
    features = options.pop("features", Feature(0))
    with Userfaultfd(features=features) as uffd:
        handler = Handler(uffd, driver="thread", stall_timeout_s=STALL_S, **options)
        handler.serve(region, source)
        handler.start()
        try:
            yield handler
        finally:
            with contextlib.suppress(HandlerError):
                handler.stop()


def refused(region: Region, source: Reader, page: int) -> None:
    """The page that the source was asked for is lost at once, and the cause says why."""
    began = time.monotonic()
    with pytest.raises(PagePoisonedError) as caught:
        region.read(0, 1)
    assert time.monotonic() - began < SOON_S
    (error,) = source.errors
    assert isinstance(error, HandlerError)
    assert "wait for itself" in str(error)
    assert error.start == region.start + page
    assert caught.value.__cause__ is error


# (workers, the page accessed while page 0 is fetched)
HOPELESS = [(1, 0), (1, 2), (3, 0)]


def each_access(name: str) -> None:
    for workers, index in HOPELESS:
        for access in ACCESSES.values():
            with contextlib.closing(memory_of(name)) as memory:
                region = memory.pages(PAGES)
                page = index * region.page_size
                source = Reader(partial(access, region, page))
                with serving(region, source, workers=workers):
                    if index:
                        region.touch(page - region.page_size, 1)  # for the read across
                        source._during = 3 * region.page_size
                        began = time.monotonic()
                        with pytest.raises(PagePoisonedError):
                            region.read(3 * region.page_size, 1)
                        assert time.monotonic() - began < SOON_S
                        (error,) = source.errors
                        assert isinstance(error, HandlerError)
                        assert error.start == region.start + page
                    else:
                        refused(region, source, page)


@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb-private"))
def test_methods_of_a_region(name: str) -> None:
    run_child(each_access, name, budget_s=60)


def allowed() -> None:
    """Pages that are there, and those that another worker can bring, may be read."""
    with Region.anonymous(PAGES * PAGE) as region:
        source = Reader(lambda: region.read(2 * PAGE, 1))
        with serving(region, source, workers=1) as handler:
            handler.populate(region, 2 * PAGE, PAGE)
            assert region.read(0, 1) == b"\1"
            assert source.results == [b"\3"]
    with Region.anonymous(PAGES * PAGE) as region:
        source = Reader(lambda: region.read(2 * PAGE, 1))
        with serving(region, source, workers=2):
            assert region.read(0, 1) == b"\1"
            assert source.results == [b"\3"]
    with Region.anonymous(PAGE) as own, Region.anonymous(PAGE) as other:
        source = Reader(lambda: other.read(0, 1))
        with serving(own, source), serving(other, CallableSource(lambda _, length: b"o" * length)):
            assert own.read(0, 1) == b"\1"
            assert source.results == [b"o"]


def test_what_is_allowed() -> None:
    run_child(allowed, budget_s=40)


def circle() -> None:
    """Two workers that wait for each other's page, and a third that is idle."""
    with Region.anonymous(PAGES * PAGE) as region:
        both = threading.Barrier(2)
        errors: list[BaseException] = []

        def read(offset: int, length: int) -> bytes:
            both.wait()
            try:
                region.read(PAGE - offset, 1)
            except HandlerError as error:
                errors.append(error)
            return b"c" * length

        with serving(region, CallableSource(read), workers=3):
            began = time.monotonic()
            tasks = [Task(region.read, page, 1) for page in (0, PAGE)]
            assert [task.result() for task in tasks] == [b"c", b"c"]
            assert time.monotonic() - began < SOON_S
        assert len(errors) == 1


def test_a_circle_of_workers() -> None:
    run_child(circle, budget_s=40)


def populates() -> None:
    with Region.anonymous(PAGES * PAGE) as region:
        handlers: list[Handler] = []
        source = Reader(lambda: handlers[0].populate(region, PAGE, PAGE))
        with serving(region, source) as handler:
            handlers.append(handler)
            refused(region, source, PAGE)


def test_populate_in_a_source() -> None:
    run_child(populates, budget_s=30)


# The loop of an AsyncSource


def in_the_loop() -> None:
    """The thread of the loop would wait for a coroutine that cannot run meanwhile."""
    errors: list[BaseException] = []

    async def fetch(offset: int, length: int) -> bytes:
        if offset == PAGE:
            try:
                region.read(0, 1)
            except HandlerError as error:
                errors.append(error)
                raise
        return b"a" * length

    async def main() -> None:
        with Userfaultfd() as uffd:
            handler = Handler(uffd, driver="thread", workers=2, stall_timeout_s=STALL_S)
            handler.serve(region, AsyncSource(fetch))
            handler.start()
            began = time.monotonic()
            with pytest.raises(HandlerError, match="event loop"):
                region.read(0, 1)
            with pytest.raises(PagePoisonedError):
                await asyncio.to_thread(region.read, PAGE, 1)
            assert len(errors) == 1
            assert await asyncio.to_thread(region.read, 0, 1) == b"a"
            assert region.read(0, 1) == b"a"  # it is there
            assert time.monotonic() - began < SOON_S
            with pytest.raises(HandlerError):
                await asyncio.to_thread(handler.stop)

    with Region.anonymous(2 * PAGE) as region:
        asyncio.run(main())


def test_the_loop_of_a_source() -> None:
    run_child(in_the_loop, budget_s=40)


# Access that is not by a method of Region: the faulting thread's id tells


def write_from(region: Region, page: int) -> int:
    """A system call that reads the page, so that the source gets EFAULT and does not die."""
    part = (ctypes.c_char * 8).from_address(region.start + page)
    reading, writing = os.pipe()
    try:
        return os.write(writing, part)
    finally:
        os.close(reading)
        os.close(writing)


def by_thread_id() -> None:
    for workers, page, prefetch in (
        (1, 0, 0),
        (1, 2 * PAGE, 0),
        (1, 2 * PAGE, 4 * PAGE),
        (2, 0, 0),
    ):
        with Region.anonymous(PAGES * PAGE) as region:
            source = Reader(partial(write_from, region, page))
            with serving(
                region, source, workers=workers, prefetch=prefetch, features=Feature.THREAD_ID
            ) as handler:
                began = time.monotonic()
                with pytest.raises(PagePoisonedError) as caught:
                    region.read(0, 1)
                assert time.monotonic() - began < SOON_S
                wait_until(partial(bool, source.errors), "the source continues")
                cause = caught.value.__cause__
                assert isinstance(cause, OSError)
                assert cause.errno == errno.EDEADLK
                with pytest.raises(HandlerError, match="its own handler"):
                    handler.stop()
    with Region.anonymous(PAGES * PAGE) as region:
        source = Reader(lambda: write_from(region, 2 * PAGE))
        with serving(region, source, workers=2, features=Feature.THREAD_ID):
            assert region.read(0, 1) == b"\1"
            assert source.results == [8]


@needs(Feature.THREAD_ID)
@needs_kernel_faults()
def test_by_the_thread_id() -> None:
    ended = run_child(by_thread_id, budget_s=60)
    assert len(re.findall("its page source waits for it by itself", ended.stderr)) == 4


def stalls() -> None:
    """With on_error="stall" it is said, and the page waits for stop()."""
    with Region.anonymous(PAGES * PAGE) as region:
        source = Reader(lambda: write_from(region, 0))
        with serving(region, source, on_error="stall", features=Feature.THREAD_ID) as handler:
            waits = Task(region.read, 0, 1)
            wait_until(lambda: handler.stats().stalled_requests == 1, "it is told")
            assert handler.stats().poisoned_pages == 0
            with pytest.raises(HandlerError):
                handler.stop(drain=False)
            with pytest.raises(PagePoisonedError):
                waits.result()


@needs(Feature.THREAD_ID)
@needs_kernel_faults()
def test_stall_by_the_thread_id() -> None:
    ended = run_child(stalls, budget_s=40)
    assert "its page source waits for it by itself" in ended.stderr


def checks_are_forgotten() -> None:
    """A region that is served again and again does not collect checks."""
    with Region.anonymous(PAGE) as region:
        for _ in range(5):
            with serving(region, CallableSource(lambda _, length: b"n" * length)) as handler:
                assert len(region._checks) == 1
                handler.unserve(region)
                assert region._checks == []
                handler.serve(region, CallableSource(lambda _, length: b"n" * length))
        assert region._checks == []


def test_checks_are_forgotten() -> None:
    run_child(checks_are_forgotten)
