"""The bounce algorithm of uffd-stress, with write-protection actually enabled."""

from __future__ import annotations

import contextlib
import random
import select
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from pyuffd._abi import CopyMode, Feature, PagefaultFlag, RegisterMode, WriteprotectMode
from pyuffd._errors import PageExistsError
from pyuffd._events import Pagefault
from pyuffd._memory import fallocate, read, write
from pyuffd._uffd import Userfaultfd
from pyuffd.conformance._context import Context, Mismatch
from pyuffd.conformance._types import missing_features, wp_features
from pyuffd.conformance.cases.kselftest_unit import PUNCH_HOLE, UNPROTECT, release
from pyuffd.regions import Region
from pyuffd.testing._run import SCALE

RANDOM, RACING, VERIFY, POLL = 1, 2, 4, 8
MODES = 16
WORKERS = 2  # of each kind; uffd-stress has one per CPU
RETRY_EVERY = 8  # one COPY in this many is repeated, and must then fail with EEXIST
JOIN_S = 5 * SCALE
# Each page begins with a counter and ends with its number: a page that is half copied lacks one.
_WORD = struct.Struct("=Q")


@dataclass
class Totals:
    """Counts over all bounces."""

    missing: int = 0
    wp: int = 0
    exists: int = 0
    retries: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **counts: int) -> None:
        """Add counts; from any thread."""
        with self.lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


class Bouncer:
    """Two areas whose content is moved back and forth by threads.

    Args:
        ctx: Makes the areas.
        pages: Pages in each area.
    """

    def __init__(self, ctx: Context, pages: int) -> None:
        self._ctx = ctx
        self._pages = pages
        self._page = ctx.page
        self._src, self._dst = ctx.make(pages), ctx.make(pages)
        self._counts = [1] * pages
        self._locks = [threading.Lock() for _ in range(pages)]
        # One page for each server; touching it at the end makes a blocking read return.
        self._bells = ctx.make(WORKERS)
        self.totals = Totals()
        for index in range(pages):
            self._src.write(index * self._page, _WORD.pack(1))
            self._src.write(index * self._page + self._page - 8, _WORD.pack(index))

    def bounce(self, mode: int) -> None:
        """Make one bounce; `mode` is a mask of RANDOM, RACING, VERIFY and POLL."""
        features = wp_features(self._ctx.memory) | missing_features(self._ctx.memory)
        if self._ctx.memory.is_anon:
            features |= Feature.WP_UNPOPULATED & self._ctx.offered
        with Userfaultfd(features=features, nonblocking=bool(mode & POLL)) as uffd:
            _Bounce(self, uffd, mode).run()
        if mode & VERIFY:
            for index in range(self._pages):
                self.check(self._dst.start, index)
        self._src, self._dst = self._dst, self._src

    def check(self, start: int, index: int) -> None:
        """Fail unless a page holds its counter and its number."""
        at = start + index * self._page
        seen = (
            _WORD.unpack(read(at, 8))[0],
            _WORD.unpack(read(at + self._page - 8, 8))[0],
        )
        wanted = (self._counts[index], index)
        if seen != wanted:
            raise Mismatch(f"page {index}: saw counter and number {seen}, expected {wanted}")


