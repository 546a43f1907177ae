"""`Handler`: serves regions through one userfaultfd, with one of the engine's C drivers (L4)."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from pyuffd import _memory
from pyuffd._abi import Feature, Ioctl, RegisterMode
from pyuffd._errors import (
    ClosedError,
    HandlerError,
    LayoutChangedError,
    ProcessGoneError,
    UffdOSError,
)
from pyuffd._pages import RangeLike, check_page_size, check_range, page_size_of
from pyuffd._uffd import Userfaultfd
from pyuffd.handlers._engine import (
    Content,
    Engine,
    FailureStage,
    HandlerStats,
    OnError,
    PageState,
    RecentFault,
    SourceKind,
    ensure_inline_handler,
)
from pyuffd.regions import Region
from pyuffd.sources import BufferSource, FileSource, PageSource, ZeroSource

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

Driver = Literal["auto", "native", "inline"]
Policy = Literal["poison", "stall", "kill"]

# Longer than any pause between two faults of one thread that was measured on a loaded machine, and
# short enough that ten faults a second cost 0.05 % of a CPU.
DEFAULT_SPIN_US = 50.0
# EAGAIN ends when the thread that changes the layout runs again: 12 ms measured on a busy machine.
RETRY_LIMIT_S = 5.0
DRAIN_LIMIT_S = 10.0

LAYOUT_EVENTS = (
    Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
)
NEEDED_IOCTL = {
    RegisterMode.MISSING: Ioctl.COPY,
    RegisterMode.WP: Ioctl.WRITEPROTECT,
    RegisterMode.MINOR: Ioctl.CONTINUE,
}


@dataclass(slots=True)
class _Served:
    start: int
    length: int
    page_size: int
    mode: RegisterMode
    region: RangeLike
    alias: Region | None = None
    on_close: list[object] = field(default_factory=list)


class Handler:
    """Resolve the faults of regions from page sources, in C.

    Args:
        uffd: The userfaultfd; the handler borrows it, and stops when it is closed. It must not
            ask for layout events (Feature.EVENT_*), which no driver here follows.
        driver: "native", a C thread: faults of any thread or process, and of system calls.
            "inline", in the faulting thread itself by a SIGBUS handler: the fastest, for
            accesses of this process's own code only; a system call that touches a missing page
            fails with EFAULT (`populate` first). Needs Feature.SIGBUS. "auto" is "inline" where
            the userfaultfd has Feature.SIGBUS, else "native".
        on_error: What happens to a page whose content cannot be had: "poison" (SIGBUS for whoever
            touches it), "stall" (its threads wait; stop() poisons it; native only), "kill"
            (SIGKILL for `owner_pid`). Never zeros. Where the kernel has no UFFDIO_POISON (before
            Linux 6.6) "poison" stalls. stop() reports it as HandlerError.
        prefetch: Bytes to fill around a fault besides its own page, which comes first; more
            when faults come in sequence. 0: the page alone.
        spin_us: How long the native driver waits for the next fault before it sleeps, at most;
            it adapts, down to none when faults are rare. None: 50, or 0 with one CPU in `cpus`,
            where spinning would keep the faulting thread from running.
        cpus: CPUs the native thread may run on. The CPU of the faulting thread gives the
            lowest latency by far.
        owner_pid: Process whose memory the userfaultfd governs; this one by default.

    Kernel: userfaultfd(2).  GIL: never needed by a driver; every method that waits releases it.
    Threads: safe.  Blocks: stop() and unserve() until the faults in hand are resolved.

    Example:
        >>> from pyuffd import BufferSource, Handler, Region, Userfaultfd
        >>> with Userfaultfd() as uffd, Region.anonymous(8192) as region, Handler(uffd) as handler:
        ...     handler.serve(region, BufferSource(b"hello".ljust(8192, b".")))
        ...     handler.start()
        ...     region.read(0, 7)
        b'hello..'
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        *,
        driver: Driver = "auto",
        on_error: Policy = "poison",
        prefetch: int = 0,
        spin_us: float | None = None,
        cpus: Iterable[int] | None = None,
        owner_pid: int | None = None,
    ) -> None:
        self._engine: Engine | None = None
        self._cpus = _check_cpus(cpus)
        self.driver = _choose_driver(driver, uffd)
        _check_options(self.driver, uffd, on_error, prefetch, spin_us, self._cpus)
        if spin_us is None:
            spin_us = 0.0 if len(self._cpus) == 1 else DEFAULT_SPIN_US
        self.uffd = uffd
        self._pid = os.getpid()
        self._lock = RLock()  # guards what follows; taken before any lock of the C engine
        self._served: dict[int, _Served] = {}
        self._started = False
        self._engine = Engine(
            uffd.fileno(),
            owner_pid=owner_pid or self._pid,
            on_error=OnError[on_error.upper()],
            inline=self.driver == "inline",
            prefetch=prefetch,
            spin_ns=int(spin_us * 1000),
            retry_limit_ns=int(RETRY_LIMIT_S * 1e9),
        )
        uffd.on_close(self.stop)

    def _running_engine(self) -> Engine:
        if self._pid != os.getpid():
            raise ClosedError(
                f"this handler belongs to process {self._pid}, not to its fork {os.getpid()}"
            )
        if self._engine is None:
            raise ClosedError("this handler has stopped")
        return self._engine

    # Serving

    def serve(
        self,
        region: RangeLike,
        source: PageSource | None,
        *,
        mode: RegisterMode = RegisterMode.MISSING,
        preserve: Buffer | None = None,
        local: RangeLike | None = None,
    ) -> Ioctl:
        """Register a region and resolve its faults from now on; return the ioctls it takes.

        Missing faults copy the page from `source`; a page that is dropped afterwards
        (MADV_DONTNEED) is zeros, whatever the source says. Minor faults map what the page cache
        holds; with a source and no MISSING in the mode they first write the page's content into
        it. Write-protect faults mark the page PageState.DIRTY and unprotect it. With
        MISSING | WP pages arrive protected.

        Args:
            region: A `Region`, or anything with start, length and page_size. It must not be
                closed under the handler other than by Region.close().
            source: Content, at least up to the region's last page (the rest of that is zeros).
                None for WP and MINOR: there is nothing to fetch.
            mode: Which faults to take.
            preserve: For WP: a writable buffer of the region's length that gets the old content
                of each page before its first write (see `preserve`).
            local: The same memory mapped in this process and not registered. Needed for the
                faults of another process's memory with `preserve`, and made from the region
                where minor faults have a source.

        Raises:
            ValueError: a range that is served already, a source that ends before the last page
                or lies inside the region, a mode that does not go with the arguments.
            UffdOSError: what UFFDIO_REGISTER says. Nothing is left behind.
        """
        with self._lock:
            engine = self._running_engine()
            start, length, page_size = _region_numbers(region)
            _check_mode(mode, source, preserve)
            content = self._content(region, source)
            served = _Served(start, length, page_size, mode, region)
            local_start = self._local(served, source, local)
            sink, sink_owner = _sink(preserve, length)
            try:
                range_id = engine.add(
                    start,
                    length,
                    page_size,
                    mode,
                    content,
                    local=local_start,
                    preserve=sink,
                    owner=(sink_owner, local, region),
                )
                ioctls = self._register(engine, range_id, served)
            except BaseException:
                if served.alias is not None:
                    served.alias.close()
                raise
            self._served[start] = served
            if isinstance(region, Region):
                self._follow_close(region, served)
            if self._started and self.driver == "inline" and ensure_inline_handler():
                log.warning("another SIGBUS handler had replaced pyuffd's; it is back on top")
            return ioctls

    def _register(self, engine: Engine, range_id: int, served: _Served) -> Ioctl:
        """Register what the engine has; take it out again when that fails."""
        try:
            ioctls = self.uffd.register(served.start, served.length, mode=served.mode)
        except BaseException:
            engine.remove(range_id)
            raise
        missing = [
            ioctl.name
            for one_mode, ioctl in NEEDED_IOCTL.items()
            if served.mode & one_mode and not ioctls & ioctl
        ]
        if missing:
            self.uffd.unregister(served.start, served.length)
            engine.remove(range_id)
            raise ValueError(
                f"[{served.start:#x}, +{served.length:#x}) takes no {', '.join(map(str, missing))}"
                f" (its ioctls: {ioctls!r})"
            )
        engine.set_ioctls(range_id, ioctls)
        return ioctls

    def _follow_close(self, region: Region, served: _Served) -> None:
        reference = weakref.ref(self)
        start = served.start

        def region_closes() -> None:
            handler = reference()
            if handler is not None:
                handler._region_closes(start)

        served.on_close.append(region_closes)
        region.on_close(region_closes)

    def _region_closes(self, start: int) -> None:
        with self._lock:
            if self._engine is not None and start in self._served and self._pid == os.getpid():
                self._unserve(self._engine, self._served[start], seal=False)

    def _content(self, region: RangeLike, source: PageSource | None) -> Content:
        if source is None:
            return Content(SourceKind.NONE)
        if isinstance(source, ZeroSource):
            return Content(SourceKind.ZERO, owner=source)
        length = source.length
        page_size = page_size_of(region)
        if length is not None and length <= region.length - page_size:
            raise ValueError(
                f"{source!r} has {length:#x} bytes and ends before the last page of a region of"
                f" {region.length:#x}"
            )
        if isinstance(source, FileSource):
            return Content(
                SourceKind.FILE,
                fd=source.fileno(),
                offset=source.offset,
                length=source.length,
                owner=source,
            )
        if isinstance(source, BufferSource):
            self._check_not_served(source, region)
            return Content(
                SourceKind.MEMORY, address=source.address, length=source.length, owner=source
            )
        raise ValueError(
            f"{source!r} cannot be read without Python, as the {self.driver} driver must:"
            " use a ZeroSource, a BufferSource or a FileSource"
        )

    def _check_not_served(self, source: BufferSource, region: RangeLike) -> None:
        """A copy from memory whose own pages are missing would wait for itself."""
        end = source.address + source.length
        ranges = [(region.start, region.length)]
        ranges += [(served.start, served.length) for served in self._served.values()]
        for start, length in ranges:
            if source.address < start + length and start < end:
                raise ValueError(
                    f"{source!r} lies inside the served range [{start:#x}, +{length:#x})"
                )

    def _local(self, served: _Served, source: PageSource | None, local: RangeLike | None) -> int:
        if local is not None:
            if local.length < served.length:
                raise ValueError(
                    f"local has {local.length:#x} bytes, fewer than the region's {served.length:#x}"
                )
            return local.start
        writes_cache = served.mode & RegisterMode.MINOR and not served.mode & RegisterMode.MISSING
        if source is None or not writes_cache:
            return 0
        if not isinstance(served.region, Region):
            raise ValueError("minor faults with a source need `local`, or a Region to map again")
        served.alias = served.region.alias()
        return served.alias.start

    def unserve(self, region: RangeLike | int) -> None:
        """Stop serving one region and unregister it.

        Pages that were never filled are poisoned before, so that a later access is SIGBUS and not
        silent zeros (with a ZeroSource zeros are right, and they are left alone); `populate`
        first to keep everything. Write-protection is lifted.

        Raises:
            ValueError: not served by this handler.
        """
        with self._lock:
            self._unserve(self._running_engine(), self._find(region), seal=True)

    def _unserve(self, engine: Engine, served: _Served, *, seal: bool) -> None:
        if seal:
            engine.seal(served.start, served.length)
        try:
            self.uffd.unregister(served.start, served.length)
        except (ProcessGoneError, LayoutChangedError, ClosedError):
            pass  # the owner is gone, and its registrations with it
        except UffdOSError as error:
            log.debug("unregister: %s", error)  # unmapped meanwhile (EINVAL, ENOMEM)
        engine.remove(served.start)
        del self._served[served.start]
        if served.alias is not None:
            served.alias.close()
        if isinstance(served.region, Region):
            for callback in served.on_close:
                served.region.forget_on_close(callback)  # type: ignore[arg-type]

    def _find(self, region: RangeLike | int) -> _Served:
        start = region if isinstance(region, int) else region.start
        if start not in self._served:
            raise ValueError(f"no range at {start:#x} is served by this handler")
        return self._served[start]

    # Running

    def start(self) -> None:
        """Start resolving; regions may be served before and after.

        With write-protection, start after `writeprotect` when all pages must be of one instant:
        a write that waits meanwhile goes on only then.

        Raises:
            ValueError: started already.
            UffdOSError: EINVAL - a CPU of `cpus` that is not there; EAGAIN - no more threads.
        """
        with self._lock:
            engine = self._running_engine()
            if self._started:
                raise ValueError("this handler has been started")
            engine.start(self._cpus)
            self._started = True
            _running.add(self)

    def stop(self, drain: bool = True) -> None:
        """Stop: resolve or poison what waits, unregister every region, end the driver.

        Pages that nobody asked for are poisoned, as `unserve` says. Twice is fine.

        Args:
            drain: Resolve the faults that wait now, with their content. False poisons them.

        Raises:
            HandlerError: the content of a page could not be had, or the engine failed, at any
                time since the start; the handler is stopped all the same.
        """
        with self._lock:
            engine = self._engine
            if engine is None or self._pid != os.getpid():
                return
            if self._started and not drain:
                engine.refuse()
            try:
                if self._started and not engine.drain(int(DRAIN_LIMIT_S * 1e9)):
                    log.warning("faults still came in after %.0f s of draining", DRAIN_LIMIT_S)
                for served in list(self._served.values()):
                    self._unserve(engine, served, seal=True)
            finally:
                engine.stop()
                self._final_stats = engine.stats()
                self._final_faults = engine.recent()
                failure = engine.failure()
                if not self._served:
                    self._engine = None
                    engine.destroy()
                _running.discard(self)
                self.uffd.forget_on_close(self.stop)
        if failure is not None:
            raise _failure_error(
                failure.stage, failure.error, failure.address, failure.length, failure.count
            )

    def populate(self, region: RangeLike, offset: int = 0, length: int | None = None) -> int:
        """Fill the absent pages of a region now, from this thread; return the bytes filled.

        Raises:
            ValueError: not served, or pages outside the region.
            UffdOSError: the source's error; the pages before it are filled (`completed` bytes).
        """
        engine, served, first, pages = self._pages(region, offset, length)
        return engine.populate(served.start, first * served.page_size, pages * served.page_size)

    # Write protection

    def writeprotect(self, region: RangeLike) -> None:
        """Write-protect a region served with RegisterMode.WP, and call all its pages clean.

        On anonymous memory without Feature.WP_UNPOPULATED the missing pages of a range that is
        registered for WP alone are mapped (as the zero page) first: Linux would leave them
        unprotected and say nothing.
        """
        with self._lock:
            engine, served, _, pages = self._pages(region, 0, None)
            if not served.mode & RegisterMode.WP:
                raise ValueError(f"[{served.start:#x}, +{served.length:#x}) is not served for WP")
            if served.mode == RegisterMode.WP:
                if isinstance(region, Region) and region.kind.name.startswith("ANON"):
                    self._map_holes(served)
                # Before the ioctl: a fault that is being resolved now stays counted as dirty.
                engine.set_states(served.start, 0, pages, PageState.CLEAN)
            self.uffd.writeprotect(served.start, served.length)

    def _map_holes(self, served: _Served) -> None:
        if not self.uffd.features & (Feature.WP_UNPOPULATED | Feature.WP_ASYNC):
            _memory.touch(served.start, served.length, served.page_size, write=False)

    def preserve(self, region: RangeLike, offset: int = 0, length: int | None = None) -> int:
        """Save the pages that are still protected, unprotect them, and return the bytes saved.

        They go to the region's `preserve` buffer. Together with the faults, which save a page
        before its first write, this gives it every page as it was when `writeprotect` returned.

        Raises:
            ValueError: the region was served without `preserve`.
        """
        engine, served, first, pages = self._pages(region, offset, length)
        return engine.preserve(served.start, first * served.page_size, pages * served.page_size)

    # Looking

    def page_states(self, region: RangeLike, offset: int = 0, length: int | None = None) -> bytes:
        """Return one `PageState` byte for each page."""
        engine, served, first, pages = self._pages(region, offset, length)
        return engine.states(served.start, first, pages)

    def stats(self) -> HandlerStats:
        """Return the counters; after stop(), the last ones."""
        if self._engine is None:
            return self._final_stats
        return self._running_engine().stats()

    def recent_faults(self) -> list[RecentFault]:
        """Return the faults resolved last, newest first, up to 64 for each CPU."""
        if self._engine is None:
            return self._final_faults
        return self._running_engine().recent()

    def _pages(
        self, region: RangeLike, offset: int, length: int | None
    ) -> tuple[Engine, _Served, int, int]:
        engine = self._running_engine()
        served = self._find(region)
        if length is None:
            length = served.length - offset
        check_range(offset, length, served.page_size, name="offset")
        if offset + length > served.length:
            raise ValueError(
                f"offset {offset:#x} + {length:#x} is outside a region of {served.length:#x}"
            )
        return engine, served, offset // served.page_size, length // served.page_size

    # Context

    def close(self) -> None:
        """Stop, as stop() does."""
        self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        except HandlerError as error:
            if exc is None:
                raise
            exc.add_note(f"and the fault handler failed: {error}")

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None and self._pid == os.getpid():
            warnings.warn(f"unstopped {self!r}", ResourceWarning, source=self, stacklevel=2)
            try:
                self.stop()
            except HandlerError as error:
                log.error("%s", error)

    def __repr__(self) -> str:
        if self._engine is None:
            state = "stopped"
        else:
            state = f"{'running' if self._started else 'not started'}, {len(self._served)} ranges"
        return f"<Handler {self.driver} on fd {self.uffd._fd}, {state}>"


