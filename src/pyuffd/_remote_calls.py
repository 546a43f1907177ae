"""Calls on other processes' memory and mappings, in bulk (layer L2).

Addresses and lengths go to the kernel unchecked; results stay packed. Every call releases the GIL.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pyuffd._enums import Number
from pyuffd._errors import raise_errno, raise_if_short
from pyuffd._limits import why_not_written
from pyuffd._owned import Descriptor, Owner
from pyuffd._rows import NO_ROWS, new_ranges, owned, rows_of, take_ranges
from pyuffd._shim import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAP_WORDS = 8  # 64-bit numbers of one packed mapping
MAP_READ = lib.UFFD_MAP_READ
MAP_WRITE = lib.UFFD_MAP_WRITE
MAP_EXECUTE = lib.UFFD_MAP_EXECUTE
MAP_SHARED = lib.UFFD_MAP_SHARED

_PINNERS_FIRST = 64


def maps_read(fd: int, pid: int) -> tuple[bytes, bytes]:
    """Read an open /proc/PID/maps; return the packed mappings and the bytes of their names."""
    maps = ffi.gc(ffi.new("struct uffd_maps *"), lib.uffd_maps_free)
    code = lib.uffd_maps_read(fd, maps)
    if code:
        raise_errno(f"read /proc/{pid}/maps", -code)
    return _packed_maps(maps)


def _packed_maps(maps: Any) -> tuple[bytes, bytes]:
    size = maps.count * ffi.sizeof("struct uffd_map")
    names = bytes(ffi.buffer(maps.names, maps.names_length)) if maps.names_length else b""
    return bytes(ffi.buffer(maps.vec, size)) if size else b"", names


def maps_query(fd: int, pid: int, spans: memoryview, most: int) -> tuple[bytes, bytes] | None:
    """Read the mappings that overlap packed ranges; None if they are more, or on old kernels."""
    maps = ffi.gc(ffi.new("struct uffd_maps *"), lib.uffd_maps_free)
    vec, count = rows_of(spans)
    code = lib.uffd_maps_query(fd, vec, count, most, maps)
    if code in (-errno.ENOTTY, -errno.E2BIG):
        return None
    if code:
        raise_errno(f"PROCMAP_QUERY of /proc/{pid}/maps", -code)
    return _packed_maps(maps)


def maps_page_size(fd: int, start: int) -> int | None:
    """Return the page size of the mapping at an address; None if the kernel does not tell."""
    out = ffi.new("uint64_t *")
    return None if lib.uffd_maps_page_size(fd, start, out) else int(out[0])


def read_ranges(
    pid: int, ranges: memoryview, target: Buffer, base: int | None
) -> tuple[memoryview, int]:
    """Copy packed ranges to a buffer; return (ranges that were lost, bytes copied)."""
    with ffi.from_buffer("char[]", target, require_writable=True) as pointer:
        return read_ranges_to(pid, ranges, int(ffi.cast("uintptr_t", pointer)), len(pointer), base)


def read_ranges_to(
    pid: int, ranges: memoryview, address: int, size: int, base: int | None
) -> tuple[memoryview, int]:
    """As `read_ranges`, to an address of this process."""
    vec, count = rows_of(ranges)
    lost, out = new_ranges(), ffi.new("uint64_t *")
    code = lib.uffd_remote_read(
        pid, vec, count, ffi.cast("void *", address), size, _base(base), lost, out
    )
    packed = take_ranges(lost)
    if code:
        raise_errno("process_vm_readv", -code, completed=int(out[0]))
    return packed, int(out[0])


def read_ranges_to_file(
    pid: int, ranges: memoryview, fd: int, offset: int, base: int | None
) -> tuple[memoryview, int]:
    """As `read_ranges`, to a file from an offset on."""
    vec, count = rows_of(ranges)
    lost, out = new_ranges(), ffi.new("uint64_t *")
    code = lib.uffd_remote_read_to_file(pid, vec, count, fd, offset, _base(base), lost, out)
    packed = take_ranges(lost)
    if code:
        hint = why_not_written(fd, -code)
        raise_errno("copying memory to a file", -code, hint=hint, completed=int(out[0]))
    return packed, int(out[0])


def _base(base: int | None) -> int:
    return int(lib.UFFD_PACKED) if base is None else base


def is_alive(pagemap_fd: int) -> bool:
    """Return whether the memory behind an open pagemap still exists: no exit, no execve(2)."""
    return not lib.uffd_pagemap_alive(pagemap_fd)


def find(pid: int, start: int, end: int, pattern: bytes) -> int | None:
    """Return the first address of a pattern in [start, end), or None."""
    out = ffi.new("uint64_t *")
    code = lib.uffd_remote_find(pid, start, end, pattern, len(pattern), out)
    if code == -errno.ENOENT:
        return None
    if code:
        raise_errno("process_vm_readv", -code, start, end - start)
    return int(out[0])


def shares_memory(pid: int, other_pid: int) -> bool:
    """Return whether two processes share their memory; False if one may not be traced by us."""
    return bool(lib.uffd_remote_same_memory(pid, other_pid) == 1)


class Pinners(NamedTuple):
    """Descriptors of a process by which memory may be written past the page table.

    Attributes:
        fds: Those of io_uring, and of devices for direct access.
        direct_fd: One that is open with O_DIRECT, or -1.
    """

    fds: list[int]
    direct_fd: int


def pinners(pid: int) -> Pinners:
    """Look at the descriptors of a process; there are none if it is gone."""
    capacity = _PINNERS_FIRST
    while True:
        fds = ffi.new("int32_t[]", capacity)
        found = ffi.new("struct uffd_pinners *", {"fds": fds, "capacity": capacity})
        if code := -int(lib.uffd_remote_pinners(pid, found)):
            raise_if_short(f"open /proc/{pid}/fd", OSError(code, ""))
            return Pinners([], -1)  # it has ended, or may not be looked at
        if found.count <= capacity:
            return Pinners(list(fds[0 : found.count]), int(found.direct_fd))
        capacity = 2 * int(found.count)


def reads(pid: int) -> tuple[memoryview, int]:
    """Return the pages that threads sleep in a read of, packed, and how many threads run."""
    found = owned("struct uffd_reads", lib.uffd_remote_free_reads)
    if code := -int(lib.uffd_remote_reads(pid, found)):
        raise_if_short(f"open /proc/{pid}/task", OSError(code, ""))
        return NO_ROWS, 0
    return take_ranges(found.pages, found), int(found.running)


def allow_tracer(pid: int) -> None:
    """Let a process trace this one, where the kernel wants that said (Yama's ptrace_scope 1)."""
    if code := -int(lib.uffd_trace_allow(pid)):
        raise_errno("PR_SET_PTRACER", code)


FRAME_BYTES = lib.UFFD_FRAME_MOST  # the memory that an attach needs below a stack pointer


class AttachPoint(Number):
    """How far an attach has come; csrc/remote/attach.h says when each is reached.

    Attributes:
        BEGIN: Nothing has been done.
        SEIZED: The thread is traced.
        STOPPED: The thread is stopped.
        FRAMED: Its way home is written.
        REDIRECTED: Its registers are those of the first system call.
        MASKED: All its signals are blocked.
        MAPPED: The helper's page is mapped.
        PREPARED: The helper's way out is written.
        CLONED: The helper exists.
        OPENED: The helper has a userfaultfd.
        FETCHED: So has this process.
        ENDED: The helper has ended.
        UNMAPPED: Its page is unmapped.
        HALTED: The thread is stopped before its own code.
        UNMASKED: Its signal mask is its own.
        RESTORED: Its registers are its own.
        DONE: It runs.
    """

    BEGIN = lib.UFFD_ATTACH_BEGIN
    SEIZED = lib.UFFD_ATTACH_SEIZED
    STOPPED = lib.UFFD_ATTACH_STOPPED
    FRAMED = lib.UFFD_ATTACH_FRAMED
    REDIRECTED = lib.UFFD_ATTACH_REDIRECTED
    MASKED = lib.UFFD_ATTACH_MASKED
    MAPPED = lib.UFFD_ATTACH_MAPPED
    PREPARED = lib.UFFD_ATTACH_PREPARED
    CLONED = lib.UFFD_ATTACH_CLONED
    OPENED = lib.UFFD_ATTACH_OPENED
    FETCHED = lib.UFFD_ATTACH_FETCHED
    ENDED = lib.UFFD_ATTACH_ENDED
    UNMAPPED = lib.UFFD_ATTACH_UNMAPPED
    HALTED = lib.UFFD_ATTACH_HALTED
    UNMASKED = lib.UFFD_ATTACH_UNMASKED
    RESTORED = lib.UFFD_ATTACH_RESTORED
    DONE = lib.UFFD_ATTACH_DONE


@dataclass(frozen=True, slots=True)
class Attached:
    """How an attach ended: errno (0: well), how far it came, how long the thread was stopped."""

    code: int
    point: AttachPoint
    stopped_ns: int
    by_device: bool


class Attach:
    """One attempt to open a userfaultfd in another process; `held` is for tests."""

    def __init__(
        self,
        *,
        tid: int,
        syscall_ret: int,
        restorer: int,
        scratch: int,
        stack: tuple[int, int],
        place: int,
        flags: int,
        device: int,
        suspend_seccomp: bool,
        limit_ns: int,
        hold: int = 0,
    ) -> None:
        self._cell: Any = ffi.new("struct uffd_attach *")
        cell = self._cell
        cell.tid, cell.syscall_ret, cell.restorer, cell.scratch = (
            tid,
            syscall_ret,
            restorer,
            scratch,
        )
        cell.stack_start, cell.stack_end = stack
        cell.place = place
        cell.flags, cell.device, cell.suspend_seccomp = flags, device, suspend_seccomp
        cell.limit_ns, cell.hold = limit_ns, hold

    @property
    def is_held(self) -> bool:
        """Whether it is stopped at the point where a test wants it to stop."""
        return bool(self._cell.held)

    def release(self) -> None:
        """Let it go on."""
        self._cell.hold = 0

    def run(self, descriptor: Descriptor) -> Attached:
        """Do it; the descriptor gets the userfaultfd."""
        code = lib.uffd_attach(self._cell, descriptor._cell)
        cell = self._cell
        point = AttachPoint(cell.error or cell.point)
        return Attached(-code, point, int(cell.stopped_ns), bool(cell.by_device))


RegisterRow = tuple[int, bool, int, int, int, bytes, bytes, bytes]


def register_rows(sets: Any) -> list[RegisterRow]:
    """Return (tid, whether partial, stop signal, pending, blocked, three sets) of each thread.

    Once for what `StoppedThreads.registers` has returned.
    """
    if code := lib.uffd_registers_to_standard(sets):
        raise_errno("arranging registers", -code)
    xstates = ffi.buffer(sets.xstates, sets.xstates_length) if sets.xstates_length else b""
    return [
        (
            row.tid,
            bool(row.flags & lib.UFFD_REGISTERS_PARTIAL),
            row.stop_signal,
            row.pending,
            row.blocked,
            bytes(ffi.buffer(row.general)),
            bytes(ffi.buffer(row.floating)),
            bytes(xstates[row.xstate_at : row.xstate_at + row.xstate_length]),
        )
        for row in sets.vec[0 : sets.count]
    ]


class StoppedThreads(Owner):
    """Threads of other processes, stopped until `close` or until this process ends."""

    _instead = "stop them once more"

    def __init__(self) -> None:
        super().__init__(ffi.new("struct uffd_stopped **"), lib.uffd_stopped_release)
        self.code = 0
        self.tid = 0
        self.threads = 0
        self.ns = 0
        self.lost = False

    def stop(self, pids: list[int], limit_ns: int, asleep_limit_ns: int) -> None:
        """Stop them; `code` is an errno, and then `tid` is the thread that is to blame.

        The second limit is that for a thread in state D while others are stopped.
        """
        tid, threads, ns = ffi.new("int32_t *"), ffi.new("uint32_t *"), ffi.new("uint64_t *")
        vec = ffi.new("int32_t[]", pids)
        self.code = -lib.uffd_stopped_create(
            vec, len(pids), limit_ns, asleep_limit_ns, self._cell, tid, threads, ns
        )
        self.tid, self.threads, self.ns = int(tid[0]), int(threads[0]), int(ns[0])

    @property
    def holds(self) -> bool:
        """Whether they are stopped."""
        return bool(self._cell[0])

    def registers(self) -> Any:
        """Read the registers of all that have not ended, for `register_rows`, which can wait.

        ETIMEDOUT: the threads were let go early.
        """
        sets = ffi.gc(ffi.new("struct uffd_register_sets *"), lib.uffd_registers_free)
        code = lib.uffd_stopped_registers(self._cell[0], sets)
        if code:
            hint = "it runs 32-bit code" if code == -errno.ENOEXEC else ""
            raise_errno("PTRACE_GETREGSET", -code, hint=hint)
        return sets

    def close(self) -> None:
        """Let them go on; may be called again. Afterwards `lost` tells whether they did before."""
        if self._cell[0]:
            self.lost = bool(lib.uffd_stopped_end(self._cell[0]))
            lib.uffd_stopped_release(self._cell)
