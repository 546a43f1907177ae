"""`WorkingSet`: the pages that a restored program touched first, in that order (layer L4).

It is a hint: it has offsets, and no content. One that is wrong costs time. docs/snapshots.md
describes the file; `_working_set_files` reads and writes it.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from pyuffd._arguments import check_int, check_number
from pyuffd._describe import counted
from pyuffd._image_calls import hot_check
from pyuffd._pages import PAGE_SIZE

MAGIC = b"pyuffdWS"
VERSION = 1
ID_BYTES = 32
# Magic, version, bytes of a row, id of the image, its pages, rows, recordings, CRC-32 of the rest.
HEAD = struct.Struct("<8sII32sQQII")
_SUM_AT = HEAD.size - 4
# First page, pages, recordings in which they were touched, recordings that could tell.
ROW = struct.Struct("<QIHH")
# A file of 32 MiB, and 64 GiB of memory: more is no working set.
MOST_ROWS = 1 << 21
MOST_PAGES = 1 << 24
MOST_RECORDINGS = (1 << 16) - 1
# By default what at least so large a share of the recordings touched is filled first. Of long
# recordings the union becomes everything (a factor of 18 was measured by others).
SHARE = 0.5
# Pages that were touched by fewer than one in this many recordings are dropped from the file.
RARE = 16

Run = tuple[int, int]  # the first page, and pages


class WorkingSetRun(NamedTuple):
    """Pages that were touched one after the other, and equally often.

    Attributes:
        offset: Where they begin in the image, in bytes.
        length: Bytes.
        seen: In how many recordings they were touched.
        tried: How many recordings could tell. One that filled these pages ahead could not.
    """

    offset: int
    length: int
    seen: int
    tried: int


class Place(NamedTuple):
    """A part of some memory that is a part of the image.

    Attributes:
        offset: Where it begins in the image, in bytes.
        length: Bytes.
        memory: The number of the memory.
        at: Where it begins in the memory, in bytes.
        page_size: The size of the memory's pages in bytes.
    """

    offset: int
    length: int
    memory: int = 0
    at: int = 0
    page_size: int = PAGE_SIZE


@dataclass(frozen=True, slots=True, repr=False)
class WorkingSet(Sequence[WorkingSetRun]):
    """The pages that a restored program touched first: a sequence of runs in that order.

    Offsets are those of the image: its mappings one behind the other, in ascending order
    (`Snapshot.regions`). It is in units of 4096 bytes, whatever pages the memory had.

    Attributes:
        image_id: What the image is known by: the ASCII digits of `Snapshot.id`.
        image_length: The size of the image in bytes.
        recordings: How many restores were recorded.
        data: The rows of its file.
        problem: Why a file is not used, as a phrase; "" if it is. Then there are no runs.
    """

    image_id: bytes
    image_length: int
    recordings: int = 0
    data: bytes = b""
    problem: str = ""

    def __len__(self) -> int:
        return len(self.data) // ROW.size

    @overload
    def __getitem__(self, index: int) -> WorkingSetRun: ...

    @overload
    def __getitem__(self, index: slice) -> list[WorkingSetRun]: ...

    def __getitem__(self, index: int | slice) -> WorkingSetRun | list[WorkingSetRun]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = check_int("index", index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"run {index} of {len(self)}")
        return _run(*ROW.unpack_from(self.data, place * ROW.size))

    def __iter__(self) -> Iterator[WorkingSetRun]:
        for row in ROW.iter_unpack(self.data):
            yield _run(*row)

    @property
    def length(self) -> int:
        """The size of its pages, in bytes."""
        return sum(run.length for run in self)

    def often(self, share: float = SHARE) -> list[WorkingSetRun]:
        """Return the runs that at least this share of the recordings touched, from 0 to 1."""
        check_number("share", share, 1)
        return [run for run in self if run.seen >= share * run.tried]

    def __repr__(self) -> str:
        if self.problem:
            return f"<WorkingSet that is not used: {self.problem}>"
        pages = self.length // PAGE_SIZE
        times = "once" if self.recordings == 1 else f"{self.recordings} times"
        runs = counted(len(self), "run")
        return f"<WorkingSet of {counted(pages, 'page')} in {runs}, recorded {times}>"


def _run(page: int, pages: int, seen: int, tried: int) -> WorkingSetRun:
    return WorkingSetRun(page * PAGE_SIZE, pages * PAGE_SIZE, seen, tried)


# The content of the file


def pack(known: WorkingSet) -> bytes:
    """Return the content of its file."""
    head = bytearray(
        HEAD.pack(
            MAGIC,
            VERSION,
            ROW.size,
            known.image_id,
            known.image_length // PAGE_SIZE,
            len(known),
            known.recordings,
            0,
        )
    )
    struct.pack_into("<I", head, _SUM_AT, zlib.crc32(known.data, zlib.crc32(head)))
    return bytes(head) + known.data


def unpack(raw: bytes, image_id: bytes, image_length: int) -> WorkingSet:
    """Return the set in a file's content, if it is one of this image; nothing in it is trusted."""
    try:
        if len(raw) < HEAD.size:
            raise ValueError("truncated: it has no header")
        magic, version, row, its_id, pages, rows, recordings, digest = HEAD.unpack_from(raw)
        if magic != MAGIC:
            raise ValueError("not a working set")
        if (version, row) != (VERSION, ROW.size):
            raise ValueError(f"version {version}, rows of {row} bytes: this version cannot read it")
        data = raw[HEAD.size :]
        if rows > MOST_ROWS or len(data) != rows * ROW.size:
            raise ValueError(f"truncated or changed: {len(raw)} bytes for {rows} rows")
        blank = raw[:_SUM_AT] + bytes(4)
        if zlib.crc32(data, zlib.crc32(blank)) != digest:
            raise ValueError("changed: its checksum differs")
        if its_id != image_id or pages != image_length // PAGE_SIZE:
            raise ValueError("of another image")
        _check(data, pages, recordings)
    except ValueError as error:
        return WorkingSet(image_id, image_length, problem=str(error))
    return WorkingSet(image_id, image_length, recordings, data)


