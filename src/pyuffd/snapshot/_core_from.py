"""`Snapshot.write_core`: an ELF core of a snapshot, without the process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyuffd._errors import SnapshotError, SnapshotFormatError
from pyuffd.pagemap import PageRanges
from pyuffd.snapshot import _core_notes as notes
from pyuffd.snapshot._capture import SnapshotProgress, at_barrier
from pyuffd.snapshot._core import CoreFile
from pyuffd.snapshot._core_elf import PAGE_SIZE, Segment
from pyuffd.snapshot._core_file import NewFile, write_ends
from pyuffd.snapshot._core_places import BLOCK
from pyuffd.snapshot._format import MANIFEST, RunState
from pyuffd.snapshot._output import write_at

if TYPE_CHECKING:
    from pyuffd.snapshot._format import SnapshotRegion
    from pyuffd.snapshot._reading import Image, Part

_CONTENT = (RunState.DATA, RunState.ZERO, RunState.LOST)


def write_core(
    image: Image,
    path: str,
    *,
    durable: bool,
    progress: Callable[[SnapshotProgress], None] | None,
) -> CoreFile:
    """Write it; see `Snapshot.write_core`."""
    begin = time.monotonic()
    raw = image.notes()
    if raw is None:
        raise SnapshotError(
            "registers",
            f"{image.path} has no registers, which a core needs: it was taken of parts of the"
            " memory, of a 32-bit program, or by a pyuffd that did not save them",
        )
    about = notes.parse(image.notes_path, raw)
    with NewFile(path) as file:
        core = _Core(image, about, file.fileno(), progress)
        with file.named():
            core.write()
        at_barrier("written")
        file.publish(durable=durable, before=core.tell_of_name)
    facts = image.manifest["facts"]
    try:
        return CoreFile(
            path=file.path,
            method=image.manifest["method"],
            reason=image.manifest["reason"],
            threads=about.threads,
            mappings=core.mappings,
            bytes=core.bytes,
            length=core.length,
            pause_s=facts["pause_s"],
            stop_bytes=facts["stop_bytes"],
            seconds=time.monotonic() - begin,
            lost=PageRanges.of(core.lost),
            partial=about.partial,
            unseen=(),
            filtered=(),
        )
    except (KeyError, TypeError) as error:
        raise SnapshotFormatError(
            f"{image.path}/{MANIFEST}", f"a field is missing or wrong: {error!r}"
        ) from None


@dataclass
class _Core:
    """A core that is being written."""

    image: Image
    about: notes.Read
    fd: int
    progress: Callable[[SnapshotProgress], None] | None
    bytes: int = 0
    length: int = 0
    mappings: int = 0
    lost: list[tuple[int, int]] = field(default_factory=list)
    _segments: list[Segment] = field(default_factory=list)
    _end: int = PAGE_SIZE  # where the memory in the file ends; the ELF header is before it

    def tell_of_name(self) -> None:
        """Tell the caller that all is written."""
        if self.progress is not None:
            self.progress(SnapshotProgress("name"))

    def write(self) -> None:
        """Write memory, then notes and headers behind it, and the ELF header last."""
        regions = self.image.regions
        outside = notes.others(self.about.kept.values(), ((r.start, r.end) for r in regions))
        rows: list[tuple[int, SnapshotRegion | notes.Kept]] = [
            *((region.start, region) for region in regions),
            *((kept.start, kept) for kept in outside),
        ]
        self.mappings = len(rows)
        done = SnapshotProgress("core", 0, sum(region.length for region in regions))
        for _, one in sorted(rows, key=lambda row: row[0]):
            if isinstance(one, notes.Kept):
                self._keep(one, one.end)
                continue
            self._region(one)
            done.bytes += one.length
            if self.progress is not None:
                self.progress(done)
        self.length = write_ends(self.fd, self._end, self._segments, self.about.of_core)

    def _region(self, region: SnapshotRegion) -> None:
        """Write a region; a part that is not known gets a segment without bytes."""
        parts = list(self.image.parts(region.start, region.end))
        at = region.start
        for start, end in _in_file(region, parts):
            if at < start:
                self._without(region, at, start)
            self._add(start, end, region.permissions, end - start)
            at = end
        if at < region.end:
            self._without(region, at, region.end)
        self._content(region, parts)

    def _without(self, region: SnapshotRegion, start: int, end: int) -> None:
        """Add a part without bytes, or with those that are in the notes."""
        kept = self.about.kept.get(start)
        if start == region.start and kept is not None and len(kept.content) <= end - start:
            self._keep(kept._replace(permissions=region.permissions), end)
        else:
            self._add(start, end, region.permissions, 0)

    def _keep(self, kept: notes.Kept, end: int) -> None:
        write_at(self.fd, kept.content, self._end)
        self._add(kept.start, end, kept.permissions, len(kept.content))
        self.bytes += len(kept.content)

    def _add(self, start: int, end: int, permissions: str, size: int) -> None:
        # Readers (elfutils) need an ascending offset of empty segments too.
        self._segments.append(Segment(start, end, permissions, size, self._end))
        self._end += size

    def _content(self, region: SnapshotRegion, parts: Iterable[Part]) -> None:
        places = iter([one for one in self._segments if region.start <= one.start < region.end])
        place = next(places)
        for part in parts:
            if part.run is None or part.run.state not in (RunState.DATA, RunState.LOST):
                continue
            if part.run.state is RunState.LOST:
                self.lost.append((part.start, part.end))
                continue
            while place.end <= part.start:
                place = next(places)
            write_at(self.fd, self.image.read_part(part), place.offset + part.start - place.start)
            self.bytes += part.end - part.start


def _in_file(region: SnapshotRegion, parts: list[Part]) -> Iterator[tuple[int, int]]:
    """Yield which parts of a region have bytes in the core, as in a core of the process.

    Pages of which the process had no copy of its own are zeros, or in a mapping of a file what the
    file holds, which the snapshot does not have. Reserved memory without content has no bytes; nor
    have those blocks of a long mapping that hold nothing.
    """
    full, known = [], []
    is_memory = region.permissions[0] == "r"
    for part in parts:
        state = None if part.run is None else part.run.state
        is_memory |= state in (RunState.DATA, RunState.LOST)
        if state in _CONTENT:
            full.append((part.start, part.end))
        elif state is RunState.ABSENT and not region.has_file:
            known.append((part.start, part.end))
    if not is_memory:
        return
    found = PageRanges.of([*full, *known])
    if region.length > BLOCK:
        found &= PageRanges.of(_blocks(region, full))
    for each in found:
        yield each.start, each.end


def _blocks(region: SnapshotRegion, full: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the blocks in which something is."""
    reached = 0
    for start, end in full:
        first = max(reached, (start - region.start) // BLOCK)
        reached = -((region.start - end) // BLOCK)
        for block in range(first, reached):
            at = region.start + block * BLOCK
            yield at, min(at + BLOCK, region.end)
