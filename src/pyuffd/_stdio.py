"""Descriptors for helper processes that are no standard stream of theirs (layer L2).

In a program that has closed its standard streams, the next descriptors get their numbers, and what
a helper prints would go to whatever that is.
"""

from __future__ import annotations

import socket

from pyuffd._owned import Descriptor

STDIO = 3  # 0, 1 and 2 are the helper's standard streams, even if they are other files here


def socketpair_above_stdio() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets, neither with the number of a standard stream."""
    ours, theirs = socket.socketpair()
    try:
        return _above_stdio(ours), _above_stdio(theirs)
    except BaseException:
        ours.close()
        theirs.close()
        raise


def _above_stdio(sock: socket.socket) -> socket.socket:
    if sock.fileno() >= STDIO:
        return sock
    with sock, Descriptor.duplicate(sock.fileno(), STDIO) as descriptor:
        return socket.socket(fileno=descriptor.release())
