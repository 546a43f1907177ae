"""`Handler`: serves regions through userfaultfds with one of the engine's drivers (layer L4).

Its parts are separate classes, by topic: `_regions`, `_filling`, `_tracking`, `_evicting`,
`_holding`, `_stopping`; all are based on `_base`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Self

from pyuffd._abi import Feature
from pyuffd._arguments import check_bools, check_int
from pyuffd._closing import Closing
from pyuffd._describe import counted
from pyuffd._dropped import close_dropped
from pyuffd._errors import HandlerError
from pyuffd._latch import RLock
from pyuffd._limits import raise_shortage
from pyuffd._pages import RangeLike
from pyuffd._uffd import Userfaultfd
from pyuffd._watch import stderr_fd
from pyuffd.handlers._checks import (
    LAYOUT_EVENTS,
    Driver,
    Policy,
    check_cpus,
    check_options,
    check_timeout,
    check_uffd,
    choose_driver,
    stall_limit_ns,
)
from pyuffd.handlers._ending import leave_in_thread
from pyuffd.handlers._evicting import EvictsPages
from pyuffd.handlers._fault_log import FaultLog
from pyuffd.handlers._filling import FillsPages
from pyuffd.handlers._forks import ForkWatch
from pyuffd.handlers._holding import HoldsFaults
from pyuffd.handlers._overlaps import Overlaps
from pyuffd.handlers._owners import Owners
from pyuffd.handlers._serving import OnClose, tell_registered
from pyuffd.handlers._serving_many import ServesMany
from pyuffd.handlers._stopping import Stops, unstopped
from pyuffd.handlers._tracking import TracksWrites
from pyuffd.handlers._types import EngineOptions, HandlerStats, OnError, RecentFault
from pyuffd.handlers.process._transport import refuse_while_loading

log = logging.getLogger(__name__)

# Longer than any pause between two faults of one thread that was measured on a loaded machine, and
# short enough that ten faults a second cost 0.05 % of a CPU.
DEFAULT_SPIN_US = 50.0
# EAGAIN ends once the thread that changes the layout has run again: 12 ms on a busy machine.
RETRY_LIMIT_S = 5.0
# Events of changes that leave memory served at another address, or in another process.
MOVES = Feature.EVENT_REMAP | Feature.EVENT_FORK
# More than 100 million faults are no working set.
LARGEST_LOG = 1 << 27


class Handler(ServesMany, FillsPages, TracksWrites, EvictsPages, HoldsFaults, Stops, Closing):
    """Resolve the faults of regions from page sources.

    If a signal handler raises just as its `with` block ends, faults are resolved until the last
    reference to this object is gone; with driver="thread" until stop(), or the program's end.

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
            the wait. A source that reads memory of its own handler, and would wait for itself, gets
            HandlerError from the methods of `Region`.
            Once it runs, its threads refer to the memory and the handler, which live until stop();
            a handler of another driver that is dropped with its memory is stopped as garbage.
            "auto": "inline" if the userfaultfd has Feature.SIGBUS, else "native" until a source in
            Python is served, then "process".
        on_error: What happens to a page whose content cannot be read: "poison" (an access raises
            SIGBUS), "stall" (the threads that access it wait, and stop() poisons it; not with
            "inline"; where a source in Python does not return, its worker is busy, so with
            workers=1 every other page waits as well), "kill" (the process that touches it gets
            SIGKILL; with Feature.EVENT_FORK this needs Feature.THREAD_ID, which tells the forks
            apart). The page is never filled with zeros. On a kernel without UFFDIO_POISON
            (before Linux 6.6) "poison" acts as "stall". stop() raises HandlerError for the failure.
        stall_timeout_s: How long a page source in Python may need for a page, in seconds, or
            math.inf for a source that is waited for as long as it takes; 2 by
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
        fault_log: How many demand faults to keep for `take_faults`, at 40 bytes each; the memory is
            used as faults come. 0 keeps none.

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
    _failed = "the fault handler failed"

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
        fault_log: int = 0,
    ) -> None:
        self._engine = None
        self._final_failure = None
        self._final_owner_exited = False
        self._ending = None
        self._ending_lock = RLock()
        refuse_while_loading()
        check_bools(autostart=autostart)
        self._cpus = check_cpus(cpus)
        self.driver: Driver = choose_driver(driver, uffd)
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
        self._lock = RLock()
        self._spaces = {uffd: 0}
        self._served = {}
        self._autostart = autostart
        self._at_close = OnClose(self, lambda handler: handler.stop(), lambda _: True)
        self._overlaps = Overlaps()
        self._bounces = []
        self._fork_watch = ForkWatch(self)
        self._started = False
        self._may_move = driver == "auto" and self.driver == "native"
        self._worker_count = workers
        self._options = EngineOptions(
            owner_pid=owner,
            on_error=OnError[on_error.upper()],
            layout_events=int(uffd.features & LAYOUT_EVENTS),
            watch_owner=owner not in (0, self._pid),
            stall_limit_ns=stall_limit_ns(stall_timeout_s),
            prefetch=prefetch,
            spin_ns=int(spin_us * 1000),
            retry_limit_ns=int(RETRY_LIMIT_S * 1e9),
            say_fd=stderr_fd(),
            fault_log=check_int("fault_log", fault_log, 0, LARGEST_LOG + 1),
        )
        self._ending_name = f"uffd-stop-{uffd.fileno()}"
        engine = None
        unstopped.add(self)
        try:
            # Garbage is finalized in any order: a userfaultfd closed first stays open for this.
            uffd._hold_open(id(self))
            uffd._claim_events(self)
            engine = self._make_engine()
            tell_registered(engine, uffd, 0)
            uffd._on_close(self._at_close)
            engine.own()
            self._engine = engine  # last: until here no other code stops it
        except BaseException as error:
            uffd._forget_on_close(self._at_close)
            if engine is not None:
                engine.destroy()
            uffd._release_events(self)
            uffd._let_close(id(self))
            if isinstance(error, MemoryError):
                raise_shortage("make a handler", error)
            raise

    # Running

    def start(self) -> None:
        """Start resolving faults. `with` calls this; on a running handler it does nothing.

        Regions may be served before and after. If all pages must be of one instant, make the
        handler with `autostart=False` and call this after `writeprotect`: a thread that writes to a
        protected page waits until the handler starts.

        Raises:
            ClosedError: stopped already.
            UffdOSError: EAGAIN - the process cannot create another thread.

        GIL: released.  Threads: safe.  Blocks: until a `serve` or `start` of another thread is
            over; with the process driver also until its worker process has answered.
        """
        self._running_engine()  # before the lock, which a thread of the parent may have held
        with self._turn():
            engine = self._running_engine()
            if self._started:
                return
            try:
                engine.start(self._cpus)
            except MemoryError as error:
                raise_shortage("start a handler", error)
            self._started = True
            self._at_close.keeps = self
            for uffd in self._spaces:
                uffd._note_answered()
            if self._served:
                self._may_move = False

    # Looking

    @property
    def spaces(self) -> int:
        """The number of address spaces served: one for each userfaultfd and each living fork.

        Raises:
            ClosedError: the handler has stopped.
        """
        return self._running_engine().spaces

    def space_of(self, uffd: Userfaultfd) -> int:
        """Return the number that `LoggedFault.space` has for faults of this userfaultfd's memory.

        Raises:
            ValueError: nothing is served with it.

        GIL: held; makes no system call.  Threads: safe.  Blocks: no.
        """
        self._running_engine()
        space = self._spaces.get(uffd)
        if space is None:
            raise ValueError(f"this handler serves nothing with {uffd!r}")
        return space

    def _may_log(self, space: int, region: RangeLike) -> bool:
        """Return whether faults of a region may be in the fault log.

        A stopped handler has what it logged until then, and memory that was moved is served at
        another place than it began at.
        """
        if self._engine is None or any(one.features & MOVES for one in list(self._spaces)):
            return True
        return any(
            one.id.space == space and one.has_some_of(region.start, region.length)
            for one in list(self._served.values())
        )

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

        Kernel: /proc/PID/pagemap.  GIL: released.  Threads: safe.  Blocks: usually for some
        microseconds.
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

    def _fault_count(self) -> int:
        """Return how many missing and minor faults were resolved.

        `stats` waits for the threads that are at work; this does not, so that the latest faults may
        not be counted yet.
        """
        return 0 if self._engine is None else self._running_engine().fault_count()

    def recent_faults(self) -> list[RecentFault]:
        """Return the faults resolved last, newest first, up to 256 for each CPU.

        GIL: released.  Threads: safe.  Blocks: no; with the process driver until its worker process
            has answered.
        """
        if self._engine is None:
            return self._final_faults
        return self._running_engine().recent()

    def take_faults(self) -> FaultLog:
        """Take the demand faults logged since the last call, oldest first.

        A handler made with `fault_log=` logs every missing and minor fault that it resolves, in the
        order in which it resolved them: what a program needs after a restore, and in which order.
        Pages filled without a fault, by `prefetch` or `populate`, are not in it, and where several
        threads wait for one page, one fault is. Writes to protected pages are not logged. When the
        log is full, the newest faults are lost, and counted (`FaultLog.lost`); the oldest are kept
        until they are taken. After stop() this returns what was left.

        Raises:
            ValueError: the handler was made without `fault_log`.

        GIL: released.  Threads: safe; each fault is returned once.  Blocks: as `stats`.

        Example:
            >>> import pyuffd
            >>> with pyuffd.lazy(bytes(4 * 4096), fault_log=100) as memory:
            ...     _ = memory.read(8192, 1), memory.read(0, 1)
            ...     memory.handler.take_faults().offsets(memory).tolist()
            [8192, 0]
        """
        if not self._options["fault_log"]:
            raise ValueError("this handler was made without fault_log=, and logs no faults")
        if self._engine is None:
            left, self._final_log = self._final_log, FaultLog(b"", 0)
            return left
        return self._running_engine().take_faults()

    # Context

    def close(self) -> None:
        """Stop, as stop() does.

        GIL: released.  Threads: safe.  Blocks: as `stop`.
        """
        self.stop()

    def __enter__(self) -> Self:
        self._running_engine()
        if self._autostart:
            try:
                self.start()
            except BaseException:  # __exit__ is not called
                self._stop(True, check_timeout(None))
                raise
        return self

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop in another thread, so that an `AsyncSource` of this loop can still answer."""
        await self._leave(partial(self.__exit__, exc_type, exc, traceback))

    async def _leave(self, leave: Callable[[], None]) -> None:
        """Call a function that stops the handler in another thread; for `async with`.

        A cancellation cuts the end short, a second one does not wait for it; the thread goes on.
        """
        if self._pid == os.getpid():
            self._make_ending(True, check_timeout(None))  # a cancellation finds it from now on
        await leave_in_thread(self._ending_name, leave, self._cut_short, self._failed)

    def _cut_short(self) -> None:
        if self._ending is not None:
            self._ending.cut_short()

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None and self._pid == os.getpid():
            warnings.warn(f"unstopped {self!r}", ResourceWarning, source=self, stacklevel=2)
            close_dropped(self._stop_dropped)

    def _stop_dropped(self) -> None:
        try:
            self._stop(True, check_timeout(None))
        except HandlerError as error:
            log.error("pyuffd: %r: %s", self, error)

    def __repr__(self) -> str:
        if self._engine is None:
            state = "stopped"
        else:
            state = "running" if self._started else "not started"
            state += f", {counted(len(self._served), 'range')}"
        return f"<Handler {self.driver} on {self.uffd!r}, {state}>"
