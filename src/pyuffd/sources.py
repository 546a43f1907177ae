"""Where page content comes from (layer L4).

The C engine reads zeros, memory of this process and files without Python. Any other source is
called for its content, which needs a driver that can call Python.
"""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, Protocol, runtime_checkable

from pyuffd import _memory, _source_files
from pyuffd._arguments import check_buffer, check_int, check_part, shown
from pyuffd._closing import Closing, SoleOwner
from pyuffd._describe import short_repr
from pyuffd._enums import Word
from pyuffd._errors import ClosedError, HandlerError
from pyuffd._fork_lock import ForkLock
from pyuffd._limits import start_thread
from pyuffd.regions import Region

if TYPE_CHECKING:
    import asyncio

    from typing_extensions import Buffer


class Promised(Word):
    """The type of `PROMISED`.

    Attributes:
        PROMISED: `Handler.fill` will bring the bytes.
    """

    PROMISED = "promised"

    def __repr__(self) -> str:
        return "PROMISED"


#: What a page source returns instead of bytes if `Handler.fill` will bring them. None would be what
#: a function returns that forgot its `return`.
PROMISED = Promised.PROMISED


@runtime_checkable
class PageSource(Protocol):
    """The content of a region's pages, as bytes by offset from the start of the region."""

    @property
    def length(self) -> int | None:
        """The number of bytes, or None if the source has no end."""

    def read(self, offset: int, length: int) -> Buffer | Promised:
        """Return exactly `length` bytes, padded with zeros beyond the end of the source.

        `PROMISED` instead says that `Handler.fill` will bring them, before `stall_timeout_s` is
        over.
        """


