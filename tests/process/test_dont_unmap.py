"""mremap(2) with MREMAP_DONTUNMAP: the old addresses stay mapped, empty and registered.

Its events do not tell so. Private memory is zeros there, as without userfaultfd; shared memory has
the object's content, of which the pages that nobody has touched come from the source.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Literal

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    HandlerError,
    PagePoisonedError,
    PageState,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    _memory,
)
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.testing import MEMORY_TYPES, MemoryType, needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE, memory_params
from tests._rooms import region_in_room
from tests.kernel._serving import in_fork, states, wait_for_stalled
from tests.process.test_killed_keeper import filled

MAYMOVE, DONTUNMAP = 1, 4
PAGES = 8
LENGTH = PAGES * PAGE
Driver = Literal["native", "thread", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "thread", "process")
MEMORY = ("anon", "shmem", "shmem-private")
MOVE, UNMAP, FORK = Feature.EVENT_REMAP, Feature.EVENT_UNMAP, Feature.EVENT_FORK
WP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
SOON_S = 4.0  # below the limit of a fault that nobody serves

pytestmark = [needs(MOVE | UNMAP), needs_kernel_faults()]


class Moved:
    """A served region that was moved away, and where it was."""

    def __init__(self, uffd: Userfaultfd, handler: Handler, region: Region, to: int) -> None:
        self.uffd, self.handler, self.region = uffd, handler, region
        self.old, self.new = region.start, to
        self.shared = region.shared

    def read(self, start: int, page: int) -> bytes:
        return _memory.read(start + page * PAGE, PAGE)

    def check(self, pages: range = range(PAGES)) -> None:
        """Read each page in both places; every second one in the old place first."""
        there = b"x" * PAGE if self.shared else bytes(PAGE)
        for page in pages:
            if page % 2:
                assert self.read(self.new, page) == b"x" * PAGE
            assert self.read(self.old, page) == there
            assert self.read(self.new, page) == b"x" * PAGE


def move(start: int, length: int = LENGTH) -> int:
    return _memory.mremap(start, length, length, MAYMOVE | DONTUNMAP, 0)


@contextlib.contextmanager
def moved(
    driver: Driver,
    name: str,
    events: Feature = MOVE | UNMAP,
    *,
    wp: bool = False,
    loaded: int = PAGES // 2,
) -> Iterator[Moved]:
    """Serve a region, load some of it and move it; nothing must be left to wait for at the end."""
    features, mode = events, RegisterMode.MISSING
    if wp:
        features, mode = features | WP, mode | RegisterMode.WP
    of: MemoryType = MEMORY_TYPES[name]
    with Userfaultfd(features=features) as uffd, region_in_room(of, LENGTH) as region:
        with Handler(uffd, driver=driver) as handler:
            is_here = driver == "native"
            source = BufferSource(b"x" * LENGTH) if is_here else CallableSource(filled)
            handler.serve(region, source, mode=mode)
            if loaded:
                region.touch(0, loaded * PAGE)
            began = time.monotonic()
            it = Moved(uffd, handler, region, move(region.start))
            yield it
            handler.stop()
            assert time.monotonic() - began < SOON_S
            assert handler.stats().unserved == 0
            assert handler.stats().failed == 0
        # Nothing of it is registered any more, so that these send no event.
        ends = threading.Thread(target=unmap_both, args=(it,), daemon=True)
        ends.start()
        ends.join(SOON_S)
        assert not ends.is_alive()


def unmap_both(it: Moved) -> None:
    _memory.munmap(it.old, LENGTH)
    _memory.munmap(it.new, LENGTH)
    _memory.mmap(LENGTH, 0, 0x22 | 0x10, address=it.old)  # what the room's end unmaps


def reads_both(driver: Driver, name: str, unmap: bool, wp: bool) -> None:
    for loaded in (0, PAGES // 2, PAGES):
        with moved(
            driver, name, MOVE | (UNMAP if unmap else Feature(0)), wp=wp, loaded=loaded
        ) as it:
            found = states(it.handler, it.region)
            assert found == [PageState.CLEAN] * loaded + [PageState.ABSENT] * (PAGES - loaded)
            it.check()
            if wp:
                _memory.write(it.new + PAGE, b"y")
                assert states(it.handler, it.region)[1] == PageState.DIRTY
                _memory.write(it.old, b"z")
                assert it.read(it.new, 0)[:1] == (b"z" if it.shared else b"x")
            else:
                assert {*states(it.handler, it.region)} == {PageState.CLEAN}


@pytest.mark.parametrize("wp", [False, True], ids=["missing", "wp"])
@pytest.mark.parametrize("unmap", [True, False], ids=["unmap", "no-unmap"])
@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("driver", DRIVERS)
def test_both_places(driver: Driver, name: str, unmap: bool, wp: bool) -> None:
    run_child(reads_both, driver, name, unmap, wp, budget_s=30)


def moves_a_part(driver: Driver, name: str, unmap: bool) -> None:
    """The rest stays where it is; in one mapping with it, what was left behind is no growth."""
    of, there = MEMORY_TYPES[name], b"x" if name == "shmem" else bytes(1)
    events = MOVE | (UNMAP if unmap else Feature(0))
    for first, past in ((0, 4), (2, 6), (4, PAGES)):
        with Userfaultfd(features=events) as uffd, region_in_room(of, LENGTH) as region:
            handler = Handler(uffd, driver=driver)
            is_here = driver == "native"
            source = BufferSource(b"x" * LENGTH) if is_here else CallableSource(filled)
            handler.serve(region, source)
            handler.start()
            for page in range(0, PAGES, 2):
                region.touch(page * PAGE, PAGE)
            began = time.monotonic()
            new = move(region.start + first * PAGE, (past - first) * PAGE)
            for page in reversed(range(PAGES)):
                is_left = first <= page < past
                expected = there if is_left else b"x"
                assert _memory.read(region.start + page * PAGE, 1) == expected, (first, page)
                if is_left:
                    assert _memory.read(new + (page - first) * PAGE, 1) == b"x"
            assert {*states(handler, region)} == {PageState.CLEAN}
            assert handler.stats().unserved == 0
            handler.unserve(region, 0, 3 * PAGE)
            handler.stop()
            assert time.monotonic() - began < SOON_S
            _memory.munmap(new, (past - first) * PAGE)
            _memory.munmap(region.start, LENGTH)


@pytest.mark.parametrize("unmap", [True, False], ids=["unmap", "no-unmap"])
@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_part(driver: Driver, name: str, unmap: bool) -> None:
    run_child(moves_a_part, driver, name, unmap)


def untouched(driver: Driver, name: str, how: str) -> None:
    """Nobody has touched the old place when serving ends."""
    for events in (MOVE | UNMAP, MOVE):
        with moved(driver, name, events) as it:
            if how == "unserve":
                it.handler.unserve(it.region)
            elif how == "part":
                it.handler.unserve(it.region, PAGE, PAGE)
                it.handler.unserve(it.region, 0, PAGE)
            else:
                it.handler.stop()
            if name == "shmem":  # no zeros, wherever the object's page is missing
                for start in (it.old, it.new):
                    assert it.read(start, 0) == b"x" * PAGE
                if how != "part":
                    for start in (it.old, it.new):
                        with pytest.raises(UffdOSError):
                            it.read(start, PAGES - 1)
            else:
                assert it.read(it.old, PAGES - 1) == bytes(PAGE)


@pytest.mark.parametrize("how", ["stop", "unserve", "part"])
@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("driver", DRIVERS)
def test_the_end_of_serving(driver: Driver, name: str, how: str) -> None:
    run_child(untouched, driver, name, how, budget_s=30)


def one_page_in_two_places() -> None:
    """Threads wait for one page of shared memory in both places; all of them get its content."""
    asked, answer = threading.Event(), threading.Event()

    def slow(offset: int, length: int) -> bytes:
        asked.set()
        answer.wait()
        return b"x" * length

    of = MEMORY_TYPES["shmem"]
    with Userfaultfd(features=MOVE | UNMAP) as uffd, region_in_room(of, LENGTH) as region:
        handler = Handler(uffd, driver="thread")
        handler.serve(region, CallableSource(slow))
        handler.start()
        old, new = region.start, move(region.start)
        found: list[bytes] = []

        def read(start: int) -> None:
            found.append(_memory.read(start, PAGE))

        readers = [threading.Thread(target=read, args=(start,)) for start in (old, new, old)]
        for reader in readers:
            reader.start()
            asked.wait()
        time.sleep(0.05)  # they wait, or come later: both must end
        answer.set()
        for reader in readers:
            reader.join(SOON_S)
        assert found == [b"x" * PAGE] * 3
        handler.stop()
        _memory.munmap(new, LENGTH)


def test_waiting_in_both_places() -> None:
    run_child(one_page_in_two_places)


def moved_beneath_a_wait(name: str) -> None:
    """A thread waits for a page when its memory is moved away: it faults again."""
    asked, answer = threading.Event(), threading.Event()

    def slow(offset: int, length: int) -> bytes:
        asked.set()
        answer.wait()
        return b"x" * length

    of = MEMORY_TYPES[name]
    with Userfaultfd(features=MOVE | UNMAP) as uffd, region_in_room(of, LENGTH) as region:
        handler = Handler(uffd, driver="thread")
        handler.serve(region, CallableSource(slow))
        handler.start()
        found: list[bytes] = []
        old = region.start
        reader = threading.Thread(target=lambda: found.append(_memory.read(old, PAGE)))
        reader.start()
        asked.wait()
        wait_for_stalled(uffd, 1)
        new = move(old)
        if not of.shared:  # it need not wait for the source
            reader.join(SOON_S)
            assert not reader.is_alive()
        answer.set()
        reader.join(SOON_S)
        assert found == [b"x" * PAGE if of.shared else bytes(PAGE)]
        assert _memory.read(new, PAGE) == b"x" * PAGE
        handler.stop()
        _memory.munmap(new, LENGTH)


@pytest.mark.parametrize("name", MEMORY)
def test_moved_beneath_a_wait(name: str) -> None:
    run_child(moved_beneath_a_wait, name)


def forked(driver: Driver, name: str) -> None:
    """A fork has both places, whether the parent has found out about the old one or not."""
    for waits_s in (0.0, 0.05):
        with moved(driver, name, MOVE | UNMAP | FORK) as it:
            time.sleep(waits_s)
            assert in_fork(it.check) == 0
            it.check()


@needs(FORK)
@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("driver", DRIVERS)
def test_forks(driver: Driver, name: str) -> None:
    run_child(forked, driver, name, budget_s=30)


def moved_on(driver: Driver, name: str) -> None:
    """Moved again, from the new place and from the old one."""
    with moved(driver, name) as it:
        second = move(it.old)  # what was left behind
        third = move(it.new)
        for place in (it.old, it.new, second):
            there = b"x" * PAGE if it.shared else bytes(PAGE)
            assert [it.read(place, page) for page in range(PAGES)] == [there] * PAGES
        assert [it.read(third, page) for page in range(PAGES)] == [b"x" * PAGE] * PAGES
        for place in (second, third):
            _memory.munmap(place, LENGTH)


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("driver", DRIVERS)
def test_moved_again(driver: Driver, name: str) -> None:
    run_child(moved_on, driver, name)


def reused(driver: Driver, name: str) -> None:
    """The old place is served anew after it was unmapped, or moved from again and again."""
    with moved(driver, name) as it:
        for _ in range(20):
            if name == "shmem":
                break
            # As a garbage collector does: fill the old place, and move it away once more.
            _memory.write(it.old, b"live")
            away = move(it.old)
            assert _memory.read(away, 4) == b"live"
            assert it.read(it.old, 0) == bytes(PAGE)
            _memory.munmap(away, LENGTH)
        _memory.munmap(it.old, LENGTH)
        start = _memory.mmap(LENGTH, 3, 0x22 | 0x10, address=it.old)
        with Region.at(start, LENGTH) as again:
            data = b"a" * LENGTH
            source = BufferSource(data) if driver == "native" else CallableSource(answer_a)
            it.handler.serve(again, source)
            assert again.read() == data
            it.handler.unserve(again)
        assert it.read(it.new, PAGES - 1) == b"x" * PAGE


def answer_a(offset: int, length: int) -> bytes:
    return b"a" * length


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("driver", DRIVERS)
def test_reused(driver: Driver, name: str) -> None:
    run_child(reused, driver, name)


def on_huge_pages(name: str) -> None:
    of = MEMORY_TYPES[name]
    with (
        Userfaultfd(features=MOVE | UNMAP | Feature.MISSING_HUGETLBFS) as uffd,
        of.make(2 << 20) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, BufferSource(b"x" * region.length))
        with pytest.raises(UffdOSError):
            move(region.start, region.length)
        assert region.read(0, 1) == b"x"


@pytest.mark.parametrize("name", memory_params("hugetlb", "hugetlb-private"))
def test_huge_pages(name: str) -> None:
    """Linux refuses it."""
    run_child(on_huge_pages, name)


def worker_killed(name: str) -> None:
    """The next worker process knows both places."""
    with moved("process", name) as it:
        it.check(range(PAGES - 1, PAGES))  # it has found out
        engine = it.handler._engine
        assert isinstance(engine, RemoteEngine)
        _, worker = engine.pids()
        os.kill(worker, signal.SIGKILL)
        it.check()
        assert {*states(it.handler, it.region)} == {PageState.CLEAN}
        assert it.handler.stats().restarts == 1
        it.handler.unserve(it.region)


@pytest.mark.parametrize("name", MEMORY)
def test_a_killed_worker(name: str) -> None:
    run_child(worker_killed, name)


def adopted(name: str, events: Feature) -> None:
    of = MEMORY_TYPES[name]
    with Userfaultfd(features=events) as uffd, region_in_room(of, LENGTH) as region:
        copy = Userfaultfd.from_fd(os.dup(uffd.fileno()), owner_pid=os.getpid())
        with copy, Handler(copy) as handler:
            handler.serve(region, BufferSource(b"x" * LENGTH))
            region.touch(0, PAGE)
            new = move(region.start)
            found: list[bytes | None] = []

            def read() -> None:
                try:
                    found.append(_memory.read(region.start + PAGE, PAGE))
                except PagePoisonedError:
                    found.append(None)

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            assert _memory.read(new, LENGTH) == b"x" * LENGTH
            reader.join(4 * SOON_S)
            there = b"x" * PAGE if of.shared else bytes(PAGE)
            assert found in ([there], [None] if not events & UNMAP else [there])
            with contextlib.suppress(HandlerError):
                handler.stop()
        _memory.munmap(new, LENGTH)


@pytest.mark.parametrize("unmap", [True, False], ids=["unmap", "no-unmap"])
@pytest.mark.parametrize("name", MEMORY)
def test_an_adopted_descriptor(name: str, unmap: bool) -> None:
    """Without EVENT_UNMAP the old place may be an error there: never zeros for data, nor a hang."""
    run_child(adopted, name, MOVE | (UNMAP if unmap else Feature(0)), budget_s=30)


class RandomMoves:
    """A region that is moved in parts, again and again, and what each place must show."""

    def __init__(self, rng: random.Random, name: str, driver: Driver) -> None:
        self.rng, self.name, self.driver = rng, name, driver
        self.shared = MEMORY_TYPES[name].shared
        # Of shared memory: what was written to the object. Of private memory: pages by address.
        self.object: dict[int, bytes] = {}
        self.pages: dict[int, int | None] = {}  # the page that an address shows; None: zeros
        self.own: dict[int, bytes] = {}
        self.log: list[str] = []

    def expected(self, at: int) -> bytes:
        page = self.pages[at]
        if at in self.own:
            return self.own[at]
        if page is None:
            return bytes(PAGE)
        return self.object.get(page, b"x" * PAGE)

    def check(self, at: int, *, ended: bool = False) -> None:
        try:
            found = _memory.read(at, PAGE)
        except PagePoisonedError:
            assert ended, self.log
            assert self.pages[at] is not None, self.log
            return
        assert found == self.expected(at), (hex(at), found[:4], self.expected(at)[:4], self.log)

    def write(self, at: int, data: bytes) -> None:
        self.log.append(f"write {at:#x}")
        _memory.write(at, data)
        page = self.pages[at]
        if self.shared and page is not None:
            self.object[page] = data
        else:
            self.own[at] = data

    def move(self, at: int) -> None:
        """Move pages that follow one another, and are in one mapping."""
        first = self.pages[at]
        most = 1
        while (
            at + most * PAGE in self.pages
            and most < PAGES
            and self.pages[at + most * PAGE] == (None if first is None else first + most)
        ):
            most += 1
        count = self.rng.randint(1, most)
        try:
            new = move(at, count * PAGE)
        except UffdOSError as error:  # over several mappings
            self.log.append(f"move {at:#x} of {count}: {error.errno}")
            return
        self.log.append(f"move {at:#x} of {count} to {new:#x}")
        for old in range(at, at + count * PAGE, PAGE):
            there = new + old - at
            self.pages[there] = self.pages[old]
            if old in self.own:
                self.own[there] = self.own.pop(old)
            if not self.shared:
                self.pages[old] = None

    def run(self) -> None:
        rng = self.rng
        events = MOVE | (UNMAP if rng.random() < 0.7 else Feature(0))
        events |= FORK if rng.random() < 0.4 else Feature(0)
        with_wp = rng.random() < 0.3
        mode = RegisterMode.MISSING | (RegisterMode.WP if with_wp else RegisterMode(0))
        self.log.append(f"{self.name} {self.driver} {events!r} wp={with_wp}")
        of = MEMORY_TYPES[self.name]
        with (
            Userfaultfd(features=events | (WP if with_wp else Feature(0))) as uffd,
            region_in_room(of, LENGTH) as region,
        ):
            handler = Handler(uffd, driver=self.driver, prefetch=rng.choice((0, 2 * PAGE)))
            is_here = self.driver == "native"
            source = BufferSource(b"x" * LENGTH) if is_here else CallableSource(filled)
            handler.serve(region, source, mode=mode)
            handler.start()
            self.pages = {region.start + page * PAGE: page for page in range(PAGES)}
            for step in range(rng.randint(4, 12)):
                at = rng.choice(list(self.pages))
                what = rng.choice(("move", "move", "read", "read", "write", "all", "fork"))
                if what == "move":
                    self.move(at)
                elif what == "read":
                    self.check(at)
                elif what == "write":
                    self.write(at, bytes([1 + step]) * PAGE)
                elif what == "all" or not events & FORK:
                    self.check_all()
                else:
                    self.log.append("fork")
                    assert in_fork(self.check_all) == 0, self.log
            if rng.random() < 0.5:
                self.check_all()
            began = time.monotonic()
            handler.stop()
            assert time.monotonic() - began < SOON_S, self.log
            assert handler.stats().unserved == handler.stats().failed == 0, self.log
            self.check_all(ended=True)
            unmap = threading.Thread(target=self.unmap, args=(region,), daemon=True)
            unmap.start()
            unmap.join(SOON_S)
            assert not unmap.is_alive(), self.log

    def check_all(self, *, ended: bool = False) -> None:
        every = list(self.pages)
        self.rng.shuffle(every)
        for at in every:
            self.check(at, ended=ended)

    def unmap(self, region: Region) -> None:
        for at in self.pages:
            if not region.start <= at < region.start + LENGTH:
                _memory.munmap(at, PAGE)


def random_moves(seed: int, name: str, driver: Driver, count: int) -> None:
    for number in range(seed, seed + count):
        try:
            RandomMoves(random.Random(number), name, driver).run()
        except BaseException:
            print(f"seed {number}: {name}, {driver}")
            raise


SEED = int(os.environ.get("PYUFFD_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)


@needs(FORK)
@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("driver", DRIVERS)
def test_random_moves(driver: Driver, name: str) -> None:
    run_child(random_moves, SEED, name, driver, 2 if driver == "process" else 6, budget_s=30)


@needs(FORK)
@pytest.mark.stress
@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("driver", DRIVERS)
def test_many_random_moves(driver: Driver, name: str) -> None:
    run_child(random_moves, SEED, name, driver, 40 if driver == "process" else 400, budget_s=600)
