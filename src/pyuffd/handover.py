"""Hand a userfaultfd to another process over a UNIX socket, with its ranges (layer L4).

`send_uffd` and `recv_uffd` move it; `listen_unix` and `connect_unix` make sockets that only this
user can connect to.  docs/handover.md describes the message, byte by byte.

Data from a peer are bounded before they are read and checked before they are used.  If a message is
refused, every descriptor that came with it is closed.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Self

from pyuffd._arguments import check_bools, check_int, shown
from pyuffd._closing import SoleOwner
from pyuffd._describe import counted
from pyuffd._errors import ClosedError, ProcessGoneError
from pyuffd._handover_format import (
    HEADER,
    MAGIC,
    MAX_MEMORY_FDS,
    RANGE,
    VERSION,
    HandoverRange,
    described,
    parsed,
)
from pyuffd._handover_peer import PEER, Control, Peer, Refusal
from pyuffd._owned import Descriptor, Received
from pyuffd._pages import (
    RangeLike,
)
from pyuffd._steps import Steps, WaitTimeoutError, deadline_of, run, run_async, wait, wait_async
from pyuffd._uffd import Userfaultfd
from pyuffd._unix_sockets import (
    TIMEOUT_S,
    UnixListener,
    connect_unix,
    connect_unix_async,
    listen_unix,
)

__all__ = [
    "Handover",
    "HandoverRange",
    "UnixListener",
    "connect_unix",
    "connect_unix_async",
    "listen_unix",
    "recv_uffd",
    "recv_uffd_async",
    "send_uffd",
    "send_uffd_async",
]

# The message: magic, version, bytes per range, number of ranges, number of descriptors.
# A virtual machine has tens of ranges, a process that registers every mapping some thousands.
MAX_REGIONS = 4096


class Handover(SoleOwner):
    """The result of `recv_uffd`: a context manager that closes all its descriptors.

    If a signal handler raises just as the `with` block ends, they stay open until the last
    reference to this object, and to `uffd`, is gone.

    Attributes:
        uffd: The adopted userfaultfd; it acts on the memory of its owner. `uffd.owner_pid` is the
            process that sent it. If the sender is a broker, which passes on userfaultfds that
            others opened, set `uffd.owner_pid` to the owner's pid or to None.
        regions: The ranges, in the order in which they were sent.
        pid: The process that connected or made the socket pair, as the kernel recorded it then; 0
            if that process is in a PID namespace that is not visible from here. The pid may have
            been reused since.
        uid: That process's effective user.
        gid: That process's effective group.
    """

    pid: int
    uid: int
    gid: int

    _instead = "send its parts with send_uffd()"

    def __init__(
        self,
        uffd: Userfaultfd,
        regions: tuple[HandoverRange, ...],
        peer: tuple[int, int, int],
        memory: Sequence[Descriptor],
        pidfd: Descriptor | None = None,
    ) -> None:
        if not hasattr(uffd, "owner_pid"):
            raise TypeError(f"uffd must be a Userfaultfd, not {shown(uffd)}; use recv_uffd(sock)")
        self._memory = memory
        self._pidfd = pidfd or Descriptor()
        self._sender_pid = uffd.owner_pid
        self.uffd = uffd
        self.regions = regions
        self.pid, self.uid, self.gid = peer

    # The owner's exit

    def pidfd(self) -> int:
        """Return a pidfd of the owner, which can be read, for poll(2), once the owner has exited.

        It stays the Handover's, and names the process that sent the userfaultfd even if its pid is
        used again. If `uffd.owner_pid` was set to another process, it is of that one. An execve(2)
        of the owner, which ends its memory, is no exit: `Handler.owner_exited` tells of both.

        Raises:
            ProcessGoneError: ESRCH - the owner had exited before.
            ValueError: the owner is unknown.
            ClosedError: the Handover is closed.

        Kernel: SO_PASSPIDFD of unix(7), Linux 6.5; pidfd_open(2) before.
        """
        self._check_open()
        pid = self.uffd.owner_pid
        if pid is None:
            raise ValueError(f"the owner of {self.uffd!r} is unknown: set uffd.owner_pid")
        if pid != self._sender_pid or not self._pidfd.is_open:
            if pid == self._sender_pid:
                raise ProcessGoneError(errno.ESRCH, "pidfd_open", hint=f"process {pid} has exited")
            try:
                self._pidfd = Descriptor.of_process(pid)
            except ProcessLookupError:
                raise ProcessGoneError(
                    errno.ESRCH, "pidfd_open", hint=f"there is no process {pid}"
                ) from None
            self._sender_pid = pid
        return self._pidfd.number

    def wait_exit(self, *, timeout_s: float | None = None) -> bool:
        """Wait until the owner has exited; return False if it has not when the time is over.

        Args:
            timeout_s: Seconds to wait; None for no limit, 0 to only look.

        Raises:
            ValueError, ClosedError: as `pidfd`, and for a bad timeout.

        GIL: released.  Threads: safe.  Blocks: until the owner exits.
        """
        deadline = deadline_of(timeout_s)
        with self._own_pidfd() as pidfd:
            if not pidfd.is_open:
                return True
            try:
                wait(pidfd.number, select.POLLIN, deadline)
            except WaitTimeoutError:
                return False
            return True

    async def exited(self) -> None:
        """Return when the owner has exited; for asyncio, where the task may be cancelled.

        Raises:
            ValueError, ClosedError: as `pidfd`.
        """
        with self._own_pidfd() as pidfd:
            if pidfd.is_open:
                await wait_async(pidfd.number, select.POLLIN, None)

    def _check_open(self) -> None:
        if self.uffd.closed:
            raise ClosedError("this handover is closed")

    def _own_pidfd(self) -> Descriptor:
        """Return a duplicate for one wait, during which close() may be called; or an empty one."""
        try:
            return Descriptor.duplicate(self.pidfd())
        except ProcessGoneError:
            return Descriptor()

    def close(self) -> None:
        """Close the userfaultfd, the memory descriptors and the pidfd.

        Threads of the owner that still wait continue with zero-filled pages, unless another
        process has the userfaultfd open: resolve their faults first.
        """
        self.uffd.close()
        for descriptor in (*self._memory, self._pidfd):
            descriptor.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # The userfaultfd may be in use elsewhere, and warns on its own.
        if hasattr(self, "gid") and any(descriptor.is_open for descriptor in self._memory):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            for descriptor in self._memory:
                descriptor.close()

    def __repr__(self) -> str:
        return (
            f"<Handover {self.uffd!r} of pid {self.pid}, uid {self.uid},"
            f" {counted(len(self.regions), 'range')}>"
        )


def send_uffd(
    sock: socket.socket,
    uffd: Userfaultfd,
    regions: Iterable[RangeLike],
    *,
    memory: bool = False,
    allow_uids: Iterable[int] | None = None,
    timeout_s: float | None = TIMEOUT_S,
) -> None:
    """Send a userfaultfd and its ranges; `uffd` stays open, and stays the caller's.

    Register the ranges first. A process that has the descriptor decides what the missing pages
    hold. If the receiver dies while this process has the userfaultfd open, threads that fault wait;
    if this process has closed it, they continue with zero-filled pages.

    Args:
        sock: A connected UNIX stream socket.
        uffd: The userfaultfd of this process's memory.
        regions: `Region`s, or anything with `start` and `length`. Their `page_size` and `offset`
            are sent if they have them.
        memory: Send the `fd` of each region that has one, so that the receiver can map it too.
        allow_uids: Users that may receive it; by default this process's effective user, and root.
        timeout_s: How long to wait in all for a peer that does not read, in seconds; None for no
            limit.

    Raises:
        ValueError: overlapping, unaligned or too many ranges, or not such a socket.
        ClosedError: the userfaultfd is closed.
        HandoverError: "refused" - the peer is another user, and nothing was sent; "closed" or
            "timeout" - the connection can no longer be used.

    Kernel: sendmsg(2) with SCM_RIGHTS and SCM_CREDENTIALS; SO_PEERCRED of unix(7).
    GIL: released.  Threads: safe, one call per socket.  Blocks: until the message is written.
    """
    steps = _Sending(sock, uffd, regions, memory, allow_uids, timeout_s)
    run(steps.peer.fileno(), steps.steps(), steps.peer.deadline)


async def send_uffd_async(
    sock: socket.socket,
    uffd: Userfaultfd,
    regions: Iterable[RangeLike],
    *,
    memory: bool = False,
    allow_uids: Iterable[int] | None = None,
    timeout_s: float | None = TIMEOUT_S,
) -> None:
    """Send a userfaultfd and its ranges, as `send_uffd` does, from an asyncio task.

    Once it was cancelled the connection can no longer be used.

    Raises:
        ValueError, ClosedError, HandoverError: as `send_uffd`.
    """
    steps = _Sending(sock, uffd, regions, memory, allow_uids, timeout_s)
    await run_async(steps.peer.fileno(), steps.steps(), steps.peer.deadline)


class _Sending:
    # A message, and how it is sent.
    def __init__(
        self,
        sock: socket.socket,
        uffd: Userfaultfd,
        regions: Iterable[RangeLike],
        memory: bool,
        allow_uids: Iterable[int] | None,
        timeout_s: float | None,
    ) -> None:
        if isinstance(uffd, type) or not hasattr(uffd, "_note_sent"):
            raise TypeError(f"uffd must be a Userfaultfd, not {shown(uffd)}")
        check_bools(memory=memory)
        ranges, fds = described(regions, memory)
        message = bytearray(HEADER.pack(MAGIC, VERSION, RANGE.size, len(ranges), 1 + len(fds)))
        for each in ranges:
            which = 0 if each.fd is None else 1 + fds.index(each.fd)
            message += RANGE.pack(each.start, each.length, each.page_size, each.offset, which, 0)
        self.peer = Peer(sock, allow_uids, timeout_s)
        self._uffd, self._message = uffd, message
        self._rights = array.array("i", [uffd.fileno(), *fds])

    def steps(self) -> Steps[None]:
        """Send it."""
        peer = self.peer
        control: Control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, self._rights)]
        left = memoryview(self._message)
        with peer.errors():
            try:
                sent = yield from peer.sendmsg(left, [_own_credentials(), *control])
            except OSError as error:
                # This user namespace has no id for us; the receiver then asks SO_PEERCRED.
                if error.errno not in (errno.EINVAL, errno.EPERM):
                    raise
                sent = yield from peer.sendmsg(left, control)
            while left := left[sent:]:
                sent = yield from peer.sendmsg(left, [])
        self._uffd._note_sent(peer.credentials[0])


def recv_uffd(
    sock: socket.socket,
    *,
    allow_uids: Iterable[int] | None = None,
    max_regions: int = MAX_REGIONS,
    timeout_s: float | None = TIMEOUT_S,
) -> Handover:
    """Receive what `send_uffd` sent, check all of it, and adopt the userfaultfd.

    It reads no byte beyond the message. After an error the connection can no longer be used. The
    process that sent the message is assumed to own the memory (`uffd.owner_pid`).

    Args:
        sock: A connected UNIX stream socket.
        allow_uids: Users that may send; by default this process's effective user, and root.
        max_regions: The largest number of ranges to accept; more are refused before they are read.
        timeout_s: How long to wait in all, however slowly the peer writes, in seconds; None for no
            limit.

    Raises:
        ValueError: not such a socket, or a bad argument.
        HandoverError: `reason` is one of: "refused" - the peer is another user, and nothing was
            read; "closed" - the peer closed the connection; "timeout"; "format", "version" - not a
            message of this library or version; "too-large" - more ranges than `max_regions`;
            "truncated" - descriptors were lost, because too many were sent or because of this
            process's RLIMIT_NOFILE; "descriptors" - none, too many, or some that no range uses;
            "not-a-userfaultfd"; "ranges" - unaligned, overlapping or out of bounds; "memory" - not
            memory, or too short. Every received descriptor is closed.

    Kernel: recvmsg(2) with SCM_RIGHTS and SCM_CREDENTIALS; SO_PEERCRED of unix(7).
    GIL: released.  Threads: safe, one call per socket.  Blocks: until the message has been read.

    Example:
        >>> import os, socket
        >>> from pyuffd import Region, Userfaultfd
        >>> from pyuffd.handover import recv_uffd, send_uffd
        >>> ours, theirs = socket.socketpair()
        >>> with ours, theirs, Userfaultfd() as uffd, Region.anonymous(8192) as region:
        ...     send_uffd(theirs, uffd, [region])
        ...     with recv_uffd(ours) as handover:
        ...         (handover.regions[0].start == region.start, handover.pid == os.getpid())
        (True, True)
    """
    check_int("max_regions", max_regions, 0)
    peer = Peer(sock, allow_uids, timeout_s)
    return run(peer.fileno(), _receiving(peer, max_regions), peer.deadline)


async def recv_uffd_async(
    sock: socket.socket,
    *,
    allow_uids: Iterable[int] | None = None,
    max_regions: int = MAX_REGIONS,
    timeout_s: float | None = TIMEOUT_S,
) -> Handover:
    """Receive what `send_uffd` sent, as `recv_uffd` does, from an asyncio task.

    If the task is cancelled, every received descriptor is closed, and the connection can no longer
    be used.

    Raises:
        ValueError, HandoverError: as `recv_uffd`.
    """
    check_int("max_regions", max_regions, 0)
    peer = Peer(sock, allow_uids, timeout_s)
    return await run_async(peer.fileno(), _receiving(peer, max_regions), peer.deadline)


def _receiving(peer: Peer, max_regions: int) -> Steps[Handover]:
    with peer.errors(), peer.names_sender(), Received() as received:
        header = yield from peer.receive(HEADER.size, received)
        magic, version, range_size, count, fd_count = HEADER.unpack(header)
        if magic != MAGIC:
            raise Refusal("format", f"not a handover message: it begins with {header[:8]!r}")
        if (version, range_size) != (VERSION, RANGE.size):
            raise Refusal(
                "version",
                f"version {version} with {range_size} bytes per range is not supported",
            )
        if count > max_regions:
            raise Refusal("too-large", f"{count} ranges, more than the {max_regions} allowed")
        if not 1 <= fd_count <= 1 + MAX_MEMORY_FDS:
            raise Refusal("descriptors", f"{fd_count} descriptors announced")
        if len(received) != fd_count:
            raise Refusal(
                "descriptors", f"{fd_count} descriptors announced, {len(received)} received"
            )
        body = yield from peer.receive(count * RANGE.size, received)
        if len(received) != fd_count:
            raise Refusal("descriptors", "more descriptors than were announced")
        ranges = parsed(body, received.numbers[1:])
        uffd = _adopted(received)
        uffd.owner_pid = peer.sender_pid(received)
        memory = [received.take(index) for index in range(1, fd_count)]
        pidfd = _pidfd_of(received, uffd.owner_pid)
        return Handover(uffd, ranges, peer.credentials, memory, pidfd)


def _pidfd_of(received: Received, pid: int | None) -> Descriptor:
    """Return a pidfd of the sender; none if it is unknown, or has exited."""
    descriptor = received.take_pidfd()  # of the very process that sent the message
    if descriptor.is_open or pid is None:
        return descriptor
    with suppress(OSError):  # before Linux 6.5
        return Descriptor.of_process(pid)
    return descriptor


def _adopted(received: Received) -> Userfaultfd:
    with received.take(0) as descriptor:
        try:
            return Userfaultfd._from_descriptor(descriptor)
        except ValueError as error:
            raise Refusal("not-a-userfaultfd", str(error)) from error


def _own_credentials() -> tuple[int, int, bytes]:
    own = PEER.pack(os.getpid(), os.getuid(), os.getgid())
    return socket.SOL_SOCKET, socket.SCM_CREDENTIALS, own
