"""Work that waits for descriptors, done by a thread or by an asyncio task (layer L1).

The work is a generator. It yields what it waits for, POLLIN or POLLOUT, and continues when the
descriptor is ready; it gets a `WaitTimeoutError` when the time is over, and a `WaitEndedError` when
another thread has ended the wait. What it holds is released however it ends.
"""

from __future__ import annotations

import select
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, TypeVar

from pyuffd._arguments import check_seconds
from pyuffd._polling import Poll

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")
Steps = Generator[int, None, T]

LONGEST_POLL_MS = (1 << 31) - 1  # an int of C


class WaitTimeoutError(Exception):
    """The time to wait is over."""


class WaitEndedError(Exception):
    """Another thread has ended the wait."""


def deadline_of(timeout_s: float | None) -> float | None:
    """Return when a timeout that begins now is over, in seconds of time.monotonic()."""
    if timeout_s is None:
        return None
    return time.monotonic() + check_seconds("timeout_s", timeout_s)


def wait(fd: int, event: int, deadline: float | None, end_fd: int = -1) -> None:
    """Wait until a descriptor is ready, `end_fd` can be read, or the time is over."""
    poll = Poll()
    poll.register(fd, event)
    if end_fd >= 0:
        poll.register(end_fd, select.POLLIN)
    left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    ready = poll.poll(None if left_ms is None else min(left_ms, LONGEST_POLL_MS))
    if any(each == end_fd for each, _ in ready):
        raise WaitEndedError
    if not ready:
        raise WaitTimeoutError


def run(fd: int, steps: Steps[T], deadline: float | None, end_fd: int = -1) -> T:
    """Do the work in this thread, without the GIL while it waits."""
    error: Exception | None = None
    try:
        while True:
            event = next(steps) if error is None else steps.throw(error)
            error = None
            try:
                wait(fd, event, deadline, end_fd)
            except (WaitTimeoutError, WaitEndedError) as ended:
                error = ended
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        steps.close()


async def run_async(fd: int, steps: Steps[T], deadline: float | None, end_fd: int = -1) -> T:
    """Do the work in a task; when it is cancelled, what the work holds is released."""
    error: Exception | None = None
    try:
        while True:
            event = next(steps) if error is None else steps.throw(error)
            error = None
            try:
                await wait_async(fd, event, deadline, end_fd)
            except (WaitTimeoutError, WaitEndedError) as ended:
                error = ended
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        steps.close()


async def wait_async(fd: int, event: int, deadline: float | None, end_fd: int = -1) -> None:
    """As `wait`, in a task."""
    import asyncio

    loop = asyncio.get_running_loop()
    ready: asyncio.Future[bool] = loop.create_future()
    is_input = event == select.POLLIN

    def wake(has_ended: bool) -> None:
        if not ready.done():
            ready.set_result(has_ended)

    (loop.add_reader if is_input else loop.add_writer)(fd, wake, False)
    if end_fd >= 0:
        loop.add_reader(end_fd, wake, True)
    try:
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        # Not wait_for(): before Python 3.12 it forgets a cancellation that comes with the event.
        async with asyncio.timeout(left_s):
            has_ended = await ready
        if has_ended:
            raise WaitEndedError
    except TimeoutError:
        raise WaitTimeoutError from None
    finally:
        (loop.remove_reader if is_input else loop.remove_writer)(fd)
        if end_fd >= 0:
            loop.remove_reader(end_fd)
