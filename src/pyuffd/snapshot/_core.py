"""`write_core`: an ELF core of a running process."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from pyuffd import _dirty_calls as ranges
from pyuffd._arguments import check_bools, check_path, check_seconds, shown
from pyuffd._errors import ProcessGoneError, SnapshotError, UffdOSError, raise_errno
from pyuffd.dirty import DirtyTracker
from pyuffd.pagemap import PageRanges
from pyuffd.remote import Process
from pyuffd.snapshot import _core_elf
from pyuffd.snapshot._capture import Options, SnapshotProgress, at_barrier
from pyuffd.snapshot._core_about import About
from pyuffd.snapshot._core_file import NewFile, write_ends
from pyuffd.snapshot._core_places import CoreLayout
from pyuffd.snapshot._core_wanted import VDSO
from pyuffd.snapshot._lock import only_one
from pyuffd.snapshot._memory_files import FilesCopied, FilesCopy
from pyuffd.snapshot._methods import capture
from pyuffd.snapshot._output import punch, write_at

if TYPE_CHECKING:
    from pyuffd.remote import Mapping, Mappings, RegisterSet, Stop
    from pyuffd.snapshot._capture import Captured, Method, Placed, Used
    from pyuffd.snapshot._core_elf import Segment

METHODS = ("auto", "cow", "precopy", "stopped")
# The longest stop of a method that copies while the process runs, unless the caller says.
STALL_S = 0.05
# A thread that wants to run stops when it gets a CPU: on a busy machine that lasts.
STOP_LIMIT_S = 5.0
_FIRST = _core_elf.PAGE_SIZE  # where memory begins in the file; the ELF header is before it


@dataclass(frozen=True, slots=True)
class CoreFile:
    """The result of `write_core` and `Snapshot.write_core`.

    Attributes:
        path: The file.
        method: How the memory was copied: "precopy", "cow" or "stopped".
        reason: Why so, in one sentence.
        threads: Threads in it.
        mappings: Mappings in it.
        bytes: Bytes of memory in it that are not holes.
        length: The length of the file in bytes, with its holes.
        pause_s: How long the process was stopped.
        stop_bytes: Bytes read while it was stopped; of shared memory only changes are written.
        seconds: How long all of it lasted.
        lost: Pages that could not be read, which are zeros in the file: poisoned, or behind the end
            of a mapped file.
        partial: Threads whose registers are not all known: they wait in vfork(2) for their child.
        unseen: Shared memory of which only those pages are in the file that the process had touched
            itself: without CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE others are not seen.
        filtered: What is not in the file because the process's coredump_filter leaves out more than
            the kernel's default (core(5)), in words; nothing with `full`.
    """

    path: str
    method: Used
    reason: str
    threads: int
    mappings: int
    bytes: int
    length: int
    pause_s: float
    stop_bytes: int
    seconds: float
    lost: PageRanges
    partial: tuple[int, ...]
    unseen: tuple[Mapping, ...]
    filtered: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Request:
    """The checked arguments of `write_core`."""

    path: str
    full: bool
    max_stall_s: float | None
    durable: bool
    progress: Callable[[SnapshotProgress], None] | None


def write_core(
    process: Process,
    path: str | os.PathLike[str],
    *,
    method: str = "auto",
    full: bool = False,
    max_stall_s: float | None = None,
    durable: bool = False,
    progress: Callable[[SnapshotProgress], None] | None = None,
) -> CoreFile:
    """Write an ELF core of a running process, which runs on afterwards.

    Debuggers open it as they open the core of a crash: memory, and the registers of all threads, of
    one instant. The file is sparse. It gets its name when it is complete, has mode 0600, and
    replaces nothing.

    Args:
        process: The process.
        path: Where to put it. A link there is not followed.
        method: "precopy" copies while the process runs, then again what it has written meanwhile,
            and the last of it in a stop. "cow" stops it briefly; afterwards each page is saved
            before its first write, which waits for that. "stopped" copies everything in the stop.
            "auto" is "precopy"; "cow" if that does not get ahead of the process; "stopped" where
            its writes cannot be tracked. The result says why.
        full: Write all memory that can be read, whatever the process's coredump_filter and
            MADV_DONTDUMP say. Without it, a core has what the kernel's own would have, see core(5).
        max_stall_s: The longest time that the process may be stopped, or a write of it wait. None:
            0.05 with "precopy" and "cow", and as long as the copy takes with "stopped".
        durable: Wait until the file is on the disk.
        progress: Called now and then, in the thread of the caller. An exception of it ends the
            writing.

    Returns:
        What was written, and for how long the process was stopped.

    Raises:
        ValueError: an unknown method, a path that is no file name, or this process itself.
        FileExistsError: EEXIST - something has this name.
        SnapshotError: "busy" - another core or snapshot of it is being written; "stalled" - with
            "precopy", it writes faster than it can be copied.
        UffdOSError: ETIMEDOUT - with "stopped", `max_stall_s` is over; ENOEXEC - a 32-bit program;
            ENOSPC, EDQUOT, EIO, EFBIG - writing failed, and `filename` is the path; others -
            with "precopy", a userfaultfd cannot be opened in it, see `Process.attach`.
        OSError: the folder cannot be written.
        StopTimeoutError, UffdPermissionError: as `Process.stopped` raises them.
        ProcessGoneError: ESRCH - it has exited, or replaced its memory.
        After each of them the process runs, and there is no file.

    Kernel: PTRACE_GETREGSET of ptrace(2), process_vm_readv(2), PAGEMAP_SCAN (Linux 6.7); WP_ASYNC
        for precopy.
    GIL: released.  Blocks: until it is written.

    Example:
        >>> import subprocess, tempfile
        >>> from pyuffd import Process, write_core
        >>> with subprocess.Popen(["sleep", "60"]) as child, Process(child.pid) as process:
        ...     with tempfile.TemporaryDirectory() as folder:
        ...         core = write_core(process, f"{folder}/core.sleep")
        ...     child.kill()
        >>> core.threads
        1
    """
    if not isinstance(process, Process):
        hint = f": of a process id, make Process({process})" if type(process) is int else ""
        raise TypeError(f"process must be a Process, not {shown(process)}{hint}")
    path = check_path("path", path)
    if method not in METHODS:
        raise ValueError(f"method {shown(method)} is not one of {', '.join(METHODS)}")
    check_bools(full=full, durable=durable)
    if max_stall_s is not None:
        max_stall_s = check_seconds("max_stall_s", max_stall_s)
        if not max_stall_s:
            raise ValueError("max_stall_s 0 leaves no time to stop the process")
    if process.pid == os.getpid():
        raise ValueError("a process cannot write a core of itself: it would have to stop")
    process.check()
    request = _Request(path, full, max_stall_s, durable, progress)
    begin = time.monotonic()
    NewFile(request.path).close()  # fail before the process is touched
    with only_one(process):
        try:
            core = _by_method(process, request, cast("Method", method))
        except ProcessGoneError:
            process.check()  # says which
            raise
    return replace(core, seconds=time.monotonic() - begin)


def _by_method(process: Process, request: _Request, method: Method) -> CoreFile:
    if method == "stopped" or method == "cow":
        return _written(process, request, method, "it was asked for")
    is_final = method == "precopy"
    try:
        tracker = DirtyTracker(process, method="wp-async")
    except UffdOSError as error:
        if is_final or isinstance(error, ProcessGoneError):
            raise
        return _written(process, request, "stopped", f"its writes cannot be tracked: {error}")
    with tracker:
        reason = "it was asked for" if is_final else "the process does not wait for us"
        try:
            return _written(process, request, "precopy", reason, tracker)
        except SnapshotError as error:
            if is_final or error.reason != "stalled":
                raise
            why = f"precopy did not get ahead: {error}"
    try:
        return _written(process, request, "cow", why)
    except SnapshotError as error:
        if request.max_stall_s is not None or error.reason != "stalled":
            raise
        why = f"{why}; cow: {error}"
    return _written(process, request, "stopped", why)


def _written(
    process: Process,
    request: _Request,
    method: Used,
    reason: str,
    tracker: DirtyTracker | None = None,
) -> CoreFile:
    """Write a core by one method; precopy has a tracker."""
    with NewFile(request.path) as file:
        core = _Core(process, file, request)
        with core.private_files, file.named():
            core.capture(method, tracker)
            at_barrier("captured")
            core.finish()
        process.check()
        at_barrier("written")
        file.publish(durable=request.durable, before=core.tell_of_name)
        return core.result(reason)


class _Core:
    """A core that is being written."""

    _captured: Captured
    _segments: list[Segment]
    _registers: list[RegisterSet]
    _read: Callable[[], list[RegisterSet]]
    _tids: set[int] | None
    _length = 0
    _shared: FilesCopied  # memfds and the like
    _stop: Stop | None = None

    def __init__(self, process: Process, file: NewFile, request: _Request) -> None:
        self._process = process
        self._file = file
        self._request = request
        try:
            self._about = About(process)
            self._layout = CoreLayout(process, _FIRST, full=request.full)
        except UffdOSError:
            raise
        except OSError as error:
            process.check()
            code = error.errno or errno.EIO
            refused = code in (errno.EPERM, errno.EACCES)
            hint = "looking at another user's process needs CAP_SYS_PTRACE" if refused else ""
            raise_errno(f"read {error.filename}", code, hint=hint)
        self.private_files = self._layout.private_files
        self._files = FilesCopy(process, file.fileno(), self._tell_of_files)

    def capture(self, method: Used, tracker: DirtyTracker | None) -> None:
        """Write the memory of one instant, and read the registers of the same."""
        options = Options(
            stop_limit_s=STOP_LIMIT_S,
            max_stall_s=self._request.max_stall_s or STALL_S,
            stopped_s=math.inf if method == "stopped" else self._request.max_stall_s or math.inf,
            asleep_s=self._request.max_stall_s or math.inf,
            durable=self._request.durable,
            progress=self._tell,
            in_stop=self._in_stop,
        )
        if method != "stopped":
            self._files.ahead(self._layout.files)
            at_barrier("ahead")
        self._captured = capture(
            self._process,
            self._layout,
            self._file.fileno(),
            method=method,
            options=options,
            tracker=tracker,
        )
        shared = PageRanges.of(self._shared.data).memoryview()
        self._files.free(self._captured, ranges.union(self._captured.data, shared))

    def _in_stop(
        self, stop: Stop, _mappings: Mappings, _layout: Sequence[Placed]
    ) -> Sequence[Placed]:
        self._stop = stop
        self._read = stop._read_registers()
        # Other processes that share the memory are stopped too.
        self._tids = set(self._about.tids()) if len(stop.pids) > 1 else None
        files = self._layout.files
        self._shared = self._files.in_stop(files)
        return files

    def _tell_of_files(self, done: int, total: int) -> None:
        phase = "before" if self._stop is None else "stop"
        self._tell(SnapshotProgress(phase, done, total))

    def _tell(self, progress: SnapshotProgress) -> None:
        limit_s, stop = self._request.max_stall_s, self._stop
        if progress.phase != "stop" or stop is None:
            limit_s = None
        if limit_s is not None and stop is not None and stop.pause_s > limit_s:
            raise UffdOSError(
                errno.ETIMEDOUT,
                f"process {self._process.pid} is stopped for too long",
                hint=f"{limit_s:g} s were allowed;"
                f" {progress.bytes / (progress.total or 1):.0%} is copied",
            )
        if self._request.progress is not None:
            self._request.progress(progress)

    def tell_of_name(self) -> None:
        """Tell the caller that all is written."""
        self._tell(SnapshotProgress("name"))

    def finish(self) -> None:
        """Write what files hold, the vdso, then notes and headers, and the ELF header last."""
        fd = self._file.fileno()
        captured = self._captured
        known = ranges.union(ranges.union(captured.data, captured.zero), captured.lost)
        unknown = ranges.subtract(self.private_files.spans(), known)
        self.private_files.fill(captured, unknown, ranges.NO_RANGES, fd, None, self._tell)
        self._registers = [
            one for one in self._read() if self._tids is None or one.tid in self._tids
        ]
        left_out = self._layout.left_out()
        self._segments = self._layout.segments(left_out)
        out = {one.mapping for one in left_out}
        for placed in self._layout.placed:
            if placed.mapping in out:
                punch(fd, placed.offset, placed.end - placed.start)
            elif placed.mapping.path == VDSO:
                content = self._process.read(placed.start, placed.end - placed.start)
                write_at(fd, content, placed.offset)
        end = max((part.offset + part.size for part in self._segments), default=_FIRST)
        notes = self._about.notes(self._registers, (one.mapping for one in self._layout.parts))
        self._length = write_ends(fd, end, self._segments, notes)

    def result(self, reason: str) -> CoreFile:
        """Return what the caller is told."""
        captured = self._captured
        assert self._stop is not None
        return CoreFile(
            path=self._file.path,
            method=captured.method,
            reason=reason,
            threads=len(self._registers),
            mappings=len(self._layout.parts),
            bytes=PageRanges(captured.data).bytes + self._shared.bytes,
            length=self._length,
            pause_s=self._stop.pause_s,
            stop_bytes=captured.stop_bytes + self._shared.bytes,
            seconds=0.0,
            lost=PageRanges(captured.lost) | PageRanges.of(self._shared.lost),
            partial=tuple(one.tid for one in self._registers if one.partial),
            unseen=tuple(self._layout.unseen),
            filtered=self._layout.filtered,
        )
