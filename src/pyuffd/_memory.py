"""Memory of this process by address, through C calls that release the GIL (layer L2).

Registered memory is touched here and nowhere else: a Python-level access (`memoryview[i]`,
`mmap` slices, `ffi.memmove`) holds the GIL while it faults, and stops a Python fault handler
with it.  Every function here can block until somebody resolves the fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyuffd._errors import raise_errno
from pyuffd._shim import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer


def read(start: int, length: int) -> bytes:
    """Return `length` bytes of memory."""
    target = bytearray(length)
    read_into(target, start)
    return bytes(target)  # a copy, but of private memory


def read_into(target: Buffer, start: int) -> None:
    """Fill `target` from memory."""
    with ffi.from_buffer(target, require_writable=True) as pointer:
        lib.uffd_shim_read_memory(pointer, start, len(pointer))


def write(start: int, data: Buffer) -> None:
    """Copy a buffer into memory."""
    with ffi.from_buffer(data) as pointer:
        lib.uffd_shim_write_memory(start, pointer, len(pointer))


def fill(start: int, length: int, value: int) -> None:
    """Set every byte of the range to `value`."""
    lib.uffd_shim_fill_memory(start, value, length)


def touch(start: int, length: int, step: int, *, write: bool) -> None:
    """Read, or write without changing, one byte every `step` bytes."""
    if write:
        lib.uffd_shim_touch_write(start, length, step)
    else:
        lib.uffd_shim_touch_read(start, length, step)


def buffer_address(data: Buffer) -> tuple[int, int, object]:
    """Return (address, bytes, owner) of a buffer; the address holds while the owner lives."""
    pointer = ffi.from_buffer(data)
    return int(ffi.cast("uintptr_t", pointer)), len(pointer), pointer


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
    """munmap(2); waits for its event to be read where EVENT_UNMAP is on."""
    code = lib.uffd_shim_munmap(start, length)
    if code:
        raise_errno("munmap", -code, start, length)


def mremap(start: int, length: int, new_length: int, flags: int, to: int = 0) -> int:
    """mremap(2); return the new address; waits for its event where EVENT_REMAP is on."""
    out = ffi.new("uint64_t *")
    code = lib.uffd_shim_mremap(start, length, new_length, flags, to, out)
    if code:
        raise_errno("mremap", -code, start, length)
    return int(out[0])


def mprotect(start: int, length: int, prot: int) -> None:
    """mprotect(2)."""
    code = lib.uffd_shim_mprotect(start, length, prot)
    if code:
        raise_errno("mprotect", -code, start, length, prot=prot)


def madvise(start: int, length: int, advice: int) -> None:
    """madvise(2); waits for its event to be read where EVENT_REMOVE is on."""
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
    """fallocate(2), for its modes (punching a hole); os.posix_fallocate has none."""
    code = lib.uffd_shim_fallocate(fd, mode, offset, length)
    if code:
        raise_errno("fallocate", -code, offset, length, mode=mode)


def buffer_of(address: int, length: int) -> Buffer:
    """Return a writable buffer over memory, weak-referenceable; it does not keep the mapping."""
    buffer: Buffer = ffi.buffer(ffi.cast("char *", address), length)
    return buffer


def fstatfs(fd: int) -> tuple[int, int]:
    """Return the type and block size of a file's file system; os.fstatvfs has no type."""
    kind, block_size = ffi.new("int64_t *"), ffi.new("uint64_t *")
    code = lib.uffd_shim_fstatfs(fd, kind, block_size)
    if code:
        raise_errno("fstatfs", -code, fd=fd)
    return kind[0], block_size[0]
