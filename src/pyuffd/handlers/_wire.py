"""Messages between the processes of the process driver, over a stream socket (layer L4).

Both ends are this library's: nothing here guards against a hostile peer.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import struct
import sys
import traceback
from typing import Any

from pyuffd.handlers._transport import MAIN_NAMES

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


def pickled_error(error: BaseException, *, with_traceback: bool = True) -> bytes:
    """Pickle an exception for `load_error`, its traceback as a note."""
    if with_traceback:
        text = "".join(traceback.format_exception(error)).rstrip()
        error.add_note(f"in the helper process:\n{text}")
    file = io.BytesIO()
    blob = b""
    with contextlib.suppress(Exception):  # whatever a class of the user's raises
        _ErrorPickler(file, pickle.HIGHEST_PROTOCOL).dump(error)
        blob = file.getvalue()
    described = f"{type(error).__qualname__}: {error}"
    return pickle.dumps((blob, described, getattr(error, "__notes__", [])))


def load_error(payload: bytes) -> BaseException:
    """Return the exception; one that this process cannot make is described by a RuntimeError."""
    blob, described, notes = pickle.loads(payload)
    error: BaseException = RuntimeError(described)
    if blob:
        with contextlib.suppress(Exception):
            error = pickle.loads(blob)
    error.__notes__ = notes
    return error


class _ErrorPickler(pickle.Pickler):
    """Names classes of the program's main module as its own process knows them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) and obj.__module__ in MAIN_NAMES:
            return _of_main, (obj.__qualname__,)
        return NotImplemented


def _of_main(name: str) -> Any:
    found: Any = sys.modules["__main__"]
    for part in name.split("."):
        found = getattr(found, part)
    return found
