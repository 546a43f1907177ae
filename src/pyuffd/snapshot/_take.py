"""`take`: write a snapshot of a process."""

from __future__ import annotations

import datetime
import errno
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pyuffd import _dirty_calls as ranges
from pyuffd._abi import Feature
from pyuffd._arguments import check_int, check_seconds, shown
from pyuffd._errors import ProcessGoneError, SnapshotError, SnapshotFormatError
from pyuffd._pages import PAGE_SIZE, RangeLike, check_range, page_size_of, resolve_range
from pyuffd.dirty import DirtyTracker, _async, _rows
from pyuffd.pagemap import PageRanges
from pyuffd.remote._process import Process
from pyuffd.snapshot import _compare, _format, _sums
from pyuffd.snapshot._capture import (
    Captured,
    Method,
    Options,
    Placed,
    SnapshotProgress,
    Used,
    at_barrier,
)
from pyuffd.snapshot._core_notes import Notes
from pyuffd.snapshot._files import NewDirectory
from pyuffd.snapshot._format import CHUNK, Runs, RunState, SnapshotGap, SnapshotRun
from pyuffd.snapshot._layout import SHARED_WAYS, Shared, SnapshotLayout
from pyuffd.snapshot._lock import only_one
from pyuffd.snapshot._methods import capture
from pyuffd.snapshot._output import write_at
from pyuffd.snapshot._reading import Image

METHODS = ("auto", "cow", "precopy", "stopped")
MAX_STALL_S = 0.05


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """How a snapshot was taken.

    Attributes:
        path: Its directory.
        id: Its id.
        method: How it was taken: "cow", "precopy" or "stopped".
        reason: Why so, in one sentence.
        pause_s: How long the process stood.
        seconds: How long all of it lasted.
        bytes: Bytes of content in it, before compression.
        rounds: Rounds of copying before the stop.
        faults: Pages saved because a thread was about to write them.
        swept: Pages saved in the background.
        longest_wait_s: The longest time that a thread waited for a page to be saved.
        stop_bytes: Bytes copied while the process stood.
        dropped: Bytes that the process gave back before they were saved: their state is LOST.
        gaps: What it does not have the content of the instant of, and why.
    """

    path: str
    id: str
    method: Used
    reason: str
    pause_s: float
    seconds: float
    bytes: int
    rounds: int
    faults: int
    swept: int
    longest_wait_s: float
    stop_bytes: int
    dropped: int
    gaps: tuple[SnapshotGap, ...]

    @property
    def not_of_one_instant(self) -> tuple[SnapshotGap, ...]:
        """The gaps by shared memory: it is left out, or others wrote it meanwhile."""
        return tuple(gap for gap in self.gaps if gap.reason == "shared")


@dataclass(frozen=True, slots=True)
class Request:
    """The checked arguments of `Snapshot.take`."""

    path: str
    method: Method
    shared: Shared
    scope: Sequence[tuple[int, int]] | None
    parent: str | None
    tracker: DirtyTracker | None
    max_stall_s: float | None
    rounds: int
    rate: float | None
    durable: bool
    compress: int | None
    progress: Callable[[SnapshotProgress], None] | None


def checked(
    path: str | os.PathLike[str],
    *,
    method: Method,
    shared: Shared,
    ranges: Iterable[RangeLike] | None,
    parent: str | os.PathLike[str] | None,
    tracker: DirtyTracker | None,
    max_stall_s: float | None,
    rounds: int,
    rate: float | None,
    durable: bool,
    compress: int | None,
    progress: Callable[[SnapshotProgress], None] | None,
) -> Request:
    """Check the arguments before anything happens."""
    if method not in METHODS:
        raise ValueError(f"method {shown(method)} is not one of {', '.join(METHODS)}")
    if shared not in SHARED_WAYS:
        raise ValueError(f"shared {shown(shared)} is not one of {', '.join(SHARED_WAYS)}")
    if tracker is not None and (method not in ("auto", "precopy") or tracker.method != "wp-async"):
        raise ValueError("tracker: needs method='precopy' or 'auto', and one that is wp-async")
    if rate is not None and not rate > 0:
        raise ValueError(f"rate {shown(rate)} must be above zero, in bytes a second")
    check_int("rounds", rounds, 1)
    if compress is not None:
        check_int("compress", compress, 1, 22)
        _sums.compressor(compress)
    name = Path(os.path.abspath(path))
    if not name.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(name.parent))
    return Request(
        str(name),
        method,
        shared,
        None if ranges is None else spans_of(ranges),
        None if parent is None else os.fspath(parent),
        tracker,
        None if max_stall_s is None else check_seconds("max_stall_s", max_stall_s),
        rounds,
        rate,
        durable,
        compress,
        progress,
    )


def spans_of(items: Iterable[RangeLike]) -> list[tuple[int, int]]:
    """Return ranges, checked and merged, as (start, end)."""
    found = []
    for item in items:
        start, length = resolve_range(item, None, name="ranges")
        check_range(start, length, page_size_of(item))
        found.append((start, start + length))
    if not found:
        raise ValueError("no ranges to take a snapshot of")
    return _rows.merged(found)


