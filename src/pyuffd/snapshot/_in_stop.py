"""What is read besides private memory while a process is stopped: registers, shared memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pyuffd import _dirty_calls as ranges
from pyuffd._errors import SnapshotError
from pyuffd.pagemap import PageRanges
from pyuffd.snapshot._capture import SnapshotProgress
from pyuffd.snapshot._core_notes import Notes
from pyuffd.snapshot._file_pages import Span
from pyuffd.snapshot._memory_files import FilesCopied, FilesCopy

if TYPE_CHECKING:
    from pyuffd.remote import Mappings, Process, Stop
    from pyuffd.snapshot._capture import Captured, Placed
    from pyuffd.snapshot._files import NewDirectory
    from pyuffd.snapshot._layout import SnapshotLayout
    from pyuffd.snapshot._request import Request


class InStop:
    """Called in the stop; made before it, so that it is short.

    Attributes:
        notes: The registers, and what else belongs into `notes`; None for a part of the memory.
        limit_s: How long the process may be stopped while shared memory is copied; None: no limit.
        is_too_long: Copying took longer than that, which another method does not change.
    """

    def __init__(
        self,
        process: Process,
        layout: SnapshotLayout,
        directory: NewDirectory,
        request: Request,
    ) -> None:
        self._process = process
        self._layout = layout
        self._directory = directory
        self._request = request
        self._copy = FilesCopy(process, directory.pages.number, self._tell, request.rate)
        self._files = FilesCopied()
        self._stop: Stop | None = None
        self.limit_s: float | None = None
        self.is_too_long = False
        self.notes = None if request.scope is not None else Notes(process)

    def __call__(
        self, stop: Stop, mappings: Mappings, layout: Sequence[Placed]
    ) -> Sequence[Placed]:
        """Read it, and return what it copies itself; the last call counts."""
        if self.notes is not None:
            self.notes.in_stop(stop, mappings, layout)

        self._stop = stop
        files = self._layout.files
        self._files = self._copy.in_stop(files)
        return files

    def ahead(self) -> None:
        """Copy the shared memory before the stop, so that only changes are left for it."""
        self._stop = None
        self._copy.ahead(self._layout.files)

    def _tell(self, done: int, total: int) -> None:
        limit_s, stop = self.limit_s, self._stop
        if limit_s is not None and stop is not None and stop.pause_s > limit_s:
            self.is_too_long = True
            raise SnapshotError(
                "stalled",
                f"process {self._process.pid} would be stopped for longer than max_stall_s:"
                f" after {limit_s:g} s {done / 1e6:.0f} of {total / 1e6:.0f} MB of its shared"
                " memory were copied",
            )
        if self._request.progress is not None:
            phase = "before" if stop is None else "stop"
            self._request.progress(SnapshotProgress(phase, done, total))

    def add_to(self, captured: Captured) -> None:
        """Add the shared memory: every page of it has content, is zeros, or is LOST."""
        files, layout = self._files, self._layout
        captured.layout = layout.placed
        captured.stop_bytes += files.bytes
        data, lost, holes = map(_packed, (files.data, files.lost, files.holes))
        unseen = _packed([*files.unseen, *layout.unopened])
        for known in (data, lost, holes):
            unseen = ranges.subtract(unseen, known)
        # Somebody fills these when they are touched: `finish` says that they are not zeros.
        lazy = ranges.intersect(holes, layout.lazy.memoryview())
        zero = _packed(layout.in_memory)
        for known in (data, lost, unseen, lazy):
            zero = ranges.subtract(zero, known)
        captured.data = ranges.union(captured.data, data)
        captured.zero = ranges.union(captured.zero, zero)
        captured.lost = ranges.union(captured.lost, ranges.union(lost, unseen))
        captured.absent = ranges.union(captured.absent, lazy)
        captured.unseen = unseen
        self._copy.free(captured, captured.data)


def _packed(spans: Iterable[Span]) -> memoryview:
    return PageRanges.of(spans).memoryview()
