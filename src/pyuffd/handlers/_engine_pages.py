"""The C engine's calls that work on pages of a range (layer L4)."""

from __future__ import annotations

import errno
from typing import Any, NoReturn

from pyuffd._diagnose import why_unreadable, why_unresolved
from pyuffd._errors import UffdOSError, raise_errno
from pyuffd._limits import why_not_written
from pyuffd._rows import rows_of
from pyuffd._shim import ffi, lib
from pyuffd.handlers._bounce import Bounce
from pyuffd.handlers._engine_calls import EngineCalls, pointer_to, range_ref
from pyuffd.handlers._packed import FileRuns, Packed
from pyuffd.handlers._types import Protect, RangeId

# For bytes.translate: states without the mark that they are written, a bit that no ASCII has.
_WITHOUT_MARK = bytes(value & ~lib.UFFD_PAGE_WRITTEN for value in range(256))

# These do not tell one from the other.
_ENDED = (errno.ENOENT, errno.ECANCELED)


class EnginePages(EngineCalls):
    """The part of `Engine` that fills, protects and saves pages."""

    _owner_pid: int

    def populate(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages; return the bytes filled.

        Workers are asked for `chunk` bytes at a time, or with 0 for as many as they answer quickly.
        """
        out = ffi.new("struct uffd_populate_result *")
        code = lib.uffd_engine_populate(
            self._engine(), range_ref(served), offset, length, chunk, out
        )
        return self._filled("populate", code, out, served, offset, length)

    def populate_ranges(
        self, served: RangeId, offset: int, length: int, ranges: Packed, chunk: int = 0
    ) -> int:
        """Fill absent pages of ranges in [offset, +length); return the bytes filled."""
        out = ffi.new("struct uffd_populate_result *")
        count = len(ranges.words) // 8 // ranges.width
        with ffi.from_buffer("uint64_t[]", ranges.words) as words:
            code = lib.uffd_engine_populate_ranges(
                self._engine(),
                range_ref(served),
                offset,
                length,
                words,
                ranges.width,
                count,
                chunk,
                out,
            )
        if code == -errno.EINVAL:
            raise ValueError(f"ranges: one of them is no range of whole pages in {length:#x} bytes")
        return self._filled("populate", code, out, served, offset, length)

    def load(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages that have content, in forks too; return the bytes filled."""
        out = ffi.new("struct uffd_populate_result *")
        code = lib.uffd_engine_load(self._engine(), range_ref(served), offset, length, chunk, out)
        return self._filled("load", code, out, served, offset, length)

    def _filled(
        self, op: str, code: int, result: Any, served: RangeId, offset: int, length: int
    ) -> int:
        """Return the bytes of a `struct uffd_populate_result`, or raise its error."""
        if not code:
            return int(result.filled)
        failed = result.failed_at
        at = (failed, None) if failed else (served.start + offset, length)
        hint = self._why_not_populated(served, failed, -code) if failed else ""
        _raise(op, -code, *at, hint=hint, completed=int(result.filled))

    def _why_not_populated(self, served: RangeId, address: int, code: int) -> str:
        """Return why `populate` could not fill a page, or ""."""
        return self._why_no_memory(served, address, code)

    def _why_no_memory(self, served: RangeId, address: int, code: int) -> str:
        """Return what was full when no memory was found for a page for seconds, or ""."""
        return "" if served.space else why_unresolved(code, address, self._owner_pid or "self")

    def preserve(self, served: RangeId, offset: int, length: int, *, unprotect: bool) -> int:
        """Save protected pages, and unprotect them if asked to; return the bytes saved."""
        out, reached = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        code = lib.uffd_engine_preserve(
            self._engine(),
            range_ref(served),
            offset,
            length,
            unprotect,
            out,
            reached,
        )
        if code == -errno.EINVAL:
            raise ValueError(f"the range at {served.start:#x} was served without preserve=")
        if code:
            left = offset + length - int(reached[0])
            place = served.start + int(reached[0])
            hint = why_unreadable(place, place + left) if code == -errno.EFAULT else ""
            _raise("preserve", -code, place, left, hint=hint, completed=int(out[0]))
        return int(out[0])

    def take_in(self, served: RangeId) -> None:
        """Note the pages that are present, as far as the owner's page table can be read."""
        lib.uffd_engine_take_in(self._engine(), range_ref(served))

    def writeprotect(
        self, served: RangeId, offset: int, length: int, pages: int, how: Protect
    ) -> bytes:
        """Protect pages, or lift the protection; return their states as they were then."""
        out = bytearray(pages)
        with ffi.from_buffer("uint8_t[]", out) as pointer:
            code = lib.uffd_engine_writeprotect(
                self._engine(), range_ref(served), offset, length, how, pointer
            )
        if code:
            op = "unprotect" if how is Protect.NOT else "write-protect"
            _raise(op, -code, served.start + offset, length, completed=0)
        return bytes(out)

    def peek(self, served: RangeId, offset: int, length: int, target: int) -> bool:
        """Copy the content of pages to an address; return False if one is missing."""
        place = pointer_to(target)
        code = lib.uffd_engine_peek(self._engine(), range_ref(served), offset, length, place)
        if code == -errno.EACCES:
            raise _unreadable(served.start + offset, length, 0)
        if code not in (0, -errno.EFAULT):
            _raise("evict", -code, served.start + offset, length, completed=0)
        return not code

    def evict(
        self, served: RangeId, offset: int, length: int, wanted: bytes, *, written_too: bool
    ) -> int:
        """Drop the pages that have a 1 in `wanted`; return the bytes dropped."""
        out, reached = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        code = lib.uffd_engine_evict(
            self._engine(), range_ref(served), offset, length, wanted, written_too, out, reached
        )
        return _evicted(served, offset + length, code, out, reached)

    def evict_to(
        self,
        served: RangeId,
        offset: int,
        length: int,
        fd: int,
        begin: int,
        *,
        written_only: bool,
    ) -> int:
        """Protect pages, write them to a file, and drop them; return the bytes dropped."""
        out, reached = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        code = lib.uffd_engine_evict_to(
            self._engine(),
            range_ref(served),
            offset,
            length,
            fd,
            begin,
            written_only,
            out,
            reached,
        )
        if code == -errno.EACCES:
            start = served.start + int(reached[0])
            raise _unreadable(start, served.start + offset + length - start, int(out[0]))
        hint = why_not_written(fd, -code)
        return _evicted(served, offset + length, code, out, reached, hint)

    def retry(self, served: RangeId, offset: int, length: int) -> int:
        """Wake what waits, so that it faults again; return how many pages have failed so far."""
        out = ffi.new("uint64_t *")
        code = lib.uffd_engine_retry(self._engine(), range_ref(served), offset, length, out)
        if code:
            _raise("retry", -code, served.start + offset, length)
        return int(out[0])

    def states(self, served: RangeId, first_page: int, pages: int) -> bytes:
        """Return the state bytes of some pages."""
        out = bytearray(pages)
        with ffi.from_buffer("uint8_t[]", out) as pointer:
            code = lib.uffd_engine_states(
                self._engine(),
                range_ref(served),
                first_page,
                pages,
                pointer,
            )
        if code:
            _raise("page states", -code, served.start, served.length)
        return bytes(out)

    def fill(
        self, served: RangeId, offset: int, source: Bounce | int, length: int, *, unprotected: bool
    ) -> int:
        """Fill absent pages from memory of this process; return the bytes filled."""
        address = source.address if isinstance(source, Bounce) else source
        out, reached = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        code = lib.uffd_engine_fill(
            self._engine(),
            range_ref(served),
            offset,
            length,
            pointer_to(address),
            unprotected,
            out,
            reached,
        )
        if code:
            place, left = served.start + int(reached[0]), offset + length - int(reached[0])
            hint = self._why_no_memory(served, place, -code)
            _raise("fill", -code, place, left, hint=hint, completed=int(out[0]))
        return int(out[0])

    def fill_from_files(self, served: RangeId, rows: memoryview, files: FileRuns) -> int:
        """Fill rows (begin, end, not used) as far as they can be read; return the bytes filled."""
        vec, count = rows_of(rows)
        runs, run_count = rows_of(files.runs, "struct uffd_run_spec")
        fds = ffi.new("int32_t[]", list(files.fds))
        content = ffi.new(
            "struct uffd_content_files *", (runs, run_count, files.length, fds, len(files.fds))
        )
        out = ffi.new("uint64_t *")
        code = lib.uffd_engine_fill_from_files(
            self._engine(), range_ref(served), vec, count, content, out
        )
        if code == -errno.EINVAL:
            raise ValueError(f"rows: one of them is no range of whole pages in {files.length:#x}")
        if code:
            _raise("fill", -code, served.start, served.length, completed=int(out[0]))
        return int(out[0])


def _raise(
    op: str, code: int, start: int, length: int | None, *, hint: str = "", **data: Any
) -> NoReturn:
    """Raise the exception for the positive errno of a call that may have waited for a page."""
    if code in _ENDED and not hint:
        hint = "the memory was unmapped, or unserve() or stop() came meanwhile"
    raise_errno(op, code, start, length, hint=hint, **data)


def _evicted(served: RangeId, end: int, code: int, out: Any, reached: Any, hint: str = "") -> int:
    if code:
        place, left = served.start + int(reached[0]), end - int(reached[0])
        _raise("evict", -code, place, left, hint=hint, completed=int(out[0]))
    return int(out[0])


def _unreadable(start: int, length: int, completed: int) -> UffdOSError:
    """Return the error for pages whose content was to be handed over, and may not be read."""
    hint = why_unreadable(start, start + length) or "a page of it may not be read (mprotect(2))"
    return UffdOSError(errno.EFAULT, "evict", start, length, hint, completed=completed)


def runs_of(states: bytes, page_size: int, offset: int, without: int) -> bytes:
    """Pack the runs of pages whose state is not in the mask, as 64-bit (start, end, state).

    A page that has WRITTEN beside its state is in a run too.
    """
    most = lib.uffd_runs_of(states, len(states), page_size, offset, without, ffi.NULL, 0)
    out = bytearray(most * ffi.sizeof("struct uffd_run"))
    with ffi.from_buffer("struct uffd_run[]", out) as runs:
        lib.uffd_runs_of(states, len(states), page_size, offset, without, runs, most)
    return bytes(out)


def without_marks(states: bytes) -> bytes:
    """Return the states of a checkpoint without the marks of what was written."""
    return states if states.isascii() else states.translate(_WITHOUT_MARK)
