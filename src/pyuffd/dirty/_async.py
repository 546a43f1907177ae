"""Tracking by WP_ASYNC and PAGEMAP_SCAN: no thread waits, and no message is sent."""

from __future__ import annotations

import errno
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from functools import cache

from pyuffd import _dirty_calls as calls
from pyuffd._abi import USER_MODE_ONLY, Feature, PageCategory, RegisterMode
from pyuffd._diagnose import unexplained
from pyuffd._dirty_calls import Backing, Track
from pyuffd._errors import RangeBusyError, UffdOSError
from pyuffd._opening import probe_api
from pyuffd._pages import HUGE_PAGE_2M, PAGE_SIZE
from pyuffd._uffd import Userfaultfd
from pyuffd.dirty import _blind, _layout, _rows
from pyuffd.dirty._blind import Blind, BlindReason
from pyuffd.dirty._drops import DropWatch, is_watched
from pyuffd.dirty._layout import LayoutChange, Mapped, Moved, Protected, Unmapped
from pyuffd.dirty._round import Pending
from pyuffd.dirty._rows import Row, Span
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.remote._mappings import Mapping, Mappings
from pyuffd.remote._process import Process

NEEDED = Feature.WP_ASYNC
WANTED = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
NO_RANGES = calls.NO_RANGES
_CONTENT = PageCategory.PRESENT | PageCategory.SWAPPED
_GONE = {errno.ESRCH, errno.ENOMEM}


