"""Events of a userfaultfd for asyncio (layer L2); imported when `Userfaultfd.events` is called."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar

from pyuffd._closing import SoleOwner
from pyuffd._event_claims import EventClaims
from pyuffd._events import Pagefault
from pyuffd._latch import Latch

READ_BATCH = 64  # messages for each read_events()

# How long close() in another thread waits until the loop has removed the descriptor. A loop that is
# not blocked does so in its next iteration.
LET_GO_S = 5.0


Event = TypeVar("Event")


class Readable(Protocol[Event]):
    """A `Userfaultfd`, as far as it is needed here."""

    _claims: EventClaims[Self, Event]

    @property
    def closed(self) -> bool: ...
    def fileno(self) -> int: ...
    def read_events(self, max_events: int) -> list[Event]: ...
    def _on_close(self, callback: Callable[[], None]) -> None: ...
    def _forget_on_close(self, callback: Callable[[], None]) -> None: ...


class EventIterator(SoleOwner, Generic[Event]):
    """Iterates over the events of one userfaultfd; made by `Userfaultfd.events`."""

    _instead = "Userfaultfd.events() makes another"

    def __init__(self, uffd: Readable[Event]) -> None:
        if os.get_blocking(uffd.fileno()):
            raise ValueError(f"{uffd!r} is blocking: the kernel cannot poll it")
        self._uffd = uffd

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if not self._uffd.closed:
            self._uffd._claims.check(self._uffd)
        unread = self._uffd._claims.unread
        while not unread:
            # Await even if more is queued in the kernel, so that other tasks get their turn.
            if not await self._readable():
                raise StopAsyncIteration
            # No await from reading to the end of __anext__: a cancelled task has either returned an
            # event or left it for the next reader.
            self._read()
        return unread.popleft()

    def _read(self) -> None:
        events: list[Event] = []
        try:
            # A short batch has emptied the queue. Reading until the queue is empty would never end
            # while a thread changes the layout in a loop.
            while len(batch := self._uffd.read_events(READ_BATCH)) == READ_BATCH:
                events += batch
            events += batch
        finally:
            self._uffd._claims.unread.extend(
                sorted(events, key=lambda it: isinstance(it, Pagefault))
            )

    async def _readable(self) -> bool:
        """Return True when an event can be read, False when the userfaultfd is closed."""
        uffd = self._uffd
        if uffd.closed:
            return False
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[bool] = loop.create_future()
        fd = uffd.fileno()
        waiter = _Waiter(uffd, loop, ready)
        uffd._claims.await_by(uffd, waiter)
        try:
            uffd._on_close(waiter.closing)
            # The loop keeps the future, and with it the task; the userfaultfd keeps neither.
            loop.add_reader(fd, waiter.wake, True, ready)
            return await ready
        finally:
            uffd._claims.awaited(waiter)
            waiter.forget()


class _Waiter(Generic[Event]):
    """A task that waits in a loop; the userfaultfd keeps neither of them alive.

    The loop may be closed, or dropped, without the task: that one never continues then.
    """

    def __init__(
        self,
        uffd: Readable[Event],
        loop: asyncio.AbstractEventLoop,
        ready: asyncio.Future[bool],
    ) -> None:
        self._uffd = uffd
        self._fd = uffd.fileno()
        self._loop = weakref.ref(loop)
        self._ready = weakref.ref(ready)
        self._home = threading.get_ident()
        task = asyncio.current_task()
        self._name = "a task" if task is None else f"the task {task.get_name()!r}"

    def __repr__(self) -> str:
        loop = self._loop()
        if self.is_over() or loop is None:
            return f"{self._name} of a loop that is closed"
        return f"{self._name} of {loop!r}"

    def is_over(self) -> bool:
        loop = self._loop()
        return loop is None or loop.is_closed() or self._ready() is None

    def forget(self) -> None:
        self._uffd._forget_on_close(self.closing)
        loop = self._loop()
        if loop is not None and not loop.is_closed() and not self._uffd.closed:
            loop.remove_reader(self._fd)

    def wake(self, is_open: bool, ready: asyncio.Future[bool] | None) -> None:
        loop = self._loop()
        if loop is not None:
            loop.remove_reader(self._fd)
        if ready is not None and not ready.done():
            ready.set_result(is_open)

    def closing(self) -> None:
        # The loop must remove the descriptor before it is closed: epoll continues to report one of
        # which another process has a copy.
        loop = self._loop()
        if loop is None or loop.is_closed():
            return
        if threading.get_ident() == self._home or not loop.is_running():
            self.wake(False, self._ready())
            return
        gone = Latch()

        def let_go() -> None:
            self.wake(False, self._ready())
            gone.set()

        loop.call_soon_threadsafe(let_go)
        gone.wait(LET_GO_S)
