"""The working set of a restore: filling it first, its file read ahead, and recording another."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from pyuffd._arguments import shown
from pyuffd._pages import PAGE_SIZE
from pyuffd._recording import Recording, Until, Watched
from pyuffd._working_set import Run, WorkingSet, parts
from pyuffd.handlers import Handler
from pyuffd.snapshot import _working_sets
from pyuffd.snapshot._content import PIECE, Placed
from pyuffd.snapshot._reading import Image

# Pages whose file is read ahead of the filling: enough requests for a disk to have many at once.
AHEAD = 32 * PIECE
# Faults that may come between two looks of the recording; a fault needs microseconds.
LOGGED_FAULTS = 1 << 16
# A range of the snapshot's addresses: start and end.
Range = tuple[int, int]
# Makes calls that fill ranges, and return the bytes filled.
Fill = Callable[[Sequence[Range]], Iterator[Callable[[], int]]]


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
        self._parts = _working_sets.places(
            image, [(each.start, each.length, each.page_size) for each in placed]
        )
        self._known = known
        self.filled_bytes = 0
        self._lock = threading.Lock()

    def ranges(self) -> Iterator[Range]:
        """Yield what is filled first, in order."""
        if self._known is None or self._known.problem:
            return
        # Memory may have the same part of the image twice: each by itself.
        for number, places in enumerate(self._parts):
            start = self._placed[number].start
            for _, begin, end in parts(self._known.often(), places):
                yield start + begin, start + end

    def jobs(self, fill: Fill) -> Iterator[Callable[[], int]]:
        """Yield calls that fill it, some of it each; `fill` makes calls for ranges."""
        windows = list(_windows(self.ranges()))
        ahead = AHEAD // PIECE
        for number, window in enumerate(windows):
            late = windows[: ahead + 1] if not number else windows[number + ahead :][:1]
            yield partial(self._fill, fill, window, late)

    def _fill(self, fill: Fill, window: Sequence[Range], late: Sequence[Sequence[Range]]) -> int:
        self._read_ahead(late)
        done = sum(call() for call in fill(window))
        with self._lock:
            self.filled_bytes += done
        return done

    def _read_ahead(self, windows: Sequence[Sequence[Range]]) -> None:
        """Ask the kernel to read the files; a hint, which may fail."""
        for window in windows:
            for start, end in window:
                for placed in self._placed:
                    if placed.start < end and start < placed.end:
                        _will_need(placed, max(start, placed.start), min(end, placed.end))

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


def _windows(ranges: Iterator[Range]) -> Iterator[list[Range]]:
    window: list[Range] = []
    size = 0
    for start, end in ranges:
        window.append((start, end))
        size += end - start
        if size >= PIECE:
            yield window
            window, size = [], 0
    if window:
        yield window


def _will_need(placed: Placed, start: int, end: int) -> None:
    for number, offset, length in placed.files_in(start - placed.start, end - placed.start):
        with suppress(OSError):
            os.posix_fadvise(
                placed.images[number].pages_fileno(), offset, length, os.POSIX_FADV_WILLNEED
            )
