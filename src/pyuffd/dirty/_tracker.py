"""`DirtyTracker`: rounds of what is written, of this process and of others."""

from __future__ import annotations

import errno
import os
import time
import warnings
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal, Protocol, TypeVar

from pyuffd import _dirty_calls as calls
from pyuffd._abi import Feature
from pyuffd._arguments import check_bools, shown
from pyuffd._closing import CloseSteps, Closing
from pyuffd._dropped import close_dropped
from pyuffd._errors import ClosedError, UffdError, UnsupportedFeatureError, raise_errno
from pyuffd._fork_lock import ForkLock
from pyuffd._latch import RLock, is_held_here
from pyuffd._pages import RangeLike
from pyuffd._uffd import Userfaultfd
from pyuffd.dirty import _async, _rows
from pyuffd.dirty._blind import Blind, BlindReason
from pyuffd.dirty._drops import DropWatch
from pyuffd.dirty._round import DirtyRound, Pending, make
from pyuffd.pagemap import PageRanges
from pyuffd.remote import _pinned
from pyuffd.remote._mappings import Mappings
from pyuffd.remote._process import Process

MethodName = Literal["auto", "wp-async", "wp-sync"]
_METHODS = ("auto", "wp-async", "wp-sync")

# Longer than a thread runs between the beginning of a direct read and its sleep.
_BEGINS_S = 0.002
# PM_SCAN and WP_ASYNC came together, so one of them tells.
_NO_ASYNC = "this kernel has no Feature.WP_ASYNC (Linux 6.7), which PAGEMAP_SCAN needs"


_Claims = weakref.WeakKeyDictionary["DirtyTracker", Sequence[_rows.Span]]
# What the trackers of a userfaultfd track with it, until they are closed.
_claims: weakref.WeakKeyDictionary[Userfaultfd, _Claims] = weakref.WeakKeyDictionary()
_claiming = ForkLock()


class _Method(Protocol):
    def arm(self) -> None: ...

    def collect(self, mappings: Mappings | None = None) -> Pending: ...

    def peek(self) -> Pending: ...

    def mapped(self) -> memoryview: ...

    def blind(self) -> list[Blind]: ...

    def close(self) -> None: ...


