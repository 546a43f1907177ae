"""`take`: write a snapshot of a process."""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pyuffd import _dirty_calls as ranges
from pyuffd._abi import Feature
from pyuffd._errors import ProcessGoneError, SnapshotError
from pyuffd.dirty import DirtyTracker, _async, _rows
from pyuffd.remote._process import Process
from pyuffd.snapshot._capture import Captured, Options, Used, at_barrier
from pyuffd.snapshot._files import NewDirectory, check_absent
from pyuffd.snapshot._finish import finish
from pyuffd.snapshot._format import PAGES
from pyuffd.snapshot._in_stop import InStop
from pyuffd.snapshot._layout import SnapshotLayout
from pyuffd.snapshot._lock import only_one
from pyuffd.snapshot._methods import capture
from pyuffd.snapshot._reading import Image
from pyuffd.snapshot._request import MAX_STALL_S, Request, SnapshotReport


def take(process: Process, request: Request) -> SnapshotReport:
    """Write a snapshot; see `Snapshot.take`."""
    _check_tracker(request, process)
    try:
        process.check()
        return _taken(process, request)
    except (ProcessGoneError, FileNotFoundError, ProcessLookupError) as error:
        if process.is_running:
            raise
        raise SnapshotError(
            "ended", f"process {process.pid} has exited, or replaced its memory (execve)"
        ) from error


def _taken(process: Process, request: Request) -> SnapshotReport:
    begin = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(only_one(process))
        parent = None
        if request.parent is not None:
            parent = stack.enter_context(Image(request.parent))
            _check_parent(parent, process, request.tracker)
        identity = identity_of(process)
        layout = SnapshotLayout(process, request.shared, request.scope)
        stack.enter_context(layout.private_files)
        layout(process.mappings())  # refuses what it refuses before anything is done
        layout.find_lazy(request.tracker)
        directory = NewDirectory(request.path, durable=request.durable)
        stack.push(directory)  # a signal's exception may come as soon as it is there
        directory.make()
        at_barrier("begun")
        method, reason = _chosen(request)
        captured = None
        since = None if request.tracker is None else request.tracker._snapshot
        try:
            with directory.named(PAGES):
                in_stop = InStop(process, layout, directory, request)
                captured = _captured(process, layout, directory, request, method, in_stop)
                at_barrier("captured")
                layout.find_lazy_since(request.tracker)
                in_stop.add_to(captured)
            if captured.method != method:
                reason = "the process writes too fast for precopy"
            report = finish(
                identity, layout, directory, request, captured, reason, parent, begin, in_stop.notes
            )
        except BaseException:
            _put_back(request.tracker, captured, since)
            raise
        if request.tracker is not None:
            request.tracker._snapshot = directory.id
        return report


def check(process: Process, request: Request) -> None:
    """Raise what `take` raises because of names that exist, or do not."""
    check_absent(request.path)
    if request.parent is not None:
        with Image(request.parent) as parent:
            _check_parent(parent, process, request.tracker)


def _put_back(tracker: DirtyTracker | None, captured: Captured | None, since: str | None) -> None:
    """Let the tracker report again what was to be in this snapshot."""
    if tracker is None:
        return
    if captured is not None and captured.changes is not None:
        tracker._put_back(captured.changes)
    tracker._snapshot = since


def _check_tracker(request: Request, process: Process) -> None:
    """Raise ValueError for a tracker that does not see all of the memory, or sees other memory."""
    tracker = request.tracker
    if tracker is None:
        return
    tracker._check_open()
    if tracker._process.pid != process.pid:
        raise ValueError(
            f"tracker: {tracker!r} does not track process {process.pid}, of which the snapshot is"
        )
    if tracker._scope is None:
        return
    if request.scope is None:
        raise ValueError("tracker: it tracks parts of the memory: give the same ranges=")
    unseen = ranges.subtract(_rows.packed(request.scope), _rows.packed(tracker._scope))
    if len(unseen):
        raise ValueError(
            f"tracker: it does not track all that is to be saved: [{unseen[0]:#x}, {unseen[1]:#x})"
            " is missing"
        )


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
    in_stop: InStop,
) -> Captured:
    """Capture; if precopy was chosen here and does not get ahead, cow does."""
    try:
        return _captured_by(process, layout, directory, request, method, in_stop)
    except SnapshotError as error:
        may_change = request.method == "auto" and request.tracker is None
        if error.reason != "stalled" or not may_change or method == "cow" or in_stop.is_too_long:
            raise
    os.ftruncate(directory.pages.number, 0)
    return _captured_by(process, layout, directory, request, "cow", in_stop)


def _captured_by(
    process: Process,
    layout: SnapshotLayout,
    directory: NewDirectory,
    request: Request,
    method: Used,
    in_stop: InStop,
) -> Captured:
    in_stop.limit_s = request.max_stall_s
    if method != "stopped":
        in_stop.ahead()
        at_barrier("ahead")
    options = Options(
        max_stall_s=MAX_STALL_S if request.max_stall_s is None else request.max_stall_s,
        stopped_s=math.inf if request.max_stall_s is None else request.max_stall_s,
        rounds=request.rounds,
        rate=request.rate,
        durable=request.durable,
        progress=request.progress,
        in_stop=in_stop,
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
