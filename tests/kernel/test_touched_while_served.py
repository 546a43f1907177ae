"""Pages that another thread touches while `serve` or `restore` is under way.

A page that is present has no missing fault. So present pages are looked for when the memory has
been registered: an earlier look misses what is touched between the two.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    Ioctl,
    PageSource,
    PageState,
    Region,
    RegisterMode,
    Snapshot,
    Userfaultfd,
    WriteprotectMode,
)
from pyuffd.handlers._engine import Engine
from pyuffd.testing import needs
from tests._barriers import Point, holding
from tests._child import run_child
from tests._images import START, data, write
from tests._memory import PAGE, memory_of, memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import AnyDriver, handler_of, states, wait_until

EVERY: tuple[AnyDriver, ...] = ("native", "inline", "thread", "process")
IN_PROCESS: tuple[AnyDriver, ...] = ("native", "inline", "thread")
MISSING, MINOR, WP = RegisterMode.MISSING, RegisterMode.MINOR, RegisterMode.WP
TRACKING = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
MINOR_FAULTS = Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS
MINE = b"mine"
SEED = int(os.environ.get("PYUFFD_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
ROUNDS = 40


@contextlib.contextmanager
def before_registering(touch: Callable[[], object]) -> Iterator[None]:
    """Touch memory just before it is registered, as another thread may do it."""
    register, many = Userfaultfd._register_by, Engine.serve_many

    def registered(*args: Any) -> Ioctl:
        touch()
        return register(*args)

    def served(*args: Any) -> None:
        touch()
        many(*args)

    with (
        patch.object(Userfaultfd, "_register_by", registered),
        patch.object(Engine, "serve_many", served),
    ):
        yield


def filled(value: int, _offset: int, length: int) -> bytes:
    """Return the content of a source for the helper process."""
    return bytes([value]) * length


def source_of(driver: AnyDriver, length: int, value: int = 7) -> PageSource:
    if driver == "process":
        return CallableSource(partial(filled, value))
    return BufferSource(bytes([value]) * length)


def refused(driver: AnyDriver, name: str, modes: int, started: bool) -> None:
    """Refused, with all of it as before; afterwards it can be served."""
    mode = RegisterMode(modes)
    features = (TRACKING if mode & WP else MINOR_FAULTS) if mode != MISSING else Feature(0)
    with (
        contextlib.closing(memory_of(name)) as memory,
        handler_of(driver, features) as handler,
    ):
        region, size = memory.pages(4), memory.page_size
        if started:
            handler.start()
        source = source_of(driver, region.length)
        with (
            before_registering(lambda: region.write(2 * size, MINE)),
            pytest.raises(ValueError, match=rf"1 page .*{region.start + 2 * size:#x}.*drop"),
        ):
            handler.serve(region, source, mode=mode)
        assert not handler.uffd._has_registered(region.start, region.start + region.length)
        assert region.read(2 * size, 5) == MINE + b"\0"
        assert region.read(0, size) == bytes(size)
        dropped = region.shared or memory.is_anon or name == "hugetlb-private"
        if name in ("shmem-private",):
            return
        assert dropped
        handler.serve(region, source, mode=mode, present="drop")
        handler.start()
        assert region.read() == bytes([7]) * region.length
        assert not handler.stats().unserved


def marks_of(name: str) -> Any:
    params: Any = memory_params(name)
    return params[0].marks


ROWS = [
    *((driver, name, MISSING) for driver in EVERY for name in ("anon", "shmem", "shmem-private")),
    *((driver, "hugetlb", MISSING) for driver in EVERY),
    ("native", "hugetlb-private", MISSING),
    *((driver, "anon", MISSING | WP) for driver in EVERY),
    *((driver, "shmem", MISSING | MINOR) for driver in EVERY),
    *((driver, "shmem", MINOR) for driver in EVERY),
]


@pytest.mark.parametrize("started", [True, False], ids=["started", "not-started"])
@pytest.mark.parametrize(
    ("driver", "name", "mode"),
    [
        pytest.param(
            driver, name, int(mode), id=f"{driver}-{name}-{mode.name}", marks=marks_of(name)
        )
        for driver, name, mode in ROWS
    ],
)
def test_refused(driver: AnyDriver, name: str, mode: int, started: bool) -> None:
    run_child(refused, driver, name, mode, started)


def registered_before() -> None:
    """What was registered already stays so, with its modes."""
    with (
        Userfaultfd(features=TRACKING) as uffd,
        Region.anonymous(4 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        uffd.register(region, mode=WP)
        with (
            before_registering(lambda: region.write(0, MINE)),
            pytest.raises(ValueError, match="1 page "),
        ):
            handler.serve(region, b"7" * region.length)
        assert uffd._registered_for(WP) == [(region.start, region.start + region.length)]
        assert region.read(PAGE, 1) == b"\0"
        uffd.writeprotect(region.start, region.length)
        uffd.writeprotect(region.start, region.length, mode=WriteprotectMode(0))


def test_registered_before() -> None:
    run_child(registered_before)


def many(touched: int) -> None:
    """Of many regions served at once those before the touched one are served."""
    count = 5
    with (
        contextlib.ExitStack() as stack,
        Userfaultfd() as uffd,
        Handler(uffd) as handler,
        tempfile.TemporaryFile() as file,
    ):
        file.write(b"7" * PAGE)
        file.flush()
        regions = [stack.enter_context(Region.anonymous(PAGE)) for _ in range(count)]
        with (
            before_registering(lambda: regions[touched].write(0, MINE)),
            pytest.raises(ValueError, match="1 page "),
        ):
            handler._serve_many([(region, FileSource(file.fileno())) for region in regions])
        for number, region in enumerate(regions):
            is_there = uffd._has_registered(region.start, region.start + PAGE)
            assert is_there == (number < touched)
            assert region.read(0, 4) == (
                b"7777" if number < touched else MINE if number == touched else bytes(4)
            )


@pytest.mark.parametrize("touched", [0, 2, 4])
def test_many_at_once(touched: int) -> None:
    run_child(many, touched)


Mode = Literal["copy", "minor"]


def restored(mode: Mode, count: int, again: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="restore-") as path, contextlib.ExitStack() as stack:
        step = 64 * PAGE
        parts = [(START + n * step, [data(8, n + 1)]) for n in range(count)]
        folder = write(Path(path) / "first", parts)
        snapshot = stack.enter_context(Snapshot.open(folder))
        regions = [stack.enter_context(Region.anonymous(8 * PAGE)) for _ in range(count)]
        if again:  # a handler of earlier served it
            with Userfaultfd() as uffd, Handler(uffd) as handler:
                for region in regions:
                    handler.serve(region, b"7" * region.length)
            for region in regions:
                region.punch_hole()
        pairs = [(START + n * step, region) for n, region in enumerate(regions)]
        last, before = regions[-1], len(os.listdir("/proc/self/fd"))
        with (
            before_registering(lambda: last.write(2 * PAGE, MINE)),
            pytest.raises(ValueError, match=r"already present|pages already"),
        ):
            snapshot.restore(pairs, mode=mode)
        assert len(os.listdir("/proc/self/fd")) <= before + count  # memfds of "minor"
        if mode == "copy":
            assert last.read(2 * PAGE, 4) == MINE
            assert last.read(0, PAGE) == bytes(PAGE)
            last.punch_hole()
            with snapshot.restore(pairs, mode=mode) as restore:
                assert restore.wait(10)
                for start, region in pairs:
                    assert region.read() == snapshot.read(start, region.length)


@needs(Feature.MINOR_SHMEM | Feature.EVENT_REMOVE)
@pytest.mark.parametrize("again", [False, True], ids=["new", "served-before"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["copy"])
def test_restore(mode: Mode, count: int, again: bool) -> None:
    run_child(restored, mode, count, again)


# What happens meanwhile


def waits(driver: AnyDriver, name: str) -> None:
    """A thread that touches the memory when it is registered and not yet open gets the content."""
    with contextlib.closing(memory_of(name)) as memory, handler_of(driver) as handler:
        region = memory.pages(4)
        handler.start()
        with holding(Point.REGISTERED) as point:
            serving = Task(handler.serve, region, source_of(driver, region.length))
            point.wait()
            touching = Task(region.read, 0, 4)
            time.sleep(0.05)
            assert touching.running
        serving.result()
        assert touching.result() == bytes([7]) * 4
        stats = handler.stats()
        assert (stats.unserved, stats.failed, stats.poisoned_pages) == (0, 0, 0)
        assert states(handler, region)[1:] == [PageState.ABSENT] * 3


@pytest.mark.parametrize("driver", IN_PROCESS)
@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb"))
def test_waits(driver: AnyDriver, name: str) -> None:
    run_child(waits, driver, name)


def waits_and_is_refused(driver: AnyDriver) -> None:
    """The threads that wait go on as if nobody had called `serve`."""
    with Region.anonymous(64 * PAGE) as region, handler_of(driver) as handler:
        handler.start()
        with holding(Point.REGISTERED) as point:
            with before_registering(lambda: region.write(PAGE, MINE)):
                serving = Task(handler.serve, region, source_of(driver, region.length))
                point.wait()
            touching = [Task(region.read, n * PAGE, 4) for n in range(2, 6)]
            time.sleep(0.05)
            assert all(each.running for each in touching)
        with pytest.raises(ValueError, match=r"already present"):
            serving.result()
        assert [each.result() for each in touching] == [bytes(4)] * 4
        assert not handler.uffd._has_registered(region.start, region.start + region.length)
        stats = handler.stats()
        assert (stats.unserved, stats.failed, stats.poisoned_pages) == (0, 0, 0)


@pytest.mark.parametrize("driver", IN_PROCESS)
def test_waits_and_is_refused(driver: AnyDriver) -> None:
    run_child(waits_and_is_refused, driver)


def forks_meanwhile() -> None:
    """A fork while the memory is registered and not open is served too."""
    with Region.anonymous(4 * PAGE) as region, handler_of("native", Feature.EVENT_FORK) as handler:
        handler.start()
        with holding(Point.REGISTERED) as point:
            serving = Task(handler.serve, region, source_of("native", region.length))
            point.wait()
            child = os.fork()
            if child == 0:
                os._exit(0 if region.read(0, 4) == bytes([7]) * 4 else 1)
            wait_until(lambda: handler.stats().forks == 1, "the fork is followed")
            time.sleep(0.05)
        serving.result()
        assert os.waitpid(child, 0)[1] == 0


@needs(Feature.EVENT_FORK)
def test_forks_meanwhile() -> None:
    run_child(forks_meanwhile)


def drops_meanwhile() -> None:
    """What is dropped when the memory is registered and not open gets the content."""
    with (
        Region.anonymous(4 * PAGE) as region,
        handler_of("native", Feature.EVENT_REMOVE) as handler,
    ):
        handler.start()
        with holding(Point.REGISTERED) as point:
            serving = Task(handler.serve, region, source_of("native", region.length))
            point.wait()
            region.punch_hole()
        serving.result()
        assert region.read() == bytes([7]) * region.length


@needs(Feature.EVENT_REMOVE)
def test_drops_meanwhile() -> None:
    run_child(drops_meanwhile)


def with_the_gil(driver: AnyDriver, present: str) -> None:
    """A thread that holds the GIL while it waits for a page does not hold up `serve`."""
    features = Feature.EVENT_REMOVE if driver != "inline" else Feature(0)
    size = 16 * PAGE
    with (
        Region.anonymous(size) as region,
        handler_of(driver, features) as handler,
        region.memoryview() as view,
    ):
        handler.start()
        source = source_of(driver, size)
        ends = threading.Event()
        served = threading.Event()
        wrong: list[bytes] = []

        def touch() -> None:
            number = 0
            while not ends.is_set():
                number += 1
                at = number * PAGE % size
                is_served = served.is_set()
                if view[at] != 7 and is_served and served.is_set():
                    wrong.append(b"%d" % at)

        toucher = threading.Thread(target=touch)
        toucher.start()
        done = 0
        try:
            until = time.monotonic() + 2.0
            while time.monotonic() < until and done < ROUNDS:
                with contextlib.suppress(ValueError):
                    handler.serve(region, source, present=present)  # type: ignore[arg-type]
                    served.set()
                    done += 1
                    assert view[0] in (7, 0)
                    served.clear()
                    handler.populate(region)
                    handler.unserve(region)
                region.madvise(4)
        finally:
            ends.set()
            toucher.join()
        assert not wrong
        assert present != "drop" or done
        assert not handler.stats().unserved


@needs(Feature.EVENT_REMOVE)
@pytest.mark.parametrize("present", ["refuse", "drop"])
@pytest.mark.parametrize("driver", EVERY)
def test_with_the_gil(driver: AnyDriver, present: str) -> None:
    run_child(with_the_gil, driver, present, budget_s=20)
