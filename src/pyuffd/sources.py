"""Where page content comes from (layer L4).

The sources here are read by the C engine without Python: zeros, memory of this process, a file.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, Self, runtime_checkable

from pyuffd import _memory
from pyuffd._errors import ClosedError

if TYPE_CHECKING:
    from typing_extensions import Buffer


@runtime_checkable
class PageSource(Protocol):
    """What a handler fills pages from: bytes by offset, counted from the start of its region."""

    @property
    def length(self) -> int | None:
        """Bytes there are, or None when there is no end."""

    def read(self, offset: int, length: int) -> Buffer:
        """Return exactly `length` bytes, zero-padded behind the source's end."""


class ZeroSource:
    """Zeros without end: fills like fresh memory, but seen by the handler."""

    @property
    def length(self) -> int | None:
        """None: zeros do not end."""
        return None

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` zeros."""
        del offset
        return bytes(length)

    def __repr__(self) -> str:
        return "ZeroSource()"


class BufferSource:
    """Memory of this process: bytes, bytearray, a numpy array, a memoryview of a region.

    The engine copies straight from it, so what it holds when a page is asked for is what the page
    gets. The object keeps the buffer alive and from being resized.

    Args:
        data: A contiguous buffer. It must not lie in a range that a userfaultfd serves.

    Raises:
        ValueError: an empty buffer.

    Example:
        >>> from pyuffd import BufferSource
        >>> BufferSource(b"page" * 1024).length
        4096
    """

    def __init__(self, data: Buffer) -> None:
        self.address, self._length, self._owner = _memory.buffer_address(data)
        self._view = memoryview(data)
        if not self._length:
            raise ValueError("an empty buffer cannot fill pages")

    @property
    def length(self) -> int:
        """Bytes in the buffer."""
        return self._length

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, zero-padded behind the end."""
        available = max(0, min(length, self._length - offset))
        data = _memory.read(self.address + offset, available) if available else b""
        return data.ljust(length, b"\0")

    def __repr__(self) -> str:
        return f"BufferSource({self._length:#x} bytes at {self.address:#x})"


class FileSource:
    """A file, read through the page cache (one copy) as pages are asked for.

    If it is truncated while it is served, the pages that are lost go the way of the handler's
    `on_error`; their content is never made up. Seal a memfd (F_SEAL_SHRINK) to save the check.

    Args:
        file: A path, a file object or a descriptor; pyuffd keeps a descriptor of its own.
        offset: Byte of the file that the region's first byte gets; any alignment.

    Raises:
        ValueError: a negative offset, or one at or behind the file's end.
        OSError: the file cannot be opened.
    """

    def __init__(self, file: str | os.PathLike[str] | IO[bytes] | int, offset: int = 0) -> None:
        self._fd = -1
        if offset < 0:
            raise ValueError(f"offset {offset:#x} is negative")
        if isinstance(file, int):
            self._fd = os.dup(file)
        elif isinstance(file, (str, os.PathLike)):
            self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        else:
            self._fd = os.dup(file.fileno())
        self.offset = offset
        size = os.fstat(self._fd).st_size
        if offset >= size:
            name = self.name
            self.close()
            raise ValueError(f"offset {offset:#x} is not inside {name}, {size:#x} bytes long")

    @property
    def name(self) -> str:
        """The path of the file, as the kernel knows it."""
        return str(Path(f"/proc/self/fd/{self.fileno()}").readlink())

    @property
    def length(self) -> int:
        """Bytes from the offset to the end of the file, as long as it is now."""
        return max(0, os.fstat(self.fileno()).st_size - self.offset)

    def fileno(self) -> int:
        """Return the source's own descriptor."""
        if self._fd < 0:
            raise ClosedError("this source is closed")
        return self._fd

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, zero-padded behind the end of the file."""
        data = bytearray()
        while len(data) < length:
            at = self.offset + offset + len(data)
            piece = os.pread(self.fileno(), length - len(data), at)
            if not piece:
                break
            data += piece
        return bytes(data).ljust(length, b"\0")

    def close(self) -> None:
        """Close the descriptor; what serves from it already has its own."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else self.name
        return f"FileSource({state}, offset={self.offset:#x})"
