"""A page's source blocks for good: what the other verbs do meanwhile, and as the handler stops.

The engine is inside the source: memory that another userfaultfd never fills, or a callable.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    ClosedError,
    Feature,
    Handler,
    HandlerError,
    PagePoisonedError,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
)
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests.kernel._faults import Task
from tests.kernel._serving import wait_until
from tests.process._pitfalls import Driver

PAGE = 4096
PAGES = 4
# All cells run at once; what does not wait needs a fraction of this.
SOON_S = 3.0
LIMIT_S = 60.0
MODE = RegisterMode.MISSING | RegisterMode.WP

pytestmark = [needs(Feature.PAGEFAULT_FLAG_WP), needs_kernel_faults()]


@dataclass(frozen=True)
class Place:
    handler: Handler
    region: Region
    offset: int


Verb = Callable[[Place], Any]

VERBS: dict[str, Verb] = {
    "checkpoint": lambda at: at.handler.checkpoint(at.region, at.offset, PAGE),
    "evict": lambda at: at.handler.evict(at.region, at.offset, PAGE, write_back=None),
    "fill": lambda at: at.handler.fill(at.region, at.offset, b"f" * PAGE),
    "page_states": lambda at: at.handler.page_states(at.region),
    "populate": lambda at: at.handler.populate(at.region, at.offset, PAGE),
    "recent_faults": lambda at: at.handler.recent_faults(),
    "retry": lambda at: at.handler.retry(at.region),
    "stats": lambda at: at.handler.stats(),
    "unprotect": lambda at: at.handler.unprotect(at.region, at.offset, PAGE),
    "unserve": lambda at: at.handler.unserve(at.region, at.offset, PAGE),
    "writeprotect": lambda at: at.handler.writeprotect(at.region, at.offset, PAGE),
}
# The others do not wait for a page whose source is stuck.
WAIT = ("checkpoint", "evict", "fill", "unprotect", "unserve", "writeprotect")


@dataclass
class Stuck:
    handler: Handler
    stuck: Region
    other: Region
    new: Region  # not served yet
    reader: Task[bytes]
    never_filled: Region
    filler: Userfaultfd

    def let_go(self) -> None:
        """Fill the source's page, for the thread that is inside."""
        self.filler.zeropage(self.never_filled)


def in_native(at: ExitStack) -> Stuck:
    """Return a handler whose engine waits for its source, at the first page of a region."""
    never_filled, stuck, other, new = (
        at.enter_context(Region.anonymous(PAGES * PAGE)) for _ in range(4)
    )
    filler = at.enter_context(Userfaultfd())
    uffd = at.enter_context(Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP))
    handler = Handler(uffd, driver="native", stall_timeout_s=LIMIT_S)
    handler.start()
    handler.serve(stuck, BufferSource(never_filled), mode=MODE)
    handler.serve(other, b"o" * (PAGES * PAGE), mode=MODE)
    handler.populate(other)
    filler.register(never_filled)
    reader = Task(stuck.read, 0, 1)
    wait_until(lambda: bool(filler.read_events()), "the engine waits for its source")
    return Stuck(handler, stuck, other, new, reader, never_filled, filler)


def use_others(made: Stuck) -> None:
    """Serve, protect and take out another region, whole and in parts."""
    handler, new = made.handler, made.new
    handler.serve(new, b"n" * len(new), mode=MODE)
    handler.populate(new)
    assert len(handler.checkpoint(new).states) == PAGES
    handler.unserve(new, PAGE, PAGE)
    handler.unserve(new)
    handler.serve(new, b"m" * len(new), mode=MODE, present="drop")
    handler.populate(new)  # the thread that answers faults is at the stuck source
    assert new.read(0, 1) == b"m"
    new.close()  # ends its serving too


def end_of(waiting: Task[Any]) -> str:
    """Return what a verb that waited raised; it may still have come through."""
    try:
        waiting.result()
    except (ClosedError, HandlerError, UffdOSError) as error:
        return str(error)
    return ""


def in_a_hurry(handler: Handler) -> None:
    handler.stop(timeout_s=0.1)


