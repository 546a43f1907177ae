"""What runs beside a case: a call in a thread, a monitor of messages, a forked child (layer L5)."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from pyuffd import _memory
from pyuffd._abi import PagefaultFlag
from pyuffd._closing import SoleOwner
from pyuffd._events import Pagefault
from pyuffd._memory import Interrupted
from pyuffd._uffd import Event, Userfaultfd
from pyuffd.conformance._wording import Mismatch
from pyuffd.testing._run import SCALE

T = TypeVar("T")

# Reached only by a stall: what we wait for happens within milliseconds.
WAIT_S = 8.0 * SCALE
_SYS_FORK, _SYS_WAIT4 = 57, 61
_WAIT_ALL = 0x40000000  # __WALL


class Access(SoleOwner, Generic[T]):
    """A call in a separate thread, because it may wait for a fault to be resolved.

    Attributes:
        thread_id: The thread's id, as messages with Feature.THREAD_ID give it.
        done: Whether the call has returned.
    """

    _instead = "its thread makes the call once"

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: T
        self._error: BaseException | None = None
        self._returned = os.eventfd(0, os.EFD_CLOEXEC)
        self.thread_id: int = 0
        self.done: bool = False
        self._thread = threading.Thread(target=self._run, name="uffd-access", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.thread_id = threading.get_native_id()
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        finally:
            self.done = True
            os.eventfd_write(self._returned, 1)

    def fileno(self) -> int:
        """Return a descriptor that is readable once the call has returned."""
        return self._returned

    def result(self) -> T:
        """Wait for the call; return its value or raise its exception.

        Raises:
            Mismatch: it has not returned in time.
        """
        if not select.select([self._returned], [], [], WAIT_S)[0]:
            raise Mismatch(f"the access has not completed within {WAIT_S:g} s")
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value

    def close(self) -> None:
        """Join the thread."""
        self._thread.join(WAIT_S)
        if not self._thread.is_alive() and self._returned >= 0:
            os.close(self._returned)
            self._returned = -1


def read_until(end: int, uffd: Userfaultfd) -> Event | None:
    """Read one event; return None if none is there when `end` becomes readable."""
    poll = select.poll()
    poll.register(uffd, select.POLLIN)
    poll.register(end, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if ready.get(uffd.fileno(), 0) & select.POLLIN and (events := uffd.read_events(1)):
            return events[0]
        if end in ready:
            return None


class Child(SoleOwner):
    """A forked child of this process that touches its memory on command.

    Attributes:
        pid: Its process id.
        uffd: Its own userfaultfd, from the Fork event; None if no event was sent.
    """

    _instead = "it is a child of this process"

    def __init__(
        self, pagemap: Callable[[int, int], str], agent: _memory.Agent, end: socket.socket
    ) -> None:
        self._pagemap = pagemap
        self._agent = agent
        self._end = end
        self.pid: int = agent.pid
        self.uffd: Userfaultfd | None = None
        self._is_running = True

    def read(self, start: int, length: int) -> bytes | Interrupted:
        """Read its memory, or return the signal that the read raised; waits for faults."""
        return self._agent.read(start, length)

    def write(self, start: int, data: bytes) -> Interrupted | None:
        """Write its memory, or return the signal that the write raised; waits for faults."""
        return self._agent.write(start, data)

    def syscall(self, number: int, *args: int) -> int:
        """Make a system call in it; return the result or -errno."""
        return self._agent.syscall(number, *args)

    def fork(self) -> None:
        """Make it fork a child, which ends at once.

        Raises:
            Mismatch: it cannot.
        """
        pid = self._forked()
        os.kill(pid, signal.SIGKILL)
        self._agent.syscall(_SYS_WAIT4, pid, 0, _WAIT_ALL, 0)

    def hand_on(self) -> None:
        """Make it fork a child, which takes over its work, and end it.

        Raises:
            Mismatch: it cannot.
        """
        pid = self._forked()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = pid

    def _forked(self) -> int:
        # Parent and child both return from fork and reply; the child replies 0.
        answers = [self._agent.syscall(_SYS_FORK), self._agent.next_result()]
        pid = max(answers)
        if sorted(answers) != [0, pid] or pid <= 0:
            raise Mismatch(f"fork in the child: saw {answers}, expected 0 and a process")
        return pid

    def pagemap(self, address: int) -> str:
        """Return the state of one of its pages, as `Context.pagemap` does."""
        return self._pagemap(address, self.pid)

    def close(self) -> None:
        """End it, even if it waits for a fault."""
        if self._is_running:
            self._is_running = False
            os.kill(self.pid, signal.SIGKILL)
            # After `hand_on` it is not a child of this process.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self._end.close()
            if self.uffd is not None:
                self.uffd.close()


class Monitor(SoleOwner):
    """A thread that reads every event of a userfaultfd and gives each to a function.

    Attributes:
        faults: The page faults it has seen, in order.
        events: Every other event.
    """

    _instead = "its thread reads one userfaultfd"

    def __init__(self, uffd: Userfaultfd, resolve: Callable[[Event], None]) -> None:
        self.uffd = uffd
        self._resolve = resolve
        self.faults: list[Pagefault] = []
        self.events: list[Event] = []
        self._handled = 0
        self._progress = threading.Condition()
        self._error: BaseException | None = None
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="uffd-monitor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                ready, _, _ = select.select([self.uffd.fileno(), self._stop], [], [])
                if self.uffd.fileno() in ready:
                    for event in self.uffd.read_events():
                        if isinstance(event, Pagefault):
                            self.faults.append(event)
                        else:
                            self.events.append(event)
                        self._resolve(event)
                        with self._progress:
                            self._handled += 1
                            self._progress.notify_all()
                elif ready:
                    return
        except BaseException as error:
            self._error = error

    def wait_handled(self, count: int) -> None:
        """Wait until `count` messages have been given to the function and it has returned.

        Raises:
            Mismatch: they did not arrive in time.
        """
        with self._progress:
            if not self._progress.wait_for(lambda: self._handled >= count, WAIT_S):
                raise Mismatch(f"{self._handled} messages within {WAIT_S:g} s, expected {count}")

    def count(self, flag: PagefaultFlag) -> int:
        """Return how many faults had this flag; flag 0 counts missing faults."""
        kinds = PagefaultFlag.WP | PagefaultFlag.MINOR | PagefaultFlag.RWP
        return sum(
            1 for fault in self.faults if (fault.flags & flag if flag else not fault.flags & kinds)
        )

    def stop(self) -> None:
        """End the thread once the queue is empty; raise what its function raised."""
        if self._thread.is_alive() or self._stop >= 0:
            self._end()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _end(self) -> None:
        if self._stop < 0:
            return
        os.eventfd_write(self._stop, 1)
        self._thread.join(WAIT_S)
        os.close(self._stop)
        self._stop = -1

    def close(self) -> None:
        """End the thread, even if its function failed."""
        self._end()
