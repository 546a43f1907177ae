"""UNIX sockets that only this user can connect to (layer L4)."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
import warnings
from contextlib import suppress
from typing import Self

from pyuffd._arguments import check_int, check_path, check_seconds, shown
from pyuffd._closing import SoleOwner
from pyuffd._errors import ClosedError, HandoverError
from pyuffd._owned import Descriptor
from pyuffd._steps import (
    Steps,
    WaitEndedError,
    WaitTimeoutError,
    deadline_of,
    run,
    run_async,
)

# A handover needs a few system calls; a peer that needs longer is stuck or hostile.
TIMEOUT_S = 10.0
PATH_LIMIT = 107  # sun_path, less its NUL
BACKLOG = 16
QUEUE_RETRY_S = 0.01  # how often connect_unix_async tries to join a full queue

_TIMEVAL = struct.Struct("=qq")


class UnixListener(SoleOwner):
    """A listening UNIX socket that only this user can connect to, made by `listen_unix`.

    Attributes:
        path: The path of its file. close() removes the file if it is still this socket's.
    """

    _instead = "any process of this user can connect with connect_unix(path)"

    def __init__(self, sock: socket.socket, path: str) -> None:
        if not isinstance(sock, socket.socket):
            raise TypeError(f"sock must be a socket, not {shown(sock)}; use listen_unix(path)")
        self._sock = sock
        self.path = path
        self._pid = os.getpid()
        self._end = Descriptor.eventfd()  # tells the threads in accept() of close()
        self._is_closed = False
        self._identity: tuple[int, int] | None = None  # of its file, once it is bound

    def _listen(self, backlog: int) -> None:
        os.fchmod(self._sock.fileno(), 0o600)
        self._sock.bind(self.path)
        self._identity = _identity(self.path)
        self._sock.listen(backlog)

    def accept(self, *, timeout_s: float | None = TIMEOUT_S) -> socket.socket:
        """Return the next connection, a blocking stream socket.

        Raises:
            HandoverError: "timeout" - no process connected in time.
            ClosedError: the listener is closed; also if another thread closes it meanwhile.

        GIL: released.  Threads: safe.  Blocks: until a process connects.
        """
        return run(self.fileno(), self._accept(), deadline_of(timeout_s), self._end_fd())

    async def accept_async(self, *, timeout_s: float | None = TIMEOUT_S) -> socket.socket:
        """Return the next connection, as `accept` does, from an asyncio task.

        The task may be cancelled; a process that connects later waits for the next call.

        Raises:
            HandoverError, ClosedError: as `accept`.
        """
        deadline = deadline_of(timeout_s)
        return await run_async(self.fileno(), self._accept(), deadline, self._end_fd())

    def _accept(self) -> Steps[socket.socket]:
        while True:
            try:
                yield select.POLLIN
            except WaitTimeoutError:
                text = f"no process connected to {self.path} in time"
                raise HandoverError("timeout", text) from None
            except WaitEndedError:
                raise ClosedError(f"the listener at {self.path} is closed") from None
            # Another process that shares the listener may be faster.
            with suppress(BlockingIOError):
                connection, _ = self._sock.accept()
                connection.setblocking(True)
                return connection

    def _end_fd(self) -> int:
        """Return what can be read once it is closed; a fork's is not that of its parent."""
        return self._end.number if self._pid == os.getpid() else -1

    def fileno(self) -> int:
        """Return the descriptor, for polling."""
        fd = self._sock.fileno()
        if fd < 0:
            raise ClosedError(f"the listener at {self.path} is closed")
        return fd

    def close(self) -> None:
        """Stop listening, end every accept(), remove the socket's file; in a fork, only close."""
        if self._is_closed:
            return
        if self._pid == os.getpid():
            os.eventfd_write(self._end.number, 1)
        self._close()

    def _close(self) -> None:
        try:
            self._unlink()
        except OSError:
            self._sock.close()
            self._is_closed = True
            raise
        self._sock.close()
        self._is_closed = True  # last: after an interruption the next close() does the rest

    def _unlink(self) -> None:
        is_open = self._sock.fileno() >= 0
        if self._identity is None and is_open and self._sock.getsockname() == self.path:
            self._identity = _identity(self.path)  # `_listen` was interrupted after bind(2)
        if (
            self._pid == os.getpid()
            and self._identity is not None
            and _identity(self.path) == self._identity
        ):
            with suppress(FileNotFoundError):
                os.unlink(self.path)

    def __enter__(self) -> Self:
        self.fileno()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_identity") and not self._is_closed and self._pid == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            # In a circle the socket and the eventfd may be gone already; nobody is in accept().
            self._close()

    def __repr__(self) -> str:
        state = "closed" if self._sock.fileno() < 0 else f"fd={self._sock.fileno()}"
        return f"<UnixListener {self.path} {state}>"


