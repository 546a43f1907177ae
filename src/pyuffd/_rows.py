"""Packed rows as C reads them (layer L2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyuffd._shim import ffi

if TYPE_CHECKING:
    from typing_extensions import Buffer


def rows_of(rows: Buffer, kind: str = "struct uffd_page_region") -> tuple[Any, int]:
    """Return a pointer to packed rows, and their number; `rows` must live as long as it is used.

    Not what `from_buffer` returns: before Python 3.12 the garbage collector crashes on a memoryview
    that is in a circle with it, as both are in one with the traceback of an error.
    """
    with ffi.from_buffer(f"{kind}[]", rows) as vec:
        return ffi.cast(f"{kind} *", vec), len(vec)
