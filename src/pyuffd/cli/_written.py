"""What a tracked process wrote, by mapping and by window of time (layer L6)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pyuffd import DirtyRound, Mapping, Mappings, PageRanges, Process


@dataclass(frozen=True, slots=True)
class Part:
    """What was written to one mapping in one round."""

    start: int
    end: int
    name: str
    written_bytes: int
    dirty_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One round.

    Attributes:
        seconds: Since tracking began.
        rate: Bytes written per second.
        written_bytes: Written in this round; a page counts once.
        dropped_bytes: Dropped in this round.
        dirty_bytes: By window in seconds: bytes of the pages written in it.
        parts: The mappings that were written, most first.
        written: The pages.
    """

    seconds: float
    rate: float
    written_bytes: int
    dropped_bytes: int
    dirty_bytes: dict[int, int]
    parts: list[Part]
    written: PageRanges


class Written:
    """The rounds of the longest window."""

    def __init__(self, target: Process, windows_s: Sequence[int]) -> None:
        self._target = target
        self._windows_s = windows_s
        self._rounds: deque[tuple[float, PageRanges]] = deque()
        self._mappings: Mappings | None = None
        self._known: list[Mapping] = []

    def add(self, round_: DirtyRound, seconds: float) -> Sample:
        """Add a round that ended at a time."""
        self._rounds.append((seconds, round_.written))
        longest = max(self._windows_s)
        while self._rounds[0][0] <= seconds - longest:
            self._rounds.popleft()
        dirty: dict[int, PageRanges] = {}
        for window in self._windows_s:
            # The newest round belongs to every window, however long an interval is.
            pages = round_.written
            for at, older in self._rounds:
                if at > seconds - window:
                    pages = pages | older
            dirty[window] = pages
        return Sample(
            seconds,
            round_.written.bytes / round_.seconds if round_.seconds else 0.0,
            round_.written.bytes,
            round_.dropped.bytes,
            {window: pages.bytes for window, pages in dirty.items()},
            self._parts(round_.written, dirty[longest]),
            round_.written,
        )

    def _parts(self, written: PageRanges, dirty: PageRanges) -> list[Part]:
        mappings = self._target.mappings()
        if mappings != self._mappings:
            self._mappings = mappings
            self._known = list(mappings)
        spans = [(item.start, item.end) for item in self._known]
        parts = [
            Part(item.start, item.end, name_of(item), now, recently)
            for item, now, recently in zip(
                self._known,
                written.bytes_in(spans),
                dirty.bytes_in(spans),
                strict=True,
            )
            if recently
        ]
        return sorted(parts, key=lambda part: (-part.written_bytes, -part.dirty_bytes, part.start))


def name_of(mapping: Mapping) -> str:
    """Return a short name: the file's, or the kind of memory."""
    if mapping.path:
        return mapping.path.rsplit("/", 1)[-1]
    return mapping.kind.value
