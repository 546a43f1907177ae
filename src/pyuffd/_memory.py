"""Memory by address, through C calls that release the GIL (layer L2).

It is memory of this process, unless a function has a pid.

Registered memory is touched only here: a Python-level access (`memoryview[i]`, `mmap` slices,
`ffi.memmove`) holds the GIL while it faults, which stops a fault handler in Python.  Every access
here may block until the fault is resolved.  An access that meets SIGBUS raises PagePoisonedError,
or UffdOSError if the page is not poisoned; the bytes before that page have been accessed.
"""

from __future__ import annotations

import errno
import os
from enum import IntFlag
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pyuffd._closing import SoleOwner
from pyuffd._errors import raise_errno
from pyuffd._pages import PAGE_SIZE
from pyuffd._shim import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Here `mmap` is mmap(2), not the module, so its constants are repeated.
_MADV_NORMAL, _MADV_RANDOM = 0, 1
_MREMAP_TO = 3  # MREMAP_MAYMOVE | MREMAP_FIXED
_TRACE_HINT = "looking into another process needs permission to ptrace it"


def read(start: int, length: int) -> bytes:
    """Return `length` bytes of memory."""
    target = bytearray(length)
    read_into(target, start)
    return bytes(target)  # copies private memory, which does not fault


def read_into(target: Buffer, start: int) -> None:
    """Fill `target` from memory."""
    with ffi.from_buffer(target, require_writable=True) as pointer:
        lost = lib.uffd_shim_read_memory(pointer, start, len(pointer))
    if lost:
        raise_lost("read", lost)


def write(start: int, data: Buffer) -> None:
    """Copy a buffer into memory."""
    with ffi.from_buffer(data) as pointer:
        lost = lib.uffd_shim_write_memory(start, pointer, len(pointer))
    if lost:
        raise_lost("write", lost)


def fill(start: int, length: int, value: int) -> None:
    """Set every byte of the range to `value`."""
    lost = lib.uffd_shim_fill_memory(start, value, length)
    if lost:
        raise_lost("fill", lost)


def touch(start: int, length: int, step: int, *, write: bool) -> None:
    """Read, or write without changing, one byte every `step` bytes."""
    access = lib.uffd_shim_touch_write if write else lib.uffd_shim_touch_read
    lost = access(start, length, step)
    if lost:
        raise_lost("touch", lost)


def read_descriptor(fd: int, at: int | None, start: int, length: int) -> None:
    """Read bytes of a descriptor into memory: pread(2) from `at`, or read(2) if that is None.

    Raises:
        UffdOSError: ENODATA - the end came first. EBADF, ECONNRESET, ... of the descriptor.
    """
    _transfer("read", lib.uffd_transfer_read, fd, at, start, length)


def write_descriptor(fd: int, at: int | None, start: int, length: int) -> None:
    """Write memory to a descriptor: pwrite(2) to `at`, or write(2) if that is None."""
    _transfer("write", lib.uffd_transfer_write, fd, at, start, length)


def _transfer(op: str, call: Any, fd: int, at: int | None, start: int, length: int) -> None:
    done, place = ffi.new("uint64_t *"), ffi.cast("void *", start)
    code = -errno.EINTR
    while code == -errno.EINTR:  # between two calls a signal handler of Python's runs
        code = call(fd, -1 if at is None else at, place, length, done)
    if code:
        raise_errno(op, -code, start, length, completed=int(done[0]))


def unguard() -> None:
    """Let SIGBUS kill the process from now on, as for an access by the program; for tests."""
    lib.uffd_shim_unguard()


def note_ended(start: int, length: int, fd: int) -> None:
    """Have the process's first SIGBUS in this range explained by one line on descriptor `fd`."""
    code = lib.uffd_shim_note_ended(start, length, fd)
    if code:
        raise_errno("note what is served no longer", -code, start, length)


def raise_lost(op: str, address: int) -> NoReturn:
    """Raise the exception for an access that met SIGBUS."""
    from pyuffd._lost import lost_error  # a circle; loaded with pyuffd.regions

    is_served = bool(lib.uffd_inline_serves(address))
    raise lost_error(op, address, is_served=is_served, madvise=lib.uffd_shim_madvise)


def buffer_address(data: Buffer) -> tuple[int, int, memoryview]:
    """Return (address, bytes, owner) of a buffer; the address holds while the owner lives."""
    # Not `from_buffer` itself as the owner: in a garbage cycle with a memoryview it crashes.
    owner = memoryview(data)
    with ffi.from_buffer(owner) as pointer:
        return int(ffi.cast("uintptr_t", pointer)), len(pointer), owner


