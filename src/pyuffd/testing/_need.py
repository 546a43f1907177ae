"""What cases and tests need of the kernel, the user and the machine.

A `Need` that is not met raises `Lack` with a reason that says what was found; pytest shows it as a
skip. `PYUFFD_TESTS=require` turns every skip into a failure, except for the needs named in
`PYUFFD_TESTS_MAY_LACK` (their keys, separated by spaces: `RWP`, `swap`, `hugepages-1048576kB`,
...).

Plain system calls ask the kernel about userfaultfd, not the code under test.
"""

from __future__ import annotations

import fcntl
import functools
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

from pyuffd.testing._huge_pages import free_hugepages
from pyuffd.testing._memory_types import HUGE_PAGE, MEMORY_TYPES
from pyuffd.testing._opening import O_FLAGS, only_user_mode, open_syscall, open_userfaultfd

_UFFD_API = 0xAA
_EVENT_FORK = 1 << 1
_WP_HUGETLBFS_SHMEM = 1 << 12
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_DEVICE = "/dev/userfaultfd"
_THP = Path("/sys/kernel/mm/transparent_hugepage")

CAPABILITIES = {
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_NICE": 23,
    "CAP_SYS_RESOURCE": 24,
    "CAP_IPC_LOCK": 14,
    "CAP_CHECKPOINT_RESTORE": 40,
}


@dataclass(frozen=True)
class Need:
    """A condition of a test; `missing` returns the lacking keys, and what was found."""

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
    """Return whether PYUFFD_TESTS turns skips into failures."""
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
        found = "this user may handle only those of user code" if only_user_mode() else ""
        return (["kernel-faults"] if found else []), found

    return Need("faults of system calls", missing)


def needs_syscall() -> Need:
    """userfaultfd(2) gives this user descriptors for faults of system calls, not just the device.

    uid 0 without capabilities may open the device, and is refused by the system call.
    """

    def missing() -> tuple[list[str], str]:
        try:
            os.close(open_syscall(O_FLAGS))
        except OSError as error:
            return ["userfaultfd-syscall"], f"userfaultfd(2): {error.strerror}"
        return [], ""

    return Need("faults of system calls by userfaultfd(2)", missing)


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
    """/dev/userfaultfd exists and may be opened."""

    def missing() -> tuple[list[str], str]:
        found = "" if os.access(_DEVICE, os.R_OK | os.W_OK) else f"{_DEVICE} cannot be opened"
        return (["device"] if found else []), found

    return Need(_DEVICE, missing)


def needs_thp() -> Need:
    """Transparent huge pages are available to memory that asks for them."""

    def missing() -> tuple[list[str], str]:
        try:
            enabled = (_THP / "enabled").read_text().strip()
        except FileNotFoundError:
            return ["THP"], "there is no CONFIG_TRANSPARENT_HUGEPAGE"
        return (["THP"] if "[never]" in enabled else []), f"enabled is {enabled}"

    return Need("transparent huge pages", missing)


def needs_hugetlb_mremap() -> Need:
    """The kernel can mremap hugetlb memory (Linux 5.16); a feature of Linux 5.19 shows it."""

    def missing() -> tuple[list[str], str]:
        offered = kernel_features()
        can = offered & _WP_HUGETLBFS_SHMEM
        return ([] if can else ["hugetlb-mremap"]), f"the kernel offers {offered:#x}"

    return Need("mremap of hugetlb memory", missing)


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


@functools.cache
def range_ioctls(memory: str, mode: int, features: int = 0) -> int:
    """Return the mask that UFFDIO_REGISTER returns for a memory type and mode; 0 if it fails."""
    of = MEMORY_TYPES[memory]
    if of.is_hugetlb:
        needs_hugepages(1).check()
    fd = _open_userfaultfd()
    try:
        _handshake(fd, features)
        with of.make(of.page_size) as region:
            argument = bytearray(struct.pack("<4Q", region.start, region.length, mode, 0))
            try:
                fcntl.ioctl(fd, _UFFDIO_REGISTER, argument)
            except OSError:
                return 0
            return int(struct.unpack("<4Q", argument)[3])
    finally:
        os.close(fd)


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
