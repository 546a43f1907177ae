"""Evicting pages: their content is handed over, and their source is asked next time (layer L4)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pyuffd._abi import Feature, RegisterMode
from pyuffd._arguments import check_bools
from pyuffd._errors import UffdOSError, raise_errno
from pyuffd._latch import is_held_here
from pyuffd._pages import RangeLike
from pyuffd.handlers._base import HandlerBase
from pyuffd.handlers._bounce import BOUNCE_SIZE
from pyuffd.handlers._checkpoint import StateRanges
from pyuffd.handlers._engine_pages import runs_of
from pyuffd.handlers._overlaps import overlaps_lock
from pyuffd.handlers._present import is_private_file, shows_cache
from pyuffd.handlers._turns import CalledInside, refuse_inside
from pyuffd.handlers._types import PageState, Protect, SourceKind
from pyuffd.handlers._write_back import BackFile, writer_of
from pyuffd.handlers.process._remote import NO_EVICTION

if TYPE_CHECKING:
    from pyuffd.handlers._backend import Backend
    from pyuffd.handlers._serving import Served
    from pyuffd.handlers._write_back import WriteBack

# How often a page that is written meanwhile is handed over; a busy page stays.
ATTEMPTS = 3


def _table(*states: PageState) -> bytes:
    """Return a table for bytes.translate: 1 for these states, else 0."""
    return bytes(value in states for value in range(256))


PRESENT = _table(PageState.CLEAN, PageState.DIRTY, PageState.SAVED, PageState.REMOVED)
WRITTEN = _table(PageState.DIRTY, PageState.REMOVED)
DIRTY = _table(PageState.DIRTY)


class EvictsPages(HandlerBase):
    """The part of `Handler` that evicts pages."""

    def evict(
        self,
        region: RangeLike,
        offset: int = 0,
        length: int | None = None,
        *,
        write_back: WriteBack | None,
        written_only: bool = False,
    ) -> int:
        """Drop pages, so that their source is asked for them again; return the bytes evicted.

        This is for programs that keep a part of something larger in memory. Pages are
        write-protected, handed over to `write_back`, and dropped if no thread has written to them
        since; a page that was written is handed over again, up to three times, and stays if it is
        written still. Then it is ABSENT. A thread that touches it while it is dropped waits, and
        gets what the source has then: neither zeros nor what the page held before. Shared memory is
        dropped from its file too, so that no other mapping keeps the old content; a mapping that is
        not served reads zeros there, and then this one does too. What lies behind the end of the
        source in its last page comes back only with the file of a FileSource, which grows.

        Poisoned pages stay as they are. Pages that their owner dropped are handed over as zeros,
        and come from the source then. Without `write_back` the source would bring back what the
        owner had dropped, so they read as zeros again, also in shared memory that was only unmapped
        (MADV_DONTNEED with Feature.EVENT_REMOVE); only one that was written after that, and so is
        DIRTY (RegisterMode.WP), counts as any page that was written. Linux refuses locked pages
        (mlock(2)). It does not tell which pages are pinned (io_uring's fixed buffers, a direct read
        that is under way, vfio, RDMA): a device writes to a pinned page without a fault, so do not
        evict buffers that are registered for that, nor while an O_DIRECT read into them lasts.

        With Feature.EVENT_REMAP and EVENT_UNMAP memory may be moved and unmapped meanwhile. But if
        it is shared, or if Feature.EVENT_REMOVE is on, map nothing else where it was before this
        call has returned: that might be dropped in its place.

        Args:
            region: A region of this process's memory, served for MISSING from a source.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.
            write_back: What gets the content before a page is dropped: a function called with
                (offset, content), of which it must not keep the memoryview; a file, or its
                descriptor, that is written at that offset; or a FileSource, whose file is written
                where the source reads it. It is the offset at which the source is asked, also if
                `region` is a part of what is served. Threads may go on with the pages meanwhile. If
                it raises nothing is dropped of what it has not finished. None drops what was
                written.
            written_only: Hand over only pages that were written since they were protected, and drop
                the others. Right where nothing but evict() protects the region, so that a page that
                is CLEAN is what the source has.

        Raises:
            ValueError: a file that cannot be written, or is open for appending, or of which the
                source reads these pages from another place; `written_only` without `write_back`.
            ValueError: shared memory that this process has served at another address too, where
                these pages would become zeros; a private mapping of a file that has pages there,
                which it would show in place of the source's content.
            ValueError: not served for MISSING; with `write_back` also not for RegisterMode.WP, as
                writers could not be seen; memory of another process, or driver="process", whose
                engine is in another process, which Linux does not let drop memory of this one
                (process_madvise(2)); with Feature.EVENT_REMOVE a handler that is not
                started.
            UffdOSError: EFAULT - with `write_back`, memory that may not be read (mprotect(2));
                EINVAL - the memory is locked; EACCES, EPERM - shared memory that cannot
                be written, or is sealed; ETIMEDOUT - the source does not answer for a page that
                was asked for before this call. `start` is the first page that stays, `completed`
                bytes were evicted.
            LayoutChangedError: ENOENT - part of the region was unmapped, or other memory was mapped
                in its place, which is not dropped; or `unserve` or `stop` came meanwhile.
            PartialResolveError: EAGAIN - the layout has been changing for 5 s.
            UffdOSError: ECANCELED - `stop` came meanwhile.
            HandlerError: called by `write_back` itself, for the same region.

        Kernel: UFFDIO_WRITEPROTECT(2const), madvise(2): MADV_DONTNEED or MADV_REMOVE.  GIL:
        released, except in `write_back`.  Threads: safe.  Blocks: until `write_back` returns; no
        page is held meanwhile, and another evict() of the region waits.

        Example:
            >>> from pyuffd import BufferSource, Feature, Handler, Region, RegisterMode, Userfaultfd
            >>> store = bytearray(b"old".ljust(4096))
            >>> def write_back(offset, data):
            ...     store[offset : offset + len(data)] = data
            >>> with (
            ...     Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
            ...     Region.anonymous(4096) as region,
            ...     Handler(uffd) as handler,
            ... ):
            ...     mode = RegisterMode.MISSING | RegisterMode.WP
            ...     _ = handler.serve(region, BufferSource(store), mode=mode)
            ...     region.write(0, b"new")
            ...     handler.evict(region, write_back=write_back), store[:3], region.read(0, 3)
            (4096, bytearray(b'new'), b'new')
        """
        check_bools(written_only=written_only)
        if write_back is None and written_only:
            raise ValueError("written_only needs a write_back: without one all pages are dropped")
        engine, served, first, pages = self._pages(region, offset, length)
        size = served.page_size
        write = None if write_back is None else writer_of(write_back)
        at, span = first * size, pages * size
        self._check_evict(engine, served, at, span, writes=write is not None)
        try:
            if write is None:
                wanted = bytes([1]) * pages
                return engine.evict(served.id, at, span, wanted, written_too=True)
            if isinstance(write, BackFile):
                write.check_place(served.source, at, at + span)
                with self._turn_to_evict(served), served.changing:
                    served.was_protected = True
                    served.protections += 1
                    return engine.evict_to(
                        served.id, at, span, write.fd, write.begin, written_only=bool(written_only)
                    )
            with self._turn_to_evict(served):
                return self._evict_by_call(
                    engine, served, at, span, write, written_only=written_only
                )
        except UffdOSError as error:
            if error.errno == errno.EINVAL:
                raise error.with_hint(
                    "the memory is locked: call munlock(2), or do not evict it"
                ) from None
            raise

    def _turn_to_evict(self, served: Served) -> AbstractContextManager[object]:
        if is_held_here(served.evicting):
            raise CalledInside(
                "write_back evicts the region that it is called for, or a signal handler does"
            )
        # Whoever has this lock may wait for the inner ones.
        refuse_inside("evict()", served.changing, self._lock, overlaps_lock())
        return served.evicting

    def _evict_by_call(
        self,
        engine: Backend,
        served: Served,
        offset: int,
        length: int,
        write: Callable[[int, memoryview], object],
        *,
        written_only: bool,
    ) -> int:
        evicted, window = 0, max(BOUNCE_SIZE, served.page_size)
        for at in range(offset, offset + length, window):
            todo = [(at, min(at + window, offset + length))]
            for _ in range(ATTEMPTS):
                try:
                    done, todo = self._evict_runs(
                        engine, served, todo, write, written_only=written_only
                    )
                except UffdOSError as error:
                    if error.errno != errno.EFAULT or error.op != "evict":
                        raise
                    # Nothing is dropped of this window.
                    start = served.id.start + at
                    left = offset + length - at
                    raise_errno(
                        "evict", errno.EFAULT, start, left, hint=error.hint, completed=evicted
                    )
                evicted += done
        return evicted

    def _evict_runs(
        self,
        engine: Backend,
        served: Served,
        runs: list[tuple[int, int]],
        write: Callable[[int, memoryview], object],
        *,
        written_only: bool,
    ) -> tuple[int, list[tuple[int, int]]]:
        """Evict runs of pages; return the bytes, and the runs that were written meanwhile.

        Only these are protected again: a page that has come back and was written must stay known as
        written.
        """
        evicted, again = 0, list[tuple[int, int]]()
        for start, end in runs:
            done, written = self._evict_window(
                engine, served, start, end, write, written_only=written_only
            )
            evicted += done
            again += _runs(written, served.page_size, start)
        return evicted, again

    def _check_evict(
        self, engine: Backend, served: Served, offset: int, length: int, *, writes: bool
    ) -> None:
        place = f"the range at {served.id.start:#x}"
        if not served.mode & RegisterMode.MISSING or served.kind is SourceKind.NONE:
            raise ValueError(f"{place} is not served for MISSING, so its pages would not come back")
        if writes and not served.mode & RegisterMode.WP:
            raise ValueError(
                f"{place} is not served for WP: writes during write_back would not be seen, and"
                " lost. Serve it with mode=RegisterMode.MISSING | RegisterMode.WP"
            )
        if engine.is_remote:
            raise ValueError(NO_EVICTION)
        if not self._owners.are_here(served.uffd):
            raise ValueError(f"{place} is memory of another process, which only that can drop")
        if served.uffd.features & Feature.EVENT_REMOVE and not self._started:
            raise ValueError(
                "with Feature.EVENT_REMOVE evict needs a running handler: call start()"
            )
        if served.is_private_file is None:
            served.is_private_file = is_private_file(served.region)
        if served.is_private_file and shows_cache(served.region, offset, length):
            raise ValueError(
                f"{place} is a private mapping of a file that has pages there, or of which that"
                " cannot be told: without its own copies it shows these, so the source would not be"
                " asked. Map the file shared, or punch holes in it"
            )
        start = served.id.start + offset
        self._overlaps.check_elsewhere(served.memory[0], start, length, "evict()")

    def _evict_window(
        self,
        engine: Backend,
        served: Served,
        offset: int,
        end: int,
        write: Callable[[int, memoryview], object],
        *,
        written_only: bool,
    ) -> tuple[int, bytes]:
        """Evict the pages of [offset, end); return the bytes, and what was written meanwhile."""
        size = served.page_size
        pages = (end - offset) // size
        with served.changing:
            states = engine.writeprotect(served.id, offset, pages * size, pages, Protect.TO_EVICT)
            served.was_protected = True
            served.protections += 1
            protections = served.protections
        wanted = states.translate(PRESENT)
        handed = _both(wanted, states.translate(WRITTEN)) if written_only else wanted
        at = offset
        try:
            for at, past in _runs(handed, size, offset):
                for page in self._hand_over(engine, served, at, past - at, write):
                    index = (page - offset) // size
                    wanted = wanted[:index] + b"\0" + wanted[index + 1 :]
        except BaseException:
            with served.changing:
                _call_written(engine, served, offset, states, at)
            raise
        with served.changing:
            if served.protections != protections:  # by others: what is written looks unwritten
                _call_written(engine, served, offset, states, offset)
                return 0, wanted
            evicted = engine.evict(served.id, offset, pages * size, wanted, written_too=False)
            after = engine.states(served.id, offset // size, pages)
        return evicted, _both(wanted, after.translate(DIRTY))

    def _hand_over(
        self,
        engine: Backend,
        served: Served,
        offset: int,
        length: int,
        write: Callable[[int, memoryview], object],
    ) -> list[int]:
        """Hand pages over; return those that were dropped without a notice, and stay."""
        bounce = self._bounce(served.page_size, shared=False)
        # With the inline driver the kernel does not wait for a missing page.
        if not engine.peek(served.id, offset, length, bounce.address):
            self._keep_bounce(bounce)
            if length == served.page_size:
                return [offset]
            pages = range(offset, offset + length, served.page_size)
            found = (self._hand_over(engine, served, at, served.page_size, write) for at in pages)
            return [at for one in found for at in one]
        with bounce.view[:length] as data, data.toreadonly() as readable:
            write(offset, readable)
        self._keep_bounce(bounce)
        return []


def _both(one: bytes, other: bytes) -> bytes:
    """Return a mask with a 1 where both have a 1."""
    both = int.from_bytes(one, "little") & int.from_bytes(other, "little")
    return both.to_bytes(len(one), "little")


def _runs(mask: bytes, page_size: int, offset: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of ones, as offsets."""
    for run in StateRanges(runs_of(mask, page_size, offset, 1)):
        yield run.start, run.end


def _call_written(
    engine: Backend, served: Served, offset: int, states: bytes, reached: int
) -> None:
    """Mark the dirty pages from `reached` on as written again: nobody has their content."""
    size = served.page_size
    for start, end in _runs(states.translate(DIRTY), size, offset):
        if end > reached:
            at = max(start, reached)
            engine.writeprotect(served.id, at, end - at, (end - at) // size, Protect.NOT)
