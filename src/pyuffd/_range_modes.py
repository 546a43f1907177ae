"""The registered ranges of a userfaultfd and their modes (layer L1)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter

from pyuffd._abi import RegisterMode
from pyuffd._fork_lock import ForkLock

_lock = ForkLock()


def is_subset(mode: RegisterMode, of: RegisterMode) -> bool:
    return int(mode) | int(of) == int(of)


class RangeModes:
    """The ranges that one object registered, with their modes: disjoint, in address order.

    The lock keeps other threads out, but not a signal handler, nor a destructor, of its holder.
    So each change is one assignment: an exception raised there comes before or after it. It is made
    only if none has made a change since the rows were looked at. CPython runs signal handlers after
    calls and at the end of a loop's pass, so never between that comparison and the assignment.

    Threads: safe.
    """

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._changes = 0

    def __bool__(self) -> bool:
        return bool(self._rows)

    def rows(self) -> list[_Row]:
        """Return all ranges: start, end and mode of each."""
        return self._rows.copy()

    @property
    def span(self) -> tuple[int, int] | None:
        """The first start and the last end, or None without a range."""
        with _lock.now:
            while True:
                changes = self._changes
                first, last = self._rows[:1], self._rows[-1:]
                if self._changes == changes:
                    return (first[0][0], last[0][1]) if first else None

    def copy(self) -> RangeModes:
        """Return an independent copy."""
        other = RangeModes()
        other._rows = self._rows.copy()
        return other

    def overlapping(self, start: int, end: int) -> list[_Row]:
        """Return the parts of known ranges that lie in [start, end)."""
        with _lock.now:
            while True:
                changes = self._changes
                rows = self._rows[self._slice(start, end)]
                if self._changes == changes:
                    return [(max(a, start), min(b, end), mode) for a, b, mode in rows]

    def set(self, start: int, end: int, mode: RegisterMode) -> None:
        """Note `mode` for [start, end), as the kernel does: a subset of the old mode is ignored."""

        def with_mode(known: list[_Row]) -> list[_Row]:
            kept = [row for row in known if is_subset(mode, row[2])]
            rows: list[_Row] = []
            at = start
            for a, b, old in [*kept, (end, end, mode)]:
                rows += [(at, a, mode), (a, b, old)]
                at = b
            return rows

        self._replace(start, end, with_mode)

    def put(self, rows: list[_Row]) -> None:
        """Note ranges (start, end, mode) that do not overlap, for all from the first to the last.

        What was known in between is forgotten.
        """
        ordered = sorted(rows, key=_start_of)
        self._replace(ordered[0][0], ordered[-1][1], lambda known: ordered)

    def set_all(self, spans: Sequence[tuple[int, int]], mode: RegisterMode) -> None:
        """Do what `set` does for many ranges, in ascending order, that do not overlap."""

        def with_mode(known: list[_Row]) -> list[_Row]:
            rows = [(start, end, mode) for start, end in spans]
            kept = [row for row in known if is_subset(mode, row[2])]
            replaced = [row for row in known if not is_subset(mode, row[2])]
            return sorted(
                [*kept, *_without(replaced, spans), *_without(rows, [row[:2] for row in kept])],
                key=_start_of,
            )

        if spans:
            self._replace(spans[0][0], spans[-1][1], with_mode)

    def clear_all(self, spans: Sequence[tuple[int, int]]) -> None:
        """Do what `clear` does for many ranges, in ascending order, that do not overlap."""
        if spans:
            self._replace(spans[0][0], spans[-1][1], lambda known: list(_without(known, spans)))

    def clear(self, start: int, end: int) -> None:
        """Remove [start, end), cutting ranges that extend beyond it."""
        self._replace(start, end, lambda known: [])

    def _replace(self, start: int, end: int, make: Callable[[list[_Row]], list[_Row]]) -> None:
        with _lock.now:
            while True:
                changes = self._changes
                where = self._slice(start, end)
                old = self._rows[where]
                before = [(a, start, mode) for a, _, mode in old]
                behind = [(end, b, mode) for _, b, mode in old]
                rows = make([(max(a, start), min(b, end), mode) for a, b, mode in old])
                new = list(filter(_has_length, [*before, *rows, *behind]))
                if self._changes == changes:
                    self._changes, self._rows[where] = changes + 1, new
                    return

    def _slice(self, start: int, end: int) -> slice:
        first = bisect_right(self._rows, start, key=_start_of)
        last = self._rows[max(first - 1, 0) : first]
        if last and last[0][1] > start:
            first -= 1
        return slice(first, bisect_left(self._rows, end, key=_start_of))


def _without(rows: Iterable[_Row], spans: Sequence[tuple[int, int]]) -> Iterator[_Row]:
    """Yield the parts of rows that lie outside of spans; both are in ascending order."""
    first = 0
    for start, end, mode in rows:
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        at = first
        while at < len(spans) and spans[at][0] < end:
            if start < spans[at][0]:
                yield start, spans[at][0], mode
            start = spans[at][1]
            at += 1
        if start < end:
            yield start, end, mode


_Row = tuple[int, int, RegisterMode]
_start_of = itemgetter(0)


def _has_length(row: _Row) -> bool:
    return row[0] < row[1]