_running: weakref.WeakSet[Handler] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for handler in list(_running):
        try:
            handler.stop()
        except HandlerError as error:
            log.error("at exit: %s", error)


def _choose_driver(driver: Driver, uffd: Userfaultfd) -> Literal["native", "inline"]:
    has_sigbus = bool(uffd.features & Feature.SIGBUS)
    if driver == "auto":
        return "inline" if has_sigbus else "native"
    if driver not in ("native", "inline"):
        raise ValueError(f"driver {driver!r} is none of 'auto', 'native', 'inline'")
    if driver == "inline" and not has_sigbus:
        raise ValueError("driver='inline' needs Userfaultfd(features=Feature.SIGBUS)")
    if driver == "native" and has_sigbus:
        raise ValueError(
            "a userfaultfd with Feature.SIGBUS sends no messages: driver='inline' goes with it"
        )
    return driver


def _check_options(
    driver: str,
    uffd: Userfaultfd,
    on_error: str,
    prefetch: int,
    spin_us: float | None,
    cpus: list[int],
) -> None:
    if on_error not in ("poison", "stall", "kill"):
        raise ValueError(f"on_error {on_error!r} is none of 'poison', 'stall', 'kill'")
    if prefetch < 0:
        raise ValueError(f"prefetch {prefetch:#x} is negative")
    if spin_us is not None and spin_us < 0:
        raise ValueError(f"spin_us {spin_us} is negative")
    events = uffd.features & LAYOUT_EVENTS
    if events:
        raise ValueError(f"a Handler follows no layout events, and this userfaultfd has {events!r}")
    if driver == "inline":
        if on_error == "stall":
            raise ValueError("the inline driver has no other thread to leave one stalled for")
        if cpus or spin_us is not None:
            raise ValueError("the inline driver has no thread: cpus and spin_us are for 'native'")
    elif not fcntl.fcntl(uffd.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK:
        raise ValueError("the native driver needs a userfaultfd opened with nonblocking=True")


def _check_cpus(cpus: Iterable[int] | None) -> list[int]:
    if cpus is None:
        return []
    wanted = sorted(set(cpus))
    allowed = os.sched_getaffinity(0)
    bad = [cpu for cpu in wanted if cpu not in allowed]
    if bad or not wanted:
        raise ValueError(f"cpus {bad or wanted} are not among the CPUs {sorted(allowed)}")
    return wanted


def _region_numbers(region: RangeLike) -> tuple[int, int, int]:
    page_size = check_page_size(page_size_of(region))
    start, length = region.start, region.length
    check_range(start, length, page_size)
    return start, length, page_size


def _check_mode(mode: RegisterMode, source: PageSource | None, preserve: Buffer | None) -> None:
    known = RegisterMode.MISSING | RegisterMode.WP | RegisterMode.MINOR
    if not mode or int(mode) & ~int(known):
        raise ValueError(f"a Handler serves MISSING, WP and MINOR, not {mode!r}")
    if mode & RegisterMode.MISSING and source is None:
        raise ValueError("missing faults need a source; ZeroSource() is the one for zeros")
    if mode == RegisterMode.WP and source is not None:
        raise ValueError("write-protect faults alone take no source: the pages are there")
    if preserve is not None and mode != RegisterMode.WP:
        raise ValueError(f"preserve goes with RegisterMode.WP alone, not with {mode!r}")


def _sink(preserve: Buffer | None, length: int) -> tuple[int, object]:
    if preserve is None:
        return 0, None
    if memoryview(preserve).readonly:
        raise ValueError("preserve must be a writable buffer")
    address, size, owner = _memory.buffer_address(preserve)
    if size < length:
        raise ValueError(f"preserve has {size:#x} bytes, fewer than the region's {length:#x}")
    return address, owner


def _failure_error(
    stage: FailureStage, code: int, address: int, length: int, count: int
) -> HandlerError:
    what = {
        FailureStage.SOURCE: "the content of a page could not be read",
        FailureStage.RESOLVE: "a fault could not be resolved",
        FailureStage.UNSERVED: "a fault came from a registered range that is not served",
        FailureStage.READ: "the userfaultfd could not be read",
        FailureStage.LAYOUT: "a layout event came that was not asked for",
    }.get(stage, "the engine failed")
    place = f" at {address:#x}" if address else ""
    error = HandlerError(
        f"{what}{place}: {os.strerror(code)} ({count} pages in all)",
        address or None,
        length or None,
    )
    error.__cause__ = OSError(code, os.strerror(code))
    return error
