"""Served mappings that grow: the new part is zeros, or the content of the file.

mremap(2) makes a registered mapping longer, registers the new part, and sends no event (measured
on Linux 6.18).
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    Handler,
    PageSource,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    _memory,
)
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.testing import kill, needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests._rooms import map_in_room
from tests.kernel._faults import Task
from tests.kernel._serving import content, in_fork, is_lost, wait_for_stalled, wait_until
from tests.process._pitfalls import Data

Driver = Literal["native", "inline", "thread", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "inline", "thread", "process")
MEMORY = ("anon", "shmem", "shmem-private")
PAGE = os.sysconf("SC_PAGE_SIZE")
MAYMOVE = 1
NOTHING = Feature(0)
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
WP_EVERYWHERE = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
LAYOUT = Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP


@dataclass
class Pages:
    """Consecutive pages of a mapping that may have more."""

    start: int
    length: int
    shared: bool
    page_size: int = PAGE

    def page(self, index: int) -> bytes:
        """Read a page, also behind the end."""
        return _memory.read(self.start + index * PAGE, PAGE)

    def part(self, first: int, count: int) -> Pages:
        """Return some of them."""
        return Pages(self.start + first * PAGE, count * PAGE, self.shared)

    def grow(self, count: int, flags: int = 0) -> Pages:
        """Make the mapping of these pages longer by `count` pages."""
        length = self.length + count * PAGE
        return Pages(_memory.mremap(self.start, self.length, length, flags), length, self.shared)


ROOM = 16


@contextlib.contextmanager
def mapped(memory: str, count: int) -> Iterator[Pages]:
    """A mapping with room to grow, up to 16 pages; the file has sixes from page 8 on."""
    shared = mmap.MAP_SHARED if memory == "shmem" else mmap.MAP_PRIVATE
    with contextlib.ExitStack() as stack:
        fd = -1
        flags = shared | mmap.MAP_ANONYMOUS
        if memory != "anon":
            flags = shared
            file = stack.enter_context(open(os.memfd_create("grows"), "r+b", buffering=0))
            file.truncate(ROOM * PAGE)
            os.pwrite(file.fileno(), b"\6" * (8 * PAGE), 8 * PAGE)
            fd = file.fileno()
        start = map_in_room(count * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd)
        yield Pages(start, count * PAGE, memory == "shmem")
        _memory.munmap(start, ROOM * PAGE)


def source(driver: Driver, data: bytes) -> PageSource:
    return BufferSource(data) if driver in ("native", "inline") else Data(data)


@contextlib.contextmanager
def handler_of(driver: Driver, features: Feature = NOTHING) -> Iterator[Handler]:
    if driver == "inline":
        features |= Feature.SIGBUS
    with Userfaultfd(features=features) as uffd, Handler(uffd, driver=driver) as handler:
        yield handler


def grows(driver: Driver, memory: str, features: Feature, modes: RegisterMode) -> None:
    """It grows in place, twice: zeros, and writes stay; the old part keeps its content."""
    with mapped(memory, 2) as region, handler_of(driver, features) as handler:
        data = content(2 * PAGE)
        handler.serve(region, source(driver, data), mode=modes)
        if modes & WP:
            handler.writeprotect(region)
        grown = region.grow(2)
        assert grown.page(3) == bytes(PAGE)
        _memory.write(grown.start + 2 * PAGE, b"written")
        assert grown.page(1) == data[PAGE:]
        again = grown.grow(2)
        assert again.page(5) == bytes(PAGE)
        _memory.write(again.start + 5 * PAGE, b"later")
        assert again.page(2)[:7] == b"written"
        assert again.page(5)[:5] == b"later"
        assert again.page(0) == data[:PAGE]
        assert len(handler.page_states(region)) == 2
        handler.stop()  # and no fault has failed
        assert handler.stats().unserved == 0
        assert Task(again.page, 4).result() == bytes(PAGE), "what it grew by is unregistered too"


MODES = {
    "missing": (NOTHING, MISSING),
    "missing-events": (LAYOUT, MISSING),
    "wp": (WP_EVERYWHERE, MISSING | WP),
}


CROSSED = [
    pytest.param(driver, memory, mode, id=f"{driver}-{memory}-{mode}", marks=needs(MODES[mode][0]))
    for driver, memory, mode in itertools.product(DRIVERS, MEMORY, MODES)
    if driver != "inline" or not MODES[mode][0] & LAYOUT  # it supports no events
]


@pytest.mark.crossing
@pytest.mark.parametrize(("driver", "memory", "mode"), CROSSED)
def test_grows(driver: Driver, memory: str, mode: str) -> None:
    features, modes = MODES[mode]
    run_child(grows, driver, memory, features, modes)


def shows_the_file(driver: Driver, memory: str) -> None:
    """Pages that the page cache has in the new part are mapped, with minor faults or without."""
    modes = MISSING | MINOR if memory == "shmem" else MISSING
    with mapped(memory, 2) as region, handler_of(driver, Feature.MINOR_SHMEM) as handler:
        handler.serve(region, source(driver, content(2 * PAGE)), mode=modes)
        grown = region.grow(10)
        assert grown.page(10) == b"\6" * PAGE
        assert grown.page(7) == bytes(PAGE)


@needs(Feature.MINOR_SHMEM)
@pytest.mark.parametrize("memory", ["shmem", "shmem-private"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_shows_the_file(driver: Driver, memory: str) -> None:
    run_child(shows_the_file, driver, memory)


def moves(driver: Driver, memory: str) -> None:
    """The mapping moves as it grows: the event names the old part only."""
    with mapped(memory, 2) as region, handler_of(driver, LAYOUT) as handler:
        data = content(2 * PAGE)
        handler.serve(region, source(driver, data))
        # In the way.
        other = _memory.mmap(
            PAGE,
            0,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000,
            -1,
            0,
            region.start + 2 * PAGE,
        )
        grown = region.grow(2, MAYMOVE)
        assert grown.start != region.start
        assert grown.page(3) == bytes(PAGE)
        assert [grown.page(0), grown.page(1)] == [data[:PAGE], data[PAGE:]]
        _memory.munmap(grown.start, 4 * PAGE)
        _memory.munmap(other, PAGE)


@pytest.mark.crossing
@needs(LAYOUT)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_moves(driver: Driver, memory: str) -> None:
    run_child(moves, driver, memory)


def waits_beside(driver: Driver, memory: str, order: str) -> None:
    """Memory registered next to a served range is in one mapping with it, but is no growth."""
    with (
        mapped(memory, 4) as region,
        Userfaultfd(features=LAYOUT if order == "moved" else NOTHING) as uffd,
    ):
        first, last = region.part(0, 2), region.part(2, 2)
        data = content(4 * PAGE)
        if order == "before":
            uffd.register(region)
        with Handler(uffd, driver=driver) as handler:
            if order in ("after", "moved"):
                uffd.register(last)
            handler.serve(first, source(driver, data[: 2 * PAGE]))
            if order == "later":
                assert first.page(0) == data[:PAGE]
                uffd.register(last)
            if order == "moved":
                start = _memory.mremap(
                    region.start, 4 * PAGE, 4 * PAGE, MAYMOVE | 4, 0
                )  # MREMAP_DONTUNMAP
                first, last = (
                    Pages(start + 2 * at * PAGE, 2 * PAGE, region.shared) for at in range(2)
                )
            reader = Task(last.page, 1)
            wait_for_stalled(uffd, 1)
            wait_until(lambda: handler.stats().messages > 0, "the message is read")
            handler.serve(last, source(driver, data[2 * PAGE :]))
            assert reader.result() == data[3 * PAGE :]
            assert first.page(1) == data[PAGE : 2 * PAGE]
            handler.stop()
            if order == "moved":
                _memory.munmap(first.start, 4 * PAGE)


@pytest.mark.crossing
@needs(LAYOUT)
@pytest.mark.parametrize("order", ["before", "after", "later", "moved"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_waits_beside(driver: Driver, memory: str, order: str) -> None:
    run_child(waits_beside, driver, memory, order)


def forks(when: str) -> None:
    """The child of a fork has its parent's ranges, and its mapping may grow too."""
    with mapped("anon", 2) as region, handler_of("native", Feature.EVENT_FORK) as handler:
        data = content(2 * PAGE)
        handler.serve(region, source("native", data))
        grown = region.grow(2) if when == "before" else region

        def look() -> None:
            there = region.grow(2) if when == "after" else grown
            assert there.page(3) == bytes(PAGE)
            assert there.page(1) == data[PAGE:]

        assert in_fork(look) == 0
        assert grown.page(1) == data[PAGE:]


