"""The other end of a UNIX stream socket: who it is, and transfers with a limit (layer L4)."""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from pyuffd._arguments import check_int, shown
from pyuffd._errors import HandoverError, HandoverReason
from pyuffd._owned import Received
from pyuffd._steps import Steps, WaitTimeoutError, deadline_of

PEER = struct.Struct("=3i")  # struct ucred: pid, uid, gid
SO_PASSPIDFD = 76  # Linux 6.5; not in the socket module
Control = list[tuple[int, int, "array.array[int] | bytes"]]


class Refusal(Exception):
    # Raised where the peer is unknown; `Peer.errors` turns it into a HandoverError.
    def __init__(self, reason: HandoverReason, text: str) -> None:
        super().__init__(reason, text)
        self.reason, self.text = reason, text


def _uids(allow_uids: Iterable[int]) -> set[int]:
    if isinstance(allow_uids, (str, bytes, type)) or not isinstance(allow_uids, Iterable):
        raise TypeError(f"allow_uids must be numbers of users, not {shown(allow_uids)}")
    return {check_int("allow_uids", uid) for uid in allow_uids}


class Peer:
    # A checked connection with one deadline for all calls. It does not know the format of a
    # message, so that another program's handshake can use it too.
    def __init__(
        self, sock: socket.socket, allow_uids: Iterable[int] | None, timeout_s: float | None
    ) -> None:
        if not isinstance(sock, socket.socket):
            raise TypeError(f"sock must be a socket, not {shown(sock)}")
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise ValueError(f"{sock!r} is not a UNIX stream socket")
        self._sock = sock
        self.deadline = deadline_of(timeout_s)
        allowed = {os.geteuid(), 0} if allow_uids is None else _uids(allow_uids)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
        pid, uid, gid = PEER.unpack(raw)
        self.credentials = pid, uid & 0xFFFF_FFFF, gid & 0xFFFF_FFFF
        if uid == -1:
            raise ValueError(f"{sock!r} is not connected")
        if self.credentials[1] not in allowed:
            text = f"user {self.credentials[1]} is not one of {sorted(allowed)}"
            raise self._error("refused", text)

    def _error(self, reason: HandoverReason, text: str) -> HandoverError:
        return HandoverError(reason, text, *self.credentials[:2])

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what is refused, and a lost connection, into a HandoverError."""
        try:
            yield
        except Refusal as refusal:
            raise self._error(refusal.reason, refusal.text) from refusal.__cause__
        except ConnectionError as error:
            raise self._error("closed", "the peer closed the connection") from error

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def _wait(self, event: int) -> Steps[None]:
        try:
            yield event
        except WaitTimeoutError:
            doing = "sent" if event == select.POLLIN else "read"
            raise Refusal("timeout", f"the peer has not {doing} everything in time") from None

    @contextmanager
    def names_sender(self) -> Iterator[None]:
        """Let the kernel attach the sender's credentials and pidfd to what is received."""
        with self._with_option(socket.SO_PASSCRED), self._with_option(SO_PASSPIDFD):
            yield

    @contextmanager
    def _with_option(self, option: int) -> Iterator[None]:
        try:
            was = self._sock.getsockopt(socket.SOL_SOCKET, option)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            yield  # SO_PASSPIDFD before Linux 6.5
            return
        self._sock.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            yield
        finally:
            with suppress(OSError):  # the socket may be closed by now
                self._sock.setsockopt(socket.SOL_SOCKET, option, was)

    def sender_pid(self, received: Received) -> int | None:
        """Return the pid of the process that sent the message, or None if it is unknown."""
        if received.sender:
            return received.sender
        # The pid is 0 without credentials, or if this PID namespace hides the process. For a socket
        # pair that this process made, SO_PEERCRED always names this process.
        pid = self.credentials[0]
        return pid if pid not in (0, os.getpid()) else None

    def sendmsg(self, data: memoryview, control: Control) -> Steps[int]:
        """Send some of the data."""
        while True:
            yield from self._wait(select.POLLOUT)
            with suppress(BlockingIOError):
                return self._sock.sendmsg(
                    [data], control, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
                )

    def receive(self, length: int, received: Received) -> Steps[bytes]:
        """Receive this many bytes; descriptors may arrive with any of them."""
        data = bytearray(length)
        done = 0
        while done < length:
            yield from self._wait(select.POLLIN)
            try:
                count = received.receive(self._sock.fileno(), memoryview(data)[done:])
            except BlockingIOError:
                continue
            if received.is_truncated:
                raise Refusal(
                    "truncated",
                    "descriptors were lost: there were more than a handover can have, or more than"
                    " this process may open (RLIMIT_NOFILE)",
                )
            if not count:
                raise Refusal(
                    "closed", f"the peer closed the connection after {done} of {length} bytes"
                )
            done += count
        return bytes(data)
