"""`Handler`: serves regions through userfaultfds with one of the engine's drivers (layer L4)."""

from __future__ import annotations

import atexit
import logging
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pyuffd._abi import Ioctl, RegisterMode
from pyuffd._arguments import check_int
from pyuffd._closing import SoleOwner, attach
from pyuffd._errors import ClosedError, HandlerError, HelperLostError, UffdOSError
from pyuffd._pages import RangeLike, check_range, start_of
from pyuffd._uffd import Userfaultfd
from pyuffd._watch import stderr_fd
from pyuffd.handlers._aftermath import (
    completed,
    describe,
    held_at,
    leave_behind,
    take_out,
    views_of,
)
from pyuffd.handlers._backend import Backend
from pyuffd.handlers._checks import (
    LAYOUT_EVENTS,
    Driver,
    Policy,
    check_cpus,
    check_is_uffd,
    check_mode,
    check_options,
    check_timeout,
    check_uffd,
    choose_driver,
    handler_error,
    preserve_buffer,
    region_numbers,
)
from pyuffd.handlers._ending import GRACE_S, Ending, refuse_sources_thread
from pyuffd.handlers._engine import Engine, ensure_inline_handler
from pyuffd.handlers._failures import label_of, log_error
from pyuffd.handlers._forks import ForkWatch
from pyuffd.handlers._overlaps import Overlaps, range_of
from pyuffd.handlers._owners import Owners
from pyuffd.handlers._present import Present, choose_present, settle_present
from pyuffd.handlers._serving import (
    OnClose,
    Served,
    check_local,
    content_of,
    is_shared,
    leaves_holes,
    local_file,
    local_mapping,
    maps_holes,
    register,
    served_mode,
    take_back,
    tell_registered,
    touched_by,
    warn_of_merging,
)
from pyuffd.handlers._threads import WorkedEngine
from pyuffd.handlers._types import (
    Content,
    Ended,
    EngineOptions,
    HandlerStats,
    OnError,
    RangeSpec,
    RecentFault,
    SourceFailure,
    SourceKind,
    known_failure,
)
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.handlers.process._transport import refuse_while_loading
from pyuffd.lowlevel import Granted
from pyuffd.regions import Region
from pyuffd.sources import PageSource

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

# Longer than any pause between two faults of one thread that was measured on a loaded machine, and
# short enough that ten faults a second cost 0.05 % of a CPU.
DEFAULT_SPIN_US = 50.0
# EAGAIN ends once the thread that changes the layout has run again: 12 ms on a busy machine.
RETRY_LIMIT_S = 5.0
# A page source that needs longer than this, with the GIL free, is too slow for faults.
STALL_TIMEOUT_S = 2.0


