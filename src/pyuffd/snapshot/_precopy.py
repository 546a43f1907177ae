"""Copy while the process runs, and copy again what it has written meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from pyuffd import _dirty_calls as ranges
from pyuffd._errors import SnapshotError, StopTimeoutError
from pyuffd.dirty import Blind, BlindReason, DirtyRound, DirtyTracker, Moved, Protected
from pyuffd.dirty._round import Pending
from pyuffd.pagemap import PageRanges
from pyuffd.remote import _stop as stopping
from pyuffd.remote._mappings import MappingKind, Mappings
from pyuffd.remote._process import Process
from pyuffd.snapshot._capture import (
    Captured,
    Frame,
    Frames,
    Layout,
    Options,
    Placed,
    at_barrier,
)
from pyuffd.snapshot._writer import MEMORY, Writer

# Where the tracker does not see what changes: copied in the stop.
UNSEEN = (
    BlindReason.SHARED,
    BlindReason.HUGE_DROPS,
    BlindReason.NOT_REGISTERED,
    BlindReason.BUSY,
)
# A round that leaves more than this part of the one before does not get ahead of the process.
SHRINKS = 0.8
# What the stop copies is made small: another round comes first if there is more than this to copy,
# and the last round has left at most one part in this many.
FEW = 1 << 20
WORTH = 2
# How often the work that every stop needs is timed: a busy machine may be to blame.
ATTEMPTS = 3
# The part of the limit that copying may need; the rest is for stopping and scanning.
COPY_PART = 0.5


@dataclass
class _Changes:
    """What rounds reported, added up."""

    all: Pending
    absent: memoryview = ranges.NO_RANGES


def captured(
    process: Process,
    layout_of: Layout,
    writer: Writer,
    options: Options,
    tracker: DirtyTracker | None,
    *,
    only_changes: bool = False,
) -> Captured:
    """Write the memory of a process at one instant; see `_methods.capture`."""
    changes = _Changes(Pending())
    with ExitStack() as stack:
        mine = tracker is None
        if tracker is None:
            tracker = stack.enter_context(DirtyTracker(process, method="wp-async"))
        try:
            result = _Rounds(process, layout_of, writer, options, tracker, changes).run(
                only_changes=only_changes
            )
        except BaseException:
            if not mine:
                tracker._put_back(changes.all)
            raise
        result.changes = changes.all
        return result


class _Rounds:
    def __init__(
        self,
        process: Process,
        layout_of: Layout,
        writer: Writer,
        options: Options,
        tracker: DirtyTracker,
        changes: _Changes,
    ) -> None:
        self._process = process
        self._writer = writer
        self._options = options
        self._tracker = tracker
        self._changes = changes
        self._frames = Frames(layout_of, _Frame)
        self._unseen_of: tuple[_Frame, list[Blind], Frame] | None = None
        self._seen: list[Placed] = []
        self._by_others = ranges.NO_RANGES  # copied in the stop by `options.in_stop`
        self._late: StopTimeoutError | None = None
        self._slow: list[float] = []
        self._mappings = 0

    def run(self, *, only_changes: bool) -> Captured:
        """Copy in rounds until the rest is small enough, then the rest in the stop."""
        left = ranges.NO_RANGES
        if not only_changes:
            with self._tracker.collect() as round_:
                self._add(round_)
                round_.commit()
            left = self._everything()
        result = Captured("precopy")
        before = PageRanges(left).bytes
        for number in range(self._options.rounds):
            result.rounds = number + (not only_changes)
            self._copy(left)
            at_barrier(f"round {number}")
            left = self._end_round()
            size = PageRanges(left).bytes
            shrinks = not before or size * WORTH <= before
            more = size > FEW and shrinks and number + 1 < self._options.rounds
            if not more and self._fits(size) and self._stop(left, result):
                self._writer.punch(self._seen, result.layout, without=self._by_others)
                result.absent = self._writer.without_content(self._changes.absent)
                return result
            if len(self._slow) == ATTEMPTS:
                break
            if before and size > SHRINKS * before and number >= 2 and not self._fits(size):
                break
            before = size
        if self._late is not None:
            raise self._late
        if self._slow:
            raise self._too_slow()
        raise SnapshotError(
            "stalled",
            f"process {self._process.pid} writes {self._tracker.rate / 1e6:.0f} MB/s, and the file"
            f" gets {self._writer.speed / 1e6:.0f} MB/s: after {result.rounds} rounds"
            f" {size / 1e6:.0f} MB are left, and while it is stopped {self._limit()}",
        )

    def _end_round(self) -> memoryview:
        """End a round, and do what every stop begins with: raise if that alone is too long."""
        left = ranges.NO_RANGES
        seconds: list[float] = []
        while not seconds or (seconds[-1] > self._options.max_stall_s and len(seconds) < ATTEMPTS):
            begin = time.perf_counter()
            left = ranges.union(left, self._round())
            mappings = self._process.mappings()
            frame = self._frames.of(mappings)
            frame.prepare()
            self._unseen(frame)
            seconds.append(time.perf_counter() - begin)
        if min(seconds) > self._options.max_stall_s:
            raise SnapshotError(
                "stalled",
                f"process {self._process.pid} would be stopped for {min(seconds):.2f} s while its"
                f" {len(mappings)} mappings are read, and max_stall_s is"
                f" {self._options.max_stall_s:g} s",
            )
        return left

    def _too_slow(self) -> SnapshotError:
        return SnapshotError(
            "stalled",
            f"process {self._process.pid} was stopped for {min(self._slow):.2f} s or more until its"
            f" threads had stopped and its {self._mappings} mappings were read, and max_stall_s is"
            f" {self._options.max_stall_s:g} s",
        )

    def _fits(self, size: float) -> bool:
        return size <= self._room()

    def _room(self) -> float:
        return min(MEMORY, self._writer.read_speed * self._options.max_stall_s * COPY_PART)

    def _limit(self) -> str:
        """Say what keeps the stop from copying more."""
        room = self._room()
        if room >= MEMORY:
            return f"at most {MEMORY / 1e6:.0f} MB are copied, whatever max_stall_s is"
        return (
            f"{room / 1e6:.0f} MB can be copied: more of them need longer than max_stall_s allows"
            f" ({self._options.max_stall_s:g} s, of which {COPY_PART:.0%} is for copying, at"
            f" {self._writer.read_speed / 1e6:.0f} MB/s)"
        )

    def _everything(self) -> memoryview:
        frame = self._frames.of(self._process.mappings())
        self._seen = list(frame.layout)
        return frame.content(self._process)

    def _add(self, round_: DirtyRound) -> None:
        pending = Pending(
            round_.written.memoryview(),
            round_.dropped.memoryview(),
            round_.unsure.memoryview(),
            round_.layout,
        )
        self._changes.all = self._changes.all.plus(pending)
        self._forget(ranges.union(pending.dropped, _replaced(round_)))

    def _forget(self, pages: memoryview) -> None:
        """Pages have no content: what was copied of them is out of date."""
        self._writer.forget(pages)
        self._changes.absent = ranges.union(self._changes.absent, pages)

    def _round(self, mappings: Mappings | None = None) -> memoryview:
        """End a round, with the mappings if it is stopped; return what has to be copied."""
        is_stopped = mappings is not None
        with self._tracker._collect(is_stopped=is_stopped, mappings=mappings) as round_:
            self._add(round_)
            round_.commit()
            return ranges.union(round_.written.memoryview(), round_.unsure.memoryview())

    def _copy(self, pages: memoryview) -> None:
        """Copy pages while the process runs; what is lost by that is in a later round."""
        if not len(pages):
            return
        frame = self._frames.of(self._process.mappings())
        self._seen = list(frame.layout)
        found = frame.content(self._process, within=pages)
        self._forget(ranges.subtract(pages, found))
        self._writer.copy(ranges.intersect(pages, found), frame.pieces, "before", slow=True)

    def _stop(self, left: memoryview, result: Captured) -> bool:
        """Copy the rest in the stop; False if it would be too much."""
        process, options = self._process, self._options
        self._writer.prepare(PageRanges(left).bytes)
        begin = time.perf_counter()
        begun_s = time.monotonic()
        until_s = begun_s + options.max_stall_s
        try:
            standing = stopping.stop(process, options.stop_limit_s, options.max_stall_s)
        except StopTimeoutError as error:
            if error.state != "D":
                raise
            self._late = error
            time.sleep(options.max_stall_s)  # let it run as long as its threads were stopped
            return False
        with standing as stop:
            at_barrier("stopped")
            result.instant_ns = time.time_ns()
            mappings = process.mappings()
            frame = self._frames.of(mappings)
            layout, pieces = frame.layout, frame.pieces
            left = ranges.intersect(ranges.union(left, self._round(mappings)), frame.spans)
            if time.monotonic() > until_s:
                self._tracker._put_back(Pending(unsure=left))  # the next round has it
                self._slow.append(time.perf_counter() - begin)
                self._mappings = len(mappings)
                return False
            left = ranges.subtract(left, self._note_holes(frame, left))
            if not self._fits(PageRanges(left).bytes * COPY_PART):
                self._tracker._put_back(Pending(unsure=left))  # the next round has it
                return False
            if not self._writer.take(left, pieces, until_s):
                self._tracker._put_back(Pending(unsure=left))
                return False
            unseen = ranges.subtract(self._unseen(frame), left)
            self._forget(ranges.subtract(ranges.subtract(self._blind(frame).spans, left), unseen))
            self._writer.copy(unseen, pieces, "stop", until_s=begun_s + options.stopped_s)
            others: Sequence[Placed] = ()
            if options.in_stop is not None:
                others = options.in_stop(stop, mappings, layout)
            process.check()
            result.layout = layout
            result.stop_bytes = PageRanges(left).bytes + PageRanges(unseen).bytes
            at_barrier("copied")
        result.pause_s = time.perf_counter() - begin
        self._by_others = PageRanges.of((part.start, part.end) for part in others).memoryview()
        stop.check()
        at_barrier("resumed")
        self._writer.write_taken(pieces)
        return True

    def _note_holes(self, frame: _Frame, pages: memoryview) -> memoryview:
        """Note pages of memfds and of hugetlb memory that are not there; return them.

        They are what the file holds, if there is one. Reading them would fill its holes, and use
        up huge pages.
        """
        of_memory = frame.of_memory
        wanted = ranges.intersect(pages, of_memory.spans)
        if not len(wanted):
            return wanted
        found = of_memory.content(self._process, within=wanted)
        holes = ranges.subtract(wanted, found)
        self._forget(holes)
        return holes

    def _unseen(self, frame: _Frame) -> memoryview:
        """Return the pages with content that the tracker says nothing about."""
        return self._blind(frame).content(self._process)

    def _blind(self, frame: _Frame) -> Frame:
        """Return the parts of which the tracker says nothing."""
        blind = self._tracker._gaps()
        known = self._unseen_of
        if known is None or known[0] is not frame or known[1] is not blind:
            gaps = PageRanges.of((gap.start, gap.end) for gap in blind if gap.reason in UNSEEN)
            sizes = ranges.bytes_in(gaps.memoryview(), frame.rows)
            parts = [part for part, size in zip(frame.layout, sizes, strict=True) if size]
            known = self._unseen_of = frame, blind, Frame(parts)
        return known[2]


class _Frame(Frame):
    @cached_property
    def of_memory(self) -> Frame:
        """The parts that are of memfds and the like."""
        kinds = (MappingKind.SHMEM, MappingKind.HUGETLB)
        return Frame([part for part in self.layout if part.mapping.kind in kinds])

    def prepare(self) -> None:
        """Make all that the stop needs."""
        _ = self.pieces, self.spans, self.rows, self.of_memory.spans


def _replaced(round_: DirtyRound) -> memoryview:
    """Return where other memory is now than before, or none."""
    spans = []
    for change in round_.layout:
        if not isinstance(change, Protected):
            spans.append((change.start, change.end))
        if isinstance(change, Moved):
            spans.append((change.old_start, change.old_start + change.end - change.start))
    return PageRanges.of(spans).memoryview()
