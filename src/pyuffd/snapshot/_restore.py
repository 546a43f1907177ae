"""`Restore`: a snapshot's memory in regions again, usable at once, filled in the background."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from pyuffd._arguments import check_number, check_rate
from pyuffd._closing import Closing
from pyuffd._dropped import close_dropped
from pyuffd._errors import ClosedError, UffdError
from pyuffd._latch import Latch
from pyuffd._limits import start_thread
from pyuffd._pages import PAGE_SIZE
from pyuffd._recording import Until
from pyuffd._working_set import WorkingSet
from pyuffd.regions import Region
from pyuffd.snapshot import _restore_hot, _working_sets
from pyuffd.snapshot import _restore_map as maps
from pyuffd.snapshot._capture import SnapshotProgress
from pyuffd.snapshot._content import Files, Placed, Sums, check_files, check_gaps
from pyuffd.snapshot._drain import Batch, Drain
from pyuffd.snapshot._restore_compare import Comparing
from pyuffd.snapshot._restore_options import Options, UsedMode
from pyuffd.snapshot._restore_plan import (
    check_empty,
    check_not_restored,
    choose,
)
from pyuffd.snapshot._serve import AROUND, Serving
from pyuffd.snapshot._share import Shares

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RestoreStats:
    """What a restore has done so far.

    Attributes:
        faults: Pages that were filled because a thread touched them.
        fault_p50_us: The time that half of these did not exceed, from reading the message.
        fault_p99_us: The time that 99 % of them did not exceed.
        loaded_bytes: Bytes that the background has filled.
        hot_bytes: Those of them that a working set named, and that were filled first.
        ready_s: Seconds until the memory was usable.
        seconds: Seconds until everything was in place, or up to now.
    """

    faults: int
    fault_p50_us: float
    fault_p99_us: float
    loaded_bytes: int
    hot_bytes: int
    ready_s: float
    seconds: float


class Restore(Closing):
    """Memory that gets a snapshot's content back; `Snapshot.restore` makes one.

    The memory is usable from the beginning: a page that is touched before it is filled is filled
    first. Threads in the background fill the rest. Afterwards nothing is registered and no thread
    is left, so that the memory is as fast as any other.

    close(), which `with` calls, stops it: pages without content are poisoned then, so that an
    access raises SIGBUS and never reads zeros. Call `wait` first to get everything.

    If a signal handler raises just as the `with` block ends, it goes on until it is done, or the
    last reference to this object is gone.

    Attributes:
        method: "copy": pages are filled through userfaultfd. "minor": the content is in one memfd,
            which all restores of this snapshot object share, and pages are mapped from there.
            "map": the image's files are mapped copy-on-write, without userfaultfd.
        why: Why this method.
        working_set: What is filled first, or None. If it has a `problem`, nothing is.
        recorded: The working set that was recorded, when it is; None if nothing was touched.
        record_error: Why a recording was not saved, or None.

    Threads: safe, apart from close().

    Example:
        >>> import subprocess, sys, tempfile
        >>> from pyuffd import Process, Region, Snapshot
        >>> child = subprocess.Popen(
        ...     [sys.executable, "-c", "print(flush=True); input()"],
        ...     stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ... )
        >>> _ = child.stdout.readline()
        >>> with tempfile.TemporaryDirectory() as folder, Process(child.pid) as target:
        ...     done = Snapshot.take(target, f"{folder}/first", method="stopped", durable=False)
        ...     with Snapshot.open(f"{folder}/first") as snapshot:
        ...         heap = next(r for r in snapshot.regions if r.path == "[heap]")
        ...         with (
        ...             Region.anonymous(heap.length) as region,
        ...             snapshot.restore({heap: region}, mode="copy") as restore,
        ...         ):
        ...             restore.wait(), region.read() == snapshot.read(heap.start, heap.length)
        (True, True)
        >>> _ = child.communicate()
    """

    _failed = "ending the restore failed"
    _instead = "it owns a userfaultfd and threads; share the object itself"
    _serving: Serving | None = None
    _drain: Drain[tuple[Placed, int, int, int]] | None = None
    _comparing: Comparing | None = None
    method: UsedMode
    why: str

    def __init__(
        self, path: str, shares: Callable[[], Shares], placed: Sequence[Placed], options: Options
    ) -> None:
        self._began = time.monotonic()
        self._pid = os.getpid()
        self._closed = self._is_over = False
        self._placed = placed
        self._ended_at = 0.0
        self._path = path
        images = placed[0].images
        self.working_set: WorkingSet | None = _restore_hot.of_image(images[0], options.working_set)
        self.recorded: WorkingSet | None = None
        self.record_error: Exception | None = None
        self._hot = _restore_hot.Hot(images[0], placed, self.working_set)
        self._hot_found = self._hot_filled = Batch(0)
        self._record_stop = Latch()
        self._recorder: threading.Thread | None = None
        check_files(images)
        check_gaps(placed, options.gaps, path)
        sums = Sums(images)
        if options.verify == "first":
            for each in placed:
                sums.check(each.start, each.end)
        self.total: int = sum(each.chain.data_bytes for each in placed)
        try:
            self._begin(shares, options, sums)
        except BaseException:
            with suppress(Exception):
                self.close()
            raise

    def _begin(self, shares: Callable[[], Shares], options: Options, sums: Sums) -> None:
        placed = self._placed
        files = Files(placed[0].images)
        try:
            check_not_restored(placed)
            self.method, self.why = choose(placed, files, options)
            check_empty(placed)
            if self.method == "map":
                maps.map_all(placed, files)
                if options.verify == "drain":
                    self._comparing = Comparing(
                        placed, threads=options.threads, rate=options.rate, paused=options.paused
                    )
                    self._comparing.drain.start()
            else:
                self._serving = Serving(
                    placed,
                    files,
                    poisons=options.gaps == "poison",
                    sums=sums if options.verify == "drain" else None,
                    # What a working set has not is not worth a wait of those who need what it has.
                    around=PAGE_SIZE if self._hot.is_known else AROUND,
                )
                self._serving.begin(
                    files,
                    handler=options.handler,
                    shares=shares() if self.method == "minor" else None,
                    threads=options.threads,
                    fault_log=_restore_hot.LOGGED_FAULTS if options.record else 0,
                )
        finally:
            files.close()
        if self.method != "copy":
            for each in placed:
                assert isinstance(each.region, Region)
                each.region._note_replaced()
        self._ready_s = time.monotonic() - self._began
        if self._serving is None or self._serving.is_complete:
            self._serving = None
            self._ended_at = time.monotonic()
            if self.method == "minor":
                self.why += "; its memfd has everything already, so that nothing faults"
            return
        for each in placed:
            self._follow_close(each)
        self._serving.on_end = weakref.WeakMethod(self._note_end)
        self._drain = Drain(
            self._serving.load,
            self._serving.finish,
            self._serving.pieces(),
            threads=options.threads,
            rate=options.rate,
            paused=options.paused,
            held=True,
            faults=self._serving.faults,
        )
        self._drain.start()
        # What it fills is found in the background, since that needs a look at each of its runs.
        self._hot_found = self._drain.first(
            [partial(self._find_hot, self._serving, self._drain)] if self.working_set else []
        )
        if options.record is None:
            self._drain.hold(False)
        else:
            self._recorder = threading.Thread(
                target=self._record,
                args=(options.record, options.record_until, self._serving, self._drain),
                name="uffd-record",
                daemon=True,
            )
            start_thread(self._recorder)

    def _find_hot(self, serving: Serving, drain: Drain[tuple[Placed, int, int, int]]) -> int:
        self._hot_filled = drain.first(self._hot.jobs(serving.fill_rows))
        return 0

    def _record(
        self,
        name: str,
        until: Until,
        serving: Serving,
        drain: Drain[tuple[Placed, int, int, int]],
    ) -> None:
        """Note demand faults while nothing but the working set is filled; then go on."""
        try:
            recording = self._hot.recording(serving.handler, until)
            recording.run(self._record_stop)
            if len(recording):
                image = self._placed[0].images[0]
                self.recorded = _working_sets.add(image, name, recording.runs, self._hot.untold())
        except (UffdError, OSError) as error:
            self.record_error = error
            log.warning("pyuffd: the working set %s is not saved: %s", name, error)
        finally:
            drain.hold(False)

    def _note_end(self) -> None:
        self._ended_at = time.monotonic()

    def _follow_close(self, placed: Placed) -> None:
        """Take a region out before it is unmapped; what the handler serves follows by itself."""
        serving = self._serving
        follow = getattr(placed.region, "_on_close", None)
        if follow is not None and serving is not None and self.method == "minor":
            follow(partial(serving.take_out, placed))

    # Looking

    @property
    def done(self) -> bool:
        """Whether everything is in place, and nothing registered."""
        drain = self._drain
        return drain is None or (drain.ended and drain.error is None and not drain.was_stopped)

    @property
    def progress(self) -> SnapshotProgress:
        """How far it is: bytes of data in place, by the background, and in all."""
        serving = self._serving
        done = self.total if serving is None else serving.passed_bytes
        return SnapshotProgress("restore", min(done, self.total), self.total)

    @property
    def stats(self) -> RestoreStats:
        """What it has done so far; with a handler of yours the faults are those of the handler."""
        until = self._ended_at or time.monotonic()
        serving = self._serving
        faults, p50, p99, loaded = (0, 0.0, 0.0, 0) if serving is None else serving.counts()
        hot = self._hot.filled_bytes
        return RestoreStats(faults, p50, p99, loaded, hot, self._ready_s, until - self._began)

    # Steering

    @property
    def _background(self) -> Drain[tuple[Placed, int, int, int]] | None:
        return self._drain if self._comparing is None else self._comparing.drain

    @property
    def rate(self) -> float | None:
        """Bytes a second that the background fills at most; None is no limit. It can be changed.

        With "map" it compares at most this many.
        """
        return None if self._background is None else self._background.rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        rate = check_rate(rate)
        if self._background is not None:
            self._background.set_rate(rate)

    @property
    def paused(self) -> bool:
        """Whether the background pauses."""
        return self._background is not None and self._background.paused

    def pause(self) -> None:
        """Fill nothing more in the background, until `resume`; faults are served as before."""
        if self._background is not None:
            self._background.pause(True)

    def resume(self) -> None:
        """Go on after `pause`."""
        if self._background is not None:
            self._background.pause(False)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until everything is in place; return whether it is.

        With "map" everything is from the beginning, and this waits until all of it was compared
        with its checksums, if `verify` is "drain".

        Args:
            timeout_s: How long at most, in seconds.

        Raises:
            SnapshotFormatError: a chunk is not what was written. The pages of it that nobody had
                touched by then are poisoned, except with "map": its pages stay as they are.
            HandlerError: content could not be read; its pages are poisoned.
            UffdOSError: the same, found in the background: ENODATA - a file was truncated; EFAULT -
                it cannot be read (EIO).

        GIL: released.  Threads: safe.  Blocks: until then, also while it pauses.
        """
        if timeout_s is not None:
            check_number("timeout_s", timeout_s, float("inf"))
        if self._background is None:
            return True
        ended = self._background.wait(timeout_s)
        if ended and self._background.error is not None:
            raise self._background.error
        return ended and not self._background.was_stopped

    def wait_hot(self, timeout_s: float | None = None) -> bool:
        """Wait until the working set is in place, or there is none; return whether it is.

        Args:
            timeout_s: How long at most, in seconds.

        GIL: released.  Threads: safe.  Blocks: until then, also while it pauses.
        """
        if timeout_s is not None:
            check_number("timeout_s", timeout_s, float("inf"))
        until = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._hot_found.wait(timeout_s):
            return False
        return self._hot_filled.wait(None if until is None else until - time.monotonic())

    def stop_recording(self) -> None:
        """End the recording now, save it, and fill the rest; without one this does nothing.

        Blocks: until it is saved.
        """
        self._record_stop.set()
        if self._recorder is not None and self._recorder is not threading.current_thread():
            self._recorder.join()

    def load_first(self, ranges: Iterable[tuple[int, int]]) -> Batch:
        """Fill these parts before all others, in this order; see `Serving.jobs`.

        Args:
            ranges: Addresses (start, end) in the snapshot; what is not restored is skipped.

        Returns:
            An object whose `wait(timeout_s)` returns when they are in place.
        """
        if self._drain is None or self._serving is None:
            return Batch(0)
        return self._drain.first(self._serving.jobs(ranges))

    # Ending

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("this restore is closed")

    def close(self) -> None:
        """End it; pages that are not filled yet are poisoned. A second call does nothing.

        If a signal handler raises meanwhile, the next call continues.

        Raises:
            HandlerError: content could not be read.

        Blocks: until the pieces that are being filled are done.
        """
        self._closed = True
        if os.getpid() != self._pid:
            return
        if self._drain is not None:
            self._drain.hold(True)
            self.stop_recording()
            self._drain.stop()
        if self._serving is not None:
            self._serving.close()
        if self._comparing is not None:
            self._comparing.close()
        self._is_over = True

    def __del__(self) -> None:
        if getattr(self, "_is_over", True) or self._pid != os.getpid():
            return
        if self._drain is None or (self._drain.ended and self._serving is None):
            return
        if not (self._closed or self._drain.ended):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        close_dropped(self._close_dropped)

    def _close_dropped(self) -> None:
        with suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "done" if self.done else "running"
        return f"<Restore of {self._path} by {self.method}, {state}>"
