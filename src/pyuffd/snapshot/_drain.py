"""`Drain`: threads that work through a list of pieces, in the background."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

from pyuffd._errors import UffdOSError
from pyuffd._image_calls import be_gentle
from pyuffd._latch import Latch, RLock
from pyuffd._limits import start_thread

T = TypeVar("T")

# A rate is kept to within so long; a longer sleep would let a new rate wait.
_SLEEP_MOST_S = 0.1
# How often faults are counted, and how long none may come before all threads work again.
_LOOK_S, _QUIET_S = 0.002, 0.01


class Batch:
    """Jobs that are done before all others, and an event for when they are done."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._done = Latch()
        if not count:
            self._done.set()

    def _one_done(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self._done.set()

    def _given_up(self) -> None:
        self._done.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until its jobs are done, or the drain has ended; return whether that is so."""
        return self._done.wait(timeout_s)


class Drain(Generic[T]):
    """Threads that call `work` with one piece after the other, and `finish` after the last.

    Args:
        work: Does one piece, and returns the bytes that count for the rate.
        finish: Called once by the last thread, after all pieces, unless the drain was stopped.
        pieces: What is to be done, in this order. It is asked for one after the other, under a
            lock.
        threads: How many.
        rate: At most this many bytes per second, all threads together; None is no limit.
        paused: Whether to begin with a pause.
        held: Whether to do no pieces until `hold(False)`, but what `first` was given.
        faults: Counts faults that others wait for. While it grows, one thread alone does pieces:
            with as many as there are CPUs, a fault finds none free, and waits for milliseconds.

    Threads: safe.
    """

    def __init__(
        self,
        work: Callable[[T], int],
        finish: Callable[[], None],
        pieces: Iterable[T],
        *,
        threads: int,
        rate: float | None = None,
        paused: bool = False,
        held: bool = False,
        faults: Callable[[], int] | None = None,
    ) -> None:
        self._faults = faults
        self._fault_count = 0
        self._fault_at = self._looked_at = float("-inf")
        self._work = work
        self._finish = finish
        self._rest = iter(pieces)
        self._pieces = deque(islice(self._rest, threads))
        self._first: deque[tuple[Callable[[], int], Batch]] = deque()
        # Not by the condition's own methods, in which a signal may leave it locked.
        self._lock = RLock()
        self._changed = threading.Condition(self._lock)
        self._rate = rate
        self._due = 0.0
        self._paused = paused
        self._held = held
        self._busy_first = 0
        self._stopped = False
        self._ended = Latch()
        self._running = max(1, min(threads, len(self._pieces) or 1))
        self.error: BaseException | None = None
        self._threads = [self._thread(0)]

    def start(self) -> None:
        """Begin; whoever calls this can stop it, also if a signal handler raises meanwhile."""
        # It starts the others: each start waits until the thread runs, and so would the caller. It
        # does one piece before: the program that has just got the memory needs a CPU and the
        # interpreter's lock then, and the thread that answers its first faults needs a CPU too.
        start_thread(self._threads[0])

    def _thread(self, number: int) -> threading.Thread:
        return threading.Thread(
            target=self._run, args=(number,), name=f"uffd-restore-{number}", daemon=True
        )

    def _start_others(self) -> None:
        """Start them; until then they are counted as running, but for the end."""
        count = self._running
        for number in range(1, count):
            try:
                if not self._stopped:
                    thread = self._thread(number)
                    start_thread(thread)
                    self._threads.append(thread)
                    continue
            except (UffdOSError, MemoryError):  # no more threads: those that run do it
                pass
            with self._lock:
                self._running -= count - number
            break

    # Steering

    @property
    def rate(self) -> float | None:
        """Bytes a second at most, or None."""
        return self._rate

    def set_rate(self, rate: float | None) -> None:
        """Change the rate, from now on."""
        with self._lock:
            self._rate, self._due = rate, 0.0
            self._changed.notify_all()

    @property
    def paused(self) -> bool:
        """Whether it pauses."""
        return self._paused

    def pause(self, paused: bool) -> None:
        """Begin no more pieces, or go on."""
        with self._lock:
            self._paused = paused
            self._changed.notify_all()

    def hold(self, held: bool) -> None:
        """Do no more pieces, but what `first` is given; or go on."""
        with self._lock:
            self._held = held
            self._changed.notify_all()

    def first(self, jobs: Iterable[Callable[[], int]]) -> Batch:
        """Do these jobs before all other pieces, in this order, after earlier ones of the kind.

        Each returns bytes, as `work` does.
        """
        wanted = list(jobs)
        batch = Batch(len(wanted))
        with self._lock:
            if self._ended.is_set() or self._stopped:
                batch._given_up()
            else:
                self._first.extend((job, batch) for job in wanted)
                self._changed.notify_all()
        return batch

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; return whether it has ended."""
        return self._ended.wait(timeout_s)

    @property
    def ended(self) -> bool:
        """Whether all threads are done."""
        return self._ended.is_set()

    @property
    def was_stopped(self) -> bool:
        """Whether it ended before everything was done."""
        return self._stopped

    def stop(self) -> None:
        """Begin nothing more, and wait for what was begun."""
        with self._lock:
            self._stopped = self._stopped or not self._ended.is_set()
            self._changed.notify_all()
        for thread in self._threads:  # those that the first one still starts are added
            # One that is about to start sees that it is to stop.
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join()

    # Threads

    def _run(self, number: int) -> None:
        is_gentle = False
        starts_others = not number and self._running > 1
        try:
            while (found := self._next(steps_back=number > 0)) is not None:
                job, is_first = found
                # A thread that touches a page, and the one that fills it, go before all pieces, but
                # not before a job that is first, for which somebody waits. A gentle thread that has
                # the interpreter's lock may wait for a CPU: do as little as possible with the lock.
                # Start the others before: they would inherit this, and may get a job that is first.
                if not is_first and not is_gentle and not starts_others:
                    is_gentle = True
                    be_gentle()
                if starts_others and is_first:
                    starts_others = False
                    self._start_others()
                done = job()
                if done:
                    self._count(done)
                if starts_others:
                    starts_others = False
                    self._start_others()
        except BaseException as error:
            self._fail(error)
        with self._lock:
            self._running -= self._running if starts_others else 1
            is_last = not self._running
        if is_last:
            self._end()

    def _has_faults(self) -> bool:
        """Whether there was a fault a moment ago."""
        now = time.monotonic()
        if self._faults is not None and now - self._looked_at > _LOOK_S:
            self._looked_at, count = now, self._faults()
            if count != self._fault_count:
                self._fault_count, self._fault_at = count, now
        return now - self._fault_at < _QUIET_S

    def _next(self, *, steps_back: bool) -> tuple[Callable[[], int], bool] | None:
        """Return what to do now, and whether it was to be first; None at the end."""
        with self._lock:
            while True:
                if self._stopped:
                    return None
                # Pieces would compete with them for the disk.
                is_held = not self._first and (self._held or self._busy_first > 0)
                if not self._first and not self._pieces and not is_held:
                    return None
                late = self._due - time.monotonic() if self._rate is not None else 0.0
                if self._paused or is_held:
                    self._changed.wait()
                elif late > 0:
                    self._changed.wait(min(late, _SLEEP_MOST_S))
                elif steps_back and not self._first and self._has_faults():
                    self._changed.wait(_QUIET_S)
                else:
                    break
            if self._first:
                self._busy_first += 1
                return self._one_of_first(*self._first.popleft()), True
            piece = self._pieces.popleft()
            self._pieces.extend(islice(self._rest, 1))
        return partial(self._work, piece), False

    def _one_of_first(self, job: Callable[[], int], batch: Batch) -> Callable[[], int]:
        def run() -> int:
            try:
                return job()
            finally:
                with self._lock:
                    batch._one_done()
                    self._busy_first -= 1
                    self._changed.notify_all()

        return run

    def _count(self, done: int) -> None:
        with self._lock:
            if self._rate is not None:
                self._due = max(self._due, time.monotonic()) + done / self._rate

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error
            self._stopped = True
            self._changed.notify_all()

    def _end(self) -> None:
        try:
            if not self._stopped:
                self._finish()
        except BaseException as error:
            self.error = self.error or error
        finally:
            with self._lock:
                for _, batch in self._first:
                    batch._given_up()
                self._first.clear()
                self._ended.set()
