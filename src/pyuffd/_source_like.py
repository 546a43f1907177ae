"""Objects accepted as page sources: buffers, regions, paths, open files, functions (layer L4)."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from pyuffd._arguments import shown
from pyuffd.regions import Region
from pyuffd.sources import (
    AsyncSource,
    BufferSource,
    CallableSource,
    FileSource,
    PageSource,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from typing_extensions import Buffer

    SourceLike = (
        PageSource
        | Buffer
        | Region
        | str
        | os.PathLike[str]
        | IO[bytes]
        | Callable[[int, int], Buffer]
        | Callable[[int, int], Awaitable[Buffer]]
    )


def _is_source_class(cls: type) -> bool:
    return isinstance(getattr(cls, "length", None), property) and callable(
        getattr(cls, "read", None)
    )


def as_source(value: object, name: str = "source") -> PageSource:
    """Return a page source for an object that obviously is the content of pages.

    A page source is returned as it is. A buffer or a `Region` becomes a BufferSource, a path or an
    open file a FileSource, a function a CallableSource, and a coroutine function an AsyncSource.

    Raises:
        TypeError: anything else; the message names the class to use.
        ValueError, OSError: what the class raises.
    """
    if isinstance(value, type):
        raise TypeError(
            f"{name}: {value.__name__} is a class, and no page source: give an instance,"
            f" {value.__name__}(...)"
        )
    if isinstance(value, Region):  # which has read() and length too
        return BufferSource(value)
    # Asking the protocol first would cost more than all else that is checked (Python 3.11).
    if _is_source_class(type(value)) or isinstance(value, PageSource):
        return value  # type: ignore[return-value]
    if isinstance(value, io.BytesIO):
        return BufferSource(value.getbuffer())
    if isinstance(value, (str, os.PathLike)):
        return _file_source(value)
    if _is_buffer(value):
        return BufferSource(value)  # type: ignore[arg-type]
    if isinstance(value, io.IOBase) or callable(getattr(value, "fileno", None)):
        return _file_source(value)
    if callable(getattr(value, "read", None)):
        raise TypeError(
            f"{name}: {type(value).__name__} has read(), but no `length`, which a page source"
            " needs as well: bytes, or None where there is no end"
        )
    if inspect.iscoroutinefunction(value):
        return AsyncSource(value)
    if callable(value):
        return CallableSource(value)
    raise TypeError(
        f"{name}: {shown(value)} is not a page source: BufferSource(...) makes one of a buffer,"
        " FileSource(...) of a path, an open file or a descriptor, CallableSource(...) and"
        " AsyncSource(...) of a function, OverlaySource(...) of several, and ZeroSource() is zeros"
    )


def _is_buffer(value: object) -> bool:
    try:
        with memoryview(value):  # type: ignore[arg-type]
            return True
    except TypeError:
        return False


def _file_source(file: object) -> FileSource:
    source = FileSource(file)  # type: ignore[arg-type]
    source._warns = False
    return source
