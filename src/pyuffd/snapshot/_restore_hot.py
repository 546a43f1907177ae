"""The working set of a restore: filling it first, its file read ahead, and recording another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import pairwise

from pyuffd._arguments import shown
from pyuffd._image_calls import HotPlan, hot_plan, read_ahead
from pyuffd._latch import RLock
from pyuffd._pages import PAGE_SIZE
from pyuffd._recording import Recording, Until, Watched
from pyuffd._working_set import SHARE, Place, Run, WorkingSet, parts
from pyuffd.handlers import Handler
from pyuffd.snapshot import _working_sets
from pyuffd.snapshot._content import PIECE, Placed
from pyuffd.snapshot._reading import Image

# Windows of 1 MiB whose files are read ahead of the filling, so that a disk has many requests at
# once; and how many more each window requests, until that many are ahead.
AHEAD = 32
READ_AT_ONCE = 4
# Faults that may come between two looks of the recording; a fault needs microseconds.
LOGGED_FAULTS = 1 << 16
# Fills ranges of a region, an array of three columns, and returns the bytes filled.
Fill = Callable[[Placed, memoryview], int]


def of_image(image: Image, given: str | WorkingSet | None) -> WorkingSet | None:
    """Return the working set to be filled first; one of another image has a `problem`."""
    if given is None:
        return None
    if isinstance(given, str):
        known = _working_sets.load(image, given)
        if known is None:
            known = WorkingSet(b"", 0, problem="there is none with this name")
        return known
    if not isinstance(given, WorkingSet):
        raise TypeError(f"working_set must be a name or a WorkingSet, not {shown(given)}")
    wanted = (_working_sets.image_id(image), _working_sets.image_length(image))
    if not given.problem and (given.image_id, given.image_length) != wanted:
        return WorkingSet(*wanted, problem="of another image")
    return given


class Hot:
    """What a restore does with working sets.

    Args:
        image: The snapshot.
        placed: What is restored.
        known: The set that is filled first.
    """

    def __init__(self, image: Image, placed: Sequence[Placed], known: WorkingSet | None) -> None:
        self._image = image
        self._placed = placed
        self._known = known
        self.filled_bytes = 0
        self._lock = RLock()
        self._asking = RLock()
        # What is filled by one call: a plan, and the first and the last of its rows.
        self._windows: list[tuple[HotPlan, int, int, int]] = []
        self._begun = self._asked = 0

    @property
    def is_known(self) -> bool:
        """Whether there is a set that is filled first."""
        return self._known is not None and not self._known.problem

    @cached_property
    def _parts(self) -> list[list[Place]]:
        """Where each memory is in the image."""
        return _working_sets.places(
            self._image, [(each.start, each.length, each.page_size) for each in self._placed]
        )

    def _in_order(self) -> list[list[Place]]:
        """Return all places; each memory by itself if two have the same part of the image."""
        places = sorted(place for each in self._parts for place in each)
        for before, place in pairwise(places):
            if before.offset + before.length > place.offset:
                return self._parts
        return [places]

    def jobs(self, fill: Fill) -> list[Callable[[], int]]:
        """Return calls that fill it, up to 1 MiB each; `fill` fills ranges of a region."""
        if self._known is None or not self.is_known:
            return []
        for places in self._in_order():
            plan = hot_plan(self._known.data, round(100 * SHARE), places, PIECE)
            self._windows.extend((plan, *window) for window in plan.windows)
        return [partial(self._fill, fill)] * len(self._windows)

    def _fill(self, fill: Fill) -> int:
        with self._lock:
            number = self._begun
            self._begun += 1
        # One thread reads ahead; others fill what it has asked for, or wait for it.
        if self._asking.acquire(blocking=number >= self._asked):
            try:
                self._read_ahead(number)
            finally:
                self._asking.release()
        plan, first, past, memory = self._windows[number]
        done = fill(self._placed[memory], plan.rows(first, past))
        with self._lock:
            self.filled_bytes += done
        return done

    def _read_ahead(self, number: int) -> None:
        """Ask the kernel for a window's files, and for some of the following windows."""
        wanted = min(number + AHEAD, max(number + 1, self._asked) + READ_AT_ONCE)
        with suppress(MemoryError):  # a hint: the windows are filled without it
            for plan, first, past, memory in self._windows[self._asked : wanted]:
                placed = self._placed[memory]
                if not placed.chain.is_packed:
                    files = [image.pages_fileno() for image in placed.images]
                    rows = plan.rows(first, past)
                    if not read_ahead(rows, placed.chain.runs, placed.length, files):
                        break
                self._asked += 1

    # Recording

    def recording(self, handler: Handler, until: Until) -> Recording:
        """Return a recording of the faults of what is restored."""
        watched = [
            Watched(0, each.region.start, each.length, tuple(places))
            for each, places in zip(self._placed, self._parts, strict=True)
        ]
        return Recording(handler.take_faults, watched, until)

    def untold(self) -> list[Run]:
        """Return the pages of the image that were filled first."""
        found: list[Run] = []
        if self._known is None or self._known.problem:
            return found
        for places in self._parts:
            for _, begin, end in parts(self._known.often(), places):
                for place in places:
                    first = max(begin, place.at)
                    past = min(end, place.at + place.length)
                    if first < past:
                        offset = place.offset + first - place.at
                        found.append((offset // PAGE_SIZE, (past - first) // PAGE_SIZE))
        return found
