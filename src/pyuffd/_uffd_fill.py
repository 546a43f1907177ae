"""`UffdFill`: what `Userfaultfd` does to put pages in place (layer L2)."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyuffd import _memory, lowlevel
from pyuffd._abi import ContinueMode, CopyMode, MoveMode, PoisonMode, ZeropageMode
from pyuffd._arguments import check_buffer, check_flags, check_int, check_seconds
from pyuffd._errors import UffdOSError
from pyuffd._pages import (
    PAGE_SIZE,
    RangeLike,
    check_range,
    checked_range,
    is_address,
    page_size_of,
    resolve_range,
    start_of,
)
from pyuffd._uffd_descriptor import UffdDescriptor

if TYPE_CHECKING:
    from typing_extensions import Buffer

# EAGAIN ends once the thread that changes the layout has run again: 12 ms on a busy machine.
FILL_RETRY_S = 1.0
MAP_NORESERVE = 0x4000  # not in the mmap module
ZEROS_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE


@dataclass(frozen=True, slots=True)
class FillResult:
    """The result of a `fill_*` call, in bytes.

    `done` bytes were filled by this call. `already_present` bytes were present before; the threads
    that waited for them were woken. `deferred` bytes could not be filled because the layout kept
    changing: fill the range again later.
    """

    done: int
    already_present: int
    deferred: int


class UffdFill(UffdDescriptor):
    """The ioctls of a `Userfaultfd` that put pages in place."""

    # One ioctl each

    def copy(
        self,
        dst: int,
        src: int | Buffer,
        length: int | None = None,
        *,
        mode: CopyMode = CopyMode(0),  # noqa: B008
    ) -> int:
        """Fill missing pages with a copy; return the bytes copied.

        Args:
            dst: Address in the owner's memory, aligned to the page size.
            src: Address in this process (any alignment), or a buffer.
            length: Bytes; the buffer's size by default.
            mode: CopyMode.DONTWAKE, CopyMode.WP.

        Raises:
            ValueError: a bad range, or a buffer shorter than `length`.
            PartialResolveError: EAGAIN - `completed` bytes were copied before something stopped
                it, or 0 while a layout event is unread.
            PageExistsError: EEXIST - the first page is present; waiters are not woken.
            LayoutChangedError: ENOENT - not registered, or across two mappings.
            ProcessGoneError: ESRCH - the owner has exited.
            UffdOSError: EFAULT - the source cannot be read.

        Kernel: UFFDIO_COPY(2const).
        GIL: released.  Threads: safe.  Blocks: while a source page is itself being faulted in.
        """
        address, length, owner = _source(src, length)
        check_range(dst, length, name="dst")
        check_flags("mode", mode, CopyMode)
        try:
            done = lowlevel.copy(self.fileno(), dst, address, length, mode)
        except UffdOSError as error:
            raise self._explained(error, dst, length, mode, address) from None
        del owner
        return done

    def zeropage(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: ZeropageMode = ZeropageMode(0),  # noqa: B008
    ) -> int:
        """Fill missing pages with zeros; return the bytes filled.

        Hugetlb ranges do not support it (EINVAL): copy zeros instead. Errors as for `copy`.

        Kernel: UFFDIO_ZEROPAGE(2const).
        GIL: released.  Threads: safe.  Blocks: no.
        """
        start, length = checked_range(range_or_start, length)
        check_flags("mode", mode, ZeropageMode)
        try:
            return lowlevel.zeropage(self.fileno(), start, length, mode)
        except UffdOSError as error:
            raise self._explained(error, start, length) from None

    def move(
        self,
        dst: int,
        src: int,
        length: int,
        *,
        mode: MoveMode = MoveMode(0),  # noqa: B008
    ) -> int:
        """Move anonymous pages of the owner from `src` to missing pages at `dst`; return bytes.

        Raises:
            LayoutChangedError: ENOENT - a source page is missing (see MoveMode.ALLOW_SRC_HOLES).
            PageExistsError: EEXIST - a destination page is present.
            RangeBusyError: EBUSY - a source page is or was shared by fork: MADV_DONTFORK it.
            PartialResolveError: EAGAIN - `completed` bytes were moved.

        Kernel: UFFDIO_MOVE(2const); needs Feature.MOVE; anonymous memory; Linux 6.8.
        GIL: released.  Threads: safe.  Blocks: no.
        """
        check_range(dst, length, name="dst")
        _check_move(dst, src, length)
        check_flags("mode", mode, MoveMode)
        try:
            return lowlevel.move(self.fileno(), dst, src, length, mode)
        except UffdOSError as error:
            raise self._explained(error, dst, length, mode, src) from None

    def continue_(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: ContinueMode = ContinueMode(0),  # noqa: B008
    ) -> int:
        """Map pages that the page cache already holds; return the bytes mapped.

        Raises:
            PageExistsError: EEXIST - already mapped; waiters are not woken.
            UffdOSError: EFAULT - the page cache has no such page.
            PartialResolveError: EAGAIN - `completed` bytes were mapped.

        Kernel: UFFDIO_CONTINUE(2const); shmem and hugetlb registered with RegisterMode.MINOR.
        GIL: released.  Threads: safe.  Blocks: while a page is read from swap.
        """
        start, length = checked_range(range_or_start, length)
        check_flags("mode", mode, ContinueMode)
        try:
            return lowlevel.continue_(self.fileno(), start, length, mode)
        except UffdOSError as error:
            raise self._explained(error, start, length, mode) from None

    def poison(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: PoisonMode = PoisonMode(0),  # noqa: B008
    ) -> int:
        """Mark missing pages so that an access raises SIGBUS; return the bytes marked.

        The marks outlive unregistering. MADV_DONTNEED removes them, and `copy` replaces them.

        Raises:
            PageExistsError: EEXIST - a page is present.
            PartialResolveError: EAGAIN - `completed` bytes were marked.

        Kernel: UFFDIO_POISON(2const); needs Feature.POISON; Linux 6.6.
        GIL: released.  Threads: safe.  Blocks: no.
        """
        start, length = checked_range(range_or_start, length)
        check_flags("mode", mode, PoisonMode)
        try:
            return lowlevel.poison(self.fileno(), start, length, mode)
        except UffdOSError as error:
            raise self._explained(error, start, length) from None

    # Filling, correct by default

    def fill_copy(
        self,
        dst: RangeLike | int,
        src: int | Buffer,
        length: int | None = None,
        *,
        mode: CopyMode = CopyMode(0),  # noqa: B008
        retry_s: float = FILL_RETRY_S,
    ) -> FillResult:
        """Fill every missing page of a range with a copy, and wake the threads that wait for them.

        Pages that are present are skipped. EAGAIN is retried while the layout changes.

        Args:
            dst: A range object, which has a page size, or an address in memory of 4 KiB pages.
            src: Address in this process, or a buffer, of at least the range's length.
            length: Bytes; by default the range's length, or the buffer's.
            mode: As for `copy`.
            retry_s: How long to retry EAGAIN without progress, in seconds. What could not be filled
                by then is `deferred`.

        Raises:
            ValueError: a bad range, or a source that is too short.
            LayoutChangedError: ENOENT - not registered, unmapped, or across two mappings.
            ProcessGoneError: ESRCH - the owner has exited.
            UffdOSError: EFAULT - the source cannot be read; `start` is the page, and `completed`
                bytes were filled before it.

        Kernel: UFFDIO_COPY(2const), UFFDIO_WAKE(2const).
        GIL: released.  Threads: safe.  Blocks: up to `retry_s` without progress.
        """
        check_flags("mode", mode, CopyMode)
        start = start_of(dst, "dst")
        most = None if is_address(dst) else resolve_range(dst, None)[1]
        if most is not None:
            length = most if length is None else check_int("length", length)
            if length > most:
                raise ValueError(f"length {length:#x} is more than the range's {most:#x}")
        address, length, owner = _source(src, length)
        result = self._fill(
            lowlevel.FillOp.COPY, start, address, length, mode, page_size_of(dst), retry_s
        )
        del owner
        return result

    def fill_zero(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        retry_s: float = FILL_RETRY_S,
    ) -> FillResult:
        """Fill every missing page of a range with zeros; on hugetlb memory, copy zeros.

        Errors as for `fill_copy`.

        GIL: released.  Threads: safe.  Blocks: up to `retry_s` without progress.
        """
        start, size = resolve_range(range_or_start, length)
        page_size = page_size_of(range_or_start)
        if page_size == PAGE_SIZE:
            return self._fill(lowlevel.FillOp.ZEROPAGE, start, 0, size, 0, page_size, retry_s)
        check_range(start, size, page_size)
        zeros = _memory.mmap(size, mmap.PROT_READ, ZEROS_FLAGS)
        try:
            return self._fill(lowlevel.FillOp.COPY, start, zeros, size, 0, page_size, retry_s)
        finally:
            _memory.munmap(zeros, size)

    def fill_continue(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: ContinueMode = ContinueMode(0),  # noqa: B008
        retry_s: float = FILL_RETRY_S,
    ) -> FillResult:
        """Map every page of a range from the page cache; as `fill_copy` otherwise.

        Raises:
            UffdOSError: EFAULT - the page cache lacks the page at `start`.

        GIL: released.  Threads: safe.  Blocks: up to `retry_s` without progress.
        """
        start, size = resolve_range(range_or_start, length)
        check_flags("mode", mode, ContinueMode)
        page_size = page_size_of(range_or_start)
        return self._fill(lowlevel.FillOp.CONTINUE, start, 0, size, mode, page_size, retry_s)

    def fill_poison(
        self,
        range_or_start: RangeLike | int,
        length: int | None = None,
        *,
        mode: PoisonMode = PoisonMode(0),  # noqa: B008
        retry_s: float = FILL_RETRY_S,
    ) -> FillResult:
        """Poison every missing page of a range; as `fill_copy` otherwise.

        GIL: released.  Threads: safe.  Blocks: up to `retry_s` without progress.
        """
        start, size = resolve_range(range_or_start, length)
        check_flags("mode", mode, PoisonMode)
        page_size = page_size_of(range_or_start)
        return self._fill(lowlevel.FillOp.POISON, start, 0, size, mode, page_size, retry_s)

    def fill_move(
        self,
        dst: RangeLike | int,
        src: int,
        length: int | None = None,
        *,
        mode: MoveMode = MoveMode(0),  # noqa: B008
        retry_s: float = FILL_RETRY_S,
    ) -> FillResult:
        """Move the owner's pages to every missing page of a range; as `fill_copy` otherwise.

        If a destination page is present, its source page stays where it is.

        GIL: released.  Threads: safe.  Blocks: up to `retry_s` without progress.
        """
        start, size = resolve_range(dst, length, name="dst")
        check_flags("mode", mode, MoveMode)
        page_size = page_size_of(dst)
        check_range(start, size, page_size, name="dst")
        _check_move(start, src, size)
        return self._fill(lowlevel.FillOp.MOVE, start, src, size, mode, page_size, retry_s)

    def _fill(
        self,
        op: lowlevel.FillOp,
        start: int,
        src: int,
        length: int,
        mode: int,
        page_size: int,
        retry_s: float,
    ) -> FillResult:
        check_range(start, length, page_size, name="dst")
        limit_ns = int(check_seconds("retry_s", retry_s) * 1e9)
        try:
            return FillResult(
                *lowlevel.fill(op, self.fileno(), start, src, length, mode, page_size, limit_ns)
            )
        except UffdOSError as error:
            raise self._explained(error, start, length, mode, src) from None


def _check_move(dst: int, src: int, length: int) -> None:
    check_range(src, length, name="src")
    if src < dst + length and dst < src + length:
        raise ValueError(f"src {src:#x} and dst {dst:#x} overlap within {length:#x} bytes")


def _source(src: int | Buffer, length: int | None) -> tuple[int, int, object]:
    """Return (address, length, object that must stay alive during the copy) of a source."""
    if isinstance(src, int):
        if length is None:
            raise ValueError(f"source address {src:#x} needs a length")
        check_int("length", length)
        if src < 0 or src + length > 1 << 64:
            raise ValueError(f"src {src:#x} + {length:#x} is not in the address space")
        return src, length, None
    check_buffer("src", src)
    address, size, owner = _memory.buffer_address(src)
    length = size if length is None else check_int("length", length)
    if length > size:
        raise ValueError(f"length {length:#x} is more than the {size:#x} bytes of src")
    return address, length, owner
