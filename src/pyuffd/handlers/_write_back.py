"""Where `Handler.evict` writes content: a function, or a file and a place in it (layer L4)."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyuffd._arguments import check_fd, shown
from pyuffd._describe import repr_of, short_repr
from pyuffd._open_files import check_open_file
from pyuffd._overlay import OverlaySource, Run
from pyuffd._source_files import identity_of
from pyuffd.sources import FileSource, PageSource

if TYPE_CHECKING:
    from typing import TypeAlias

    from pyuffd.handlers._filling import HasDescriptor

    WriteBack: TypeAlias = Callable[[int, memoryview], object] | HasDescriptor | int


@dataclass(frozen=True, slots=True)
class BackFile:
    """A file for content; that of the source's offset 0 belongs at `begin`."""

    fd: int
    begin: int = 0

    def check_place(self, source: PageSource | None, start: int, end: int) -> None:
        """Raise ValueError if the source has this file, and reads these bytes from elsewhere."""
        identity = identity_of(self.fd)
        if isinstance(source, FileSource) and source._identity == identity:
            if source.offset != self.begin:
                raise ValueError(
                    f"write_back: {repr_of(source)} begins at {source.offset:#x} of that file, and"
                    f" content would be written from {self.begin:#x} on: pass write_back=source"
                )
        elif isinstance(source, OverlaySource) and _has(source, identity):
            for run in source.runs_in(start, end):
                self._check_run(source, run, identity)

    def _check_run(self, source: OverlaySource, run: Run, identity: tuple[int, ...]) -> None:
        leaf = source.leaves[run.leaf]
        is_there = isinstance(leaf, FileSource) and leaf._identity == identity
        if is_there and leaf.offset + run.offset == self.begin + run.start:  # type: ignore[attr-defined]
            return
        raise ValueError(
            f"write_back: {repr_of(source)} has that file, but reads the bytes from {run.start:#x}"
            f" to {run.end:#x} from {short_repr(leaf)} at {run.offset:#x}: what is written would"
            " not come back"
        )


def writer_of(write_back: WriteBack) -> Callable[[int, memoryview], object] | BackFile:
    """Return the function that content is handed to, or the file; TypeError otherwise."""
    if isinstance(write_back, type):
        raise TypeError(f"write_back: {shown(write_back)} takes no content: give an instance")
    begin = 0
    if isinstance(write_back, FileSource):
        begin = write_back.offset
        write_back = write_back.fileno()
    elif callable(getattr(write_back, "fileno", None)):
        write_back = check_open_file("write_back", write_back)
    if callable(write_back):
        return write_back
    if not isinstance(write_back, int):
        raise TypeError(
            "write_back must be a function of (offset, data), an open file or its descriptor, or"
            f" None, not {shown(write_back)}"
        )
    fd = check_fd("write_back", write_back)
    if not stat.S_ISREG(os.fstat(fd).st_mode) and not stat.S_ISBLK(os.fstat(fd).st_mode):
        raise ValueError(f"write_back: descriptor {fd} is no regular file and no block device")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise ValueError(
            f"write_back: descriptor {fd} is open for reading only, as that of a FileSource of a"
            " path is: open the file for writing (mode 'r+b')"
        )
    if flags & os.O_APPEND:  # pwrite(2), BUGS: Linux appends, whatever the offset
        raise ValueError(
            f"write_back: descriptor {fd} is open for appending, so content would go to the end of"
            " the file: open it without O_APPEND (mode 'r+b')"
        )
    return BackFile(fd, begin)


def _has(source: OverlaySource, identity: tuple[int, ...]) -> bool:
    return any(
        isinstance(leaf, FileSource) and leaf._identity == identity for leaf in source.leaves
    )
