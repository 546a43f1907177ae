"""What cases and tests need from the kernel, the user and the machine.

A `Need` that is not met raises `Lack` with a reason that says what was found, which pytest shows
as a skip. `PYUFFD_TESTS=require` turns every skip into a failure, except for the needs named in
`PYUFFD_TESTS_MAY_LACK` (their keys, separated by spaces: `RWP`, `swap`, `hugepages-1048576kB`,
...).

The kernel is asked with plain syscalls, not with the code under test.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

from pyuffd.testing._opening import only_user_mode, open_userfaultfd

_UFFD_API = 0xAA
_EVENT_FORK = 1 << 1
_WP_HUGETLBFS_SHMEM = 1 << 12
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_DEVICE = "/dev/userfaultfd"
_MFD_HUGETLB = 0x4

HUGE_PAGE = 2 << 20
_THP = Path("/sys/kernel/mm/transparent_hugepage")

CAPABILITIES = {
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_IPC_LOCK": 14,
    "CAP_CHECKPOINT_RESTORE": 40,
}


@dataclass(frozen=True)
class Need:
    """A condition of a test; `missing` returns the keys that are lacking and what was found."""

    what: str
    missing: Callable[[], tuple[list[str], str]]

    def check(self) -> None:
        """Raise Lack if the need is not met."""
        keys, found = self.missing()
        if keys:
            raise Lack(keys, f"needs {self.what}; {found}")


class Lack(Exception):
    """A need is not met: its keys, and a reason that says what was found."""

    def __init__(self, keys: list[str], reason: str) -> None:
        super().__init__(reason)
        self.keys = keys
        self.reason = reason

    @property
    def may_be(self) -> bool:
        """Whether PYUFFD_TESTS_MAY_LACK names all of its keys."""
        allowed = os.environ.get("PYUFFD_TESTS_MAY_LACK", "").split()
        return bool(self.keys) and all(key in allowed for key in self.keys)


def strict() -> bool:
    """Return whether PYUFFD_TESTS asks that nothing is skipped."""
    mode = os.environ.get("PYUFFD_TESTS", "")
    if mode not in {"", "require"}:
        raise ValueError(f"PYUFFD_TESTS={mode!r}: only 'require' is known")
    return mode == "require"


def needs(feature: IntFlag) -> Need:
    """The kernel offers these userfaultfd feature bits to this user."""

    def missing() -> tuple[list[str], str]:
        offered = kernel_features()
        lacking = int(feature) & ~offered
        if not lacking and int(feature) & _EVENT_FORK and not _may_follow_forks():
            return ["CAP_SYS_PTRACE"], "the kernel refuses EVENT_FORK without CAP_SYS_PTRACE"
        return _names(feature, lacking), f"the kernel offers {offered:#x}"

    return Need(f"Feature.{feature.name} ({int(feature):#x})", missing)


def needs_ioctl(ioctl: IntFlag, memory: str = "anon", mode: int = 1, features: int = 0) -> Need:
    """UFFDIO_REGISTER of this memory type in this mode returns these ioctl bits.

    Args:
        ioctl: bits of the mask that UFFDIO_REGISTER returns.
        memory: one of `MEMORY_TYPES`.
        mode: register mode; 1 is MISSING.
        features: features to enable before registering.
    """

    def missing() -> tuple[list[str], str]:
        mask = range_ioctls(memory, int(mode), int(features))
        lacking = int(ioctl) & ~mask
        return _names(
            ioctl, lacking
        ), f"registering {memory} in mode {int(mode):#x} gives {mask:#x}"

    return Need(f"Ioctl.{ioctl.name} ({int(ioctl):#x}) on {memory}", missing)


def needs_privilege(*capabilities: str) -> Need:
    """This process has these capabilities (CAP_SYS_ADMIN if none is named)."""
    wanted = capabilities or ("CAP_SYS_ADMIN",)

    def missing() -> tuple[list[str], str]:
        held = _effective_capabilities()
        lacking = [name for name in wanted if not held >> CAPABILITIES[name] & 1]
        return lacking, f"uid {os.geteuid()} has {held:#x}"

    return Need(" and ".join(wanted), missing)


def needs_kernel_faults() -> Need:
    """This user may handle the faults of system calls too, not only those of user code."""

    def missing() -> tuple[list[str], str]:
        kernel_features()  # or there are none
        found = "this user may handle those of user code only" if only_user_mode() else ""
        return (["kernel-faults"] if found else []), found

    return Need("faults of system calls", missing)


def needs_hugepages(count: int, size: int = HUGE_PAGE) -> Need:
    """This many huge pages of this size (bytes) are free for this test process."""
    key = f"hugepages-{size >> 10}kB"

    def missing() -> tuple[list[str], str]:
        free = free_hugepages(size)
        return ([key] if free < count else []), f"{free} are free"

    return Need(f"{count} huge pages of {size >> 10} KiB", missing)


def needs_swap() -> Need:
    """Some swap is on."""

    def missing() -> tuple[list[str], str]:
        lines = Path("/proc/swaps").read_text().splitlines()[1:]
        return ([] if lines else ["swap"]), "/proc/swaps is empty"

    return Need("swap", missing)


def needs_device() -> Need:
    """/dev/userfaultfd is there and may be opened."""

    def missing() -> tuple[list[str], str]:
        found = "" if os.access(_DEVICE, os.R_OK | os.W_OK) else f"{_DEVICE} cannot be opened"
        return (["device"] if found else []), found

    return Need(_DEVICE, missing)


def needs_thp() -> Need:
    """Memory that asks for it gets transparent huge pages."""

    def missing() -> tuple[list[str], str]:
        try:
            enabled = (_THP / "enabled").read_text().strip()
        except FileNotFoundError:
            return ["THP"], "there is no CONFIG_TRANSPARENT_HUGEPAGE"
        return (["THP"] if "[never]" in enabled else []), f"enabled is {enabled}"

    return Need("transparent huge pages", missing)


def needs_hugetlb_mremap() -> Need:
    """The kernel can mremap hugetlb memory (Linux 5.16), told by what came with 5.19."""

    def missing() -> tuple[list[str], str]:
        offered = kernel_features()
        can = offered & _WP_HUGETLBFS_SHMEM
        return ([] if can else ["hugetlb-mremap"]), f"the kernel offers {offered:#x}"

    return Need("mremap of hugetlb memory", missing)


def free_hugepages(size: int = HUGE_PAGE) -> int:
    """Return how many huge pages of this size nobody uses or has reserved."""
    folder = Path(f"/sys/kernel/mm/hugepages/hugepages-{size >> 10}kB")
    try:
        free = int((folder / "free_hugepages").read_text())
        return free - int((folder / "resv_hugepages").read_text())
    except FileNotFoundError:
        return 0


@functools.cache
def kernel_features() -> int:
    """Return the feature mask of a probe userfaultfd."""
    fd = _open_userfaultfd()
    try:
        return _handshake(fd, 0)
    finally:
        os.close(fd)


@functools.cache
def _may_follow_forks() -> bool:
    fd = _open_userfaultfd()
    try:
        _handshake(fd, _EVENT_FORK)
    except PermissionError:
        return False
    finally:
        os.close(fd)
    return True


def _anonymous(length: int) -> int:
    return _map(length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)


def _memfd(length: int, *, shared: bool, huge: bool) -> int:
    fd = os.memfd_create("need", os.MFD_CLOEXEC | (_MFD_HUGETLB if huge else 0))
    try:
        os.ftruncate(fd, length)
        return _map(length, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE, fd)
    finally:
        os.close(fd)


MEMORY_TYPES: dict[str, tuple[int, Callable[[int], int]]] = {
    "anon": (4096, _anonymous),
    "shmem": (4096, lambda length: _memfd(length, shared=True, huge=False)),
    "shmem-private": (4096, lambda length: _memfd(length, shared=False, huge=False)),
    "hugetlb": (HUGE_PAGE, lambda length: _memfd(length, shared=True, huge=True)),
    "hugetlb-private": (HUGE_PAGE, lambda length: _memfd(length, shared=False, huge=True)),
}


@functools.cache
def range_ioctls(memory: str, mode: int, features: int = 0) -> int:
    """Return the mask that UFFDIO_REGISTER gives for a memory type and mode; 0 if it refuses."""
    length, make = MEMORY_TYPES[memory]
    if length == HUGE_PAGE:
        needs_hugepages(1).check()
    fd = _open_userfaultfd()
    try:
        _handshake(fd, features)
        address = make(length)
        try:
            argument = bytearray(struct.pack("<4Q", address, length, mode, 0))
            fcntl.ioctl(fd, _UFFDIO_REGISTER, argument)
            return int(struct.unpack("<4Q", argument)[3])
        except OSError:
            return 0
        finally:
            _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))
    finally:
        os.close(fd)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.syscall.restype = ctypes.c_long
    return libc


def _map(length: int, flags: int, fd: int) -> int:
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = _libc().mmap(None, ctypes.c_size_t(length), protection, flags, fd, ctypes.c_long(0))
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(address)


def _open_userfaultfd() -> int:
    try:
        return open_userfaultfd()
    except OSError as error:
        raise Lack(["userfaultfd"], f"needs a userfaultfd; {error.strerror}") from None


def _handshake(fd: int, features: int) -> int:
    argument = bytearray(struct.pack("<3Q", _UFFD_API, features, 0))
    fcntl.ioctl(fd, _UFFDIO_API, argument)
    return int(struct.unpack("<3Q", argument)[1])


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _names(flags: IntFlag, lacking: int) -> list[str]:
    """Return the names of the bits in `lacking`."""
    bits = [1 << at for at in range(lacking.bit_length()) if lacking >> at & 1]
    return [type(flags)(bit).name or hex(bit) for bit in bits]
