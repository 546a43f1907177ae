"""Messages between the processes of the process driver, over a stream socket (layer L4).

Both ends are this library's, so nothing here guards against a hostile peer.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import select
import socket
import struct
import sys
from array import array
from typing import Any

from pyuffd._describe import shortened, text_of, traceback_of
from pyuffd._errors import limit_met
from pyuffd._polling import Poll
from pyuffd.handlers._types import SourceFailure
from pyuffd.handlers.process._calls import Message
from pyuffd.handlers.process._transport import MAIN_NAMES

_HEADER = struct.Struct("=IIQI")  # body length, descriptors that come with it, number, word
_NUMBER = struct.Struct("=Q")
MAX_FDS = 253  # of one message (SCM_MAX_FD)
# Python allocates what recvmsg() might return, each time; socket buffers have fewer bytes.
_PIECE = 1 << 20
# Of a text among an exception's arguments; more is not sent. A source may raise with its content.
ARGUMENT_MOST = 1 << 20
_CONTROL_SIZE = socket.CMSG_LEN(MAX_FDS * array("i").itemsize)


class DescriptorsLostError(Exception):
    """A message arrived without its descriptors; `message` is complete otherwise."""

    def __init__(self, message: Message) -> None:
        super().__init__(f"descriptors did not arrive; {limit_met(errno.EMFILE)}")
        self.message = message


def packed(value: object) -> bytes:
    """Return the body of a message: a pickle, and after it what travels beside it as it is.

    That is every `pickle.PickleBuffer` in the value (PEP 574): a pickled source or exception, which
    only its reader can unpickle, is never inside another pickle. Their lengths and their number
    come last.
    """
    beside: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, 5, buffer_callback=beside.append)
    if not beside:
        return body + _NUMBER.pack(0)
    parts = [part.raw() for part in beside]
    numbers = [len(part) for part in parts] + [len(parts)]
    return b"".join([body, *parts, *map(_NUMBER.pack, numbers)])


def unpacked(body: bytes) -> Any:
    """Return the value of a body, with bytes in the place of each PickleBuffer."""
    end = len(body) - _NUMBER.size
    (count,) = _NUMBER.unpack_from(body, end)
    lengths = struct.unpack_from(f"={count}Q", body, end - count * _NUMBER.size)
    at = end - count * _NUMBER.size - sum(lengths)
    parts = []
    for length in lengths:
        parts.append(body[at : at + length])
        at += length
    return pickle.loads(body, buffers=parts)  # what comes after the pickle is not read


def send(sock: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> None:
    """Send one message; descriptors travel with its first byte."""
    sendall(sock, encode(message, len(fds)), fds)


def encode(message: Message, fd_count: int = 0) -> bytes:
    """Return the bytes of a message."""
    number, word, body = message
    return _HEADER.pack(len(body), fd_count, number, word) + body


def sendall(
    sock: socket.socket, data: bytes, fds: tuple[int, ...] = (), *, ended: int = -1
) -> None:
    """Send bytes and descriptors.

    `ended`: a pidfd of the other process; a fork may keep its end of the socket open.

    Raises:
        EOFError: the other process has ended.
    """
    view = memoryview(data)
    flags = socket.MSG_NOSIGNAL  # the program may have SIGPIPE at its default
    if ended >= 0:
        flags |= socket.MSG_DONTWAIT
    while view:
        if ended >= 0:
            _wait(sock, select.POLLOUT, ended)
        try:
            # socket.send_fds() and recv_fds() ignore their flags.
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            sent = sock.sendmsg([view], control, flags)
        except BlockingIOError:
            continue
        view, fds = view[sent:], ()


def receive(sock: socket.socket, *, ended: int = -1) -> tuple[Message, list[int]]:
    """Return the next message and its descriptors.

    Raises:
        EOFError: the peer has ended, perhaps in the middle of a message.
        DescriptorsLostError: this process cannot open that many descriptors.
    """
    head, fds = receive_exactly(sock, _HEADER.size, ended=ended)
    try:
        length, fd_count, number, word = _HEADER.unpack(head)
        body, more = receive_exactly(sock, length, ended=ended)
        fds += more
        message = Message(number, word, body)
        if len(fds) != fd_count:
            raise DescriptorsLostError(message)
    except BaseException:
        close_all(fds)
        raise
    return message, fds


def receive_exactly(
    sock: socket.socket, length: int, *, ended: int = -1
) -> tuple[bytes, list[int]]:
    """Return `length` bytes and the descriptors that came with them."""
    data = bytearray()
    fds: list[int] = []
    while len(data) < length:
        try:
            if ended >= 0:
                _wait(sock, select.POLLIN, ended)
            piece, control, _, _ = sock.recvmsg(
                min(length - len(data), _PIECE), _CONTROL_SIZE, socket.MSG_CMSG_CLOEXEC
            )
        except (OSError, EOFError) as error:
            close_all(fds)
            raise EOFError(str(error)) from error
        for _, _, content in control:
            new = array("i")
            new.frombytes(content[: len(content) - len(content) % new.itemsize])
            fds += new
        if not piece:
            close_all(fds)
            raise EOFError("the other process is gone")
        data += piece
    return bytes(data), fds


def _wait(sock: socket.socket, event: int, ended: int) -> None:
    poll = Poll()
    poll.register(sock, event)
    poll.register(ended, select.POLLIN)
    if sock.fileno() not in dict(poll.poll()):
        raise EOFError("the other process has ended")


def close_all(fds: list[int]) -> None:
    """Close descriptors and forget them."""
    while fds:
        os.close(fds.pop())


def pickled_error(error: BaseException, *, with_traceback: bool = True) -> bytes:
    """Pickle an exception for `load_error`, with its traceback as a note."""
    if with_traceback:
        error.add_note(f"in the helper process:\n{traceback_of(error)}")
    file = io.BytesIO()
    blob = b""
    with contextlib.suppress(Exception):  # the user's classes may raise anything
        _ErrorPickler(file, pickle.HIGHEST_PROTOCOL).dump(_Shortened(error))
        blob = file.getvalue()
    text = f"{type(error).__qualname__}: {text_of(error)}"
    cause = error.__cause__
    below = b"" if cause is None else pickled_error(cause, with_traceback=False)
    notes = _short(getattr(error, "__notes__", []))
    return packed((pickle.PickleBuffer(blob), text, notes, pickle.PickleBuffer(below)))


def load_error(payload: bytes) -> BaseException:
    """Return the exception, or a RuntimeError that describes it if it cannot be unpickled here."""
    blob, described, notes, below = unpacked(payload)
    error: BaseException = RuntimeError(described)
    if blob:
        with contextlib.suppress(Exception):
            error = pickle.loads(blob)
    error.__notes__ = notes
    if below:
        error.__cause__ = load_error(below)
    return error


def failure_of(
    error: BaseException, start: int, length: int, *, with_traceback: bool = True
) -> tuple[pickle.PickleBuffer, int, int]:
    """Return the failure of a source as it is sent, for `load_failure`."""
    return pickle.PickleBuffer(pickled_error(error, with_traceback=with_traceback)), start, length


def load_failure(sent: tuple[bytes, int, int]) -> SourceFailure:
    """Return the failure of a source."""
    error, start, length = sent
    return SourceFailure(load_error(error), start, length)


class _Shortened:
    """Pickles as an exception does, without the rest of its longest arguments."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        made = self._error.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        if isinstance(made, str):  # the name of a global
            raise pickle.PicklingError(made)
        return (made[0], *_short(made[1:]))


def _short(value: Any) -> Any:
    """Return the value with every text and every bytes object in it cut."""
    if type(value) is str:
        return shortened(value, ARGUMENT_MOST)
    if type(value) in (bytes, bytearray):
        return value[:ARGUMENT_MOST]
    if type(value) in (list, tuple):
        return type(value)(map(_short, value))
    if type(value) is dict:
        return {key: _short(one) for key, one in value.items()}
    return value


class _ErrorPickler(pickle.Pickler):
    """Pickles classes of the main module so that the program finds them in its `__main__`."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) and obj.__module__ in MAIN_NAMES:
            return _of_main, (obj.__qualname__,)
        return NotImplemented


def _of_main(name: str) -> Any:
    found: Any = sys.modules["__main__"]
    for part in name.split("."):
        found = getattr(found, part)
    return found
