"""Warn before a fork whose child would read zeros from missing pages (layer L4).

Without Feature.EVENT_FORK the child's copy of a served range is not registered, so its missing
pages read as zeros. In shared memory the zeros then fill the parent's page too. Of writes to
protected memory `_fork_writes` warns.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from typing import TYPE_CHECKING

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd._closing import alive
from pyuffd._errors import UffdError
from pyuffd._fork_writes import is_of_subprocess
from pyuffd._residency import PageResidency, residency
from pyuffd.handlers._types import PageState, SourceKind

if TYPE_CHECKING:
    from pyuffd.handlers._base import HandlerBase
    from pyuffd.handlers._serving import Served

CALLER = 2  # os.fork() has no frame: the first is the hook's, the second its caller's
LOSES_CONTENT = RegisterMode.MISSING
MISSED = {PageState.ABSENT, PageState.IN_FLIGHT}


class ForkWatch:
    """Looks for ranges of one handler that a fork would lose, and notes whether it has warned."""

    def __init__(self, handler: HandlerBase) -> None:
        self._handler = weakref.ref(handler)
        self.warned = False
        self._left_out: set[int] = set()  # ranges that forks do not have (MADV_DONTFORK)
        self.pid = os.getpid()
        _watches.add(self)

    def lacking(self) -> Served | None:
        """Return a range from which a fork would read zeros, or None.

        This acquires no lock, since a thread that holds the handler's lock may wait for this fork.
        """
        handler = self._handler()
        if handler is None or handler._engine is None:
            return None
        for served in list(handler._served.values()):
            if self._is_lost(handler, served):
                return served
        return None

    def _is_lost(self, handler: HandlerBase, served: Served) -> bool:
        if (
            served.kind in (SourceKind.ZERO, SourceKind.NONE)
            or not served.mode & LOSES_CONTENT
            or served.uffd.features & Feature.EVENT_FORK
            or served.uffd.owner_pid != self.pid
            or served.id.number in self._left_out
            or not _has_holes(handler, served)
        ):
            return False
        # Last because it is slow: afterwards either the user has been warned or the range is noted.
        for start, length in served.spans():
            facts = _memory.look_at(self.pid, start, length, all_facts=True)
            if facts & _memory.Maps.NOT_FORKED:
                self._left_out.add(served.id.number)
                return False
        return True


def _has_holes(handler: HandlerBase, served: Served) -> bool:
    """Return whether pages are missing, judged by the page table and the page cache."""
    return any(_part_has_holes(handler, served, begin, end) for begin, end in served.parts)


def _part_has_holes(handler: HandlerBase, served: Served, begin: int, end: int) -> bool:
    fd, size = getattr(served.region, "fd", None), served.page_size
    where = residency(served.id.start + begin, end - begin, page_size=size, fd=fd)
    unsure = where.count(PageResidency.UNKNOWN)
    if not where.count(PageResidency.HOLE) and not unsure:
        return False
    engine = handler._engine
    if engine is None or engine.is_remote:
        # Do not ask the helper process: it may wait for what this thread does next.
        return where.count(PageResidency.HOLE) > 0
    # A page that the owner dropped reads as zeros anyway.
    states = engine.states(served.id, begin // size, len(where))
    holes = (PageResidency.HOLE, PageResidency.UNKNOWN)
    return any(
        state in MISSED and page in holes for state, page in zip(states, where.states, strict=True)
    )


def _before_fork() -> None:
    if is_of_subprocess(sys._getframe(1).f_globals):
        return
    for watch in alive(_watches):
        if watch.warned or watch.pid != os.getpid():
            continue
        try:
            served = watch.lacking()
        except (UffdError, OSError, ValueError):  # unmapped, stopped, or no permission to look
            continue
        if served is None:
            continue
        watch.warned = True
        warnings.warn(
            f"this process forks while pages of [{served.id.start:#x}, +{served.id.length:#x}) are"
            " missing, and the child reads zeros there: populate() the region before the fork, open"
            " the userfaultfd with Feature.EVENT_FORK, or madvise(MADV_DONTFORK) the region",
            RuntimeWarning,
            stacklevel=CALLER,
        )


_watches: weakref.WeakSet[ForkWatch] = weakref.WeakSet()

os.register_at_fork(before=_before_fork)
