"""Hand a userfaultfd to another process over a UNIX socket, with its ranges (layer L4).

`send_uffd` and `recv_uffd` move it; `listen_unix` and `connect_unix` make sockets that only this
user can connect to.  docs/handover.md describes the message, byte by byte.

Data from a peer are bounded before they are read and checked before they are used.  If a message is
refused, every descriptor that came with it is closed.
"""

from __future__ import annotations

import array
import errno
import itertools
import os
import select
import socket
import stat
import struct
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Self

from pyuffd._arguments import check_int, check_path, check_seconds, shown
from pyuffd._closing import SoleOwner
from pyuffd._errors import ClosedError, HandoverError, HandoverReason
from pyuffd._owned import Descriptor, Received
from pyuffd._pages import (
    RangeLike,
    check_aligned,
    check_page_size,
    check_range,
    check_region,
    page_size_of,
)
from pyuffd._uffd import Userfaultfd

__all__ = [
    "Handover",
    "HandoverRange",
    "UnixListener",
    "connect_unix",
    "listen_unix",
    "recv_uffd",
    "send_uffd",
]

# The message: magic, version, bytes per range, number of ranges, number of descriptors.
MAGIC = b"pyuffd\x00\x1a"  # not text, so that no line-based protocol sends it
VERSION = 1
_HEADER = struct.Struct("<8sHHII")
# start, length, page size, offset, number of the memory's descriptor (0: none), reserved.
_RANGE = struct.Struct("<QQQQII")

# A virtual machine has tens of ranges, a process that registers every mapping some thousands.
MAX_REGIONS = 4096
# The kernel sends at most 253 descriptors with one message (SCM_MAX_FD); one is the userfaultfd.
MAX_MEMORY_FDS = 252
# A handover needs a few system calls; a peer that needs longer is stuck or hostile.
TIMEOUT_S = 10.0
PATH_LIMIT = 107  # sun_path, less its NUL
LONGEST_POLL_MS = (1 << 31) - 1  # an int of C
FILE_LIMIT = 1 << 63  # off_t
BACKLOG = 16

_PEER = struct.Struct("=3i")  # struct ucred: pid, uid, gid
_Control = list[tuple[int, int, "array.array[int] | bytes"]]
_TIMEVAL = struct.Struct("=qq")


@dataclass(frozen=True, slots=True)
class HandoverRange:
    """A range of the owner's memory, as its owner describes it.

    Attributes:
        start: First address, in the owner's address space.
        length: Bytes, a multiple of `page_size`.
        page_size: The unit of its faults in bytes.
        offset: Where it begins in `fd` in bytes or, without `fd`, in an image that owner and
            receiver agreed on.
        fd: A descriptor of its memory, owned by the `Handover`, or None.
            `Region.file(fd, length, offset=offset)` maps the same memory in this process.
    """

    start: int
    length: int
    page_size: int
    offset: int = 0
    fd: int | None = None

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[int, int, int, int]]:
        """Raise TypeError with a descriptor, whose number has no meaning in another process."""
        if self.fd is not None:
            raise TypeError("a HandoverRange with a descriptor cannot be pickled: use send_uffd()")
        return type(self), (self.start, self.length, self.page_size, self.offset)

    def __repr__(self) -> str:
        memory = "" if self.fd is None else f" fd={self.fd}"
        return (
            f"<HandoverRange [{self.start:#x}, +{self.length:#x}) page_size={self.page_size:#x}"
            f" offset={self.offset:#x}{memory}>"
        )


