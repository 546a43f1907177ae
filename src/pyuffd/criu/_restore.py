"""One restore: faults are served as soon as CRIU sends a process, and the rest is filled."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from pyuffd import _working_set_files
from pyuffd._abi import Ioctl
from pyuffd._errors import (
    ClosedError,
    CriuError,
    HandlerError,
    HelperLostError,
    ProcessGoneError,
    UffdOSError,
)
from pyuffd._latch import Latch, RLock
from pyuffd._limits import start_thread
from pyuffd._pages import PAGE_SIZE
from pyuffd._recording import Recording, Watched
from pyuffd._uffd import Userfaultfd
from pyuffd._working_set import WorkingSet, parts
from pyuffd.criu._content import Files, slices, source_of
from pyuffd.criu._images import Images, LazySpan, TaskImage
from pyuffd.criu._restore_socket import RestoreSocket
from pyuffd.criu._working_set import GAP, length_of, places_of
from pyuffd.handlers import Handler
from pyuffd.sources import PageSource

log = logging.getLogger(__name__)

# Memory is short, or a process changes its layout without end: then try again, until stop().
_RETRIED = (errno.EAGAIN, errno.ENOMEM)
_RETRY_S = 0.2


@dataclass(frozen=True, eq=False, slots=True)
class ServedSpan:
    """A span as `Handler.serve` gets it: memory of another process, private to it."""

    start: int
    length: int
    page_size: int = PAGE_SIZE
    shared: bool = False


@dataclass(slots=True)
class ServedTask:
    """A restored process whose faults are served."""

    image: TaskImage
    uffd: Userfaultfd
    spans: list[tuple[ServedSpan, LazySpan]] = field(default_factory=list)
    is_gone: bool = False


@dataclass(slots=True)
class RestoreReport:
    """What became of a restore.

    Attributes:
        number: Which one it was, from 1.
        processes: Processes that were restored, without zombies.
        zombies: Zombies.
        content_bytes: What their images have, to be restored lazily.
        loaded_bytes: What was filled in the background, forks included.
        hot_bytes: Those of it that a working set named, and that were filled first.
        faults: Pages that were filled because a process touched them.
        fault_p50_us: The time that half of these did not exceed, from reading the message.
        fault_p99_us: The time that 99 % of them did not exceed.
        forks: Forks that were followed.
        exited: Processes that exited, or called execve(2), before all was filled.
        helper_restarts: How often the worker process was killed and replaced.
        recorded_pages: Pages in the working set that was written.
        arrived_s: Seconds from the connection to the end of CRIU's restore.
        drained_s: Seconds from there until everything was filled.
        error: Why it failed, or None.
    """

    number: int
    processes: int = 0
    zombies: int = 0
    content_bytes: int = 0
    loaded_bytes: int = 0
    hot_bytes: int = 0
    faults: int = 0
    fault_p50_us: float = 0.0
    fault_p99_us: float = 0.0
    forks: int = 0
    exited: int = 0
    helper_restarts: int = 0
    recorded_pages: int = 0
    arrived_s: float = 0.0
    drained_s: float = 0.0
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How restores are served; `LazyPages` describes them."""

    threads: int
    working_set: str | None
    record_s: float
    remote: Callable[[int], PageSource] | None
    ioctls: Ioctl
    chunk: int | None = None


