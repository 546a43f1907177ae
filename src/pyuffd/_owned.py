"""Owners of what system calls make: descriptors, mappings, file names (layer L2).

A signal handler may raise between any two steps of Python, even between the return of a C function
and the line that notes its result. So an owner is made empty, and the C function itself fills it.
Whichever line is interrupted, the last reference to the owner closes what it holds. The `close` of
an object that consists of owners can be interrupted and called again.

A class that has an owner makes everything else first and assigns the owner last: the object is then
complete, and deserves a ResourceWarning.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pyuffd import _limits
from pyuffd._closing import SoleOwner
from pyuffd._errors import UffdOSError, limit_met, raise_errno
from pyuffd._shim import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

T = TypeVar("T")

MESSAGE_WORDS = 4  # of 8 bytes


class Owner(SoleOwner):
    """Something that C notes in a cell, and a destructor that ends it."""

    def __init__(self, memory: Any, destructor: Any) -> None:
        # The garbage collector runs the destructors of a cycle's members in any order, and cffi
        # drops its reference to the memory with that. A `__del__` that comes later still finds it.
        self._memory: Any = memory
        self._cell: Any = ffi.gc(memory, destructor)


class Descriptor(Owner):
    """A file descriptor, closed by `close` or with the last reference to this object."""

    _instead = "duplicate() gives another descriptor of the same file"

    def __init__(self) -> None:
        super().__init__(ffi.new("int32_t *", -1), lib.uffd_owned_close)

    @classmethod
    def open(cls, path: str | bytes | os.PathLike[str], flags: int, mode: int = 0) -> Self:
        """open(2), close-on-exec; raises what os.open does."""
        self = cls()
        self._open(path, lambda name: lib.uffd_owned_open(name, flags, mode, self._cell))
        return self

    @classmethod
    def create(cls, path: str, flags: int, mode: int, name: FileName) -> Self:
        """Create a new file; `name` owns its name, and removes it until it is settled."""
        self = cls()
        self._open(
            path, lambda raw: lib.uffd_owned_create(raw, flags, mode, self._cell, name._cell)
        )
        return self

    @classmethod
    def open_uffd(cls, flags: int) -> Self:
        """userfaultfd(2)."""
        self = cls()
        code = lib.uffd_owned_open_syscall(flags, self._cell)
        if code:
            raise_errno("userfaultfd", -code)
        return self

    @classmethod
    def open_uffd_device(cls, flags: int, path: str) -> Self:
        """Ask /dev/userfaultfd for a userfaultfd."""
        self = cls()
        code = lib.uffd_owned_open_device(_path(path), flags, self._cell)
        if code:
            raise_errno(f"open {path}", -code)
        return self

    @classmethod
    def memfd(cls, name: str, flags: int) -> Self:
        """memfd_create(2)."""
        self = cls()
        code = lib.uffd_owned_memfd_create(name.encode(), flags, self._cell)
        if code:
            raise_errno("memfd_create", -code, hint=_limits.why(-code, "memfd_create"))
        return self

    @classmethod
    def duplicate(cls, fd: int, least: int = 0) -> Self:
        """Duplicate a descriptor, close-on-exec, with a number of at least `least`."""
        self = cls()
        code = lib.uffd_owned_duplicate(fd, least, self._cell)
        if code:
            raise UffdOSError(-code, f"duplicate descriptor {fd}", hint=limit_met(-code))
        return self

    @classmethod
    def eventfd(cls) -> Self:
        """eventfd(2), close-on-exec and non-blocking."""
        self = cls()
        code = lib.uffd_owned_eventfd(self._cell)
        if code:
            raise UffdOSError(-code, "eventfd2", hint=limit_met(-code))
        return self

    @classmethod
    def pipe(cls, least: int = 0) -> tuple[Self, Self]:
        """pipe(2), close-on-exec: the ends to read and to write, both numbers at least `least`."""
        ends = cls(), cls()
        code = lib.uffd_owned_pipe(least, ends[0]._cell, ends[1]._cell)
        if code:
            raise UffdOSError(-code, "pipe2", hint=limit_met(-code))
        return ends

    @classmethod
    def of_process(cls, pid: int) -> Self:
        """pidfd_open(2)."""
        self = cls()
        code = lib.uffd_owned_pidfd_open(pid, self._cell)
        if code:
            raise OSError(-code, os.strerror(-code))
        return self

    def _open(self, path: str | bytes | os.PathLike[str], call: Callable[[bytes], int]) -> None:
        name = _path(path)
        # Between two attempts a signal handler can run, and may raise.
        while (code := call(name)) == -errno.EINTR:
            pass
        if code:
            raise OSError(-code, os.strerror(-code), path)

    @property
    def number(self) -> int:
        """The descriptor; -1 if it is closed or was released or moved."""
        return int(self._cell[0])

    def fileno(self) -> int:
        """Return the descriptor, for functions that take an open file."""
        return self.number

    @property
    def is_open(self) -> bool:
        """Whether it owns a descriptor."""
        return self.number >= 0

    def close(self) -> None:
        """Close it; may be called again."""
        code = lib.uffd_owned_close(self._cell)
        if code:
            raise OSError(-code, os.strerror(-code))

    def moved(self) -> Self:
        """Return another object that owns it from here on: for the end of a `with` block."""
        other = type(self)()
        lib.uffd_owned_move(self._cell, other._cell)
        return other

    def move_to(self, other: Descriptor) -> None:
        """Move it to another, empty owner."""
        lib.uffd_owned_move(self._cell, other._cell)

    # Ownership passes in an assignment on the line that also returns, so that an exception comes
    # before both or not at all.

    def release(self) -> int:
        """Give up ownership and return the descriptor."""
        number = self.number
        self._cell[0] = -1; return number  # noqa: E702  # fmt: skip

    def adopt(self, number: int, returns: T) -> T:
        """Own a descriptor from here on, and return `returns` for the caller."""
        self._cell[0] = number; return returns  # noqa: E702  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class MappedMemory(Owner):
    """A mapping, unmapped by `close` or with the last reference to this object."""

    _instead = "map the memory once more"

    def __init__(self) -> None:
        super().__init__(ffi.new("struct uffd_mapping *"), lib.uffd_owned_munmap)

    @classmethod
    def map(
        cls, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0, address: int = 0
    ) -> Self:
        """mmap(2)."""
        self = cls()
        code = lib.uffd_owned_mmap(address, length, prot, flags, fd, offset, self._cell)
        if code:
            raise_errno("mmap", -code, address or None, length)
        return self

    @property
    def start(self) -> int:
        """First address; 0 when it is unmapped."""
        return int(self._cell.start)

    def close(self) -> None:
        """Unmap it; may be called again. With EVENT_UNMAP it waits until the event is read."""
        start, length = self.start, int(self._cell.length)
        code = lib.uffd_owned_munmap(self._cell)
        if code:
            raise_errno("munmap", -code, start, length)

    def moved(self) -> Self:
        """Return another object that owns it from here on: for the end of a `with` block."""
        other = type(self)()
        lib.uffd_owned_move_mapping(self._cell, other._cell)
        return other

    def release(self) -> int:
        """Give up ownership, so that it stays mapped, and return its address."""
        start = self.start
        self._cell.start = 0; return start  # noqa: E702  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FileName(Owner):
    """The name of a file, removed by `close` or with the last reference to this object.

    It is not removed if `settle` or `note` says so, if another file has the name, or in a fork.
    """

    _instead = "a name is removed once"

    def __init__(self) -> None:
        super().__init__(ffi.new("struct uffd_name *"), lib.uffd_owned_unlink)

    def note(self, path: str, fd: int) -> None:
        """Own the name of an existing file, which is not removed before `settle`."""
        code = lib.uffd_owned_name(_path(path), fd, self._cell)
        if code:
            raise OSError(-code, os.strerror(-code), path)

    def settle(self, is_removed: bool, returns: T) -> T:
        """Decide whether `close` removes it, and return `returns` for the caller."""
        pid = os.getpid() if is_removed else 0
        self._cell.pid = pid; return returns  # noqa: E702  # fmt: skip

    def close(self) -> None:
        """Remove the name unless it shall stay; may be called again."""
        code = lib.uffd_owned_unlink(self._cell)
        if code:
            raise OSError(-code, os.strerror(-code))

    def moved(self) -> Self:
        """Return another object that owns it from here on: for the end of a `with` block."""
        other = type(self)()
        lib.uffd_owned_move_name(self._cell, other._cell)
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Received(Owner):
    """Descriptors received over a socket; those that are not taken are closed at the end."""

    _instead = "take() makes a Descriptor of each"
    capacity = lib.UFFD_RECEIVED_MAX  # descriptors that one message can have

    def __init__(self) -> None:
        super().__init__(
            ffi.new("struct uffd_received *", {"pidfd": -1}), lib.uffd_owned_close_received
        )

    def __len__(self) -> int:
        """The number of all received descriptors; those above the capacity are closed already."""
        return int(self._cell.count)

    @property
    def numbers(self) -> list[int]:
        """The descriptors, which stay this object's; -1 for one that was taken."""
        return list(self._cell.fds[0 : min(len(self), self.capacity)])

    @property
    def sender(self) -> int:
        """The pid in the first credentials that were received; 0 without any."""
        return int(self._cell.sender)

    def take_pidfd(self) -> Descriptor:
        """Return a pidfd of the sender, which the caller then owns; empty if none came."""
        descriptor = Descriptor()
        lib.uffd_owned_take_pidfd(self._cell, descriptor._cell)
        return descriptor

    @property
    def is_truncated(self) -> bool:
        """Whether the kernel dropped some."""
        return bool(self._cell.is_truncated)

    def receive(self, sock: int, target: Buffer) -> int:
        """Read bytes and descriptors; return the number of bytes, 0 at the stream's end.

        Raises:
            BlockingIOError: there is nothing to read; it never waits.
            ConnectionError: the peer is gone.
        """
        with ffi.from_buffer(target, require_writable=True) as pointer:
            count = lib.uffd_owned_receive(sock, pointer, len(pointer), self._cell)
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return count

    def take(self, index: int) -> Descriptor:
        """Return a descriptor, which the caller then owns."""
        if not 0 <= index < min(len(self), self.capacity):
            raise IndexError(f"descriptor {index} of {len(self)}")
        descriptor = Descriptor()
        lib.uffd_owned_take(self._cell, index, descriptor._cell)
        return descriptor

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        lib.uffd_owned_close_received(self._cell)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Messages(Owner):
    """Messages of a userfaultfd, and the descriptors that those of forks bring."""

    _instead = "a message is read once"

    def __init__(self, capacity: int) -> None:
        size = {"capacity": capacity, "data": capacity * MESSAGE_WORDS}
        super().__init__(ffi.new("struct uffd_messages *", size), lib.uffd_owned_close_forks)

    def read(self, fd: int) -> None:
        """read(2), once; there is none afterwards where none was queued."""
        while (code := lib.uffd_owned_read(fd, self._cell)) == -errno.EINTR:
            pass
        if code:
            raise_errno("read", -code)

    def __len__(self) -> int:
        return int(self._cell.count)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"message {index} of {len(self)}")
        first = index * MESSAGE_WORDS
        return bytes(ffi.buffer(self._cell.data[first : first + MESSAGE_WORDS]))

    def take_fork(self, index: int, descriptor: Descriptor) -> None:
        """Give the descriptor of a fork's message, unless it was taken, to its owner."""
        lib.uffd_owned_take_fork(self._cell, index, descriptor._cell)

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        lib.uffd_owned_close_forks(self._cell)


def _path(path: str | bytes | os.PathLike[str]) -> bytes:
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    return name
