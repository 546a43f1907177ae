"""Telling the thread that looks for those who wait where nobody answers what to look at (layer L2).

The thread is C (csrc/watch/watch.c), as whoever waits may hold the GIL. It exists only while there
is a userfaultfd with something registered and no handler that runs.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from pyuffd import lowlevel
from pyuffd._abi import Feature

if TYPE_CHECKING:
    from pyuffd._uffd import Userfaultfd

STDERR = 2
SOME_PROCESS = -1


def stderr_fd() -> int:
    """Return the descriptor of stderr, or -1 where this program has none."""
    with suppress(AttributeError, OSError, ValueError):
        if sys.__stderr__ is not None and sys.__stderr__.fileno() == STDERR:
            return STDERR
    return -1


class Watch:
    """Whether one userfaultfd is looked at: while something is registered and nobody answers."""

    def __init__(self) -> None:
        self.is_answered = False  # by a handler that runs
        self._sent_to = 0
        self._fd = -1  # while it is looked at

    def note_sent(self, pid: int) -> None:
        """Be told that another process got the descriptor, which may be the one that reads it."""
        # Of a socket pair the kernel knows only who made it.
        self._sent_to = pid if pid not in (0, os.getpid()) else SOME_PROCESS

    def update(self, uffd: Userfaultfd) -> None:
        """Begin or end looking, by what is true now."""
        pid = uffd.owner_pid
        if self.is_answered or pid is None or not uffd._registered or not _is_wanted():
            self.end()
            return
        self._fd = uffd.fileno()
        lowlevel.watch_begin(
            self._fd,
            uffd._registered.span,
            owner_pid=pid if pid != os.getpid() else 0,
            sent_to=self._sent_to,
            say_fd=stderr_fd(),
            by_handler=uffd._claims.is_owned,
            has_forks=bool(uffd.features & Feature.EVENT_FORK),
        )

    def end(self) -> None:
        """Look no more; before the descriptor is closed."""
        if self._fd >= 0:
            lowlevel.watch_end(self._fd)
            self._fd = -1


def _is_wanted() -> bool:
    return os.environ.get("PYUFFD_WATCH") != "0"


if sys.version_info >= (3, 12):  # which warns of a fork of a process that has threads
    os.register_at_fork(before=lowlevel.watch_pause, after_in_parent=lowlevel.watch_resume)
