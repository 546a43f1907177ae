"""The events that a userfaultfd sends, without Fork, which has a `Userfaultfd` (layer L2)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pyuffd._abi import EventCode, PagefaultFlag

MESSAGE_SIZE = 32


@dataclass(frozen=True, slots=True)
class Pagefault:
    """A thread waits for a page. One access may send several of these, as after a signal.

    Attributes:
        address: The faulting address; without Feature.EXACT_ADDRESS the address of its page.
        flags: The kind of fault.
        thread_id: The faulting thread; 0 without Feature.THREAD_ID.
    """

    address: int
    flags: PagefaultFlag
    thread_id: int

    def __repr__(self) -> str:
        return f"Pagefault(address={self.address:#x}, flags={self.flags!r}, tid={self.thread_id})"


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap(2) moved `length` bytes of registered memory from `from_` to `to`."""

    from_: int
    to: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """The pages of [start, end) were dropped (MADV_DONTNEED, MADV_REMOVE, MADV_FREE)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """The memory of [start, end) was unmapped, by munmap(2) or as the old place of mremap(2)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """An event without a class in this version: its code and the whole 32-byte message."""

    code: int
    raw: bytes


PlainEvent = Pagefault | Remap | Remove | Unmap | UnknownEvent

_HEAD = struct.Struct("=B7x")
_ARGUMENTS = struct.Struct("=QQQ")


def message_code(raw: bytes) -> int:
    """Return the event byte of one 32-byte message."""
    return int(_HEAD.unpack_from(raw)[0])


def fork_fd(raw: bytes) -> int:
    """Return the file descriptor that a FORK message installed in the reading process."""
    return int(_ARGUMENTS.unpack_from(raw, _HEAD.size)[0]) & 0xFFFFFFFF


def parse_event(raw: bytes) -> PlainEvent:
    """Turn one 32-byte message into its event; a FORK message needs the caller (`fork_fd`)."""
    first, second, third = _ARGUMENTS.unpack_from(raw, _HEAD.size)
    match message_code(raw):
        case EventCode.PAGEFAULT:
            return Pagefault(second, PagefaultFlag(first), third & 0xFFFFFFFF)
        case EventCode.REMAP:
            return Remap(first, second, third)
        case EventCode.REMOVE:
            return Remove(first, second)
        case EventCode.UNMAP:
            return Unmap(first, second)
        case code:
            return UnknownEvent(code, bytes(raw))
