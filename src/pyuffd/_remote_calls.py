"""Calls on other processes' memory and mappings, in bulk (layer L2).

Addresses and lengths go to the kernel unchecked; results stay packed. Every call releases the GIL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyuffd._errors import raise_errno
from pyuffd._shim import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAP_WORDS = 8  # 64-bit numbers of one packed mapping
MAP_READ = lib.UFFD_MAP_READ
MAP_WRITE = lib.UFFD_MAP_WRITE
MAP_EXECUTE = lib.UFFD_MAP_EXECUTE
MAP_SHARED = lib.UFFD_MAP_SHARED

_NO_ROWS = memoryview(b"").cast("Q")


def maps_read(fd: int, pid: int) -> tuple[bytes, bytes]:
    """Read an open /proc/PID/maps; return the packed mappings and the bytes of their names."""
    maps = ffi.gc(ffi.new("struct uffd_maps *"), lib.uffd_maps_free)
    code = lib.uffd_maps_read(fd, maps)
    if code:
        raise_errno(f"read /proc/{pid}/maps", -code)
    size = maps.count * ffi.sizeof("struct uffd_map")
    names = bytes(ffi.buffer(maps.names, maps.names_length)) if maps.names_length else b""
    return bytes(ffi.buffer(maps.vec, size)), names


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
    vec = ffi.from_buffer("struct uffd_page_region[]", ranges)
    lost, out = ffi.new("struct uffd_page_ranges *"), ffi.new("uint64_t *")
    code = lib.uffd_remote_read(
        pid, vec, len(vec), ffi.cast("void *", address), size, _base(base), lost, out
    )
    packed = take_ranges(lost)
    if code:
        raise_errno("process_vm_readv", -code, completed=int(out[0]))
    return packed, int(out[0])


def read_ranges_to_file(
    pid: int, ranges: memoryview, fd: int, offset: int, base: int | None
) -> tuple[memoryview, int]:
    """As `read_ranges`, to a file from an offset on."""
    vec = ffi.from_buffer("struct uffd_page_region[]", ranges)
    lost, out = ffi.new("struct uffd_page_ranges *"), ffi.new("uint64_t *")
    code = lib.uffd_remote_read_to_file(pid, vec, len(vec), fd, offset, _base(base), lost, out)
    packed = take_ranges(lost)
    if code:
        raise_errno("copying memory to a file", -code, completed=int(out[0]))
    return packed, int(out[0])


def _base(base: int | None) -> int:
    return int(lib.UFFD_PACKED) if base is None else base


def take_ranges(ranges: Any) -> memoryview:
    """Return the packed ranges of a `struct uffd_page_ranges`, which C allocated; it is emptied."""
    vec, count = ranges.vec, int(ranges.count)
    ranges.vec, ranges.count, ranges.capacity = ffi.NULL, 0, 0
    owned = ffi.gc(vec, lib.uffd_pagemap_free)
    if not count:
        return _NO_ROWS
    size = count * ffi.sizeof("struct uffd_page_region")
    return memoryview(ffi.buffer(owned, size)).cast("Q").toreadonly()


def is_alive(pagemap_fd: int) -> bool:
    """Return whether the memory behind an open pagemap still exists: no exit, no execve(2)."""
    return not lib.uffd_pagemap_alive(pagemap_fd)