class Restore:
    """One restore, from the connection to the last page.

    Args:
        report: Gets the numbers as they come.
        images: What is restored.
        start: Returns a running handler with the process driver, which serves nothing yet; it is
            called when there is something to serve. The handler is stopped at the end.
        options: See there.
    """

    def __init__(
        self,
        report: RestoreReport,
        images: Images,
        start: Callable[[], Handler],
        options: RestoreOptions,
    ) -> None:
        self.report = report
        self._images = images
        self._start = start
        self._options = options
        self._files = Files()
        self._tasks: dict[int, ServedTask] = {}
        self._zombies: set[int] = set()
        self._lock = RLock()
        self._stopped = Latch()
        self._errors: list[str] = []

    def run(self, sock: RestoreSocket) -> None:
        """Serve it until everything is filled; the report tells what failed."""
        began = time.monotonic()
        try:
            self._receive_all(sock)
            finished = time.monotonic()
            self.report.arrived_s = finished - began
            self._fill()
            self._let_go()
            self.report.drained_s = time.monotonic() - finished
        except (CriuError, ClosedError, HandlerError, UffdOSError, OSError, ValueError) as error:
            self._fail(str(error))
        finally:
            self._end()
            if self._errors:
                self.report.error = "; ".join(self._errors)

    @cached_property
    def _handler(self) -> Handler:
        return self._start()

    def stop(self) -> None:
        """End it now; pages that have not been filled are poisoned."""
        self._stopped.set()

    def _fail(self, text: str) -> None:
        with self._lock:
            if text not in self._errors:
                self._errors.append(text)

    # Processes arrive

    def _receive_all(self, sock: RestoreSocket) -> None:
        while not (arrived := sock.receive()).is_end:
            image = self._images.tasks.get(arrived.pid)
            known = arrived.pid in self._tasks or arrived.pid in self._zombies
            is_zombie = arrived.uffd is None
            if image is None or known or image.is_zombie != is_zombie:
                if arrived.uffd is not None:
                    arrived.uffd.close()
                raise CriuError(
                    "restore",
                    f"process {arrived.pid} came {'twice' if known else 'and is not in the image'}",
                )
            if arrived.uffd is None:
                self._zombies.add(arrived.pid)
                self.report.zombies += 1
                continue
            self._serve(ServedTask(image, arrived.uffd))
        missing = set(self._images.tasks) - set(self._tasks) - self._zombies
        if missing:
            raise CriuError("restore", f"processes {sorted(missing)} did not come")

    def _serve(self, task: ServedTask) -> None:
        """Serve what is lazy of a process, before CRIU registers it."""
        pid = task.image.pid
        self._tasks[pid] = task
        self.report.processes += 1
        self.report.content_bytes += task.image.content_bytes
        remote = self._options.remote
        for span in task.image.spans:
            served = ServedSpan(span.start, span.length)
            self._handler.serve(
                served,
                source_of(span, self._files, None if remote is None else lambda: remote(pid)),
                uffd=task.uffd,
                ioctls=self._options.ioctls,
            )
            task.spans.append((served, span))

    # Filling

    def _fill(self) -> None:
        path = self._options.working_set
        hot = None if path is None else self._load_set(path)
        if hot is not None:
            self._in_threads(self._hot_parts(hot), is_hot=True)
        elif path is not None:
            self._record(path)
        self._in_threads(self._all_parts())

    def _load_set(self, path: str) -> WorkingSet | None:
        known = _working_set_files.load(path, self._images.id, length_of(self._images))
        if known is not None and known.problem:
            log.info("pyuffd: the working set %s is not used: %s", path, known.problem)
            return None
        return known

    def _hot_parts(self, hot: WorkingSet) -> Iterator[tuple[ServedTask, ServedSpan, int, int]]:
        places = places_of(self._images)
        spans: dict[int, tuple[ServedTask, ServedSpan]] = {}
        for pid, task in self._tasks.items():
            for place, (served, _) in zip(places[pid], task.spans, strict=True):
                spans[place.memory] = (task, served)
        known = [place for each in places.values() for place in each]
        for number, begin, end in parts(hot.often(), known, gap=GAP):
            if number in spans:
                yield *spans[number], begin, end - begin

    def _all_parts(self) -> Iterator[tuple[ServedTask, ServedSpan, int, int]]:
        for task in self._tasks.values():
            for served, span in task.spans:
                for offset, length in slices(span):
                    yield task, served, offset, length

    def _in_threads(
        self, parts: Iterator[tuple[ServedTask, ServedSpan, int, int]], *, is_hot: bool = False
    ) -> None:
        work = deque(parts)

        def fill() -> None:
            while not self._stopped.is_set():
                try:
                    task, served, offset, length = work.popleft()
                except IndexError:
                    return
                if not task.is_gone:
                    self._load(task, served, offset, length, is_hot=is_hot)

        threads = [
            threading.Thread(target=fill, name=f"criu-fill-{number}")
            for number in range(min(self._options.threads, len(work)) - 1)
        ]
        for thread in threads:
            start_thread(thread)
        fill()
        for thread in threads:
            thread.join()
        if self._stopped.is_set():
            raise CriuError("restore", "stopped before everything was filled")

    def _load(
        self, task: ServedTask, served: ServedSpan, offset: int, length: int, *, is_hot: bool
    ) -> None:
        while True:
            try:
                loaded = self._handler.load(served, offset, length, chunk=self._options.chunk)
            except ProcessGoneError:
                task.is_gone = True
                return
            except HelperLostError as error:
                self._fail(str(error))
                self._stopped.set()
                return
            except UffdOSError as error:
                if error.errno not in _RETRIED or self._stopped.is_set():
                    self._fail(f"process {task.image.pid}: {error}")
                    return
                log.warning("pyuffd: process %d: %s: trying again", task.image.pid, error)
                self._stopped.wait(_RETRY_S)
                continue
            with self._lock:
                self.report.loaded_bytes += loaded
                self.report.hot_bytes += loaded if is_hot else 0
            return

    # Recording

    def _record(self, path: str) -> None:
        """Serve faults only, for some time, and note which pages they are."""
        places = places_of(self._images)
        watched = [
            Watched(self._handler.space_of(task.uffd), served.start, served.length, (place,))
            for pid, task in self._tasks.items()
            for place, (served, _) in zip(places[pid], task.spans, strict=True)
        ]
        recording = Recording(self._handler.take_faults, watched, self._options.record_s)
        recording.run(self._stopped)
        if not len(recording):
            return
        try:
            _working_set_files.add(path, self._images.id, length_of(self._images), recording.runs)
        except OSError as error:
            log.warning("pyuffd: the working set is not saved: %s", error)
        else:
            self.report.recorded_pages = len(recording)

    # The end

    def _let_go(self) -> None:
        """Take out what is filled, so that the processes run as if they had never been served."""
        for task in self._tasks.values():
            for served, _ in task.spans:
                if not task.is_gone:
                    # Once more for what a fork or a dropped slice has left.
                    self._load(task, served, 0, served.length, is_hot=False)
                self._handler.unserve(served, uffd=task.uffd)
            task.spans.clear()

    def _end(self) -> None:
        if "_handler" in self.__dict__:
            self._stop_handler(self._handler)
        self.report.exited = sum(task.is_gone for task in self._tasks.values())
        for task in self._tasks.values():
            with suppress(OSError):
                task.uffd.close()
        self._files.close()

    def _stop_handler(self, handler: Handler) -> None:
        report = self.report
        try:
            handler.stop(drain=not self._errors)
        except HandlerError as error:
            self._fail(str(error))
        stats = handler.stats()
        report.faults = stats.faults["missing"]
        report.fault_p50_us = stats.latency["missing"].percentile(50) / 1000
        report.fault_p99_us = stats.latency["missing"].percentile(99) / 1000
        report.forks, report.helper_restarts = stats.forks, stats.restarts


def ioctls_of_private_memory() -> Ioctl:
    """Return the ioctls that private memory supports once CRIU has registered it."""
    from pyuffd.regions import Region

    with Userfaultfd() as uffd, Region.anonymous(PAGE_SIZE) as region:
        return uffd.register(region)


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
