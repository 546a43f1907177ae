"""What `Snapshot.take` is asked for, checked, and what it answers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyuffd._arguments import check_bools, check_int, check_path, check_rate, check_seconds, shown
from pyuffd._pages import RangeLike
from pyuffd.dirty import DirtyTracker, _rows
from pyuffd.snapshot import _sums
from pyuffd.snapshot._capture import Method, SnapshotProgress, Used
from pyuffd.snapshot._format import SnapshotGap
from pyuffd.snapshot._layout import SHARED_WAYS, Shared

METHODS = ("auto", "cow", "precopy", "stopped")
TAKING = "take a snapshot of"
MAX_STALL_S = 0.05


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """How a snapshot was taken.

    Attributes:
        path: Its directory.
        id: Its id.
        method: How it was taken: "cow", "precopy" or "stopped".
        reason: Why so, in one sentence.
        pause_s: How long the process was stopped.
        seconds: How long all of it took; of this process, with the start of the helper process.
        bytes: Bytes of content in it, before compression.
        rounds: Rounds of copying before the stop.
        faults: Pages saved because a thread was about to write them.
        swept: Pages saved in the background.
        longest_wait_s: The longest time that a thread waited for a page to be saved.
        stop_bytes: Bytes read while it was stopped; of shared memory only changes are written.
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
    if tracker is not None and not isinstance(tracker, DirtyTracker):
        raise TypeError(f"tracker must be a DirtyTracker, not {shown(tracker)}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function, not {shown(progress)}")
    if tracker is not None and (method not in ("auto", "precopy") or tracker.method != "wp-async"):
        raise ValueError("tracker: needs method='precopy' or 'auto', and one that is wp-async")
    check_bools(durable=durable)
    check_rate(rate)
    check_int("rounds", rounds, 1)
    if compress is not None:
        check_int("compress", compress, 1, 23)
        _sums.compressor(compress)
    name = Path(os.path.abspath(check_path("path", path)))
    folder = name.parent
    if not folder.is_dir():
        code = errno.ENOTDIR if os.path.lexists(folder) else errno.ENOENT
        raise OSError(code, os.strerror(code), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return Request(
        str(name),
        method,
        shared,
        None if ranges is None else _rows.spans_of(ranges, TAKING),
        None if parent is None else check_path("parent", parent),
        tracker,
        None if max_stall_s is None else check_seconds("max_stall_s", max_stall_s),
        rounds,
        rate,
        durable,
        compress,
        progress,
    )
