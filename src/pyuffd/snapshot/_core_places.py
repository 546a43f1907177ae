"""Where the memory of a core is in its file: the layout that `capture` asks for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyuffd._errors import UffdOSError
from pyuffd.remote import Mapping, MappingKind, Mappings, Process
from pyuffd.remote._mappings import keys_of
from pyuffd.snapshot import _core_plan as plan
from pyuffd.snapshot import _memory_files as shared
from pyuffd.snapshot import _own_pages
from pyuffd.snapshot._capture import Placed, Places
from pyuffd.snapshot._core_elf import PAGE_SIZE, Segment
from pyuffd.snapshot._core_plan import Part
from pyuffd.snapshot._core_wanted import VDSO, Choice, Chooser, Wanted
from pyuffd.snapshot._private_files import PrivateFiles

if TYPE_CHECKING:
    from collections.abc import Sequence

# A part of a mapping without content is a hole in the file and costs nothing, but it counts in the
# file's length, which file systems limit (ext4: 16 TiB). So a longer mapping has a place only for
# those of its blocks of this size that hold something.
BLOCK = 1 << 30

# What the process has not written of a private mapping of at least this size is read from its file
# after the stop. The next number limits the files, since each of them is held open.
READ_FROM = 8 * PAGE_SIZE
FILES_MOST = 128

DISK_FILES = (MappingKind.PRIVATE_FILE, MappingKind.SHARED_FILE)


@dataclass(slots=True)
class _Known:
    """What was decided about a mapping; it holds as long as the mapping is the same."""

    wanted: Wanted
    placed: list[Placed]
    is_new: bool
    of_memory: bool
    is_unseen: bool
    is_settled: bool
    is_by_file: bool = False


class CoreLayout:
    """Decides what goes where; the last call, made in the stop, counts.

    Attributes:
        parts: All mappings of the last call.
        placed: Their places, also that of the vdso, which is not captured: it never changes, and is
            not in the page table.
        unknown: Mappings whose VmFlags are not known: they are new.
        files: The places of mapped memfds and the like, which are not captured: `FilesCopy` is
            for them.
        unseen: Such mappings whose file cannot be opened.
        private_files: What is read from files on a disk after the stop.
    """

    parts: list[Wanted]
    placed: list[Placed]
    unknown: list[Mapping]
    files: list[Placed]
    unseen: list[Mapping]

    def __init__(self, process: Process, first: int, *, full: bool) -> None:
        self._process = process
        self._full = full
        mappings = process.mappings(details=True)
        self._chooser = Chooser(process, mappings, full=full)
        self._places = Places(first)
        self.private_files = PrivateFiles(process, everything=True)
        self._known: dict[tuple[int | bytes, ...], _Known] = {}
        # Of the last call: the mappings, what tells them apart, and the result.
        self._last: Mappings | None = None
        self._keys: list[tuple[int | bytes, ...]] = []
        self._unsettled: list[int] = []
        self._captured: list[Placed] = []
        try:
            self(mappings)  # so that little is new in the stop
        except BaseException:
            self.private_files.close()
            raise

    @property
    def filtered(self) -> tuple[str, ...]:
        """See `Chooser`."""
        return self._chooser.filtered

    def __call__(self, mappings: Mappings) -> Sequence[Placed]:
        """Return what of these mappings goes where; the same list while nothing changes."""
        is_same = self._last == mappings
        self._last = None
        if is_same:
            keys, new = self._keys, self._unsettled
        else:
            keys = self._keys = list(keys_of(mappings))
            known_of = self._known.get
            new = [
                index
                for index, key in enumerate(keys)
                if (known := known_of(key)) is None or not known.is_settled
            ]
        for index, choice in zip(new, self._chooser.choose(mappings[i] for i in new), strict=True):
            decided = self._decided(choice)
            is_same = is_same and self._known[keys[index]] == decided
            self._known[keys[index]] = decided
        self._unsettled = [index for index in new if not self._known[keys[index]].is_settled]
        if not is_same:
            self._captured = self._sorted_out(keys)
        self._last = mappings
        return self._captured

    def _sorted_out(self, keys: Iterable[tuple[int | bytes, ...]]) -> list[Placed]:
        every = [known for key in keys if not _is_kernels(known := self._known[key])]
        self.parts = [known.wanted for known in every]
        self.placed = [placed for known in every for placed in known.placed]
        self.unknown = [known.wanted.mapping for known in every if known.is_new]
        self.files = [placed for known in every if known.of_memory for placed in known.placed]
        self.private_files.use(known.wanted.mapping for known in every if known.is_by_file)
        self.unseen = [known.wanted.mapping for known in every if known.is_unseen]
        return [
            placed
            for known in every
            if not known.of_memory and known.wanted.mapping.path != VDSO
            for placed in known.placed
        ]

    def _decided(self, choice: Choice) -> _Known:
        m, part = choice.wanted.mapping, choice.wanted.part
        if part is Part.NOTHING:
            return _Known(choice.wanted, [], choice.is_new, False, False, choice.is_settled)
        of_memory = shared.is_file_of_memory(m)
        with ExitStack() as stack:
            file = shared.try_open(self._process, m, stack) if of_memory else None
            if part is Part.HEADER:
                spans = [(m.start, m.start + PAGE_SIZE)]
            elif m.length > BLOCK:
                spans = list(self._blocks(m, file))
            else:
                spans = [(m.start, m.end)] if self._is_memory(m) else []
        is_by_file = part is Part.ALL and self._is_by_file(m)
        whole = m.kind in DISK_FILES and not is_by_file
        placed = [
            Placed(m, start, end, offset, whole)
            for first, last in spans
            for start, end, offset in self._places.of(first, last)
        ]
        return _Known(
            choice.wanted,
            placed,
            choice.is_new,
            of_memory,
            of_memory and file is None,
            choice.is_settled and m.length <= BLOCK,
            is_by_file,
        )

    def _is_by_file(self, m: Mapping) -> bool:
        """Whether what the process has not written is read from its file."""
        if m.kind is not MappingKind.PRIVATE_FILE or m.length < READ_FROM:
            return False
        try:
            return self.private_files.opens(m, FILES_MOST)
        except UffdOSError:  # no descriptor is left
            return False

    def _is_memory(self, m: Mapping) -> bool:
        """Whether it is more than reserved; memory that was never touched reads as zeros."""
        if m.permissions[0] == "r" or m.has_file:  # what a file has is no page of the process
            return True
        own = _own_pages.own(self._process, m.start, m.end, any_will_do=True)
        return len(own) > 0

    def _blocks(self, m: Mapping, file: int | None) -> Iterator[tuple[int, int]]:
        """Yield the blocks of a long mapping in which something is."""
        if m.kind in DISK_FILES:
            yield m.start, m.end
            return
        at = m.start
        while at < m.end:
            first = _own_pages.first(self._process, at, m.end)
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


def _is_kernels(known: _Known) -> bool:
    """Whether it is a page of the kernel that is at the same place in every process."""
    return known.wanted.mapping.path == "[vsyscall]"


def _first_data(fd: int, m: Mapping, address: int) -> int:
    """Return the first address from one on at which a file has content; the end without any."""
    try:
        return os.lseek(fd, address - m.start + m.offset, os.SEEK_DATA) - m.offset + m.start
    except OSError:  # ENXIO
        return m.end