class _Closable(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T", bound=_Closable)


class DirtyTracker(Closing):
    """Track which pages are written, in rounds, from the moment that this object is made.

    However its `with` block ends, and if this process is killed too, nothing stays registered in
    the target. One case is left: if a signal handler raises just as the block ends, tracking goes
    on, and costs the target its faults, until the last reference to this object is gone.

    Args:
        target: What to track. A `Region`, another range of this process, or several of them. A
            `Userfaultfd` of this process or another, with `ranges`. A `Process`: all of its
            mappings, those to come included, by a userfaultfd that is opened in it (see
            `Process.attach`).
        ranges: Ranges of the target's memory; with a `Process` None means everything.
        method: "wp-async" lets the kernel note writes (WP_ASYNC, PAGEMAP_SCAN): a write costs one
            page fault of a microsecond, and no thread waits. "wp-sync" lets the engine note them,
            by faults that the writer waits for: for kernels before Linux 6.7, and for memory
            without a disk's file behind it. "auto" takes the first that the kernel has.
        watch_drops: Report too what madvise(2) drops of shared memory and of hugetlb memory, which
            the page table does not show: MADV_REMOVE, and MADV_DONTNEED of huge pages. Each such
            call then waits until a process that this one starts has read of it (15 us more,
            measured on Linux 6.18); so do MADV_DONTNEED and MADV_FREE of such memory, which change
            nothing. A call that is under way is in `unsure` of each round until it is over; next to
            a thread that never leaves its CPU, for as long as that one computes. Copying a dropped
            page of private hugetlb memory makes the target allocate it again. Other memory is
            registered without events, and its drops wait for nobody. "wp-sync" sees these drops
            anyway.

    Attributes:
        method: "wp-async" or "wp-sync".
        reason: Why that one was chosen, in one sentence.

    Raises:
        ValueError: a target without ranges that needs them, a bad range, a region of this process
            as memory of another one, wp-sync with a
            userfaultfd of USER_MODE_ONLY (system calls of the target would fail, or kill it), or
            watch_drops with a userfaultfd of others.
        TypeError: a target that is none of these; of a process id, make a `Process`.
        RangeBusyError: EBUSY - another tracker of the same `Userfaultfd` has a part of the ranges.
        UnsupportedFeatureError: the method that was asked for, or EVENT_REMOVE, is not on this
            kernel.

    Kernel: UFFDIO_WRITEPROTECT(2const), PAGEMAP_SCAN (Linux 6.7).
    GIL: released while scanning.  Threads: safe.  Blocks: no.

    Example:
        >>> from pyuffd import DirtyTracker, Region
        >>> with Region.anonymous(8192) as region, DirtyTracker(region) as tracker:
        ...     region.write(4096, b"new")
        ...     with tracker.collect() as round_:
        ...         offsets = [item.start - region.start for item in round_.written]
        ...         round_.commit()
        >>> offsets
        [4096]
    """

    method: str
    reason: str

    _what = "dirty tracker"
    _instead = "tracking is one registration of the memory"

    def __init__(
        self,
        target: RangeLike | Iterable[RangeLike] | Userfaultfd | Process,
        ranges: Iterable[RangeLike] | None = None,
        *,
        method: MethodName = "auto",
        watch_drops: bool = False,
    ) -> None:
        check_bools(watch_drops=watch_drops)
        if method not in _METHODS:
            raise ValueError(f"method {shown(method)} is not one of {', '.join(_METHODS)}")
        self._lock = RLock()
        self._pending = Pending()
        self._rate = 0.0
        self._last: DirtyRound | None = None
        self._maker = os.getpid()
        # The snapshot since which everything is reported; a commit of anybody else ends that.
        self._snapshot: str | None = None
        self._pinned: memoryview = calls.NO_RANGES
        self._is_open = False
        self._steps = CloseSteps()
        with self._steps:
            process, uffd, scope = self._parts(target, ranges, method)
            self._process = process
            self._uffd = uffd
            self._scope = scope
            watch = self._watch(target) if watch_drops else None
            is_borrowed = isinstance(target, Userfaultfd)
            self._method = self._made(process, uffd, scope, watch, is_borrowed=is_borrowed)
            self._steps.add(self._method.close)
            self._method.arm()
            self._pinned = self._pins_at_first()
            self._since = time.monotonic()
            self._is_open = True

    def _parts(
        self,
        target: object,
        ranges: Iterable[RangeLike] | None,
        method: MethodName,
    ) -> tuple[Process, Userfaultfd, Sequence[_rows.Span] | None]:
        """Return process, userfaultfd and scope; what is made here is closed by `_steps`."""
        if isinstance(target, Process):
            self.method, self.reason = _chosen(method, _async.supported())
            features = _wanted(self.method) & _offered(self.method)
            scope = None
            if ranges is not None:
                ranges = tuple(ranges)
                scope = _rows.spans_of(ranges, "track")
                _rows.refuse_own_memory(target, ranges)
            return target, self._owned(target.attach(features)), scope
        if isinstance(target, Userfaultfd):
            if ranges is None:
                raise ValueError(f"{target!r} needs ranges=: which memory is to be tracked?")
            if target.owner_pid is None:
                raise ValueError(
                    f"{target!r} does not say whose memory it governs: set owner_pid first"
                )
            self.method, self.reason = _chosen(method, target.features, of_uffd=True)
            scope = _rows.spans_of(ranges, "track")
            self._steps.add(partial(self._leave, target))
            self._claim(target, scope)
            return self._owned(Process(target.owner_pid)), target, scope
        if ranges is not None:
            raise ValueError("ranges= goes with a Userfaultfd or a Process")
        scope = _rows.spans_of_target(target, "track")
        self.method, self.reason = _chosen(method, _async.supported())
        process = self._owned(Process(os.getpid()))
        return process, self._owned(_own_uffd(self.method)), scope

    def _owned(self, made: _T) -> _T:
        self._steps.add(made.close)
        return made

    def _claim(self, uffd: Userfaultfd, scope: Sequence[_rows.Span]) -> None:
        """Note what is tracked with a userfaultfd; of two trackers each would miss writes."""
        with _claiming.now:
            claims = _claims.setdefault(uffd, weakref.WeakKeyDictionary())
            mine = _rows.packed(scope)
            others = (calls.intersect(_rows.packed(spans), mine) for spans in claims.values())
            if (common := next(filter(len, others), None)) is not None:
                start, end = common[:2]
                raise_errno(
                    "track",
                    errno.EBUSY,
                    start,
                    end - start,
                    hint="another tracker has it, with the same userfaultfd; of a page that"
                    " both protect, only the first to ask would learn that it was written",
                )
            claims[self] = scope

    def _leave(self, uffd: Userfaultfd) -> None:
        with _claiming.now:
            claims = _claims.get(uffd)
            if claims is not None:
                claims.pop(self, None)

    def _watch(self, target: object) -> DropWatch | None:
        """Return a watch. It has a userfaultfd of its own, so that only drops that need it wait."""
        if self.method != "wp-async":
            return None  # the engine reads these events anyway
        if isinstance(target, Userfaultfd):
            raise ValueError("watch_drops needs a userfaultfd of its own: give the process")
        features = _wanted(self.method) & _offered(self.method) | Feature.EVENT_REMOVE
        if isinstance(target, Process):
            uffd = target.attach(features)
        else:
            uffd = Userfaultfd(features=features, user_mode_only=True)
        return self._owned(DropWatch(self._process, self._owned(uffd)))

    def _made(
        self,
        process: Process,
        uffd: Userfaultfd,
        scope: Sequence[_rows.Span] | None,
        watch: DropWatch | None,
        *,
        is_borrowed: bool,
    ) -> _Method:
        if self.method == "wp-async":
            return _async.AsyncMethod(process, uffd, scope, watch, is_borrowed=is_borrowed)
        from pyuffd.dirty import _sync  # brings the engine

        return _sync.SyncMethod(process, uffd, scope)

    # Rounds

    def collect(self) -> DirtyRound:
        """Return what changed since the last committed round, and begin the next one.

        Reading and protecting a page again are one step: a write is in this round or in the next
        one. The next round has again what was not committed.

        Raises:
            ProcessGoneError: ESRCH - the target has exited, or replaced its memory.
            ClosedError: closed.

        GIL: released while scanning.  Threads: safe; one at a time.  Blocks: no.
        """
        return self._collect()

    def _collect(self, *, is_stopped: bool = False, mappings: Mappings | None = None) -> DirtyRound:
        """End a round; while the target is stopped, what its threads do need not be examined.

        Args:
            is_stopped: The target is stopped.
            mappings: Its mappings, if they were read since it has stopped.
        """
        with self._turn("collect()"):
            self._check_open()
            now = time.monotonic()
            found = self._method.collect(mappings)
            new = self._with_unsure(found, self._pinned) if is_stopped else self._with_pins(found)
            seconds, self._since = now - self._since, now
            written = PageRanges(new.written).bytes
            self._rate = written / seconds if seconds > 0 else 0.0
            pending = self._pending
            if new.layout and (len(pending.written) or len(pending.dropped)):
                pending = pending.within(self._method.mapped())
            self._pending = pending.plus(new)
            self._last = make(self._pending, seconds, self._commit)
            return self._last

    def peek(self) -> DirtyRound:
        """Return what `collect` would, without protecting anything or ending the round.

        Raises:
            ProcessGoneError: ESRCH - the target has exited, or replaced its memory.
            ClosedError: closed.

        GIL: released while scanning.  Threads: safe; one at a time.  Blocks: no.
        """
        with self._turn("peek()"):
            self._check_open()
            seconds = time.monotonic() - self._since
            pending = self._pending.plus(self._with_pins(self._method.peek(), peek=True))
            return make(pending, seconds, None)

    def _commit(self, round_: DirtyRound) -> None:
        with self._turn("commit()"):
            if round_ is not self._last:
                raise ValueError("a later round has been collected: commit that one")
            self._pending = Pending()
            self._snapshot = None

    def _put_back(self, pending: Pending) -> None:
        """Report this again: what came of committed rounds was lost."""
        with self._lock:
            self._pending = pending.plus(self._pending)

    def _with_pins(self, found: Pending, *, peek: bool = False) -> Pending:
        """Add the pinned buffers, of before the scan and of after it."""
        pins, is_doubtful = self._pins()
        both = calls.union(pins, self._pinned)
        if not peek:
            # A direct read makes its buffer written as it begins, and writes to it as it ends.
            self._pinned = calls.union(pins, found.written) if is_doubtful else pins
        return self._with_unsure(found, both)

    def _with_unsure(self, found: Pending, pages: memoryview) -> Pending:
        if not len(pages):
            return found
        return found.plus(Pending(unsure=calls.intersect(pages, self._method.mapped())))

    def _pins_at_first(self) -> memoryview:
        """Return what was pinned before everything was protected, and still is."""
        pins, is_doubtful = self._pins()
        if not is_doubtful:
            return pins
        # A thread that runs may be about to sleep in a read that has begun.
        time.sleep(_BEGINS_S)
        return calls.union(pins, self._pins()[0])

    def _pins(self) -> tuple[memoryview, bool]:
        pinned = _pinned.look(self._process.memory_tid)
        return _rows.packed(_rows.merged(pin.pages for pin in pinned.pins)), pinned.is_doubtful

    @property
    def rate(self) -> float:
        """Bytes written a second between the last two rounds; a page counts once a round."""
        return self._rate

    @property
    def blind(self) -> tuple[Blind, ...]:
        """What cannot be seen, in ascending order, with the reason of each range.

        A change that is neither in a round nor in here is a bug.
        """
        found = list(self._gaps())
        for pin in _pinned.look(self._process.memory_tid).pins:
            found.append(Blind(pin.start, pin.end, BlindReason.PINNED, pin.detail))
        return tuple(sorted(found, key=lambda blind: (blind.start, blind.end, blind.reason.value)))

    def _gaps(self) -> list[Blind]:
        """Return what the method cannot see; the same list while that is the same."""
        with self._turn("blind"):
            self._check_open()
            return self._method.blind()

    # Ending

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._is_open

    def close(self) -> None:
        """Lift the protection and unregister; the target continues at full speed.

        If a signal handler raises meanwhile, the next call continues.

        GIL: released.  Threads: safe.  Blocks: until a `collect` of another thread is over, and
            with "wp-sync" until its handler has stopped.
        """
        with self._turn("close()"):
            self._is_open = False
        if self._maker == os.getpid():
            self._steps.close()

    def _turn(self, what: str) -> RLock:
        """Return the lock, for a `with` statement; refuse a call inside another one."""
        if is_held_here(self._lock):
            raise UffdError(
                f"{what} was called inside another call of {self!r}, by a signal handler: call it"
                " when that one has returned"
            )
        return self._lock

    def _check_usable(self) -> None:
        self._check_open()

    def _check_open(self) -> None:
        if not self._is_open:
            raise ClosedError("this tracker is closed")
        if self._maker != os.getpid():
            raise ClosedError(f"this tracker belongs to process {self._maker}, not to its fork")

    def __del__(self) -> None:
        if not getattr(self, "_steps", None) or self._maker != os.getpid():
            return
        if self._is_open:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        close_dropped(self.close)

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.method
        return f"<DirtyTracker of process {self._process.pid}: {state}>"


def _chosen(
    method: MethodName, features: Feature, *, of_uffd: bool = False
) -> tuple[Literal["wp-async", "wp-sync"], str]:
    """Return the method to use, and why."""
    has_async = bool(features & _async.NEEDED)
    lack = "the userfaultfd was opened without Feature.WP_ASYNC" if of_uffd else _NO_ASYNC
    if method == "wp-async" and not has_async:
        raise UnsupportedFeatureError(
            22,
            "tracking by wp-async",
            hint=lack,
            requested=int(_async.NEEDED),
            supported=int(features),
            missing=int(_async.NEEDED),
        )
    if method == "wp-sync" and of_uffd and has_async:
        raise ValueError("the userfaultfd was opened with Feature.WP_ASYNC: nothing waits for it")
    if method == "auto":
        if has_async:
            return "wp-async", "the kernel notes writes by itself (WP_ASYNC)"
        return "wp-sync", lack
    return method, "it was asked for"


def _wanted(method: str) -> Feature:
    if method == "wp-async":
        return _async.WANTED
    from pyuffd.dirty import _sync

    return _sync.WANTED


def _offered(method: str) -> Feature:
    offered = _async.offered()
    needed = _async.NEEDED if method == "wp-async" else Feature.PAGEFAULT_FLAG_WP
    if not offered & needed:
        raise UffdError(f"this kernel cannot write-protect memory: {needed!r} is missing")
    return offered


def _own_uffd(method: str) -> Userfaultfd:
    """Open a userfaultfd of this process; wp-async needs no privilege."""
    features = _wanted(method) & _offered(method)
    return Userfaultfd(features=features, user_mode_only=method == "wp-async")
