"""The worker process, as the keeper sees it: its start, its sockets and its end (layer L4)."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from pyuffd import _limits, _memory
from pyuffd._describe import described, print_traceback
from pyuffd._limits import raise_start_error
from pyuffd._polling import Poll
from pyuffd.handlers.process import _wire
from pyuffd.handlers.process._book import Book
from pyuffd.handlers.process._calls import Answer, Message
from pyuffd.handlers.process._start import how_killed
from pyuffd.handlers.process._successor import release_holder, rescue_forks
from pyuffd.handlers.process._worker import run

# A worker process that accepts no call for so long hangs with the GIL held.
SEND_LIMIT_S = 10.0


class WorkerGone(Exception):
    """The worker process ended."""


class WorkerHandle:
    """The worker process, as the keeper sees it."""

    def __init__(self, book: Book, shared: mmap.mmap, not_theirs: list[int]) -> None:
        self._shared, _, self._keepalive = _memory.buffer_address(shared)
        with named("socketpair"):
            self.control, theirs = socket.socketpair()
            self.reports, their_reports = socket.socketpair()
        self.born_s = time.monotonic()
        self.start_s: float | None = None  # how long it needed to take over, once it has
        self.error: bytes | None = None  # the exception that it ended with
        self._oom_kills = _limits.oom_kills()
        self._killed_by = ""
        keeper = os.getpid()
        with theirs, their_reports:
            try:
                with named("fork"):
                    self.pid = os.fork()
                if self.pid == 0:
                    self._be(keeper, theirs, their_reports, book, shared, not_theirs)
                self.pidfd = -1
                with named("pidfd_open"):
                    self.pidfd = os.pidfd_open(self.pid)
            except BaseException:
                self.control.close()
                self.reports.close()
                raise
        self.control.settimeout(SEND_LIMIT_S)

    def _be(
        self,
        keeper: int,
        control: socket.socket,
        reports: socket.socket,
        book: Book,
        shared: mmap.mmap,
        not_theirs: list[int],
    ) -> NoReturn:
        """Run the worker process until it ends."""
        code = 1
        try:
            self.control.close()
            self.reports.close()
            _wire.close_all(not_theirs)
            run(keeper, control, reports, book, shared)
            code = 0
        except BaseException as error:
            try:
                _wire.send(control, Message(0, Answer.BROKEN, _wire.pickled_error(error)))
            except OSError:
                print_traceback(error)
        finally:
            with contextlib.suppress(Exception):  # the user's code may have closed them
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def send(self, message: Message, fds: list[int]) -> None:
        """Pass a message on."""
        try:
            _wire.send(self.control, message, tuple(fds))
        except (OSError, EOFError) as error:
            if isinstance(error, TimeoutError):
                self._killed_by = f"its keeper, as it accepted no call for {SEND_LIMIT_S:.0f} s"
            raise WorkerGone from error

    def kill(self, by: str) -> None:
        """Kill it; `by` tells by whom and why."""
        self._killed_by = by
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def end(self, limit_s: float) -> int:
        """Wait until it ends, kill it after the limit, and return its exit code."""
        poll = Poll()
        poll.register(self.pidfd, select.POLLIN)
        if not poll.poll(limit_s * 1000):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def rescue_forks(self) -> list[int]:
        """Return the descriptors of forks that it had read but not reported."""
        return rescue_forks(self._shared)

    def how_ended(self, exit_code: int) -> str:
        """Return in words how it ended."""
        if self.error is not None:
            return f"ended with {' '.join(described(_wire.load_error(self.error)).split())}"
        if exit_code >= 0:
            return f"ended with exit code {exit_code}"
        if self._killed_by and exit_code == -signal.SIGKILL:
            return f"was killed by {self._killed_by}"
        return how_killed(-exit_code, self._oom_kills)

    def close(self) -> None:
        """Close the connections to it, and the descriptors that the holder keeps open for it."""
        release_holder(self._shared)
        self.control.close()
        self.reports.close()
        os.close(self.pidfd)


@contextlib.contextmanager
def named(call: str, what: str = "start the worker process") -> Iterator[None]:
    """Raise an error that names the system call that fails, and the limit that it met."""
    try:
        yield
    except OSError as error:
        raise_start_error(what, error.errno or errno.EIO, call)
