"""`Userfaultfd`: its registered ranges and its events (layer L2).

Opening and closing are in `_uffd_descriptor`, filling pages in `_uffd_fill`. Nothing here resolves
faults without being called; `pyuffd.Handler` does.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pyuffd import _fork_writes, lowlevel
from pyuffd._abi import (
    EventCode,
    Feature,
    Ioctl,
    RegisterMode,
    RwprotectMode,
    WriteprotectMode,
)
from pyuffd._arguments import check_flags, check_int
from pyuffd._errors import LayoutChangedError, UffdOSError
from pyuffd._event_claims import EventClaims, Owner
from pyuffd._events import MESSAGE_SIZE, PlainEvent, fork_fd, message_code, parse_event
from pyuffd._left import check_target
from pyuffd._left import is_any as is_any_left
from pyuffd._owned import Descriptor
from pyuffd._pages import RangeLike, checked_range
from pyuffd._range_modes import is_subset
from pyuffd._uffd_fill import UffdFill
from pyuffd._watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

READ_MOST = 1 << 16  # messages at once; 2 MiB are zeroed for them
READ_BATCH = 64  # messages per read(2), 2 KiB


@dataclass(frozen=True, slots=True)
class Fork:
    """The owner forked. `uffd` governs the child's copy of the registered ranges; close it."""

    uffd: Userfaultfd


Event = PlainEvent | Fork


