"""`Handler.serve`: how a handler begins to serve a region (layer L4)."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from pyuffd._abi import Ioctl, RegisterMode
from pyuffd._describe import repr_of
from pyuffd._errors import ClosedError, HelperLostError, UffdError
from pyuffd._limits import raise_shortage
from pyuffd._pages import RangeLike
from pyuffd._uffd import Userfaultfd
from pyuffd.handlers._backend import Backend
from pyuffd.handlers._borrowed import Borrowed
from pyuffd.handlers._checks import (
    Driver,
    check_is_uffd,
    check_mode,
    check_uffd,
    region_numbers,
)
from pyuffd.handlers._content import content_of
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._failures import label_of
from pyuffd.handlers._overlaps import range_of
from pyuffd.handlers._present import (
    Present,
    check_drop,
    choose_present,
    open_pagemap,
    open_range,
    refuse_present,
)
from pyuffd.handlers._serving import (
    OnClose,
    Served,
    check_ioctls,
    check_local,
    is_shared,
    leaves_holes,
    local_file,
    local_mapping,
    maps_holes,
    modes_before,
    needed_ioctls,
    take_back,
    tell_registered,
    touched_by,
    warn_of_merging,
)
from pyuffd.handlers._sigbus import ensure_inline_handler
from pyuffd.handlers._threads import WorkedEngine
from pyuffd.handlers._types import RangeSpec, SourceKind, lacks_error
from pyuffd.handlers._unserving import Unserves
from pyuffd.lowlevel import Granted
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.sources import PageSource

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyuffd._source_like import SourceLike

log = logging.getLogger(__name__)


class ServesRegions(Unserves):
    """The part of `Handler` that serves regions."""

    _tells_why: Callable[[int], BaseException | None] | None = None  # one for all regions
    _pagemap: Pagemap | None = None  # while many regions are served

    @contextmanager
    def _serving_many(self) -> Iterator[None]:
        """Look at this process's page table through one descriptor for all regions served."""
        if self._pagemap is not None:
            yield
            return
        pagemap = open_pagemap()
        try:
            self._pagemap = pagemap
            yield
        finally:
            with self._lock:  # another thread may be looking
                self._pagemap = None
                if pagemap is not None:
                    pagemap.close()

    def serve(
        self,
        region: RangeLike,
        source: SourceLike | None,
        *,
        mode: RegisterMode = RegisterMode.MISSING,
        preserve: Buffer | Region | None = None,
        local: RangeLike | None = None,
        uffd: Userfaultfd | None = None,
        present: Present | None = None,
        ioctls: Ioctl | None = None,
    ) -> Ioctl:
        """Register a region and resolve its faults from now on; return the ioctls it supports.

        Missing faults copy the page from `source`. A page that the owner drops later
        (MADV_DONTNEED) reads as zeros. With Feature.EVENT_REMOVE this also applies to pages of
        shared memory that were never loaded: the event does not tell whether they were dropped
        (MADV_REMOVE) or only unmapped. Minor faults map the page that the page cache holds. With a
        source and no MISSING in the mode they first write the page's content to the page cache,
        and holes of the page cache are filled from the source too. Write-protect faults mark the
        page PageState.DIRTY and unprotect it. With MISSING | WP pages arrive protected.

        Args:
            region: A `Region`, or anything with start, length and page_size. While it is served,
                unmap it only by Region.close().
            source: The content: a page source, or a buffer, a `Region`, a path, an open file or a
                function, which stand for a source of that kind. It must reach at least into the
                region's last page, whose rest is filled with zeros. MISSING needs one, WP alone
                must have None, and with MINOR but not MISSING it is optional.
            mode: Which faults to resolve.
            preserve: For RegisterMode.WP alone, not MISSING | WP: a writable buffer or `Region` of
                the region's length that gets the old content of each page before its first write
                (see `preserve`). If the content cannot
                be saved the page stays protected, and threads that write to it wait until
                `preserve` saves it or the region is no longer served; stop() then raises
                HandlerError, which names the page. A fork's writes go to its own copies of private
                memory; those are not saved.
            local: The same memory mapped in this process and not registered. With `preserve`, old
                content is read from it; without `local`, from the owner of the memory. With a
                source and MINOR but not MISSING, content is written through it; by default the
                handler makes such a mapping of the region.
            uffd: Another userfaultfd, of this or another process, with which the range is to be
                registered. The handler borrows it and stops serving its ranges when it is closed.
            present: What to do about pages that are already present. They cause no missing fault,
                so they never get the source's content. Without MINOR in the mode that is also true
                of pages that only the page cache has, and of those that posix_fallocate(3) has made
                (noticed if the region is a whole file). "refuse" raises ValueError with their
                number, "keep" keeps what they hold, "drop" drops them (memory of this process
                only). Pages that other threads touch during this call are among them, up to the
                registration; who touches one afterwards waits for its content. The default is
                "refuse", but "keep" if a handler may have filled them: for a Region that was
                served before, whose poison marks are kept too, and always for adopted
                userfaultfds, where "refuse" is as "keep".
            ioctls: For memory that the owner of an adopted userfaultfd registers itself, before or
                after this call: the ioctls that it then supports. The handler registers nothing,
                and calls no page present before its fill finds it so.

        Raises:
            ValueError: a range that is served already, pages that are present (see `present`), a
                source that ends before the last page, a mode that contradicts the arguments, or a
                `BufferSource`, `preserve` or `local` in memory that this handler serves, or that
                another one serves which waits, itself or through others, for this one's memory.
            UffdOSError: UFFDIO_REGISTER failed; the region is not served.

        GIL: released in every system call.  Threads: safe.  Blocks: until a `serve` of another
            thread is over; with the process driver also until its processes have answered, which
            "auto" starts for the first source in Python.
        """
        return self._serve_poisoned(
            region,
            source,
            mode=mode,
            preserve=preserve,
            local=local,
            uffd=uffd,
            present=present,
            ioctls=ioctls,
        )

    def _serve_poisoned(
        self,
        region: RangeLike,
        source: SourceLike | None,
        *,
        mode: RegisterMode,
        preserve: Buffer | Region | None = None,
        local: RangeLike | None = None,
        uffd: Userfaultfd | None = None,
        present: Present | None = None,
        ioctls: Ioctl | None = None,
        poison: tuple[int, ...] = (),
    ) -> Ioctl:
        """Serve a region; `poison`: offsets, (start, end) each, of pages that have no content."""
        self._running_engine()  # before the lock, which a thread of the parent may have held
        borrowed = Borrowed()
        try:
            content = None if source is None else borrowed.source(source)  # may open a file
            with self._turn():
                engine = self._running_engine()
                return self._serve(
                    engine,
                    region,
                    content,
                    borrowed,
                    mode,
                    preserve,
                    local,
                    uffd,
                    present,
                    ioctls,
                    poison,
                )
        except BaseException as error:
            if not any(one.borrowed is borrowed for one in list(self._served.values())):
                borrowed.let_go()
            if isinstance(error, MemoryError):
                raise_shortage("serve a region", error)
            raise

    def _serve(
        self,
        engine: Backend,
        region: RangeLike,
        source: PageSource | None,
        borrowed: Borrowed,
        mode: RegisterMode,
        preserve: Buffer | Region | None,
        local: RangeLike | None,
        uffd: Userfaultfd | None,
        present: Present | None,
        ioctls: Ioctl | None,
        poison: tuple[int, ...],
    ) -> Ioctl:
        start, length, page_size = region_numbers(region)
        if uffd is not None:
            check_is_uffd(uffd)
        uffd = uffd or self.uffd
        check_mode(mode, source, preserve, uffd.features)
        if uffd not in self._spaces:
            self._owners.add(uffd)
        reads_owner = preserve is not None and local is None
        self._owners.check_serving(uffd, reads_owner, leaves_holes(region, uffd, mode))
        check_ioctls(ioctls, uffd, present)
        policy = choose_present(
            present, region, source, mode, uffd, is_here=self._owners.are_here(uffd)
        )
        content = content_of(source, region)
        check_local(local, length)
        if source is not None and content.kind is SourceKind.REQUEST:
            engine = engine if engine.calls_python else self._move_to_process(source)
        sink = borrowed.buffer(preserve, length)
        space = self._space_of(engine, uffd)
        writes_cache = (
            source is not None and mode & RegisterMode.MINOR and not (mode & RegisterMode.MISSING)
        )
        if writes_cache:
            # Without MISSING, Linux maps zeros for a hole of the page cache.
            mode |= RegisterMode.MISSING
        memory = range_of(
            region,
            mode,
            is_here=self._owners.are_here(uffd),
            source=source,
            preserve=(sink, length if sink else 0),
            local=None if engine.is_remote else local,
            writes_local=bool(writes_cache),
        )
        alias, local_start, file = None, 0, None
        if engine.is_remote:
            file = local_file(region, length, local, needed=bool(writes_cache))
        else:
            alias, local_start = local_mapping(region, length, local, needed=bool(writes_cache))
        granted, on_close = Granted(), list[Callable[[], None]]()
        before = modes_before(uffd, start, length)
        try:
            self._overlaps.check(memory)
            spec = RangeSpec(
                space,
                start,
                length,
                page_size,
                mode,
                content,
                local=local_start,
                local_file=file,
                preserve=sink,
                writes_cache=bool(writes_cache),
                maps_holes=maps_holes(region, uffd, mode, self._owners.of(uffd)),
                shared=is_shared(region, local, uffd, self._owners.of(uffd)),
                owner=(borrowed, local, region),
                label=label_of(region, source),
            )
            if (space, start) not in self._served:
                if policy == "drop":
                    self._overlaps.check_drop(start, length)
                    self._overlaps.check_elsewhere(memory, start, length, "present='drop'")
                    check_drop(region, uffd)
                elif policy == "refuse":
                    refuse_present(region, mode, self._pagemap)
            if self._started and self.driver == "inline" and ensure_inline_handler():
                log.warning(
                    "pyuffd: another SIGBUS handler had replaced ours, which is back on top"
                )
            served = Served(
                engine.add(spec),
                page_size,
                mode,
                region,
                uffd,
                content.kind,
                [memory],
                borrowed,
                source,
                touched_by(region, local, preserve, writes_cache=bool(writes_cache)),
                alias=alias,
                preserves=preserve is not None,
                on_close=on_close,
            )
            # With `ioctls`, what is there before its owner has mapped it is something else.
            if ioctls is None:
                ioctls = open_range(
                    engine,
                    served,
                    policy,
                    granted,
                    started=self._started,
                    pagemap=self._pagemap,
                    poison=poison,
                )
            else:
                if needed_ioctls(mode) & ~int(ioctls):
                    raise lacks_error(served.id, needed_ioctls(mode), int(ioctls))
                engine.set_ioctls(served.id, ioctls)
            self._owners.verify(uffd, region, needed=reads_owner)
            served.ioctls = int(ioctls)
            if self._started:
                self._may_move = False
            self._overlaps.add(memory)
            if isinstance(region, Region):
                self._follow_close(region, served)
            self._at_close.keeps = self
            self._served[space, start] = served  # last: from here on it is served
            served.keep_mapped()
        except BaseException:  # a signal handler may raise at any line
            if (space, start) not in self._served:
                known = {one.id.number for one in self._served.values()}
                take_back(engine, uffd, (space, start, length), granted, known, before)
                self._overlaps.remove(memory)
                for callback in on_close:
                    region._forget_on_close(callback)  # type: ignore[attr-defined]
                if alias is not None:
                    alias.close()
            raise
        if mode & RegisterMode.WP:
            warn_of_merging(served)
        return ioctls

    def _move_to_process(self, source: PageSource) -> Backend:
        """Change "auto" to the process driver, for the first source in Python."""
        old = self._running_engine()
        if not self._may_move:
            raise ValueError(
                f"{repr_of(source)} must be read by Python, which the {self.driver} driver cannot"
                " call: use a ZeroSource, a BufferSource or a FileSource, or driver='process'"
            )
        if self._served:
            raise ValueError(
                f"{repr_of(source)} must be read by Python, but this handler already serves other"
                " regions without Python: serve it first, or make the Handler with driver='process'"
            )
        engine: Backend | None = None
        try:
            self.driver = "process"
            engine = self._make_engine()
            spaces = {
                uffd: self._add_space(engine, uffd) if uffd is not self.uffd else 0
                for uffd in self._spaces
            }
            for uffd, space in spaces.items():
                tell_registered(engine, uffd, space)
            if self._started:
                engine.start(self._cpus)
            engine.own()
            if isinstance(old, Engine):  # always true: "auto" began with the native driver
                old.leave_strays()
                old.stop()
                old.life.let_go()  # if a signal comes before destroy(), the last reference frees it
            self._engine, self._spaces, self._may_move = engine, spaces, False
        except BaseException:
            if self._engine is old:
                self.driver: Driver = "native"
                if engine is not None:
                    engine.destroy()
                old.own()
                if self._started:
                    old.start(self._cpus)
            raise
        old.destroy()
        return engine

    def _space_of(self, engine: Backend, uffd: Userfaultfd) -> int:
        """Return the engine's number for a userfaultfd, a new one the first time."""
        if uffd not in self._spaces:
            if self.driver == "inline":
                raise ValueError("the inline driver serves this process's one userfaultfd")
            check_uffd(self.driver, uffd)
            closes = OnClose(
                self,
                lambda handler: handler._uffd_closes(uffd),
                lambda handler: uffd in handler._spaces,
            )
            space = None
            try:
                uffd._hold_open(id(self))
                uffd._claim_events(self)
                space = self._add_space(engine, uffd)
                tell_registered(engine, uffd, space)
                uffd._on_close(closes)
                if self._started:
                    uffd._note_answered()
                self._spaces[uffd] = space  # last: until here it is undone
            except BaseException:
                self._spaces.pop(uffd, None)
                uffd._forget_on_close(closes)
                if space is not None:
                    with suppress(HelperLostError):
                        engine.remove_space(space)
                uffd._release_events(self)
                uffd._let_close(id(self))
                raise
        return self._spaces[uffd]

    def _follow_close(self, region: Region, served: Served) -> None:
        region_closes = OnClose(
            self,
            lambda handler: handler._region_closes(served, seal=region.outlives_close()),
            lambda handler: handler._serves(served),
        )
        served.on_close.append(region_closes)
        region._on_close(region_closes)
        if self._tells_why is None:
            self._tells_why = partial(_why_lost, weakref.ref(self))
        region._on_loss(self._tells_why)
        if isinstance(self._engine, WorkedEngine):
            served.check = partial(_check_access, weakref.ref(self), served)
            region._before_access(served.check)

    def _why_lost(self, address: int) -> BaseException | None:
        """Return why a page was lost, or None if that is unknown."""
        engine, failure = self._engine, self._final_failure
        if engine is not None and self._pid == os.getpid():
            with suppress(UffdError):  # what explains a loss must not replace it
                found = engine.failure_at(address)
                failure = failure if found is None else found
        if failure is None or not failure.start <= address < failure.start + failure.length:
            return None
        return failure.error


def _why_lost(reference: weakref.ref[ServesRegions], address: int) -> BaseException | None:
    handler = reference()
    return None if handler is None else handler._why_lost(address)


def _check_access(
    reference: weakref.ref[ServesRegions], served: Served, start: int, length: int
) -> None:
    """Refuse an access of a page source that would wait for itself."""
    handler = reference()
    engine = None if handler is None else handler._engine
    if handler is None or handler._pid != os.getpid() or not isinstance(engine, WorkedEngine):
        return
    with suppress(ClosedError):  # the handler stops meanwhile
        engine.check_access(served, start, length)
