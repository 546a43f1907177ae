"""Tracking by write-protect faults, which the engine resolves: each first write waits for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from pyuffd import _dirty_calls as calls
from pyuffd._abi import Feature, PageBit, RegisterMode
from pyuffd._dirty_calls import Track
from pyuffd._errors import LayoutChangedError, UffdOSError
from pyuffd._rows import state_runs
from pyuffd._uffd import Userfaultfd
from pyuffd.dirty import _blind, _layout, _rows
from pyuffd.dirty._blind import Blind, BlindReason
from pyuffd.dirty._round import Pending
from pyuffd.dirty._rows import Row, Span
from pyuffd.handlers import Handler, PageState
from pyuffd.remote._mappings import Mapping, Mappings, clipped
from pyuffd.remote._process import Process

# Without EVENT_REMAP: memory that moves is then no longer registered, and is served again.
WANTED = (
    Feature.PAGEFAULT_FLAG_WP
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.WP_UNPOPULATED
    | Feature.EVENT_REMOVE
    | Feature.EVENT_UNMAP
)
NEEDED = Feature.PAGEFAULT_FLAG_WP

_AS_WRITTEN = (PageState.DIRTY, PageState.IN_FLIGHT)
NO_RANGES = calls.NO_RANGES
_READ_BYTES = 1 << 30


class SyncMethod:
    """The mappings of a process inside a scope, served for write-protect faults."""

    def __init__(self, process: Process, uffd: Userfaultfd, scope: Sequence[Span] | None) -> None:
        self._process = process
        self._scope = scope
        self._refused: dict[Mapping, Blind] = {}
        self._rows: list[Row] = []
        self._mappings: Mappings = process.mappings()
        self._handler = Handler(uffd, driver="native")

    def arm(self) -> None:
        """Serve and protect everything for the first time; `close` ends that, also if it raised."""
        self._handler.start()
        for mapping in _rows.in_scope(self._mappings, self._scope):
            self._serve(mapping)

    def _serve(self, mapping: Mapping, fresh: calls.Gathered | None = None) -> bool:
        """Serve and protect a mapping; note the reason if that is refused.

        `fresh` gets its pages with content: all but the holes of private anonymous memory.
        """
        if mapping in self._refused:
            return False
        row = Row(mapping, Track.DENSE)
        reason = BlindReason.NOT_REGISTERED
        try:
            if not _rows.is_tracked_kind(mapping):
                reason, detail = BlindReason.SPECIAL, mapping.path
            else:
                self._handler.serve(row, None, mode=RegisterMode.WP)
                # Afterwards protected holes look like pages on swap.
                if fresh is not None and not mapping.has_file and not mapping.shared:
                    populated = self._with_content(mapping, PageBit.PRESENT, PageBit.SWAP)
                    self._handler.writeprotect(row)
                    fresh.add(self._populated(mapping, populated))
                else:
                    self._handler.writeprotect(row)
                    if fresh is not None:
                        fresh.add(_rows.packed([(row.start, row.end)]))
                self._rows.append(row)
                return True
        except UffdOSError as error:
            if error.errno == errno.EBUSY:
                reason = BlindReason.BUSY
            detail = f"{os.strerror(error.errno or 0)}: {mapping.path or mapping.kind.value}"
        self._refused[mapping] = Blind(mapping.start, mapping.end, reason, detail)
        return False

    def _populated(self, mapping: Mapping, before: memoryview) -> memoryview:
        """Return the pages that had content when they were protected; `before`: earlier."""
        after = self._with_content(mapping, PageBit.PRESENT)
        if _swapped(
            self._process.memory_tid
        ):  # one of them may have been written and swapped since
            return _rows.packed([(mapping.start, mapping.end)])
        return calls.union(before, after)

    def _with_content(self, mapping: Mapping, *bits: PageBit) -> memoryview:
        found = calls.Gathered()
        for start in range(mapping.start, mapping.end, _READ_BYTES):
            entries = self._process.pagemap.read(start, min(_READ_BYTES, mapping.end - start))
            for bit in bits:
                found.add(entries.where(bit).memoryview())
        return found.all()

    def collect(self, mappings: Mappings | None = None) -> Pending:
        """Return what was written since the last call, and protect it again.

        Args:
            mappings: All mappings, if they were read since the target has stopped.
        """
        if mappings is None:
            mappings = self._process.mappings()
        written, dropped = calls.Gathered(), calls.Gathered()
        gone = []
        for row in self._rows:
            try:
                states = self._handler.writeprotect(row)
            except (LayoutChangedError, ValueError):
                gone.append(row)
                continue
            more = self._split(row, states)
            written.add(more.written)
            dropped.add(more.dropped)
        result = Pending(written.all(), dropped.all())
        if mappings != self._mappings or gone:
            result = result.plus(self._follow(mappings, gone))
        return result

    def peek(self) -> Pending:
        """Return what `collect` would, and change nothing."""
        written, dropped, unsure = calls.Gathered(), calls.Gathered(), calls.Gathered()
        for row in self._rows:
            try:
                found = self._split(row, self._handler.page_states(row))
            except (LayoutChangedError, ValueError):
                unsure.add(_rows.packed([(row.start, row.end)]))
            else:
                written.add(found.written)
                dropped.add(found.dropped)
        return Pending(written.all(), dropped.all(), unsure.all())

    def _follow(self, mappings: Mappings, gone: Iterable[Row]) -> Pending:
        """Serve new mappings, and forget those that are gone."""
        old, new = (
            [m for m in _rows.in_scope(which, self._scope) if _rows.is_tracked_kind(m)]
            for which in (self._mappings, mappings)
        )
        layout = _layout.changes(old, new)
        self._mappings = mappings
        gone = frozenset(gone)
        self._rows = [row for row in self._rows if row not in gone]
        for row in gone:
            with suppress(UffdOSError, ValueError):
                self._handler.unserve(row)
        served = _rows.packed(sorted((row.start, row.end) for row in self._rows))
        fresh = calls.Gathered()
        unserved: list[Span] = []
        again: list[Span] = []
        for mapping in new:
            place = (mapping.start, mapping.end)
            rest = calls.subtract(_rows.packed([place]), calls.around(served, *place))
            for start, end in zip(rest[0::3], rest[1::3], strict=True):
                part = clipped(mapping, start, end)
                was_served = any(row.start < end and start < row.end for row in gone)
                if self._serve(part, fresh):
                    again += [(start, end)] if was_served else []
                elif was_served:
                    unserved.append((start, end))
        written = calls.union(_rows.packed(_rows.merged(unserved)), fresh.all())
        # What has no content any more, where other memory or none of it was before.
        dropped = calls.subtract(_rows.packed(_rows.merged(again)), written)
        return Pending(written, dropped, NO_RANGES, tuple(layout))

    def mapped(self) -> memoryview:
        """Return what is tracked, packed."""
        return _rows.packed(_rows.merged((row.start, row.end) for row in self._rows))

    def blind(self) -> list[Blind]:
        """Return what cannot be seen of the mappings."""
        seen = [b for row in self._rows for b in _blind.of_mapping(row.mapping, sees_drops=True)]
        return [*seen, *self._refused.values()]

    def close(self) -> None:
        """Stop the engine: the protection is lifted and the ranges are unregistered."""
        self._handler.stop()

    def _split(self, row: Row, states: bytes) -> Pending:
        """Return the written and the dropped pages of a row."""
        written = NO_RANGES
        for state in _AS_WRITTEN:
            runs = state_runs(states, row.start, row.page_size, state)
            written = calls.union(written, runs)
        removed = state_runs(states, row.start, row.page_size, PageState.REMOVED)
        if row.mapping.has_file:
            return Pending(calls.union(written, removed))
        # The event of MADV_FREE is the same, and its pages keep their content until reclaim.
        gathered = calls.Gathered()
        for start, end in zip(removed[0::3], removed[1::3], strict=True):
            entries = self._process.pagemap.read(start, end - start)
            gathered.add(entries.where(PageBit.PRESENT).memoryview())
        present = gathered.all()
        return Pending(calls.union(written, present), calls.subtract(removed, present))


def _swapped(tid: int) -> bool:
    """Whether a process has pages on swap; True if the kernel does not tell.

    VmSwap of /proc/PID/status is a sum over CPUs that may be some pages behind; this walks the
    page tables.
    """
    try:
        lines = Path(f"/proc/{tid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return True
    return next((line.split()[1] != "0" for line in lines if line.startswith("Swap:")), True)
