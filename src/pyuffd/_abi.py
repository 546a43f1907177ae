"""Flags and enums in the manual pages' words (layer L1).

The numbers come from the compiled shim, which keeps its own copy of the kernel's; nothing here
calls the kernel.  Bits without a name in this version are kept, printed and passed on.
"""

from __future__ import annotations

from pyuffd._enums import Flag, Number
from pyuffd._realized import lib

USER_MODE_ONLY = lib.UFFD_USER_MODE_ONLY


class Feature(Flag):
    """Feature bits of UFFDIO_API(2const): requested with `Userfaultfd(features=...)`.

    Attributes:
        PAGEFAULT_FLAG_WP: Write-protect faults are supported (RegisterMode.WP). Linux delivers them
            even if this bit is not requested.
        EVENT_FORK: A fork sends an event (`Fork`) with a userfaultfd for the child's memory. Needs
            CAP_SYS_PTRACE.
        EVENT_REMAP: mremap(2) sends an event (`Remap`), and the memory stays registered at its new
            place.
        EVENT_REMOVE: Dropping pages (MADV_DONTNEED, MADV_REMOVE) sends an event (`Remove`).
        MISSING_HUGETLBFS: Hugetlb memory can be registered for missing faults.
        MISSING_SHMEM: Shared memory can be registered for missing faults.
        EVENT_UNMAP: munmap(2) sends an event (`Unmap`).
        SIGBUS: A fault raises SIGBUS in the faulting thread and sends no message.
        THREAD_ID: Page-fault events name the faulting thread (`Pagefault.thread_id`).
        MINOR_HUGETLBFS: Hugetlb memory can be registered for minor faults.
        MINOR_SHMEM: Shared memory can be registered for minor faults.
        EXACT_ADDRESS: Page-fault events have the faulting address instead of that of its page.
        WP_HUGETLBFS_SHMEM: Shared memory and hugetlb memory can be write-protected.
        WP_UNPOPULATED: Missing anonymous pages can be write-protected too.
        POISON: UFFDIO_POISON is supported, which marks pages so that an access raises SIGBUS.
        WP_ASYNC: The kernel lifts write protection itself and sends no message; PAGEMAP_SCAN
            tells which pages were written (PageCategory.WRITTEN).
        MOVE: UFFDIO_MOVE is supported, which fills anonymous pages by moving other pages.
        RWP: Pages can be protected against reads too (RegisterMode.RWP; Linux 7.3).
        RWP_ASYNC: The kernel lifts that protection itself and sends no message (Linux 7.3).
    """

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


class RegisterMode(Flag):
    """Modes of UFFDIO_REGISTER(2const): which faults of a range are delivered.

    Attributes:
        MISSING: Accesses to missing pages.
        WP: Writes to pages that were write-protected with UFFDIO_WRITEPROTECT.
        MINOR: Accesses to pages that the page cache holds but this mapping does not map yet;
            shared memory and hugetlb memory only.
        RWP: Accesses of any kind to pages protected with UFFDIO_RWPROTECT (Linux 7.3).
    """

    MISSING = lib.UFFDIO_REGISTER_MODE_MISSING
    WP = lib.UFFDIO_REGISTER_MODE_WP
    MINOR = lib.UFFDIO_REGISTER_MODE_MINOR
    RWP = lib.UFFDIO_REGISTER_MODE_RWP


class CopyMode(Flag):
    """Modes of UFFDIO_COPY(2const).

    Attributes:
        DONTWAKE: Do not wake the threads that wait for the pages.
        WP: Map the pages write-protected; the range must be registered for RegisterMode.WP.
    """

    DONTWAKE = lib.UFFDIO_COPY_MODE_DONTWAKE
    WP = lib.UFFDIO_COPY_MODE_WP


class ZeropageMode(Flag):
    """Modes of UFFDIO_ZEROPAGE(2const).

    Attributes:
        DONTWAKE: Do not wake the threads that wait for the pages.
    """

    DONTWAKE = lib.UFFDIO_ZEROPAGE_MODE_DONTWAKE


class WriteprotectMode(Flag):
    """Modes of UFFDIO_WRITEPROTECT(2const); without WP the protection is removed.

    Attributes:
        WP: Protect the pages.
        DONTWAKE: Do not wake the threads that wait for the pages; not together with WP.
    """

    WP = lib.UFFDIO_WRITEPROTECT_MODE_WP
    DONTWAKE = lib.UFFDIO_WRITEPROTECT_MODE_DONTWAKE


class ContinueMode(Flag):
    """Modes of UFFDIO_CONTINUE(2const).

    Attributes:
        DONTWAKE: Do not wake the threads that wait for the pages.
        WP: Map the pages write-protected; the range must be registered for RegisterMode.WP.
    """

    DONTWAKE = lib.UFFDIO_CONTINUE_MODE_DONTWAKE
    WP = lib.UFFDIO_CONTINUE_MODE_WP


class PoisonMode(Flag):
    """Modes of UFFDIO_POISON(2const).

    Attributes:
        DONTWAKE: Do not wake the threads that wait for the pages.
    """

    DONTWAKE = lib.UFFDIO_POISON_MODE_DONTWAKE


class MoveMode(Flag):
    """Modes of UFFDIO_MOVE(2const).

    Attributes:
        DONTWAKE: Do not wake the threads that wait for the pages.
        ALLOW_SRC_HOLES: Skip source pages that are missing instead of failing with ENOENT.
    """

    DONTWAKE = lib.UFFDIO_MOVE_MODE_DONTWAKE
    ALLOW_SRC_HOLES = lib.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES


