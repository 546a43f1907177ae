"""Refuse a page source that would wait for itself (layer L4).

A source may read memory that its own handler serves, as long as another worker can fetch what is
missing there. Otherwise its thread would wait for the page that only itself can bring.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from pyuffd._errors import HandlerError
from pyuffd._overlay import OverlaySource
from pyuffd.handlers._types import PageState

# A worker that has its answer puts the pages in place within this time, the event loop blocked or
# not.
PLACING_S = 0.5
LOOK_S = 0.001
MISSING = {PageState.ABSENT, PageState.IN_FLIGHT}


class Page(NamedTuple):
    """A page of a served range, by the range's number and the offset in it."""

    number: int
    offset: int


class Fetching(NamedTuple):
    """Pages that a source is asked for."""

    number: int
    offset: int
    length: int

    def has(self, page: Page) -> bool:
        """Whether this page is one of them."""
        return page.number == self.number and 0 <= page.offset - self.offset < self.length


class SourceThreads:
    """Which pages each worker fetches, and which page its source waits for.

    Threads: safe; each worker changes only its own entries.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._fetching: dict[int, Fetching] = {}  # by thread
        self._waiting: dict[int, Page] = {}

    def begin(self, number: int, offset: int, length: int) -> None:
        """Note that this thread calls a source."""
        self._fetching[threading.get_ident()] = Fetching(number, offset, length)

    def end(self) -> None:
        """Note that the source has returned."""
        me = threading.get_ident()
        self._waiting.pop(me, None)
        self._fetching.pop(me, None)

    @property
    def is_one(self) -> bool:
        """Whether a source runs in this thread."""
        return threading.get_ident() in self._fetching

    def waits_for_itself(self, page: Page, is_missing: Callable[[Page], bool]) -> bool:
        """Note that this thread waits for a missing page; return whether nobody can fetch it."""
        me = threading.get_ident()
        self._waiting[me] = page
        # An earlier wait of another thread may be over.
        stuck = {
            thread: wanted
            for thread, wanted in self._waiting.copy().items()
            if thread == me or is_missing(wanted)
        }
        while True:
            free = [
                thread
                for thread, wanted in stuck.items()
                if any(other not in stuck for other in self._who_fetches(wanted))
            ]
            if not free:
                break
            for thread in free:
                del stuck[thread]
        if me not in stuck:
            return False
        del self._waiting[me]
        return True

    def _who_fetches(self, page: Page) -> list[int]:
        """Return the thread that fetches a page, or those that may; 0 is one without a source."""
        fetching = self._fetching.copy()
        for thread, pages in fetching.items():
            if pages.has(page):
                return [thread]
        return [*fetching, *([0] if len(fetching) < self._workers else [])]


def without_pages_in_c(states: bytes, overlay: OverlaySource, first: int, size: int) -> bytes:
    """Return the states of pages from `first` on; those that C reads count as present."""
    found = bytearray(states)
    for index, state in enumerate(states):
        if state in MISSING:
            at = (first + index) * size
            if not any(overlay.is_in_python(run) for run in overlay.runs_in(at, at + size)):
                found[index] = PageState.CLEAN
    return bytes(found)


def first_missing(states: bytes) -> int | None:
    """Return the index of the first page that is not there, or None."""
    return next((index for index, state in enumerate(states) if state in MISSING), None)


def stays_missing(look: Callable[[], bytes]) -> bool:
    """Return whether missing pages stay missing while this thread does nothing."""
    give_up_at = time.monotonic() + PLACING_S
    while (found := look()).count(PageState.IN_FLIGHT) and PageState.ABSENT not in found:
        if time.monotonic() > give_up_at:
            return True
        time.sleep(LOOK_S)
    return PageState.ABSENT in found


def waits_error(place: str, address: int, length: int, *, of_loop: bool) -> HandlerError:
    """Return the error for an access that would wait for itself."""
    who = (
        "this thread runs the event loop in which its AsyncSource would read it"
        if of_loop
        else "this thread runs the page source that would have to read it"
    )
    remedy = (
        "touch it in another thread (asyncio.to_thread)"
        if of_loop
        else "let the source read its data elsewhere, or populate() these pages before"
    )
    return HandlerError(
        f"page {address:#x} of {place} is missing, and {who}: the access would wait for itself;"
        f" {remedy}",
        address,
        length,
    )
