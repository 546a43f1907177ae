"""`Recording`: which pages of an image a program touches, from a handler's fault log (layer L4)."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from pyuffd._arguments import check_seconds
from pyuffd._latch import Latch
from pyuffd._pages import PAGE_SIZE, round_down
from pyuffd._working_set import MOST_PAGES, MOST_ROWS, Place, Run
from pyuffd.handlers import FaultLog

Until = float | Literal["settled"]

# How often the log is looked at.
LOOK_S = 0.05
# Settled: fewer than this share of all pages were touched in the last so many seconds.
SETTLED_S = 1.0
SETTLED_SHARE = 0.02
# A program that never settles keeps touching other memory, and one that sleeps touches none.
LONGEST_S = 60.0


class Watched(NamedTuple):
    """Memory whose faults are recorded.

    Attributes:
        space: As `LoggedFault.space`.
        start: First address.
        length: Bytes.
        places: Its parts that are parts of the image, in ascending order.
    """

    space: int
    start: int
    length: int
    places: tuple[Place, ...]


def check_until(until: object) -> Until:
    """Return when a recording is to end; ValueError for other words than "settled"."""
    if until == "settled":
        return "settled"
    if isinstance(until, str):
        raise ValueError(f"until {until!r} is neither seconds nor 'settled'")
    return check_seconds("until", until)


class Recording:
    """Demand faults, as pages of an image in the order of their first touch.

    What is filled without a fault, ahead or in the background, is not in it. A huge page is all the
    pages of the image that it holds, since nothing tells which of them were touched.

    Args:
        take: Takes faults, oldest first; `Handler.take_faults`.
        watched: Memory in which faults count. Others (forks, other regions) do not.
        until: When it ends: after this many seconds, or when hardly any new page is touched
            ("settled"; after a minute at the latest).
    """

    def __init__(
        self, take: Callable[[], FaultLog], watched: Iterable[Watched], until: Until = "settled"
    ) -> None:
        self.lost = 0
        self._take = take
        self._watched = sorted(watched)
        self._keys = [(each.space, each.start) for each in self._watched]
        self._until = until
        self._runs: dict[Run, None] = {}
        self._pages = 0
        self._history: deque[tuple[float, int]] = deque()

    def __len__(self) -> int:
        return self._pages

    @property
    def runs(self) -> list[Run]:
        """Runs (page, pages) in order."""
        return list(self._runs)

    def look(self) -> None:
        """Take what was logged since the last look."""
        log = self._take()
        self.lost += log.lost
        for address, space in zip(log.addresses, log.spaces, strict=True):
            self._add(space, address)

    def _add(self, space: int, address: int) -> None:
        at = bisect_right(self._keys, (space, address)) - 1
        if at < 0 or len(self._runs) >= MOST_ROWS or self._pages >= MOST_PAGES:
            return
        watched = self._watched[at]
        if watched.space != space or address >= watched.start + watched.length:
            return
        for place in watched.places:
            page = round_down(address - watched.start, place.page_size)
            begin = max(page, place.at)
            end = min(page + place.page_size, place.at + place.length)
            run = ((place.offset + begin - place.at) // PAGE_SIZE, (end - begin) // PAGE_SIZE)
            if begin < end and run not in self._runs:
                self._runs[run] = None
                self._pages += run[1]

    def is_over(self, elapsed_s: float) -> bool:
        """Whether it must end, this many seconds after it began; called after each look."""
        if self._until != "settled":
            return elapsed_s >= self._until
        history, count = self._history, len(self._runs)
        history.append((elapsed_s, count))
        while len(history) > 1 and history[1][0] <= elapsed_s - SETTLED_S:
            history.popleft()
        then, before = history[0]
        is_settled = elapsed_s - then >= SETTLED_S and count - before < count * SETTLED_SHARE
        return elapsed_s >= LONGEST_S or is_settled

    def run(self, stop: threading.Event | Latch) -> None:
        """Record until it is over or `stop` is set."""
        began = time.monotonic()
        self.look()
        is_over = self.is_over(0.0)
        while not is_over:
            is_stopped = stop.wait(LOOK_S)
            self.look()
            is_over = is_stopped or self.is_over(time.monotonic() - began)
