"""Which mappings a snapshot has, and where they are in its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pyuffd import _dirty_calls as ranges
from pyuffd import _image_calls as calls
from pyuffd._errors import SnapshotError, raise_if_short
from pyuffd._pages import HUGE_PAGE_2M
from pyuffd.dirty import DirtyTracker, _rows
from pyuffd.pagemap import PageRanges
from pyuffd.remote._mappings import Mapping, MappingKind, Mappings
from pyuffd.remote._process import Process
from pyuffd.snapshot._capture import Placed, Places
from pyuffd.snapshot._file_pages import extents
from pyuffd.snapshot._format import SnapshotGap
from pyuffd.snapshot._memory_files import is_file_of_memory, open_mapped
from pyuffd.snapshot._private_files import PrivateFiles

Shared = Literal["refuse", "pause", "skip"]
SHARED_WAYS = ("refuse", "pause", "skip")

# A file system may end at 16 TiB. Reservations above this size get places where they are populated,
# in units of this size.
RESERVED_BYTES = 256 << 30
UNIT = 1 << 30


class SnapshotLayout:
    """Gives every mapping its place; what is left out becomes a gap.

    What a call returns is what the methods capture. Shared memory is not among it: `FilesCopy`
    copies that in the stop.

    Attributes:
        mappings: The mappings of the last call that are in the snapshot, gaps included.
        gaps: Those of the last call.
        placed: The places of all mappings of the last call.
        files: Those of shared memory: memfds, tmpfs, hugetlbfs.
        in_memory: All of that memory, as (start, end).
        unopened: What of it was not looked at before it got its places, for want of a privilege.
        lazy: Memory that a userfaultfd fills when it is touched, as `find_lazy` found it.
        private_files: What is read from files after the stop.
    """

    def __init__(
        self, process: Process, shared: Shared, scope: Sequence[tuple[int, int]] | None
    ) -> None:
        self._process = process
        self._shared = shared
        self._scope = scope
        self._places = Places(for_mapping=True)
        self._last: tuple[Mappings, list[Placed]] | None = None
        self.mappings: list[Mapping] = []
        self.gaps: list[SnapshotGap] = []
        self.placed: list[Placed] = []
        self.files: list[Placed] = []
        self.in_memory: list[tuple[int, int]] = []
        self.unopened: list[tuple[int, int]] = []
        self.skipped = self.lazy = PageRanges.of([])
        self.private_files = PrivateFiles(process, everything=scope is not None)

    def find_lazy(self, tracker: DirtyTracker | None) -> None:
        """Find memory whose absent pages are not zeros: somebody handles its missing faults.

        The flags of mappings cost a walk of all page tables. What a tracker has registered belongs
        to no other userfaultfd: if that is all, nobody has to look.
        """
        if tracker is not None:
            spans = PageRanges.of((m.start, m.end) for m in self.mappings if _may_be_lazy(m))
            if not len(ranges.subtract(spans.memoryview(), tracker._method.mapped())):
                self.lazy = PageRanges.of([])
                return
        mappings = self._process.mappings(details=True)
        self.lazy = PageRanges.of((m.start, m.end) for m in mappings if _is_lazy(m))
        self._last = None  # nothing is read through such a mapping

    def find_lazy_since(self, tracker: DirtyTracker | None) -> None:
        """Add what has been registered meanwhile: after the stop, since reading flags is slow."""
        before = self.lazy
        try:
            self.find_lazy(tracker)
        except OSError as error:  # it has ended, which it may by now
            raise_if_short(f"open {error.filename}", error)
        self.lazy = PageRanges(ranges.union(before.memoryview(), self.lazy.memoryview()))

    def __call__(self, mappings: Mappings) -> Sequence[Placed]:
        """Return the places of mappings.

        Raises:
            SnapshotError: "shared" - memory that others write too.
        """
        if self._last is not None and self._last[0] == mappings:
            return self._last[1]  # in the stop this is nearly always so
        self.mappings, self.gaps, self.placed, self.files = [], [], [], []
        self.in_memory, self.unopened = [], []
        own: list[Placed] = []
        skipped: list[tuple[int, int]] = []
        self.private_files.begin()
        for mapping in _rows.in_scope(mappings, self._scope):
            if mapping.kind is MappingKind.SPECIAL or mapping.path.startswith("anon_inode:"):
                self._gap(mapping, "special")
                continue
            self.mappings.append(mapping)
            if mapping.shared and not self._keeps(mapping):
                skipped.append((mapping.start, mapping.end))
                continue
            whole = mapping.shared or self._is_read(mapping, mappings)
            placed = [
                Placed(mapping, *part, whole=whole)
                for span in self._spans(mapping)
                for part in self._places.of(*span)
            ]
            self.placed += placed
            if mapping.shared and is_file_of_memory(mapping):
                self.files += placed
                self.in_memory.append((mapping.start, mapping.end))
            else:
                own += placed
        self.skipped = PageRanges.of(skipped)
        is_fixed = all(mapping.length <= RESERVED_BYTES for mapping in self.mappings)
        self._last = (mappings, own) if is_fixed else None
        return own

    def _is_read(self, mapping: Mapping, mappings: Mappings) -> bool:
        """Whether what a private mapping has of its file must be read through the mapping."""
        if self.private_files.add(mapping, mappings):
            return False
        return not len(self.lazy & PageRanges.of([(mapping.start, mapping.end)]))

    def _gap(self, mapping: Mapping, reason: str) -> None:
        self.gaps.append(
            SnapshotGap(mapping.start, mapping.length, reason, mapping.path or mapping.kind.value)
        )

    def _keeps(self, mapping: Mapping) -> bool:
        """Decide about a shared mapping."""
        if mapping.kind is MappingKind.SHARED_FILE and not mapping.writable:
            self._gap(mapping, "file")
            return False
        if self._shared == "refuse":
            raise SnapshotError(
                "shared",
                f"process {self._process.pid} shares {mapping}: others may write it, so it has no"
                ' instant; shared="pause" copies it in the stop, "skip" leaves it out',
            )
        self._gap(mapping, "shared")
        return self._shared == "pause"

    def _spans(self, mapping: Mapping) -> Iterator[tuple[int, int]]:
        if mapping.length <= RESERVED_BYTES:
            yield mapping.start, mapping.end
            return
        units = {
            unit
            for start, end in self._filled(mapping)
            for unit in range(start // UNIT, -(-end // UNIT))
        }
        for start, end in self.private_files.extents(mapping):
            units.update(range(start // UNIT, -(-end // UNIT)))
        assert UNIT % HUGE_PAGE_2M == 0
        for unit in sorted(units):
            yield max(unit * UNIT, mapping.start), min((unit + 1) * UNIT, mapping.end)

    def _filled(self, mapping: Mapping) -> Iterator[tuple[int, int]]:
        """Yield where a large mapping has content."""
        piece = calls.Pieces([(mapping.start, mapping.end, 0, True)])
        for found in PageRanges(piece.scan(self._process.pagemap.fileno())):
            yield found.start, found.end
        if mapping.shared and is_file_of_memory(mapping):
            try:
                with open_mapped(self._process, mapping) as file:
                    yield from extents(file.number, mapping, mapping.start, mapping.end)
            except OSError as error:
                raise_if_short(f"open {error.filename}", error)
                self.unopened.append((mapping.start, mapping.end))


def _may_be_lazy(mapping: Mapping) -> bool:
    """Whether a userfaultfd can handle missing faults of it."""
    return mapping.kind not in (MappingKind.SHARED_FILE, MappingKind.SPECIAL)


def _is_lazy(mapping: Mapping) -> bool:
    """Whether a userfaultfd fills what is absent; for minor faults, what a private file lacks."""
    return "um" in mapping.flags or ("ui" in mapping.flags and not mapping.shared)
