"""Threads that fault or change the layout, and the messages that userfaultfd sends for them."""

from __future__ import annotations

import os
import select
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from pyuffd import Feature, Pagefault, RegisterMode, Userfaultfd
from pyuffd._uffd import Event
from pyuffd.testing._need import kernel_features
from pyuffd.testing._run import SCALE

WAIT_S = 8.0 * SCALE

T = TypeVar("T")


class Task(Generic[T]):
    """A thread that runs one call, which may stall; waiting for its end has a limit.

    It is a daemon: after a failed test, closing the userfaultfd lets it continue.
    """

    def __init__(self, function: Callable[..., T], *args: object) -> None:
        self._result: list[T] = []
        self._error: BaseException | None = None
        self.native_id = 0
        started = threading.Event()

        def run() -> None:
            self.native_id = threading.get_native_id()
            started.set()
            try:
                self._result.append(function(*args))
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="test-task", daemon=True)
        self._thread.start()
        started.wait()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> T:
        """Wait for the call's end; return its value or raise its exception."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), f"still stalled after {WAIT_S} s"
        if self._error is not None:
            raise self._error
        return self._result[0]


def readable(uffd: Userfaultfd, timeout_s: float = 0) -> bool:
    """Return whether an event is queued within this time."""
    poll = select.poll()
    poll.register(uffd.fileno(), select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def next_events(uffd: Userfaultfd) -> list[Event]:
    """Wait for events and return all that are queued then."""
    assert readable(uffd, WAIT_S), f"no event within {WAIT_S} s"
    return uffd.read_events()


def next_fault(uffd: Userfaultfd) -> Pagefault:
    """Wait for exactly one page fault and nothing else."""
    events = next_events(uffd)
    assert len(events) == 1, events
    assert isinstance(events[0], Pagefault), events
    return events[0]


def no_events(uffd: Userfaultfd) -> bool:
    """Return whether nothing is queued; call it after joining the thread that may cause events."""
    return uffd.read_events() == []


@contextmanager
def registered(
    target: object,
    mode: RegisterMode = RegisterMode.MISSING,
    features: Feature = Feature(0),  # noqa: B008 - an immutable flag
) -> Iterator[Userfaultfd]:
    """Open a userfaultfd and register one region with it."""
    with Userfaultfd(features=features) as uffd:
        uffd.register(target, mode=mode)  # type: ignore[arg-type]
        yield uffd


def offered(features: Feature) -> Feature:
    """Return those of the given features that this kernel has."""
    return Feature(int(features) & kernel_features())


def open_files() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def wait_for_pending(uffd: Userfaultfd, count: int) -> None:
    """Wait until the kernel counts exactly this many faults that are queued and unread."""
    path = Path(f"/proc/self/fdinfo/{uffd.fileno()}")
    deadline = time.monotonic() + WAIT_S
    while (pending := int(path.read_text().split("pending:")[1].split()[0])) != count:
        assert time.monotonic() < deadline, f"{pending} faults are pending, not {count}"
        os.sched_yield()


def fork() -> int:
    """Fork without Python 3.12's warning about threads, which do no harm here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()