class ZeroSource:
    """Zeros without end: the region is like fresh memory, but the handler sees its faults."""

    @property
    def length(self) -> int | None:
        """None: the source has no end."""
        return None

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` zeros."""
        check_part(offset, length)
        return bytes(length)

    def __repr__(self) -> str:
        return "ZeroSource()"


class BufferSource(SoleOwner):
    """Memory of this process: bytes, bytearray, a numpy array, a region or a part of one.

    The engine copies directly from the buffer: a page gets what the buffer holds when the page is
    filled. The object keeps the buffer alive and prevents its being resized.

    Args:
        data: A contiguous buffer or a `Region`. Pages of it may be missing only if another handler
            resolves their faults: a handler refuses a source in memory that it serves itself. A
            region may be closed meanwhile; its memory stays mapped as long as this object lives.

    Raises:
        ValueError: an empty buffer.

    Example:
        >>> from pyuffd import BufferSource
        >>> BufferSource(b"page" * 1024).length
        4096
    """

    _instead = (
        "it is memory of one process; make another BufferSource of the same buffer or, for another"
        " process, write the bytes to a memfd and make a FileSource of it"
    )

    address: int

    def __init__(self, data: Buffer | Region) -> None:
        if isinstance(data, Region):
            data = data.memoryview()
        check_buffer("data", data)
        self.address, self._length, self._owner = _memory.buffer_address(data)
        if not self._length:
            self._owner.release()
            raise ValueError("an empty buffer cannot fill pages")

    def _let_go(self) -> None:
        """Let the buffer go. For a source that no program has seen; it reads nothing any more."""
        self._length = 0
        self._owner.release()

    @property
    def length(self) -> int:
        """The size of the buffer in bytes."""
        return self._length

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, padded with zeros beyond the end."""
        check_part(offset, length)
        available = max(0, min(length, self._length - offset))
        data = _memory.read(self.address + offset, available) if available else b""
        return data.ljust(length, b"\0")

    def __repr__(self) -> str:
        return f"BufferSource({self._length:#x} bytes at {self.address:#x})"


class FileSource(Closing):
    """A file, read through the page cache (one copy) when pages are filled.

    If the file is truncated while it is served, the handler's `on_error` applies to the pages that
    are lost; they are never filled with zeros. A memfd sealed with F_SEAL_SHRINK needs no check for
    that. Data appended later are not served. If another file is renamed to the path, the source
    keeps reading the file it opened.

    Args:
        file: A path, a file object or a descriptor of a regular file or a block device; pyuffd
            keeps a descriptor of its own. A path is opened for reading only; `Handler.evict` can
            write to the source if it is made of a file that is open for writing. What a file
            object has buffered for writing is written to the file first.
        offset: Offset in the file of the region's first byte, in bytes; any alignment.

    Raises:
        ValueError: a negative offset, or one at or beyond the file's end; a directory, a pipe, a
            socket, a character device, or a file that cannot be mapped (procfs, sysfs).
        TypeError: a file object that gives other bytes than its descriptor (gzip, for example).
        UffdPermissionError: EACCES - a descriptor that is open for writing only.
        OSError: the file cannot be opened.
    """

    _failed = "closing the file source failed"
    _instead = "it holds a descriptor; serve it by itself, or open the file once more"
    _warns = True  # if it is forgotten; not if the program never saw it
    # What the kernel reads for a fault, a power of two; 0: as much as the device's readahead is.
    _around = 0

    def __init__(self, file: _source_files.FileLike, offset: int = 0) -> None:
        check_int("offset", offset, 0)
        with _source_files.open_source(file) as descriptor:
            size = _source_files.size_of(descriptor.number)
            if offset >= size:
                name = _source_files.name_of(descriptor.number)
                raise ValueError(f"offset {offset:#x} is not inside {name}, {size:#x} bytes long")
            self.offset = offset
            self._identity = _source_files.identity_of(descriptor.number)
            self._descriptor = descriptor.moved()

    @property
    def name(self) -> str:
        """The kernel's name of the file: its path."""
        return _source_files.name_of(self.fileno())

    @property
    def length(self) -> int:
        """Bytes from the offset to the end of the file, at its present size."""
        return max(0, _source_files.size_of(self.fileno()) - self.offset)

    def _check_usable(self) -> None:
        self.fileno()

    def fileno(self) -> int:
        """Return the source's own descriptor."""
        fd = self._descriptor.number
        if fd < 0:
            raise ClosedError("this source is closed")
        return fd

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, padded with zeros beyond the end of the file."""
        check_part(offset, length)
        data = bytearray()
        while len(data) < length:
            at = self.offset + offset + len(data)
            piece = os.pread(self.fileno(), length - len(data), at)
            if not piece:
                break
            data += piece
        return bytes(data).ljust(length, b"\0")

    def close(self) -> None:
        """Close the descriptor; a handler that serves the file has a duplicate."""
        self._descriptor.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor") and self._descriptor.is_open and self._warns:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = self.name if self._descriptor.is_open else "closed"
        return f"FileSource({state}, offset={self.offset:#x})"


class CallableSource:
    """A Python function that is called for the content of pages.

    The handler's workers call it, several at once with `workers` above 1. If it raises, or returns
    another number of bytes, the handler's `on_error` applies to the pages and stop() raises
    HandlerError.

    Args:
        function: Called with (offset, length) in bytes from the start of the region, both
            multiples of its page size; returns exactly `length` bytes, or `PROMISED`
            where `Handler.fill` will bring them.
        length: The number of bytes, or None if the source has no end.

    Raises:
        ValueError: a coroutine function (see `AsyncSource`), or something that is not callable.

    Example:
        >>> from pyuffd import CallableSource
        >>> CallableSource(lambda offset, length: b"a" * length).read(4096, 3)
        b'aaa'
    """

    def __init__(
        self, function: Callable[[int, int], Buffer | Promised], length: int | None = None
    ) -> None:
        if not callable(function):
            raise ValueError(f"function: {shown(function)} cannot be called")
        if inspect.iscoroutinefunction(function):
            raise ValueError(
                f"function {short_repr(function)} is a coroutine function: use AsyncSource"
            )
        self.function = function
        self._length = _check_length(length)

    @property
    def length(self) -> int | None:
        """Bytes there are, or None."""
        return self._length

    def read(self, offset: int, length: int) -> Buffer | Promised:
        """Call the function."""
        return self.function(offset, length)

    def __repr__(self) -> str:
        return f"CallableSource({self.function!r})"


class AsyncSource:
    """A coroutine function that is called in an asyncio event loop for the content of pages.

    Each of the handler's workers waits for one coroutine, so at most `workers` of them run at
    once. The loop must keep running while pages are fetched, so do not stop the handler from the
    loop's own thread: use `async with handler` or `await asyncio.to_thread(handler.stop)`. If a
    coroutine raises or is cancelled, or the loop is closed, `on_error` applies to its pages. With
    the process driver the coroutines run in a loop of the worker process.

    Args:
        function: As for `CallableSource`.
        loop: The loop to run it in; by default the running loop, or else one that this module runs
            in a thread.
        length: The number of bytes, or None if the source has no end.

    Raises:
        ValueError: not a coroutine function.
    """

    def __init__(
        self,
        function: Callable[[int, int], Awaitable[Buffer]],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        length: int | None = None,
    ) -> None:
        if not inspect.iscoroutinefunction(function):
            raise ValueError(f"function: {shown(function)} is not a coroutine function")
        if loop is not None and not hasattr(loop, "call_soon_threadsafe"):
            raise TypeError(f"loop must be an asyncio event loop, not {shown(loop)}")
        if loop is None:
            import asyncio

            with suppress(RuntimeError):
                loop = asyncio.get_running_loop()
        self.function = function
        self.loop = loop
        self._length = _check_length(length)

    @property
    def length(self) -> int | None:
        """Bytes there are, or None."""
        return self._length

    def read(self, offset: int, length: int) -> Buffer:
        """Run the coroutine in its loop and wait for it; not from the loop's own thread."""
        import asyncio

        async def run() -> Buffer:
            pid = os.getpid()
            try:
                return await self.function(offset, length)
            except (SystemExit, KeyboardInterrupt) as error:
                # asyncio would let it end the loop, and nobody would get an answer any more.
                raise HandlerError(f"{short_repr(self)} raised {type(error).__name__}") from error
            finally:
                # In a loop of the program's, something else may have forked.
                if self.loop is None and os.getpid() != pid:
                    end_fork()

        loop = self.loop or _own_loop()
        coroutine = run()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError:
            if not loop.is_closed():
                raise
        else:
            while not loop.is_closed() or future.done():
                with suppress(TimeoutError):
                    return future.result(LOOK_S)
                if future.done():  # by now, or the coroutine itself raised TimeoutError
                    return future.result()
        if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
            coroutine.close()  # otherwise Python warns that it was never awaited
        raise HandlerError(
            f"the event loop of {short_repr(self)} is closed: nobody runs its coroutines"
        )

    def runs_here(self) -> bool:
        """Return whether its event loop runs in this thread."""
        import asyncio

        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return False
        return running is self.loop or (self.loop is None and running in _loops)

    def __reduce__(self) -> tuple[Callable[..., AsyncSource], tuple[object, ...]]:
        """Pickle without the loop."""
        return _async_source_elsewhere, (self.function, self._length)

    def __repr__(self) -> str:
        return f"AsyncSource({self.function!r})"


def _async_source_elsewhere(
    function: Callable[[int, int], Awaitable[Buffer]], length: int | None
) -> AsyncSource:
    return AsyncSource(function, length=length)


def end_fork() -> NoReturn:
    """End a process that a page source has forked, and that came back from the source.

    It would answer requests that are its parent's, and keep the userfaultfd open when that has
    ended.
    """
    with suppress(OSError):
        os.write(
            2,
            b"pyuffd: a process that a page source forked came back from the source: it ends here"
            b" (end it by os._exit(), or start a program by subprocess)\n",
        )
    os._exit(1)


# How often a thread that waits for a coroutine looks whether its loop is closed.
LOOK_S = 0.2

_loops: list[asyncio.AbstractEventLoop] = []  # at most one
_loops_lock = ForkLock()


def _forget_loops() -> None:
    """Forget the loop in the child of a fork, where its thread does not exist."""
    _loops.clear()


os.register_at_fork(after_in_child=_forget_loops)


def _own_loop() -> asyncio.AbstractEventLoop:
    import asyncio

    with _loops_lock.now:
        if not _loops:
            loop = asyncio.new_event_loop()
            start_thread(threading.Thread(target=loop.run_forever, name="uffd-async", daemon=True))
            _loops.append(loop)
        return _loops[0]


def _check_length(length: int | None) -> int | None:
    return None if length is None else check_int("length", length, 1)
