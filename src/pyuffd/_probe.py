"""What this kernel and this user can do with userfaultfd (layer L2).

`probe` tries: it opens userfaultfds, does the handshake, and registers scratch ranges that are
never touched.  Nothing is derived from the kernel's version.  `pyuffd doctor` tells what the
machine has (huge pages, swap, limits).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from pyuffd import lowlevel
from pyuffd._abi import USER_MODE_ONLY, Feature, Ioctl, PageCategory, RegisterMode
from pyuffd._errors import UffdOSError
from pyuffd._owned import Descriptor, MappedMemory
from pyuffd._pages import HUGE_PAGE_2M, PAGE_SIZE
from pyuffd._refusals import explain_device, explain_syscall

_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_MAP_NORESERVE = 0x4000  # in the mmap module since Python 3.13
_MFD_HUGETLB_2MB = 0x4 | 21 << 26  # MFD_HUGETLB | MFD_HUGE_2MB; not in every libc's os module

# name: (page size, MAP_* sharing, flags of its memfd or None)
_MEMORY_TYPES: dict[str, tuple[int, int, int | None]] = {
    "anon": (PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, None),
    "shmem": (PAGE_SIZE, mmap.MAP_SHARED, 0),
    "shmem-private": (PAGE_SIZE, mmap.MAP_PRIVATE, 0),
    "hugetlb": (HUGE_PAGE_2M, mmap.MAP_SHARED, _MFD_HUGETLB_2MB),
    "hugetlb-private": (HUGE_PAGE_2M, mmap.MAP_PRIVATE, _MFD_HUGETLB_2MB),
}

_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_SCAN_ARGUMENT = struct.Struct("=12Q")


@dataclass(frozen=True, slots=True)
class OpenSupport:
    """One way to open a userfaultfd.

    Attributes:
        works: Whether this process can now open one this way.
        errno: The kernel's errno; 0 if it works.
        reason: Why it does not work; "" if it does.
        command: The command by which root makes it work; "" if there is none.
    """

    works: bool
    errno: int = 0
    reason: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class RegisterSupport:
    """The result of UFFDIO_REGISTER for a scratch range.

    Attributes:
        ioctls: The ioctls that the range supports; empty if it was refused.
        errno: The kernel's errno; 0 if it was registered.
    """

    ioctls: Ioctl
    errno: int = 0


@dataclass(frozen=True, slots=True)
class KernelSupport:
    """The result of `probe`.

    Attributes:
        release: The kernel's release string; information only.
        features: The mask of UFFDIO_API, including bits without a name here.
        refused: Features that the kernel supports but does not grant to this process (EPERM).
        ioctls: The ioctls of the descriptor itself.
        opens: The ways to open a userfaultfd: "syscall", "device" and "user_mode_only" (the system
            call with UFFD_USER_MODE_ONLY).
        memory: The support by memory type ("anon", "shmem", "shmem-private", "hugetlb",
            "hugetlb-private") and register mode, one mode at a time. Hugetlb needs no free huge
            page for this.
        scan_categories: The categories that PAGEMAP_SCAN supports; empty without PAGEMAP_SCAN.
    """

    release: str
    features: Feature
    refused: Feature
    ioctls: Ioctl
    opens: Mapping[str, OpenSupport]
    memory: Mapping[str, Mapping[RegisterMode, RegisterSupport]]
    scan_categories: PageCategory

    @property
    def usable(self) -> bool:
        """Whether a userfaultfd can be opened at all."""
        return any(way.works for way in self.opens.values())

    @property
    def kernel_faults(self) -> bool:
        """Whether faults of system calls can be handled too, besides those of user code."""
        return self.opens["syscall"].works or self.opens["device"].works

    @property
    def unknown_features(self) -> Feature:
        """The supported bits that `Feature` has no name for."""
        return Feature(int(self.features) & ~sum(int(feature) for feature in Feature))

    @property
    def pagemap_scan(self) -> bool:
        """Whether /proc/PID/pagemap supports PAGEMAP_SCAN."""
        return bool(self.scan_categories)


def probe() -> KernelSupport:
    """Find out what this kernel lets this process do with userfaultfd.

    A refusal raises no exception: if no userfaultfd can be opened, `features` is empty, `opens`
    tells what would help, and every register mode has the errno of the system call.

    Returns:
        The result; nothing is kept open or mapped.

    Kernel: userfaultfd(2), UFFDIO_API(2const), UFFDIO_REGISTER(2const), ioctl_pagemap_scan(2).
    GIL: released in every userfaultfd call.  Threads: safe.  Blocks: no.

    Example:
        >>> from pyuffd import Feature, probe
        >>> support = probe()
        >>> support.usable and Feature.SIGBUS in support.features
        True
    """
    opens = _probe_opens()
    way = next((name for name, open_ in opens.items() if open_.works), None)
    features, ioctls, refused = Feature(0), Ioctl(0), Feature(0)
    if way is None:
        code = opens["syscall"].errno
        memory = {
            name: {mode: RegisterSupport(Ioctl(0), code) for mode in RegisterMode}
            for name in _MEMORY_TYPES
        }
    else:
        with _open(way) as uffd:
            fd = uffd.number
            features_found, ioctls_found = lowlevel.api(fd, 0)
        features, ioctls = Feature(features_found), Ioctl(ioctls_found)
        refused = _probe_refused(way, features)
        memory = _probe_memory(way, features)
    return KernelSupport(
        release=os.uname().release,
        features=features,
        refused=refused,
        ioctls=ioctls,
        opens=opens,
        memory=memory,
        scan_categories=_probe_scan(),
    )


def _open(way: str) -> Descriptor:
    match way:
        case "syscall":
            return lowlevel.owned_syscall(_FLAGS)
        case "device":
            return lowlevel.owned_device(_FLAGS)
        case _:
            return lowlevel.owned_syscall(_FLAGS | USER_MODE_ONLY)


def _probe_opens() -> dict[str, OpenSupport]:
    codes = {}
    for way in ("syscall", "device", "user_mode_only"):
        try:
            _open(way).close()
            codes[way] = 0
        except UffdOSError as error:
            codes[way] = error.errno or errno.EIO
    # USER_MODE_ONLY needs no privilege: if it is refused too, the reason is another one.
    privilege_would_do = codes["user_mode_only"] in (0, errno.EINVAL)
    return {
        way: OpenSupport(True) if not code else OpenSupport(False, code, *explain(code))
        for way, code, explain in (
            ("syscall", codes["syscall"], lambda code: explain_syscall(code, privilege_would_do)),
            ("device", codes["device"], explain_device),
            ("user_mode_only", codes["user_mode_only"], lambda code: explain_syscall(code, False)),
        )
    }


def _probe_refused(way: str, features: Feature) -> Feature:
    """Return the supported features that the handshake refuses with EPERM."""
    refused = 0
    for bit in range(int(features).bit_length()):
        if not int(features) >> bit & 1:
            continue
        with _open(way) as uffd:
            fd = uffd.number
            try:
                lowlevel.api(fd, 1 << bit)
            except UffdOSError as error:
                if error.errno == errno.EPERM:
                    refused |= 1 << bit
    return Feature(refused)


def _probe_memory(way: str, features: Feature) -> dict[str, dict[RegisterMode, RegisterSupport]]:
    memory: dict[str, dict[RegisterMode, RegisterSupport]] = {name: {} for name in _MEMORY_TYPES}
    for mode in RegisterMode:
        with _open(way) as uffd:
            fd = uffd.number
            # RWP is the only mode that must be requested in the handshake.
            lowlevel.api(fd, features & Feature.RWP if mode == RegisterMode.RWP else 0)
            for name in _MEMORY_TYPES:
                memory[name][mode] = _register_scratch(fd, name, mode)
    return memory


def _register_scratch(fd: int, memory: str, mode: RegisterMode) -> RegisterSupport:
    length, sharing, memfd_flags = _MEMORY_TYPES[memory]
    memfd = Descriptor()
    try:
        if memfd_flags is not None:
            memfd = Descriptor.memfd("pyuffd-probe", os.MFD_CLOEXEC | memfd_flags)
            os.ftruncate(memfd.number, length)
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        # Without a reservation hugetlb maps on a machine that has no huge pages.
        flags = sharing | _MAP_NORESERVE
        with MappedMemory.map(length, prot, flags, memfd.number) as scratch:
            return RegisterSupport(Ioctl(lowlevel.register(fd, scratch.start, length, mode)))
    except OSError as error:
        return RegisterSupport(Ioctl(0), error.errno or errno.EIO)
    finally:
        memfd.close()


def _probe_scan() -> PageCategory:
    """Return the categories that PAGEMAP_SCAN of an empty range accepts."""
    known = 0
    try:
        pagemap = Descriptor.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        return PageCategory(0)
    with pagemap:
        for category in PageCategory:
            argument = _SCAN_ARGUMENT.pack(_SCAN_ARGUMENT.size, *[0] * 8, category, 0, category)
            try:
                fcntl.ioctl(pagemap.number, _PAGEMAP_SCAN, argument)
            except OSError:
                continue
            known |= category
    return PageCategory(known)
