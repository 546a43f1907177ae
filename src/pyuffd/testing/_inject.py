"""Fault injection: sources that misbehave, layout changes held open, killed processes."""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pyuffd._abi import Feature
from pyuffd._closing import SoleOwner
from pyuffd._errors import PartialResolveError, UffdOSError
from pyuffd._events import Remove
from pyuffd._pages import PAGE_SIZE
from pyuffd._uffd import Event
from pyuffd.regions import Region
from pyuffd.sources import PageSource, Promised

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyuffd._uffd import Userfaultfd

WAIT_S = 10.0  # reached only if there is a bug: what we wait for happens at once
POLL_S = 0.001


class _Wrapped:
    # A source with the content of another one. `at`: the offsets to affect; None means all.
    def __init__(self, source: PageSource, at: Iterable[int] | None) -> None:
        self.source = source
        self.at: frozenset[int] | None = None if at is None else frozenset(at)

    @property
    def length(self) -> int | None:
        """The length of the other source in bytes."""
        return self.source.length

    def _is_hit(self, offset: int, length: int) -> bool:
        return self.at is None or any(offset <= at < offset + length for at in self.at)


class DelayedSource(_Wrapped):
    """Another source's pages, late.

    Args:
        source: Where the content comes from.
        delay_s: How late.
        at: Only reads that contain one of these offsets; all by default.

    Example:
        >>> from pyuffd import ZeroSource
        >>> from pyuffd.testing import DelayedSource
        >>> len(DelayedSource(ZeroSource(), delay_s=0.01).read(0, 4096))
        4096
    """

    def __init__(
        self, source: PageSource, delay_s: float, *, at: Iterable[int] | None = None
    ) -> None:
        if not delay_s >= 0:
            raise ValueError(f"delay_s {delay_s} is negative")
        super().__init__(source, at)
        self.delay_s = delay_s

    def read(self, offset: int, length: int) -> Buffer | Promised:
        """Sleep, then read from the source."""
        if self._is_hit(offset, length):
            time.sleep(self.delay_s)
        return self.source.read(offset, length)


class FailingSource(_Wrapped):
    """Another source's pages, or an exception.

    Args:
        source: Where the content comes from.
        error: What is raised.
        at: Only by reads that contain one of these offsets; all by default.
        times: By how many reads at most; None: by every one. Each process that reads the source,
            such as a helper process, counts separately.
    """

    def __init__(
        self,
        source: PageSource,
        error: Exception,
        *,
        at: Iterable[int] | None = None,
        times: int | None = None,
    ) -> None:
        super().__init__(source, at)
        self.error = error
        self.times = times

    def read(self, offset: int, length: int) -> Buffer | Promised:
        """Raise the error, or read from the source."""
        if self._is_hit(offset, length) and self.times != 0:
            if self.times is not None:
                self.times -= 1
            raise self.error
        return self.source.read(offset, length)


class WrongLengthSource(_Wrapped):
    """Another source's pages, some bytes too short or too long.

    Args:
        source: Where the content comes from.
        extra: How many bytes too many; negative for too few.
        at: Only reads that contain one of these offsets; all by default.
    """

    def __init__(self, source: PageSource, extra: int, *, at: Iterable[int] | None = None) -> None:
        super().__init__(source, at)
        self.extra = extra

    def read(self, offset: int, length: int) -> Buffer | Promised:
        """Return more or fewer bytes than requested."""
        found = self.source.read(offset, length)
        if isinstance(found, Promised) or not self._is_hit(offset, length):
            return found
        data = bytes(found)
        return data[: max(0, length + self.extra)].ljust(max(0, length + self.extra), b"\xa5")


class GatedSource(SoleOwner, _Wrapped):
    """Another source's pages; each read waits at a gate until the test opens it.

    For sources that are read in this process: a gate cannot be sent to another process.

    Args:
        source: Where the content comes from.
        at: Only reads that contain one of these offsets; all by default.

    Example:
        >>> import threading
        >>> from pyuffd import ZeroSource
        >>> from pyuffd.testing import GatedSource
        >>> source = GatedSource(ZeroSource())
        >>> reader = threading.Thread(target=source.read, args=(0, 4096))
        >>> reader.start()
        >>> source.wait_for_reads(1)
        [0]
        >>> source.open()
        >>> reader.join()
    """

    _instead = "its gate is in this process; if another process reads it, use a DelayedSource"

    def __init__(self, source: PageSource, *, at: Iterable[int] | None = None) -> None:
        super().__init__(source, at)
        self._changed = threading.Condition()
        self._held: list[int] = []
        self._is_open = False

    def read(self, offset: int, length: int) -> Buffer | Promised:
        """Wait for the gate, then read from the source."""
        if self._is_hit(offset, length):
            with self._changed:
                self._held.append(offset)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_open)
                self._held.remove(offset)
        return self.source.read(offset, length)

    def wait_for_reads(self, count: int, *, timeout_s: float = WAIT_S) -> list[int]:
        """Wait until `count` reads are at the gate; return their offsets in order of arrival.

        Raises:
            TimeoutError: fewer arrived in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._held) >= count, timeout_s):
                raise TimeoutError(f"{len(self._held)} of {count} reads within {timeout_s} s")
            return list(self._held)

    def open(self) -> None:
        """Let every read continue, now and later."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()