@needs(Feature.EVENT_FORK)
@pytest.mark.parametrize("when", ["before", "after"])
def test_forks(when: str) -> None:
    run_child(forks, when)


def replace_worker(handler: Handler) -> None:
    """Kill the worker process, and wait until another one serves."""
    engine = handler._engine
    assert isinstance(engine, RemoteEngine)
    kill(engine.pids()[1])
    wait_until(lambda: handler.stats().restarts == 1, "another worker took over")


def after_a_kill(features: Feature) -> None:
    """The next worker process knows what is registered: what is beside, and what is growth."""
    data = content(4 * PAGE)
    with (
        mapped("anon", 2) as region,
        mapped("anon", 4) as both,
        handler_of("process", features) as handler,
    ):
        handler.serve(region, Data(data[: 2 * PAGE]))
        first, beside = both.part(0, 2), both.part(2, 2)
        handler.serve(first, Data(data[: 2 * PAGE]))
        handler.uffd.register(beside)
        replace_worker(handler)
        assert region.page(0) == data[:PAGE]
        assert region.grow(2).page(3) == bytes(PAGE)
        messages = handler.stats().messages
        reader = Task(beside.page, 1)
        wait_until(lambda: handler.stats().messages > messages, "the message is read")
        handler.serve(beside, Data(data[2 * PAGE :]))
        assert reader.result() == data[3 * PAGE :]
        handler.stop()  # and no fault has failed


