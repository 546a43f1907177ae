"""Filling pages of a served region when asked to (layer L4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyuffd import _memory
from pyuffd._abi import RegisterMode
from pyuffd._arguments import check_bools, check_buffer, check_fd, check_int, shown
from pyuffd._describe import repr_of
from pyuffd._errors import UffdOSError
from pyuffd._open_files import Reader, check_open_file, read_stream, reader_of
from pyuffd._pages import RangeLike
from pyuffd.handlers._base import HandlerBase
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._packed import packed
from pyuffd.handlers._threads import WorkedEngine
from pyuffd.handlers._types import SourceKind
from pyuffd.sources import FileSource

if TYPE_CHECKING:
    from typing import Protocol

    from typing_extensions import Buffer

    from pyuffd.handlers._backend import Backend
    from pyuffd.handlers._bounce import Bounce
    from pyuffd.handlers._packed import FileRuns, Ranges
    from pyuffd.handlers._serving import Served

    class HasDescriptor(Protocol):
        """An open file or socket."""

        def fileno(self) -> int:
            """Return its descriptor."""


@dataclass(frozen=True, slots=True)
class Given:
    """What `fill` was given: an address of this process, or a descriptor to read from.

    `at` is the place in a descriptor, or None for the next bytes of a stream. `reader` is set for a
    stream that keeps bytes of its own. `owner` keeps the memory alive.
    """

    length: int | None
    address: int = 0
    fd: int = -1
    at: int | None = None
    owner: object = None
    reader: Reader | None = None

    @property
    def is_memory(self) -> bool:
        """Whether it is memory of this process."""
        return self.fd < 0 and self.reader is None

    def read(self, done: int, bounce: Bounce, size: int) -> None:
        """Read the bytes from `done` on into the beginning of `bounce`."""
        if self.reader is not None:
            read_stream(self.reader, self.owner, bounce.view[:size], bounce.address)
        elif self.fd >= 0:
            at = None if self.at is None else self.at + done
            _memory.read_descriptor(self.fd, at, bounce.address, size)
        else:
            _memory.read_into(bounce.view[:size], self.address + done)


def given(data: Buffer | RangeLike | HasDescriptor | int, at: int | None) -> Given:
    """Return what `data` means; TypeError for anything else."""
    if at is not None:
        check_int("data_offset", at, 0, 1 << 63)
    if isinstance(data, FileSource):
        raise TypeError(
            f"data: {repr_of(data)} is a page source: pass its descriptor, source.fileno(), and"
            " data_offset=source.offset"
        )
    if not isinstance(data, type) and (
        callable(getattr(data, "fileno", None)) or callable(getattr(data, "readinto", None))
    ):
        reader = reader_of("data", data) if at is None else None
        if reader is not None:
            return Given(None, owner=data, reader=reader)
        return Given(None, fd=check_open_file("data", data), at=at, owner=data)
    if isinstance(data, int):
        return Given(None, fd=check_fd("data", data), at=at)
    if at is not None:
        raise ValueError("data_offset is for a descriptor: give a slice of the buffer")
    if not isinstance(data, type) and hasattr(data, "start") and hasattr(data, "length"):
        start, length = check_int("data.start", data.start), check_int("data.length", data.length)
        return Given(length, address=start, owner=data)
    try:
        check_buffer("data", data)
    except TypeError:
        raise TypeError(
            "data must be a buffer, a region, or an open file, socket or descriptor, not"
            f" {shown(data)}"
        ) from None
    address, size, owner = _memory.buffer_address(data)  # type: ignore[arg-type]
    return Given(size, address=address, owner=owner)


class FillsPages(HandlerBase):
    """The part of `Handler` that fills pages."""

    def populate(
        self,
        region: RangeLike,
        offset: int = 0,
        length: int | None = None,
        *,
        ranges: Ranges | None = None,
        chunk: int | None = None,
    ) -> int:
        """Fill the absent pages of a region now, and return the bytes filled.

        This thread fills them or, with a source in Python, the workers, so call start() first. If
        the content of a page cannot be read, the page stays absent and no further pages are
        fetched; `on_error` applies only to pages that a thread waits for. With a source in Python,
        stop() raises the failure too, unless the page has been filled by then.

        Guard pages (MADV_GUARD_INSTALL) are absent, and UFFDIO_COPY puts a page in their place
        (measured on Linux 6.18); so do `load`, `fill` and `prefetch`. Install them afterwards.

        Args:
            region: A served region.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.
            ranges: Instead of offset and length: many ranges, filled in this order by one call
                in C. They are pairs of offsets (start, end), an array of two or three columns of
                64-bit numbers, whose third is not used, or what `checkpoint` has returned.
            chunk: Ask a source in Python for at most this many bytes at a time; a multiple of the
                page size. None begins with a page and asks for more, up to 1 MiB, as long as an
                answer needs no more than a quarter of `stall_timeout_s`. If a source raises when
                it is asked for several pages, it is asked for half of them, down to one.

        Raises:
            ValueError: not served, pages outside the region, or a bad chunk. One of the `ranges` is
                bad: then nothing is filled.
            UffdOSError: EIO - the source raised; its exception is the cause. ETIMEDOUT - it did not
                answer in time. ENOMEM - no huge page became free in time. ENODATA - the file of a
                FileSource was truncated. `start` is the first
                page without content, and `completed` bytes were filled. With several workers some
                of these may lie after `start`.

        Kernel: UFFDIO_COPY(2const), UFFDIO_ZEROPAGE(2const), UFFDIO_CONTINUE(2const).  GIL:
        released.  Threads: safe; several threads fill several parts at once.  Blocks: until the
        pages are filled, for a source in Python until it has answered for each piece.

        Example:
            >>> import pyuffd
            >>> with pyuffd.lazy(b"page".ljust(4096) * 8, fault_log=10) as memory:
            ...     memory.handler.populate(memory, ranges=[(0, 4096), (8192, 16384)])
            12288
        """
        some = None if ranges is None else packed(ranges)
        if some is not None and (offset, length) != (0, None):
            raise ValueError("populate takes either offset and length, or ranges")
        engine, served, first, pages = self._pages(region, offset, length)
        self._check_chunk(served, chunk, "populate")
        size = served.page_size
        at, span = first * size, pages * size
        if isinstance(engine, WorkedEngine):
            engine.check_access(served, served.id.start + at, span)
        if some is not None:
            return engine.populate_ranges(served.id, at, span, some, chunk or 0)
        return engine.populate(served.id, at, span, chunk or 0)

    def _fill_from_files(self, region: RangeLike, rows: memoryview, files: FileRuns) -> int | None:
        """Fill rows (begin, end, not used) from files, in C, as far as they can be read now.

        Returns the bytes filled; None if the engine is elsewhere, where `populate` does it.
        """
        engine, served, first, _ = self._pages(region, 0, None)
        if first or not isinstance(engine, Engine) or isinstance(engine, WorkedEngine):
            return None
        return engine.fill_from_files(served.id, rows, files)

    def load(
        self,
        region: RangeLike,
        offset: int = 0,
        length: int | None = None,
        *,
        chunk: int | None = None,
    ) -> int:
        """Fill the absent pages that have content, in forks too, and return the bytes filled.

        Afterwards `unserve` loses nothing. Unlike `populate` this leaves pages that are zeros by
        what their source is (a ZeroSource, the gaps of an OverlaySource) to their faults, so that
        memory which a process has only reserved is not used up; it skips what the owner has
        unmapped, and follows what was moved. The copies that forks have of the region are filled
        after it, those of private memory each with pages of its own.

        Args:
            region: A served region.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.
            chunk: As for `populate`.

        Raises:
            ValueError: not served, pages outside the region, or a bad chunk.
            UffdOSError: as `populate`.
            ProcessGoneError: ESRCH - the process has exited; what its forks have was filled.

        Kernel: UFFDIO_COPY(2const).  GIL: released.  Threads: safe; several threads fill several
        parts at once.  Blocks: until the pages are filled. A fault waits for one slice of 4 MiB at
        most.

        Example:
            >>> from pyuffd import Handler, OverlaySource, Region, Userfaultfd
            >>> image = OverlaySource([(4096, 4096, b"x" * 4096)], gaps="zeros", length=1 << 20)
            >>> with (
            ...     Userfaultfd() as uffd,
            ...     Region.anonymous(1 << 20) as region,
            ...     Handler(uffd) as handler,
            ... ):
            ...     _ = handler.serve(region, image)
            ...     handler.load(region)
            4096
        """
        engine, served, first, pages = self._pages(region, offset, length)
        self._check_chunk(served, chunk, "load")
        size = served.page_size
        if isinstance(engine, WorkedEngine):
            engine.check_access(served, served.id.start + first * size, pages * size)
        return engine.load(served.id, first * size, pages * size, chunk or 0)

    def _check_chunk(self, served: Served, chunk: int | None, what: str) -> None:
        if chunk is not None and (check_int("chunk", chunk, 1) <= 0 or chunk % served.page_size):
            raise ValueError(
                f"chunk {chunk:#x} is not a positive multiple of the page size"
                f" {served.page_size:#x}"
            )
        if served.kind is SourceKind.REQUEST and not self._started:
            raise ValueError(f"{what} needs running workers: call start() first")

    def fill(
        self,
        region: RangeLike,
        offset: int,
        data: Buffer | RangeLike | HasDescriptor | int,
        length: int | None = None,
        *,
        data_offset: int | None = None,
        keep_protected: bool | None = None,
    ) -> int:
        """Fill absent pages with content that the caller has, and return the bytes filled.

        This is for content that comes by itself, as from the sender of a migration, while faults
        ask for other pages. A page is filled once, by the first that comes: one that is present,
        dropped (REMOVED) or poisoned keeps what it has, and its data are not used. The threads that
        wait for a page go on. A page that a source in Python was asked for is filled as well, and
        the answer of the source, which may be `PROMISED`, is no longer needed.

        Args:
            region: A served region.
            offset: Where to begin in bytes, a multiple of the page size.
            data: A buffer, a region or range of this process's memory, or a descriptor (an open
                file or socket, or its number). A descriptor is read in C, `length` bytes from
                `data_offset`, or the next bytes of a stream; this waits for them. A stream that
                buffers or decodes (an open file with a buffer, gzip, TLS, HTTP) is read by its own
                `readinto`, and a socket with a timeout by `recv_into`.
            length: Bytes, a multiple of the page size; all of a buffer or region by default, and
                with a descriptor up to the end of the region.
            data_offset: Where to begin in the file of a descriptor; None reads on where it, or the
                file object, is.
            keep_protected: For a region served with RegisterMode.WP: True (the default) fills
                protected pages, so that a later write makes them DIRTY. With False the pages are
                writable and DIRTY.

        Raises:
            ValueError: not served, or served for WP only; bad pages, data of another length, or
                data in memory that this handler serves.
            PartialResolveError: EAGAIN - the layout has been changing, or another thread has been
                filling a page, for 5 s. `start` is the first page that is not filled, and
                `completed` bytes were filled; so for the following errors.
            UffdOSError: EFAULT - the data cannot be read. ENODATA - the descriptor ended before
                `length` bytes. ENOMEM - no huge page became free in time. ETIMEDOUT - the timeout
                of the socket was over. EIO - the stream raised; its exception is the cause. Any
                errno of read(2). What was read of a stream and not filled is lost.
            TypeError: something that is none of these, or cannot be read into memory (a text file),
                or with `data_offset` a file object that gives other bytes than its descriptor.
            LayoutChangedError: ENOENT - part of the region was unmapped, or `unserve` or `stop`
                came meanwhile.
            UffdOSError: ECANCELED - `stop` came meanwhile.

        Kernel: UFFDIO_COPY(2const).  GIL: released.  Threads: safe.  Blocks: until the descriptor
        has given the data; no page is held meanwhile.

        Example:
            >>> from pyuffd import Handler, Region, Userfaultfd, ZeroSource
            >>> with (
            ...     Userfaultfd() as uffd,
            ...     Region.anonymous(8192) as region,
            ...     Handler(uffd) as handler,
            ... ):
            ...     _ = handler.serve(region, ZeroSource())
            ...     handler.fill(region, 4096, b"pushed".ljust(4096)), region.read(4096, 6)
            (4096, b'pushed')
        """
        what = given(data, data_offset)
        engine, served, first, pages = self._pages(
            region, offset, what.length if length is None else length
        )
        size = pages * served.page_size
        if what.length is not None and size > what.length:
            raise ValueError(f"length {size:#x} is more than the {what.length:#x} bytes of data")
        unprotected = self._check_fill(served, keep_protected)
        if what.is_memory:
            self._overlaps.check_read(what.address, size, "data")
        at = first * served.page_size
        if what.is_memory and not engine.is_remote:
            return engine.fill(served.id, at, what.address, size, unprotected=unprotected)
        return self._fill_bounced(engine, served, at, what, size, unprotected=unprotected)

    def _check_fill(self, served: Served, keep_protected: bool | None) -> bool:
        """Return whether the pages are to arrive unprotected."""
        if served.mode == RegisterMode.WP:
            raise ValueError(
                f"the range at {served.id.start:#x} is served for WP only, so that none of its"
                " pages is ever absent"
            )
        if keep_protected is None:
            return False
        check_bools(keep_protected=keep_protected)
        if keep_protected and not served.mode & RegisterMode.WP:
            raise ValueError(
                f"keep_protected: the range at {served.id.start:#x} is not served for WP"
            )
        return bool(served.mode & RegisterMode.WP) and not keep_protected

    def _fill_bounced(
        self,
        engine: Backend,
        served: Served,
        offset: int,
        what: Given,
        length: int,
        *,
        unprotected: bool,
    ) -> int:
        """Fill from memory of our own, into which the data are read or copied piece by piece."""
        filled = done = 0
        bounce = self._bounce(served.page_size, shared=engine.is_remote)
        try:
            while done < length:
                size = min(bounce.size, length - done)
                what.read(done, bounce, size)
                filled += engine.fill(
                    served.id, offset + done, bounce, size, unprotected=unprotected
                )
                done += size
        except UffdOSError as error:
            so_far = 0 if error.op == "read" else getattr(error, "completed", 0)
            place = served.id.start + offset + done
            start = place if error.op == "read" else error.start
            raise _continued(error, start, length - done, filled + so_far) from error.__cause__
        finally:
            self._keep_bounce(bounce)
        return filled

    def retry(self, region: RangeLike, offset: int = 0, length: int | None = None) -> int:
        """Try again what has stalled, and return the pages whose content could not be read so far.

        With `on_error="stall"` threads wait for a page whose content could not be read, and with
        `preserve` for one that could not be saved. Call this once the source has recovered: they
        fault again, and the source is asked again, also for the pages that it promised (see
        `fill`) and that have not come. Pages that are filled in the end are no reason for stop() to
        raise HandlerError; `stats` still counts the failures. Poisoned pages stay poisoned.

        Args:
            region: A served region.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.

        Returns:
            The number of failed pages that are not filled yet; the first 1,024 that fail are known.

        Raises:
            ValueError: not served, or pages outside the region.
            LayoutChangedError: ENOENT - part of the region was unmapped, or `unserve` or `stop`
                came meanwhile.
            UffdOSError: ECANCELED - `stop` came meanwhile.

        Kernel: UFFDIO_WAKE(2const).  GIL: released.  Threads: safe.  Blocks: no; the threads are
        woken, and may still wait for the source when this returns.
        """
        engine, served, first, pages = self._pages(region, offset, length)
        return engine.retry(served.id, first * served.page_size, pages * served.page_size)


def _continued(error: UffdOSError, start: int | None, length: int, completed: int) -> UffdOSError:
    """Return the error of a piece as the one of the whole call."""
    data = error.data | {"completed": completed}
    return type(error)(error.errno or 0, "fill", start, length, error.hint, **data)