class _Bounce:
    def __init__(self, owner: Bouncer, uffd: Userfaultfd, mode: int) -> None:
        self._owner = owner
        self._uffd = uffd
        self._mode = mode
        self._page = owner._page
        self._src, self._dst = owner._src, owner._dst
        self._totals = owner.totals
        self._finished = threading.Event()
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        # The lockers wait for their first page before anything is copied ahead of them.
        self._first = threading.Barrier(WORKERS + 1)

    def run(self) -> None:
        self._uffd.register(self._dst, mode=RegisterMode.MISSING | RegisterMode.WP)
        self._uffd.register(self._owner._bells)
        self._alias = self._dst.alias() if self._owner._ctx.memory.shared else None
        if self._alias is not None:
            self._uffd.register(self._alias, mode=RegisterMode.MISSING | RegisterMode.WP)
        for region in (self._dst, self._owner._bells):
            _empty(region)
        try:
            self._bounce()
        finally:
            # If the bounce failed, this lets every thread continue before its memory is unmapped.
            self._finished.set()
            for registered in (self._dst, self._alias, self._owner._bells):
                if registered is not None:
                    self._uffd.unregister(registered)
            for thread in self._threads:
                thread.join(JOIN_S)
            if self._alias is not None:
                self._alias.close()

    def _bounce(self) -> None:
        servers = self._start(self._serve)
        lockers = self._start(self._lock)
        try:
            with contextlib.suppress(threading.BrokenBarrierError):
                self._first.wait(JOIN_S)
            self._join(self._start(self._copy))
            # Every page is present: a later COPY fails with EEXIST and never copies these holes.
            release(self._src)
            self._finished.set()
            self._join(lockers)
        finally:
            self._start(self._ring)
            self._join(servers)
        self._uffd.writeprotect(self._dst, mode=UNPROTECT)

    def _start(self, run: Callable[[int], None]) -> list[threading.Thread]:
        threads = [self._thread(run, worker) for worker in range(WORKERS)]
        self._threads += threads
        return threads

    def _join(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.join(JOIN_S)
        if self._failures:
            raise self._failures[0]
        for thread in threads:
            if thread.is_alive():
                raise Mismatch(f"thread {thread.name} has not ended within {JOIN_S:g} s")

    def _thread(self, run: Callable[[int], None], worker: int) -> threading.Thread:
        def guarded() -> None:
            try:
                run(worker)
            except BaseException as error:
                self._failures.append(error)
                self._first.abort()

        name = f"uffd-stress{run.__name__}-{worker}"
        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _lock(self, worker: int) -> None:
        """Count in page after page, under the page's lock; each access may fault."""
        owner, pages = self._owner, self._owner._pages
        order = random.Random(f"{self._mode} {worker}")
        at = -self._mode if self._mode & RACING else worker * pages // WORKERS
        visits = 0
        while not self._finished.is_set() or visits < pages // 2:
            index = order.randrange(pages) if self._mode & RANDOM else at % pages
            at += 1
            with owner._locks[index]:
                owner.check(self._dst.start, index)
                owner._counts[index] += 1
                write(self._dst.start + index * self._page, _WORD.pack(owner._counts[index]))
            if not visits:
                self._first.wait(JOIN_S)
            visits += 1

    def _copy(self, worker: int) -> None:
        """Copy half of a slice, protect all of it, copy the other half."""
        pages = self._owner._pages
        first, end = worker * pages // WORKERS, (worker + 1) * pages // WORKERS
        middle = (first + end) // 2
        for index in range(first, middle):
            self._copy_page(index)
        self._uffd.writeprotect(self._dst.start + first * self._page, (end - first) * self._page)
        for index in range(middle, end):
            self._copy_page(index)

    def _copy_page(self, index: int) -> None:
        offset = index * self._page
        at, source = self._dst.start + offset, self._src.start + offset
        try:
            self._uffd.copy(at, source, self._page, mode=CopyMode.WP)
        except PageExistsError:
            self._totals.add(exists=1)
            self._uffd.wake(at, self._page)
            return
        if index % RETRY_EVERY == 0:
            again = at if self._alias is None else self._alias.start + offset
            try:
                self._uffd.copy(again, source, self._page, mode=CopyMode.WP)
            except PageExistsError:
                self._totals.add(retries=1)
            else:
                raise Mismatch(f"page {index}: a second COPY succeeded, expected EEXIST")

    def _serve(self, worker: int) -> None:
        """Resolve faults until a fault on a bell page signals the end."""
        bells = self._owner._bells
        while True:
            if self._mode & POLL:
                select.select([self._uffd.fileno()], [], [])
            for event in self._uffd.read_events(1):
                if not isinstance(event, Pagefault):
                    raise Mismatch(f"saw {event!r}, expected a page fault")
                if bells.start <= event.address < bells.start + bells.length:
                    self._uffd.copy(event.address, bytes(self._page))
                    return
                self._resolve(event)

    def _resolve(self, fault: Pagefault) -> None:
        if fault.flags & PagefaultFlag.WP:
            self._totals.add(wp=1)
            self._uffd.writeprotect(fault.address, self._page, mode=WriteprotectMode(0))
        elif fault.flags:
            raise Mismatch(f"saw message {int(fault.flags)}, but the first access is a read")
        else:
            self._totals.add(missing=1)
            self._copy_page((fault.address - self._dst.start) // self._page)

    def _ring(self, worker: int) -> None:
        """Fault on a bell page, so that a server that waits in read(2) ends."""
        read(self._owner._bells.start + worker * self._page, 1)


def _empty(region: Region) -> None:
    """Drop the pages of a region and of the file behind it.

    A late COPY may read its source after the source was released. In a private mapping, that read
    leaves a page of zeros in the file, which would not be missing afterwards.
    """
    release(region)
    if region.fd is not None:
        fallocate(region.fd, PUNCH_HOLE, 0, region.length)


def stress(ctx: Context, pages: int, modes: range) -> None:
    """Bounce once in each mode; missing faults, write-protect faults and EEXIST must all occur."""
    bouncer = Bouncer(ctx, pages)
    for mode in modes:
        bouncer.bounce(mode)
    totals = bouncer.totals
    ctx.note(f"missing {totals.missing}, write-protect {totals.wp}, EEXIST {totals.exists}")
    for name in ("missing", "wp", "retries"):
        ctx.expect(f"some {name}", getattr(totals, name) > 0, True)
