"""The content of a snapshot's memory as page sources, for lazy restores."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pyuffd import _image_calls as calls
from pyuffd._errors import SnapshotError, SnapshotFormatError
from pyuffd._latch import RLock
from pyuffd._overlay import OverlaySource, Run
from pyuffd._pages import RangeLike, page_size_of, round_up
from pyuffd.snapshot._format import NUMBERS, RunState
from pyuffd.snapshot._reading import Image
from pyuffd.sources import FileSource, PageSource, ZeroSource

Gaps = Literal["refuse", "poison", "zeros"]
GAPS = ("refuse", "poison", "zeros")
# What is filled at once: a fault waits for one such piece at most.
PIECE = 1 << 20
_STATES = {number: state for state, number in NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class Gap:
    """Pages whose content the snapshot does not have."""

    start: int
    end: int
    state: RunState


def chain_of(image: Image) -> list[Image]:
    """Return a snapshot's images, the newest first."""
    images = [image]
    while (parent := images[-1].parent) is not None:
        images.append(parent)
    return images


class Files:
    """The files `pages` of a chain, opened once more."""

    def __init__(self, images: Sequence[Image]) -> None:
        self.images = images
        self.sources: list[FileSource | None] = []
        self._leaves: tuple[PageSource, ...] = ()
        try:
            for image in images:
                self.sources.append(image.pages_source())
        except BaseException:
            self.close()
            raise

    def leaves(self) -> Sequence[PageSource]:
        """Return leaves as `resolve_chain` numbers them, for all regions the same."""
        if not self._leaves:
            self._leaves = (ZeroSource(), *(each or ZeroSource() for each in self.sources))
        return self._leaves

    def close(self) -> None:
        """Close them; a handler has duplicates."""
        for source in self.sources:
            if source is not None:
                source.close()


class Placed:
    """A region of memory, and the part of the snapshot that it gets.

    Attributes:
        region: The memory.
        start: Address of its first byte in the snapshot.
        gaps: Where there is no content, and zeros would be a lie.
    """

    def __init__(self, images: Sequence[Image], start: int, region: RangeLike) -> None:
        self.images = images
        self.region = region
        self.start = start
        self.end = start + region.length
        self.length = region.length
        self.page_size = page_size_of(region)
        tables = [image.runs.rows for image in images]
        self.chain = calls.resolve_chain(tables, start, self.end, PIECE)
        self._starts = self.chain.runs[::3]
        self.gaps = list(self._gaps())

    def _gaps(self) -> Iterator[Gap]:
        rows = self.chain.others
        for at in range(0, len(rows), 3):
            start, end, number = rows[at : at + 3]
            if not number:
                raise ValueError(
                    f"[{start:#x}, {end:#x}) was not mapped at the instant of {self.images[0].path}"
                )
            state = _STATES[number]
            if state is not RunState.ABSENT:
                yield Gap(start, end, state)
                continue
            # What a file holds; in other memory it is zeros.
            for region in self.images[0].regions_in(start, end):
                if region.has_file:
                    yield Gap(max(start, region.start), min(end, region.end), state)

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield (offset, end, bytes of data) of parts of the region that cover all data."""
        rows, page = self.chain.pieces, self.page_size
        reached = waiting = 0
        for at in range(0, len(rows), 3):
            start, end, size = rows[at : at + 3]
            first = max(reached, (start - self.start) // page * page)
            reached = min(round_up(end - self.start, page), self.length)
            waiting += size
            if first < reached:
                yield first, reached, waiting
                waiting = 0
        if waiting:  # all in a huge page of the piece before
            yield reached - page, reached, waiting

    def data_in(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield where data are in a part of the region."""
        rows, starts = self.chain.runs, self._starts
        number = max(0, bisect_right(starts, offset) - 1)
        while number < len(starts) and starts[number] < end:
            stop = starts[number + 1] if number + 1 < len(starts) else self.length
            if rows[3 * number + 1]:
                yield max(offset, starts[number]), min(end, stop)
            number += 1

    def source(self, files: Files) -> PageSource:
        """Return its content."""
        length = self.length
        if not self.chain.data_bytes:
            return ZeroSource()
        if not self.chain.is_packed:
            words = self.chain.runs.tobytes()
            return OverlaySource._of_packed(files.leaves(), words, length)
        leaves: list[PageSource] = [ZeroSource(), PackedPages(self.images[0], self.start, length)]
        return OverlaySource._of_runs(leaves, list(self._runs_of_data()), length)

    def _runs_of_data(self) -> Iterator[Run]:
        """Yield where data are, without where they come from."""
        rows, length = self.chain.runs, self.length
        begin, kind = 0, min(rows[1], 1)
        for at in range(3, len(rows), 3):
            if min(rows[at + 1], 1) != kind:
                yield Run(begin, rows[at], kind, begin)
                begin, kind = rows[at], min(rows[at + 1], 1)
        yield Run(begin, length, kind, begin)


