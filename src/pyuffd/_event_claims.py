"""The one reader of a userfaultfd's events: two would each miss events (layer L2)."""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from pyuffd import lowlevel
from pyuffd._abi import RegisterMode
from pyuffd._errors import EventsBusyError
from pyuffd._events import Pagefault
from pyuffd._fork_lock import ForkLock
from pyuffd._pages import PAGE_SIZE, round_down

_claiming = ForkLock()  # for the change from no owner to one


class Claimed(Protocol):
    """A userfaultfd whose events are read."""

    def fileno(self) -> int:
        """Return its descriptor."""


# A userfaultfd, and its events: a Fork event has another userfaultfd, which only that layer knows.
Uffd = TypeVar("Uffd", bound=Claimed)
UffdIn = TypeVar("UffdIn", bound=Claimed, contravariant=True)
Event = TypeVar("Event")


class Owner(Protocol[UffdIn]):
    """The object that resolves a userfaultfd's faults, and learns of calls by other code."""

    def _registers(self, uffd: UffdIn, start: int, length: int) -> None:
        """Learn of a range that is about to be registered."""

    def _unregistered(self, uffd: UffdIn, start: int, length: int) -> None:
        """Learn of a range that was unregistered."""

    def _served_mode(self, uffd: UffdIn, start: int, length: int) -> RegisterMode | None:
        """Return the modes in which memory of the range is served, or None."""


class Waiter(Protocol):
    """A task that waits for events; its repr names it."""

    def is_over(self) -> bool:
        """Whether it can never continue, since its loop is closed or gone."""

    def forget(self) -> None:
        """Undo what it has left with the userfaultfd and the loop."""


class EventClaims(Generic[Uffd, Event]):
    """The owner of one userfaultfd's events, and the events that were read but not delivered."""

    def __init__(self) -> None:
        self.unread: deque[Event] = deque()  # read for events(), and not delivered
        self._waiter: Waiter | None = None
        self._owner: weakref.ref[Owner[Uffd]] | None = None

    def claim(self, uffd: Uffd, owner: Owner[Uffd]) -> None:
        """Let only `owner` read events until it is gone or calls `release`.

        For page faults that were read but not delivered, the threads are woken, so that they fault
        again. Layout events stay here for the next reader after `owner`: they are already complete.

        Raises:
            ValueError: they belong to another owner.
            EventsBusyError: a task waits for them.
        """
        mine = weakref.ref(owner)
        with _claiming.now:
            while True:
                seen, other = self._owner, self.owner
                if other is not None and other is not owner:
                    raise ValueError(
                        f"{uffd!r} has a handler already, which must be closed first: {other!r}"
                    )
                if (waiter := self._waiter) is not None and not waiter.is_over():
                    raise EventsBusyError(
                        f"{waiter!r} waits for the events of {uffd!r}: cancel it before making a"
                        " Handler"
                    )
                # A signal handler of this thread may claim them too, but not in between.
                if self._owner is seen:
                    self._owner = mine
                    break
        for event in [event for event in self.unread.copy() if isinstance(event, Pagefault)]:
            lowlevel.wake(uffd.fileno(), round_down(event.address, PAGE_SIZE), PAGE_SIZE)
            self.unread.remove(event)

    def await_by(self, uffd: Uffd, waiter: Waiter) -> None:
        """Note the one task that waits for events, until `awaited`.

        Raises:
            EventsBusyError: another one waits.
        """
        with _claiming.now:
            other = self._waiter
            if other is not None and not other.is_over():
                raise EventsBusyError(
                    f"another task waits for the events of {uffd!r}: {other!r}; cancel it, or"
                    " close its loop"
                )
            self._waiter = waiter
        if other is not None:
            other.forget()

    def awaited(self, waiter: Waiter) -> None:
        """Note that a task waits no longer; another one may have followed it."""
        with _claiming.now:
            if self._waiter is waiter:
                self._waiter = None

    def take_unread(self, limit: int) -> list[Event]:
        """Remove and return the oldest events that were read but not delivered."""
        taken: list[Event] = []
        with suppress(IndexError):  # other threads take some too
            while len(taken) < limit:
                taken.append(self.unread.popleft())
        return taken

    @property
    def is_owned(self) -> bool:
        """Whether the events have an owner."""
        return self.owner is not None

    @property
    def owner(self) -> Owner[Uffd] | None:
        """The owner of the events, or None; it is not kept alive."""
        return self._owner() if self._owner is not None else None

    def release(self, owner: Owner[Uffd]) -> None:
        """Let others read again."""
        if self.owner is owner:
            self._owner = None

    def check(self, uffd: Uffd) -> None:
        """Raise EventsBusyError while the events have an owner."""
        owner = self.owner
        if owner is not None:
            raise EventsBusyError(
                f"{owner!r} reads the events of {uffd!r} until it stops: if other code read one,"
                " the thread of that event could wait forever"
            )