class Handler(SoleOwner):
    """Resolve the faults of regions from page sources.

    Args:
        uffd: The userfaultfd. The handler borrows it, and stops when it is closed. With
            Feature.EVENT_* the handler follows the owner's changes of its memory: dropped pages
            read as zeros, moved ranges are served at their new place, and forks are served like
            their parent until they exit. Until stop() the handler reads the events: read_events()
            and events() raise EventsBusyError.
        driver: What resolves the faults. Each driver also resolves the faults of other processes
            and of system calls, except "inline".
            "native": a C thread.
            "inline": a SIGBUS handler in the faulting thread. It is the fastest, but resolves only
            faults of this process's own code. A system call that touches a missing page fails with
            EFAULT (call `populate` first), and a thread that blocks SIGBUS is killed by its first
            fault outside methods of `Region`. Needs Feature.SIGBUS.
            "process": for page sources in Python. A worker process gets a copy of the sources and
            calls them, so that a thread may fault while it holds the GIL. If the worker process is
            killed, another one replaces it. The sources must be picklable; lambdas, closures and
            what a notebook defines need the package cloudpickle. Without that package, a program
            whose main module defines a source needs `if __name__ == "__main__":`, because the
            worker process imports that module.
            "thread": for page sources in Python. Threads of this process call them; C does the
            rest. A thread that faults while it holds the GIL waits for a Python thread that cannot
            run; after `stall_timeout_s` all tracebacks are written to stderr, and `on_error` ends
            the wait.
            "auto": "inline" if the userfaultfd has Feature.SIGBUS, else "native" until a source in
            Python is served, then "process".
        on_error: What happens to a page whose content cannot be read: "poison" (an access raises
            SIGBUS), "stall" (the threads that access it wait, and stop() poisons it; not with
            "inline"; where a source in Python does not return, its worker is busy, so with
            workers=1 every other page waits as well), "kill" (the process that touches it gets
            SIGKILL; with Feature.EVENT_FORK this needs Feature.THREAD_ID, which tells the forks
            apart). The page is never filled with zeros. On a kernel without UFFDIO_POISON
            (before Linux 6.6) "poison" acts as "stall". stop() raises HandlerError for the failure.
        stall_timeout_s: How long a page source in Python may need for a page, in seconds; 2 by
            default.
        prefetch: Bytes to fill around a fault after its own page; more when faults come in
            sequence. A Python source is asked for all of them at once. 0 fills the page only.
        workers: How many pages may be fetched by Python sources at the same time.
        spin_us: How long the native thread polls for the next fault before it sleeps, at most, in
            microseconds. It adapts, down to 0 when faults are rare. None: 50, or 0 if `cpus` has
            one CPU, where spinning would keep the faulting thread from running.
        cpus: CPUs that the native thread may run on. The latency is by far the lowest on the CPU of
            the faulting thread; with None the thread looks for that CPU while faults come in quick
            succession.
        owner_pid: Process whose memory `uffd` governs; `uffd.owner_pid` by default. When another
            process exits, the handler notices and drops its faults.
        autostart: Whether `with` (or `async with`) starts the handler. Pass False to protect
            everything before calling `start`, so that all pages are of one instant. Until then a
            thread that touches a missing or protected page waits.

    Raises:
        ValueError: a userfaultfd or options that cannot be combined, or options that require the
            owner of the memory to be known, and it is not.
        ProcessGoneError: ESRCH - there is no process `owner_pid`, but the memory still exists.

    Kernel: userfaultfd(2).  GIL: "native" and "inline" never need it; every method that waits
    releases it.  Threads: safe.  Blocks: stop() and unserve() until the faults that are being
    resolved have been resolved.

    Example:
        >>> from pyuffd import BufferSource, Handler, Region, Userfaultfd
        >>> with Userfaultfd() as uffd, Region.anonymous(8192) as region, Handler(uffd) as handler:
        ...     _ = handler.serve(region, BufferSource(b"hello".ljust(8192, b".")))
        ...     region.read(0, 7)
        b'hello..'
    """

    _instead = "a userfaultfd has one handler, in one process; share the object itself"

    def __init__(
        self,
        uffd: Userfaultfd,
        *,
        driver: Driver = "auto",
        on_error: Policy = "poison",
        stall_timeout_s: float | None = None,
        prefetch: int = 0,
        workers: int = 1,
        spin_us: float | None = None,
        cpus: Iterable[int] | None = None,
        owner_pid: int | None = None,
        autostart: bool = True,
    ) -> None:
        self._engine: Backend | None = None
        self._final_failure: SourceFailure | None = None
        self._final_owner_exited = False
        self._ending: Ending | None = None
        self._ending_lock = RLock()
        refuse_while_loading()
        self._cpus = check_cpus(cpus)
        self.driver = choose_driver(driver, uffd)
        check_uffd(self.driver, uffd)
        check_options(
            self.driver, on_error, prefetch, spin_us, self._cpus, workers, stall_timeout_s
        )
        self._owners = Owners(self.driver, on_error)
        owner = self._owners.add(uffd, owner_pid)
        if spin_us is None:
            spin_us = 0.0 if len(self._cpus) == 1 else DEFAULT_SPIN_US
        self.uffd = uffd
        self._pid = os.getpid()
        self._lock = RLock()  # guards the members below; acquired before any lock of the C engine
        self._spaces: dict[Userfaultfd, int] = {uffd: 0}
        self._served: dict[tuple[int, int], Served] = {}  # by space and start
        self._autostart = autostart
        self._at_close = OnClose(self, lambda handler: handler.stop(), lambda _: True)
        self._overlaps = Overlaps()
        self._fork_watch = ForkWatch(self)
        self._started = False
        # True until the handler runs and serves a region without Python.
        self._may_move = driver == "auto" and self.driver == "native"
        self._worker_count = workers
        self._options = EngineOptions(
            owner_pid=owner,
            on_error=OnError[on_error.upper()],
            layout_events=int(uffd.features & LAYOUT_EVENTS),
            watch_owner=owner not in (0, self._pid),
            stall_limit_ns=int((stall_timeout_s or STALL_TIMEOUT_S) * 1e9),
            prefetch=prefetch,
            spin_ns=int(spin_us * 1000),
            retry_limit_ns=int(RETRY_LIMIT_S * 1e9),
            say_fd=stderr_fd(),
        )
        engine = None
        try:
            uffd._claim_events(self)
            engine = self._make_engine()
            tell_registered(engine, uffd, 0)
            uffd._on_close(self._at_close)
            self._engine = engine  # last: until here no other code stops it
        except BaseException:
            uffd._forget_on_close(self._at_close)
            if engine is not None:
                engine.destroy()
            uffd._release_events(self)
            raise

    def _make_engine(self) -> Backend:
        fd = self.uffd.fileno()
        if self.driver == "process":
            return RemoteEngine(fd, workers=self._worker_count, **self._options)
        if self.driver == "thread":
            return WorkedEngine(fd, workers=self._worker_count, **self._options)
        return Engine(fd, inline=self.driver == "inline", **self._options)

    def _move_to_process(self, source: PageSource) -> Backend:
        """Change "auto" to the process driver, for the first source in Python."""
        old = self._running_engine()
        if not self._may_move:
            raise ValueError(
                f"{source!r} must be read by Python, which the {self.driver} driver cannot call:"
                " use a ZeroSource, a BufferSource or a FileSource, or driver='process'"
            )
        if self._served:
            raise ValueError(
                f"{source!r} must be read by Python, but this handler already serves other regions"
                " without Python: serve it first, or make the Handler with driver='process'"
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
            if isinstance(old, Engine):  # always true: "auto" began with the native driver
                old.leave_strays()
                old.stop()
            self._engine, self._spaces, self._may_move = engine, spaces, False
        except BaseException:
            if self._engine is old:
                self.driver = "native"
                if engine is not None:
                    engine.destroy()
                if self._started:
                    old.start(self._cpus)
            raise
        old.destroy()
        return engine

    def _add_space(self, engine: Backend, uffd: Userfaultfd) -> int:
        return engine.add_space(
            uffd.fileno(),
            layout_events=int(uffd.features & LAYOUT_EVENTS),
            owner_pid=self._owners.of(uffd),
        )

    # The userfaultfd calls these when its own methods are used while the handler serves. They do
    # not acquire the lock, which may be held for long.

    def _registers(self, uffd: Userfaultfd, start: int, length: int) -> None:
        engine, space = self._engine, self._spaces.get(uffd)
        if engine is not None and space is not None and not uffd.adopted:
            with suppress(ClosedError, HelperLostError):
                engine.list_registered(space, [(start, length)])

    def _unregistered(self, uffd: Userfaultfd, start: int, length: int) -> None:
        engine, space = self._engine, self._spaces.get(uffd)
        if engine is not None and space is not None and not uffd.adopted:
            with suppress(ClosedError, HelperLostError):
                engine.unlist_registered(space, start, length)

    def _served_mode(self, uffd: Userfaultfd, start: int, length: int) -> RegisterMode | None:
        if self._engine is None or self._pid != os.getpid():
            return None
        return served_mode(list(self._served.values()), uffd, start, length)

    def _running_engine(self) -> Backend:
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
        uffd: Userfaultfd | None = None,
        present: Present | None = None,
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
            source: The content; it must reach at least into the region's last page, whose rest is
                filled with zeros. MISSING needs one, WP alone must have None, and with MINOR but
                not MISSING it is optional.
            mode: Which faults to resolve.
            preserve: For WP: a writable buffer of the region's length that gets the old content
                of each page before its first write (see `preserve`). If the content cannot be
                saved the page stays protected, and threads that write to it wait until `preserve`
                saves it or the region is no longer served; stop() then raises HandlerError, which
                names the page. A fork's writes go to its own copies of private memory; those are
                not saved.
            local: The same memory mapped in this process and not registered. With `preserve`, old
                content is read from it; without `local`, from the owner of the memory. With a
                source and MINOR but not MISSING, content is written through it; by default the
                handler makes such a mapping of the region.
            uffd: Another userfaultfd, of this or another process, with which the range is to be
                registered. The handler borrows it and stops serving its ranges when it is closed.
            present: What to do about pages that are already present. They cause no missing fault,
                so they never get the source's content. "refuse" raises ValueError with their
                number, "keep" keeps what they hold, "drop" drops them (memory of this process
                only). The default is "refuse", but "keep" if a handler may have filled them: for
                adopted userfaultfds, and for a Region that was served before, whose poison marks
                are kept too.

        Raises:
            ValueError: a range that is served already, pages that are present (see `present`), a
                source that ends before the last page, a mode that contradicts the arguments, or a
                `BufferSource`, `preserve` or `local` in memory that this handler serves.
            UffdOSError: UFFDIO_REGISTER failed; the region is not served.
        """
        self._running_engine()  # before the lock, which a thread of the parent may have held
        with self._lock:
            engine = self._running_engine()
            start, length, page_size = region_numbers(region)
            if uffd is not None:
                check_is_uffd(uffd)
            uffd = uffd or self.uffd
            check_mode(mode, source, preserve, uffd.features)
            if uffd not in self._spaces:
                self._owners.add(uffd)
            reads_owner = preserve is not None and local is None
            self._owners.check_serving(uffd, reads_owner, leaves_holes(region, uffd, mode))
            policy = choose_present(
                present, region, source, mode, uffd, is_here=self._owners.are_here(uffd)
            )
            content = content_of(source, region)
            check_local(local, length)
            if source is not None and content.kind is SourceKind.REQUEST:
                engine = engine if engine.calls_python else self._move_to_process(source)
            sink, sink_owner = preserve_buffer(preserve, length)
            space = self._space_of(engine, uffd)
            writes_cache = (
                source is not None
                and mode & RegisterMode.MINOR
                and not (mode & RegisterMode.MISSING)
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
            try:
                self._overlaps.check(memory)
                if (space, start) not in self._served:
                    settle_present(policy, region, uffd)
                if self._started and self.driver == "inline" and ensure_inline_handler():
                    log.warning(
                        "pyuffd: another SIGBUS handler had replaced ours, which is back on top"
                    )
                served = Served(
                    engine.add(
                        RangeSpec(
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
                            owner=(sink_owner, local, region),
                            label=label_of(region, source),
                        )
                    ),
                    page_size,
                    mode,
                    region,
                    uffd,
                    content.kind,
                    memory,
                    source,
                    touched_by(region, local, preserve, writes_cache=bool(writes_cache)),
                    alias=alias,
                    preserves=preserve is not None,
                    on_close=on_close,
                )
                ioctls = register(
                    engine,
                    served,
                    lambda: self._owners.verify(uffd, region, needed=reads_owner),
                    granted,
                )
                if policy == "keep":
                    engine.take_in(served.id)
                if self._started:
                    self._may_move = False
                self._overlaps.add(memory)
                if isinstance(region, Region):
                    self._follow_close(region, served)
                self._at_close.keeps = self
                self._served[space, start] = served  # last: from here on it is served
            except BaseException:  # a signal handler may raise at any line
                if (space, start) not in self._served:
                    take_back(engine, uffd, (space, start, length), granted)
                    self._overlaps.remove(memory)
                    for callback in on_close:
                        region._forget_on_close(callback)  # type: ignore[attr-defined]
                    if alias is not None:
                        alias.close()
                raise
            if mode & RegisterMode.WP:
                warn_of_merging(served)
            return ioctls

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
                uffd._claim_events(self)
                space = self._add_space(engine, uffd)
                tell_registered(engine, uffd, space)
                uffd._on_close(closes)
                if self._started:
                    uffd.note_answered()
                self._spaces[uffd] = space  # last: until here it is undone
            except BaseException:
                self._spaces.pop(uffd, None)
                uffd._forget_on_close(closes)
                if space is not None:
                    with suppress(HelperLostError):
                        engine.remove_space(space)
                uffd._release_events(self)
                raise
        return self._spaces[uffd]

    def _uffd_closes(self, uffd: Userfaultfd) -> None:
        with self._lock:
            if self._engine is None or self._pid != os.getpid():
                return
            errors: list[HandlerError] = []
            for served in [one for one in self._served.values() if one.uffd is uffd]:
                try:
                    self._unserve(self._engine, served, seal=True)
                except HandlerError as error:
                    errors.append(error)
            if any(one.uffd is uffd for one in self._served.values()):
                uffd._hold_open()  # never undone: pages that stay registered would become zeros
            else:
                self._engine.remove_space(self._spaces[uffd])
                uffd._release_events(self)
                self._owners.forget(uffd)
                del self._spaces[uffd]  # last: after an interruption the next call does it again
        if errors:
            raise errors[0]

    def _follow_close(self, region: Region, served: Served) -> None:
        region_closes = OnClose(
            self,
            lambda handler: handler._region_closes(served, seal=region.outlives_close()),
            lambda handler: handler._serves(served),
        )
        served.on_close.append(region_closes)
        region._on_close(region_closes)
        reference = weakref.ref(self)

        def why_lost(address: int) -> BaseException | None:
            handler = reference()
            return None if handler is None else handler._why_lost(address)

        region.on_loss(why_lost)

    def _why_lost(self, address: int) -> BaseException | None:
        """Return why a page was lost, or None if that is unknown."""
        engine, failure = self._engine, self._final_failure
        if engine is not None and self._pid == os.getpid():
            with suppress(ClosedError, HelperLostError):
                found = engine.failure_at(address)
                failure = failure if found is None else found
        if failure is None or not failure.start <= address < failure.start + failure.length:
            return None
        return failure.error

    def _serves(self, served: Served) -> bool:
        return self._served.get((served.id.space, served.id.start)) is served

    @property
    def must_end(self) -> bool:
        """Whether the handler must stop before its userfaultfd may be closed."""
        return self._engine is not None and self._pid == os.getpid()

    def _region_closes(self, served: Served, *, seal: bool) -> None:
        with self._lock:
            if self._engine is not None and self._serves(served) and self._pid == os.getpid():
                self._unserve(self._engine, served, seal=seal)

    def unserve(self, region: RangeLike | int, *, uffd: Userfaultfd | None = None) -> None:
        """Stop serving one region and unregister it, with all its moved parts and forks' copies.

        Pages that were never filled are poisoned first, so that a later access raises SIGBUS
        instead of reading zeros. Call `populate` before to get all content. With a ZeroSource,
        where zeros are right, nothing is poisoned. Write-protection is lifted.

        Raises:
            ValueError: not served by this handler.
            HandlerError: the source does not return to a thread that is filling a page; the thread
                is left behind and the page is poisoned. Or pages could not be poisoned; the region
                then stays registered.

        Blocks: for at most 10 s until no thread works on the region's pages.
        """
        self._running_engine()  # before the lock, which a thread of the parent may have held
        with self._lock:
            engine = self._running_engine()
            served = self._find(region, uffd)
            self._unserve(engine, served, seal=True)

    def _unserve(self, engine: Backend, served: Served, *, seal: bool) -> None:
        """Take a range out; if a signal handler raises, the range is served as before."""
        views = [] if engine.is_remote else views_of([served])
        try:
            take_out(engine, served, seal=seal)
        except UffdOSError as error:
            raise HandlerError(
                f"the region at {served.id.start:#x} stays registered: {error}",
                served.id.start,
                served.id.length,
            ) from error
        held = held_at(engine, served)
        self._forget(served, keep_alias=bool(held))
        if held and isinstance(engine, Engine):
            leave_behind(engine, held, [served], [served.uffd], views)
            raise HandlerError(
                f"the page source did not answer: {describe(held, [served], is_remote=False)}",
                held[0].start,
                held[0].length,
            )

    def _forget(self, served: Served, *, keep_alias: bool = False) -> None:
        """Release what belongs to a range that is no longer served; may be called again."""
        if not self._serves(served):
            return
        self._overlaps.remove(served.memory)
        served.uffd._note_unregistered(served.id.start, served.id.length)
        if served.alias is not None and not keep_alias:
            served.alias.close()
        if isinstance(served.region, Region):
            served.region.was_served = True
            for callback in served.on_close:
                served.region._forget_on_close(callback)
        self._served.pop((served.id.space, served.id.start), None)  # last

    def _find(self, region: RangeLike | int, uffd: Userfaultfd | None = None) -> Served:
        start = start_of(region)
        found = [
            self._served[space, start]
            for known, space in self._spaces.items()
            if uffd in (None, known) and (space, start) in self._served
        ]
        # Processes may have different memory at one address; the object served tells them apart.
        same = [one for one in found if one.region is region]
        if len(same or found) > 1:
            raise ValueError(
                f"several ranges at {start:#x} are served: pass the object that was served, or uffd"
            )
        if not found:
            raise ValueError(f"no range at {start:#x} is served by this handler")
        return (same or found)[0]

    # Running

    def start(self) -> None:
        """Start resolving faults. `with` calls this; on a running handler it does nothing.

        Regions may be served before and after. If all pages must be of one instant, make the
        handler with `autostart=False` and call this after `writeprotect`: a thread that writes to a
        protected page waits until the handler starts.

        Raises:
            ClosedError: stopped already.
            UffdOSError: EAGAIN - the process cannot create another thread.
        """
        self._running_engine()  # before the lock, which a thread of the parent may have held
        with self._lock:
            engine = self._running_engine()
            if self._started:
                return
            engine.start(self._cpus)
            self._started = True
            self._at_close.keeps = self
            for uffd in self._spaces:
                uffd.note_answered()
            if self._served:
                self._may_move = False
            _running.add(self)

    def stop(self, drain: bool = True, *, timeout_s: float | None = None) -> None:
        """Stop: resolve or poison what waits, unregister every region, end the driver.

        Pages that were never filled are poisoned, as by `unserve`. A second call does nothing, or
        waits for the first.

        Args:
            drain: Fill the pages that threads wait for now. False poisons them.
            timeout_s: How long page sources may need for that, in seconds; 10 by default. Pages
                that threads still wait for are then poisoned.

        Raises:
            HandlerError: since the start, the content of a page could not be read or the engine
                failed; or a page source does not return to a thread, which is left behind. The
                error names page, source and thread. The handler is stopped in any case.
            HandlerError: called by a page source, or in the thread of the loop that an
                `AsyncSource` runs in: this would wait for itself, so nothing is done.
            HelperLostError: the helper process is gone. The handler is stopped.
            ValueError: a negative `timeout_s`.

        Blocks: no longer than `timeout_s` for page sources, even if they never return. A helper
            process that does not answer (stopped, frozen) gets 5 s more as a rule, and is killed
            then: a thread of this process poisons what is missing. If a signal
            handler raises meanwhile (Ctrl-C), the wait is cut short: the exception is raised when
            every page is poisoned and every region unregistered. A second exception is raised at
            once, and a thread finishes stopping.
        """
        limit_s = check_timeout(timeout_s)
        if self._pid != os.getpid():
            return  # before the lock, which a thread of the parent may have held at the fork
        if self._engine is not None:
            refuse_sources_thread(self._engine, self._served.values())
        self._stop(drain, limit_s)

    def _stop(self, drain: bool, limit_s: float) -> None:
        with self._ending_lock:
            if self._ending is None and self._engine is not None:
                self._drains = drain
                self._ending = Ending(
                    f"uffd-stop-{self.uffd.fileno()}",
                    self._finish,
                    lambda: self._running_engine().hurry(GRACE_S),
                    lambda: self._running_engine().progress(),
                    limit_s,
                )
        if self._ending is not None:
            self._ending.wait()

    def _finish(self, ending: Ending) -> HandlerError | None:
        """End everything; return what stop() raises. Each step may be repeated."""
        # A thread in serve() may hold the lock and wait. Ranges that it adds later are refused.
        locked = self._lock.acquire(timeout=ending.left_s())
        try:
            engine = self._engine
            if engine is None:
                return None
            try:
                return self._end(engine, ending)
            except HelperLostError as lost:
                engine.destroy()
                stand_in = self._stand_in()
                ending.cut_short()
                self._end(stand_in, ending)
                return lost
        finally:
            self._engine = None
            for uffd in self._spaces:
                uffd._release_events(self)
            _running.discard(self)
            self.uffd._forget_on_close(self._at_close)
            self._at_close.keeps = None
            if locked:
                self._lock.release()

    def _end(self, engine: Backend, ending: Ending) -> HandlerError | None:
        """Stop an engine and return the error that it reports."""
        all_served, began = list(self._served.values()), time.monotonic()
        views = [] if engine.is_remote else views_of(all_served)
        for uffd in self._spaces:
            uffd._hold_open()
        # Assumed until it is known; a lost helper holds nothing open, its stand-in does.
        ended = Ended(stays=not engine.is_remote)
        try:
            self._drain(engine, ending)
            ended = engine.end(ending.left_s())
            self._final_stats, self._final_faults = engine.stats(), engine.recent()
            self._final_owner_exited = engine.owner_exited
            failure, source_failure = engine.failure(), engine.source_failure
            self._final_failure = known_failure(failure, source_failure)
            at_work = {one.number for one in ended.held if not one.is_request}
            for served in all_served:
                self._forget(served, keep_alias=served.id.number in at_work)
            engine.destroy()
        finally:
            if isinstance(engine, Engine) and not engine.life.free_if_deserted():
                leave_behind(engine, ended.held, all_served, self._spaces, views)
            if not ended.stays:
                for uffd in self._spaces:
                    uffd._let_close()
        error = None if failure is None else handler_error(failure, source_failure)
        # An exception of a source in this process has been logged already.
        if error is not None and (source_failure is None or engine.is_remote):
            log_error(log, str(error), error.__cause__)
        if ended.stays:
            error = error or HandlerError(
                "pages could not be poisoned: their ranges stay registered"
            )
        held = ended.held
        if ending.is_cut_short and held:
            left = describe(held, all_served, is_remote=engine.is_remote)
            log.warning("pyuffd: %r: %s", self, left)
            held = ()
        return completed(
            error,
            held,
            all_served,
            is_remote=engine.is_remote,
            waited_s=time.monotonic() - began,
        )

    def _stand_in(self) -> Engine:
        """Make an engine in this process that poisons the ranges of a lost helper."""
        engine = Engine(self.uffd.fileno(), **self._options)
        engine.refuse()
        spaces = {
            uffd: self._add_space(engine, uffd) if uffd is not self.uffd else 0
            for uffd in self._spaces
        }
        for key, served in list(self._served.items()):
            kind = SourceKind.REQUEST if served.kind is SourceKind.FILE else served.kind
            served.id = engine.add(
                RangeSpec(
                    spaces[served.uffd],
                    served.id.start,
                    served.id.length,
                    served.page_size,
                    served.mode,
                    Content(kind),
                )
            )
            engine.set_ioctls(served.id, served.ioctls)
            del self._served[key]
            self._served[served.id.space, served.id.start] = served
        engine.start([])
        engine.wake_all()
        return engine

    def _drain(self, engine: Backend, ending: Ending) -> None:
        if not self._started:
            return
        limit_s = ending.left_s()
        waits = self._drains and not ending.is_cut_short
        drained = waits and engine.drain(int(limit_s * 1e9))
        failed = waits and not drained and not ending.is_cut_short
        engine.refuse()
        if not drained:
            engine.abandon(failed=failed)
        if failed:
            log.warning(
                "pyuffd: %r: threads still waited after %.1f s: their pages are poisoned",
                self,
                limit_s,
            )

    def populate(
        self,
        region: RangeLike,
        offset: int = 0,
        length: int | None = None,
        *,
        chunk: int | None = None,
    ) -> int:
        """Fill the absent pages of a region now, and return the bytes filled.

        This thread fills them or, with a source in Python, the workers, so call start() first. If
        the content of a page cannot be read, the page stays absent and no further pages are
        fetched; `on_error` applies only to pages that a thread waits for. With a source in Python,
        stop() raises the failure too.

        Args:
            region: A served region.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.
            chunk: Ask a source in Python for at most so many bytes at a time; a multiple of the
                page size. None begins with a page and asks for more, up to 1 MiB, as long as an
                answer needs no more than a quarter of `stall_timeout_s`. If a source raises when
                it is asked for several pages, it is asked for half of them, down to one.

        Raises:
            ValueError: not served, pages outside the region, or a bad chunk.
            UffdOSError: EIO - the source raised; its exception is the cause. ETIMEDOUT - it did not
                answer in time. ENOMEM - no huge page became free in time. ENODATA - the file of a
                FileSource was truncated. `start` is the first
                page without content, and `completed` bytes were filled. With several workers some
                of these may lie after `start`.
        """
        engine, served, first, pages = self._pages(region, offset, length)
        if chunk is not None and (check_int("chunk", chunk, 1) <= 0 or chunk % served.page_size):
            raise ValueError(
                f"chunk {chunk:#x} is not a positive multiple of the page size"
                f" {served.page_size:#x}"
            )
        if served.kind is SourceKind.REQUEST and not self._started:
            raise ValueError("populate needs running workers: call start() first")
        size = served.page_size
        return engine.populate(served.id, first * size, pages * size, chunk or 0)

    # Write protection

    def writeprotect(self, region: RangeLike, offset: int = 0, length: int | None = None) -> bytes:
        """Write-protect pages; return the `PageState` of each as it was when it was protected.

        Reading a state and protecting the page are one step. A write before it shows in the
        returned state; a write after it makes the page DIRTY again. So repeated calls while threads
        write miss no write: copy the pages whose returned state is not CLEAN, SAVED or ABSENT.
        After the call the pages are CLEAN.

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
            LayoutChangedError: ENOENT - part of the region was unmapped. The pages before it
                are protected; pages whose states are lost with the error stay DIRTY.
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
        self._running_engine()  # before the lock, which a thread of the parent may have held
        with self._lock:
            engine, served, first, pages = self._pages(region, offset, length)
            if not served.mode & RegisterMode.WP:
                raise ValueError(f"the range at {served.id.start:#x} is not served for WP")
            warn_of_merging(served)
            size = served.page_size
            states = engine.writeprotect(served.id, first * size, pages * size, pages)
            served.was_protected = True
            return states

    def preserve(
        self,
        region: RangeLike,
        offset: int = 0,
        length: int | None = None,
        *,
        unprotect: bool = False,
    ) -> int:
        """Save the pages that are still CLEAN, and return the bytes saved.

        They are copied to the region's `preserve` buffer. Write-protect faults save a page before
        its first write. After this call the buffer therefore holds every page as it was when
        `writeprotect` returned.

        Args:
            region: A region served with `preserve`.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.
            unprotect: False keeps the pages protected (SAVED): a later write makes a page DIRTY and
                costs one fault. True lifts the protection, for a program that need not know of
                later writes; the pages are then DIRTY, since they may be written at any time.

        Raises:
            ValueError: the region was served without `preserve`, or `writeprotect` was never
                called, so that its pages are not of one instant.
            ProcessGoneError: ESRCH - the owner of the memory has exited.
            UffdOSError: EPERM, EFAULT - the owner's memory cannot be read at `start`, the first
                page that is not saved. It stays protected; `completed` bytes were saved.
        """
        engine, served, first, pages = self._pages(region, offset, length)
        size = served.page_size
        if served.preserves and not served.was_protected:
            raise ValueError(
                f"the range at {served.id.start:#x} was never protected, so its pages are not of"
                " one instant: call writeprotect() first"
            )
        return engine.preserve(served.id, first * size, pages * size, unprotect=unprotect)

    # Looking

    @property
    def spaces(self) -> int:
        """The number of address spaces served: one for each userfaultfd and each living fork.

        Raises:
            ClosedError: the handler has stopped.
        """
        return self._running_engine().spaces

    @property
    def owner_exited(self) -> bool:
        """Whether the process whose memory `uffd` governs has exited, or called execve(2).

        After stop(): whether it had when the handler stopped.
        """
        if self._engine is None:
            return self._final_owner_exited
        return self._running_engine().owner_exited

    def page_states(self, region: RangeLike, offset: int = 0, length: int | None = None) -> bytes:
        """Return one `PageState` byte for each page.

        This waits for pages that are being resolved, as `stats` does. If the owner's page table can
        be read, it corrects what the handler knows: pages that other code filled are CLEAN, and
        with RegisterMode.WP every unprotected page is DIRTY, even if other code removed the
        protection. To read the states and protect the pages again without missing a write in
        between, use the states that `writeprotect` returns.

        Args:
            region: A served region.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.

        Raises:
            ValueError: not served, or pages outside the region.
        """
        engine, served, first, pages = self._pages(region, offset, length)
        return engine.states(served.id, first, pages)

    def stats(self) -> HandlerStats:
        """Return the counters; after stop(), their last values.

        A thread continues before its fault is counted. So this call waits, for at most 0.1 s, for
        the threads that work on a page; a fault that the caller has seen resolved is counted.

        GIL: released.  Threads: safe.  Blocks: usually for some microseconds.
        """
        if self._engine is None:
            return self._final_stats
        return self._running_engine().stats()

    def recent_faults(self) -> list[RecentFault]:
        """Return the faults resolved last, newest first, up to 256 for each CPU."""
        if self._engine is None:
            return self._final_faults
        return self._running_engine().recent()

    def _pages(
        self, region: RangeLike, offset: int, length: int | None
    ) -> tuple[Backend, Served, int, int]:
        engine = self._running_engine()
        served = self._find(region)
        offset = check_int("offset", offset)
        length = served.id.length - offset if length is None else check_int("length", length)
        check_range(offset, length, served.page_size, name="offset")
        if offset + length > served.id.length:
            raise ValueError(
                f"offset {offset:#x} + {length:#x} is outside a region of {served.id.length:#x}"
            )
        return engine, served, offset // served.page_size, length // served.page_size

    # Context

    def close(self) -> None:
        """Stop, as stop() does."""
        self.stop()

    def __enter__(self) -> Self:
        if self._autostart:
            try:
                self.start()
            except BaseException:  # __exit__ is not called
                self._stop(True, check_timeout(None))
                raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        except Exception as error:
            if exc is None:
                raise
            attach(exc, error, "the fault handler failed")

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop in another thread, so that an `AsyncSource` of this loop can still answer."""
        import asyncio

        task = asyncio.ensure_future(asyncio.to_thread(self.__exit__, exc_type, exc, traceback))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._ending is not None and not task.done():
                self._ending.cut_short()
                await asyncio.shield(task)
            raise

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None and self._pid == os.getpid():
            warnings.warn(f"unstopped {self!r}", ResourceWarning, source=self, stacklevel=2)
            try:
                self._stop(True, check_timeout(None))
            except HandlerError as error:
                log.error("pyuffd: %r: %s", self, error)

    def __repr__(self) -> str:
        if self._engine is None:
            state = "stopped"
        else:
            state = f"{'running' if self._started else 'not started'}, {len(self._served)} ranges"
        return f"<Handler {self.driver} on {self.uffd!r}, {state}>"


_running: weakref.WeakSet[Handler] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for handler in list(_running):
        try:
            handler.stop()
        except HandlerError as error:
            log.error("pyuffd: at exit: %r: %s", handler, error)