@pytest.mark.parametrize(
    "features",
    [
        pytest.param(NOTHING, id="no-events"),
        pytest.param(LAYOUT, id="events", marks=needs(LAYOUT)),
    ],
)
def test_grows_after_a_kill(features: Feature) -> None:
    run_child(after_a_kill, features, budget_s=20)


def is_refused(how: str) -> None:
    """If the registered memory is unknown, nothing counts as growth."""
    features = LAYOUT if how == "unmapped-and-killed" else NOTHING
    with (
        mapped("anon", 2) as region,
        mapped("anon", 2) as other,
        Userfaultfd(features=features) as uffd,
    ):
        driver: Driver = "process" if how == "unmapped-and-killed" else "native"
        owned = uffd
        if how == "adopted":
            owned = Userfaultfd.from_fd(os.dup(uffd.fileno()), owner_pid=os.getpid())
        with contextlib.ExitStack() as stack:
            handler = Handler(owned, driver=driver)
            handler.start()
            stack.callback(owned.close)
            data = content(2 * PAGE)
            handler.serve(region, source(driver, data))
            if how == "unmapped-and-killed":
                # The keeper does not follow what the events of a change say about other memory.
                handler.serve(other, source(driver, data))
                _memory.munmap(other.start, PAGE)
                replace_worker(handler)
                assert region.page(0) == data[:PAGE]
            grown = region.grow(2)
            if not is_lost(grown, 3 * PAGE, PAGE):
                # The worker died before it told of the change: what is known is still true.
                assert how == "unmapped-and-killed"
                assert grown.page(3) == bytes(PAGE)
                handler.stop()
                return
            with pytest.raises(Exception, match="not served"):
                handler.stop()


@pytest.mark.parametrize(
    "how", ["adopted", pytest.param("unmapped-and-killed", marks=needs(LAYOUT))]
)
def test_is_refused(how: str) -> None:
    run_child(is_refused, how, budget_s=20)


def refuses_growth(memory: str) -> None:
    with contextlib.closing(memory_of(memory)) as make, handler_of("native") as handler:
        region = make.pages(1)
        handler.serve(region, BufferSource(content(region.length)))
        with pytest.raises(UffdOSError):
            _memory.mremap(region.start, region.length, 2 * region.length, MAYMOVE)


@pytest.mark.parametrize("memory", memory_params("hugetlb", "hugetlb-private"))
def test_huge_pages_do_not_grow(memory: str) -> None:
    """Linux says EINVAL: there is nothing to serve."""
    run_child(refuses_growth, memory)