def mmap(
    length: int, prot: int, flags: int, fd: int = -1, offset: int = 0, address: int = 0
) -> int:
    """mmap(2); return the address."""
    out = ffi.new("uint64_t *")
    code = lib.uffd_shim_mmap(address, length, prot, flags, fd, offset, out)
    if code:
        raise_errno("mmap", -code, address or None, length)
    return int(out[0])


def munmap(start: int, length: int) -> None:
    """munmap(2); with EVENT_UNMAP it waits until its event is read."""
    code = lib.uffd_shim_munmap(start, length)
    if code:
        raise_errno("munmap", -code, start, length)


def mremap(start: int, length: int, new_length: int, flags: int, to: int = 0) -> int:
    """mremap(2); return the new address. With EVENT_REMAP it waits until its event is read."""
    out = ffi.new("uint64_t *")
    code = lib.uffd_shim_mremap(start, length, new_length, flags, to, out)
    if code:
        raise_errno("mremap", -code, start, length)
    return int(out[0])


def move(start: int, length: int, to: int, page_size: int) -> None:
    """Move pages to an address, replacing what is mapped there; waits as `mremap` does."""
    if page_size > PAGE_SIZE:
        # Linux since 5.16 (commit 550a7d60bd5e, "mm, hugepages: add mremap() support for hugepage
        # backed vma") loses the reservations of a private hugetlb mapping of which a part is moved:
        # those of the rest stay reserved, but unusable, until the next boot. So first make the part
        # a mapping of its own, by advice that has no effect on hugetlb memory. The kernel does not
        # merge hugetlb mappings again.
        madvise(start, length, _MADV_RANDOM)
        madvise(start, length, _MADV_NORMAL)
    mremap(start, length, length, _MREMAP_TO, to)


def mprotect(start: int, length: int, prot: int) -> None:
    """mprotect(2)."""
    code = lib.uffd_shim_mprotect(start, length, prot)
    if code:
        raise_errno("mprotect", -code, start, length, prot=prot)


def madvise(start: int, length: int, advice: int) -> None:
    """madvise(2); with EVENT_REMOVE, dropping pages waits until the event is read."""
    code = lib.uffd_shim_madvise(start, length, advice)
    if code:
        raise_errno("madvise", -code, start, length, advice=advice)


def memfd_create(name: str, flags: int) -> int:
    """memfd_create(2); return the file descriptor."""
    fd = lib.uffd_shim_memfd_create(name.encode(), flags)
    if fd < 0:
        raise_errno("memfd_create", -fd)
    return fd


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); os.posix_fallocate has no modes (for punching a hole)."""
    code = lib.uffd_shim_fallocate(fd, mode, offset, length)
    if code:
        raise_errno("fallocate", -code, offset, length, mode=mode)


def buffer_of(address: int, length: int, *, keeps: object) -> Buffer:
    """Return a writable buffer over memory; it keeps an object alive and has weak references."""
    # The buffer keeps the pointer alive, and the pointer its destructor: a list's method, which
    # runs no Python code that could be interrupted.
    pointer = ffi.gc(ffi.cast("char *", address), [keeps].append)
    buffer: Buffer = ffi.buffer(pointer, length)
    return buffer


class Maps(IntFlag):
    """What `look_at` finds out about a range."""

    ANONYMOUS = lib.UFFD_MAPS_ANONYMOUS  # some of it is anonymous
    SHARED = lib.UFFD_MAPS_SHARED  # some of it is shared
    REGISTERED = lib.UFFD_MAPS_REGISTERED  # all of it is registered with a userfaultfd
    NOT_FORKED = lib.UFFD_MAPS_NOT_FORKED  # all of it is left out of forks, or wiped there


def look_at(pid: int, start: int, length: int, *, all_facts: bool = False) -> Maps:
    """Return what a process has mapped in a range; REGISTERED and NOT_FORKED with `all_facts`.

    Raises:
        ProcessGoneError: there is no such process.
        UffdPermissionError: EACCES - no permission to ptrace it.
        UffdOSError: EFAULT - part of the range is not mapped.

    Kernel: /proc/PID/maps; with `all_facts` smaps, for which the kernel walks the page tables of
        all mappings below the range's end.
    """
    out = ffi.new("uint32_t *")
    code = lib.uffd_owner_look(pid, start, length, all_facts, out)
    if code:
        hint = _TRACE_HINT if code == -errno.EACCES else ""
        raise_errno(f"the mappings of process {pid}", -code, start, length, hint=hint)
    return Maps(out[0])


def touch_in(pid: int, start: int, length: int, step: int) -> None:
    """Read a byte of each page of another process, so that the missing ones are mapped.

    Raises:
        UffdPermissionError: EPERM - no permission to ptrace it.
        UffdOSError: EFAULT - a page cannot be read.

    Kernel: process_vm_readv(2).
    """
    code = lib.uffd_owner_touch(pid, start, length, step)
    if code:
        hint = _TRACE_HINT if code == -errno.EPERM else ""
        raise_errno(f"process_vm_readv of process {pid}", -code, start, length, hint=hint)


def fstatfs(fd: int) -> tuple[int, int]:
    """Return the type and block size of a file's file system; os.fstatvfs has no type."""
    kind, block_size = ffi.new("int64_t *"), ffi.new("uint64_t *")
    code = lib.uffd_shim_fstatfs(fd, kind, block_size)
    if code:
        raise_errno("fstatfs", -code, fd=fd)
    return kind[0], block_size[0]


