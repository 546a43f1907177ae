"""Open files as arguments: what their descriptors have, and what they keep themselves (layer L1).

The descriptor of a file object is not its content if the object decodes it (compressed files, TLS,
HTTP), and not all of it if the object has a buffer. Reading the descriptor would give other bytes,
without a word.
"""

from __future__ import annotations

import errno
import io
import select
import socket
from collections.abc import Callable
from typing import cast

from pyuffd._arguments import check_descriptor, shown
from pyuffd._errors import UffdOSError, raise_errno
from pyuffd._polling import Poll

Reader = Callable[[memoryview], int | None]

_BUFFERED = (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)


def check_open_file(name: str, value: object) -> int:
    """Return the descriptor of an open file, or the number given; what it has buffered is written.

    Raises:
        TypeError: no open file, or one whose bytes are not those of its descriptor.
        OSError: what it had buffered cannot be written.
    """
    fd = check_descriptor(name, value)
    if isinstance(value, int) or not _has_read(value):
        return fd
    if not _is_plain(value):
        raise TypeError(
            f"{name}: the descriptor of {shown(value)} may have other bytes than its read() gives"
            " (compressed, encrypted): pass its content, or its fileno() if they are the same"
        )
    cast("io.IOBase", value).flush()
    return fd


def reader_of(name: str, stream: object) -> Reader | None:
    """Return what reads the next bytes of a stream into memory; None: its descriptor has them all.

    A reader returns the number of bytes, 0 at the end, or None if there are none yet.

    Raises:
        TypeError: an object whose bytes cannot be read into memory, such as a text file.
    """
    receive = getattr(stream, "recv_into", None)
    if callable(receive):
        # C waits for as long as it takes; a socket with a limit is read by its own method.
        is_plain = type(stream) is socket.socket and not stream.gettimeout()
        return None if is_plain else cast("Reader", receive)
    if not _has_read(stream) or isinstance(stream, io.FileIO):
        return None
    read = getattr(stream, "readinto", None)
    if callable(read):
        return cast("Reader", read)
    raise TypeError(
        f"{name}: {shown(stream)} cannot be read into memory: pass an open binary file, a socket,"
        " or a descriptor"
    )


def read_stream(reader: Reader, stream: object, target: memoryview, address: int) -> None:
    """Fill memory at an address with the next bytes of a stream.

    Raises:
        UffdOSError: ENODATA - the end came first. ETIMEDOUT - the socket's timeout was over. EIO,
            or its errno - the stream raised; its exception is the cause. `completed` bytes came.
    """
    done, length = 0, len(target)
    while done < length:
        rest = target[done:]
        try:
            n = reader(rest)
            if n is not None and not 0 <= n <= len(rest):
                raise ValueError(f"{shown(stream)} returned {n} for a buffer of {len(rest)} bytes")
        except Exception as error:
            raise UffdOSError(_errno_of(error), "read", address, length, completed=done) from error
        if n == 0:
            raise_errno("read", errno.ENODATA, address, length, completed=done)
        if n is None:
            _wait_readable(stream)
        else:
            done += n


def _errno_of(error: Exception) -> int:
    """Return the errno of a system call; those of ssl are numbers of another kind."""
    if isinstance(error, TimeoutError):
        return errno.ETIMEDOUT
    is_system_call = isinstance(error, OSError) and type(error).__module__ == "builtins"
    return (is_system_call and cast("OSError", error).errno) or errno.EIO


def _wait_readable(stream: object) -> None:
    poll = Poll()
    poll.register(check_descriptor("data", stream), select.POLLIN)
    poll.poll()


def _has_read(value: object) -> bool:
    return callable(getattr(value, "read", None))


def _is_plain(value: object) -> bool:
    """Return whether the bytes of a file object are those of its descriptor."""
    inner = value
    if type(inner).__module__ == "tempfile":  # wrappers of open files
        inner = getattr(inner, "file", None) or getattr(inner, "_file", None)
    if isinstance(inner, io.TextIOWrapper):
        inner = inner.buffer
    if isinstance(inner, _BUFFERED):
        inner = inner.raw
    return isinstance(inner, (io.FileIO, socket.SocketIO))
