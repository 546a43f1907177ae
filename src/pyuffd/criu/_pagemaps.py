"""Which pages an image has, and where: a process's pagemap, and those of parent images."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from pyuffd._errors import CriuError
from pyuffd._pages import PAGE_SIZE
from pyuffd.criu import _schema
from pyuffd.criu._records import PAGEMAP_MAGIC, parsed, records

IN_PARENT = 1  # the data are in the parent image
LAZY = 2  # the page may be restored lazily
PRESENT = 4  # the data are in the pages file

# The end of user memory with five-level page tables.
HIGHEST = 1 << 56
# An image with more parents is a circle, or as good as one.
MOST_PARENTS = 1000


class Entry(NamedTuple):
    """Pages [start, end), their flags, and where in the pages file the PRESENT ones begin."""

    start: int
    end: int
    flags: int
    offset: int


class Run(NamedTuple):
    """Bytes [start, end) that are at `offset` of a pages file; a `path` of None: nowhere here."""

    start: int
    end: int
    path: str | None
    offset: int


class Pagemap:
    """The pagemap of one process in one image folder, packed.

    Attributes:
        path: Its file.
        pages_path: The file with the data.
        has_long_counts: Whether the number of pages is in the field that CRIU 4.2 introduced; None
            if there are no entries.
    """

    has_long_counts: bool | None = None

    def __init__(self, folder: str, pid: int) -> None:
        self.path = os.path.join(folder, f"pagemap-{pid}.img")
        self._starts, self._ends, self._offsets = array("Q"), array("Q"), array("Q")
        self._flags = array("I")
        self._size = 0
        with closing(records(self.path, PAGEMAP_MAGIC)) as found:
            head = next(found, None)
            if head is None:
                raise CriuError("image", f"{self.path} has no records")
            pages_id = parsed(self.path, head, _schema.PagemapHead).pages_id
            self.pages_path = os.path.join(folder, f"pages-{pages_id}.img")
            for data in found:
                self._add(parsed(self.path, data, _schema.PagemapEntry))
        if self._size and os.path.getsize(self.pages_path) < self._size:
            raise CriuError(
                "image",
                f"{self.pages_path} has {os.path.getsize(self.pages_path):#x} bytes, fewer than the"
                f" {self._size:#x} that {self.path} tells of",
            )

    def _add(self, entry: _schema.PagemapEntry) -> None:
        is_long = entry.HasField("nr_pages")
        pages = entry.nr_pages if is_long else entry.compat_nr_pages
        flags = entry.flags if entry.HasField("flags") else PRESENT
        if entry.in_parent:
            flags = flags & ~PRESENT | IN_PARENT
        start, end = entry.vaddr, entry.vaddr + pages * PAGE_SIZE
        if start % PAGE_SIZE or not pages or end > HIGHEST:
            raise CriuError("image", f"{self.path}: {pages} pages at {start:#x} cannot be")
        if self._ends and start < self._ends[-1]:
            raise CriuError("image", f"{self.path}: the pages at {start:#x} are not in order")
        self.has_long_counts = is_long
        self._starts.append(start)
        self._ends.append(end)
        self._flags.append(flags)
        self._offsets.append(self._size)
        if flags & PRESENT:
            self._size += end - start

    def __len__(self) -> int:
        return len(self._starts)

    def entries(self, start: int, end: int) -> Iterator[Entry]:
        """Yield the entries of [start, end), the first and the last one cut to it."""
        at = bisect_right(self._ends, start)
        while at < len(self._starts) and self._starts[at] < end:
            first = max(start, self._starts[at])
            offset = self._offsets[at] + first - self._starts[at]
            yield Entry(first, min(end, self._ends[at]), self._flags[at], offset)
            at += 1


class PagemapChain:
    """The pagemap of a process, and those of the images that it builds on, from top to bottom."""

    def __init__(self, folder: str, pid: int) -> None:
        self.levels: list[Pagemap] = []
        seen: set[tuple[int, int]] = set()
        here = folder
        while True:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen or len(seen) > MOST_PARENTS:
                raise CriuError("image", f"the parents of {folder} form a circle")
            seen.add((status.st_dev, status.st_ino))
            self.levels.append(Pagemap(here, pid))
            here = os.path.join(here, "parent")
            below = os.path.join(here, f"pagemap-{pid}.img")
            if not os.path.exists(below):  # also if the process began after that image
                break

    def runs(self, start: int, end: int, *, is_remote: bool) -> Iterator[Run]:
        """Yield where the data of [start, end) are, in order; other pages are zeros.

        Args:
            start: The first address.
            end: The end.
            is_remote: Whether the data of lazy pages are not in files here.
        """
        for entry in self.levels[0].entries(start, end):
            if entry.flags & LAZY and (is_remote or not entry.flags & (PRESENT | IN_PARENT)):
                yield Run(entry.start, entry.end, None, entry.start)
            else:
                yield from self._found(entry, 0)

    def _found(self, entry: Entry, level: int) -> Iterator[Run]:
        if entry.flags & PRESENT:
            path = self.levels[level].pages_path
            yield Run(entry.start, entry.end, path, entry.offset)
            return
        if not entry.flags & IN_PARENT:
            raise CriuError(
                "image",
                f"{self.levels[level].path}: the pages at {entry.start:#x} are in no file: they are"
                " left to a page server",
            )
        at = entry.start
        below = self.levels[level + 1] if level + 1 < len(self.levels) else None
        for found in () if below is None else below.entries(entry.start, entry.end):
            if found.start != at:
                break
            yield from self._found(found, level + 1)
            at = found.end
        if at != entry.end:
            raise CriuError(
                "image",
                f"{self.levels[level].path}: the page at {at:#x} is not in the parent image",
            )