class Interrupted(NamedTuple):
    """The signal that stopped an access: its number, si_code and si_addr."""

    number: int
    code: int
    address: int


def guarded_read(start: int, length: int) -> bytes | Interrupted:
    """Read memory; if the access meets SIGBUS or SIGSEGV, return that signal."""
    target, signal = bytearray(length), ffi.new("struct uffd_signal *")
    with ffi.from_buffer(target, require_writable=True) as pointer:
        number = lib.uffd_guarded_read(start, pointer, length, signal)
    return Interrupted(number, signal.code, signal.address) if number else bytes(target)


def guarded_write(start: int, data: Buffer) -> Interrupted | None:
    """Write memory; if the access meets SIGBUS or SIGSEGV, return that signal."""
    signal = ffi.new("struct uffd_signal *")
    with ffi.from_buffer(data) as pointer:
        number = lib.uffd_guarded_write(start, pointer, len(pointer), signal)
    return Interrupted(number, signal.code, signal.address) if number else None


class Agent(SoleOwner):
    """A forked child without Python that accesses its memory and makes system calls on request.

    It dies with the thread that forked it.  `fd` is a stream socket whose other end the child
    reads; when it is closed the child ends.

    Blocks: forking, with EVENT_FORK enabled, until the Fork event is read; each request, until the
        faults that it causes are resolved.
    """

    _instead = "it is a child of this process"

    def __init__(self, child_fd: int, fd: int) -> None:
        pid = lib.uffd_agent_fork(child_fd)
        if pid < 0:
            raise_errno("fork", -pid)
        self.pid = pid
        self._fd = fd

    def read(self, start: int, length: int) -> bytes | Interrupted:
        """Read the child's memory; at most 64 KiB."""
        reply = self._ask(lib.UFFD_AGENT_READ, [start, length])
        data = self._receive(length)
        return reply if isinstance(reply, Interrupted) else data

    def write(self, start: int, data: bytes) -> Interrupted | None:
        """Write the child's memory; at most 64 KiB."""
        reply = self._ask(lib.UFFD_AGENT_WRITE, [start, len(data)], data)
        return reply if isinstance(reply, Interrupted) else None

    def syscall(self, number: int, *args: int) -> int:
        """Make a system call in the child; return its result, or -errno."""
        reply = self._ask(lib.UFFD_AGENT_SYSCALL, [number, *args])
        assert isinstance(reply, int)
        return reply

    def _ask(self, op: int, args: list[int], data: bytes = b"") -> Interrupted | int:
        request = ffi.new("struct uffd_agent_request *", {"op": op, "args": args})
        self._send(bytes(ffi.buffer(request)) + data)
        return self._answer()

    def next_result(self) -> int:
        """Return the result that a second process gives: a fork in the child answers twice."""
        reply = self._answer()
        assert isinstance(reply, int)
        return reply

    def _answer(self) -> Interrupted | int:
        reply = ffi.new("struct uffd_agent_reply *")
        ffi.buffer(reply)[:] = self._receive(ffi.sizeof(reply[0]))
        signal = reply.signal
        if signal.number:
            return Interrupted(signal.number, signal.code, signal.address)
        return int(reply.result)

    def _send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def _receive(self, length: int) -> bytes:
        parts = []
        while length:
            part = os.read(self._fd, length)
            if not part:
                raise_errno("agent", errno.ESRCH)
            parts.append(part)
            length -= len(part)
        return b"".join(parts)