def take(process: Process, request: Request) -> SnapshotReport:
    """Write a snapshot; see `Snapshot.take`."""
    begin = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(only_one(process))
        parent = None
        if request.parent is not None:
            parent = stack.enter_context(Image(request.parent))
            _check_parent(parent, process, request.tracker)
        identity = identity_of(process)
        layout = SnapshotLayout(process, request.shared, request.scope)
        layout(process.mappings())  # refuses what it refuses before anything is done
        layout.find_lazy()
        directory = stack.enter_context(NewDirectory(request.path, durable=request.durable))
        at_barrier("begun")
        method, reason = _chosen(request)
        captured = None
        since = None if request.tracker is None else request.tracker._snapshot
        try:
            notes = None if request.scope is not None else Notes(process)
            captured = _captured(process, layout, directory, request, method, notes)
            at_barrier("captured")
            if captured.method != method:
                reason = "the process writes too fast for precopy"
            report = _finish(
                identity, layout, directory, request, captured, reason, parent, begin, notes
            )
        except BaseException as error:
            _put_back(request.tracker, captured, since)
            if isinstance(error, ProcessGoneError):
                raise SnapshotError(
                    "ended", f"process {process.pid} has exited, or replaced its memory (execve)"
                ) from error
            raise
        if request.tracker is not None:
            request.tracker._snapshot = directory.id
        return report


def _put_back(tracker: DirtyTracker | None, captured: Captured | None, since: str | None) -> None:
    """Let the tracker report again what was to be in this snapshot."""
    if tracker is None:
        return
    if captured is not None and captured.changes is not None:
        tracker._put_back(captured.changes)
    tracker._snapshot = since


def _check_parent(parent: Image, process: Process, tracker: DirtyTracker | None) -> None:
    if tracker is not None and tracker._snapshot != parent.id:
        raise SnapshotError(
            "parent",
            f"the tracker does not report what was written since {parent.path}: that must be the"
            " last snapshot taken with this tracker, with no other commit() since",
        )
    identity = identity_of(process)
    if (parent.pid, parent.start_ticks) != (identity["pid"], identity["start_ticks"]):
        raise SnapshotError("parent", f"{parent.path} is a snapshot of another process")


def _chosen(request: Request) -> tuple[Used, str]:
    if request.method != "auto":
        return request.method, "it was asked for"
    if request.tracker is not None:
        return "precopy", "the tracker tells what is written"
    if _async.supported() & Feature.WP_ASYNC:
        return "precopy", "the process does not wait for us, and this kernel has WP_ASYNC"
    return (
        "stopped",
        "this kernel has no WP_ASYNC (Linux 6.7), and no PAGEMAP_SCAN, which others need",
    )


def _captured(
    process: Process,
    layout: SnapshotLayout,
    directory: NewDirectory,
    request: Request,
    method: Used,
    notes: Notes | None,
) -> Captured:
    """Capture; if precopy was chosen here and does not get ahead, cow does."""
    try:
        return _captured_by(process, layout, directory, request, method, notes)
    except SnapshotError as error:
        may_change = request.method == "auto" and request.tracker is None
        if error.reason != "stalled" or not may_change or method == "cow":
            raise
    os.ftruncate(directory.pages.number, 0)
    return _captured_by(process, layout, directory, request, "cow", notes)


def _captured_by(
    process: Process,
    layout: SnapshotLayout,
    directory: NewDirectory,
    request: Request,
    method: Used,
    notes: Notes | None,
) -> Captured:
    options = Options(
        max_stall_s=MAX_STALL_S if request.max_stall_s is None else request.max_stall_s,
        stopped_s=math.inf if request.max_stall_s is None else request.max_stall_s,
        rounds=request.rounds,
        rate=request.rate,
        progress=request.progress,
        in_stop=None if notes is None else notes.in_stop,
    )
    return capture(
        process,
        layout,
        directory.pages.number,
        method=method,
        options=options,
        tracker=request.tracker,
        only_changes=request.tracker is not None and request.parent is not None,
    )