class Handover(SoleOwner):
    """The result of `recv_uffd`: a context manager that closes all its descriptors.

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

    _instead = "send its parts with send_uffd()"

    def __init__(
        self,
        uffd: Userfaultfd,
        regions: tuple[HandoverRange, ...],
        peer: tuple[int, int, int],
        memory: Sequence[Descriptor],
    ) -> None:
        self._memory = memory
        self.uffd = uffd
        self.regions = regions
        self.pid, self.uid, self.gid = peer

    def close(self) -> None:
        """Close the userfaultfd and the memory descriptors.

        Threads of the owner that still wait continue with zero-filled pages, unless another
        process has the userfaultfd open: resolve their faults first.
        """
        self.uffd.close()
        for descriptor in self._memory:
            descriptor.close()

    def __enter__(self) -> Self:
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
            f" {len(self.regions)} ranges>"
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
    if isinstance(uffd, type) or not hasattr(uffd, "note_sent"):
        raise TypeError(f"uffd must be a Userfaultfd, not {shown(uffd)}")
    ranges, fds = _described(regions, memory)
    message = bytearray(_HEADER.pack(MAGIC, VERSION, _RANGE.size, len(ranges), 1 + len(fds)))
    for each in ranges:
        which = 0 if each.fd is None else 1 + fds.index(each.fd)
        message += _RANGE.pack(each.start, each.length, each.page_size, each.offset, which, 0)
    peer = _Peer(sock, allow_uids, timeout_s)
    rights = array.array("i", [uffd.fileno(), *fds])
    control: _Control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
    left = memoryview(message)
    with peer.errors():
        try:
            sent = peer.sendmsg(left, [_own_credentials(), *control])
        except OSError as error:
            # This user namespace has no id for us; the receiver then asks SO_PEERCRED.
            if error.errno not in (errno.EINVAL, errno.EPERM):
                raise
            sent = peer.sendmsg(left, control)
        while left := left[sent:]:
            sent = peer.sendmsg(left, [])
    uffd.note_sent(peer.credentials[0])


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
    peer = _Peer(sock, allow_uids, timeout_s)
    with peer.errors(), peer.names_sender(), Received() as received:
        header = peer.receive(_HEADER.size, received)
        magic, version, range_size, count, fd_count = _HEADER.unpack(header)
        if magic != MAGIC:
            raise _Refusal("format", f"not a handover message: it begins with {header[:8]!r}")
        if (version, range_size) != (VERSION, _RANGE.size):
            raise _Refusal(
                "version",
                f"version {version} with {range_size} bytes per range is not supported",
            )
        if count > max_regions:
            raise _Refusal("too-large", f"{count} ranges, more than the {max_regions} allowed")
        if not 1 <= fd_count <= 1 + MAX_MEMORY_FDS:
            raise _Refusal("descriptors", f"{fd_count} descriptors announced")
        if len(received) != fd_count:
            raise _Refusal(
                "descriptors", f"{fd_count} descriptors announced, {len(received)} received"
            )
        body = peer.receive(count * _RANGE.size, received)
        if len(received) != fd_count:
            raise _Refusal("descriptors", "more descriptors than were announced")
        ranges = _parsed(body, received.numbers[1:])
        uffd = _adopted(received)
        uffd.owner_pid = peer.sender_pid(received)
        memory = [received.take(index) for index in range(1, fd_count)]
        return Handover(uffd, ranges, peer.credentials, memory)


def _described(regions: Iterable[RangeLike], memory: bool) -> tuple[list[HandoverRange], list[int]]:
    """Return the ranges of some regions, and the distinct descriptors of their memory."""
    ranges = []
    if isinstance(regions, (str, type)) or not isinstance(regions, Iterable):
        raise TypeError(f"regions must be several regions, not {shown(regions)}")
    for region in regions:
        check_region(region, "regions")
        fd = getattr(region, "fd", None) if memory else None
        offset = int(getattr(region, "offset", 0))
        ranges.append(HandoverRange(region.start, region.length, page_size_of(region), offset, fd))
    if len(ranges) >= 1 << 32:
        raise ValueError(f"{len(ranges)} ranges do not fit in a message")
    _check_ranges(ranges)
    fds = list(dict.fromkeys(each.fd for each in ranges if each.fd is not None))
    if len(fds) > MAX_MEMORY_FDS:
        raise ValueError(
            f"{len(fds)} memory descriptors; one message can have at most {MAX_MEMORY_FDS}"
        )
    return ranges, fds


def _parsed(body: bytes, memory_fds: Sequence[int]) -> tuple[HandoverRange, ...]:
    """Return the ranges of a message's body, checked."""
    ranges = []
    unused = set(memory_fds)
    for start, length, page_size, offset, which, reserved in _RANGE.iter_unpack(body):
        if reserved:
            raise _Refusal("format", f"reserved bits {reserved:#x} are set")
        if which > len(memory_fds):
            raise _Refusal("descriptors", f"a range names descriptor {which} of {len(memory_fds)}")
        fd = memory_fds[which - 1] if which else None
        unused.discard(-1 if fd is None else fd)
        ranges.append(HandoverRange(start, length, page_size, offset, fd))
    if unused:
        raise _Refusal("descriptors", f"no range uses {len(unused)} of the descriptors")
    try:
        _check_ranges(ranges)
    except ValueError as error:
        raise _Refusal("ranges", str(error)) from error
    for each in ranges:
        if each.fd is not None:
            _check_memory(each, each.fd)
    return tuple(ranges)


