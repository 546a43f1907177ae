"""Workers: threads that call page sources in Python for the C engine (layer L4).

A worker without a request runs the engine's loop (in C, without the GIL), so that a request reaches
Python without being handed from thread to thread.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Unpack

from pyuffd._describe import described, log_debug
from pyuffd._errors import ClosedError, UffdOSError
from pyuffd._latch import RLock
from pyuffd._limits import start_thread
from pyuffd._overlay import OverlaySource
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._failures import SAID_MOST, source_text, tell
from pyuffd.handlers._own_memory import (
    Page,
    SourceThreads,
    first_missing,
    stays_missing,
    waits_error,
    without_pages_in_c,
)
from pyuffd.handlers._stall import stall_signal
from pyuffd.handlers._types import (
    PATIENCE_S,
    Ended,
    EngineOptions,
    RangeId,
    RangeSpec,
    Request,
    SourceFailure,
    SourceKind,
    Taken,
)
from pyuffd.sources import AsyncSource, end_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

    from pyuffd.handlers._packed import Packed
    from pyuffd.handlers._served_parts import Part
    from pyuffd.handlers._serving import Served
    from pyuffd.sources import PageSource, Promised

log = logging.getLogger(__name__)

RAISED_KEPT = 256  # failures, kept for later accesses to their pages

# How long a worker needs to leave, unless its source does not return. Such a worker's page was
# given up before.
LEAVE_S = 0.2
JOIN_SLICE_S = 0.05


class WorkedEngine(Engine):
    """An engine with a pool of threads that answer its requests from Python sources."""

    calls_python = True

    def __init__(
        self,
        fd: int,
        *,
        workers: int,
        keeper_fd: int = -1,
        shared: int = 0,
        failed: Callable[[SourceFailure], None] | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(
            fd,
            workers=workers,
            stall_signal=stall_signal(),
            keeper_fd=keeper_fd,
            shared=shared,
            **options,
        )
        self._failed = failed
        self._source_threads = SourceThreads(workers)
        self._failure: SourceFailure | None = None
        self._options = options
        self._not_populated: dict[int, BaseException] = {}  # by address, until populate raises it
        self._sources: dict[int, PageSource] = {}
        self._adding = RLock()
        self._labels: dict[int, str] = {}
        self._places: dict[int, tuple[RangeId, int]] = {}  # with the size of a page
        self._raised: deque[SourceFailure] = deque(maxlen=RAISED_KEPT)
        self._told: set[int] = set()  # ranges of which a failure has been reported
        self._hung_before = 0
        self._hurried_until = math.inf
        self._names = [f"uffd-w{fd}-{index}" for index in range(workers)]
        self._threads: list[threading.Thread] = []

    def add(self, given: RangeSpec, *, states_fd: int = -1, taken: Taken | None = None) -> RangeId:
        """Put a range in; faults of memory that is registered already may come at once."""
        with self._adding:
            return super().add(given, states_fd=states_fd, taken=taken)

    def _added(self, served: RangeId, given: RangeSpec) -> None:
        if given.content.kind is SourceKind.REQUEST:
            self._sources[served.number] = given.content.owner  # type: ignore[assignment]
            self._labels[served.number] = given.label
            self._places[served.number] = served, given.page_size

    def unserve(
        self,
        served: RangeId,
        *,
        seal: bool,
        unregister: bool = True,
        patience_s: float = PATIENCE_S,
        gently: bool = False,
        part: Part | None = None,
    ) -> bool:
        """Take a range, or a part of it, out; poison the pages that wait for its source first."""
        if part is None:
            self.abandon(served)
        else:
            self.abandon_part(served, *part)
        done = super().unserve(
            served,
            seal=seal,
            unregister=unregister,
            patience_s=patience_s,
            gently=gently,
            part=part,
        )
        if done and part is None:
            self._sources.pop(served.number, None)
            self._labels.pop(served.number, None)
            self._places.pop(served.number, None)
        return done

    def start(self, cpus: list[int]) -> None:
        """Start the driver and the threads."""
        super().start(cpus)
        try:
            for name in self._names:
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                start_thread(thread)
        except BaseException:
            self.stop()
            for thread in self._threads:
                # Not started, or a signal arrived before the thread was known to run.
                with suppress(RuntimeError):
                    thread.join(PATIENCE_S)
            raise

    def end(self, patience_s: float) -> Ended:
        """End as every engine does, then wait for the workers."""
        began, hung = time.monotonic(), self._hung_before
        ended = super().end(patience_s)
        while running := [thread for thread in self._threads if thread.is_alive()]:
            # Do not wait again for workers that were given up before.
            limit_s = max(patience_s, LEAVE_S) if len(running) > hung else LEAVE_S
            if time.monotonic() > min(began + limit_s, self._hurried_until):
                break
            running[0].join(JOIN_SLICE_S)
        return ended._replace(held=self.held())

    def refuse(self) -> None:
        """Poison pages that fault from now on."""
        self._hung_before = self.hung
        super().refuse()

    def hurry(self, patience_s: float) -> None:
        """Let drain and end, in other threads, wait no longer than this."""
        self._hurried_until = time.monotonic() + max(patience_s, LEAVE_S)
        super().hurry(patience_s)

    @property
    def source_failure(self) -> SourceFailure | None:
        """The first exception of a source."""
        return self._failure

    def failure_at(self, address: int) -> SourceFailure | None:
        """Return what a source raised for this page, or the first failure."""
        for raised in self._raised.copy():  # workers add to it
            if raised.start <= address < raised.start + raised.length:
                return raised
        return super().failure_at(address)

    def works_here(self) -> bool:
        """Whether this is one of its threads: a page source is the caller."""
        return threading.current_thread() in self._threads

    def _work(self) -> None:
        with suppress(ClosedError):  # the engine was stopped before this thread began
            self.answer_requests(self._read, self._failed_at)

    def _read(self, number: int, offset: int, length: int) -> Buffer | Promised:
        pid = os.getpid()
        self._source_threads.begin(number, offset, length)
        try:
            return self._source(number).read(offset, length)
        finally:
            if os.getpid() != pid:
                end_fork()
            self._source_threads.end()

    def _source(self, number: int) -> PageSource:
        source = self._sources.get(number)
        if source is None:
            with self._adding:  # until it is noted below
                source = self._sources[number]
        return source

    def check_access(self, served: Served, start: int, length: int) -> None:
        """Raise HandlerError if this thread would wait for a page that only itself can fetch."""
        of_loop = isinstance(served.source, AsyncSource) and served.source.runs_here()
        if served.kind is not SourceKind.REQUEST or not (of_loop or self._source_threads.is_one):
            return
        size, number = served.page_size, served.id.number
        # The access may be of a whole region, of which a part is served.
        begin = max(start - served.id.start, 0)
        end = min(start + length - served.id.start, served.id.length)
        if begin >= end:
            return
        first = begin // size
        pages = -(-end // size) - first

        def look(at: int, count: int) -> bytes:
            found = self.states(served.id, at, count)
            if isinstance(served.source, OverlaySource):
                found = without_pages_in_c(found, served.source, at, size)
            return found

        missing = first_missing(look(first, pages))
        if missing is None:
            return
        at = first + missing
        if (
            stays_missing(lambda: look(at, 1))
            if of_loop
            else self._source_threads.waits_for_itself(Page(number, at * size), self._is_missing)
        ):
            label = self._labels.get(number, "a range")
            raise waits_error(label, served.id.start + at * size, size, of_loop=of_loop)

    def _is_missing(self, page: Page) -> bool:
        served, size = self._places[page.number]
        return first_missing(self.states(served, page.offset // size, 1)) is not None

    def populate(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages; an exception of the source is the cause of the error."""
        with self._explained(served, offset, length):
            return super().populate(served, offset, length, chunk)

    def populate_ranges(
        self, served: RangeId, offset: int, length: int, ranges: Packed, chunk: int = 0
    ) -> int:
        """Fill absent pages of ranges; errors are explained as by `populate`."""
        with self._explained(served, offset, length):
            return super().populate_ranges(served, offset, length, ranges, chunk)

    def load(self, served: RangeId, offset: int, length: int, chunk: int = 0) -> int:
        """Fill absent pages that have content; errors are explained as by `populate`."""
        with self._explained(served, offset, length):
            return super().load(served, offset, length, chunk)

    @contextmanager
    def _explained(self, served: RangeId, offset: int, length: int) -> Iterator[None]:
        try:
            yield
        except UffdOSError as error:
            first = served.start + offset
            failed = {at for at in self._not_populated.copy() if 0 <= at - first < length}
            causes = {at: self._not_populated.pop(at, None) for at in failed}
            raise error from causes.get(error.start or 0)

    def _why_not_populated(self, served: RangeId, address: int, code: int) -> str:
        error = self._not_populated.get(address)
        if error is not None:
            return f"the source raised {described(error)}"
        if code == errno.ETIMEDOUT:
            return "the source did not answer within stall_timeout_s"
        return super()._why_not_populated(served, address, code)

    def _failed_at(self, request: Request, error: BaseException) -> int:
        if request.abandoned:
            log_debug(log, "the source failed after its page was given up", error)
            return errno.ETIMEDOUT
        if request.is_fault:
            self._tell(request, error)
            self._raised.appendleft(SourceFailure(error, request.address, request.length))
        else:  # populate raises it
            log_debug(log, "the source failed", error)
            self._not_populated[request.address] = error
        if self._failure is None:
            self._failure = SourceFailure(error, request.address, request.length)
            if self._failed is not None:
                self._failed(self._failure)
        return error.errno if isinstance(error, OSError) and error.errno else errno.EIO

    def _tell(self, request: Request, error: BaseException) -> None:
        """Report a failure before the first page of a range is lost; later ones are counted."""
        if request.number in self._told or len(self._told) >= SAID_MOST:
            log_debug(log, "the source failed", error)
            return
        self._told.add(request.number)
        options = self._options
        label = self._labels.get(request.number, "a range")
        text = source_text(request, label, error, options["on_error"])
        tell(log, options["say_fd"], text, error)
