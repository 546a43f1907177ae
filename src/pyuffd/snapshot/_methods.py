"""`capture`: write the memory of a process at one instant to a file, by one of several methods."""

from __future__ import annotations

from pyuffd.dirty import DirtyTracker
from pyuffd.remote._process import Process
from pyuffd.snapshot import _cow, _precopy, _stopped
from pyuffd.snapshot._capture import Captured, Layout, Options, Used
from pyuffd.snapshot._writer import Writer


def capture(
    process: Process,
    layout_of: Layout,
    fd: int,
    *,
    method: Used = "stopped",
    options: Options | None = None,
    tracker: DirtyTracker | None = None,
    only_changes: bool = False,
) -> Captured:
    """Write the memory of a process at one instant to a file.

    Args:
        process: The process.
        layout_of: Called with the mappings; returns what goes where. It is called in the stop, and
            may be called before it with the mappings of that time.
        fd: The file, empty at the places of the layout.
        method: "stopped": everything is copied in the stop. "precopy": it is copied while the
            process runs, and what it has written meanwhile is copied again, the last of it in the
            stop. "cow": a short stop; afterwards a page is saved before its first write.
        options: Limits; callbacks. `in_stop` is called when all threads are stopped, with the stop,
            the mappings and their places, to read what else has to be of the same instant. It
            returns the places of what it has written to the file.
        tracker: Of the process, with method "precopy": it reports from the instant on.
        only_changes: Capture what the tracker reports, not everything.

    Raises:
        ProcessGoneError: ESRCH - it has exited, or replaced its memory.
        StopTimeoutError: ETIMEDOUT - it cannot be stopped.
        SnapshotError: "stalled" - the process writes faster than it could be copied.
        UffdOSError: ENOSPC, EIO, EFBIG - writing the file failed.
    """
    options = options or Options()
    with Writer(process, fd, options) as writer:
        if method == "stopped":
            captured = _stopped.captured(process, layout_of, writer, options)
        elif method == "cow":
            captured = _cow.captured(process, layout_of, writer, options)
        else:
            captured = _precopy.captured(
                process, layout_of, writer, options, tracker, only_changes=only_changes
            )
        return writer.result(captured)
