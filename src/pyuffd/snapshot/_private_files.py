"""What private mappings have of their files, where the files may be gone afterwards.

A page that the process did not write is what the file holds. Memfds and deleted files last as long
as the process, so a snapshot must have their content, and debuggers look for that of any file in a
core. It is read from the file, and after the stop, which is the shorter for it:
a mapping would show what was written since, reading it would fill holes of the file, and it might
wait for a handler. What is written to a file after a private mapping was made, a process may see or
not (mmap(2)), so its content belongs to no instant.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator

from pyuffd import _dirty_calls as ranges
from pyuffd import _image_calls as calls
from pyuffd._errors import raise_if_short
from pyuffd._owned import Descriptor
from pyuffd.pagemap import PageRanges
from pyuffd.remote._mappings import Mapping, Mappings
from pyuffd.remote._process import Process
from pyuffd.snapshot._capture import Captured, SnapshotProgress, pieces_of
from pyuffd.snapshot._file_pages import extents, inside, is_huge_without_a_file, read

_DELETED = " (deleted)"


class PrivateFiles:
    """The files of the private mappings of one layout, open since the process had them mapped.

    Args:
        process: The process.
        everything: Also files that have names: the mappings were asked for one by one.
    """

    def __init__(self, process: Process, *, everything: bool) -> None:
        self._process = process
        self._everything = everything
        self._opened: dict[tuple[int, int], Descriptor | None] = {}
        self._mappings: list[tuple[Mapping, Descriptor]] = []

    def begin(self) -> None:
        """Begin a new layout."""
        self._mappings = []

    def add(self, mapping: Mapping, mappings: Mappings) -> bool:
        """Open the file of a mapping, if it is to be read; False if nobody lets us open it."""
        if not self._is_kept(mapping):
            return True
        file = self._file(mapping, mappings.at(mapping.start) or mapping)
        if file is not None:
            self._mappings.append((mapping, file))
        return file is not None

    def opens(self, mapping: Mapping, most: int) -> bool:
        """Whether the file of a whole mapping is open, or can be, as one of at most `most`."""
        key = (mapping.device, mapping.inode)
        if not self._is_kept(mapping) or (key not in self._opened and len(self._opened) >= most):
            return False
        return self._file(mapping, mapping) is not None

    def use(self, mappings: Iterable[Mapping]) -> None:
        """Begin a new layout, of mappings whose files are open."""
        opened = ((m, self._opened[m.device, m.inode]) for m in mappings)
        self._mappings = [(m, file) for m, file in opened if file is not None]

    def _file(self, mapping: Mapping, whole: Mapping) -> Descriptor | None:
        key = (mapping.device, mapping.inode)
        if key not in self._opened:
            file = self._open(whole)
            if file is not None and not self._is_of(file, key, whole):
                file.close()
                return None  # as the mapping is gone, so is this layout
            self._opened[key] = file
        return self._opened[key]

    def _is_of(self, file: Descriptor, key: tuple[int, int], whole: Mapping) -> bool:
        """Whether this is the file of the mapping, which may have been replaced since it was read.

        Some file systems (btrfs, overlayfs) show another device in maps than stat(2) tells; then
        the mapping must still be there.
        """
        return (
            _is_it(os.fstat(file.number), key) or self._process.mappings().at(whole.start) == whole
        )

    def _is_kept(self, mapping: Mapping) -> bool:
        path = mapping.path
        if mapping.shared or not mapping.has_file or is_huge_without_a_file(mapping):
            return False
        if path.startswith("/dev/") and not path.startswith("/dev/shm/"):
            return False
        return self._everything or path.endswith(_DELETED)

    def _open(self, mapping: Mapping) -> Descriptor | None:
        tid = self._process.memory_tid
        name = f"/proc/{tid}/map_files/{mapping.start:x}-{mapping.end:x}"
        if (file := _regular(name)) is not None:
            return file
        # Without the privilege for that: by its name, or as a descriptor of the process.
        key = (mapping.device, mapping.inode)
        if not mapping.path.endswith(_DELETED):
            return _regular(f"/proc/{tid}/root{mapping.path}", key)
        try:
            numbers = os.listdir(f"/proc/{tid}/fd")
        except OSError as error:
            raise_if_short(f"open {error.filename}", error)
            return None
        found = (_regular(f"/proc/{tid}/fd/{number}", key) for number in numbers)
        return next((file for file in found if file is not None), None)

    def extents(self, mapping: Mapping) -> Iterator[tuple[int, int]]:
        """Yield where the file has content behind a mapping that was added."""
        for known, file in self._mappings:
            if known == mapping:
                yield from extents(file.number, mapping, mapping.start, mapping.end)

    def spans(self) -> memoryview:
        """Return where these mappings are."""
        return PageRanges.of((m.start, m.end) for m, _ in self._mappings).memoryview()

    def fill(
        self,
        captured: Captured,
        unknown: memoryview,
        lazy: memoryview,
        fd: int,
        rate: float | None,
        progress: Callable[[SnapshotProgress], None] | None,
    ) -> None:
        """Copy to the image what the process had not written, and note it.

        Args:
            captured: What was captured of the process.
            unknown: The pages without content so far.
            lazy: Where somebody fills the holes of a file when they are touched.
            fd: The image.
            rate: At most this many bytes per second.
            progress: Called now and then.
        """
        pieces = pieces_of(captured.layout)
        placed = PageRanges.of((part.start, part.end) for part in captured.layout).memoryview()
        unknown = ranges.intersect(ranges.intersect(unknown, self.spans()), placed)
        told = SnapshotProgress("sweep", 0, PageRanges(unknown).bytes)
        begin = time.monotonic()
        data, zero, lost = ranges.Gathered(), ranges.Gathered(), ranges.Gathered()
        for mapping, file in self._mappings:
            place = (mapping.start, mapping.end)
            wanted = ranges.intersect(ranges.around(unknown, *place), _packed([place]))
            if not len(wanted):
                continue
            behind = ranges.subtract(wanted, _packed(inside(file.number, mapping, *place)))
            found = ranges.intersect(wanted, _packed(extents(file.number, mapping, *place)))
            lost.add(behind)
            empty = ranges.subtract(ranges.subtract(wanted, found), behind)
            zero.add(ranges.subtract(empty, ranges.around(lazy, *place)))
            for start, end, content in read(file.number, mapping, PageRanges(found)):
                page = _packed([(start, end)])
                if not content:
                    lost.add(page)
                else:
                    empty = calls.write(page, content, pieces, fd, overwrite=False)
                    zero.add(empty)
                    data.add(ranges.subtract(page, empty))
                told.bytes += end - start
                if progress is not None:
                    progress(told)
                if rate:
                    time.sleep(max(0.0, begin + told.bytes / rate - time.monotonic()))
        captured.data = ranges.union(captured.data, data.all())
        captured.zero = ranges.union(captured.zero, zero.all())
        captured.lost = ranges.union(captured.lost, lost.all())

    def close(self) -> None:
        """Close the files."""
        self._mappings = []
        for file in self._opened.values():
            if file is not None:
                file.close()
        self._opened = {}

    def __enter__(self) -> PrivateFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _regular(name: str, key: tuple[int, int] | None = None) -> Descriptor | None:
    """Open a regular file, with this device and inode if they are given; None if it cannot be."""
    try:
        if _is_it(os.stat(name), key):
            file = Descriptor.open(name, os.O_RDONLY | os.O_NONBLOCK)
            if _is_it(os.fstat(file.number), key):
                return file
            file.close()
    except OSError as error:
        raise_if_short(f"open {name}", error)
    return None


def _is_it(found: os.stat_result, key: tuple[int, int] | None) -> bool:
    return stat.S_ISREG(found.st_mode) and key in (None, (found.st_dev, found.st_ino))


def _packed(spans: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> memoryview:
    return PageRanges.of(spans).memoryview()
