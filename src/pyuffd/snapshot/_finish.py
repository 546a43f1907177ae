"""What follows the capture: states, checksums, tables and the manifest; the process runs."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, repeat
from typing import Any

from pyuffd import _dirty_calls as ranges
from pyuffd._errors import SnapshotFormatError
from pyuffd._owned import Descriptor
from pyuffd._pages import PAGE_SIZE
from pyuffd.pagemap import PageRanges
from pyuffd.snapshot import _compare, _format, _sums
from pyuffd.snapshot._capture import Captured, Placed, SnapshotProgress, at_barrier
from pyuffd.snapshot._core_notes import Notes
from pyuffd.snapshot._file_pages import is_huge_without_a_file
from pyuffd.snapshot._files import NewDirectory
from pyuffd.snapshot._format import CHUNK, NUMBERS, PAGES, Row, Runs, RunState, SnapshotGap
from pyuffd.snapshot._gently import gently
from pyuffd.snapshot._layout import SnapshotLayout
from pyuffd.snapshot._output import write_at
from pyuffd.snapshot._reading import Image, reader
from pyuffd.snapshot._request import Request, SnapshotReport

_DATA, _ABSENT = NUMBERS[RunState.DATA], NUMBERS[RunState.ABSENT]
# Chunks between two looks at Ctrl-C, and at how far it is.
_AT_ONCE = 16


def finish(
    identity: dict[str, Any],
    layout: SnapshotLayout,
    directory: NewDirectory,
    request: Request,
    captured: Captured,
    reason: str,
    parent: Image | None,
    begin: float,
    notes: Notes | None,
) -> SnapshotReport:
    """Sums, tables, and the name; the process runs."""
    of_parent = ranges.NO_RANGES
    if parent is not None and request.tracker is not None:
        of_parent = _rest(layout, captured, parent)
    with directory.named(PAGES):
        layout.private_files.fill(
            captured,
            ranges.subtract(_unknown(layout, captured), of_parent),
            layout.lazy.memoryview(),
            directory.pages.number,
            request.rate,
            request.progress,
        )
    if parent is not None and request.tracker is None:
        of_parent = _compare.unchanged(parent, captured, directory.pages.number)
        captured.data = ranges.subtract(captured.data, of_parent)
        captured.zero = ranges.subtract(captured.zero, of_parent)
        with directory.named(PAGES):
            _compare.free(captured.layout, of_parent, directory.pages.number)
    unfilled = ranges.intersect(_unknown(layout, captured), layout.lazy.memoryview())
    unfilled = ranges.subtract(unfilled, of_parent)
    gaps = (*layout.gaps, *_lost_gaps(captured), *_gaps(unfilled, "unfilled"))
    captured.lost = ranges.union(captured.lost, unfilled)
    sum_name, sum_ = _sums.best_sum()
    rows = list(_rows(layout, captured, of_parent))
    directory.begin_sync()
    _stored(directory, rows, sum_, request)
    directory.sync_pages()
    at_barrier("pages")
    packed = Runs.of_rows(rows).pack()
    directory.write(_format.RUNS, packed)
    of_threads = None if notes is None else notes.pack()
    if of_threads is not None:
        directory.write(_format.NOTES, of_threads)
    report = SnapshotReport(
        path=request.path,
        id=directory.id,
        method=captured.method,
        reason=reason,
        pause_s=captured.pause_s,
        seconds=time.perf_counter() - begin,
        bytes=PageRanges(captured.data).bytes,
        rounds=captured.rounds,
        faults=captured.faults,
        swept=captured.swept,
        longest_wait_s=captured.longest_wait_s,
        stop_bytes=captured.stop_bytes,
        dropped=PageRanges(captured.dropped).bytes,
        gaps=gaps,
    )
    manifest = _manifest(identity, layout, captured, report, parent)
    manifest |= {
        "checksum": sum_name,
        "compression": None if request.compress is None else "zstd",
        "pages_bytes": os.fstat(directory.pages.number).st_size,
        "runs_sha256": hashlib.sha256(packed).hexdigest(),
        "notes_bytes": None if of_threads is None else len(of_threads),
        "notes_sha256": None if of_threads is None else hashlib.sha256(of_threads).hexdigest(),
    }
    directory.write(_format.MANIFEST, _format.seal(manifest))
    at_barrier("written")
    directory.settle(request.progress)
    at_barrier("settled")
    return replace(report, seconds=time.perf_counter() - begin)


def _rest(layout: SnapshotLayout, captured: Captured, parent: Image) -> memoryview:
    """Return what a tracker did not report: it is as in the parent."""
    rest = ranges.subtract(_unknown(layout, captured), captured.absent)
    theirs = PageRanges.of((region.start, region.end) for region in parent.regions)
    rest = ranges.intersect(rest, theirs.memoryview())
    # Their file had a name then: it was not read.
    mine = ranges.intersect(rest, layout.private_files.spans())
    unread = (
        (known.start, known.end)
        for each in PageRanges(mine)
        for known in parent.parts(each.start, each.end)
        if known.run is None or known.run.state is RunState.ABSENT
    )
    return ranges.subtract(rest, PageRanges.of(unread).memoryview())


def _unknown(layout: SnapshotLayout, captured: Captured) -> memoryview:
    """Return the pages that have no content in this snapshot."""
    rest = PageRanges.of((m.start, m.end) for m in layout.mappings).memoryview()
    for known in (captured.data, captured.zero, captured.lost):
        rest = ranges.subtract(rest, known)
    return ranges.subtract(rest, layout.skipped.memoryview())


def _lost_gaps(captured: Captured) -> Iterator[SnapshotGap]:
    unreadable = ranges.subtract(captured.lost, captured.dropped)
    yield from _gaps(ranges.intersect(captured.lost, captured.dropped), "dropped")
    yield from _gaps(ranges.subtract(unreadable, captured.unseen), "unreadable")
    yield from _gaps(ranges.intersect(unreadable, captured.unseen), "unseen")


def _gaps(packed: memoryview, reason: str) -> Iterator[SnapshotGap]:
    for each in PageRanges(packed):
        yield SnapshotGap(each.start, each.length, reason)


def _rows(layout: SnapshotLayout, captured: Captured, of_parent: memoryview) -> Iterator[Row]:
    """Yield a run for every part of every mapping, in order; data in chunks."""
    spans = sorted(
        chain.from_iterable(
            zip(found[0::3], found[1::3], repeat(NUMBERS[state]))
            for state, found in (
                (RunState.DATA, captured.data),
                (RunState.ZERO, captured.zero),
                (RunState.LOST, captured.lost),
                (RunState.PARENT, of_parent),
                (RunState.SHARED, layout.skipped.memoryview()),
            )
        )
    )
    parts = iter(captured.layout)
    part = next(parts, None)
    at = 0
    for mapping in layout.mappings:
        reached, behind = mapping.start, mapping.end
        while at < len(spans) and spans[at][0] < behind:
            start, end, state = spans[at]
            first, last = max(start, reached), min(end, behind)
            if last > first:
                if first > reached:
                    yield reached, first - reached, _ABSENT, 0, 0, 0
                if state != _DATA:
                    yield first, last - first, state, 0, 0, 0
                else:
                    while first < last:
                        while part is not None and part.end <= first:
                            part = next(parts, None)
                        assert part is not None
                        stop = min(last, part.end, (first // CHUNK + 1) * CHUNK)
                        size = stop - first
                        yield first, size, _DATA, part.offset + first - part.start, size, 0
                        first = stop
                reached = last
            if end > behind:
                break
            at += 1
        if reached < behind:
            yield reached, behind - reached, _ABSENT, 0, 0, 0


def _stored(directory: NewDirectory, rows: list[Row], sum_: _sums.Sum, request: Request) -> None:
    """Read the content back for its checksums; compress it, if that was asked for."""
    data = [(index, row) for index, row in enumerate(rows) if row[2] == _DATA]
    progress = SnapshotProgress("sums", 0, sum(row[1] for _, row in data))
    target = None if request.compress is None else directory.replace_pages()
    stored = _Stored(directory, rows, sum_, request.compress, target)
    for first in range(0, len(data), _AT_ONCE):
        progress.bytes += gently(partial(stored.add, data[first : first + _AT_ONCE]))
        if request.progress is not None:
            request.progress(progress)
    if target is not None:
        directory.pages_replaced(target)


class _Stored:
    """Puts places and sums of chunks into rows; compresses them to a new file, if there is one."""

    def __init__(
        self,
        directory: NewDirectory,
        rows: list[Row],
        sum_: _sums.Sum,
        level: int | None,
        target: Descriptor | None,
    ) -> None:
        self._directory = directory
        self._rows = rows
        self._sum = sum_
        self._target = target
        self._compress = None if level is None else _sums.compressor(level)
        self._written = 0

    def add(self, data: Sequence[tuple[int, Row]]) -> int:
        """Read some chunks; return their bytes."""
        for index, (start, length, state, offset, stored, _) in data:
            content = reader.read(self._directory.pages.number, length, offset)
            if len(content) != length:
                raise SnapshotFormatError(
                    str(self._directory.path), "the file has become shorter", offset
                )
            checksum = self._sum(content)
            if self._target is not None and self._compress is not None:
                packed = self._compress(content)
                if len(packed) >= length:
                    packed = content
                with self._directory.named(PAGES):
                    write_at(self._target.number, packed, self._written)
                offset, stored = self._written, len(packed)
                self._written += stored
            self._rows[index] = (start, length, state, offset, stored, checksum)
        return sum(row[1] for _, row in data)


def _manifest(
    identity: dict[str, Any],
    layout: SnapshotLayout,
    captured: Captured,
    report: SnapshotReport,
    parent: Image | None,
) -> dict[str, Any]:
    instant = datetime.datetime.fromtimestamp(captured.instant_ns / 1e9, datetime.UTC)
    facts = asdict(report)
    del facts["path"], facts["id"], facts["gaps"], facts["method"], facts["reason"]
    return {
        "format": _format.FORMAT,
        "version": _format.VERSION,
        "id": report.id,
        "parent": None
        if parent is None
        else {
            "id": parent.id,
            "sha256": parent.manifest_sha256,
            "path": os.path.relpath(parent.path, os.path.dirname(report.path)),
        },
        "depth": 0 if parent is None else parent.depth + 1,
        "target": identity,
        "kernel": platform.release(),
        "page_size": PAGE_SIZE,
        "chunk_bytes": CHUNK,
        "instant": instant.isoformat(),
        "instant_ns": captured.instant_ns,
        "method": report.method,
        "reason": report.reason,
        "regions": list(_regions(layout, captured.layout)),
        "gaps": [asdict(gap) for gap in report.gaps],
        "facts": facts,
    }


def _regions(layout: SnapshotLayout, placed: Sequence[Placed]) -> Iterator[dict[str, Any]]:
    places: dict[int, list[list[int]]] = {}
    for part in placed:
        places.setdefault(part.mapping.start, []).append([part.start, part.end, part.offset])
    for mapping in layout.mappings:
        # The kernel's own file behind private huge pages holds nothing.
        has_file = not is_huge_without_a_file(mapping)
        yield {
            "start": mapping.start,
            "length": mapping.length,
            "permissions": mapping.permissions,
            "kind": mapping.kind.value,
            "path": mapping.path,
            "file_offset": mapping.offset,
            "device": mapping.device if has_file else 0,
            "inode": mapping.inode if has_file else 0,
            "page_size": mapping.page_size,
            "places": places.get(mapping.start, []),
        }
