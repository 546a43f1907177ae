"""The registered ranges of a userfaultfd and their modes (layer L1)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import itemgetter

from pyuffd._abi import RegisterMode


def is_subset(mode: RegisterMode, of: RegisterMode) -> bool:
    return int(mode) | int(of) == int(of)


class RangeModes:
    """The ranges that one object registered, with their modes: disjoint, in address order.

    Each change is one assignment, so an exception raised by a signal handler comes before or after
    it.
    """

    def __init__(self) -> None:
        self._rows: list[_Row] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def span(self) -> tuple[int, int]:
        """The first start and the last end; there must be a range."""
        return self._rows[0][0], self._rows[-1][1]

    def copy(self) -> RangeModes:
        """Return an independent copy."""
        other = RangeModes()
        other._rows = self._rows.copy()
        return other

    def overlapping(self, start: int, end: int) -> list[_Row]:
        """Return the parts of known ranges that lie in [start, end)."""
        rows = self._rows[self._slice(start, end)]
        return [(max(a, start), min(b, end), mode) for a, b, mode in rows]

    def set(self, start: int, end: int, mode: RegisterMode) -> None:
        """Note `mode` for [start, end), as the kernel does: a subset of the old mode is ignored."""
        kept = [row for row in self.overlapping(start, end) if is_subset(mode, row[2])]
        rows: list[_Row] = []
        at = start
        for a, b, old in [*kept, (end, end, mode)]:
            rows += [(at, a, mode), (a, b, old)]
            at = b
        self._replace(start, end, rows)

    def put(self, rows: list[_Row]) -> None:
        """Note ranges (start, end, mode) that do not overlap, for all from the first to the last.

        What was known in between is forgotten.
        """
        rows = sorted(rows, key=_start_of)
        self._replace(rows[0][0], rows[-1][1], rows)

    def clear(self, start: int, end: int) -> None:
        """Remove [start, end), cutting ranges that extend beyond it."""
        self._replace(start, end, [])

    def _replace(self, start: int, end: int, rows: list[_Row]) -> None:
        where = self._slice(start, end)
        old = self._rows[where]
        before = [(a, start, mode) for a, _, mode in old]
        behind = [(end, b, mode) for _, b, mode in old]
        self._rows[where] = [row for row in [*before, *rows, *behind] if row[0] < row[1]]

    def _slice(self, start: int, end: int) -> slice:
        first = bisect_right(self._rows, start, key=_start_of)
        if first and self._rows[first - 1][1] > start:
            first -= 1
        return slice(first, bisect_left(self._rows, end, key=_start_of))


_Row = tuple[int, int, RegisterMode]
_start_of = itemgetter(0)
