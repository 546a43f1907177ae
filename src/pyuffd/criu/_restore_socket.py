"""What `criu restore --lazy-pages` sends: a pid and a userfaultfd for each process, then the end.

CRIU sends and never reads. Each process of the tree sends its own part, so the kernel tells who it
is.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from dataclasses import dataclass

from pyuffd._errors import ClosedError, CriuError
from pyuffd._owned import Descriptor, Received
from pyuffd._polling import Poll
from pyuffd._uffd import Userfaultfd

_WORD = struct.Struct("<i")
# Processes are complete: "RSTF".
_FINISHED = 0x52535446


@dataclass(frozen=True, slots=True)
class Arrived:
    """What came: a process with its userfaultfd, a zombie (without one), or the end (pid 0)."""

    pid: int
    uffd: Userfaultfd | None = None

    @property
    def is_end(self) -> bool:
        """Whether every process is there, and begins to run."""
        return self.pid == 0


class RestoreSocket:
    """The connection of a `criu restore`.

    Args:
        sock: The connected socket, which this object closes.
        ended: A descriptor that can be read when nobody is to wait any more.

    Raises:
        CriuError: "restore" - the peer is another user.
    """

    def __init__(self, sock: socket.socket, ended: int) -> None:
        self._sock = sock
        self._ended = ended
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid, uid, _ = struct.unpack("=iII", credentials)
        if uid not in (0, os.geteuid()):
            raise CriuError("restore", f"process {self.pid} of user {uid} may not restore here")

    def receive(self) -> Arrived:
        """Wait for the next message.

        Raises:
            CriuError: "restore" - the peer has gone before the end, or sent something else.
            ClosedError: nobody is to wait any more.
        """
        with Received() as received:
            word = _WORD.unpack(self._exactly(_WORD.size, received))[0]
            if len(received):
                raise CriuError("restore", "a descriptor came before its process's number")
            sender = received.sender
        if word == _FINISHED:
            return Arrived(0)
        if word <= 0:
            if not -(1 << 31) < word < 0:
                raise CriuError("restore", f"{word:#x} is not the number of a process")
            return Arrived(-word)
        with Received() as received:
            self._exactly(1, received)
            if len(received) != 1 or received.is_truncated:
                raise CriuError(
                    "restore", f"process {word} came with {len(received)} descriptors, not with one"
                )
            with received.take(0) as descriptor:
                return Arrived(word, self._adopted(descriptor, sender, word))

    def _adopted(self, descriptor: Descriptor, sender: int, pid: int) -> Userfaultfd:
        try:
            uffd = Userfaultfd._from_descriptor(descriptor)
        except ValueError as error:
            raise CriuError("restore", f"process {pid}: {error}") from None
        uffd.owner_pid = sender or None
        return uffd

    def _exactly(self, length: int, received: Received) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = bytearray(length - len(data))
            self._wait()
            try:
                count = received.receive(self._sock.fileno(), part)
            except BlockingIOError:
                continue
            except ConnectionError:
                count = 0
            if not count:
                raise CriuError("restore", "criu restore has gone before it was finished")
            data += part[:count]
        return bytes(data)

    def _wait(self) -> None:
        poll = Poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._ended, select.POLLIN)
        if any(fd == self._ended for fd, _ in poll.poll()):
            raise ClosedError("the server of lazy pages is closed")

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()
