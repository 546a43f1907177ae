"""Serving the faults of a restore, and filling its pieces."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pyuffd import _vmas
from pyuffd._abi import Feature, RegisterMode
from pyuffd._closing import CloseSteps
from pyuffd._errors import (
    ClosedError,
    HandlerError,
    LayoutChangedError,
    ProcessGoneError,
    SnapshotFormatError,
    UffdOSError,
)
from pyuffd._image_calls import read_ahead
from pyuffd._latch import Latch, RLock
from pyuffd._pages import round_up
from pyuffd._uffd import Userfaultfd
from pyuffd.handlers import Handler
from pyuffd.handlers._checks import Driver
from pyuffd.handlers._packed import FileRuns
from pyuffd.snapshot import _restore_map as maps
from pyuffd.snapshot._content import PIECE, Files, Placed, Sums
from pyuffd.snapshot._share import PrivateMapping, Share, Shares

if TYPE_CHECKING:
    import weakref

    from pyuffd._pages import RangeLike

# What the owner drops must not come back by the background, and what it moves is followed.
FOLLOWED = Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP
# A private mapping of a file shows the file again after it was dropped.
FOLLOWED_MINOR = Feature.EVENT_REMAP | Feature.EVENT_UNMAP
# Memory is short, or the layout changes without end: then try again.
_RETRIED = (errno.EAGAIN, errno.ENOMEM)
_RETRY_S = 0.2
# What is read from a file for a fault. The device's own readahead may be megabytes, which the
# thread would wait for, and so would the next one.
AROUND = 64 << 10
# What is read ahead of the pieces that are being filled, at first and at most: a fault waits until
# the disk has read that. While faults come, nothing is.
_AHEAD_FIRST, _AHEAD_MOST = 128 << 10, 2 << 20
Piece = tuple[Placed, int, int, int]


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """A part of what is served."""

    start: int
    length: int
    page_size: int


class Serving:
    """The handler of a restore, and what it serves, from `begin` to `finish` or `close`.

    Attributes:
        is_complete: Nothing has to be filled: it never served anything.
        passed_bytes: Bytes of data that the background has passed.
        on_end: Called when everything is in place.
    """

    def __init__(
        self,
        placed: Sequence[Placed],
        files: Files,
        *,
        poisons: bool,
        sums: Sums | None,
        around: int = AROUND,
    ) -> None:
        for source in files.sources:
            if source is not None:
                source._around = around
        self._all = placed
        self._sums = sums
        self._lock = RLock()
        self._stopped = Latch()
        self._errors: list[BaseException] = []
        self._shares: dict[int, Share] = {}
        self._mappings: dict[int, PrivateMapping] = {}
        self._out: set[int] = set()
        self._asked: dict[int, int] = {}  # up to which offset files were asked for
        self._counted = self._ahead = 0
        self._skipped = self._has_gaps = self._begun = self._ended = self._all_passed = False
        self.passed_bytes = self._loaded = 0
        self.on_end: weakref.WeakMethod[Callable[[], None]] | None = None
        self._poisons = poisons
        self._image = placed[0].images[0]

    def begin(
        self,
        files: Files,
        *,
        handler: Handler | None,
        shares: Shares | None,
        threads: int,
        fault_log: int = 0,
    ) -> None:
        """Serve everything; if that raises, the memory is as before, or `close` ends it."""
        placed = self._all
        self._is_ours = handler is None
        with CloseSteps() as made:
            if shares is not None:
                mapped: list[maps.Mapped] = []
                for each in placed:
                    share = self._shares[id(each)] = shares.of(each)
                    made.add(partial(share.give_back, each))
                    mapped.append(share.use(each))
                maps.replace(placed, mapped)
                for each in placed:
                    start, length = each.region.start, each.region.length
                    made.add(partial(maps.clear, start, length))
                    self._mappings[id(each)] = PrivateMapping(start, length)
            # Nothing is written to a memfd that is complete: who maps it has everything.
            self._filled_before = {id(each) for each in placed if self._is_whole(each)}
            left = [each for each in placed if id(each) not in self._filled_before]
            self._placed = sorted(left, key=lambda each: each.start)
            # Served upwards and taken out downwards: the tables of ranges are sorted arrays, in
            # which what lies behind is moved each time.
            self._upwards = sorted(left, key=lambda each: each.region.start)
            self.is_complete = not left
            if self.is_complete:
                self._give_back()
                return
            self.passed_bytes = sum(
                each.chain.data_bytes for each in placed if id(each) in self._filled_before
            )
            if handler is None:
                followed = FOLLOWED_MINOR if self._shares else FOLLOWED
                uffd = Userfaultfd(features=followed)
                made.add(uffd.close)
                packed = any(each.chain.is_packed for each in left)
                # "auto" would choose by the first region, which may need no Python.
                driver: Driver = "process" if packed else "auto"
                workers = threads if packed else 1
                handler = Handler(uffd, driver=driver, workers=workers, fault_log=fault_log)
                made.add(handler.stop)
                handler.start()
            self.handler = handler
            made.add(partial(self._unserve_quietly, list(self._not_registered())))
            self._serve_all(files)
            self._image.hold(self)
            self._begun = True

    def _is_whole(self, placed: Placed) -> bool:
        share = self._shares.get(id(placed))
        return share is not None and share.is_complete

    def _serve_all(self, files: Files) -> None:
        if self._shares or (self._poisons and any(each.gaps for each in self._upwards)):
            with self.handler._serving_many():
                for each in self._upwards:
                    self._serve(each, files)
            return
        self.handler._serve_many((each.region, each.source(files)) for each in self._upwards)

    def _serve(self, placed: Placed, files: Files) -> None:
        source = placed.source(files)
        share = self._shares.get(id(placed))
        mode = RegisterMode.MISSING if share is None else RegisterMode.MINOR
        region = self._served_as(placed)
        self.handler._serve_poisoned(
            region,
            source,
            mode=mode,
            local=None if share is None else share.region,
            present="refuse",
            poison=self._gaps(placed) if self._poisons else (),
        )

    def _served_as(self, placed: Placed) -> RangeLike:
        return self._mappings.get(id(placed), placed.region)

    def _gaps(self, placed: Placed) -> tuple[int, ...]:
        """Return offsets, (start, end) each, of what is poisoned before anybody can touch it."""
        page, start = placed.page_size, placed.start
        for gap in placed.gaps:
            if (gap.start - start) % page or (gap.end - start) % page:
                raise ValueError(
                    f"gaps='poison': the gap at {gap.start:#x} is a part of a page of {page:#x}"
                )
        return tuple(each - start for gap in placed.gaps for each in (gap.start, gap.end))

    # Filling

    def pieces(self) -> Iterator[Piece]:
        """Yield what the background has to fill."""
        for placed in self._placed:
            for offset, end, size in placed.pieces():
                yield placed, offset, end, size

    def load(self, piece: Piece) -> int:
        """Fill a piece; return the bytes filled."""
        placed, offset, end, size = piece
        done = 0
        # Reading for the checksums reads ahead, and in larger folios than what is asked for.
        if self._sums is None:
            self._read_ahead(placed, offset, end)
        if self._sums is not None and not placed.chain.is_packed:
            try:
                self._sums.check(placed.start + offset, placed.start + end)
            except (SnapshotFormatError, OSError) as error:
                self._spoil(placed, offset, end, error)
                return 0
        done = self._load_part(placed, offset, end)
        with self._lock:
            self.passed_bytes += size
        return done

    def _load_part(self, placed: Placed, offset: int, end: int) -> int:
        return self._retried(
            placed,
            partial(self._load, placed, offset, end - offset),
            partial(self._damage, placed, offset, end),
            partial(self._load_around, placed, offset, end),
        )

    def _load_around(self, placed: Placed, offset: int, end: int) -> int:
        """Fill what is left of a range of which a part was unmapped or mapped over."""
        self._has_gaps = True  # nobody misses the rest, but a memfd lacks it
        if self.handler.uffd.features & Feature.EVENT_UNMAP:
            return self._load_halves(placed, offset, end)
        # Without the event each call about a gap waits for it.
        base = placed.region.start
        found = _vmas.overlapping(base + offset, base + end, details=True)
        parts = [
            (max(vma.start - base, offset), min(vma.end - base, end))
            for vma in found
            if vma.flags & {"um", "ui"}
        ]
        if parts == [(offset, end)]:
            return 0
        return sum(self._load_part(placed, *part) for part in parts)

    def _load_halves(self, placed: Placed, offset: int, end: int) -> int:
        """Fill what is left, which may have moved."""
        page = placed.page_size
        if end - offset <= page:
            return 0
        middle = offset + (end - offset) // page // 2 * page
        return self._load_part(placed, offset, middle) + self._load_part(placed, middle, end)

    def _read_ahead(self, placed: Placed, offset: int, end: int) -> None:
        """Ask the kernel for the files of a piece, and of what follows."""
        count = self.faults()
        with self._lock:
            if count != self._counted:
                self._counted, self._ahead = count, 0
            first = max(self._asked.get(id(placed), 0), offset)
            past = min(end + self._ahead, placed.length)
            self._ahead = max(_AHEAD_FIRST, min(2 * self._ahead, _AHEAD_MOST))
            if first >= past:
                return
            self._asked[id(placed)] = past
        if self._ask_for(placed, [(first, past)]):
            return
        with self._lock:
            if self._asked[id(placed)] == past:
                self._asked[id(placed)] = first

    def _ask_for(self, placed: Placed, ranges: list[tuple[int, int]]) -> bool:
        """Ask the kernel to read the files of ranges; return False if memory was short."""
        if placed.chain.is_packed:
            return True
        try:
            rows = array("Q", [word for start, end in ranges for word in (start, end, 0)])
            files = [image.pages_fileno() for image in placed.images]
            return read_ahead(memoryview(rows), placed.chain.runs, placed.length, files)
        except MemoryError:  # a hint: the ranges are filled without it
            return False

    def _load(self, placed: Placed, offset: int, length: int) -> int:
        chunk = max(PIECE, placed.page_size) if placed.chain.is_packed else None
        if id(placed) in self._mappings:
            # The engine cannot know that holes of the memfd are zeros, and would fill them.
            ranges = list(placed.data_in(offset, offset + length))
            return self._populate(placed, ranges, chunk)
        return self.handler.load(self._served_as(placed), offset, length, chunk=chunk)

    def _damage(self, placed: Placed, offset: int, end: int, error: Exception) -> Exception:
        """Return what is wrong with compressed content: the helper process tells only an errno."""
        if placed.chain.is_packed:
            try:
                Sums(placed.images).check(placed.start + offset, placed.start + end)
            except (SnapshotFormatError, OSError) as damage:
                return damage
        return error

    def _spoil(self, placed: Placed, offset: int, end: int, error: BaseException) -> None:
        """Note an error; nobody gets what is left of these pages."""
        self._note(error)
        with suppress(ValueError, ClosedError, HandlerError):
            self.handler.unserve(self._served_as(placed), offset, end - offset)

    def jobs(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Callable[[], int]]:
        """Yield calls that fill ranges of snapshot addresses, each some of them, in order.

        One call fills ranges of one region, up to the size of a piece, in C.
        """
        waiting: list[tuple[int, int]] = []
        size, last = 0, None
        for start, end in ranges:
            for placed in self._placed_in(start, end):
                page = placed.page_size
                first = max(start - placed.start, 0) // page * page
                past = min(round_up(end - placed.start, page), placed.region.length)
                if waiting and (placed is not last or size >= PIECE):
                    assert last is not None
                    yield partial(self.fill_ranges, last, waiting)
                    waiting, size = [], 0
                waiting.append((first, past))
                size, last = size + past - first, placed
        if waiting and last is not None:
            yield partial(self.fill_ranges, last, waiting)

    def _placed_in(self, start: int, end: int) -> Iterator[Placed]:
        for placed in self._placed:
            if placed.start < end and start < placed.end:
                yield placed

    def fill_ranges(self, placed: Placed, ranges: list[tuple[int, int]]) -> int:
        """Fill ranges of a region, in this order, by one call in C; return the bytes filled."""
        self._ask_for(placed, ranges)
        return self._retried(placed, partial(self._populate, placed, ranges))

    def fill_rows(self, placed: Placed, rows: memoryview) -> int:
        """Fill ranges of a region, an array of (begin, end, not used), as `fill_ranges` does."""
        if id(placed) in self._filled_before:
            return 0
        if self._errors:  # parts of it may be taken out
            words = rows.cast("B").cast("Q")
            pairs = [(words[at], words[at + 1]) for at in range(0, len(words), 3)]
            return self.fill_ranges(placed, pairs)
        return self._retried(placed, partial(self._fill_rows, placed, rows))

    def _fill_rows(self, placed: Placed, rows: memoryview) -> int:
        region, done = self._served_as(placed), None
        if not placed.chain.is_packed:
            files = FileRuns(
                placed.chain.runs,
                placed.length,
                [image.pages_fileno() for image in placed.images],
            )
            done = self.handler._fill_from_files(region, rows, files)
        return self.handler.populate(region, ranges=rows) if done is None else done

    def _populate(
        self, placed: Placed, ranges: list[tuple[int, int]], chunk: int | None = None
    ) -> int:
        """Fill ranges, in this order, by one call."""
        if not ranges:
            return 0
        # What is around them may be taken out already.
        first, past = min(start for start, _ in ranges), max(end for _, end in ranges)
        part = Part(placed.region.start + first, past - first, placed.page_size)
        words = array("Q", [each - first for pair in ranges for each in pair])
        moved = memoryview(words).cast("B").cast("Q", [len(ranges), 2])
        return self.handler.populate(part, ranges=moved, chunk=chunk)

    def _retried(
        self,
        placed: Placed,
        call: Callable[[], int],
        why: Callable[[Exception], Exception] | None = None,
        around: Callable[[], int] | None = None,
    ) -> int:
        while not self._stopped.is_set():
            try:
                done = call()
            except LayoutChangedError:
                # Without `around` the background fills the rest.
                return 0 if around is None else around()
            except ProcessGoneError:
                self._skipped = True
                return 0
            except ValueError:
                is_gone = id(placed) in self._out or getattr(placed.region, "closed", False)
                if not is_gone and not self._errors:  # with errors, parts were taken out
                    raise
                self._skipped = True
                return 0
            except UffdOSError as error:
                if error.errno not in _RETRIED:
                    self._note(error if why is None else why(error))
                    return 0
                self._stopped.wait(_RETRY_S)
                continue
            with self._lock:
                self._loaded += done
            return done
        return 0

    def _note(self, error: BaseException) -> None:
        with self._lock:
            self._errors.append(error)

    def faults(self) -> int:
        """Return how many faults were answered, but for the latest; 0 once it has ended.

        The threads of the background ask often. `Handler.stats` would wait until the others have
        loaded their pieces.
        """
        with suppress(ClosedError, HandlerError):
            return self.handler._fault_count()
        return 0

    def counts(self) -> tuple[int, float, float, int]:
        """Return faults, two percentiles of their latency, and bytes loaded."""
        stats = self.handler.stats()
        kinds = [stats.latency[kind] for kind in ("missing", "minor") if kind in stats.latency]
        most = max(kinds, key=lambda one: one.count)
        faults = sum(stats.faults.get(kind, 0) for kind in ("missing", "minor"))
        return faults, most.percentile(50) / 1000, most.percentile(99) / 1000, self._loaded

    # The end

    def take_out(self, placed: Placed) -> None:
        """Serve a region no longer; pages that were not filled are poisoned."""
        try:
            with self._lock:
                if id(placed) in self._out:
                    return
                self._out.add(id(placed))
                # What is absent then is zeros, as the memfd has them.
                is_filled = self._all_passed and not self._errors and not self._skipped
            with suppress(ValueError, ClosedError):
                if is_filled and id(placed) in self._mappings:
                    self.handler._release(self._served_as(placed))
                else:
                    self.handler.unserve(self._served_as(placed))
        except HandlerError:
            raise
        except BaseException:  # of a signal handler: the next call does it again
            self._out.discard(id(placed))
            raise

    def _not_registered(self) -> Iterator[Placed]:
        """Yield all but those where the caller's handler serves something, which then stays."""
        for each in self._upwards:
            start = each.region.start
            if self._is_ours or not self.handler.uffd._has_registered(start, start + each.length):
                yield each

    def _unserve_quietly(self, some: Sequence[Placed]) -> None:
        for placed in reversed(some):
            with suppress(HandlerError):
                self.take_out(placed)

    def finish(self) -> None:
        """Take everything out; raise the first error."""
        self._all_passed = True
        self._end()
        if self.on_end is not None and (call := self.on_end()) is not None:
            call()
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        """End it in the middle: what is not filled is poisoned."""
        if self._ended or not self._begun:
            return
        self._stopped.set()
        self._skipped = True
        known = len(self._errors)
        self._end()
        if len(self._errors) > known:
            raise self._errors[known]

    def _end(self) -> None:
        for placed in reversed(self._upwards):
            try:
                self.take_out(placed)
            except HandlerError as error:
                self._note(error)
        if self._is_ours:
            try:
                self.handler.stop()
            except HandlerError as error:
                self._note(error)
            self.handler.uffd.close()
        if not (self._errors or self._skipped or self._has_gaps):
            for share in self._shares.values():
                share.complete()
        self._give_back()
        self._image.let_go(self)
        self._ended = True

    def _give_back(self) -> None:
        for placed in self._all:
            if (share := self._shares.get(id(placed))) is not None:
                share.give_back(placed)