def _finish(
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
    if parent is not None and request.tracker is None:
        of_parent = _compare.unchanged(parent, captured, directory.pages.number)
        captured.data = ranges.subtract(captured.data, of_parent)
        captured.zero = ranges.subtract(captured.zero, of_parent)
        _compare.free(captured.layout, of_parent, directory.pages.number)
    elif parent is not None:
        of_parent = _rest(layout, captured, parent)
    unfilled = ranges.intersect(_unknown(layout, captured), layout.lazy.memoryview())
    unfilled = ranges.subtract(unfilled, of_parent)
    gaps = (*layout.gaps, *_lost_gaps(captured), *_gaps(unfilled, "unfilled"))
    captured.lost = ranges.union(captured.lost, unfilled)
    sum_name, sum_ = _sums.best_sum()
    runs = list(_runs(layout, captured, of_parent))
    runs = _stored(directory, runs, sum_, request)
    directory.sync_pages()
    at_barrier("pages")
    packed = Runs.of(runs).pack()
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
        dropped=captured.dropped,
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
    directory.settle()
    at_barrier("settled")
    return replace(report, seconds=time.perf_counter() - begin)


def _rest(layout: SnapshotLayout, captured: Captured, parent: Image) -> memoryview:
    """Return what a tracker did not report: it is as in the parent."""
    rest = ranges.subtract(_unknown(layout, captured), captured.absent)
    theirs = PageRanges.of((region.start, region.end) for region in parent.regions)
    return ranges.intersect(rest, theirs.memoryview())


def _unknown(layout: SnapshotLayout, captured: Captured) -> memoryview:
    """Return the pages that have no content in this snapshot."""
    rest = PageRanges.of((m.start, m.end) for m in layout.mappings).memoryview()
    for known in (captured.data, captured.zero, captured.lost):
        rest = ranges.subtract(rest, known)
    return ranges.subtract(rest, layout.skipped.memoryview())


def _lost_gaps(captured: Captured) -> Iterator[SnapshotGap]:
    return _gaps(captured.lost, "dropped" if captured.method == "cow" else "unreadable")


def _gaps(packed: memoryview, reason: str) -> Iterator[SnapshotGap]:
    for each in PageRanges(packed):
        yield SnapshotGap(each.start, each.length, reason)


def _runs(
    layout: SnapshotLayout, captured: Captured, of_parent: memoryview
) -> Iterator[SnapshotRun]:
    """Yield a run for every part of every mapping, in order; data in chunks."""
    spans = [
        (each.start, each.end, state)
        for state, found in (
            (RunState.DATA, captured.data),
            (RunState.ZERO, captured.zero),
            (RunState.LOST, captured.lost),
            (RunState.PARENT, of_parent),
            (RunState.SHARED, layout.skipped.memoryview()),
        )
        for each in PageRanges(found)
    ]
    spans.sort()
    parts = iter(captured.layout)
    part = next(parts, None)
    at = 0
    for mapping in layout.mappings:
        reached = mapping.start
        while at < len(spans) and spans[at][0] < mapping.end:
            start, end, state = spans[at]
            first, last = max(start, mapping.start), min(end, mapping.end)
            if last > first:
                if first > reached:
                    yield SnapshotRun(reached, first - reached, RunState.ABSENT)
                if state is not RunState.DATA:
                    yield SnapshotRun(first, last - first, state)
                else:
                    while first < last:
                        while part is not None and part.end <= first:
                            part = next(parts, None)
                        assert part is not None
                        stop = min(last, part.end, (first // CHUNK + 1) * CHUNK)
                        yield SnapshotRun(
                            first,
                            stop - first,
                            state,
                            part.offset + first - part.start,
                            stop - first,
                        )
                        first = stop
                reached = last
            if end > mapping.end:
                break
            at += 1
        if reached < mapping.end:
            yield SnapshotRun(reached, mapping.end - reached, RunState.ABSENT)


def _stored(
    directory: NewDirectory, runs: list[SnapshotRun], sum_: _sums.Sum, request: Request
) -> list[SnapshotRun]:
    """Read the content back for its checksums; compress it, if that was asked for."""
    data = [(index, run) for index, run in enumerate(runs) if run.state is RunState.DATA]
    progress = SnapshotProgress("sums", 0, sum(run.length for _, run in data))
    compress = None if request.compress is None else _sums.compressor(request.compress)
    target = None if compress is None else directory.replace_pages()
    offset = 0
    for index, run in data:
        content = os.pread(directory.pages.number, run.length, run.offset)
        if len(content) != run.length:
            raise SnapshotFormatError(request.path, "the file has become shorter", run.offset)
        run = run._replace(checksum=sum_(content))
        if target is not None and compress is not None:
            packed = compress(content)
            if len(packed) >= run.length:
                packed = content
            write_at(target.number, packed, offset)
            run = run._replace(offset=offset, stored=len(packed))
            offset += len(packed)
        runs[index] = run
        progress.bytes += run.length
        if request.progress is not None:
            request.progress(progress)
    if target is not None:
        directory.pages_replaced(target)
    return runs


def identity_of(process: Process) -> dict[str, Any]:
    """Return what a process is; pid and start time name it until the next boot."""
    stat = Path(f"/proc/{process.pid}/stat").read_bytes().decode(errors="replace")
    before, _, after = stat.rpartition(")")
    words = Path(f"/proc/{process.memory_tid}/cmdline").read_bytes().split(b"\0")
    try:
        exe = os.readlink(f"/proc/{process.memory_tid}/exe")
    except OSError:
        exe = ""
    return {
        "pid": process.pid,
        "name": before.partition("(")[2],
        "start_ticks": int(after.split()[19]),
        "exe": exe,
        "arguments": [os.fsdecode(word) for word in words[:-1]],
    }


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
        yield {
            "start": mapping.start,
            "length": mapping.length,
            "permissions": mapping.permissions,
            "kind": mapping.kind.value,
            "path": mapping.path,
            "file_offset": mapping.offset,
            "device": mapping.device,
            "inode": mapping.inode,
            "page_size": mapping.page_size,
            "places": places.get(mapping.start, []),
        }
