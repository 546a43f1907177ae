"""Who reads the events of a userfaultfd: one reader, or each takes the other's (layer L2)."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Protocol

from pyuffd import lowlevel
from pyuffd._abi import Event, Fork, Pagefault, RegisterMode
from pyuffd._errors import EventsBusyError
from pyuffd._pages import PAGE_SIZE, round_down

if TYPE_CHECKING:
    from pyuffd._uffd import Userfaultfd


class Owner(Protocol):
    """Whoever answers the faults of a userfaultfd, and must hear of what is done beside it."""

    def _registers(self, uffd: Userfaultfd, start: int, length: int) -> None:
        """Be told of a range that is about to be registered."""

    def _unregistered(self, uffd: Userfaultfd, start: int, length: int) -> None:
        """Be told of a range that was unregistered."""

    def _served_mode(self, uffd: Userfaultfd, start: int, length: int) -> RegisterMode | None:
        """Return the modes that memory in the range is served in, or None."""


class EventClaims:
    """The events of one userfaultfd that were read and not delivered, and whose they are."""

    def __init__(self) -> None:
        self.unread: deque[Event] = deque()  # read for events(), and not delivered
        self.is_awaited = False
        self._owner: weakref.ref[Owner] | None = None

    def claim(self, uffd: Userfaultfd, owner: Owner) -> None:
        """Keep everybody but `owner` from reading events, as long as it lives or `release`s them.

        Page faults that were read and not delivered are sent again: their threads are woken, and
        ask again. Layout events stay here for who reads after `owner`: what they told of is over.

        Raises:
            ValueError: they belong to another one.
            EventsBusyError: a task waits for them.
        """
        other = self.owner
        if other is not None and other is not owner:
            raise ValueError(f"{uffd!r} has a handler already: {other!r}")
        if self.is_awaited:
            raise EventsBusyError(
                f"a task waits for the events of {uffd!r}: cancel it before a Handler is made"
            )
        self._owner = weakref.ref(owner)
        for event in [event for event in self.unread if isinstance(event, Pagefault)]:
            lowlevel.wake(uffd.fileno(), round_down(event.address, PAGE_SIZE), PAGE_SIZE)
            self.unread.remove(event)

    @property
    def is_owned(self) -> bool:
        """Whether they are somebody's."""
        return self.owner is not None

    @property
    def owner(self) -> Owner | None:
        """Whose they are, if it lives."""
        return self._owner() if self._owner is not None else None

    def release(self, owner: Owner) -> None:
        """Let others read again."""
        if self.owner is owner:
            self._owner = None

    def check(self, uffd: Userfaultfd) -> None:
        """Raise EventsBusyError while they are somebody's."""
        owner = self.owner
        if owner is not None:
            raise EventsBusyError(
                f"{owner!r} reads the events of {uffd!r} itself, until it stops: whoever else took"
                " one would leave its thread waiting"
            )

    def drop(self) -> None:
        """Forget what was not delivered."""
        while self.unread:
            event = self.unread.popleft()
            if isinstance(event, Fork):
                event.uffd.close()