def _check_ranges(ranges: Sequence[HandoverRange]) -> None:
    """Raise ValueError unless the ranges are possible and disjoint."""
    for each in ranges:
        check_range(each.start, each.length, check_page_size(each.page_size))
        check_aligned("offset", each.offset, 1 if each.fd is None else each.page_size)
        if each.offset + each.length > FILE_LIMIT:
            raise ValueError(f"offset {each.offset:#x} + {each.length:#x} is beyond any file")
    ordered = sorted(ranges, key=lambda each: each.start)
    for before, after in itertools.pairwise(ordered):
        if before.start + before.length > after.start:
            raise ValueError(f"{before!r} and {after!r} overlap")


def _check_memory(each: HandoverRange, fd: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise _Refusal("memory", f"the descriptor of {each!r} is not memory")
    if each.offset + each.length > status.st_size:
        raise _Refusal("memory", f"{each!r} ends after its memory of {status.st_size:#x} bytes")


def _adopted(received: Received) -> Userfaultfd:
    with received.take(0) as descriptor:
        try:
            return Userfaultfd._from_descriptor(descriptor)
        except ValueError as error:
            raise _Refusal("not-a-userfaultfd", str(error)) from error


def _own_credentials() -> tuple[int, int, bytes]:
    own = _PEER.pack(os.getpid(), os.getuid(), os.getgid())
    return socket.SOL_SOCKET, socket.SCM_CREDENTIALS, own


class _Refusal(Exception):
    # Raised where the peer is unknown; `_Peer.errors` turns it into a HandoverError.
    def __init__(self, reason: HandoverReason, text: str) -> None:
        super().__init__(reason, text)
        self.reason, self.text = reason, text


def _uids(allow_uids: Iterable[int]) -> set[int]:
    if isinstance(allow_uids, (str, bytes, type)) or not isinstance(allow_uids, Iterable):
        raise TypeError(f"allow_uids must be numbers of users, not {shown(allow_uids)}")
    return {check_int("allow_uids", uid) for uid in allow_uids}


class _Peer:
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
        self._deadline = _deadline(timeout_s)
        allowed = {os.geteuid(), 0} if allow_uids is None else _uids(allow_uids)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid, uid, gid = _PEER.unpack(raw)
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
        try:
            yield
        except _Refusal as refusal:
            raise self._error(refusal.reason, refusal.text) from refusal.__cause__
        except ConnectionError as error:
            raise self._error("closed", "the peer closed the connection") from error

    def _wait(self, event: int) -> None:
        if not _wait(self._sock.fileno(), event, self._deadline):
            doing = "sent" if event == select.POLLIN else "read"
            raise _Refusal("timeout", f"the peer has not {doing} everything in time")

    @contextmanager
    def names_sender(self) -> Iterator[None]:
        """Let the kernel attach the sender's credentials to what is received meanwhile."""
        was = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        try:
            yield
        finally:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, was)

    def sender_pid(self, received: Received) -> int | None:
        """Return the pid of the process that sent the message, or None if it is unknown."""
        if received.sender:
            return received.sender
        # The pid is 0 without credentials, or if this PID namespace hides the process. For a socket
        # pair that this process made, SO_PEERCRED always names this process.
        pid = self.credentials[0]
        return pid if pid not in (0, os.getpid()) else None

    def sendmsg(self, data: memoryview, control: _Control) -> int:
        while True:
            self._wait(select.POLLOUT)
            with suppress(BlockingIOError):
                return self._sock.sendmsg(
                    [data], control, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
                )

    def receive(self, length: int, received: Received) -> bytes:
        # Descriptors may come with any byte.
        data = bytearray(length)
        done = 0
        while done < length:
            self._wait(select.POLLIN)
            try:
                count = received.receive(self._sock.fileno(), memoryview(data)[done:])
            except BlockingIOError:
                continue
            if received.is_truncated:
                raise _Refusal(
                    "truncated",
                    "descriptors were lost: there were more than a handover can have, or more than"
                    " this process may open (RLIMIT_NOFILE)",
                )
            if not count:
                raise _Refusal(
                    "closed", f"the peer closed the connection after {done} of {length} bytes"
                )
            done += count
        return bytes(data)