def all_verbs() -> None:
    with ExitStack() as stack:
        rows: dict[str, tuple[Stuck, Task[Any], Task[Any]]] = {}
        for name, verb in VERBS.items():
            made = in_native(stack)
            # One after the other: `other` must not wait behind what waits.
            beside = Task(verb, Place(made.handler, made.other, 0))
            rows[name] = (made, beside, Task(verb, Place(made.handler, made.stuck, 0)))
        time.sleep(0.1)  # until each is at its page
        others = {name: Task(use_others, made) for name, (made, _, _) in rows.items()}
        time.sleep(SOON_S)
        slow = [name for name, (_, beside, _) in rows.items() if beside.running]
        assert not slow, f"they wait for a page of another region: {slow}"
        for _, beside, _ in rows.values():
            beside.result()
        slow = [name for name, task in others.items() if task.running]
        assert not slow, f"serve() and others of other regions wait for {slow}"
        for task in others.values():
            task.result()
        assert {name for name, (_, _, at) in rows.items() if at.running} == set(WAIT)
        began = time.monotonic()
        # At once, before what waits gives up by itself.
        stops = {name: Task(in_a_hurry, made.handler) for name, (made, _, _) in rows.items()}
        for name, (made, _, at) in rows.items():
            with pytest.raises(HandlerError, match="source"):
                stops[name].result()
            said = end_of(at)
            # What unserve() leaves in place it tells itself.
            assert not said or "stop" in said or name == "unserve", f"{name}: {said}"
            with pytest.raises(PagePoisonedError):
                made.reader.result()
            made.let_go()
        assert time.monotonic() - began < SOON_S


def test_verbs_beside_a_stuck_source() -> None:
    run_child(all_verbs, budget_s=60)


def unserved() -> None:
    """It waits for the page too; what waited before comes through, or says that it came."""
    with ExitStack() as stack:
        made = in_native(stack)
        waiting = Task(VERBS["evict"], Place(made.handler, made.stuck, 0))
        time.sleep(0.1)
        assert waiting.running
        unserving = Task(made.handler.unserve, made.stuck)
        time.sleep(0.1)
        made.let_go()
        unserving.result()
        said = end_of(waiting)
        assert not said or "unserve()" in said, said
        if said:
            assert made.reader.result() == b"\0"
        else:  # evicted first: unserve() then poisons the page, unless it was read before that
            with suppress(PagePoisonedError):
                assert made.reader.result() == b"\0"
        made.handler.stop()


def test_unserve_beside_a_verb_that_waits() -> None:
    run_child(unserved)


def unserved_twice(how: str) -> None:
    """What takes the range out second says that it is gone, or that the handler has stopped."""
    with ExitStack() as stack:
        made = in_native(stack)
        handler, stuck = made.handler, made.stuck
        first = Task(handler.unserve, stuck)
        time.sleep(0.1)
        second: Task[None]
        if how == "unserve":
            second = Task(handler.unserve, stuck)
        elif how == "close":
            second = Task(stuck.close)
        else:
            second = Task(handler.stop)
        time.sleep(0.1)
        if how == "unserve":
            with pytest.raises(ValueError, match="served already"):
                handler.serve(stuck, b"s" * len(stuck))
        assert [first.running, second.running] == [True, True]
        made.let_go()
        if how == "unserve":
            with pytest.raises(ValueError, match="meanwhile"):  # told to one of the two
                for task in (first, second):
                    task.result()
        else:
            first.result()
            second.result()
        assert made.reader.result() == b"\0"
        if how != "close":
            with pytest.raises(PagePoisonedError):
                stuck.read(PAGE, 1)
        handler.stop()


@pytest.mark.parametrize("how", ["unserve", "close", "stop"])
def test_unserve_beside_another_end(how: str) -> None:
    run_child(unserved_twice, how)


def never(offset: int, length: int) -> bytes:
    time.sleep(LIMIT_S)
    return b"n" * length


def stop_twice(handler: Handler, reader: Task[bytes]) -> None:
    patient = Task(lambda: handler.stop(timeout_s=LIMIT_S))
    time.sleep(0.2)
    assert patient.running
    began = time.monotonic()
    hasty = Task(in_a_hurry, handler)
    with pytest.raises(HandlerError):  # told to one of the two
        for task in (hasty, patient):
            task.result()
    assert time.monotonic() - began < SOON_S
    with pytest.raises(PagePoisonedError):
        reader.result()


def stopped_twice(driver: Driver) -> None:
    """The second stop() is in more of a hurry than the first, or than close()."""
    if driver == "native":
        with ExitStack() as stack:
            made = in_native(stack)
            stop_twice(made.handler, made.reader)
            made.let_go()
        return
    with (
        Userfaultfd() as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Handler(uffd, driver=driver, stall_timeout_s=LIMIT_S) as handler,
    ):
        handler.serve(region, CallableSource(never))
        reader = Task(region.read, 0, 1)
        wait_until(lambda: handler.stats().requests > 0, "the source is asked")
        stop_twice(handler, reader)


@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_the_hastier_of_two_stops(driver: Driver) -> None:
    run_child(stopped_twice, driver, budget_s=30)
