"""Objects dropped without close(), which the garbage collector finds wherever it happens to run."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from pyuffd import (
    DirtyTracker,
    Feature,
    Handler,
    HandlerError,
    Region,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
    _memory,
    lazy,
)
from pyuffd.handlers import _overlaps
from pyuffd.handlers._ending import Ending
from pyuffd.handlers._stopping import Stops
from pyuffd.testing import needs, no_leaks
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE

pytestmark = [needs_kernel_faults(), needs(Feature.SIGBUS)]


def handler(driver: Any, start: bool = True) -> tuple[object, ...]:
    uffd = Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))
    region = Region.anonymous(2 * PAGE)
    made = Handler(uffd, driver=driver)
    made.serve(region, ZeroSource())
    if start:
        made.start()
        region.read(0, 1)
    return uffd, region, made


def lazy_region() -> object:
    memory = lazy(b"x" * PAGE, driver="native")
    memory.read(0, 1)
    return memory


def tracker() -> object:
    region = Region.anonymous(PAGE)
    return region, DirtyTracker(region)


DROPPED: dict[str, Callable[[], object]] = {
    "native": lambda: handler("native"),
    "native-unstarted": lambda: handler("native", start=False),
    "inline": lambda: handler("inline"),
    "thread-unstarted": lambda: handler("thread", start=False),
    "process": lambda: handler("process"),
    "lazy": lazy_region,
    "tracker": tracker,
}
# What a thread may hold when the collector runs in it.
LOCKS: dict[str, AbstractContextManager[Any]] = {
    "serve": _overlaps.overlaps_lock(),
    "start of a thread": threading._active_limbo_lock,  # type: ignore[attr-defined]
}


def drop(make: Callable[[], object]) -> None:
    circle: list[object] = [make()]
    circle.append(circle)


def collected_below_a_lock(what: str, lock: str) -> None:
    warnings.simplefilter("ignore")
    drop(DROPPED[what])  # what is kept from the first time, modules for example
    gc.collect()
    gc.disable()
    with no_leaks(settle_s=10.0):
        drop(DROPPED[what])
        with LOCKS[lock]:
            gc.collect()


@pytest.mark.crossing
@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("what", DROPPED)
def test_collected_below_a_lock(what: str, lock: str) -> None:
    run_child(collected_below_a_lock, what, lock)


def stays_mapped() -> None:
    """The handler of garbage ends later than the collector: its memory is there until then."""
    warnings.simplefilter("ignore")
    gc.disable()
    may_end, finish = threading.Event(), Stops._finish

    def late(self: Stops, ending: Ending) -> HandlerError | None:
        may_end.wait(30)
        return finish(self, ending)

    Stops._finish = late  # type: ignore[method-assign]

    def dropped() -> int:
        uffd, region, made = handler("native")
        assert isinstance(region, Region)
        drop(lambda: (uffd, region, made))
        return region.start

    start = dropped()
    gc.collect()
    _memory.look_at(os.getpid(), start, PAGE)
    may_end.set()
    give_up_at = time.monotonic() + 10
    while time.monotonic() < give_up_at:
        try:
            _memory.look_at(os.getpid(), start, PAGE)
        except UffdOSError:
            return
        time.sleep(0.01)
    raise AssertionError("it is still mapped")


def test_memory_stays_until_its_handler_has_ended() -> None:
    run_child(stays_mapped)


def collected_anywhere() -> None:
    warnings.simplefilter("ignore")
    cheap = [what for what in DROPPED if what != "process"]
    for count in range(1, 200, 3):
        gc.set_threshold(count, 1, 1)
        for what in random.Random(count).sample(cheap, 2):
            drop(DROPPED[what])
        with Userfaultfd() as uffd, Region.anonymous(4 * PAGE) as region, Handler(uffd) as other:
            other.serve(region, b"x" * 4 * PAGE)
            other.unserve(region[PAGE : 2 * PAGE])
            assert region.read(0, 1) == b"x"
    gc.collect()


def test_collected_anywhere() -> None:
    run_child(collected_anywhere)
