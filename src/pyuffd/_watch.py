"""Tell the watching thread which userfaultfds have no running handler (layer L2).

The thread reports on stderr threads that wait although no code reads the userfaultfd. It runs in C
(csrc/watch/watch.c), since the waiting thread may hold the GIL. It exists only while a userfaultfd
has registered ranges and no running handler.
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
    """Return the descriptor of stderr, or -1 if this program has none."""
    with suppress(AttributeError, OSError, ValueError):
        if sys.__stderr__ is not None and sys.__stderr__.fileno() == STDERR:
            return STDERR
    return -1


class Watch:
    """Has one userfaultfd watched while it has registered ranges and no running handler."""

    def __init__(self) -> None:
        self.is_answered = False  # by a running handler
        self._sent_to = 0
        self._fd = -1  # the descriptor while it is watched

    def note_sent(self, pid: int) -> None:
        """Note that another process was sent the descriptor and may read the events."""
        # For a socket pair the kernel knows only the process that made it.
        self._sent_to = pid if pid not in (0, os.getpid()) else SOME_PROCESS

    def update(self, uffd: Userfaultfd) -> None:
        """Begin or end watching, depending on the present state."""
        pid = uffd.owner_pid
        if self.is_answered or pid is None or not uffd._registered or not is_wanted():
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
        """End watching; call it before the descriptor is closed."""
        if self._fd >= 0:
            lowlevel.watch_end(self._fd)
            self._fd = -1


def is_wanted() -> bool:
    return os.environ.get("PYUFFD_WATCH") != "0"


if sys.version_info >= (3, 12):  # warns of a fork in a process with threads
    os.register_at_fork(before=lowlevel.watch_pause, after_in_parent=lowlevel.watch_resume)