class PendingChange(SoleOwner):
    """A madvise(2) that waits for its Remove event to be read; see `layout_change_pending`.

    Attributes:
        start: First address removed.
        end: The address after the last.
    """

    _instead = "its thread changes the layout once"

    def __init__(self, uffd: Userfaultfd, start: int, end: int, thread: threading.Thread) -> None:
        self._uffd = uffd
        self._thread = thread
        self.start = start
        self.end = end

    def release(self) -> list[Event]:
        """Read the Remove event, and let the thread finish.

        Returns:
            All events that were read, including the Remove event; none if other code read them.

        Raises:
            TimeoutError: the thread does not finish.
        """
        events: list[Event] = []
        deadline = time.monotonic() + WAIT_S
        poll = select.poll()
        poll.register(self._uffd, select.POLLIN)
        while self._thread.is_alive():
            if poll.poll(POLL_S * 1000):
                events += self._uffd.read_events()
            self._thread.join(POLL_S)
            if time.monotonic() > deadline:
                raise TimeoutError(f"madvise has not returned within {WAIT_S} s")
        return events


@contextmanager
def layout_change_pending(
    uffd: Userfaultfd,
    region: Region,
    *,
    advice: int = mmap.MADV_DONTNEED,
    offset: int = 0,
    length: int | None = None,
) -> Iterator[PendingChange]:
    """Hold a layout change open: in the body, ioctls that fill or protect fail with EAGAIN.

    A thread drops pages of the region, and the kernel makes it wait until its Remove event is
    read. The content of the pages is lost. The end of the body, or `release()`, reads the event.
    Page faults that were read along with it are returned by the next read_events().

    Args:
        uffd: A userfaultfd of this process, with Feature.EVENT_REMOVE and no handler.
        region: Registered with it.
        advice: MADV_DONTNEED, MADV_REMOVE or MADV_FREE.
        offset: First page to drop.
        length: Bytes to drop; one page by default.

    Raises:
        ValueError: no Feature.EVENT_REMOVE.
        TimeoutError: the change did not begin (is the region registered?), or did not end.

    Kernel: madvise(2), userfaultfd(2).  GIL: released while waiting.

    Example:
        >>> from pyuffd import Feature, PartialResolveError, Region, Userfaultfd
        >>> from pyuffd.testing import layout_change_pending
        >>> features = Feature.EVENT_REMOVE
        >>> with Userfaultfd(features=features) as uffd, Region.anonymous(8192) as region:
        ...     _ = uffd.register(region)
        ...     with layout_change_pending(uffd, region):
        ...         try:
        ...             uffd.zeropage(region)
        ...         except PartialResolveError as error:
        ...             print(error.completed)
        0
    """
    if not uffd.features & Feature.EVENT_REMOVE:
        raise ValueError(f"{uffd!r} has no Feature.EVENT_REMOVE: madvise would not wait")
    length = region.page_size if length is None else length
    failed: list[BaseException] = []

    def change() -> None:
        try:
            region.madvise(advice, offset, length)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=change, name="uffd-change", daemon=True)
    thread.start()
    deadline = time.monotonic() + WAIT_S
    while not layout_is_changing(uffd):
        if not thread.is_alive() or time.monotonic() > deadline:
            if failed:
                raise failed[0]
            raise TimeoutError(f"madvise does not wait: is {region!r} registered with {uffd!r}?")
        time.sleep(POLL_S)
    start = region.start + offset
    pending = PendingChange(uffd, start, start + length, thread)
    try:
        yield pending
    finally:
        own = Remove(pending.start, pending.end)
        uffd._claims.unread.extend(event for event in pending.release() if event != own)


def layout_is_changing(uffd: Userfaultfd) -> bool:
    """Return whether a layout event is unread, so that filling would fail with EAGAIN.

    It tries to copy to address 0, which always fails and so changes nothing.
    """
    try:
        uffd.copy(0, bytes(PAGE_SIZE))
    except PartialResolveError:
        return True
    except UffdOSError:
        return False
    raise AssertionError("UFFDIO_COPY to address 0 succeeded")


def kill(
    process: int | subprocess.Popen[Any], *, number: int = signal.SIGKILL, timeout_s: float = WAIT_S
) -> None:
    """Send a signal to a process and wait until it has ended; its parent must still reap it.

    To test what happens when helper processes die, call it for each of `child_pids()`.

    Args:
        process: A process id, or a Popen.
        number: The signal.
        timeout_s: How long it may need to end.

    Raises:
        ProcessLookupError: there is no such process.
        TimeoutError: it has not ended in time.
    """
    pid = process if isinstance(process, int) else process.pid
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, number)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise TimeoutError(f"process {pid} has not ended within {timeout_s} s")
    finally:
        os.close(pidfd)
