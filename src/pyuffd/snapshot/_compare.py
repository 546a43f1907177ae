"""An incremental image without a tracker: what is as in the parent is left out afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from pyuffd import _dirty_calls as ranges
from pyuffd import _image_calls as calls
from pyuffd.pagemap import PageRanges
from pyuffd.snapshot._capture import Captured, Placed
from pyuffd.snapshot._format import CHUNK, RunState
from pyuffd.snapshot._output import punch
from pyuffd.snapshot._reading import Image


def unchanged(parent: Image, captured: Captured, fd: int) -> memoryview:
    """Return the pages whose content is the same as in the parent."""
    same: list[tuple[int, int]] = []
    for part, start, end in _in_parts(captured.layout, captured.data):
        content = os.pread(fd, end - start, part.offset + start - part.start)
        for known in parent.parts(start, end):
            if known.run is None or known.run.state not in (RunState.DATA, RunState.ZERO):
                continue
            theirs = parent.read_part(known)
            mine = memoryview(content)[known.start - start : known.end - start]
            whole = PageRanges.of([(known.start, known.end)]).memoryview()
            changed = calls.differ(mine, theirs, known.start)
            same += [(r.start, r.end) for r in PageRanges(ranges.subtract(whole, changed))]
    return PageRanges.of(same).memoryview()


def free(layout: Sequence[Placed], pages: memoryview, fd: int) -> None:
    """Free the places of pages in the file."""
    for part, start, end in _in_parts(layout, pages, 1 << 62):
        punch(fd, part.offset + start - part.start, end - start)


def _in_parts(
    layout: Sequence[Placed], pages: memoryview, most: int = CHUNK
) -> Iterator[tuple[Placed, int, int]]:
    """Yield ranges cut at the ends of the parts of a layout, and at multiples of a size."""
    parts = iter(layout)
    part = next(parts, None)
    for each in PageRanges(pages):
        at = each.start
        while at < each.end:
            while part is not None and part.end <= at:
                part = next(parts, None)
            assert part is not None
            stop = min(each.end, part.end, (at // most + 1) * most)
            yield part, at, stop
            at = stop
