"""What `Handler.checkpoint` returns: the pages that were written, packed (layer L4)."""

from __future__ import annotations

import builtins
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyuffd._arguments import checked_index
from pyuffd._describe import counted
from pyuffd.handlers._types import PageState

_RUN = struct.Struct("=QQQ")
_WORDS = 3


class StateRange(NamedTuple):
    """The bytes [start, end) of a region, in pages that had one state."""

    start: int
    end: int
    state: PageState

    def __repr__(self) -> str:
        return f"StateRange({self.start:#x}, {self.end:#x}, {self.state!r})"


class StateRanges:
    """Ranges of pages in ascending order, packed as 64-bit (start, end, state) triples.

    Iterating and indexing make one `StateRange` at a time. `numpy.asarray(ranges)` is a read-only
    array of shape (len, 3) and dtype uint64 of the same memory.
    """

    __slots__ = ("_packed",)

    def __init__(self, packed: bytes) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed) // _RUN.size

    def __getitem__(self, index: int) -> StateRange:
        index = checked_index("range", index, len(self))
        start, end, state = _RUN.unpack_from(self._packed, index * _RUN.size)
        return StateRange(start, end, PageState(state))

    def __iter__(self) -> Iterator[StateRange]:
        for start, end, state in _RUN.iter_unpack(self._packed):
            yield StateRange(start, end, PageState(state))

    def __eq__(self, other: object) -> bool:
        return self._packed == other._packed if isinstance(other, StateRanges) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._packed)

    def __repr__(self) -> str:
        return f"<StateRanges: {counted(len(self), 'range')}, {self.bytes:#x} bytes>"

    @property
    def bytes(self) -> int:
        """The sum of their sizes in bytes."""
        view = self.memoryview()
        return sum(view[1::_WORDS]) - sum(view[::_WORDS])

    def memoryview(self) -> builtins.memoryview:
        """Return the packed triples as a read-only view of 64-bit numbers (format "Q")."""
        return builtins.memoryview(self._packed).cast("Q")

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": (len(self), _WORDS),
            "typestr": "<u8",
            "data": self.memoryview(),
        }


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Which pages were written since the last checkpoint.

    Attributes:
        written: The pages that were written, or whose state was not CLEAN, SAVED or ABSENT, as
            ranges of one state each: DIRTY (written, or perhaps written, since they were protected
            last), ABSENT (written, then evicted), CLEAN or SAVED (written, then protected by
            `evict`, which may have dropped them and then they came back), REMOVED (dropped, and
            zeros, except for what `PageState` says), POISONED (without content), or IN_FLIGHT (a
            source in Python was still asked for them; they arrive protected). Offsets are those of
            the region.
        states: The state of every page as it was when it was protected, one byte each.
    """

    written: StateRanges
    states: bytes
