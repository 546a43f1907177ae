"""Packed rows as C reads them (layer L2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyuffd._errors import raise_errno
from pyuffd._shim import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

NO_ROWS = memoryview(b"").cast("Q")


def rows_of(rows: Buffer, kind: str = "struct uffd_page_region") -> tuple[Any, int]:
    """Return a pointer to packed rows, and their number; `rows` must live as long as it is used.

    Not what `from_buffer` returns: before Python 3.12 the garbage collector crashes on a memoryview
    that is in a circle with it, as both are in one with the traceback of an error.
    """
    with ffi.from_buffer(f"{kind}[]", rows) as vec:
        return ffi.cast(f"{kind} *", vec), len(vec)


def owned(kind: str, destructor: Any) -> Any:
    """Return an empty C struct, whose destructor frees what a C function puts in it.

    It exists before that function returns, so that nothing is lost if a signal handler raises then.
    """
    return ffi.gc(ffi.new(f"{kind} *"), destructor)


def new_ranges() -> Any:
    """Return an empty `struct uffd_page_ranges` that owns what C puts in it."""
    return owned("struct uffd_page_ranges", lib.uffd_pagemap_release)


def take_ranges(ranges: Any, owner: Any = None) -> memoryview:
    """Return the packed ranges of a `struct uffd_page_ranges`.

    They keep the struct, from `new_ranges`, or the `owner` that it is a part of.
    """
    count = int(ranges.count)
    if not count:
        return NO_ROWS
    keeps = [ranges if owner is None else owner]
    # A destructor that frees nothing: it refers to the owner for as long as others refer to this.
    kept = ffi.gc(ranges.vec, keeps.append)
    size = count * ffi.sizeof("struct uffd_page_region")
    return memoryview(ffi.buffer(kept, size)).cast("Q").toreadonly()


def state_runs(states: bytes, start: int, page_size: int, state: int) -> memoryview:
    """Return the runs of pages in one state, of one byte for each page, as ranges from `start`."""
    result = new_ranges()
    with ffi.from_buffer("uint8_t[]", states) as pointer:
        code = lib.uffd_pagemap_state_runs(pointer, len(states), start, page_size, state, result)
    packed = take_ranges(result)
    if code:
        raise_errno("runs of states", -code, start)
    return packed