class AsyncMethod:
    """The mappings of a process inside a scope, registered with a userfaultfd that has WP_ASYNC.

    `arm` registers them; `close` unregisters them, also if `arm` raised. Whoever made the
    userfaultfd closes it after this, unless it `is_borrowed`.
    """

    def __init__(
        self,
        process: Process,
        uffd: Userfaultfd,
        scope: Sequence[Span] | None,
        watch: DropWatch | None = None,
        *,
        is_borrowed: bool = False,
    ) -> None:
        self._process = process
        self._uffd = uffd
        self._watch = watch
        self._is_borrowed = is_borrowed
        self._scope = scope
        self._may_be_dense = sees_holes()
        self._flags = 0 if self._may_be_dense else calls.HOLES_APART
        self._spans = None if scope is None else _rows.packed(scope)
        self._mappings = self._read_mappings()
        self._rows: list[Row] = []
        self._refused: dict[Mapping, Blind] = {}
        # The result of `blind`, for the rows and the number of refused mappings that it is of.
        self._gaps: tuple[list[Row], int, list[Blind]] | None = None
        self._tracked = calls.TrackedRows([])
        self._known = NO_RANGES
        self._is_armed = False

    def _read_mappings(self) -> Mappings:
        if self._spans is None:
            return self._process.mappings()
        return self._process._mappings_in(self._spans)

    # Registering

    def _wanted(self, mappings: Mappings) -> list[Row]:
        """Return a row for each mapping in scope that can be tracked."""
        known = {row.mapping: row for row in self._rows}
        refused: dict[Mapping, Blind] = {}
        before = self._refused
        rows = []
        for mapping in _rows.in_scope(mappings, self._scope):
            if before and mapping in before:
                refused[mapping] = before[mapping]
            elif not _rows.is_tracked_kind(mapping):
                refused[mapping] = Blind(
                    mapping.start, mapping.end, BlindReason.SPECIAL, mapping.path
                )
            else:
                rows.append((known and known.get(mapping)) or self._new_row(mapping))
        self._refused = refused
        return rows

    def _new_row(self, mapping: Mapping) -> Row:
        # A part of one that was split, or one that has grown.
        known = self._rows
        first = bisect_right(known, mapping.start, key=lambda row: row.end) if known else 0
        for index in range(first, len(known)):
            row = known[index]
            if row.start >= mapping.end:
                break
            if (row.mapping.device, row.mapping.inode) == (mapping.device, mapping.inode):
                return Row(mapping, row.track)
        pagemap = self._process.pagemap
        track = _rows.chosen_track(mapping, pagemap, may_be_dense=self._may_be_dense)
        return Row(mapping, track)

    def _set_rows(self, rows: list[Row]) -> None:
        self._rows, self._tracked = rows, self._packed(rows)  # both, wherever a signal comes

    def _packed(self, rows: Iterable[Row]) -> calls.TrackedRows:
        fd = self._uffd.fileno()
        if self._watch is None:
            return calls.TrackedRows(row.packed(fd) for row in rows)
        return calls.TrackedRows(row.packed(self._uffd_of(row).fileno()) for row in rows)

    def _by_uffd(self, rows: Iterable[Row]) -> list[tuple[Userfaultfd, list[Span]]]:
        """Return the ranges of rows, those of each userfaultfd together."""
        if self._watch is None:
            return [(self._uffd, _rows.merged((row.start, row.end) for row in rows))]
        found: dict[Userfaultfd, list[Span]] = {}
        for row in rows:
            found.setdefault(self._uffd_of(row), []).append((row.start, row.end))
        return [(uffd, _rows.merged(spans)) for uffd, spans in found.items()]

    def _uffd_of(self, row: Row) -> Userfaultfd:
        """Return the userfaultfd of a row: the watch's, for which each drop waits, or ours."""
        return self._watch.uffd if self._watch and is_watched(row.mapping) else self._uffd

    def _runs(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Yield rows together that are adjacent and registered with one userfaultfd.

        A process with many mappings gets its turn between two runs.
        """
        run: list[Row] = []
        for row in rows:
            if run and (
                len(run) == calls.AT_ONCE
                or run[-1].end != row.start
                or self._uffd_of(row) is not self._uffd_of(run[0])
            ):
                yield run
                run = []
            run.append(row)
        if run:
            yield run

    def _register(self, rows: list[Row]) -> tuple[list[Row], calls.TrackedRows]:
        """Register rows; return those that the kernel took, and all that it was asked for."""
        rows = self._free(rows)
        tracked = self._packed(rows)
        return self._registered(rows, tracked), tracked

    def _registered(self, rows: list[Row], tracked: calls.TrackedRows) -> list[Row]:
        """Register rows, which `tracked` has too; return those that the kernel took."""
        tracked.register()
        errors = dict(tracked.errors())
        if not _GONE.isdisjoint(errors.values()):
            self._process.check()
        for index, code in errors.items():
            self._refuse(rows[index], code)
        taken = [row for index, row in enumerate(rows) if index not in errors] if errors else rows
        # Nobody else uses one that was opened in another process for this tracker.
        if self._is_borrowed or not self._uffd.adopted:
            for uffd, spans in self._by_uffd(taken):
                uffd._note_all_protected(spans)
        return taken

    def _free(self, rows: list[Row]) -> list[Row]:
        """Return the rows that nobody else of this process has."""
        return rows if self._uffd._is_alone else [row for row in rows if self._is_free(row)]

    def _is_free(self, row: Row) -> bool:
        """Whether nobody else of this process has a row, as `Userfaultfd.register` finds out."""
        try:
            self._uffd_of(row)._before_register(row.start, row.length, RegisterMode.WP)
        except RangeBusyError:
            self._refuse(row, errno.EBUSY)
            return False
        return True

    def _refuse(self, row: Row, code: int) -> None:
        mapping = row.mapping
        reason = BlindReason.BUSY if code == errno.EBUSY else BlindReason.NOT_REGISTERED
        detail = f"{os.strerror(code)}: {mapping.path or mapping.kind.value}"
        self._refused[mapping] = Blind(row.start, row.end, reason, detail)

    def arm(self) -> None:
        """Register and protect everything for the first time."""
        wanted = self._free(self._wanted(self._mappings))
        tracked = self._packed(wanted)
        self._rows, self._tracked = wanted, tracked  # for close()
        rows = self._registered(wanted, tracked)
        if not tracked.protect(self._uffd.fileno()):
            self._process.check()  # unmapped since, some of it: the first round says so
        self._rows = rows
        self._tracked = tracked if len(tracked) == len(rows) else self._packed(rows)
        # Later rounds compare with these.
        compared = [
            row
            for row in rows
            if row.track is Track.SPARSE or (row.mapping.device and row.backing is Backing.COPIED)
        ]
        tracked = self._packed(compared)
        self._known = self._scan(tracked, 0, NO_RANGES).known
        self._is_armed = True

    def _scan(self, rows: calls.TrackedRows, flags: int, known: memoryview) -> calls.Found:
        return calls.round_(self._process.pagemap.fileno(), rows, self._flags | flags, known)

    # Rounds

    def collect(self, mappings: Mappings | None = None) -> Pending:
        """Return what was written since the last call, and protect it again.

        Args:
            mappings: All mappings, if they were read since the target has stopped.
        """
        layout = self._follow(mappings)
        # Before the scan, which sees what has been dropped by now.
        drops = self._watch.collect(self._watched()) if self._watch else None
        found = self._scan(self._tracked, 0, self._known)
        result = Pending(found.written, found.dropped, NO_RANGES, tuple(layout))
        if drops is not None:
            result = result.plus(self._with_drops(*drops))
        self._known = found.known
        errors = self._tracked.errors()
        replaced = self._replaced(layout, {index for index, _ in errors})
        if replaced:
            result = result.plus(self._new(replaced))
        if errors:
            result = result.plus(self._look_after(errors, layout))
        return result

    def _replaced(self, layout: Iterable[LayoutChange], failed: Set[int]) -> list[Row]:
        """Return the rows of new mappings that are registered already.

        The mappings of a round are read first. If one is replaced then, before it is registered,
        what came in its place is registered and reported under its name. The next round reports
        the change of mappings, and so it must report all pages again.
        """
        spans = iter(sorted((c.start, c.end) for c in layout if isinstance(c, Mapped | Moved)))
        span = next(spans, None)
        found = []
        for index, row in enumerate(self._rows):
            while span is not None and span[1] <= row.start:
                span = next(spans, None)
            if span is None:
                break
            if span[0] < row.end and index not in failed:
                found.append(row)
        return found

    def peek(self) -> Pending:
        """Return what `collect` would, and change nothing."""
        mappings = self._read_mappings()
        layout: list[LayoutChange] = []
        if mappings != self._mappings:
            layout = _layout.changes(*self._both(mappings))
        found = self._scan(self._tracked, calls.PEEK, self._known)
        unsure = _rows.packed(
            (self._rows[index].start, self._rows[index].end) for index, _ in self._tracked.errors()
        )
        if self._watch:
            watched = self._watched()
            drops = calls.intersect(self._watch.peek(watched), watched)
            unsure = calls.union(unsure, drops)
        return Pending(found.written, found.dropped, unsure, tuple(layout))

    def _watched(self) -> memoryview:
        rows = (row for row in self._rows if is_watched(row.mapping))
        return _rows.packed(_rows.merged((row.start, row.end) for row in rows))

    def _with_drops(self, still: memoryview, settled: memoryview) -> Pending:
        """Return what events report: content is unknown while it is being dropped."""
        watched = self._watched()
        still, settled = calls.intersect(still, watched), calls.intersect(settled, watched)
        if not len(settled):
            return Pending(unsure=still)
        # A hole of shared memory shows what its file has, one of private memory zeros. The marker
        # of a huge page that was protected looks like a page under migration, so it is written.
        private = [row for row in self._rows if is_watched(row.mapping) and not row.mapping.shared]
        mine = _rows.packed((row.start, row.end) for row in private)
        gathered = calls.Gathered()
        for start, end in _pairs(calls.intersect(settled, mine)):
            found = self._process.pagemap.scan(
                start, end - start, category_mask=_CONTENT, category_inverted=_CONTENT
            )
            gathered.add(found.ranges.memoryview())
        dropped = gathered.all()
        return Pending(calls.subtract(settled, dropped), dropped, still)

    def mapped(self) -> memoryview:
        """Return what is tracked, packed."""
        return _rows.packed(_rows.merged((row.start, row.end) for row in self._rows))

    def _both(self, mappings: Mappings) -> tuple[list[Mapping], list[Mapping]]:
        old, new = (
            [m for m in _rows.in_scope(which, self._scope) if _rows.is_tracked_kind(m)]
            for which in (self._mappings, mappings)
        )
        return old, new

    def _follow(self, mappings: Mappings | None) -> list[LayoutChange]:
        """Read the mappings again, and scan those that exist now."""
        if mappings is None or self._spans is not None:
            mappings = self._read_mappings()
        if mappings == self._mappings:
            return []
        layout = _layout.changes(*self._both(mappings))
        rows = self._wanted(mappings)
        self._mappings = mappings
        self._set_rows(rows)
        return layout

    def _look_after(self, errors: list[tuple[int, int]], layout: list[LayoutChange]) -> Pending:
        """Register new mappings and report them; those that cannot be read are unsure."""
        asked = [self._rows[index] for index, code in errors if code == errno.EPERM]
        new, _ = self._register(asked)
        taken = set(new)
        lost = [row for row in asked if row not in taken]
        unsure: list[Span] = [
            (self._rows[index].start, self._rows[index].end)
            for index, code in errors
            if code != errno.EPERM
        ]
        # mprotect(2) keeps the registration: without it, other memory is there.
        told = [change for change in layout if not isinstance(change, Unmapped | Protected)]
        replaced = [row for row in new if not _covered(row, told)]
        unsure += [(row.start, row.end) for row in lost if not _covered(row, told)]
        result = self._new(new)
        if lost:
            refused = set(lost)
            self._set_rows([row for row in self._rows if row not in refused])
        more = [
            change
            for row in replaced
            for change in (Unmapped(row.start, row.end), Mapped(row.start, row.end, row.mapping))
        ]
        return result.plus(Pending(NO_RANGES, NO_RANGES, _rows.packed(sorted(unsure)), tuple(more)))

    def _new(self, rows: Iterable[Row]) -> Pending:
        """Protect mappings that were just registered; report all of their pages.

        They may have been registered before. If memory that was never touched is moved beside
        other memory, the kernel joins the two, and all of it loses its registration (measured on
        Linux 6.18: userfaultfd_reset_ctx() in mremap(2)). Its pages stay protected, and so are
        not written.
        """
        huge = [row for row in rows if row.track is Track.HUGE]
        others = [row for row in rows if row.track is not Track.HUGE]
        for row in huge:
            try:
                with unexplained():
                    self._uffd_of(row).writeprotect(row)
            except UffdOSError:  # gone again: the next round says so
                self._process.check()
        whole = _rows.packed(_rows.merged((row.start, row.end) for row in huge))
        gathered = calls.Gathered()
        for run in self._runs(others):
            populated = self._process.pagemap.scan(
                run[0].start, run[-1].end - run[0].start, category_anyof_mask=_CONTENT
            )
            gathered.add(populated.ranges.memoryview())
        content = gathered.all()
        tracked = self._packed(others)
        found = self._scan(tracked, 0, NO_RANGES)
        self._known = calls.union(self._known, found.known)
        written = calls.union(calls.union(found.written, content), whole)
        unsure = _rows.packed((others[i].start, others[i].end) for i, _ in tracked.errors())
        return Pending(written, calls.subtract(found.dropped, content), unsure)

    # Blind ranges

    def blind(self) -> list[Blind]:
        """Return what cannot be seen of the mappings; the same list while they are the same."""
        known = self._gaps
        if known is not None and known[0] is self._rows and known[1] == len(self._refused):
            return known[2]
        sees_drops = self._watch is not None
        seen = [
            b for row in self._rows for b in _blind.of_mapping(row.mapping, sees_drops=sees_drops)
        ]
        found = [*seen, *self._refused.values()]
        self._gaps = self._rows, len(self._refused), found
        return found

    def close(self) -> None:
        """Unregister what was registered: closing a userfaultfd does it for all at once.

        May be called again, also if it was interrupted.
        """
        if not self._uffd.closed:  # by its owner
            if not self._is_armed:
                refused = dict(self._tracked.errors())
                self._set_rows([row for i, row in enumerate(self._rows) if i not in refused])
                self._is_armed = True  # as far as it goes, for the next close()
            self._tracked.unregister()
            if self._is_borrowed:
                self._unregister_parts([self._rows[i] for i, _ in self._tracked.errors()])
                for uffd, spans in self._by_uffd(self._rows):
                    uffd._note_all_unregistered(spans)
        if self._watch:
            self._watch.close()

    def _unregister_parts(self, rows: Sequence[Row]) -> None:
        """Unregister what is left of rows of which another userfaultfd has a part."""
        spans = [(row.start, row.end) for row in rows]
        if not spans:
            return
        with suppress(UffdOSError):  # the process is gone
            mappings = self._process._mappings_in(_rows.packed(spans))
            parts = [Row(part, Track.DENSE) for part in _rows.in_scope(mappings, spans)]
            self._packed(parts).unregister()


def _pairs(ranges: memoryview) -> Iterator[Span]:
    return zip(ranges[0::3], ranges[1::3], strict=True)


def _covered(row: Row, changes: Iterable[LayoutChange]) -> bool:
    return any(change.start <= row.start and row.end <= change.end for change in changes)


@cache
def sees_holes() -> bool:
    """Return whether one PAGEMAP_SCAN with several categories reports pages that were dropped.

    Before two fixes of July 2026 ("PAGEMAP_SCAN written state for PMD holes") it reports neither
    single pages nor page tables that are empty again. Asked of memory of this process.
    """
    length = 2 * HUGE_PAGE_2M
    wanted = PageCategory.WRITTEN | PageCategory.PRESENT | PageCategory.SWAPPED
    with (
        Userfaultfd(features=supported(), user_mode_only=True) as uffd,
        Region.anonymous(length) as region,
        Pagemap() as pagemap,
    ):
        if not uffd.features & Feature.WP_UNPOPULATED:
            return False
        uffd.register(region, mode=RegisterMode.WP)
        with suppress(UffdOSError):  # no transparent huge pages
            region.madvise(mmap.MADV_HUGEPAGE, HUGE_PAGE_2M, HUGE_PAGE_2M)
        region.write(0, b"x")
        region.write(HUGE_PAGE_2M, b"x")
        uffd.writeprotect(region)
        region.madvise(mmap.MADV_DONTNEED, 0, PAGE_SIZE)
        region.madvise(mmap.MADV_DONTNEED, HUGE_PAGE_2M, HUGE_PAGE_2M)
        found = pagemap.scan(region, category_mask=PageCategory.WRITTEN, return_mask=wanted).ranges
        return found.bytes == PAGE_SIZE + HUGE_PAGE_2M


def offered() -> Feature:
    """Return the features of this kernel."""
    return probe_api(os.O_CLOEXEC | USER_MODE_ONLY)[0]


def supported() -> Feature:
    """Return what this kernel has of the features that tracking uses."""
    return WANTED & offered()
