"""Where the memory of a core is in its file: the layout that `capture` asks for."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyuffd._abi import PageCategory
from pyuffd.pagemap import PageRanges
from pyuffd.remote import Mapping, MappingKind, Mappings, Process
from pyuffd.snapshot import _core_plan as plan
from pyuffd.snapshot import _core_shared as shared
from pyuffd.snapshot._capture import Placed
from pyuffd.snapshot._core_elf import PAGE_SIZE, Segment
from pyuffd.snapshot._core_plan import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

# A part of a mapping without content is a hole in the file and costs nothing, but it counts in the
# file's length, which file systems limit (ext4: 16 TiB). So of a mapping that is longer only those
# blocks of this size have a place in which something is.
BLOCK = 1 << 30
VDSO = "[vdso]"

_CONTENT = PageCategory.PRESENT | PageCategory.SWAPPED
_DISK_FILES = (MappingKind.PRIVATE_FILE, MappingKind.SHARED_FILE)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A mapping, and how much of it belongs into the core: NOTHING, HEADER or ALL."""

    mapping: Mapping
    part: Part


class Places:
    """Places in a file, by address: an address that has one keeps it."""

    def __init__(self, first: int) -> None:
        self._next = first
        self._rows: list[tuple[int, int, int]] = []  # start, end, offset; in ascending order

    def of(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, end, offset) of the pieces of a range; what has no place gets one."""
        rows = self._rows
        index = bisect.bisect_right(rows, (start, 1 << 64, 0))
        if index and rows[index - 1][1] > start:
            index -= 1
        while start < end:
            if index < len(rows) and rows[index][0] <= start:
                first, last, offset = rows[index]
                stop = min(last, end)
                yield start, stop, offset + start - first
            else:
                stop = min(rows[index][0], end) if index < len(rows) else end
                rows.insert(index, (start, stop, self._next))
                yield start, stop, self._next
                self._next += stop - start
            index += 1
            start = stop


class CoreLayout:
    """Decides what goes where; the last call, made in the stop, counts.

    Attributes:
        parts: All mappings of the last call.
        placed: Their places, also that of the vdso, which is not captured: it never changes, and is
            not in the page table.
        unknown: Mappings whose VmFlags are not known: they are new.
        files: The places of mapped memfds and the like, whose content is read from the file.
        unseen: Such mappings whose file cannot be opened.
    """

    parts: list[Wanted]
    placed: list[Placed]
    unknown: list[Mapping]
    files: list[Placed]
    unseen: list[Mapping]

    def __init__(self, process: Process, first: int, *, full: bool) -> None:
        self._process = process
        self._full = full
        self._filter = plan.read_filter(process.pid)
        self._places = Places(first)
        self._flags = plan.Flags(process.mappings(details=True))
        self._headers: dict[tuple[int, int, int], bool] = {}

    def __call__(self, mappings: Mappings) -> Sequence[Placed]:
        """Return what of these mappings goes where."""
        self.unknown, self.files, self.unseen = [], [], []
        self.parts = self._with_headers([self._wanted(m) for m in mappings if _is_of_process(m)])
        self.placed = [placed for one in self.parts for placed in self._placed(one)]
        return [placed for placed in self.placed if placed.mapping.path != VDSO]

    def _wanted(self, mapping: Mapping) -> Wanted:
        if mapping.path == VDSO:
            return Wanted(mapping, Part.ALL)
        flags = self._flags.of(mapping)
        if flags is None:
            self.unknown.append(mapping)
        part, otherwise = plan.wanted(mapping, flags or frozenset(), self._filter, full=self._full)
        if part is Part.IF_WRITTEN:
            part = Part.ALL if self._first_page(mapping, own=True) is not None else otherwise
        return Wanted(mapping, part)

    def _first_page(self, mapping: Mapping, start: int | None = None, *, own: bool) -> int | None:
        """Return the first page from an address on that is there, or is the process's own."""
        start = mapping.start if start is None else start
        file = PageCategory.FILE if own else PageCategory(0)
        found = self._process.pagemap.scan(
            start,
            mapping.end - start,
            category_mask=file,
            category_inverted=file,
            category_anyof_mask=_CONTENT,
            return_mask=PageCategory(0),
            max_pages=1,
        ).ranges
        return found[0].start if len(found) else None

    def _with_headers(self, parts: list[Wanted]) -> list[Wanted]:
        """Keep a first page only where it begins as an ELF file does."""
        heads = [one.mapping for one in parts if one.part is Part.HEADER]
        new = [m for m in heads if _key(m) not in self._headers]
        on_disk = [m for m in new if not shared.is_file_of_memory(m)]
        for m in new:
            self._headers[_key(m)] = False
            with suppress(OSError), ExitStack() as stack:
                if m not in on_disk and (fd := self._opened(m, stack)) is not None:
                    self._headers[_key(m)] = os.pread(fd, 4, 0) == plan.ELF_MAGIC
        if on_disk:
            pages = PageRanges.of((m.start, m.start + PAGE_SIZE) for m in on_disk)
            text = bytearray(pages.bytes)
            self._process.copy(pages, text)
            for m, at in zip(on_disk, range(0, len(text), PAGE_SIZE), strict=True):
                self._headers[_key(m)] = text.startswith(plan.ELF_MAGIC, at)
        elf = {m.start for m in heads if self._headers[_key(m)]}
        return [
            Wanted(one.mapping, Part.NOTHING)
            if one.part is Part.HEADER and one.mapping.start not in elf
            else one
            for one in parts
        ]

    def _placed(self, one: Wanted) -> Iterator[Placed]:
        if one.part is Part.NOTHING:
            return
        m = one.mapping
        with ExitStack() as stack:
            file = self._opened(m, stack) if shared.is_file_of_memory(m) else None
            if one.part is Part.HEADER:
                spans = [(m.start, m.start + PAGE_SIZE)]
            elif m.length > BLOCK:
                spans = list(self._blocks(m, file))
            else:
                spans = [(m.start, m.end)] if self._is_memory(m) else []
        # Without its file, at least what the process has in its page table.
        whole = m.kind in _DISK_FILES or (shared.is_file_of_memory(m) and file is None)
        for first, last in spans:
            for start, end, offset in self._places.of(first, last):
                placed = Placed(m, start, end, offset, whole)
                if file is not None:
                    self.files.append(placed)
                yield placed

    def _opened(self, m: Mapping, stack: ExitStack) -> int | None:
        try:
            return stack.enter_context(shared.open_mapped(self._process.pid, m)).number
        except OSError:
            self.unseen.append(m)
            return None

    def _is_memory(self, m: Mapping) -> bool:
        """Whether it is more than reserved; memory that was never touched reads as zeros."""
        return m.permissions[0] == "r" or self._first_page(m, own=False) is not None

    def _blocks(self, m: Mapping, file: int | None) -> Iterator[tuple[int, int]]:
        """Yield the blocks of a long mapping in which something is."""
        if m.kind in _DISK_FILES:
            yield m.start, m.end
            return
        at = m.start
        while at < m.end:
            first = self._first_page(m, at, own=False)
            if file is not None and m.kind is MappingKind.SHMEM:
                first = min(first or m.end, _first_data(file, m, at))
            elif file is not None and m.shared:
                first = at  # hugetlbfs does not tell where a file has content
            if first is None or first >= m.end:
                return
            block = m.start + (first - m.start) // BLOCK * BLOCK
            at = min(block + BLOCK, m.end)
            yield block, at

    def left_out(self) -> list[Wanted]:
        """Return the new mappings that turn out to be marked by MADV_DONTDUMP.

        Their flags are read when the process runs again. One that is gone by then is taken for
        memory without the mark.
        """
        if not self.unknown or self._full:
            return []
        now = plan.Flags(self._process.mappings(details=True))
        marked = {m for m in self.unknown if plan.is_left_out(now.of(m) or frozenset())}
        return [one for one in self.parts if one.mapping in marked]

    def segments(self, left_out: Iterable[Wanted]) -> list[Segment]:
        """Return the segments of all mappings, in ascending order."""
        out = {one.mapping for one in left_out}
        placed = iter(self.placed)
        following = next(placed, None)
        segments: list[Segment] = []
        offset = PAGE_SIZE
        for one in self.parts:
            m = one.mapping
            at = m.start
            while following is not None and following.start < m.end:
                # Readers (elfutils) need an ascending offset of empty segments too.
                if at < following.start:
                    segments.append(Segment(at, following.start, m.permissions, 0, offset))
                start, end, offset = following.start, following.end, following.offset
                size = 0 if m in out else end - start
                segments.append(Segment(start, end, m.permissions, size, offset))
                offset += size
                at = end
                following = next(placed, None)
            if at < m.end:
                if one.part is Part.HEADER and segments[-1].end == at:
                    head = segments.pop()  # one segment, of which one page is in the file
                    at = head.start
                    size, offset = head.size, head.offset
                    segments.append(Segment(at, m.end, m.permissions, size, offset))
                    offset += size
                else:
                    segments.append(Segment(at, m.end, m.permissions, 0, offset))
        return segments


def _is_of_process(mapping: Mapping) -> bool:
    return mapping.path != "[vsyscall]"  # the kernel's, at the same place in every process


def _key(m: Mapping) -> tuple[int, int, int]:
    return m.start, m.device, m.inode


def _first_data(fd: int, m: Mapping, address: int) -> int:
    """Return the first address from one on at which a file has content; the end without any."""
    try:
        return os.lseek(fd, address - m.start + m.offset, os.SEEK_DATA) - m.offset + m.start
    except OSError:  # ENXIO
        return m.end
