"""Verbs called by a signal handler that has interrupted another call, with other threads at work.

A thread may hold one lock and wait for another that the interrupted call holds: what the signal
handler calls must not wait for that thread. PYUFFD_SEED chooses the places that are
tried; `-m stress` tries many more.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import pytest

from pyuffd import (
    BufferSource,
    ClosedError,
    DirtyTracker,
    Feature,
    Handler,
    HandlerError,
    Region,
    RegisterMode,
    UffdError,
    Userfaultfd,
    _memory,
)
from pyuffd.handlers._serving import Served
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE
from tests.process._interruptions import PACKAGE

SEED = int(os.environ.get("PYUFFD_SEED", "1"))
PAGES = 4
CONTENT = b"\x5a" * PAGE * PAGES
MODE = RegisterMode.MISSING | RegisterMode.WP
HANGS_S = 20.0
SOON_S = 5.0  # stop() waits for 10 s for a call of another thread
# A thread that has not ended by then waits for a lock of the interrupted call, or is slow.
STUCK_S = 0.02


@dataclass
class World:
    """A handler that serves one region; another can be served."""

    uffd: Userfaultfd
    region: Region
    other: Region
    handler: Handler
    store: bytearray = field(default_factory=lambda: bytearray(CONTENT))

    def write_back(self, offset: int, data: memoryview) -> None:
        """Write evicted pages to the source's buffer."""
        self.store[offset : offset + len(data)] = data


@contextmanager
def world() -> Iterator[World]:
    """Make one, with pages present and written."""
    with (
        Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Region.anonymous(PAGES * PAGE) as other,
        Handler(uffd) as handler,
    ):
        made = World(uffd, region, other, handler)
        handler.serve(region, BufferSource(made.store), mode=MODE)
        region.write(0, b"new")
        yield made


VERBS: dict[str, Callable[[World], object]] = {
    "serve": lambda at: at.handler.serve(at.other, BufferSource(CONTENT), mode=MODE),
    "unserve": lambda at: at.handler.unserve(at.region),
    "unserve-part": lambda at: at.handler.unserve(at.region, PAGE, PAGE),
    "protect": lambda at: at.handler.checkpoint(at.region),
    "evict": lambda at: at.handler.evict(at.region, write_back=at.write_back),
    "populate": lambda at: at.handler.populate(at.region),
    "close-region": lambda at: at.region.close(),
    "close-uffd": lambda at: at.uffd.close(),
    "stop": lambda at: at.handler.stop(),
}


class Tracer:
    """Calls a function before the line with this number that pyuffd passes; 0 only counts."""

    def __init__(self, at: int, call: Callable[[], object]) -> None:
        self.seen = 0
        self._at = at
        self._call = call

    def __enter__(self) -> Tracer:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self._at:
                self._call()
        return self._line


def attempt(what: str, at: World) -> None:
    """Call a verb; what others have changed meanwhile is an error that says so."""
    with suppress(UffdError, ValueError):
        VERBS[what](at)


def lines_of(outer: str) -> int:
    with world() as made, Tracer(0, lambda: None) as tracer:
        attempt(outer, made)
    return tracer.seen


def call_inside(outer: str, beside: str, inner: str, line: int) -> None:
    """Interrupt a verb there; another thread calls a second one, and then we the third."""
    with world() as made:
        thread = threading.Thread(target=attempt, args=(beside, made), daemon=True)

        def interrupt() -> None:
            thread.start()
            thread.join(STUCK_S)
            attempt(inner, made)

        with Tracer(line, interrupt):
            attempt(outer, made)
        if thread.ident is not None:
            thread.join(HANGS_S)
            assert not thread.is_alive(), f"{beside} hangs"
        with suppress(UffdError):
            made.handler.stop()
        if not made.region.closed:
            first = _memory.guarded_read(made.region.start, 3)
            assert first == b"new" or isinstance(first, _memory.Interrupted), first


def call_everywhere(outer: str, seed: int, most: int) -> None:
    chance = random.Random(seed)
    count = lines_of(outer)
    for _ in range(most):
        case = outer, chance.choice(list(VERBS)), chance.choice(list(VERBS))
        line = chance.randrange(1, count + 1)
        print(f"seed {seed}:", *case, f"line {line} of {count}", file=sys.stderr, flush=True)
        call_inside(*case, line)