def _check(data: bytes, image_pages: int, recordings: int) -> None:
    """Raise ValueError for rows that cannot be; the checksum tells only of accidents."""
    if not 0 < recordings <= MOST_RECORDINGS:
        raise ValueError(f"{recordings} recordings cannot be")
    # A restore waits for this. What is wrong is found out again, to be named.
    if hot_check(data, image_pages, recordings, MOST_PAGES):
        return
    spans = []
    total = 0
    for page, pages, seen, tried in ROW.iter_unpack(data):
        if not pages or page + pages > image_pages:
            raise ValueError(f"page {page} and {pages} pages of it are outside of the image")
        if not 0 < seen <= tried <= recordings:
            raise ValueError(f"page {page} was seen {seen} times of {tried}, of {recordings}")
        total += pages
        spans.append((page, page + pages))
    if total > MOST_PAGES:
        raise ValueError(f"{total} pages are no working set")
    spans.sort()
    reached = 0
    for begin, end in spans:
        if begin < reached:
            raise ValueError(f"page {begin} is in it twice")
        reached = end
    raise MemoryError


# Several recordings


def merged(known: WorkingSet, recorded: Iterable[Run], filled: Iterable[Run] = ()) -> WorkingSet:
    """Return a set with one more recording.

    Args:
        known: The set so far; of one with a problem nothing is kept.
        recorded: Runs (page, pages) of demand faults, in order.
        filled: Runs that this restore filled ahead, so that they could not fault.

    A page that is new gets its place behind the page that was touched before it.
    """
    recorded, filled = list(recorded), list(filled)
    old = [] if known.problem else list(ROW.iter_unpack(known.data))
    cuts = _edges([*recorded, *filled, *((page, pages) for page, pages, _, _ in old)])
    touched = dict.fromkeys(_cut(recorded, cuts))
    untold = set(_cut(filled, cuts)) - touched.keys()
    counts: dict[Run, tuple[int, int]] = {}
    for page, pages, seen, tried in old:
        for part in _cut([(page, pages)], cuts):
            if part in untold:
                counts[part] = (seen, tried)
            else:
                counts[part] = (seen + (part in touched), tried + 1)
    recordings = known.recordings + 1 if not known.problem else 1
    rows = []
    for part in _in_order(counts, touched):
        seen, tried = counts.get(part, (1, recordings))
        if seen * RARE >= tried:
            rows.append((*part, seen, tried))
    if recordings > MOST_RECORDINGS:
        rows = [(page, n, -(-seen // 2), -(-tried // 2)) for page, n, seen, tried in rows]
        recordings = -(-recordings // 2)
    return WorkingSet(known.image_id, known.image_length, recordings, _joined(rows))


def _edges(runs: Iterable[Run]) -> list[int]:
    return sorted({edge for page, pages in runs for edge in (page, page + pages)})


def _cut(runs: Iterable[Run], cuts: Sequence[int]) -> Iterator[Run]:
    """Yield the runs in parts that begin and end at cuts, none of which is within a part."""
    for page, pages in runs:
        at = bisect_right(cuts, page)
        while page < (end := min(cuts[at], page + pages)):
            yield page, end - page
            pages -= end - page
            page, at = end, at + 1
            if not pages:
                break


def _in_order(known: Iterable[Run], touched: Iterable[Run]) -> Iterator[Run]:
    followers: dict[Run | None, list[Run]] = {}
    known = dict.fromkeys(known)
    before: Run | None = None
    for part in touched:
        if part in known:
            before = part
        else:
            followers.setdefault(before, []).append(part)
    yield from followers.get(None, ())
    for part in known:
        yield part
        yield from followers.get(part, ())


def _joined(rows: Iterable[tuple[int, int, int, int]]) -> bytes:
    """Return rows packed, neighbours with the same counts as one, up to what a set may have."""
    found: list[tuple[int, int, int, int]] = []
    total = 0
    for page, pages, seen, tried in rows:
        pages = min(pages, MOST_PAGES - total)
        total += pages
        if found and found[-1][2:] == (seen, tried) and sum(found[-1][:2]) == page:
            found[-1] = (found[-1][0], found[-1][1] + pages, seen, tried)
        elif pages and len(found) < MOST_ROWS:
            found.append((page, pages, seen, tried))
    return b"".join(ROW.pack(*row) for row in found)


# Filling


def parts(
    runs: Iterable[WorkingSetRun], places: Sequence[Place], *, gap: int = 0
) -> Iterator[tuple[int, int, int]]:
    """Yield (number of a memory, begin, end) of what is to be filled, in order and once each.

    Begin and end are bytes from the start of the memory, multiples of its page size.

    Args:
        runs: As `WorkingSet.often` returns them.
        places: In ascending order of their offsets in the image, without overlaps there.
        gap: So many bytes between two parts that follow each other are filled with them.
    """
    offsets = [place.offset for place in places]
    done: set[tuple[int, int]] = set()
    last: tuple[int, int, int] | None = None
    for run in runs:
        at = max(0, bisect_right(offsets, run.offset) - 1)
        while at < len(places) and places[at].offset < run.offset + run.length:
            memory = places[at].memory
            for begin, end in _within(run, places[at], done):
                if last is not None and last[0] == memory and last[2] <= begin <= last[2] + gap:
                    last = (memory, last[1], end)
                    continue
                if last is not None:
                    yield last
                last = (memory, begin, end)
            at += 1
    if last is not None:
        yield last


def _within(
    run: WorkingSetRun, place: Place, done: set[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    begin = max(run.offset, place.offset) - place.offset + place.at
    end = min(run.offset + run.length, place.offset + place.length) - place.offset + place.at
    if begin >= end:
        return
    size = place.page_size
    if size == PAGE_SIZE:
        yield begin, end
        return
    for number in range(begin // size, -(-end // size)):
        if (place.memory, number) not in done:
            done.add((place.memory, number))
            yield number * size, (number + 1) * size