class UnixListener(SoleOwner):
    """A listening UNIX socket that only this user can connect to, made by `listen_unix`.

    Attributes:
        path: The path of its file. close() removes the file if it is still this socket's.
    """

    _instead = "any process of this user can connect with connect_unix(path)"

    def __init__(self, sock: socket.socket, path: str) -> None:
        self._sock = sock
        self.path = path
        self._pid = os.getpid()
        self._identity: tuple[int, int] | None = None  # of its file, once it is bound

    def _listen(self, backlog: int) -> None:
        os.fchmod(self._sock.fileno(), 0o600)
        self._sock.bind(self.path)
        self._identity = _identity(self.path)
        self._sock.listen(backlog)

    def accept(self, *, timeout_s: float | None = TIMEOUT_S) -> socket.socket:
        """Return the next connection, a blocking stream socket.

        Raises:
            HandoverError: "timeout" - no process connected in time.
            ClosedError: the listener is closed.
        """
        deadline = _deadline(timeout_s)
        while True:
            if not _wait(self.fileno(), select.POLLIN, deadline):
                raise HandoverError("timeout", f"no process connected to {self.path} in time")
            # Another process that shares the listener may be faster.
            with suppress(BlockingIOError):
                connection, _ = self._sock.accept()
                connection.setblocking(True)
                return connection

    def fileno(self) -> int:
        """Return the descriptor, for polling."""
        fd = self._sock.fileno()
        if fd < 0:
            raise ClosedError(f"the listener at {self.path} is closed")
        return fd

    def close(self) -> None:
        """Stop listening, and remove the socket's file; in a fork, only close."""
        if self._sock.fileno() < 0:
            return
        try:
            self._unlink()
        except OSError:
            self._sock.close()
            raise
        self._sock.close()  # last: after an interruption the next close() does the rest

    def _unlink(self) -> None:
        if self._identity is None and self._sock.getsockname() == self.path:
            self._identity = _identity(self.path)  # `_listen` was interrupted after bind(2)
        if (
            self._pid == os.getpid()
            and self._identity is not None
            and _identity(self.path) == self._identity
        ):
            with suppress(FileNotFoundError):
                os.unlink(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_identity") and self._sock.fileno() >= 0 and self._pid == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._sock.fileno() < 0 else f"fd={self._sock.fileno()}"
        return f"<UnixListener {self.path} {state}>"


def listen_unix(path: str | os.PathLike[str], *, backlog: int = BACKLOG) -> UnixListener:
    """Listen at `path` with a socket that only this user (and root) can connect to.

    The file has mode 0600 from its creation, whatever the umask is; the umask is not changed.

    Args:
        path: At most 107 bytes; it must not exist yet.
        backlog: How many connections may wait to be accepted.

    Raises:
        ValueError: a path that is empty, too long or abstract.
        OSError: EADDRINUSE - the path exists; or an errno of the directory.

    Kernel: bind(2) gives the file the mode of the socket's own inode, less the umask.
    """
    name = _checked_path(path)
    check_int("backlog", backlog, 0, 1 << 31)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener = UnixListener(sock, name)
    try:
        listener._listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def connect_unix(
    path: str | os.PathLike[str], *, timeout_s: float | None = TIMEOUT_S
) -> socket.socket:
    """Connect to a listener and return the blocking stream socket.

    Args:
        path: The listener's path; at most 107 bytes.
        timeout_s: How long to wait while its queue is full, in seconds; None for no limit.

    Raises:
        ValueError: a path that is empty, too long or abstract.
        HandoverError: "timeout" - its queue stays full.
        OSError: ENOENT - the path does not exist; ECONNREFUSED - no process listens; EACCES - it
            belongs to another user.
    """
    name = _checked_path(path)
    _deadline(timeout_s)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Blocking, as a non-blocking connect to a full queue fails at once and cannot be polled.
        seconds = 0.0 if timeout_s is None else max(check_seconds("timeout_s", timeout_s), 1e-6)
        limit = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.connect(name)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except BlockingIOError as error:
        sock.close()
        raise HandoverError("timeout", f"the queue of {name} stays full") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _checked_path(path: str | os.PathLike[str]) -> str:
    if isinstance(path, str) and "\0" in path:
        raise ValueError(
            f"path {path!r} is abstract, without permissions that keep other users out"
        )
    name = check_path("path", path)
    size = len(os.fsencode(name))
    if not 1 <= size <= PATH_LIMIT:
        raise ValueError(
            f"path {name!r} has {size} bytes, but a socket's path must have 1 to {PATH_LIMIT}"
        )
    return name


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            raise
        return None
    return status.st_dev, status.st_ino


def _deadline(timeout_s: float | None) -> float | None:
    if timeout_s is None:
        return None
    return time.monotonic() + check_seconds("timeout_s", timeout_s)


def _wait(fd: int, event: int, deadline: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    return bool(poll.poll(None if left_ms is None else min(left_ms, LONGEST_POLL_MS)))
