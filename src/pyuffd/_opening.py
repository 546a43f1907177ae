"""Open a userfaultfd by the system call or the device, and inspect a received one (layer L2)."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from pyuffd import _refusals, lowlevel
from pyuffd._abi import USER_MODE_ONLY, Feature, Ioctl
from pyuffd._errors import (
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
    limit_met,
    raise_errno,
)
from pyuffd._machine import raise_without_procfs
from pyuffd._owned import Descriptor

FDINFO_FEATURES_MASK = 0x7FFF_FFFF  # bit 31 is the kernel's own UFFD_FEATURE_INITIALIZED


def probe_api(flags: int) -> tuple[Feature, Ioctl]:
    """Return the features and ioctls of this kernel, asked on a temporary descriptor."""
    with open_uffd(flags) as descriptor:
        features, ioctls = lowlevel.api(descriptor.number, 0)
    return Feature(features), Ioctl(ioctls)


def open_uffd(flags: int) -> Descriptor:
    """Open a userfaultfd by the system call or, if that is refused, by the device."""
    refusals: list[UffdOSError] = []
    for attempt in (lowlevel.owned_syscall, lowlevel.owned_device):
        try:
            return attempt(flags)
        except UffdOSError as error:
            refusals.append(error)
    codes = [error.errno or errno.EPERM for error in refusals]
    for code in codes:
        # Where the device is for this user, the system call is refused first.
        if hint := limit_met(code):
            raise_errno("userfaultfd", code, hint=hint)
    by_syscall, by_device = codes
    hint = _refusals.hint(by_syscall, by_device, privilege_would_do=_would_with_privilege(flags))
    raise_errno("userfaultfd", by_syscall, hint=hint)


def open_waiting() -> Descriptor | None:
    """Open a userfaultfd without features, to let threads wait for a moment; None if refused.

    Where it may be for user mode only, the system calls of those threads fail with EFAULT.
    """
    for flags in (os.O_CLOEXEC, os.O_CLOEXEC | USER_MODE_ONLY):
        with suppress(UffdPermissionError, UnsupportedFeatureError):
            descriptor = open_uffd(flags)
            lowlevel.api(descriptor.number, 0)
            return descriptor
    return None


def _would_with_privilege(flags: int) -> bool:
    """Return whether a lack of privilege is the reason: USER_MODE_ONLY, which needs none, works."""
    if flags & USER_MODE_ONLY:
        return False
    try:
        lowlevel.owned_syscall(flags | USER_MODE_ONLY).close()
    except UffdOSError as error:
        return error.errno == errno.EINVAL  # before Linux 5.11
    return True


def _read_text(path: str) -> str:
    with open(path, encoding="utf-8") as file:  # not pathlib, which is slow to import
        return file.read()


def negotiated(fd: int) -> tuple[Feature, Ioctl]:
    """Return the features and ioctls of a userfaultfd whose handshake is done."""
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        raise_without_procfs(f"read /proc/self/fd/{fd}", error)
        raise ValueError(f"{fd} is not an open file descriptor") from error
    if target != "anon_inode:[userfaultfd]":
        raise ValueError(f"file descriptor {fd} is {target}, not a userfaultfd")
    for line in _read_text(f"/proc/self/fdinfo/{fd}").splitlines():
        key, _, value = line.partition(":")
        if key == "API":
            _, features, ioctls = (int(field, 16) for field in value.strip().split(":"))
            if not features & ~FDINFO_FEATURES_MASK:
                raise ValueError(f"file descriptor {fd} has not done its UFFDIO_API handshake")
            return Feature(features & FDINFO_FEATURES_MASK), Ioctl(ioctls)
    raise ValueError(f"/proc/self/fdinfo/{fd} has no line about the userfaultfd's API")
