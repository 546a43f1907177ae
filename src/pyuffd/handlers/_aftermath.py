"""Threads that a handler leaves behind because a page source does not return (layer L4)."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress

from pyuffd import _left
from pyuffd._describe import short_repr
from pyuffd._errors import ClosedError, HandlerError, UffdOSError
from pyuffd._uffd import Userfaultfd
from pyuffd.handlers._backend import Backend
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._served_parts import Part
from pyuffd.handlers._serving import Served
from pyuffd.handlers._types import PATIENCE_S, Held
from pyuffd.regions import Region

# How long a signal may be delayed while a range is taken out.
SLICE_S = 0.05
# A thread that has just put a page in place leaves the range within this time.
LEAVE_S = 1.0
LOOK_S = 0.001


def views_of(all_served: Iterable[Served]) -> list[memoryview]:
    """Return views that keep the memory mapped which the engine reads and writes for its ranges."""
    views = []
    for served in all_served:
        for memory in served.touched:
            if isinstance(memory, Region):
                with suppress(ClosedError):
                    views.append(memory.memoryview())
    return views


def thread_name(thread_id: int) -> str:
    """Return the name of a thread of this process."""
    for thread in threading.enumerate():
        if thread.native_id == thread_id:
            return thread.name
    try:
        with open(f"/proc/self/task/{thread_id}/comm", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return f"thread {thread_id}"


def take_out(engine: Backend, served: Served, *, seal: bool, part: Part | None = None) -> None:
    """Take a range or a part of it out.

    Wait for the threads at its pages, in slices that signals can interrupt.
    """
    give_up_at = time.monotonic() + PATIENCE_S
    while (left_s := give_up_at - time.monotonic()) > 0:
        limit_s = min(SLICE_S, left_s)
        if engine.unserve(served.id, seal=seal, patience_s=limit_s, gently=True, part=part):
            return
    engine.unserve(served.id, seal=seal, patience_s=0, part=part)


def take_out_what_goes(engine: Backend, all_served: Iterable[Served]) -> None:
    """Take out the regions that are unmapped next, which nobody can touch.

    Their pages need not be poisoned, which takes about as long as a fault for each page, and memory
    for page tables. If a thread still works in a region, the end of the engine takes that out.
    """
    for served in all_served:
        if isinstance(served.region, Region) and served.region._goes_away():
            with suppress(UffdOSError):
                engine.unserve(served.id, seal=False, patience_s=SLICE_S, gently=True)


def held_at(engine: Backend, served: Served, part: Part | None = None) -> tuple[Held, ...]:
    """Return the threads that do not leave a range, or a part of one, that has been taken out."""
    begin, end = part or (0, served.id.length)
    start, past = served.id.start + begin, served.id.start + end
    give_up_at = time.monotonic() + LEAVE_S
    while not engine.is_remote:
        held = tuple(
            one
            for one in engine.held()
            if one.number == served.id.number
            and not one.is_request
            and (part is None or (one.start < past and start < one.start + one.length))
        )
        if not held or time.monotonic() > give_up_at:
            return held
        time.sleep(LOOK_S)
    return ()


def _is_over(engine: Engine, numbers: Collection[int]) -> bool:
    """Return whether no thread is at these ranges, which were taken out, any more."""
    try:
        return not any(one.number in numbers for one in engine.held())
    except ClosedError:  # the engine has ended
        return engine.life.free_if_deserted()


def leave_behind(
    engine: Engine,
    held: Iterable[Held],
    all_served: Iterable[Served],
    uffds: Iterable[Userfaultfd],
    views: list[memoryview],
) -> None:
    """Keep the memory and descriptors that the threads still inside may use from being reused."""
    by_number = {served.id.number: served for served in all_served}
    names = tuple(sorted({thread_name(one.thread_id) for one in held}))
    keep = (engine, by_number, views)
    for uffd in uffds:
        targets = tuple(
            (one.start, one.start + one.length)
            for one in held
            if not one.is_request and one.number in by_number and by_number[one.number].uffd is uffd
        )
        left = _left.LeftBehind(
            names, targets, lambda: _is_over(engine, by_number), uffd._memory_key, keep
        )
        _left.note(left)
        uffd._leave_behind(left)


def describe(held: Iterable[Held], all_served: Iterable[Served], *, is_remote: bool) -> str:
    """Return which thread is blocked by which source, at which page."""
    sources = {served.id.number: served.source for served in all_served}

    def who(one: Held) -> str:
        return "of the helper process" if is_remote else repr(thread_name(one.thread_id))

    def what(one: Held) -> str:
        source = sources.get(one.number)
        return "the source of memory that was unserved" if source is None else short_repr(source)

    return "; ".join(
        f"thread {who(one)} is left behind at {one.start:#x}, held up by {what(one)}"
        for one in held
    )


def source_at(address: int | None, all_served: Iterable[Served]) -> str:
    """Return the source of the range that was served at an address, as text; "" if unknown."""
    for served in all_served:
        if address is not None and served.has_some_of(address, 1):
            return short_repr(served.source) if served.source is not None else ""
    return ""


def completed(
    error: HandlerError | None,
    held: tuple[Held, ...],
    all_served: list[Served],
    *,
    is_remote: bool,
    waited_s: float,
) -> HandlerError | None:
    """Return the error of stop(), with the source and the threads left behind in its text."""
    left = describe(held, all_served, is_remote=is_remote)
    if error is None and not left:
        return None
    if error is None:
        first = held[0]
        text = f"page sources did not answer within {waited_s:.1f} s: {left}"
        return HandlerError(text, first.start, first.length)
    source = source_at(error.start, all_served)
    text = str(error) + (f", from {source}" if source else "") + (f"; {left}" if left else "")
    whole = HandlerError(text, error.start, error.length)
    whole.__cause__ = error.__cause__
    return whole
