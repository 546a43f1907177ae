"""Accesses by the kernel to a protected page, and UFFD_USER_MODE_ONLY (layer L5)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd._memory import Interrupted
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Access, Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._thp import mapped_huge
from pyuffd.conformance._types import PRIVATE, missing_features, wp_features
from pyuffd.conformance._wp import (
    DATA,
    READ_WRITE,
    UNPROTECT,
    WP_WRITE,
    WRITTEN,
    expect_fault,
    expect_read,
    expect_write_fault,
    present,
    protected,
)
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import Lack, Need, needs_kernel_faults, needs_privilege, needs_thp
from pyuffd.testing._opening import open_syscall

MADV_POPULATE_WRITE = 23
USER_MODE_ONLY = 1  # UFFD_USER_MODE_ONLY
SYS_READ, SYS_PREAD, SYS_PWRITE, SYS_MADVISE = 0, 17, 18, 28
SYS_WAIT4, SYS_PTRACE = 61, 101
SYS_PROCESS_VM_READV, SYS_PROCESS_VM_WRITEV = 310, 311
PTRACE_POKEDATA, PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 5, 17, 0x4206, 0x4207
WALL = 0x40000000
BUS_ADRERR = 2
ORIGIN = "discussion of the series (Hugh Dickins, Alistair Popple): users of pte_none; man page"
BLOCK = 4096  # O_DIRECT's unit: every device supports it
VALUE = bytes([WRITTEN])
POKED = int.from_bytes(VALUE * 8, "little")


@dataclass(frozen=True)
class Row:
    """An access by the kernel.

    Attributes:
        name: Its name in ids.
        text: Its text in summaries.
        call: Prepares the access; returns a function that makes it, with its result or -errno.
        normal: Its result; with `is_write`, message 3 is sent first.
        user_mode_only: Its result with UFFD_USER_MODE_ONLY; no message is sent.
        is_write: It waits until the page is unprotected.
        changes: The first byte of the page after such a wait.
    """

    name: str
    text: str
    call: Callable[[Context, int], Callable[[], int]]
    normal: int
    user_mode_only: int
    is_write: bool = True
    changes: int = WRITTEN
    needs: tuple[Need, ...] = ()


def read_into(ctx: Context, at: int) -> Callable[[], int]:
    """Prepare read(2) of a byte of WRITTEN into memory."""
    file, end = os.pipe()
    ctx.callback(os.close, file)
    os.write(end, VALUE)
    os.close(end)
    return lambda: syscall(SYS_READ, file, at, 1)


def process_vm_writev(ctx: Context, at: int) -> Callable[[], int]:
    """Prepare another process's process_vm_writev(2) of a byte of WRITTEN."""
    source = ctypes.create_string_buffer(VALUE, 1)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(source), 1)
    remote = (ctypes.c_uint64 * 2)(at, 1)
    child = ctx.fork()  # has the vectors at the same addresses
    vectors = (ctypes.addressof(local), 1, ctypes.addressof(remote), 1)
    return lambda: child.syscall(SYS_PROCESS_VM_WRITEV, os.getpid(), *vectors, 0)


def _direct_file(ctx: Context) -> int:
    """Open a file that is full of WRITTEN with O_DIRECT."""
    for folder in dict.fromkeys(["/var/tmp", tempfile.gettempdir(), os.getcwd()]):
        try:
            fd, path = tempfile.mkstemp(prefix="pyuffd-direct-", dir=folder)
        except OSError:
            continue
        ctx.callback(os.unlink, path)
        with open(fd, "wb") as file:
            file.write(VALUE * BLOCK)
        try:
            direct = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            continue
        ctx.callback(os.close, direct)
        return direct
    raise Lack(["O_DIRECT"], "needs a file system with O_DIRECT; no folder for files has it")


def direct_pread(ctx: Context, at: int) -> Callable[[], int]:
    """Prepare pread(2) of a block of WRITTEN into memory, with O_DIRECT."""
    fd = _direct_file(ctx)
    return lambda: syscall(SYS_PREAD, fd, at, BLOCK, 0)


def direct_pwrite(ctx: Context, at: int) -> Callable[[], int]:
    """Prepare pwrite(2) of a block of memory, with O_DIRECT."""
    fd = _direct_file(ctx)
    return lambda: syscall(SYS_PWRITE, fd, at, BLOCK, 0)


def populate_write(ctx: Context, at: int) -> Callable[[], int]:
    """Prepare MADV_POPULATE_WRITE of a page."""
    return lambda: syscall(SYS_MADVISE, at, ctx.page, MADV_POPULATE_WRITE)


