"""The working set of a restore: filling it first, its file read ahead, and recording another."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice, pairwise

from pyuffd._arguments import shown
from pyuffd._pages import PAGE_SIZE
from pyuffd._recording import Recording, Until, Watched
from pyuffd._working_set import Place, Run, WorkingSet, parts
from pyuffd.handlers import Handler
from pyuffd.snapshot import _working_sets
from pyuffd.snapshot._content import PIECE, Placed
from pyuffd.snapshot._reading import Image

# Windows of 1 MiB whose files are read ahead of the filling, so that a disk has many requests at
# once; and how many more each window asks for, until so many are ahead.
AHEAD = 32
READ_AT_ONCE = 4
# Faults that may come between two looks of the recording; a fault needs microseconds.
LOGGED_FAULTS = 1 << 16
# A part of a region: begin and end.
Range = tuple[int, int]
# Fills ranges of a region, and returns the bytes filled.
Fill = Callable[[Placed, list[Range]], int]


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
        self._reading = threading.Lock()
        self._source: Iterator[tuple[int, list[Range]]] = iter(())
        self._found: deque[tuple[int, list[Range]]] = deque()

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """Yield (number of a region, begin, end) of what is filled first, in order."""
        if self._known is not None and not self._known.problem:
            for places in self._in_order():
                yield from parts(self._known.often(), places)

    def _in_order(self) -> list[list[Place]]:
        """Return all places; each memory by itself if two have the same part of the image."""
        places = sorted(place for each in self._parts for place in each)
        for before, place in pairwise(places):
            if before.offset + before.length > place.offset:
                return self._parts
        return [places]

    def jobs(self, fill: Fill) -> list[Callable[[], int]]:
        """Return calls that fill it, some of it each; `fill` fills ranges of a region."""
        if self._known is None or self._known.problem:
            return []
        self._source = _windows(self.ranges())
        # Windows are found while others are filled: the program is touching pages already.
        steps = self._known.length // PIECE
        return [*[partial(self._fill, fill)] * steps, partial(self._fill_rest, fill)]

    def _fill(self, fill: Fill) -> int:
        with self._reading:
            # Its own, and some more: another thread goes on with those meanwhile.
            wanted = min(AHEAD, len(self._found) + READ_AT_ONCE)
            for each, window in islice(self._source, wanted - len(self._found)):
                _will_need(self._placed[each], window)
                self._found.append((each, window))
            if not self._found:
                return 0
            each, window = self._found.popleft()
        done = fill(self._placed[each], window)
        with self._lock:
            self.filled_bytes += done
        return done

    def _fill_rest(self, fill: Fill) -> int:
        """Fill what is left: windows end early where another region begins."""
        done = 0
        while not self._is_exhausted():
            done += self._fill(fill)
        return done

    def _is_exhausted(self) -> bool:
        with self._reading:
            if not self._found:
                self._found.extend(islice(self._source, 1))
            return not self._found

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


def _windows(ranges: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, list[Range]]]:
    """Yield (number of a region, ranges of it): up to 1 MiB that comes one after the other."""
    window: list[Range] = []
    size, last = 0, -1
    for number, begin, end in ranges:
        if window and (number != last or size >= PIECE):
            yield last, window
            window, size = [], 0
        window.append((begin, end))
        size, last = size + end - begin, number
    if window:
        yield last, window


def _will_need(placed: Placed, window: Sequence[Range]) -> None:
    """Ask the kernel to read the files; a hint, which may fail."""
    files = [image.pages_fileno() for image in placed.images]
    for begin, end in window:
        for number, offset, length in placed.files_in(begin, end):
            with suppress(OSError):
                os.posix_fadvise(files[number], offset, length, os.POSIX_FADV_WILLNEED)
