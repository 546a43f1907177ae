"""Accesses by the kernel to pages that are missing, in the file only, or poisoned (layer L5).

Each access sends the same message as user code, again if it is woken without its page, and then
continues. `kernel_access` has the accesses to protected pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._types import (
    ALL,
    FILE,
    minor_features,
    missing_features,
    poison_features,
)
from pyuffd.conformance._wp import (
    DATA,
    MISSING_READ,
    MISSING_WRITE,
    WRITTEN,
    expect_fault,
    in_page_cache,
)
from pyuffd.conformance.cases.errno_read import counters
from pyuffd.conformance.cases.kernel_access import (
    BLOCK,
    VALUE,
    direct_pread,
    direct_pwrite,
    needs_populate,
    needs_user_mode_only,
    populate_write,
    read_into,
)
from pyuffd.conformance.cases.waiters import MINOR_READ
from pyuffd.testing._memory_types import MemoryType
from pyuffd.testing._need import Need, needs_kernel_faults, needs_privilege

MADV_POPULATE_READ = 22
SYS_WRITE, SYS_PREAD, SYS_MADVISE, SYS_UNAME = 1, 17, 28, 63
SYS_MLOCK, SYS_MUNLOCK, SYS_FUTEX, SYS_GET_MEMPOLICY = 149, 150, 202, 239
SYS_PROCESS_VM_READV, SYS_PROCESS_VM_WRITEV = 310, 311
FUTEX_WAIT, FUTEX_PRIVATE = 0, 128
MPOL_F_NODE_ADDR = 3
EHWPOISON = 133
MISSING, MINOR = RegisterMode.MISSING, RegisterMode.MINOR
ORIGIN = (
    "mm/gup.c: faultin_page, fixup_user_fault; arch/x86/mm/fault.c: user accesses of the kernel"
)


def _write_from(ctx: Context, at: int) -> Callable[[], int]:
    file, end = os.pipe()
    for fd in (file, end):
        ctx.callback(os.close, fd)
    return lambda: syscall(SYS_WRITE, end, at, 8)


def _process_vm(number: int) -> Callable[[Context, int], Callable[[], int]]:
    def prepare(ctx: Context, at: int) -> Callable[[], int]:
        buffer = ctypes.create_string_buffer(VALUE * 8, 8)
        local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 8)
        remote = (ctypes.c_uint64 * 2)(at, 8)

        def call() -> int:
            vectors = (ctypes.addressof(local), 1, ctypes.addressof(remote), 1)
            done = syscall(number, os.getpid(), *vectors, 0)
            return done if buffer.raw else 0  # keeps the buffer alive until here

        return call

    return prepare


def _populate_read(ctx: Context, at: int) -> Callable[[], int]:
    return lambda: syscall(SYS_MADVISE, at, ctx.page, MADV_POPULATE_READ)


def _mlock(ctx: Context, at: int) -> Callable[[], int]:
    def call() -> int:
        result = syscall(SYS_MLOCK, at, ctx.page)
        syscall(SYS_MUNLOCK, at, ctx.page)
        return result

    return call


def _futex(_: Context, at: int) -> Callable[[], int]:
    # The first word of a page of DATA is not 1, so FUTEX_WAIT does not wait.
    return lambda: syscall(SYS_FUTEX, at, FUTEX_WAIT | FUTEX_PRIVATE, 1, 0, 0, 0)


def _mempolicy(ctx: Context, at: int) -> Callable[[], int]:
    node = ctypes.c_int(-1)
    if code := syscall(SYS_GET_MEMPOLICY, ctypes.addressof(node), 0, 0, 0, 0):
        ctx.lack("mempolicy", f"get_mempolicy: {errno.errorcode.get(-code, code)}")

    def call() -> int:
        result = syscall(SYS_GET_MEMPOLICY, ctypes.addressof(node), 0, 0, at, MPOL_F_NODE_ADDR)
        return result if result else min(node.value, 0)

    return call


def _proc_mem(ctx: Context, at: int) -> Callable[[], int]:
    fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    ctx.callback(os.close, fd)
    buffer = ctypes.create_string_buffer(8)
    return lambda: syscall(SYS_PREAD, fd, ctypes.addressof(buffer), 8, at)


@dataclass(frozen=True)
class Row:
    """An access by the kernel.

    Attributes:
        name: Its name in ids.
        text: Its text in summaries, before the words for the page.
        call: Prepares the access; returns a function that makes it, with its result or -errno.
        result: Its result after the page is filled.
        writes: Whether its message is that of a write, on a memory type.
        refused: Its result if the descriptor does not handle its fault.
        poisoned: Its result if the page is poisoned.
        changes: Whether the first byte of the page is WRITTEN afterwards.
        asks: Whether it sends a message if the descriptor handles its fault.
    """

    name: str
    text: str
    call: Callable[[Context, int], Callable[[], int]]
    result: int
    writes: Callable[[MemoryType], bool]
    refused: int = -errno.EFAULT
    poisoned: int = -errno.EFAULT
    changes: bool = False
    asks: bool = True
    needs: tuple[Need, ...] = ()


def _reads(_: MemoryType) -> bool:
    return False


def _writes(_: MemoryType) -> bool:
    return True


POPULATES = (needs_populate(),)
ROWS = (
    Row("read", "read(2) into", read_into, 1, _writes, changes=True),
    Row("write", "write(2) from", _write_from, 8, _reads),
    Row(
        "process_vm_readv", "process_vm_readv(2) from", _process_vm(SYS_PROCESS_VM_READV), 8, _reads
    ),
    Row(
        "process_vm_writev",
        "process_vm_writev(2) into",
        _process_vm(SYS_PROCESS_VM_WRITEV),
        8,
        _writes,
        changes=True,
    ),
    Row("direct-pread", "pread(2) with O_DIRECT into", direct_pread, BLOCK, _writes, changes=True),
    Row("direct-pwrite", "pwrite(2) with O_DIRECT from", direct_pwrite, BLOCK, _reads),
    Row(
        "populate-read",
        "MADV_POPULATE_READ of",
        _populate_read,
        0,
        _reads,
        poisoned=-EHWPOISON,
        needs=POPULATES,
    ),
    Row(
        "populate-write",
        "MADV_POPULATE_WRITE of",
        populate_write,
        0,
        _writes,
        poisoned=-EHWPOISON,
        needs=POPULATES,
    ),
    Row(
        "mlock",
        "mlock(2) of",
        _mlock,
        0,
        lambda memory: not memory.shared,
        refused=-errno.ENOMEM,
        poisoned=-errno.ENOMEM,
        needs=(needs_privilege("CAP_IPC_LOCK"),),
    ),
    Row("futex", "FUTEX_WAIT in", _futex, -errno.EAGAIN, _reads),
    Row("get_mempolicy", "get_mempolicy(2) with MPOL_F_ADDR of", _mempolicy, 0, _reads),
    Row(
        "proc-mem",
        "pread(2) of /proc/PID/mem at",
        _proc_mem,
        -errno.EIO,
        _reads,
        refused=-errno.EIO,
        poisoned=-errno.EIO,
        asks=False,
    ),
)


# Pages that are missing, or in the file only


def _ready(ctx: Context, mode: RegisterMode) -> int:
    region = ctx.make(1)
    if mode is MINOR:
        in_page_cache(region, DATA)
    ctx.register(region, mode)
    return region.start


def _asked(ctx: Context, row: Row, mode: RegisterMode) -> None:
    at = _ready(ctx, mode)
    call = row.call(ctx, at)
    if not row.asks:
        ctx.expect("result of the access", ctx.silently(call), row.result)
        ctx.expect_pagemap(at, "-----")
        return
    flags = (MINOR_READ if mode is MINOR else MISSING_READ) + row.writes(ctx.memory)
    access = ctx.start(call)
    expect_fault(ctx, access, flags, at)
    ctx.uffd.wake(at, ctx.page)
    # The page is still not there, so the access faults again.
    expect_fault(ctx, access, flags, at)
    ctx.expect("whether the access returned without its page", access.done, False)
    if mode is MINOR:
        ctx.uffd.continue_(at, ctx.page)
    else:
        ctx.uffd.copy(at, bytes([DATA]) * ctx.page)
    ctx.expect("result of the access", access.result(), row.result)
    ctx.expect_quiet()
    value = WRITTEN if row.changes else DATA
    ctx.expect("first byte", ctx.silently(ctx.read, at), bytes([value]))


def _refused(ctx: Context, row: Row, mode: RegisterMode) -> None:
    wanted = ctx.case.features_on(ctx.memory)
    for options in ({"user_mode_only": True}, {}):
        ctx.open(wanted | (Feature(0) if options else Feature.SIGBUS), **options)
        at = _ready(ctx, mode)
        ctx.expect("result of the access", ctx.silently(row.call(ctx, at)), row.refused)
        ctx.expect_pagemap(at, "-----")
        ctx.release()


def _add(row: Row, mode: RegisterMode) -> None:
    memory, features = (FILE, minor_features) if mode is MINOR else (ALL, missing_features)
    name = str(mode.name).lower()
    what = "a page that only the file has" if mode is MINOR else "a missing page"
    asks = (
        "sends a message, and another if woken too early"
        if row.asks
        else "fails and sends no message"
    )
    case(
        f"access.{row.name}.{name}",
        summary=f"{row.text} {what} {asks}",
        origin=ORIGIN,
        crossing=mode is MINOR,
        memory=memory,
        features=features,
        needs=[*row.needs, needs_kernel_faults()],
    )(lambda ctx: _asked(ctx, row, mode))
    if row.asks:
        case(
            f"access.{row.name}.{name}-refused",
            summary=f"With UFFD_USER_MODE_ONLY or SIGBUS, {row.text} {what} fails and sends no"
            " message",
            origin=ORIGIN,
            crossing=True,
            memory=memory,
            features=features,
            needs=[*row.needs, needs_user_mode_only()],
        )(lambda ctx: _refused(ctx, row, mode))


for _row in ROWS:
    _add(_row, MISSING)
    _add(_row, MINOR)


# Poisoned pages


def _add_poisoned(row: Row) -> None:
    def run(ctx: Context) -> None:
        at = _ready(ctx, MISSING)
        ctx.uffd.poison(at, ctx.page)
        before = ctx.pagemap(at)
        ctx.expect("result of the access", ctx.silently(row.call(ctx, at)), row.poisoned)
        ctx.expect("pagemap afterwards", ctx.pagemap(at), before)

    case(
        f"access.{row.name}.poisoned",
        summary=f"{row.text} a poisoned page fails and sends no message",
        origin="mm/memory.c: handle_pte_marker",
        crossing=True,
        features=poison_features,
        needs=row.needs,
    )(run)


for _row in ROWS:
    _add_poisoned(_row)


# Processes killed during an access


def _add_killed(name: str, text: str, flags: int) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(1)
        ctx.register(region, MISSING)
        buffer = ctypes.create_string_buffer(8)
        vectors = (ctypes.c_uint64 * 4)(ctypes.addressof(buffer), 8, region.start, 8)
        child = ctx.fork()  # has the vectors at the same addresses
        uffd = child.uffd
        assert uffd is not None
        at = ctypes.addressof(vectors)
        calls = {
            "uname": (SYS_UNAME, region.start),
            "process_vm_readv": (SYS_PROCESS_VM_READV, child.pid, at, 1, at + 16, 1, 0),
        }
        waiting = ctx.start(child.syscall, *calls[name])
        expect_fault(ctx, waiting, flags, region.start, uffd)
        ctx.expect("pending and total before SIGKILL", counters(uffd), (0, 1))
        os.kill(child.pid, signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while (left := counters(uffd)) != (0, 0) and time.monotonic() < deadline:
            os.sched_yield()
        ctx.expect("pending and total after SIGKILL", left, (0, 0))
        with contextlib.suppress(OSError):  # the child is gone
            waiting.result()

    case(
        f"access.{name}.killed",
        summary=f"A process can be killed while its {text} a missing page",
        origin="mm/gup.c: FAULT_FLAG_KILLABLE; fs/userfaultfd.c: userfaultfd_get_blocking_state",
        features=lambda memory: missing_features(memory) | Feature.EVENT_FORK,
        needs=[needs_kernel_faults()],
    )(run)


_add_killed("uname", "uname(2) writes to", MISSING_WRITE)
_add_killed("process_vm_readv", "process_vm_readv(2) reads", MISSING_READ)