@needs_kernel_faults()
@pytest.mark.parametrize("outer", VERBS)
def test_a_verb_inside_another_one(outer: str) -> None:
    run_child(call_everywhere, outer, SEED, 4, budget_s=60)


@pytest.mark.stress
@needs_kernel_faults()
@pytest.mark.parametrize("outer", VERBS)
def test_verbs_inside_another_one(outer: str) -> None:
    run_child(call_everywhere, outer, random.randrange(1 << 32), 2000, budget_s=600)


class Place:
    """Memory of a region; whoever asks for its length calls a function first."""

    def __init__(self, region: Region, call: Callable[[], object]) -> None:
        self.start, self.page_size = region.start, region.page_size
        self._length = region.length
        self._call = call

    @property
    def length(self) -> int:
        self._call()
        return self._length


def signal_in_serve(what: str) -> None:
    """A signal arrives inside serve(), while another thread takes out what its handler is about."""
    refused: list[BaseException] = []
    with world() as made:
        served = next(iter(made.handler._served.values()))
        # What unserve() does when it has found the range.
        take_out = partial(made.handler._unserve, served, seal=True)
        other, started = threading.Thread(target=take_out, daemon=True), threading.Event()

        def on_signal(number: int, frame: FrameType | None) -> None:
            try:
                VERBS[what](made)
            except HandlerError as error:
                refused.append(error)

        def interrupt() -> None:
            if not started.is_set():
                started.set()
                other.start()
                while not is_busy(served):
                    other.join(0.001)
                signal.raise_signal(signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, on_signal)
        made.handler.serve(Place(made.other, interrupt), BufferSource(CONTENT), mode=MODE)
        other.join(HANGS_S)
        assert not other.is_alive()
    assert len(refused) == 1
    assert "signal handler" in str(refused[0])


def stop_in_serve() -> None:
    """A signal handler stops the handler inside serve(), which has the lock."""
    took_s: list[float] = []
    with world() as made:

        def on_signal(number: int, frame: FrameType | None) -> None:
            began = time.monotonic()
            made.handler.stop()
            took_s.append(time.monotonic() - began)

        signal.signal(signal.SIGUSR1, on_signal)

        def interrupt() -> None:
            if not took_s:
                signal.raise_signal(signal.SIGUSR1)

        place = Place(made.other, interrupt)
        with pytest.raises(ClosedError):
            made.handler.serve(place, BufferSource(CONTENT), mode=MODE)
    assert took_s[0] < SOON_S


@needs_kernel_faults()
def test_stop_inside_serve() -> None:
    run_child(stop_in_serve, budget_s=30)


def is_busy(served: Served) -> bool:
    """Whether another thread has its lock."""
    if not served.changing.acquire(blocking=False):
        return True
    served.changing.release()
    return False


@needs_kernel_faults()
@pytest.mark.parametrize("what", ["unserve", "protect", "evict", "close-region"])
def test_the_range_is_busy(what: str) -> None:
    run_child(signal_in_serve, what, budget_s=30)


TRACKED: dict[str, Callable[[DirtyTracker], object]] = {
    "collect": lambda tracker: tracker.collect().commit(),
    "peek": lambda tracker: tracker.peek(),
    "blind": lambda tracker: tracker.blind,
    "close": lambda tracker: tracker.close(),
}


def track_inside(outer: str, inner: str, line: int) -> int:
    """Call one verb of a tracker inside another one; return how many lines that has."""
    with Region.anonymous(PAGE) as region, DirtyTracker(region) as tracker:
        region.write(0, b"new")

        def interrupt() -> None:
            with suppress(UffdError):
                TRACKED[inner](tracker)

        with Tracer(line, interrupt) as tracer, suppress(ValueError, UffdError):
            TRACKED[outer](tracker)
        return tracer.seen


def track_everywhere(outer: str, seed: int) -> None:
    chance = random.Random(seed)
    count = track_inside(outer, outer, 0)
    for inner in TRACKED:
        line = chance.randrange(1, count + 1)
        print(f"seed {seed}: {outer} {inner} line {line}", file=sys.stderr, flush=True)
        track_inside(outer, inner, line)


@needs_kernel_faults()
@pytest.mark.parametrize("outer", TRACKED)
def test_a_tracker_inside_its_own_call(outer: str) -> None:
    run_child(track_everywhere, outer, SEED, budget_s=20)
