"""Why a userfaultfd cannot be opened here, and what would change it (layer L2).

`pyuffd doctor` and the error of `Userfaultfd()` both use these texts.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import Literal

from pyuffd import lowlevel
from pyuffd._machine import read_text

YAMA = "/proc/sys/kernel/yama/ptrace_scope"
SYSCTL = "/proc/sys/vm/unprivileged_userfaultfd"
_SECCOMP_FILTER = "2"
_ALL_USERS = ["0", "0", "4294967295"]  # the uid_map of the initial user namespace
_USER_MODE = (
    "or user_mode_only=True, which needs no privilege but makes system calls that touch a missing"
    " page fail with EFAULT"
)


def hint(by_syscall: int, by_device: int, *, privilege_would_do: bool) -> str:
    """Return what to do after the system call and the device failed with these errnos."""
    parts = []
    for way, (reason, command) in (
        ("the system call", explain_syscall(by_syscall, privilege_would_do)),
        (lowlevel.DEVICE, explain_device(by_device)),
    ):
        parts.append(f"{way}: {reason}" + (f" (`{command}`)" if command else ""))
    if privilege_would_do:
        parts.append(_USER_MODE)
    return "; ".join(parts)


def explain_syscall(code: int, privilege_would_do: bool) -> tuple[str, str]:
    """Return why the system call was refused, and the command that would change it."""
    if code == errno.EPERM and privilege_would_do:
        return (
            f"no CAP_SYS_PTRACE{_where()}, and vm.unprivileged_userfaultfd is {_sysctl()}",
            "sysctl vm.unprivileged_userfaultfd=1",
        )
    if code in (errno.EPERM, errno.EACCES, errno.ENOSYS) and _has_seccomp_filter():
        return (
            "a seccomp filter refuses the system call, as those of containers do; profile.json"
            " must be the runtime's own profile with userfaultfd among the allowed calls",
            f"docker run --security-opt seccomp=profile.json --device {lowlevel.DEVICE}",
        )
    if code == errno.ENOSYS:
        return "this kernel is built without CONFIG_USERFAULTFD", ""
    if code == errno.EINVAL:
        return "this kernel does not support UFFD_USER_MODE_ONLY (Linux 5.11)", ""
    if code in (errno.EPERM, errno.EACCES):
        return "a security module refuses the system call", ""
    return os.strerror(code), ""


def explain_device(code: int) -> tuple[str, str]:
    device = lowlevel.DEVICE
    if code == errno.EACCES:
        found = os.stat(device)
        return (
            f"it is {stat.filemode(found.st_mode)} of uid {found.st_uid}, gid {found.st_gid}",
            f"chown {initial_id('uid', os.geteuid())} {device}",
        )
    if code == errno.EPERM:
        return (
            "the device control group, perhaps a container's, refuses it",
            f"docker run --device {device}",
        )
    if code == errno.ENOENT:
        minor = _misc_minor("userfaultfd")
        if minor is None:
            return "this kernel has no such device (Linux 6.1)", ""
        if _has_seccomp_filter():
            return (
                "the kernel has the device, but there is no node for it, as in containers",
                f"docker run --device {device}",
            )
        return (
            "the kernel has the device, but there is no node for it",
            f"mknod -m 600 {device} c 10 {minor}",
        )
    return os.strerror(code), ""


def initial_id(kind: Literal["uid", "gid"], number: int) -> int:
    """Return a user or group id as the parent of this user namespace, mostly the host, has it.

    A command that root of the host runs needs that one. `number` itself if it cannot be told.
    """
    with suppress(OSError, ValueError):
        for line in read_text(f"/proc/self/{kind}_map").splitlines():
            first, parent, count = map(int, line.split())
            if first <= number < first + count:
                return parent + number - first
    return number


def why_no_ptrace(pid: int, *, attaching: bool) -> str:
    """Return why this process may not read or trace another one, and what would change it.

    `attaching`: it was to be traced, which Yama restricts too.
    """
    as_root = "run as root, or with CAP_SYS_PTRACE"
    owners: list[str] = []
    with suppress(OSError):
        for line in read_text(f"/proc/{pid}/status").splitlines():
            if line.startswith("Uid:"):
                owners = line.split()[1:4]
    if owners and set(owners) != {str(os.geteuid())}:
        return f"process {pid} belongs to another user (uid {owners[0]}): {as_root}"
    scope = ""
    with suppress(OSError):
        scope = read_text(YAMA).strip()
    if attaching and scope in ("1", "2"):
        or_yama = ", or `sysctl kernel.yama.ptrace_scope=0`"
        return f"kernel.yama.ptrace_scope is {scope}: {as_root}{or_yama}"
    if attaching and scope == "3":
        return "kernel.yama.ptrace_scope is 3: no process may be traced until the next boot"
    return (
        f"process {pid} may not be read or traced by its own user (it has more privileges than this"
        f" one, or is not dumpable): {as_root}"
    )


def _where() -> str:
    """Return " in the initial user namespace" from another one, whose root lacks CAP_SYS_PTRACE."""
    try:
        initial = read_text("/proc/self/uid_map").split() == _ALL_USERS
    except OSError:
        initial = True
    return "" if initial else " in the initial user namespace (this is another one)"


def _sysctl() -> str:
    try:
        return read_text(SYSCTL).strip()
    except OSError:
        return "not there"


def _has_seccomp_filter() -> bool:
    for line in read_text("/proc/self/status").splitlines():
        key, _, value = line.partition(":")
        if key == "Seccomp":
            return value.strip() == _SECCOMP_FILTER
    return False


def _misc_minor(name: str) -> int | None:
    try:
        lines = read_text("/proc/misc").splitlines()
    except OSError:
        return None
    for line in lines:
        minor, _, device = line.strip().partition(" ")
        if device == name:
            return int(minor)
    return None
