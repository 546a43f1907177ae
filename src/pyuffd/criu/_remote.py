"""Remote pages for the worker process, which must not own the connection: it may be killed.

The server's process has the connection to the page server. The sources in the worker process ask
it over a UNIX socket, each thread over a connection of its own.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import tempfile
import threading
from contextlib import suppress
from typing import Any

from pyuffd._closing import Closing
from pyuffd._errors import ClosedError, CriuError, HandoverError
from pyuffd._latch import RLock
from pyuffd._limits import start_thread
from pyuffd._unix_sockets import connect_unix, listen_unix
from pyuffd.criu._page_server import LARGEST_PID, RemotePages

log = logging.getLogger(__name__)

# Process, address, length; the answer is a length, and an error's text if it is negative.
_REQUEST = struct.Struct("<QQQ")
_ANSWER = struct.Struct("<q")


class PageBroker(Closing):
    """Answers the sources of worker processes from a `RemotePages`, which stays the caller's."""

    _failed = "closing the broker of remote pages failed"
    _instead = "it owns a socket and threads"

    def __init__(self, pages: RemotePages) -> None:
        self._pages = pages
        self._folder = tempfile.mkdtemp(prefix="pyuffd-criu-")
        self._listener = listen_unix(os.path.join(self._folder, "pages"), backlog=64)
        self._connections: set[socket.socket] = set()
        self._lock = RLock()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def path(self) -> str:
        """Where the sources connect to."""
        return self._listener.path

    def source(self, pid: int) -> RemoteSource:
        """Return the source of a process's memory: its offsets are addresses."""
        return RemoteSource(self.path, pid)

    def _start(self, target: Any, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="criu-broker", daemon=True)
        self._threads = [one for one in self._threads if one.is_alive()]
        self._threads.append(thread)
        start_thread(thread)

    def _accept(self) -> None:
        while True:
            try:
                sock = self._listener.accept(timeout_s=None)
            except (ClosedError, HandoverError, OSError):
                return
            with self._lock:
                self._connections.add(sock)
            self._start(self._answer, sock)

    def _answer(self, sock: socket.socket) -> None:
        try:
            while True:
                request = _exactly(sock, bytearray(_REQUEST.size))
                try:
                    data: bytes | bytearray = self._pages.read(*_REQUEST.unpack(request))
                    sock.sendall(_ANSWER.pack(len(data)))
                except (CriuError, ClosedError, ValueError) as error:
                    data = str(error).encode()
                    sock.sendall(_ANSWER.pack(-len(data)))
                sock.sendall(data)
        except (EOFError, OSError) as error:
            log.debug("%r", error)  # the worker process has ended
        finally:
            with self._lock:
                self._connections.discard(sock)
            sock.close()

    def close(self) -> None:
        """Answer no more; the `RemotePages` must be closed first, if requests are under way."""
        self._listener.close()
        with self._lock:
            for sock in self._connections:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        with suppress(OSError):
            os.rmdir(self._folder)


class RemoteSource:
    """A page source in the worker process; its offsets are addresses of a process of the image."""

    length = None

    def __init__(self, path: str, pid: int) -> None:
        if not 0 < pid <= LARGEST_PID:
            raise ValueError(f"pid {pid}")
        self._path = path
        self._pid = pid
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[RemoteSource], tuple[str, int]]:
        """Pickle without the connections."""
        return RemoteSource, (self._path, self._pid)

    def read(self, offset: int, length: int) -> bytearray:
        """Return `length` bytes from this address."""
        sock = getattr(self._local, "sock", None) or connect_unix(self._path)
        self._local.sock = None  # after an exception it is of no use
        sock.sendall(_REQUEST.pack(self._pid, offset, length))
        size = _ANSWER.unpack(_exactly(sock, bytearray(_ANSWER.size)))[0]
        data = _exactly(sock, bytearray(abs(size)))
        self._local.sock = sock
        if size < 0:
            raise CriuError("page-server", data.decode())
        return data

    def __repr__(self) -> str:
        return f"RemoteSource(process {self._pid})"


def _exactly(sock: socket.socket, target: bytearray) -> bytearray:
    view, have = memoryview(target), 0
    while have < len(target):
        count = sock.recv_into(view[have:])
        if not count:
            raise EOFError("the connection was closed")
        have += count
    return target