class PackedPages:
    """Content that must be decompressed, by Python; it is opened once in each process."""

    def __init__(self, image: Image, start: int, length: int) -> None:
        self._path, self._sha256 = image.path, image.manifest_sha256
        self._start, self._length = start, length
        self._image: Image | None = None
        self._lock = RLock()

    @property
    def length(self) -> int:
        """The number of bytes."""
        return self._length

    def read(self, offset: int, length: int) -> bytes:
        """Return content, and zeros between it; nobody asks for zeros alone."""
        size = min(length, self._length - offset)
        start = self._start + offset
        with self._lock:
            image = self._opened()
            return b"".join(
                image.read_part(part)
                if part.run is not None and part.run.state is RunState.DATA
                else bytes(part.end - part.start)
                for part in image.parts(start, start + size)
            ).ljust(length, b"\0")

    def _opened(self) -> Image:
        if self._image is None:
            image = Image(self._path)
            if image.manifest_sha256 != self._sha256:
                image.close()
                raise SnapshotFormatError(self._path, "another snapshot has taken its place")
            self._image = image
        return self._image

    def close(self) -> None:
        """Close what this process has opened."""
        if self._image is not None:
            self._image.close()

    def __getstate__(self) -> tuple[str, str, int, int]:
        return self._path, self._sha256, self._start, self._length

    def __setstate__(self, state: tuple[str, str, int, int]) -> None:
        self._path, self._sha256, self._start, self._length = state
        self._image, self._lock = None, RLock()

    def __repr__(self) -> str:
        return f"PackedPages({self._path}, {self._start:#x})"


def check_gaps(placed: Sequence[Placed], gaps: Gaps, path: str) -> None:
    """Refuse memory whose content is not in the snapshot, unless the caller has decided."""
    found = [gap for each in placed for gap in each.gaps]
    if gaps == "refuse" and found:
        size = sum(gap.end - gap.start for gap in found)
        first = found[0]
        raise SnapshotError(
            "gaps",
            f"{path} does not have {size:#x} bytes of this memory, the first at {first.start:#x}"
            f" ({first.state.value}): restore other parts, or pass gaps='poison' so that an access"
            " there fails, or gaps='zeros'",
        )


class Sums:
    """Compares content with its checksums, each chunk once."""

    def __init__(self, images: Sequence[Image]) -> None:
        self._image = images[0]
        self._known: set[tuple[str, int]] = set()

    def check(self, start: int, end: int) -> None:
        """Check all data of a range.

        Raises:
            SnapshotFormatError: a chunk is not what was written.
        """
        for part in self._image.parts(start, end):
            run = part.run
            if run is None or run.state is not RunState.DATA:
                continue
            key = (part.image.path, run.start)
            if key not in self._known:
                part.image.check_chunk(run)
                self._known.add(key)


def check_files(images: Sequence[Image]) -> None:
    """Raise SnapshotFormatError if a file has become shorter since it was opened."""
    for image in images:
        length = os.fstat(image.pages_fileno()).st_size
        if length != image.manifest["pages_bytes"]:
            raise SnapshotFormatError(
                os.path.join(image.path, "pages"),
                f"{length} bytes instead of {image.manifest['pages_bytes']}",
            )
