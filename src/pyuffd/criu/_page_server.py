"""`RemotePages`: a client of CRIU's page server, which has the pages of another machine."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Literal

from pyuffd._arguments import check_bools, check_choice, check_int, check_seconds, new_buffer
from pyuffd._closing import Closing
from pyuffd._errors import ClosedError, CriuError
from pyuffd._latch import Latch, RLock
from pyuffd._limits import start_thread
from pyuffd._owned import Descriptor
from pyuffd._pages import PAGE_SIZE, check_range
from pyuffd._polling import Poll

Wire = Literal["4.1", "4.2"]
# command, number of pages, address, process: the number of pages has 32 bits up to CRIU 4.1. The
# byte order is that of the server's machine, x86-64.
WIRES: dict[Wire, struct.Struct] = {"4.1": struct.Struct("<IIQQ"), "4.2": struct.Struct("<I4xQQQ")}
GET = 7
PAGES_FOLLOW = 4 << 16 | 6
CLOSE = 0x1023
_STATUS = struct.Struct("<i")

TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 10.0
# Of one request: more would hold up those behind it, which may be faults.
MOST_PAGES = 256
LARGEST_PID = 1 << 22


class RemotePages(Closing):
    """The pages that a page server of CRIU has.

    That is `criu page-server --lazy-pages`, or the source of a migration, `criu dump --lazy-pages`.
    Requests of several threads are sent at once, and the server answers them in their order.

    Args:
        address: The server's host, or a connected stream socket, which this object then owns; an
            `ssl.SSLSocket` for a server with --tls.
        port: The server's port.
        wire: The server's format: "4.2" for CRIU 4.2 and newer, "4.1" for older ones. The server
            does not tell; `Images.has_long_counts` does for the CRIU that wrote the images.
        timeout_s: How long the server may say nothing while it owes an answer, in seconds.
        tls: For a server with --tls: see `tls_context`.

    Raises:
        ValueError: a bad argument.
        OSError: the server cannot be reached; ssl.SSLError if it cannot be trusted.

    GIL: released while it waits.  Threads: safe.

    Example:
        Read a page of process 1234::

            with RemotePages("192.0.2.1", 27000) as pages:
                data = pages.read(1234, 0x7F0000000000, 4096)
    """

    _failed = "closing the connection to the page server failed"
    _instead = "it owns a connection"

    def __init__(
        self,
        address: str | socket.socket,
        port: int | None = None,
        *,
        wire: Wire = "4.2",
        timeout_s: float = TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        check_choice("wire", wire, WIRES)
        self._head = WIRES[wire]
        self._timeout_s = check_seconds("timeout_s", timeout_s)
        self._lock = RLock()
        self._new: deque[_Asked] = deque()
        self._error: CriuError | None = None
        self._is_closing = self._has_failed = False
        self._wake = Descriptor.eventfd()
        self._sock = _connected(address, port, self._timeout_s, tls)
        self._sock.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="criu-pages", daemon=True)
        start_thread(self._thread)

    def read(self, pid: int, address: int, length: int) -> bytearray:
        """Return pages of a process of the images.

        Args:
            pid: The process, by its pid in the images.
            address: The first page's address.
            length: Bytes, a multiple of 4096.

        Raises:
            ValueError: a bad argument.
            CriuError: "page-server" - the server has closed the connection, as it does when it
                lacks the page, broke the format, or did not answer in time. No further page can
                be read.
            ClosedError: the object is closed.

        Blocks: until the pages are there.
        """
        check_int("pid", pid, 1, LARGEST_PID + 1)
        check_range(check_int("address", address), check_int("length", length), PAGE_SIZE)
        data = new_buffer(length, "the pages of a process")
        view = memoryview(data)
        asked = [
            _Asked(pid, address + at, view[at : at + MOST_PAGES * PAGE_SIZE])
            for at in range(0, length, MOST_PAGES * PAGE_SIZE)
        ]
        with self._lock:
            if self._is_closing:
                raise ClosedError("the connection to the page server is closed")
            if self._error is not None:
                raise self._error
            self._new.extend(asked)
            os.eventfd_write(self._wake.number, 1)
        for one in asked:
            one.done.wait()
            if not one.is_right:
                raise self._failure()
        return data

    def _check_usable(self) -> None:
        if self._is_closing:
            raise ClosedError("the connection to the page server is closed")

    def _failure(self) -> Exception:
        return self._error or ClosedError("the connection to the page server is closed")

    # The thread

    def _run(self) -> None:
        connection = _Connection(self._sock, self._head)
        try:
            while not self._is_closing:
                self._step(connection)
        except (OSError, CriuError) as error:
            self._has_failed = True
            text = error if isinstance(error, CriuError) else f"the page server is lost: {error}"
            self._error = CriuError("page-server", str(text))
        finally:
            with self._lock:
                connection.ask(self._new)
                self._new.clear()
                if not self._has_failed:
                    self._error = CriuError("page-server", "the connection is closed")
            connection.give_up()

    def _step(self, connection: _Connection) -> None:
        poll = Poll()
        poll.register(self._wake.number, select.POLLIN)
        poll.register(self._sock, connection.events())
        waits_ms = self._timeout_s * 1000 if connection.owes else None
        ready = dict(poll.poll(0 if connection.has_buffered() else waits_ms))
        if self._wake.number in ready:
            os.eventfd_read(self._wake.number)
            with self._lock:
                connection.ask(self._new)
                self._new.clear()
        elif not ready and not connection.has_buffered():
            raise CriuError(
                "page-server", f"the page server has said nothing for {self._timeout_s:.0f} s"
            )
        connection.work()

    def close(self) -> None:
        """End the session: `criu dump --lazy-pages` then ends the process that it has dumped."""
        self._end(says_so=True)

    def abandon(self) -> None:
        """Close the connection without ending the session: for a restore that has failed."""
        self._end(says_so=False)

    def _end(self, *, says_so: bool) -> None:
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
            os.eventfd_write(self._wake.number, 1)
        self._thread.join()
        try:
            if says_so and not self._has_failed:
                self._say_goodbye()
        finally:
            self._sock.close()
            self._wake.close()

    def _say_goodbye(self) -> None:
        self._sock.settimeout(CLOSE_TIMEOUT_S)
        with suppress(OSError):  # the server is gone, as it should be
            self._sock.sendall(self._head.pack(CLOSE, 0, 0, 0))
            self._sock.recv(_STATUS.size)

    def __repr__(self) -> str:
        state = "closed" if self._is_closing else "failed" if self._has_failed else "open"
        return f"<RemotePages {state}>"


class _Asked:
    """Pages that are asked for, and where they are to be put."""

    def __init__(self, pid: int, address: int, target: memoryview) -> None:
        self.pid = pid
        self.address = address
        self.target = target
        self.done = Latch()
        self.is_right = False

    @property
    def pages(self) -> int:
        return len(self.target) // PAGE_SIZE


class _Connection:
    """The bytes that go out and come in; it never waits."""

    def __init__(self, sock: socket.socket, head: struct.Struct) -> None:
        self._sock = sock
        self._head = head
        self._out = bytearray()
        self._asked: deque[_Asked] = deque()
        self._wants_write = False
        self._to_head()

    def _to_head(self) -> None:
        self._into = memoryview(bytearray(self._head.size))
        self._have = 0
        self._pages = 0  # that are under way

    @property
    def owes(self) -> bool:
        """Whether the server owes an answer."""
        return bool(self._asked)

    def events(self) -> int:
        """Return what to poll for."""
        return select.POLLIN | (select.POLLOUT if self._out or self._wants_write else 0)

    def has_buffered(self) -> bool:
        """Whether TLS has decrypted more than was read."""
        return isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0

    def ask(self, asked: deque[_Asked]) -> None:
        """Ask for these too."""
        for one in asked:
            self._out += self._head.pack(GET, one.pages, one.address, one.pid)
            self._asked.append(one)

    def give_up(self) -> None:
        """Let the threads that wait know that there will be no answer."""
        while self._asked:
            self._asked.popleft().done.set()

    def work(self) -> None:
        """Send and receive what is possible at once."""
        self._wants_write = False
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        try:
            while True:
                count = self._sock.recv_into(self._into[self._have :])
                if not count:
                    raise CriuError(
                        "page-server",
                        "the page server has closed the connection: it lacks a page, or its log"
                        " says why",
                    )
                self._have += count
                if self._have == len(self._into):
                    self._complete()
        except ssl.SSLWantWriteError:
            self._wants_write = True
        except (BlockingIOError, ssl.SSLWantReadError):
            pass

    def _complete(self) -> None:
        if not self._pages:
            self._take_head()
            return
        asked = self._asked[0]
        size = self._pages * PAGE_SIZE
        asked.address += size
        asked.target = asked.target[size:]
        if not asked.pages:
            self._asked.popleft()
            asked.is_right = True
            asked.done.set()
        else:  # it had fewer: ask for the rest, behind the others
            self._asked.popleft()
            self.ask(deque([asked]))
        self._to_head()

    def _take_head(self) -> None:
        command, pages, address, pid = self._head.unpack(self._into)
        if not self._asked:
            raise CriuError("page-server", "the page server sent pages that nobody asked for")
        asked = self._asked[0]
        if (command, address, pid) != (PAGES_FOLLOW, asked.address, asked.pid):
            raise CriuError(
                "page-server",
                f"the page server answered {command:#x} for {address:#x} of process {pid} instead"
                f" of pages at {asked.address:#x} of process {asked.pid}: is it another version?",
            )
        if not 1 <= pages <= asked.pages:
            raise CriuError(
                "page-server", f"the page server sent {pages} pages instead of {asked.pages}"
            )
        self._pages = pages
        self._into = asked.target[: pages * PAGE_SIZE]
        self._have = 0


def tls_context(
    *,
    cacert: str,
    cacrl: str | None = None,
    cert: str | None = None,
    key: str | None = None,
    verifies_name: bool = True,
) -> ssl.SSLContext:
    """Return the settings for a page server with --tls; the arguments are files.

    Args:
        cacert: The certificate of the authority that signs the others (CRIU's --tls-cacert).
        cacrl: The authority's list of revoked certificates.
        cert: The certificate by which the server knows this client.
        key: Its private key.
        verifies_name: Whether the server's certificate must be for its host name.

    Raises:
        OSError: a file cannot be read; ssl.SSLError if it is not what it should be.
    """
    check_bools(verifies_name=verifies_name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cacert)
    if cacrl is not None:
        context.load_verify_locations(cacrl)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    if cert is not None:
        context.load_cert_chain(cert, key)
    context.check_hostname = verifies_name
    return context


def _connected(
    address: str | socket.socket, port: int | None, timeout_s: float, tls: ssl.SSLContext | None
) -> socket.socket:
    if isinstance(address, socket.socket):
        if port is not None or tls is not None:
            raise ValueError("port= and tls= are for an address, not for a connected socket")
        return address
    if port is None:
        raise ValueError("port: needed with an address")
    check_int("port", port, 1, 1 << 16)
    give_up = time.monotonic() + timeout_s
    sock = socket.create_connection((address, port), timeout_s or None)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is None:
            return sock
        sock.settimeout(max(0.1, give_up - time.monotonic()))
        return tls.wrap_socket(sock, server_hostname=address)
    except BaseException:
        sock.close()
        raise
