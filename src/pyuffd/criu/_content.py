"""Page sources of what is restored lazily."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyuffd import _overlay
from pyuffd.criu._images import LazySpan
from pyuffd.sources import FileSource, PageSource, ZeroSource

if TYPE_CHECKING:
    from collections.abc import Callable

# Of a slice that one call fills: often enough to stop or to tell how far it is.
SLICE = 32 << 20


class Files:
    """The pages files of an image, each opened once."""

    def __init__(self) -> None:
        self._files: dict[str, FileSource] = {}

    def __getitem__(self, path: str) -> FileSource:
        if path not in self._files:
            self._files[path] = FileSource(path)
        return self._files[path]

    def close(self) -> None:
        """Close them; a handler has duplicates of those that it serves."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def source_of(span: LazySpan, files: Files, remote: Callable[[], PageSource] | None) -> PageSource:
    """Return the content of a span; `remote` makes the source of what is in no file here."""
    if not span.runs:
        return ZeroSource()
    leaves: list[PageSource] = [ZeroSource()]
    numbers: dict[str | None, int] = {}
    runs: list[_overlay.Run] = []
    at = span.start

    def add(end: int, leaf: int, offset: int) -> None:
        runs.append(_overlay.Run(at - span.start, end - span.start, leaf, offset))

    for run in span.runs:
        if run.path not in numbers:
            numbers[run.path] = len(leaves)
            if run.path is not None:
                leaves.append(files[run.path])
            elif remote is not None:
                leaves.append(remote())
            else:
                raise ValueError(f"the pages at {run.start:#x} need a page server")
        if at < run.start:
            add(run.start, 0, 0)
            at = run.start
        add(run.end, numbers[run.path], run.offset)
        at = run.end
    if at < span.start + span.length:
        add(span.start + span.length, 0, 0)
    return _overlay.OverlaySource._of_runs(leaves, runs, span.length)


def slices(span: LazySpan) -> Iterator[tuple[int, int]]:
    """Yield parts (offset, length) of a span, each with about SLICE bytes of content."""
    begin, size = None, 0
    for run in span.runs:
        at = run.start
        while at < run.end:
            part = min(run.end - at, SLICE - size)
            begin = at if begin is None else begin
            at, size = at + part, size + part
            if size == SLICE:
                yield begin - span.start, at - begin
                begin, size = None, 0
    if begin is not None:
        yield begin - span.start, span.runs[-1].end - begin