class RwprotectMode(Flag):
    """Modes of UFFDIO_RWPROTECT (Linux 7.3); without RWP the protection is removed.

    Attributes:
        RWP: Protect the pages against reads and writes.
        DONTWAKE: Do not wake the threads that wait for the pages; not together with RWP.
    """

    RWP = lib.UFFDIO_RWPROTECT_MODE_RWP
    DONTWAKE = lib.UFFDIO_RWPROTECT_MODE_DONTWAKE


class Ioctl(Flag):
    """The ioctls masks of UFFDIO_API and UFFDIO_REGISTER: bit n stands for ioctl number n.

    Attributes:
        REGISTER: `Userfaultfd.register`.
        UNREGISTER: `Userfaultfd.unregister`.
        WAKE: `Userfaultfd.wake`.
        COPY: `Userfaultfd.copy`.
        ZEROPAGE: `Userfaultfd.zeropage`; not for hugetlb memory.
        MOVE: `Userfaultfd.move`; Linux sets the bit for shared memory too, but refuses the ioctl.
        WRITEPROTECT: `Userfaultfd.writeprotect`; only of ranges registered for WP.
        CONTINUE: `Userfaultfd.continue_`; only of shared memory registered for MINOR.
        POISON: `Userfaultfd.poison`.
        RWPROTECT: `Userfaultfd.rwprotect` (Linux 7.3).
        SET_MODE: `Userfaultfd.set_mode` (Linux 7.3).
        API: The handshake, which opening a userfaultfd does.
    """

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


class PagefaultFlag(Flag):
    """`flags` of a page-fault event; neither WP nor MINOR nor RWP means a missing fault.

    Attributes:
        WRITE: The access was a write.
        WP: A write to a page that is write-protected.
        MINOR: The page cache holds the page, but this mapping does not map it.
        RWP: An access to a page protected with UFFDIO_RWPROTECT (Linux 7.3).
    """

    WRITE = lib.UFFD_PAGEFAULT_FLAG_WRITE
    WP = lib.UFFD_PAGEFAULT_FLAG_WP
    MINOR = lib.UFFD_PAGEFAULT_FLAG_MINOR
    RWP = lib.UFFD_PAGEFAULT_FLAG_RWP


class EventCode(Number):
    """The `event` byte of a message read from a userfaultfd.

    Attributes:
        PAGEFAULT: A thread waits for a page (`Pagefault`).
        FORK: The owner forked (`Fork`).
        REMAP: Registered memory moved (`Remap`).
        REMOVE: Pages were dropped (`Remove`).
        UNMAP: Memory was unmapped (`Unmap`).
    """

    PAGEFAULT = lib.UFFD_EVENT_PAGEFAULT
    FORK = lib.UFFD_EVENT_FORK
    REMAP = lib.UFFD_EVENT_REMAP
    REMOVE = lib.UFFD_EVENT_REMOVE
    UNMAP = lib.UFFD_EVENT_UNMAP


class PageCategory(Flag):
    """Page categories of PAGEMAP_SCAN (PAGE_IS_* in the kernel's documentation).

    Attributes:
        WPALLOWED: The page lies in a range that is registered for write protection.
        WRITTEN: It was written since it was protected, or it was never protected.
        FILE: It is mapped from a file or from shared memory.
        PRESENT: It is in memory and mapped.
        SWAPPED: It is on swap, or a marker is in its place (see `PageBit`).
        PFNZERO: It is the zero page.
        HUGE: It is part of a huge page.
        SOFT_DIRTY: It was written since its soft-dirty bit was cleared by /proc/PID/clear_refs.
        GUARD: It belongs to a guard region (MADV_GUARD_INSTALL).
        ACCESSED: It was accessed since it was protected (Linux 7.3).
    """

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


class ScanFlag(Flag):
    """Flags of PAGEMAP_SCAN.

    Attributes:
        WP_MATCHING: Write-protect the pages that matched.
        CHECK_WPASYNC: Fail (EPERM) on ranges that are not registered with Feature.WP_ASYNC.
    """

    WP_MATCHING = lib.UFFD_PM_SCAN_WP_MATCHING
    CHECK_WPASYNC = lib.UFFD_PM_SCAN_CHECK_WPASYNC


class PageBit(Flag):
    """Bits of a /proc/PID/pagemap entry (PM_* in fs/proc/task_mmu.c).

    Attributes:
        SOFT_DIRTY: Written since this bit was cleared by /proc/PID/clear_refs.
        MMAP_EXCLUSIVE: No other process maps the page.
        UFFD_WP: Write-protected through a userfaultfd.
        GUARD_REGION: Part of a guard region (MADV_GUARD_INSTALL).
        FILE: Mapped from a file or from shared memory.
        SWAP: On swap. It is also set for markers, which hold no data: those of write-protected
            pages that are not mapped (with UFFD_WP), of poisoned pages and of guard pages.
            `residency` tells them apart.
        PRESENT: In memory and mapped.
    """

    SOFT_DIRTY = lib.UFFD_PM_SOFT_DIRTY
    MMAP_EXCLUSIVE = lib.UFFD_PM_MMAP_EXCLUSIVE
    UFFD_WP = lib.UFFD_PM_UFFD_WP
    GUARD_REGION = lib.UFFD_PM_GUARD_REGION
    FILE = lib.UFFD_PM_FILE
    SWAP = lib.UFFD_PM_SWAP
    PRESENT = lib.UFFD_PM_PRESENT
