"""Where the engine reads the pages of a region: what it needs to know of a page source."""

from __future__ import annotations

from collections.abc import Sequence

from pyuffd._arguments import check_int
from pyuffd._describe import repr_of
from pyuffd._overlay import OverlaySource, PackedRuns, packed_runs
from pyuffd._pages import RangeLike, page_size_of
from pyuffd.handlers._types import Content, Leaf, LeafKind, Overlay, SourceKind
from pyuffd.sources import BufferSource, FileSource, PageSource, ZeroSource

Known = dict[int, tuple[Sequence[PageSource], tuple[Leaf, ...]]]


def content_of(source: PageSource | None, region: RangeLike, known: Known | None = None) -> Content:
    """Return where the engine gets a region's content; raise ValueError if the source is short.

    `known` has the leaves of overlays of one list of sources, for the next one of that list.
    """
    if source is None:
        return Content(SourceKind.NONE)
    if isinstance(source, ZeroSource):
        return Content(SourceKind.ZERO, owner=source)
    length = source.length
    page_size = page_size_of(region)
    if length is not None and check_int("source.length", length) <= region.length - page_size:
        raise ValueError(
            f"{repr_of(source)} has {length:#x} bytes and ends before the last page of a region of"
            f" {region.length:#x} bytes"
        )
    if isinstance(source, FileSource):
        return Content(
            SourceKind.FILE,
            fd=source.fileno(),
            offset=source.offset,
            length=source.length,
            owner=source,
        )
    if isinstance(source, BufferSource):
        return Content(
            SourceKind.MEMORY, address=source.address, length=source.length, owner=source
        )
    if isinstance(source, OverlaySource):
        leaves, runs = packed_runs(source, region.length)
        overlay = Overlay(_leaves(source, leaves, known), runs)
        if not source.calls_python:
            return Content(SourceKind.OVERLAY, length=source.length, owner=source, overlay=overlay)
        # Python is asked for pages with bytes that only it can read; then it reads all of the page.
        read = OverlaySource._of_packed(leaves, runs, region.length)
        return Content(SourceKind.REQUEST, owner=read, overlay=overlay)
    return Content(SourceKind.REQUEST, owner=source)


def _leaves(
    source: OverlaySource, leaves: Sequence[PageSource], known: Known | None
) -> tuple[Leaf, ...]:
    if known is None or not isinstance(source.runs, PackedRuns):
        return tuple(map(_leaf, leaves))
    given = source.leaves
    found = known.get(id(given))
    if found is None or found[0] is not given:
        found = known[id(given)] = given, tuple(map(_leaf, leaves))
    return found[1]


def _leaf(source: PageSource) -> Leaf:
    if isinstance(source, FileSource):
        return Leaf(LeafKind.FILE, fd=source.fileno(), offset=source.offset, around=source._around)
    if isinstance(source, BufferSource):
        return Leaf(LeafKind.MEMORY, address=source.address)
    return Leaf(LeafKind.ZERO if isinstance(source, ZeroSource) else LeafKind.REQUEST)
