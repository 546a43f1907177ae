"""What a served range needs of the caller's objects, let go when it is no longer served (L4)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pyuffd import _memory
from pyuffd._arguments import check_buffer
from pyuffd._source_like import as_source
from pyuffd.regions import Region
from pyuffd.sources import BufferSource, FileSource, PageSource

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyuffd._source_like import SourceLike


class Borrowed:
    """Buffers, and sources made of what the caller gave.

    A buffer cannot be resized or released meanwhile. So this is undone explicitly: the last
    reference to it may be in a traceback, or be dropped later by another thread (free-threaded
    Python).
    """

    def __init__(self) -> None:
        # Most ranges need neither; the garbage collector need not look at empty lists for each.
        self._views: tuple[memoryview, ...] = ()
        self._sources: tuple[BufferSource | FileSource, ...] = ()

    def source(self, value: SourceLike) -> PageSource:
        """Return a page source for an object; a source of the caller's stays the caller's."""
        source = as_source(value)
        if source is not value and isinstance(source, (BufferSource, FileSource)):
            self._sources = (*self._sources, source)
        return source

    def buffer(self, preserve: Buffer | Region | None, length: int) -> int:
        """Return the address of the buffer for old content, 0 without one."""
        if preserve is None:
            return 0
        if isinstance(preserve, Region):
            self._views = (*self._views, preserve.memoryview())
            preserve = self._views[-1]
        check_buffer("preserve", preserve)
        address, size, view = _memory.buffer_address(preserve)
        self._views = (*self._views, view)
        if view.readonly:
            raise ValueError("preserve must be a writable buffer")
        if size < length:
            raise ValueError(f"preserve has {size:#x} bytes, fewer than the region's {length:#x}")
        return address

    def let_go(self) -> None:
        """Let everything go; may be called again."""
        for source in self._sources:
            if isinstance(source, FileSource):
                source.close()
            else:
                source._let_go()
        for view in reversed(self._views):
            with suppress(BufferError):  # not while something looks at it
                view.release()
