"""Seeing which pages are written: protecting them, and saving what they held (layer L4)."""

from __future__ import annotations

from pyuffd._abi import RegisterMode
from pyuffd._arguments import check_bools
from pyuffd._latch import is_held_here
from pyuffd._pages import RangeLike
from pyuffd.handlers._base import HandlerBase
from pyuffd.handlers._checkpoint import Checkpoint, StateRanges
from pyuffd.handlers._engine_pages import runs_of, without_marks
from pyuffd.handlers._overlaps import overlaps_lock
from pyuffd.handlers._serving import warn_of_merging
from pyuffd.handlers._turns import refuse_inside, turn_of
from pyuffd.handlers._types import PageState, Protect

# Pages in these states were not written since they were protected.
UNWRITTEN = (PageState.ABSENT, PageState.CLEAN, PageState.SAVED)


class TracksWrites(HandlerBase):
    """The part of `Handler` that protects and saves pages."""

    def writeprotect(self, region: RangeLike, offset: int = 0, length: int | None = None) -> bytes:
        """Write-protect pages; return the `PageState` of each as it was when it was protected.

        Reading a state and protecting the page are one step. A write before it shows in the
        returned state; a write after it makes the page DIRTY again. So repeated calls while threads
        write miss no write: copy the pages whose returned state is not CLEAN, SAVED or ABSENT.
        After the call pages that are present are CLEAN. ABSENT and POISONED ones stay that, and in
        a region served for MISSING or MINOR so do dropped ones. Only `checkpoint` tells of pages
        that were written and then evicted.

        On anonymous memory without Feature.WP_UNPOPULATED, Linux silently leaves missing pages
        unprotected. If the range is registered for WP only, they are first mapped (as the zero
        page).

        Args:
            region: A served region.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.

        Returns:
            One byte for each page.

        Raises:
            ValueError: not served, or not for RegisterMode.WP; bad pages.
            LayoutChangedError: ENOENT - part of the region was unmapped, or `unserve` or `stop`
                came meanwhile. The pages before it are protected; pages whose states are lost with
                the error stay DIRTY.
            PartialResolveError: EAGAIN - the layout has been changing for 5 s; the states as above.

        GIL: released.  Threads: safe.  Blocks: while a layout event is unread.

        Example:
            >>> from pyuffd import Feature, Handler, PageState, Region, RegisterMode, Userfaultfd
            >>> with (
            ...     Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
            ...     Region.anonymous(8192) as region,
            ...     Handler(uffd) as handler,
            ... ):
            ...     _ = handler.serve(region, None, mode=RegisterMode.WP)
            ...     _ = handler.writeprotect(region)
            ...     region.write(4096, b"new")
            ...     [PageState(state).name for state in handler.writeprotect(region)]
            ['CLEAN', 'DIRTY']
        """
        _, states = self._protect(region, offset, length, Protect.FOR_STATES)
        return states

    def unprotect(self, region: RangeLike, offset: int = 0, length: int | None = None) -> bytes:
        """Lift write-protection; return the `PageState` of each page as it was until then.

        Pages that are present are DIRTY afterwards, since they may be written at any time, and
        cause no write-protect faults until they are protected again. Absent pages stay absent: in a
        region served for MISSING | WP they arrive protected.

        Args:
            region: A served region.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.

        Returns:
            One byte for each page: CLEAN and SAVED pages lost their protection.

        Raises:
            ValueError: not served, or not for RegisterMode.WP; bad pages; or pages that are still
                to be saved (see `preserve`), which a write would then change.
            LayoutChangedError: ENOENT - part of the region was unmapped, or `unserve` or `stop`
                came meanwhile.
            PartialResolveError: EAGAIN - the layout has been changing for 5 s.

        Kernel: UFFDIO_WRITEPROTECT(2const).  GIL: released.  Threads: safe.  Blocks: while a layout
        event is unread.
        """
        return self._protect(region, offset, length, Protect.NOT)[1]

    def checkpoint(
        self, region: RangeLike, offset: int = 0, length: int | None = None
    ) -> Checkpoint:
        """Return the pages written since the last checkpoint, and protect them again.

        Both are one step against writers: a write before it shows in the result, a write after it
        shows in the next one. A page that was written is in the result once, whatever came after
        the write: if it was evicted it is ABSENT, or CLEAN once it has come back, and if its owner
        dropped it REMOVED. The interval of a page begins with `serve`, with its last checkpoint, or
        with a `writeprotect` that returned that it was written. Present pages count as written
        until they are protected for the first time.

        Pages that are not protected may have been written, and are in the result too: after
        `unprotect` or `fill(keep_protected=False)`. So may be pages of shared memory that a fork
        has loaded, as its page table cannot be read. So are POISONED and IN_FLIGHT pages, and in a
        region served for MISSING or MINOR dropped pages, each time until they are written, or
        evicted with `write_back`. What `evict(write_back=None)` drops is not in it unless it was
        written in the interval, though the source may differ from what an earlier checkpoint told
        of. Without RegisterMode.MISSING, Linux fills holes by itself: a write to such a page is
        forgotten if the page leaves the page table (MADV_DONTNEED without Feature.EVENT_REMOVE,
        reclaim) before the handler has protected it.

        Args:
            region: A region served with RegisterMode.WP.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.

        Raises:
            ValueError: not served, or not for RegisterMode.WP; bad pages.
            LayoutChangedError: ENOENT - part of the region was unmapped, or `unserve` or `stop`
                came meanwhile. The pages before it are protected; pages whose states are lost with
                the error stay DIRTY.
            PartialResolveError: EAGAIN - the layout has been changing for 5 s; the states as above.

        Kernel: UFFDIO_WRITEPROTECT(2const), /proc/PID/pagemap.  GIL: released.  Threads: safe.
        Blocks: while a layout event is unread.

        Example:
            >>> from pyuffd import Feature, Handler, Region, RegisterMode, Userfaultfd
            >>> with (
            ...     Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
            ...     Region.anonymous(4 * 4096) as region,
            ...     Handler(uffd) as handler,
            ... ):
            ...     _ = handler.serve(region, None, mode=RegisterMode.WP)
            ...     _ = handler.checkpoint(region)
            ...     region.write(4096, b"new")
            ...     [(run.start, run.end) for run in handler.checkpoint(region).written]
            [(4096, 8192)]
        """
        page_size, states = self._protect(region, offset, length, Protect.TO_CHECK)
        without = sum(1 << state for state in UNWRITTEN)
        written = StateRanges(runs_of(states, page_size, offset, without))
        return Checkpoint(written, without_marks(states))

    def _protect(
        self, region: RangeLike, offset: int, length: int | None, how: Protect
    ) -> tuple[int, bytes]:
        """Protect pages or lift the protection; return the page size and the states before."""
        self._running_engine()  # before the lock, which a thread of the parent may have held
        with self._turn():
            engine, served, first, pages = self._pages(region, offset, length)
            if not served.mode & RegisterMode.WP:
                raise ValueError(f"the range at {served.id.start:#x} is not served for WP")
            size = served.page_size
            at, span = first * size, pages * size
            protects = how is not Protect.NOT
            if protects:
                warn_of_merging(served, stacklevel=4)
            elif served.preserves and PageState.CLEAN in engine.states(served.id, first, pages):
                raise ValueError(
                    f"pages of the range at {served.id.start:#x} are still to be saved: call"
                    " preserve(keep_protected=False)"
                )
        if is_held_here(served.evicting):  # evict() must know of what is protected meanwhile
            refuse_inside("write-protecting", served.changing)
        with turn_of(served.changing, self._lock, overlaps_lock()):
            states = engine.writeprotect(served.id, at, span, pages, how)
            served.was_protected = served.was_protected or protects
            served.protections += protects
        return size, states

    def preserve(
        self,
        region: RangeLike,
        offset: int = 0,
        length: int | None = None,
        *,
        keep_protected: bool = True,
    ) -> int:
        """Save the pages that are still CLEAN, and return the bytes saved.

        They are copied to the region's `preserve` buffer. Write-protect faults save a page before
        its first write. After this call the buffer therefore holds every page as it was when
        `writeprotect` returned.

        Args:
            region: A region served with `preserve`.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.
            keep_protected: True keeps the pages protected (SAVED): a later write makes a page DIRTY
                and costs one fault. False lifts the protection, for a program that need not know of
                later writes; the pages are then DIRTY, since they may be written at any time.

        Raises:
            ValueError: the region was served without `preserve`, or `writeprotect` was never
                called, so that its pages are not of one instant.
            ProcessGoneError: ESRCH - the owner of the memory has exited.
            UffdOSError: EPERM, EFAULT - the owner's memory cannot be read at `start`, the first
                page that is not saved. It stays protected; `completed` bytes were saved.

        Kernel: process_vm_readv(2) for another process's memory, UFFDIO_WRITEPROTECT(2const).  GIL:
        released.  Threads: safe.  Blocks: until the pages are copied.
        """
        check_bools(keep_protected=keep_protected)
        engine, served, first, pages = self._pages(region, offset, length)
        size = served.page_size
        if served.preserves and not served.was_protected:
            raise ValueError(
                f"the range at {served.id.start:#x} was never protected, so its pages are not of"
                " one instant: call writeprotect() first"
            )
        return engine.preserve(served.id, first * size, pages * size, unprotect=not keep_protected)
