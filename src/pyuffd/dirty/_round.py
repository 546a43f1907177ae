"""`DirtyRound`: what one round of tracking found, until it is committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from pyuffd import _dirty_calls as calls
from pyuffd._closing import SoleOwner
from pyuffd.dirty._layout import LayoutChange
from pyuffd.pagemap import PageRanges


@dataclass(slots=True)
class Pending:
    """What rounds found that was not committed yet, packed."""

    written: memoryview = calls.NO_RANGES
    dropped: memoryview = calls.NO_RANGES
    unsure: memoryview = calls.NO_RANGES
    layout: tuple[LayoutChange, ...] = ()

    def plus(self, newer: Pending) -> Pending:
        """Return both together. A page dropped and written since is written."""
        written = calls.union(self.written, newer.written)
        dropped = calls.union(self.dropped, newer.dropped)
        return Pending(
            written,
            calls.subtract(dropped, written),
            calls.union(self.unsure, newer.unsure),
            self.layout + newer.layout,
        )

    def within(self, mapped: memoryview) -> Pending:
        """Return what is in mappings that still exist."""
        return Pending(
            calls.intersect(self.written, mapped),
            calls.intersect(self.dropped, mapped),
            calls.intersect(self.unsure, mapped),
            self.layout,
        )


@dataclass(eq=False)
class DirtyRound(SoleOwner):
    """What changed since the last committed round; a context manager.

    Unless `commit` is called, the next round has all of it again: leaving the `with` block by an
    exception, or without a commit, loses nothing. Apply `layout`, then `dropped`, then copy
    `written` and `unsure` from the target.

    Attributes:
        written: Pages written, a `PageRanges`. Copy their content now: it may be newer than the
            round, and later writes are in the next one.
        dropped: Pages of private memory that were given back (MADV_DONTNEED) and read as zeros.
        unsure: Pages whose state is unknown: pinned buffers, ranges that lost their
            registration. Treat them as written.
        layout: Changes of the mappings, in the order in which rounds found them.
        seconds: Time since the round before, or since tracking began.
    """

    _instead = "its tracker keeps the round until it is committed, once"

    written: PageRanges
    dropped: PageRanges
    unsure: PageRanges
    layout: tuple[LayoutChange, ...]
    seconds: float
    _commit: Callable[[DirtyRound], None] | None = field(repr=False, default=None)
    _is_committed: bool = field(repr=False, default=False)

    @property
    def committed(self) -> bool:
        """Whether `commit` was called."""
        return self._is_committed

    def commit(self) -> None:
        """Declare that everything in this round is saved: the next one has only what is new.

        Raises:
            ValueError: a later round has been collected, which has all of it again; or it was
                committed, or came from `peek`.
        """
        if self._commit is None:
            raise ValueError("a round of peek() cannot be committed: nothing was taken")
        if self._is_committed:
            raise ValueError("the round is committed already")
        self._commit(self)
        self._is_committed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


def make(
    pending: Pending, seconds: float, commit: Callable[[DirtyRound], None] | None
) -> DirtyRound:
    """Return a round of what is pending."""
    return DirtyRound(
        PageRanges(pending.written),
        PageRanges(pending.dropped),
        PageRanges(calls.subtract(pending.unsure, pending.written)),
        pending.layout,
        seconds,
        commit,
    )
