"""Restoring by mapping the image's files, without a userfaultfd; and when that is faster."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator, Sequence

from pyuffd import _memory
from pyuffd._image_calls import replace_untouched
from pyuffd._opening import open_waiting
from pyuffd._owned import MappedMemory
from pyuffd._pages import PAGE_SIZE
from pyuffd._residency import PageResidency, cached_states
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region, RegionKind
from pyuffd.snapshot._content import Files, Placed

MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
# Each run is a mapping of its own: beyond this, making them costs more than filling pages, and the
# process comes near vm.max_map_count (65,530 by default).
MAPPINGS_MOST = 4096
# Places of a file that are looked at to tell whether it is in the page cache, how much at each, and
# which part may be missing.
PROBES, PROBED = 8, 64 * PAGE_SIZE
COLD_MOST = 0.05
# File systems whose pages come from elsewhere, by their magic numbers (statfs(2)).
_REMOTE = {
    0x6969: "NFS",
    0x65735546: "FUSE",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB",
    0x01021997: "9p",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x47504653: "GPFS",
    0x0BD00BD0: "Lustre",
}


class Mapped:
    """One mapping of an image's file: [start, end) of the region's memory."""

    __slots__ = ("end", "fd", "offset", "start")

    def __init__(self, start: int, end: int, fd: int, offset: int) -> None:
        self.start, self.end, self.fd, self.offset = start, end, fd, offset


def mappings_of(placed: Placed, files: Files) -> list[Mapped]:
    """Return what to map; holes of the file between data are mapped with them, and are zeros."""
    found: list[Mapped] = []
    for start, end, fd, offset in _runs(placed, files):
        last = found[-1] if found else None
        if (
            last is not None
            and last.fd == fd
            and offset - last.offset == start - last.start
            and _is_hole(fd, last.offset + last.end - last.start, offset)
        ):
            last.end = end
        else:
            found.append(Mapped(start, end, fd, offset))
    return found


def _runs(placed: Placed, files: Files) -> Iterator[tuple[int, int, int, int]]:
    rows = placed.chain.runs
    for at in range(0, len(rows), 3):
        start, leaf, offset = rows[at : at + 3]
        end = rows[at + 3] if at + 3 < len(rows) else placed.region.length
        source = files.sources[leaf - 1] if leaf else None
        if source is not None:
            yield start, end, source.fileno(), offset


def _is_hole(fd: int, start: int, end: int) -> bool:
    """Whether the file system says that nothing is stored there, so that it reads as zeros."""
    if start == end:
        return True
    try:
        return os.lseek(fd, start, os.SEEK_DATA) >= end
    except OSError as error:
        return error.errno == errno.ENXIO  # a hole up to the end


def why_impossible(placed: Sequence[Placed], *, has_handler: bool, poisons: bool) -> str | None:
    """Return why these cannot be mapped; None if they can."""
    if has_handler:
        return "a handler was given, and mappings need none"
    for each in placed:
        region = each.region
        if (
            not isinstance(region, Region)
            or region.kind is not RegionKind.ANONYMOUS
            or region.page_size != PAGE_SIZE
        ):
            return f"{region!r} is not a Region of private anonymous memory with small pages"
        if each.chain.is_packed:
            return "the snapshot is compressed"
        if each.gaps and poisons:
            return "mappings cannot be poisoned, and gaps='poison' asks for it"
        if any(offset % PAGE_SIZE for offset in each.chain.runs[2::3]):
            return "its pages are not aligned in the file"
    return None


def why_slower(placed: Sequence[Placed], files: Files) -> str | None:
    """Return why mapping is not the fastest way; None if it is."""
    for image, source in zip(files.images, files.sources, strict=True):
        if source is None:
            continue
        kind, _ = _memory.fstatfs(source.fileno())
        if (name := _REMOTE.get(kind & 0xFFFFFFFF)) is not None:
            return f"{image.path} is on {name}: each fault would be a request to it"
    count = sum(len(each.chain.runs) // 3 for each in placed)
    if count > MAPPINGS_MOST:
        count = sum(len(mappings_of(each, files)) for each in placed)
    if count > MAPPINGS_MOST:
        return f"it would be {count} mappings"
    cold, probes = _cold(placed, files)
    if cold > COLD_MOST * probes:
        return f"the image is not in the page cache: {cold} of {probes} pages looked at are missing"
    return None


def _cold(placed: Sequence[Placed], files: Files) -> tuple[int, int]:
    """Return how many of some pages of the image are not in the page cache, of how many."""
    total = sum(each.chain.data_bytes for each in placed)
    cold = probes = due = 0
    step = max(PROBED, total // PROBES // PAGE_SIZE * PAGE_SIZE)
    with contextlib.ExitStack() as opened:
        pagemap = opened.enter_context(Pagemap()).fileno()
        mappings: dict[int, int] = {}
        for each in placed:
            for start, end, fd, offset in _runs(each, files):
                while due < end - start:
                    if fd not in mappings:
                        length = os.fstat(fd).st_size // PAGE_SIZE * PAGE_SIZE
                        mapped = MappedMemory.map(length, mmap.PROT_READ, mmap.MAP_SHARED, fd)
                        mappings[fd] = opened.enter_context(mapped).start
                    size, at = min(PROBED, end - start - due), offset + due
                    states = cached_states(pagemap, mappings[fd] + at, size, fd, at)
                    cold += states.count(PageResidency.SWAPPED)
                    probes += len(states)
                    due += step
                due -= end - start
    return cold, probes


def map_all(placed: Sequence[Placed], files: Files) -> None:
    """Map the image over the regions; if that fails, they are empty again."""
    mapped = [
        Mapped(start + each.start, start + each.end, each.fd, each.offset)
        for start, found in ((one.region.start, mappings_of(one, files)) for one in placed)
        for each in found
    ]
    replace(placed, mapped)


def replace(placed: Sequence[Placed], mapped: Sequence[Mapped]) -> None:
    """Map files over regions that nobody has touched; the addresses are those of the memory."""
    from pyuffd.handlers._present import open_pagemap

    spans = [(each.region.start, each.region.length) for each in placed]
    rows = [(each.start, each.end - each.start, each.offset, each.fd) for each in mapped]
    with contextlib.ExitStack() as opened:
        pagemap, uffd = open_pagemap(), open_waiting()
        if pagemap is not None:
            opened.enter_context(pagemap)
        if uffd is not None:
            opened.enter_context(uffd)
        touched = replace_untouched(
            -1 if uffd is None else uffd.number,
            -1 if pagemap is None else pagemap.fileno(),
            spans,
            rows,
        )
    if touched is not None:
        raise ValueError(has_pages(touched))


def has_pages(start: int) -> str:
    return (
        f"the region at {start:#x} has pages already, which would be lost:"
        " restore into memory that was never touched"
    )


def clear(address: int, length: int) -> None:
    """Put empty anonymous memory there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE
    _memory.mmap(length, READ_WRITE, flags, -1, 0, address)
