"""Messages between the processes of the process driver, over a stream socket (layer L4).

Both ends are this library's: nothing here guards against a hostile peer.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import traceback
from typing import Any

_HEADER = struct.Struct("=II")  # length of the pickle, descriptors that come with it
MAX_FDS = 8


def send(sock: socket.socket, message: object, fds: tuple[int, ...] = ()) -> None:
    """Send one message; descriptors travel with its first byte."""
    sendall(sock, encode(message, len(fds)), fds)


def encode(message: object, fd_count: int = 0) -> bytes:
    """Return a message as it is sent."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(body), fd_count) + body


def sendall(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
    """Send bytes and descriptors."""
    sent = socket.send_fds(sock, [data], list(fds)) if fds else 0
    sock.sendall(memoryview(data)[sent:])


def receive(sock: socket.socket) -> tuple[Any, list[int]]:
    """Return the next message and its descriptors.

    Raises:
        EOFError: the peer is gone, perhaps in the middle of a message.
    """
    head, fds = receive_exactly(sock, _HEADER.size)
    try:
        length, fd_count = _HEADER.unpack(head)
        body, more = receive_exactly(sock, length)
        fds += more
        if len(fds) != fd_count:
            raise EOFError(f"{len(fds)} descriptors came instead of {fd_count}")
        return pickle.loads(body), fds
    except BaseException:
        close_all(fds)
        raise


def receive_exactly(sock: socket.socket, length: int) -> tuple[bytes, list[int]]:
    """Return `length` bytes and the descriptors that came with them."""
    data = bytearray()
    fds: list[int] = []
    while len(data) < length:
        try:
            piece, new, _, _ = socket.recv_fds(sock, length - len(data), MAX_FDS)
        except OSError as error:
            close_all(fds)
            raise EOFError(str(error)) from error
        fds += new
        if not piece:
            close_all(fds)
            raise EOFError("the other process is gone")
        data += piece
    for fd in fds:
        os.set_inheritable(fd, False)
    return bytes(data), fds


def close_all(fds: list[int]) -> None:
    """Close descriptors and forget them."""
    while fds:
        os.close(fds.pop())


def pickled_error(error: BaseException) -> bytes:
    """Pickle an exception with its traceback as a note; one that cannot be is described."""
    text = "".join(traceback.format_exception(error)).rstrip()
    error.add_note(f"in the helper process:\n{text}")
    try:
        blob = pickle.dumps(error)
        pickle.loads(blob)
    except Exception:  # whatever a class of the user's raises
        replacement = RuntimeError(f"{type(error).__qualname__}: {error}")
        replacement.add_note(f"in the helper process:\n{text}")
        blob = pickle.dumps(replacement)
    return blob