def proc_mem(ctx: Context, at: int) -> Callable[[], int]:
    """Prepare pwrite(2) of a byte of WRITTEN through /proc/PID/mem."""
    fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    ctx.callback(os.close, fd)
    source = ctypes.create_string_buffer(VALUE, 1)
    return lambda: syscall(SYS_PWRITE, fd, ctypes.addressof(source), 1, at)


def _ptrace_poke(ctx: Context, at: int) -> Callable[[], int]:
    file, end = os.pipe()
    idle = ctx.start(os.read, file, 1)
    ctx.callback(os.close, file)
    ctx.callback(os.close, end)
    child = ctx.fork()
    # A thread that is stopped while it holds the GIL would stop all of Python.
    _wait_asleep(ctx, idle)

    def poke() -> int:
        thread = idle.thread_id
        for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
            if code := child.syscall(SYS_PTRACE, request, thread, 0, 0):
                return code
        child.syscall(SYS_WAIT4, thread, 0, WALL, 0)
        result = child.syscall(SYS_PTRACE, PTRACE_POKEDATA, thread, at, POKED)
        child.syscall(SYS_PTRACE, PTRACE_DETACH, thread, 0, 0)
        return result

    return poke


def _wait_asleep(ctx: Context, access: Access[bytes]) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if access.thread_id:
            stat = Path(f"/proc/self/task/{access.thread_id}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] == "S":
                return
        os.sched_yield()
    ctx.fail("the idle thread", "not asleep", "asleep")


def needs_user_mode_only() -> Need:
    """Need that UFFD_USER_MODE_ONLY works."""

    def missing() -> tuple[list[str], str]:
        try:
            os.close(open_syscall(os.O_CLOEXEC | USER_MODE_ONLY))
        except OSError as error:
            return ["user-mode-only"], f"userfaultfd: {error.strerror}"
        return [], ""

    return Need("UFFD_USER_MODE_ONLY", missing)


def needs_populate() -> Need:
    """Need that MADV_POPULATE_WRITE works."""

    def missing() -> tuple[list[str], str]:
        start = _memory.mmap(BLOCK, READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        code = -syscall(SYS_MADVISE, start, BLOCK, MADV_POPULATE_WRITE)
        _memory.munmap(start, BLOCK)
        return (["populate"], f"madvise: {errno.errorcode[code]}") if code else ([], "")

    return Need("MADV_POPULATE_WRITE", missing)


ROWS = (
    Row("read", "read(2) into a protected page", read_into, 1, -errno.EFAULT),
    Row(
        "process_vm_writev",
        "another process's process_vm_writev(2) into a protected page",
        process_vm_writev,
        1,
        -errno.EFAULT,
    ),
    Row(
        "direct-pread",
        "pread(2) with O_DIRECT into a protected page",
        direct_pread,
        BLOCK,
        -errno.EFAULT,
    ),
    Row(
        "direct-pwrite",
        "pwrite(2) with O_DIRECT from a protected page",
        direct_pwrite,
        BLOCK,
        BLOCK,
        is_write=False,
    ),
    Row(
        "populate-write",
        "MADV_POPULATE_WRITE of a protected page",
        populate_write,
        0,
        -errno.EFAULT,
        changes=DATA,
        needs=(needs_populate(),),
    ),
    Row(
        "proc-mem",
        "pwrite(2) into a protected page through /proc/PID/mem",
        proc_mem,
        -errno.EIO,
        -errno.EIO,
        is_write=False,
    ),
    Row(
        "ptrace-poke",
        "another process's PTRACE_POKEDATA into a protected page",
        _ptrace_poke,
        -errno.EIO,
        -errno.EIO,
        is_write=False,
        needs=(needs_privilege("CAP_SYS_PTRACE"),),
    ),
)


def _said(result: int) -> str:
    return f"fails with {errno.errorcode[-result]}" if result < 0 else "succeeds"


def _normal(ctx: Context, row: Row) -> None:
    at = protected(ctx).start
    call = row.call(ctx, at)
    if not row.is_write:
        _untouched(ctx, at, call, row.normal)
        return
    access = ctx.start(call)
    expect_fault(ctx, access, WP_WRITE, at)
    ctx.expect("whether the access returned before unprotecting", access.done, False)
    ctx.uffd.writeprotect(at, ctx.page, mode=UNPROTECT)
    ctx.expect("result of the access", access.result(), row.normal)
    ctx.expect_quiet()
    ctx.expect_pagemap(at, present(ctx, protected=False))
    ctx.expect("first byte", ctx.silently(ctx.read, at), bytes([row.changes]))


def _user_mode_only(ctx: Context, row: Row) -> None:
    ctx.open(user_mode_only=True)
    at = protected(ctx).start
    _untouched(ctx, at, row.call(ctx, at), row.user_mode_only)


def _untouched(ctx: Context, at: int, call: Callable[[], int], wanted: int) -> None:
    """Expect an access that sends no message and changes neither the page nor its protection."""
    ctx.expect("result of the access", ctx.silently(call), wanted)
    ctx.expect("whether the page is still protected", ctx.is_protected(at), True)
    expect_read(ctx, at, DATA)
    expect_write_fault(ctx, at)


def _add(row: Row) -> None:
    after = ", after message 3" if row.is_write else ", without a message"
    case(
        f"access.{row.name}.normal",
        summary=f"{row.text} {_said(row.normal)}{after}",
        origin=ORIGIN,
        features=wp_features,
        needs=[*row.needs, *([needs_kernel_faults()] if row.is_write else [])],
    )(lambda ctx: _normal(ctx, row))
    case(
        f"access.{row.name}.user-mode-only",
        summary=f"With UFFD_USER_MODE_ONLY, {row.text} {_said(row.user_mode_only)}",
        origin=ORIGIN,
        features=wp_features,
        needs=[*row.needs, needs_user_mode_only()],
    )(lambda ctx: _user_mode_only(ctx, row))


for _row in ROWS:
    _add(_row)


def _expect_sigbus(ctx: Context, what: str, seen: object, at: int) -> None:
    if seen != Interrupted(signal.SIGBUS, BUS_ADRERR, at):
        ctx.fail(what, seen, f"SIGBUS (si_code {BUS_ADRERR}, address {at:#x})")


@case(
    "access.read.sigbus-missing",
    origin=ORIGIN,
    features=lambda memory: missing_features(memory) | Feature.SIGBUS,
)
def sigbus_missing(ctx: Context) -> None:
    """With SIGBUS, read(2) into a missing page is EFAULT; an access by user code gets SIGBUS."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    ctx.expect("result of read(2)", ctx.silently(read_into(ctx, region.start)), -errno.EFAULT)
    _expect_sigbus(ctx, "a read of memory", ctx.silently(ctx.read, region.start), region.start)
    ctx.expect_pagemap(region.start, "-----")


@case(
    "access.read.sigbus-protected",
    origin=ORIGIN,
    features=lambda memory: wp_features(memory) | Feature.SIGBUS,
)
def sigbus_protected(ctx: Context) -> None:
    """With SIGBUS, read(2) into a protected page is EFAULT; a write by user code gets SIGBUS."""
    region = protected(ctx)
    ctx.expect("result of read(2)", ctx.silently(read_into(ctx, region.start)), -errno.EFAULT)
    seen = ctx.silently(ctx.write, region.start, VALUE)
    _expect_sigbus(ctx, "a write of memory", seen, region.start)
    ctx.expect("whether the page is still protected", ctx.is_protected(region.start), True)
    expect_read(ctx, region.start, DATA)


@case(
    "access.user.user-mode-only",
    origin=ORIGIN,
    features=wp_features,
    needs=[needs_user_mode_only()],
)
def user_mode_only_user(ctx: Context) -> None:
    """With UFFD_USER_MODE_ONLY, a write by user code to a protected page sends message 3."""
    ctx.open(user_mode_only=True)
    expect_write_fault(ctx, protected(ctx).start)


# FOLL_FORCE, as for debuggers: writes to private memory that the process itself cannot write

READ_ONLY_ORIGIN = "mm/gup.c: can_follow_write_pte, can_follow_write_pmd"


def _expect_forced_write_fails(ctx: Context, region: Region, at: int) -> None:
    _memory.mprotect(region.start, region.length, mmap.PROT_READ)
    ctx.expect("result of pwrite(2)", ctx.silently(proc_mem(ctx, at)), -errno.EIO)
    _memory.mprotect(region.start, region.length, READ_WRITE)
    ctx.expect("whether the page is still protected", ctx.is_protected(at), True)
    expect_read(ctx, at, DATA)
    expect_write_fault(ctx, at)


def _forces_writes(ctx: Context) -> None:
    """Skip the case if CONFIG_PROC_MEM_NO_FORCE or proc_mem.force_override forbids such writes."""
    region = ctx.make(1)
    region.fill(DATA)
    _memory.mprotect(region.start, region.length, mmap.PROT_READ)
    if proc_mem(ctx, region.start)() == -errno.EIO:
        ctx.lack("forced-writes", "/proc/PID/mem does not write to read-only pages")


@case(
    "access.proc-mem.read-only",
    origin=READ_ONLY_ORIGIN,
    memory=("anon", "shmem-private"),
    features=wp_features,
)
def proc_mem_read_only(ctx: Context) -> None:
    """A write to /proc/PID/mem changes a read-only page, but not one that is protected too."""
    _forces_writes(ctx)
    region = protected(ctx, 2)
    _expect_forced_write_fails(ctx, region, region.start)
    at = region.start + ctx.page
    ctx.uffd.writeprotect(at, ctx.page, mode=UNPROTECT)
    _memory.mprotect(region.start, region.length, mmap.PROT_READ)
    ctx.expect("result of pwrite(2) after unprotecting", ctx.silently(proc_mem(ctx, at)), 1)
    ctx.expect("first byte", ctx.silently(ctx.read, at), VALUE)


@case(
    "access.proc-mem.read-only-huge",
    origin=READ_ONLY_ORIGIN,
    memory=("anon",),
    features=wp_features,
    needs=[needs_thp()],
)
def proc_mem_read_only_huge(ctx: Context) -> None:
    """A write to /proc/PID/mem does not change a protected part of a read-only huge page."""
    _forces_writes(ctx)
    region = ctx.make(HUGE_PAGE // SMALL_PAGE)
    region.advise_thp()
    region.fill(DATA)
    if mapped_huge(region.start) != HUGE_PAGE:
        ctx.lack("THP", "the kernel gave no transparent huge page")
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    _expect_forced_write_fails(ctx, region, region.start + 5 * ctx.page)


# A page that is shared by fork is copied before it is pinned for reading (FAULT_FLAG_UNSHARE).
# gup_test, which not every kernel has, pins for long; process_vm_readv pins only while it copies.


def _pin_briefly(ctx: Context, region: Region, pid: int) -> None:
    """Read a page of a process with process_vm_readv(2), which pins the page meanwhile."""
    buffer = ctypes.create_string_buffer(8)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 8)
    remote = (ctypes.c_uint64 * 2)(region.start, 8)
    vectors = (ctypes.addressof(local), 1, ctypes.addressof(remote), 1)
    seen = ctx.silently(syscall, SYS_PROCESS_VM_READV, pid, *vectors, 0)
    ctx.expect(
        "result of process_vm_readv and the bytes", (seen, buffer.raw), (8, bytes([DATA]) * 8)
    )
    # Now the process has a copy of its own, with the same protection.
    ctx.expect_pagemap(region.start, "P--?X", pid=pid)


def _add_unshare(name: str, who: str, *, is_child: bool, has_event: bool) -> None:
    def run(ctx: Context) -> None:
        region = protected(ctx)
        child = ctx.fork()
        ctx.expect_pagemap(region.start, "P--W-")
        _pin_briefly(ctx, region, child.pid if is_child else os.getpid())
        ctx.expect("parent's uffd-wp bit", ctx.is_protected(region.start), True)
        ctx.expect("child's uffd-wp bit", ctx.is_protected(region.start, pid=child.pid), has_event)
        expect_read(ctx, region.start, DATA)
        expect_write_fault(ctx, region.start)
        seen = ctx.silently(child.read, region.start, 8)
        ctx.expect("the child's page after the parent's write", seen, bytes([DATA]) * 8)
        if child.uffd is not None:
            expect_write_fault(ctx, region.start, child.uffd, child.write)
        else:
            ctx.expect("the child's write", ctx.silently(child.write, region.start, VALUE), None)

    with_event = Feature.EVENT_FORK if has_event else Feature(0)
    case(
        f"kernel-access.unshare.{name}",
        summary=f"Pinning {who} protected page that is shared by fork copies it and keeps all bits",
        origin="mm/gup.c: gup_must_unshare",
        memory=PRIVATE,
        features=lambda memory: wp_features(memory) | with_event,
    )(run)


_add_unshare("parent", "the parent's", is_child=False, has_event=False)
_add_unshare("parent-with-event", "the parent's", is_child=False, has_event=True)
_add_unshare("child", "the child's", is_child=True, has_event=False)
_add_unshare("child-with-event", "the child's", is_child=True, has_event=True)
