"""A page server like CRIU's; the content of page n is `pattern(base + n)`."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from pyuffd.criu._page_server import CLOSE, GET, PAGES_FOLLOW, WIRES, Wire
from tests.criu._images import PAGE, pattern


class Server:
    """Serves one connection; `bases` has the first page of each process."""

    def __init__(self, wire: Wire, bases: Mapping[int, int], most: int = 1000) -> None:
        self._head = WIRES[wire]
        self._bases = bases
        self._most = most
        self.was_closed = False
        self._sock: socket.socket | None = None
        self.asked: list[tuple[int, int]] = []

    def serve(self, sock: socket.socket) -> None:
        """Answer until the client ends the session, or requests a page that does not exist."""
        self._sock = sock
        try:
            while data := sock.recv(self._head.size, socket.MSG_WAITALL):
                command, count, address, pid = self._head.unpack(data)
                if command == CLOSE:
                    self.was_closed = True
                    sock.sendall(bytes(4))
                    return
                base = self._bases.get(pid)
                if command != GET or base is None or address < base:
                    sock.shutdown(socket.SHUT_RDWR)
                    return
                self.asked.append((address, count))
                count = min(count, self._most)
                first = (address - base) // PAGE
                sock.sendall(self._head.pack(PAGES_FOLLOW, count, address, pid))
                sock.sendall(b"".join(pattern(first + number) for number in range(count)))
        except OSError:
            pass

    def stop(self) -> None:
        """Close the connection."""
        assert self._sock is not None
        self._sock.shutdown(socket.SHUT_RDWR)