def listen_unix(path: str | os.PathLike[str], *, backlog: int = BACKLOG) -> UnixListener:
    """Listen at `path` with a socket that only this user (and root) can connect to.

    The file has mode 0600 from its creation, whatever the umask is; the umask is not changed.

    Args:
        path: At most 107 bytes; it must not exist yet.
        backlog: How many connections may wait to be accepted.

    Raises:
        ValueError: a path that is empty, too long or abstract.
        OSError: EADDRINUSE - the path exists; or an errno of the directory.

    Kernel: bind(2) gives the file the mode of the socket's own inode, less the umask.
    """
    name = _checked_path(path)
    check_int("backlog", backlog, 0, 1 << 31)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener = UnixListener(sock, name)
    try:
        listener._listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def connect_unix(
    path: str | os.PathLike[str], *, timeout_s: float | None = TIMEOUT_S
) -> socket.socket:
    """Connect to a listener and return the blocking stream socket.

    Args:
        path: The listener's path; at most 107 bytes.
        timeout_s: How long to wait while its queue is full, in seconds; None for no limit.

    Raises:
        ValueError: a path that is empty, too long or abstract.
        HandoverError: "timeout" - its queue stays full.
        OSError: ENOENT - the path does not exist; ECONNREFUSED - no process listens; EACCES - it
            belongs to another user.
    """
    name = _checked_path(path)
    deadline_of(timeout_s)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Blocking, as a non-blocking connect to a full queue fails at once and cannot be polled.
        seconds = 0.0 if timeout_s is None else max(check_seconds("timeout_s", timeout_s), 1e-6)
        limit = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.connect(name)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except BlockingIOError as error:
        sock.close()
        raise HandoverError("timeout", f"the queue of {name} stays full") from error
    except BaseException:
        sock.close()
        raise
    return sock


async def connect_unix_async(
    path: str | os.PathLike[str], *, timeout_s: float | None = TIMEOUT_S
) -> socket.socket:
    """Connect to a listener, as `connect_unix` does, from an asyncio task.

    Raises:
        ValueError, HandoverError, OSError: as `connect_unix`.
    """
    import asyncio

    name = _checked_path(path)
    deadline = deadline_of(timeout_s)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                sock.connect(name)
            except BlockingIOError as error:  # a full queue cannot be polled for
                if deadline is not None and time.monotonic() > deadline:
                    raise HandoverError("timeout", f"the queue of {name} stays full") from error
                await asyncio.sleep(QUEUE_RETRY_S)
            else:
                sock.setblocking(True)
                return sock
    except BaseException:
        sock.close()
        raise


def _checked_path(path: str | os.PathLike[str]) -> str:
    if isinstance(path, str) and "\0" in path:
        raise ValueError(
            f"path {path!r} is abstract, without permissions that keep other users out"
        )
    name = check_path("path", path)
    size = len(os.fsencode(name))
    if not 1 <= size <= PATH_LIMIT:
        raise ValueError(
            f"path {name!r} has {size} bytes, but a socket's path must have 1 to {PATH_LIMIT}"
        )
    return name


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            raise
        return None
    return status.st_dev, status.st_ino