class Userfaultfd(UffdFill):
    """Open a userfaultfd for this process, or adopt one with `from_fd`.

    If a signal handler raises just as its `with` block ends, it stays open, and its memory
    registered, until the last reference to this object is gone.

    Args:
        features: Feature bits to enable. Every one must be supported, or nothing is opened.
        user_mode_only: Deliver faults of user code only. Works without privilege; system calls
            that touch a missing page then fail with EFAULT instead of waiting for it.
        nonblocking: Open with O_NONBLOCK. A blocking userfaultfd cannot be polled (POLLERR).

    Attributes:
        features: The enabled features.
        supported: The features that this kernel supports.
        ioctls: The ioctls of the descriptor itself.
        adopted: Whether it was received from a process, with `from_fd` or as a fork's descriptor.
            It may then govern another process's memory.
        owner_pid: The process whose memory it governs; None if that is unknown. It can be set on
            an adopted userfaultfd, for a sender that is not the owner.

    Raises:
        UnsupportedFeatureError: a feature that this kernel does not support.
        UffdPermissionError: EPERM or EACCES - the system call and the device both refused; `hint`
            names the settings that allow it. EPERM - EVENT_FORK without CAP_SYS_PTRACE.

    Kernel: userfaultfd(2), UFFDIO_API(2const). One descriptor can do one handshake, so a first
        descriptor asks what is supported and is closed; a second one enables `features`.
    GIL: released in every call.  Threads: safe, apart from close().  Blocks: see each method.

    Example:
        >>> from pyuffd import Feature, Userfaultfd
        >>> with Userfaultfd(features=Feature.THREAD_ID) as uffd:
        ...     uffd.features == Feature.THREAD_ID
        True
    """

    def _begin(self) -> None:
        """Make what needs the open descriptor."""
        self._claims = EventClaims[Userfaultfd, Event]()
        self._watch = Watch()

    def _let_go(self) -> None:
        """Stop watching, and discard the events that were read but not delivered."""
        unread = self._claims.unread
        while unread:
            event = unread.popleft()
            if isinstance(event, Fork):
                event.uffd.close()
        if self._pid == os.getpid():
            self._watch.end()

    # Ranges

    def register(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: RegisterMode = RegisterMode.MISSING,
    ) -> Ioctl:
        """Register a range and return the ioctls that it supports.

        Registering again with other modes replaces the modes; a subset of the current modes changes
        nothing. If a range would lose WP it is unprotected first: on hugetlb memory a write to a
        page left protected never returns (measured on Linux 6.18). This covers ranges that this
        object registered. Ranges that the sender of an adopted descriptor registered you must
        unprotect yourself.

        Args:
            range_or_start: A range object, or the address, aligned to the page size.
            length: Bytes, a multiple of the page size; not with a range object.
            mode: Which faults to deliver.

        Raises:
            ValueError: a bad range, or no mode.
            UffdOSError: EINVAL - unmapped, or memory that cannot be registered in this mode.
            RangeBusyError: EBUSY - registered with another userfaultfd, or a thread that a
                handler left behind may still write to the range (see `Handler.stop`).

        Kernel: UFFDIO_REGISTER(2const).
        GIL: released.  Threads: safe.  Blocks: no; while a handler of the process driver has the
            userfaultfd, until its worker process has answered.
        """
        start, length = checked_range(range_or_start, length)
        check_flags("mode", mode, RegisterMode)
        if not mode:
            raise ValueError("register needs at least one mode")
        fd = self.fileno()
        self._before_register(start, length, mode)
        return self._register_by(
            start, length, mode, lambda: lowlevel.register(fd, start, length, mode)
        )

    def _register_by(
        self, start: int, length: int, mode: RegisterMode, call: Callable[[], int]
    ) -> Ioctl:
        """Register a range by a call that returns its ioctls, and note it."""
        fd = self.fileno()
        check_target(start, length, self._memory_key)
        protects = bool(int(mode) & RegisterMode.WP.value)
        if not protects:
            for first, end, old in self._registered.overlapping(start, start + length):
                if old & RegisterMode.WP and not is_subset(mode, old):
                    # ENOENT: the registered memory has been unmapped since.
                    with suppress(LayoutChangedError):
                        lowlevel.writeprotect(fd, first, end - first, 0)
        try:
            ioctls = Ioctl(call())
        except UffdOSError as error:
            raise self._explained(error, start, length, mode) from None
        self._registered.set(start, start + length, mode)
        self._update_watch()
        if protects:
            _fork_writes.track(self)
        return ioctls

    def _before_register(self, start: int, length: int, mode: RegisterMode) -> None:
        """Refuse a range that a handler serves, or threads left behind; tell the handler of it."""
        check_target(start, length, self._memory_key)
        owner = self._claims.owner
        if owner is None:
            return
        served = owner._served_mode(self, start, length)
        if served is not None and not is_subset(mode, served):
            raise self._served_by(owner, "register", start, length, "serve it again")
        owner._registers(self, start, length)

    def unregister(self, range_or_start: RangeLike | int, length: int | None = None) -> None:
        """Unregister a range: protection is lifted, and threads that wait continue.

        A page that is still missing reads as zeros from then on, so resolve or poison it first.

        Kernel: UFFDIO_UNREGISTER(2const), and UFFDIO_WAKE: by itself it leaves threads asleep that
        wait for a WP or MINOR fault, unless the range is registered for MISSING too (measured on
        Linux 6.18).
        GIL: released.  Threads: safe.  Blocks: no; while a handler of the process driver has the
            userfaultfd, until its worker process has answered.
        """
        start, length = checked_range(range_or_start, length)
        fd = self.fileno()
        self._refuse_served("unregister", start, length, "use handler.unserve()")
        try:
            lowlevel.unregister(fd, start, length)
        except UffdOSError as error:
            raise self._explained(error, start, length) from None
        # Linux wakes only those that wait for a missing page.
        with suppress(UffdOSError):
            lowlevel.wake(fd, start, length)
        self._note_unregistered(start, length)
        owner = self._claims.owner
        if owner is not None:
            owner._unregistered(self, start, length)

    def _refuse_served(self, what: str, start: int, length: int, instead: str) -> None:
        """Raise ValueError if a handler serves memory in the range."""
        owner = self._claims.owner
        if owner is not None and owner._served_mode(self, start, length) is not None:
            raise self._served_by(owner, what, start, length, instead)

    def _served_by(
        self, owner: Owner[Userfaultfd], what: str, start: int, length: int, instead: str
    ) -> ValueError:
        return ValueError(
            f"{what} [{start:#x}, +{length:#x}): {owner!r} serves memory there and would not know"
            f" of this call: {instead}"
        )

    def _registered_ranges(self) -> list[tuple[int, int]]:
        """Return start and length of each range that this object has registered."""
        return [(a, b - a) for a, b, _ in self._registered.rows()]

    def _registered_for(self, mode: RegisterMode) -> list[tuple[int, int]]:
        """Return start and end of each range that this object has registered for a mode."""
        rows = self._registered.rows()
        return [(start, end) for start, end, modes in rows if modes & mode]

    def _has_registered(self, start: int, end: int) -> bool:
        """Whether this object registered anything in [start, end)."""
        return bool(self._registered.overlapping(start, end))

    def _note_registered(self, ranges: list[tuple[int, int]], mode: RegisterMode) -> None:
        """Note ranges (start, length) that were registered by other means than `register`.

        They do not overlap, and between the first and the last no others are known.
        """
        if ranges:
            self._registered.put([(start, start + length, mode) for start, length in ranges])
            self._update_watch()

    def _note_unregistered(self, start: int, length: int) -> None:
        """Note that a range was unregistered by other means than `unregister`."""
        self._registered.clear(start, start + length)
        if not self._registered:
            self._watch.end()

    # Many ranges, which a C function registers and unregisters. They are (start, end), in ascending
    # order, and do not overlap.

    @property
    def _is_alone(self) -> bool:
        """Whether `_before_register` has nothing to look at."""
        return self._claims.owner is None and not is_any_left()

    def _note_all_protected(self, spans: Sequence[tuple[int, int]]) -> None:
        """Note ranges that were registered for WP."""
        if spans:
            self._registered.set_all(spans, RegisterMode.WP)
            self._update_watch()
            _fork_writes.track(self)

    def _note_all_unregistered(self, spans: Sequence[tuple[int, int]]) -> None:
        """Note ranges that were unregistered."""
        self._registered.clear_all(spans)
        if not self._registered:
            self._watch.end()
        owner = self._claims.owner
        if owner is not None:
            for start, end in spans:
                owner._unregistered(self, start, end - start)

    def wake(self, range_or_start: RangeLike | int, length: int | None = None) -> None:
        """Let every thread that waits in the range try its access again.

        Kernel: UFFDIO_WAKE(2const). A thread that finds its page still missing faults again.
        GIL: released.  Threads: safe.  Blocks: no.
        """
        start, length = checked_range(range_or_start, length)
        lowlevel.wake(self.fileno(), start, length)

    def writeprotect(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: WriteprotectMode = WriteprotectMode.WP,
    ) -> None:
        """Write-protect a range, or with mode 0 unprotect it and wake the threads that wait.

        Missing pages of anonymous memory are protected only with Feature.WP_UNPOPULATED. Without
        it the call succeeds, but the first write to such a page causes no write-protect fault.

        Raises:
            ValueError: a bad range, or WP together with DONTWAKE.
            LayoutChangedError: ENOENT - part of the range is not registered with RegisterMode.WP;
                the mappings before that part have been changed.
            PartialResolveError: EAGAIN - a layout event is unread.

        Kernel: UFFDIO_WRITEPROTECT(2const).
        GIL: released.  Threads: safe.  Blocks: no.
        """
        start, length = checked_range(range_or_start, length)
        check_flags("mode", mode, WriteprotectMode)
        if mode == WriteprotectMode.WP | WriteprotectMode.DONTWAKE:
            raise ValueError("DONTWAKE can only be used when removing protection, not with WP")
        fd = self.fileno()
        self._refuse_served(
            "writeprotect",
            start,
            length,
            "use handler.writeprotect(), and handler.unprotect() to lift it",
        )
        try:
            lowlevel.writeprotect(fd, start, length, mode)
        except UffdOSError as error:
            raise self._explained(error, start, length) from None

    def rwprotect(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: RwprotectMode = RwprotectMode.RWP,
    ) -> None:
        """Protect a range against reads and writes, or with mode 0 unprotect it and wake.

        Kernel: UFFDIO_RWPROTECT; needs Feature.RWP and RegisterMode.RWP; Linux 7.3.
        GIL: released.  Threads: safe.  Blocks: no.
        """
        start, length = checked_range(range_or_start, length)
        check_flags("mode", mode, RwprotectMode)
        fd = self.fileno()
        self._refuse_served("rwprotect", start, length, "handlers know no such faults")
        lowlevel.rwprotect(fd, start, length, mode)

    def set_mode(
        self,
        *,
        enable: Feature = Feature(0),  # noqa: B008
        disable: Feature = Feature(0),  # noqa: B008
    ) -> None:
        """Enable or disable features of the open descriptor; Linux allows Feature.RWP_ASYNC only.

        Kernel: UFFDIO_SET_MODE; Linux 7.3.
        GIL: released.  Threads: one at a time.  Blocks: no.
        """
        check_flags("enable", enable, Feature)
        check_flags("disable", disable, Feature)
        if enable & disable:
            raise ValueError(f"{Feature(enable & disable)!r} is both enabled and disabled")
        self.fileno()
        if self._claims.is_owned:
            raise ValueError(
                f"set_mode: {self._claims.owner!r} was made for the features {self.features!r}:"
                " stop it first"
            )
        lowlevel.set_mode(self.fileno(), enable, disable)
        self.features: Feature = Feature((self.features | enable) & ~int(disable))

    # Events

    def _claim_events(self, owner: Owner[Userfaultfd]) -> None:
        """Reserve the events for `owner` until it is gone or releases them; for handlers.

        Raises:
            ValueError: another owner has them.
            EventsBusyError: a task waits for them.
        """
        self._claims.claim(self, owner)
        self._update_watch()

    def _release_events(self, owner: Owner[Userfaultfd]) -> None:
        """Undo a `_claim_events`; does nothing if the events belong to another owner."""
        if self._claims.owner not in (owner, None):
            return
        self._claims.release(owner)
        self._watch.is_answered = False
        self._update_watch()

    def _note_answered(self) -> None:
        """Note that the owner of the events runs, until `_release_events`."""
        self._watch.is_answered = True
        self._watch.end()

    def _note_sent(self, pid: int) -> None:
        """Note that a process (0: unknown) was sent the descriptor and may read the events."""
        self._watch.note_sent(pid)
        self._update_watch()

    def _update_watch(self) -> None:
        if self._watch.is_idle:
            return
        if not self.closed and self._pid == os.getpid():
            self._watch.update(
                self.fileno(),
                self._registered.span,
                owner_pid=self.owner_pid,
                by_handler=self._claims.is_owned,
                has_forks=bool(self.features & Feature.EVENT_FORK),
            )

    def read_events(self, max_events: int = READ_BATCH) -> list[Event]:
        """Return the queued events, at most `max_events`, in the kernel's order.

        The kernel returns page faults before older layout events (measured). So read until the list
        is empty, and apply Remove, Unmap, Remap and Fork before resolving faults. The caller must
        close the userfaultfds of Fork events.

        Raises:
            EventsBusyError: a Handler of this userfaultfd has not stopped; it reads the events.

        Kernel: userfaultfd(2).
        GIL: released.  Threads: safe.  Blocks: never, unless opened with `nonblocking=False`.
        """
        max_events = check_int("max_events", max_events)
        if max_events < 1:
            raise ValueError(f"max_events {max_events} must be above zero")
        max_events = min(max_events, READ_MOST)
        fd = self.fileno()
        self._claims.check(self)
        if unread := self._claims.take_unread(max_events):
            return unread
        raw = lowlevel.read(fd, max_events * MESSAGE_SIZE)
        return [self._event(raw[at : at + MESSAGE_SIZE]) for at in range(0, len(raw), MESSAGE_SIZE)]

    def events(self) -> AsyncIterator[Event]:
        """Return the events for `async for`, in the running asyncio loop, until close().

        Everything queued is read at once. Layout events are delivered before the page faults read
        with them, so that events can be handled one by one. A task that is cancelled or leaves the
        `async for` loses no event: events that were read but not delivered come first from the next
        iterator and from read_events(). Other tasks get their turn between batches.

        Raises:
            ClosedError: closed already. Closing it later ends the iteration.
            ValueError: opened with `nonblocking=False`.
            EventsBusyError: (when iterated) another task waits for the events, or a Handler reads
                them.

        GIL: released while waiting.  Threads: one loop at a time.  Blocks: never; it awaits.

        Example:
            >>> import asyncio, mmap
            >>> from pyuffd import Feature, Region, Userfaultfd
            >>> async def first_event(uffd, region):
            ...     removing = asyncio.to_thread(region.madvise, mmap.MADV_DONTNEED)
            ...     task = asyncio.create_task(removing)
            ...     async for event in uffd.events():
            ...         await task
            ...         return event
            >>> features = Feature.EVENT_REMOVE
            >>> with Userfaultfd(features=features) as uffd, Region.anonymous(4096) as region:
            ...     _ = uffd.register(region)
            ...     event = asyncio.run(first_event(uffd, region))
            ...     event.start == region.start
            True
        """
        from pyuffd._async import EventIterator  # asyncio is 40 ms of import

        return EventIterator(self)

    def _event(self, raw: bytes) -> Event:
        if message_code(raw) == EventCode.FORK:
            descriptor = Descriptor()
            return descriptor.adopt(fork_fd(raw), Fork(self._forked(descriptor, fork_fd(raw))))
        return parse_event(raw)

    def _forked(self, descriptor: Descriptor, fd: int) -> Self:
        """Return a child's userfaultfd, with the features and registrations of this one."""
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        child = type(self).__new__(type(self))
        child.supported = self.supported
        child._adopt(descriptor, self.features, self.ioctls, adopted=True)
        child._registered = self._registered.copy()
        return child
