"""Where a mapped file has content, and that content by whole pages, read from the file itself."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from pyuffd._pages import PAGE_SIZE, round_up
from pyuffd.pagemap import PageRanges
from pyuffd.remote._mappings import Mapping, MappingKind

Span = tuple[int, int]

_STEP = 1 << 20
_NO_FILE = "/anon_hugepage"


def is_huge_without_a_file(mapping: Mapping) -> bool:
    """Whether it is private hugetlb memory without a file, all of which is the process's own."""
    return (
        mapping.kind is MappingKind.HUGETLB
        and not mapping.shared
        and mapping.path.startswith(_NO_FILE)
    )


def inside(fd: int, mapping: Mapping, start: int, end: int) -> Iterator[Span]:
    """Yield what of a part of a mapping is not behind the end of its file."""
    size = round_up(os.fstat(fd).st_size, mapping.page_size)
    last = min(end, mapping.start - mapping.offset + size)
    if start < last:
        yield start, last


def extents(fd: int, mapping: Mapping, start: int, end: int) -> Iterator[Span]:
    """Yield the addresses in a part of a mapping at which its file has content, by whole pages."""
    shift = mapping.start - mapping.offset
    for first, past in inside(fd, mapping, start, end):
        if mapping.kind is MappingKind.HUGETLB:  # it does not tell
            yield first, past
            return
        at, last = first - shift, past - shift
        while at < last:
            try:
                begin = os.lseek(fd, at, os.SEEK_DATA) & -PAGE_SIZE
                at = round_up(os.lseek(fd, begin, os.SEEK_HOLE), PAGE_SIZE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing any more
                    return
                begin, at = at, last  # the file system does not tell
            if begin < last:
                yield begin + shift, min(at, last) + shift


def read(fd: int, mapping: Mapping, pages: PageRanges) -> Iterator[tuple[int, int, bytes]]:
    """Yield (start, end, content), of whole pages; no content where it cannot be read."""
    for each in pages:
        at, step = each.start, _STEP
        while at < each.end:
            stop = min(at + step, each.end)
            try:
                content = os.pread(fd, stop - at, at - mapping.start + mapping.offset)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                content = b""
                if step > PAGE_SIZE:  # one page of it
                    step = PAGE_SIZE
                    continue
            if content:
                content = content.ljust(round_up(len(content), PAGE_SIZE), b"\0")
                stop = at + len(content)
            yield at, stop, content  # without content: or the file was cut meanwhile
            at = stop
