"""Tell the watching thread which userfaultfds have no running handler (layer L2).

The thread reports on stderr threads that wait although no code reads the userfaultfd. It runs in C
(csrc/watch/watch.c), since the waiting thread may hold the GIL. It exists only while a userfaultfd
has registered ranges and no running handler.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from pyuffd import lowlevel

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

    @property
    def is_idle(self) -> bool:
        """Whether a handler runs, and nothing is watched: there is nothing to update."""
        return self.is_answered and self._fd < 0

    def note_sent(self, pid: int) -> None:
        """Note that another process was sent the descriptor and may read the events."""
        # For a socket pair the kernel knows only the process that made it.
        self._sent_to = pid if pid not in (0, os.getpid()) else SOME_PROCESS

    def update(
        self,
        fd: int,
        span: tuple[int, int] | None,
        *,
        owner_pid: int | None,
        by_handler: bool,
        has_forks: bool,
    ) -> None:
        """Begin or end watching, depending on the present state.

        Args:
            fd: The userfaultfd.
            span: Start and end of what is registered, gaps included; None if nothing is.
            owner_pid: The process whose memory it governs; None if that is unknown.
            by_handler: A handler owns the events.
            has_forks: Feature.EVENT_FORK is on.
        """
        if self.is_answered or owner_pid is None or span is None or not is_wanted():
            self.end()
            return
        self._fd = fd
        lowlevel.watch_begin(
            fd,
            span,
            owner_pid=owner_pid if owner_pid != os.getpid() else 0,
            sent_to=self._sent_to,
            say_fd=stderr_fd(),
            by_handler=by_handler,
            has_forks=has_forks,
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
