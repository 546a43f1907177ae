"""A userfaultfd for the memory of a running process, without its cooperation."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from pyuffd import _remote_calls as calls
from pyuffd._abi import USER_MODE_ONLY, Feature, PageBit
from pyuffd._arguments import check_flags, check_seconds
from pyuffd._errors import (
    NEARLY,
    UffdOSError,
    UnsupportedFeatureError,
    memory_limits,
    raise_errno,
    raise_if_short,
)
from pyuffd._limits import frozen_cgroup, raise_limit
from pyuffd._opening import probe_api
from pyuffd._owned import Descriptor
from pyuffd._refusals import why_no_ptrace
from pyuffd._remote_calls import Attached, AttachPoint
from pyuffd._uffd import Userfaultfd
from pyuffd.remote._mappings import Mapping, Mappings, middle_of_gap, named, of_flags
from pyuffd.remote._stop import frozen_hint, why_not_stopped
from pyuffd.remote._target import Target
from pyuffd.remote._threads import LEAVE_S, Refusals, wait_for_tracer

DEVICE = "/dev/userfaultfd"
LIMIT_S = 2.0

# "syscall; ret", and "mov $15, %eax; syscall" in both encodings: the C library's return from a
# signal handler, which every program that has one needs.
_SYSCALL_RET = b"\x0f\x05\xc3"
_RESTORERS = (b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", b"\xb8\x0f\x00\x00\x00\x0f\x05")
# They are found here at once; other code is searched after these.
_LIKELY = ("/ld-linux", "/ld-musl", "/libc", "/ld-")
_CODE_MOST = 256 << 20
# How often to look whether a program that is being loaded has them.
_LOOK_S = 0.005

# A signal at a bad moment needs some room below the frame.
_ROOM = 2 * calls.FRAME_BYTES
# An injection that was killed leaves a frame in the first one.
_PLACES = 4

_ELF_CLASS_64, _ELF_X86_64 = 2, 62
_IDLE_FIRST = {"S": 0, "T": 1, "I": 1, "R": 2}

# Tests stop an attach at one of its points.
hold: AttachPoint | None = None
attempts: list[calls.Attach] = []


def attach(
    process: Target, features: Feature, *, user_mode_only: bool = False, limit_s: float = LIMIT_S
) -> tuple[Userfaultfd, Attached]:
    """Open a userfaultfd in a process; see `Process.attach`."""
    check_flags("features", features, Feature)
    limit_s = check_seconds("timeout_s", limit_s)
    offered, _ = probe_api(os.O_CLOEXEC | USER_MODE_ONLY)
    if missing := Feature(int(features) & ~int(offered)):
        raise UnsupportedFeatureError(
            errno.EINVAL,
            "UFFDIO_API",
            hint=f"this kernel does not have {missing!r}",
            requested=int(features),
            supported=int(offered),
            missing=int(missing),
        )
    if user_mode_only and not features & Feature.WP_ASYNC:
        raise ValueError(
            "user_mode_only needs Feature.WP_ASYNC: the target's system calls would fail with"
            " EFAULT where a fault waits for us, and that kills it"
        )
    pid = process.pid
    process.check()
    status = _refuse(process, pid)
    mappings, (syscall_ret, restorer) = _loaded(process, limit_s)
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (USER_MODE_ONLY if user_mode_only else 0)
    stack = named(mappings, b"[stack]")
    scratch = _unused(process, stack)
    # Its other threads run while the page is there. One that fills a hole again, as with mremap(2)
    # there and back, must not find it taken.
    place = middle_of_gap(mappings)
    with Descriptor() as fetched, _device() as device:
        result, tid, refusals = None, pid, Refusals()
        for tid in _candidates(process, any_thread=bool(scratch)):
            result = None
            while result is None or (_is_refused(result) and refusals.try_again(tid)):
                attempt = calls.Attach(
                    tid=tid,
                    syscall_ret=syscall_ret,
                    restorer=restorer,
                    scratch=scratch,
                    stack=(stack.start, stack.end) if stack is not None else (0, 0),
                    place=place,
                    flags=flags,
                    device=device.number,
                    suspend_seccomp=status.get("Seccomp", "0") != "0",
                    limit_ns=int(limit_s * 1e9),
                    hold=int(hold or 0),
                )
                attempts[:] = [attempt]
                result = attempt.run(fetched)
            if result.code not in (errno.ESRCH, errno.ENOTSUP):
                break
        if result is None or result.code:
            process.check()
            _fail(pid, result, tid, refusals)
        return Userfaultfd._opened_in(fetched, features, pid), result


def _refuse(process: Target, pid: int) -> dict[str, str]:
    """Refuse a target that cannot be attached, before any change; return /proc/PID/status."""
    if pid == os.getpid():
        raise ValueError("a process cannot attach to itself: make a Userfaultfd()")
    tid = process.memory_tid
    lines = Path(f"/proc/{tid}/status").read_text(errors="replace").splitlines()
    status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if tracer := wait_for_tracer(tid, time.monotonic() + LEAVE_S):
        _raise(pid, errno.EBUSY, tracer)
    if status.get("State", "?")[0] in "ZX":
        _raise(pid, errno.ESRCH, "it is ending")
    if cgroup := frozen_cgroup(tid):
        # It would be given up after the time limit.
        _raise(pid, errno.ETIMEDOUT, frozen_hint(cgroup))
    if "shstk" in status.get("x86_Thread_features", ""):
        _raise(pid, errno.EOPNOTSUPP, "it has a shadow stack, which forbids changing its way")
    try:
        with open(f"/proc/{tid}/exe", "rb") as exe:
            header = exe.read(20)
    except OSError as error:  # it may not be read: the registers tell
        raise_if_short(f"open {error.filename}", error)
        return status
    if len(header) == 20 and (header[4], struct.unpack_from("<H", header, 18)[0]) != (
        _ELF_CLASS_64,
        _ELF_X86_64,
    ):
        _raise(pid, errno.ENOEXEC, "it is not a 64-bit program of x86-64")
    return status


def _loaded(process: Target, limit_s: float) -> tuple[Mappings, tuple[int, int]]:
    """Return the mappings and the gadgets, once a program that was just started has its libc."""
    give_up = time.monotonic() + limit_s
    while True:
        mappings = process.mappings()
        if found := _gadgets(process, mappings):
            return mappings, found
        process.check()
        if time.monotonic() > give_up:
            _raise(
                process.pid,
                errno.EOPNOTSUPP,
                "its code has no return from a signal handler, which would bring its thread home"
                " if we were killed meanwhile",
            )
        time.sleep(_LOOK_S)


def _gadgets(process: Target, mappings: Mappings) -> tuple[int, int] | None:
    """Find the two instruction sequences that bring a thread home in code that it has mapped."""
    tid = process.memory_tid
    syscall_ret = restorer = None
    read = 0
    for mapping in _code(mappings):
        read += mapping.length
        if read > _CODE_MOST:
            break
        if syscall_ret is None:
            syscall_ret = calls.find(tid, mapping.start, mapping.end, _SYSCALL_RET)
        for pattern in _RESTORERS:
            if restorer is None:
                restorer = calls.find(tid, mapping.start, mapping.end, pattern)
        if syscall_ret is not None and restorer is not None:
            return syscall_ret, restorer
    return None


def _code(mappings: Mappings) -> Iterator[Mapping]:
    wanted = calls.MAP_READ | calls.MAP_EXECUTE
    found = of_flags(mappings, wanted, wanted | calls.MAP_SHARED)
    code = [m for m in found if m.path != "[vsyscall]"]
    return iter(sorted(code, key=lambda m: not any(name in m.path for name in _LIKELY)))


def _unused(process: Target, stack: Mapping | None) -> int:
    """Return a place near the bottom of the first stack that holds nothing; 0 if there is none."""
    if stack is None or stack.length < 2 * _ROOM:
        return 0
    for number in range(min(_PLACES, stack.length // 2 // _ROOM)):
        start = stack.start + number * _ROOM
        entries = process.pagemap.read(start, _ROOM)
        touched = entries.count(PageBit.PRESENT) + entries.count(PageBit.SWAP)
        # An attach before this one has left zeros.
        if not touched or not any(process.read(start, _ROOM)):
            return start + calls.FRAME_BYTES
    return 0


def _candidates(process: Target, *, any_thread: bool) -> list[int]:
    """Return the threads to try, the first thread first; those that cannot be stopped come last."""
    threads = process.threads()
    alive = [t for t in threads if t.state not in "ZX"]
    if not any_thread:
        alive = [t for t in alive if t.tid == process.pid]
    return [t.tid for t in sorted(alive, key=lambda t: (t.state == "D", t.tid != process.pid))]


def _device() -> Descriptor:
    try:
        return Descriptor.open(DEVICE, os.O_RDWR)
    except OSError as error:
        raise_if_short(f"open {DEVICE}", error)
        return Descriptor()


_BY_POINT = {
    AttachPoint.BEGIN: "PTRACE_SEIZE",
    AttachPoint.SEIZED: "PTRACE_INTERRUPT",
    AttachPoint.MASKED: "mmap in the target",
    AttachPoint.PREPARED: "clone in the target",
    AttachPoint.CLONED: "userfaultfd in the target",
    AttachPoint.OPENED: "pidfd_getfd",
}


def _is_refused(result: Attached) -> bool:
    return result.code == errno.EPERM and result.point <= AttachPoint.SEIZED


def _fail(pid: int, result: Attached | None, tid: int, refusals: Refusals) -> NoReturn:
    if result is None:
        _raise(
            pid,
            errno.EOPNOTSUPP,
            "its first thread has ended or is ending, and no part of that stack is unused, which"
            " would bring another thread home if we were killed meanwhile",
        )
    code, point = result.code, result.point
    op = _BY_POINT.get(point, "attaching")
    hint = ""
    if code == errno.ETIMEDOUT:
        hint = f"thread {tid} did not stop in time: {why_not_stopped(tid)}"
    elif _is_refused(result):
        hint = refusals.why(
            why_no_ptrace(pid, attaching=True)
            + "; or it has a seccomp filter, and suspending it needs CAP_SYS_ADMIN"
        )
    elif code in (errno.EPERM, errno.EACCES, errno.ENOSYS) and point is AttachPoint.CLONED:
        hint = (
            "the target may not open a userfaultfd (vm.unprivileged_userfaultfd=0), and"
            f" {DEVICE} could not be opened for it here: `sysctl vm.unprivileged_userfaultfd=1`"
        )
    elif code == errno.EMFILE and _may_open():
        hint = "its limit of descriptors (RLIMIT_NOFILE) is below the three that this needs"
    elif code == errno.ENOTSUP and point < AttachPoint.FRAMED:
        hint = "its first thread is not on its own stack, and no part of that stack is unused"
    elif code == errno.EOPNOTSUPP:
        hint = "this kernel has no PIDFD_THREAD (Linux 6.9)"
    elif code == errno.ENOEXEC:
        hint = "it is not a 64-bit program of x86-64"
    elif code == errno.EINTR:
        hint = "the process that does it was killed"
    elif code == errno.ENOMEM and point is AttachPoint.MASKED:
        hint = next((f"of the target, {limit}" for limit in memory_limits(NEARLY, pid)), "")
    elif code == errno.EAGAIN and point < AttachPoint.FRAMED:
        raise_limit(f"{op}, process {pid}", code)  # no process could be made for it
    raise_errno(f"{op}, process {pid}", code, hint=hint)


def _may_open() -> bool:
    """Whether this process may have one more descriptor."""
    try:
        Descriptor.of_process(os.getpid()).close()
    except OSError:
        return False
    return True


def _raise(pid: int, code: int, why: str) -> NoReturn:
    try:
        raise_errno(f"attach to process {pid}", code, hint=why)
    except UffdOSError as error:
        raise error from None
