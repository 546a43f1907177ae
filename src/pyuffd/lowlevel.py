"""One function per system call and ioctl, with the arguments of the manual page (layer L2).

Addresses, lengths and modes go to the kernel unchecked. An errno becomes an exception of
`pyuffd._errors`, with the kernel's partial count.  Every call releases the GIL.  Use `Userfaultfd`
unless you need exactly this.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from pyuffd._enums import Number
from pyuffd._errors import raise_errno
from pyuffd._owned import Descriptor
from pyuffd._pages import PAGE_SIZE
from pyuffd._rows import new_ranges, rows_of, take_ranges
from pyuffd._shim import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

DEVICE = "/dev/userfaultfd"


class FillOp(Number):
    """Which ioctl `fill` repeats.

    Attributes:
        COPY: UFFDIO_COPY.
        ZEROPAGE: UFFDIO_ZEROPAGE.
        CONTINUE: UFFDIO_CONTINUE.
        POISON: UFFDIO_POISON.
        MOVE: UFFDIO_MOVE.
    """

    COPY = lib.UFFD_FILL_COPY
    ZEROPAGE = lib.UFFD_FILL_ZERO
    CONTINUE = lib.UFFD_FILL_CONTINUE
    POISON = lib.UFFD_FILL_POISON
    MOVE = lib.UFFD_FILL_MOVE


def owned_syscall(flags: int) -> Descriptor:
    """Call userfaultfd(2)."""
    return Descriptor.open_uffd(flags)


def owned_device(flags: int, path: str = DEVICE) -> Descriptor:
    """Ask /dev/userfaultfd (Linux 6.1) for a userfaultfd."""
    return Descriptor.open_uffd_device(flags, path)


def open_syscall(flags: int) -> int:
    """Call userfaultfd(2) and return the file descriptor."""
    return owned_syscall(flags).release()


def open_device(flags: int, path: str = DEVICE) -> int:
    """Ask /dev/userfaultfd (Linux 6.1) for a userfaultfd and return the file descriptor."""
    return owned_device(flags, path).release()


def api(fd: int, features: int) -> tuple[int, int]:
    """Do the UFFDIO_API handshake; return (features the kernel supports, ioctls)."""
    out = ffi.new("uint64_t[2]")
    code = lib.uffd_shim_api(fd, features, out, out + 1)
    if code:
        raise_errno("UFFDIO_API", -code, requested=features)
    return out[0], out[1]


class Granted:
    """The ioctls that a range supports: 0 until the kernel has registered it."""

    def __init__(self) -> None:
        self._cell: Any = ffi.new("uint64_t *")
        self._owner: object = None
        self.is_unknown: bool = False  # a helper process was asked to register it

    @property
    def ioctls(self) -> int:
        """The mask."""
        return int(self._cell[0])

    def ask(self) -> None:
        """Note that another process is asked to register it."""
        self.is_unknown = True

    def answer(self, ioctls: int) -> None:
        """Note what it has answered; 0: it has not registered it."""
        self._cell[0] = ioctls
        self.is_unknown = False

    def follow(self, cell: Any, owner: object) -> None:
        """Have what C writes to a place inside `owner`."""
        self._cell, self._owner = cell, owner


def register(fd: int, start: int, length: int, mode: int, granted: Granted | None = None) -> int:
    """UFFDIO_REGISTER; return the mask of ioctls that the range supports.

    `granted` receives it too, even if this call is interrupted.
    """
    granted = granted or Granted()
    code = lib.uffd_shim_register(fd, start, length, mode, granted._cell)
    if code:
        raise_errno("UFFDIO_REGISTER", -code, start, length, mode=mode)
    return granted.ioctls


def try_register(fd: int, start: int, length: int, mode: int) -> None:
    """UFFDIO_REGISTER, and UFFDIO_UNREGISTER at once."""
    code = lib.uffd_shim_try_register(fd, start, length, mode)
    if code:
        raise_errno("UFFDIO_REGISTER", -code, start, length, mode=mode)


def unregister(fd: int, start: int, length: int) -> None:
    """UFFDIO_UNREGISTER: threads that wait for missing pages continue, with zero-filled pages.

    Linux wakes them only if the range is registered for MISSING: others need `wake`.
    """
    code = lib.uffd_shim_unregister(fd, start, length)
    if code:
        raise_errno("UFFDIO_UNREGISTER", -code, start, length)


def wake(fd: int, start: int, length: int) -> None:
    """UFFDIO_WAKE: threads that wait in the range try their access again."""
    code = lib.uffd_shim_wake(fd, start, length)
    if code:
        raise_errno("UFFDIO_WAKE", -code, start, length)


def copy(fd: int, dst: int, src: int, length: int, mode: int = 0) -> int:
    """UFFDIO_COPY from address `src` of this process; return the bytes copied."""
    out = ffi.new("int64_t *")
    code = lib.uffd_shim_copy(fd, dst, src, length, mode, out)
    if code:
        raise_errno("UFFDIO_COPY", -code, dst, length, completed=max(out[0], 0))
    return int(out[0])


def zeropage(fd: int, start: int, length: int, mode: int = 0) -> int:
    """UFFDIO_ZEROPAGE; return the bytes zeroed."""
    out = ffi.new("int64_t *")
    code = lib.uffd_shim_zeropage(fd, start, length, mode, out)
    if code:
        raise_errno("UFFDIO_ZEROPAGE", -code, start, length, completed=max(out[0], 0))
    return int(out[0])


def move(fd: int, dst: int, src: int, length: int, mode: int = 0) -> int:
    """UFFDIO_MOVE of pages of the owner from `src` to `dst`; return the bytes moved."""
    out = ffi.new("int64_t *")
    code = lib.uffd_shim_move(fd, dst, src, length, mode, out)
    if code:
        raise_errno("UFFDIO_MOVE", -code, dst, length, completed=max(out[0], 0))
    return int(out[0])


def writeprotect(fd: int, start: int, length: int, mode: int) -> None:
    """UFFDIO_WRITEPROTECT: protect the range, or remove the protection and wake."""
    code = lib.uffd_shim_writeprotect(fd, start, length, mode)
    if code:
        raise_errno("UFFDIO_WRITEPROTECT", -code, start, length, mode=mode)


def continue_(fd: int, start: int, length: int, mode: int = 0) -> int:
    """UFFDIO_CONTINUE: map pages of the page cache; return the bytes mapped."""
    out = ffi.new("int64_t *")
    code = lib.uffd_shim_continue(fd, start, length, mode, out)
    if code:
        raise_errno("UFFDIO_CONTINUE", -code, start, length, completed=max(out[0], 0))
    return int(out[0])


def poison(fd: int, start: int, length: int, mode: int = 0) -> int:
    """UFFDIO_POISON: make accesses to the range raise SIGBUS; return the bytes poisoned."""
    out = ffi.new("int64_t *")
    code = lib.uffd_shim_poison(fd, start, length, mode, out)
    if code:
        raise_errno("UFFDIO_POISON", -code, start, length, completed=max(out[0], 0))
    return int(out[0])


def rwprotect(fd: int, start: int, length: int, mode: int) -> None:
    """UFFDIO_RWPROTECT (Linux 7.3): make the next access fault, whether read or write."""
    code = lib.uffd_shim_rwprotect(fd, start, length, mode)
    if code:
        raise_errno("UFFDIO_RWPROTECT", -code, start, length, mode=mode)


def set_mode(fd: int, enable: int, disable: int) -> None:
    """UFFDIO_SET_MODE (Linux 7.3): enable and disable features of an open userfaultfd."""
    code = lib.uffd_shim_set_mode(fd, enable, disable)
    if code:
        raise_errno("UFFDIO_SET_MODE", -code, enable=enable, disable=disable)


def fill(
    op: FillOp,
    fd: int,
    dst: int,
    src: int,
    length: int,
    mode: int,
    page_size: int,
    limit_ns: int,
) -> tuple[int, int, int]:
    """Repeat one filling ioctl over a range; return the bytes (done, already present, deferred).

    After a partial result it continues; at EEXIST it wakes and skips a page; EAGAIN is retried for
    `limit_ns`.
    """
    request = ffi.new("struct uffd_fill *")
    request.op = op
    request.fd = fd
    request.dst = dst
    request.src = src
    request.length = length
    request.mode = mode
    request.page_size = page_size
    request.limit_ns = limit_ns
    out = ffi.new("struct uffd_fill_result *")
    code = lib.uffd_fill_run(request, out)
    if code:
        past = out.done + out.already_present
        raise_errno(
            f"fill ({op.name.lower()})", -code, dst + past, length - past, completed=out.done
        )
    return out.done, out.already_present, out.deferred


def read(fd: int, size: int) -> bytes:
    """read(2) whole messages; b"" when none is queued on a non-blocking descriptor."""
    buffer = bytearray(size)
    with ffi.from_buffer(buffer) as pointer:
        count = lib.uffd_reads_read(fd, pointer, size)
    if count == -errno.EAGAIN:
        return b""
    if count < 0:
        raise_errno("read", -count)
    return bytes(memoryview(buffer)[:count])


# The thread that reports threads waiting for events that are not read (csrc/watch/watch.h).


def watch_begin(
    fd: int,
    span: tuple[int, int],
    *,
    owner_pid: int,
    sent_to: int,
    say_fd: int,
    by_handler: bool,
    has_forks: bool,
) -> None:
    """Let the watching thread look at a userfaultfd; a second call updates what it knows."""
    watched = ffi.new("struct uffd_watched *")
    watched.fd, watched.owner_pid, watched.sent_to = fd, owner_pid, sent_to
    watched.say_fd, watched.has_forks = say_fd, has_forks
    watched.low, watched.high = span
    watched.reader = lib.UFFD_WATCH_HANDLER if by_handler else lib.UFFD_WATCH_USER
    lib.uffd_watch_begin(watched)


def watch_end(fd: int) -> None:
    """Undo a `watch_begin`; call it before the descriptor is closed."""
    lib.uffd_watch_end(fd)


def watch_pause() -> None:
    """End the watching thread until `watch_resume`, unless a fork may wait for its event."""
    lib.uffd_watch_pause()


def watch_resume() -> None:
    """Undo a `watch_pause`."""
    lib.uffd_watch_resume()


def ioctl_number(nr: int) -> int:
    """Return the request number of the ioctl whose bit in the ioctls masks is `nr`."""
    return lib.uffd_shim_ioctl_number(nr)


# /proc/PID/pagemap.  Packed results are read-only memoryviews of 64-bit numbers ("Q"); a range is
# three of them (start, end, categories).

MAPPING_SHARED = lib.UFFD_MAPPING_SHARED
MAPPING_FILE = lib.UFFD_MAPPING_FILE
MAPPING_MINCORE = lib.UFFD_MAPPING_MINCORE
MAPPING_SEEK = lib.UFFD_MAPPING_SEEK

_allocate = ffi.new_allocator(should_clear_after_alloc=False)
_RANGE_WORDS = 3


def pagemap_alive(fd: int) -> None:
    """Raise ProcessGoneError if the address space of an open pagemap is gone."""
    code = lib.uffd_pagemap_alive(fd)
    if code:
        raise_errno("pagemap", -code)


def pagemap_read(fd: int, start: int, length: int) -> memoryview:
    """Read the entries of `length` bytes of address space, one for each 4 KiB."""
    pages = length // PAGE_SIZE
    entries = _allocate("uint64_t[]", pages)
    out = ffi.new("uint64_t *")
    code = lib.uffd_pagemap_read(fd, start, pages, entries, out)
    if code:
        raise_errno("pagemap read", -code, start, length, completed=out[0] * PAGE_SIZE)
    return memoryview(ffi.buffer(entries)).cast("Q").toreadonly()


def pagemap_count(entries: memoryview, mask: int, value: int) -> int:
    """Count the entries whose bits under `mask` are `value`."""
    out = ffi.new("uint64_t *")
    pointer, count = rows_of(entries, "uint64_t")
    lib.uffd_pagemap_count(pointer, count, mask, value, out)
    return int(out[0])


def pagemap_runs(entries: memoryview, start: int, mask: int, value: int) -> memoryview:
    """Return the runs of entries whose bits under `mask` are `value`, as ranges from `start`."""
    ranges = new_ranges()
    pointer, count = rows_of(entries, "uint64_t")
    code = lib.uffd_pagemap_runs(pointer, count, start, mask, value, ranges)
    packed = take_ranges(ranges)
    if code:
        raise_errno("pagemap runs", -code, start)
    return packed


def pagemap_bytes(ranges: memoryview) -> int:
    """Return the sum of the sizes of packed ranges."""
    out = ffi.new("uint64_t *")
    pointer, count = rows_of(ranges)
    lib.uffd_pagemap_bytes(pointer, count, out)
    return int(out[0])


def pagemap_scan(
    fd: int,
    start: int,
    end: int,
    *,
    flags: int = 0,
    vec_len: int = 0,
    max_pages: int = 0,
    category_inverted: int = 0,
    category_mask: int = 0,
    category_anyof_mask: int = 0,
    return_mask: int = 0,
) -> tuple[memoryview, int]:
    """PAGEMAP_SCAN once; return (ranges, walk_end)."""
    vec = _allocate("struct uffd_page_region[]", vec_len)
    arg = ffi.new("struct uffd_pm_scan_arg *")
    arg.size = ffi.sizeof(arg[0])
    arg.flags, arg.start, arg.end = flags, start, end
    arg.vec = int(ffi.cast("uintptr_t", vec)) if vec_len else 0
    arg.vec_len, arg.max_pages = vec_len, max_pages
    arg.category_inverted, arg.category_mask = category_inverted, category_mask
    arg.category_anyof_mask, arg.return_mask = category_anyof_mask, return_mask
    out = ffi.new("uint64_t *")
    code = lib.uffd_pagemap_scan(fd, arg, out)
    if code:
        raise_errno("PAGEMAP_SCAN", -code, start, end - start, flags=flags)
    return memoryview(ffi.buffer(vec)).cast("Q")[: _RANGE_WORDS * out[0]].toreadonly(), arg.walk_end


def pagemap_scan_all(
    fd: int,
    start: int,
    end: int,
    *,
    flags: int = 0,
    vec_len: int = (1 << 64) - 1,
    max_pages: int = 0,
    category_inverted: int = 0,
    category_mask: int = 0,
    category_anyof_mask: int = 0,
    return_mask: int = 0,
) -> tuple[memoryview, int, int]:
    """PAGEMAP_SCAN until the range is walked or a limit is met.

    Returns (ranges, walk_end, errno). It does not raise the error, so that the pages found before
    it, which may be write-protected now, are not lost.
    """
    arg = ffi.new("struct uffd_pm_scan_arg *")
    arg.flags, arg.start, arg.end = flags, start, end
    arg.vec_len, arg.max_pages = vec_len, max_pages
    arg.category_inverted, arg.category_mask = category_inverted, category_mask
    arg.category_anyof_mask, arg.return_mask = category_anyof_mask, return_mask
    ranges = new_ranges()
    out = ffi.new("uint64_t *")
    code = lib.uffd_pagemap_scan_all(fd, arg, ranges, out)
    return take_ranges(ranges), int(out[0]), -code


def pagemap_first_of(fd: int, spans: Buffer, anyof: int) -> int:
    """Return which of these spans, packed (start, length), is the first with such a page.

    It is their number if none has one.
    """
    out = ffi.new("uint64_t *")
    with ffi.from_buffer("uint64_t[]", spans) as words:
        code = lib.uffd_pagemap_first_of(fd, words, len(words) // 2, anyof, out)
    if code:
        raise_errno("PAGEMAP_SCAN", -code, flags=0)
    return int(out[0])


def pagemap_residency(
    pagemap_fd: int,
    start: int,
    length: int,
    page_size: int,
    states: memoryview,
    *,
    file_fd: int = -1,
    offset: int = 0,
    mapping: int = 0,
) -> None:
    """Write one UFFD_RESIDENCY_* byte per page of a range inside one mapping to `states`."""
    with ffi.from_buffer("uint8_t[]", states, require_writable=True) as pointer:
        code = lib.uffd_residency_of(
            pagemap_fd, start, length, page_size, file_fd, offset, mapping, pointer
        )
    if code:
        raise_errno("residency", -code, start, length)
