"""Flags, enums and event classes in the manual pages' words (layer L1).

The numbers come from the compiled shim, which keeps its own copy of the kernel's; nothing here
calls the kernel.  Bits that this version has no name for are kept, printed and passed on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import KEEP, IntEnum, IntFlag
from typing import TYPE_CHECKING

from pyuffd._shim import lib

if TYPE_CHECKING:
    from pyuffd._uffd import Userfaultfd

USER_MODE_ONLY = lib.UFFD_USER_MODE_ONLY
MESSAGE_SIZE = 32


class Feature(IntFlag, boundary=KEEP):
    """Feature bits of UFFDIO_API(2const): asked for with `Userfaultfd(features=...)`."""

    PAGEFAULT_FLAG_WP = lib.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    EVENT_FORK = lib.UFFD_FEATURE_EVENT_FORK
    EVENT_REMAP = lib.UFFD_FEATURE_EVENT_REMAP
    EVENT_REMOVE = lib.UFFD_FEATURE_EVENT_REMOVE
    MISSING_HUGETLBFS = lib.UFFD_FEATURE_MISSING_HUGETLBFS
    MISSING_SHMEM = lib.UFFD_FEATURE_MISSING_SHMEM
    EVENT_UNMAP = lib.UFFD_FEATURE_EVENT_UNMAP
    SIGBUS = lib.UFFD_FEATURE_SIGBUS
    THREAD_ID = lib.UFFD_FEATURE_THREAD_ID
    MINOR_HUGETLBFS = lib.UFFD_FEATURE_MINOR_HUGETLBFS
    MINOR_SHMEM = lib.UFFD_FEATURE_MINOR_SHMEM
    EXACT_ADDRESS = lib.UFFD_FEATURE_EXACT_ADDRESS
    WP_HUGETLBFS_SHMEM = lib.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    WP_UNPOPULATED = lib.UFFD_FEATURE_WP_UNPOPULATED
    POISON = lib.UFFD_FEATURE_POISON
    WP_ASYNC = lib.UFFD_FEATURE_WP_ASYNC
    MOVE = lib.UFFD_FEATURE_MOVE
    RWP = lib.UFFD_FEATURE_RWP
    RWP_ASYNC = lib.UFFD_FEATURE_RWP_ASYNC


class RegisterMode(IntFlag, boundary=KEEP):
    """Modes of UFFDIO_REGISTER(2const): which faults of a range are delivered."""

    MISSING = lib.UFFDIO_REGISTER_MODE_MISSING
    WP = lib.UFFDIO_REGISTER_MODE_WP
    MINOR = lib.UFFDIO_REGISTER_MODE_MINOR
    RWP = lib.UFFDIO_REGISTER_MODE_RWP


class CopyMode(IntFlag, boundary=KEEP):
    """Modes of UFFDIO_COPY(2const)."""

    DONTWAKE = lib.UFFDIO_COPY_MODE_DONTWAKE
    WP = lib.UFFDIO_COPY_MODE_WP


class ZeropageMode(IntFlag, boundary=KEEP):
    """Modes of UFFDIO_ZEROPAGE(2const)."""

    DONTWAKE = lib.UFFDIO_ZEROPAGE_MODE_DONTWAKE


class WriteprotectMode(IntFlag, boundary=KEEP):
    """Modes of UFFDIO_WRITEPROTECT(2const); without WP the protection is taken off."""

    WP = lib.UFFDIO_WRITEPROTECT_MODE_WP
    DONTWAKE = lib.UFFDIO_WRITEPROTECT_MODE_DONTWAKE


class ContinueMode(IntFlag, boundary=KEEP):
    """Modes of UFFDIO_CONTINUE(2const)."""

    DONTWAKE = lib.UFFDIO_CONTINUE_MODE_DONTWAKE
    WP = lib.UFFDIO_CONTINUE_MODE_WP


class PoisonMode(IntFlag, boundary=KEEP):
    """Modes of UFFDIO_POISON(2const)."""

    DONTWAKE = lib.UFFDIO_POISON_MODE_DONTWAKE


class MoveMode(IntFlag, boundary=KEEP):
    """Modes of UFFDIO_MOVE(2const)."""

    DONTWAKE = lib.UFFDIO_MOVE_MODE_DONTWAKE
    ALLOW_SRC_HOLES = lib.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES


class RwprotectMode(IntFlag, boundary=KEEP):
    """Modes of UFFDIO_RWPROTECT (Linux 7.3); without RWP the protection is taken off."""

    RWP = lib.UFFDIO_RWPROTECT_MODE_RWP
    DONTWAKE = lib.UFFDIO_RWPROTECT_MODE_DONTWAKE


class Ioctl(IntFlag, boundary=KEEP):
    """The ioctls masks of UFFDIO_API and UFFDIO_REGISTER: bit n stands for ioctl number n."""

    REGISTER = 1 << lib._UFFDIO_REGISTER
    UNREGISTER = 1 << lib._UFFDIO_UNREGISTER
    WAKE = 1 << lib._UFFDIO_WAKE
    COPY = 1 << lib._UFFDIO_COPY
    ZEROPAGE = 1 << lib._UFFDIO_ZEROPAGE
    MOVE = 1 << lib._UFFDIO_MOVE
    WRITEPROTECT = 1 << lib._UFFDIO_WRITEPROTECT
    CONTINUE = 1 << lib._UFFDIO_CONTINUE
    POISON = 1 << lib._UFFDIO_POISON
    RWPROTECT = 1 << lib._UFFDIO_RWPROTECT
    SET_MODE = 1 << lib._UFFDIO_SET_MODE
    API = 1 << lib._UFFDIO_API


class PagefaultFlag(IntFlag, boundary=KEEP):
    """`flags` of a page-fault event; neither WP nor MINOR nor RWP means a missing fault."""

    WRITE = lib.UFFD_PAGEFAULT_FLAG_WRITE
    WP = lib.UFFD_PAGEFAULT_FLAG_WP
    MINOR = lib.UFFD_PAGEFAULT_FLAG_MINOR
    RWP = lib.UFFD_PAGEFAULT_FLAG_RWP


class EventCode(IntEnum):
    """The `event` byte of a message read from a userfaultfd."""

    PAGEFAULT = lib.UFFD_EVENT_PAGEFAULT
    FORK = lib.UFFD_EVENT_FORK
    REMAP = lib.UFFD_EVENT_REMAP
    REMOVE = lib.UFFD_EVENT_REMOVE
    UNMAP = lib.UFFD_EVENT_UNMAP


@dataclass(frozen=True, slots=True)
class Pagefault:
    """A thread waits for a page.

    `address` is page-aligned unless Feature.EXACT_ADDRESS was asked for; `thread_id` is 0 without
    Feature.THREAD_ID.  One access may send several of these (Linux resends after a signal).
    """

    address: int
    flags: PagefaultFlag
    thread_id: int

    def __repr__(self) -> str:
        return f"Pagefault(address={self.address:#x}, flags={self.flags!r}, tid={self.thread_id})"


@dataclass(frozen=True, slots=True)
class Fork:
    """The owner forked; `uffd` governs the child's copy of the registered ranges and is yours."""

    uffd: Userfaultfd


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
    """The mapping of [start, end) is gone (munmap, or the old place after an mremap)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """An event this version has no class for: its code and the whole 32-byte message."""

    code: int
    raw: bytes


Event = Pagefault | Fork | Remap | Remove | Unmap | UnknownEvent

_HEAD = struct.Struct("=B7x")
_ARGUMENTS = struct.Struct("=QQQ")


def message_code(raw: bytes) -> int:
    """Return the event byte of one 32-byte message."""
    return int(_HEAD.unpack_from(raw)[0])


def fork_fd(raw: bytes) -> int:
    """Return the file descriptor that a FORK message installed in the reading process."""
    return int(_ARGUMENTS.unpack_from(raw, _HEAD.size)[0]) & 0xFFFFFFFF


def parse_event(raw: bytes) -> Event:
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


class PageCategory(IntFlag, boundary=KEEP):
    """Page categories of PAGEMAP_SCAN (PAGE_IS_* in the kernel's documentation)."""

    WPALLOWED = lib.UFFD_PAGE_IS_WPALLOWED
    WRITTEN = lib.UFFD_PAGE_IS_WRITTEN
    FILE = lib.UFFD_PAGE_IS_FILE
    PRESENT = lib.UFFD_PAGE_IS_PRESENT
    SWAPPED = lib.UFFD_PAGE_IS_SWAPPED
    PFNZERO = lib.UFFD_PAGE_IS_PFNZERO
    HUGE = lib.UFFD_PAGE_IS_HUGE
    SOFT_DIRTY = lib.UFFD_PAGE_IS_SOFT_DIRTY
    GUARD = lib.UFFD_PAGE_IS_GUARD
    ACCESSED = lib.UFFD_PAGE_IS_ACCESSED


class ScanFlag(IntFlag, boundary=KEEP):
    """Flags of PAGEMAP_SCAN: protect what matched; refuse ranges that are not WP_ASYNC."""

    WP_MATCHING = lib.UFFD_PM_SCAN_WP_MATCHING
    CHECK_WPASYNC = lib.UFFD_PM_SCAN_CHECK_WPASYNC


class PageBit(IntFlag, boundary=KEEP):
    """Bits of a /proc/PID/pagemap entry (PM_* in fs/proc/task_mmu.c).

    SWAP is also set for markers, which hold no data: of write-protected pages that are not
    mapped (with UFFD_WP), of poisoned and of guard pages.  `residency` tells them apart.
    """

    SOFT_DIRTY = lib.UFFD_PM_SOFT_DIRTY
    MMAP_EXCLUSIVE = lib.UFFD_PM_MMAP_EXCLUSIVE
    UFFD_WP = lib.UFFD_PM_UFFD_WP
    GUARD_REGION = lib.UFFD_PM_GUARD_REGION
    FILE = lib.UFFD_PM_FILE
    SWAP = lib.UFFD_PM_SWAP
    PRESENT = lib.UFFD_PM_PRESENT
