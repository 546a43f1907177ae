"""`Image`: a snapshot's files, opened and checked; content through its parents."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

from pyuffd._closing import CloseSteps, Closing
from pyuffd._errors import SnapshotFormatError, raise_if_short
from pyuffd._latch import RLock
from pyuffd._owned import Descriptor
from pyuffd._pages import ADDRESS_LIMIT, PAGE_SIZE
from pyuffd.snapshot import _sums
from pyuffd.snapshot._files import open_directory, open_in
from pyuffd.snapshot._format import (
    CHUNK,
    MANIFEST,
    MANIFEST_MOST,
    NOTES,
    PAGES,
    RUNS,
    Runs,
    RunState,
    SnapshotRegion,
    SnapshotRun,
    read_runs,
    runs_count,
    runs_length,
    unseal,
)
from pyuffd.sources import FileSource

# Chunks kept, since neighbours are often read together.
_KEPT = 8
_DEPTH_MOST = 1000
_NO_DIRECTORY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_TEXTS = ("permissions", "kind", "path")  # fields of a region; the others are numbers


class Part(NamedTuple):
    """A part of a run, and the image that has its content; `run` is None where there is none."""

    start: int
    end: int
    image: Image
    run: SnapshotRun | None


class Image(Closing):
    """The files of a snapshot and of its parents."""

    _what = "snapshot"
    _instead = "open it once more"
    id: str
    depth: int
    pid: int
    start_ticks: int
    regions: list[SnapshotRegion]
    runs: Runs
    manifest_sha256: str

    def __init__(self, path: str | os.PathLike[str], *, depth: int = 0) -> None:
        self.path: str = os.path.abspath(path)
        self.parent: Image | None = None
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self._good: set[int] = set()  # chunks that were compared with their checksums, by start
        self._last: SnapshotRun | None = None
        self._holders = WeakSet[object]()
        self._closes, self._holding = False, RLock()
        self._steps = CloseSteps()
        with self._steps, open_directory(self.path) as folder:
            raw = _read(folder, self.path, MANIFEST, MANIFEST_MOST)
            self.manifest: dict[str, Any] = unseal(self._place(MANIFEST), raw)
            self.manifest_sha256 = hashlib.sha256(raw).hexdigest()
            self._pages = self._owned(_file(folder, self.path, PAGES))
            self._notes: Descriptor | None = None
            if self.manifest.get("notes_sha256") is not None:
                self._notes = self._owned(_file(folder, self.path, NOTES))
            try:
                self._read_tables(folder)
            except (KeyError, TypeError, ValueError) as error:
                if isinstance(error, SnapshotFormatError):
                    raise
                raise SnapshotFormatError(
                    self._place(MANIFEST), f"a field is missing or wrong: {error!r}"
                ) from None
            if (parent := self.manifest["parent"]) is not None:
                if depth >= _DEPTH_MOST:
                    raise SnapshotFormatError(self.path, "too many parents")
                self.parent = self._find(parent, depth + 1)
                self._steps.add(self.parent.close)

    def _owned(self, made: Descriptor) -> Descriptor:
        self._steps.add(made.close)
        return made

    def _place(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _read_tables(self, folder: Descriptor) -> None:
        manifest = self.manifest
        self.id, self.depth = str(manifest["id"]), int(manifest["depth"])
        self.pid, self.start_ticks = (
            int(manifest["target"]["pid"]),
            int(manifest["target"]["start_ticks"]),
        )
        length = os.fstat(self._pages.number).st_size
        if length != manifest["pages_bytes"]:
            raise SnapshotFormatError(
                self._place(PAGES), f"{length} bytes instead of {manifest['pages_bytes']}"
            )
        if self._notes is not None:
            self._check_notes_length(os.fstat(self._notes.number).st_size)
        self.regions = list(_regions(manifest["regions"]))
        pages = sum(region.length for region in self.regions) // PAGE_SIZE
        raw = _read(folder, self.path, RUNS, runs_length(pages), is_length=runs_length)
        self.runs = read_runs(self._place(RUNS), raw, manifest["runs_sha256"], length)
        self._sum = _sums.sum_named(self._place(MANIFEST), manifest["checksum"])
        self._unpack = None
        if manifest["compression"] is not None:
            if manifest["compression"] != "zstd":
                raise SnapshotFormatError(
                    self._place(MANIFEST), f"unknown compression {manifest['compression']!r}"
                )
            self._unpack = _sums.decompressor()

    # Notes

    @property
    def notes_path(self) -> str:
        """Where the file `notes` is, if there is one."""
        return self._place(NOTES)

    def _check_notes_length(self, length: int) -> None:
        if length != self.manifest["notes_bytes"]:
            raise SnapshotFormatError(
                self.notes_path, f"{length} bytes instead of {self.manifest['notes_bytes']}"
            )

    def notes(self) -> bytes | None:
        """Return the content of the file `notes`, checked; None if the snapshot has none."""
        if self._notes is None:
            return None
        length = os.fstat(self._notes.number).st_size
        self._check_notes_length(length)
        content = _pread(self._notes.number, length, 0)
        if hashlib.sha256(content).hexdigest() != self.manifest["notes_sha256"]:
            raise SnapshotFormatError(
                self.notes_path, "its SHA-256 is not the one in the manifest: it was changed"
            )
        return content

    # Parents

    def _find(self, wanted: dict[str, Any], depth: int) -> Image:
        """Open the parent, wherever it is by now: its hash names it."""
        problem: Exception | None = None
        for number, path in enumerate(self._candidates(str(wanted["path"]))):
            try:
                if _manifest_sha256(path) != wanted["sha256"]:
                    continue
            except OSError as error:
                raise_if_short(f"open {path}", error)
                if not number:  # what is beside it may be something else
                    problem = error
                continue
            try:
                return Image(path, depth=depth)
            except (OSError, SnapshotFormatError) as error:  # another copy may be good
                problem = problem or error
        if problem is not None:
            raise problem
        raise SnapshotFormatError(
            self.path,
            f"its parent {wanted['id']} is neither at {wanted['path']!r} nor beside it, or was"
            " changed",
        )

    def _candidates(self, hint: str) -> Iterator[str]:
        here = os.path.dirname(self.path)
        yield os.path.join(here, hint)
        try:
            names = sorted(os.listdir(here))
        except OSError as error:
            raise_if_short(f"open {here}", error)
            return
        for name in names:
            if not name.startswith("."):
                yield os.path.join(here, name)

    # Content

    def parts(self, start: int, end: int) -> Iterator[Part]:
        """Yield what is known of [start, end), through the parents, in order."""
        reached = start
        for run in self.runs.within(start, end):
            first, last = max(run.start, start), min(run.end, end)
            if first > reached:
                yield Part(reached, first, self, None)
            if run.state is RunState.PARENT:
                if self.parent is None:
                    raise SnapshotFormatError(self.path, f"{first:#x} needs a parent, and has none")
                yield from self.parent.parts(first, last)
            else:
                yield Part(first, last, self, run)
            reached = last
        if reached < end:
            yield Part(reached, end, self, None)

    def read(self, address: int, length: int) -> bytes:
        """Return content; LookupError where there is none."""
        end = address + length
        run = self._last
        if run is not None and run.start <= address and end <= run.end:
            return self._content(run, address, end)
        if length and (run := self.runs.at(address)) is not None and end <= run.end:
            if run.state is RunState.DATA:
                self._last = run
                return self._content(run, address, end)
            if run.state is RunState.PARENT and self.parent is not None:
                return self.parent.read(address, length)
        return b"".join(self.read_part(part) for part in self.parts(address, end))

    def _content(self, run: SnapshotRun, start: int, end: int) -> bytes:
        """Return a part of a run of data. All of it is read and checked the first time."""
        first = start - run.start
        if run.stored < run.length or run.start not in self._good or run.start in self._chunks:
            return self.chunk(run)[first : end - run.start]
        content = _pread(self._pages.number, end - start, run.offset + first)
        if len(content) != end - start:
            raise SnapshotFormatError(
                self._place(PAGES), "it has become shorter since it was opened", run.offset + first
            )
        return content

    def chunk(self, run: SnapshotRun) -> bytes:
        """Return the content of a run of data, and check it."""
        known = self._chunks.get(run.start)
        if known is not None:
            self._chunks.move_to_end(run.start)
            return known
        content = self._chunk(run)
        self._good.add(run.start)
        self._chunks[run.start] = content
        if len(self._chunks) > _KEPT:
            self._chunks.popitem(last=False)
        return content

    def _chunk(self, run: SnapshotRun) -> bytes:
        content = _pread(self._pages.number, run.stored, run.offset)
        if len(content) < run.stored:
            raise self._is_cut(run)
        if run.stored < run.length:
            if self._unpack is None:
                raise SnapshotFormatError(
                    self._place(PAGES), "shorter than the run, and not compressed", run.offset
                )
            try:
                content = self._unpack(content, run.length)
            except ValueError as error:
                raise SnapshotFormatError(self._place(PAGES), str(error), run.offset) from None
        if len(content) != run.length or self._sum(content) != run.checksum:
            raise self._differs(run)
        return content

    def _is_cut(self, run: SnapshotRun) -> SnapshotFormatError:
        return SnapshotFormatError(
            self._place(PAGES),
            f"the content of [{run.start:#x}, {run.end:#x}) is cut: the file was truncated",
            run.offset,
        )

    def _differs(self, run: SnapshotRun) -> SnapshotFormatError:
        return SnapshotFormatError(
            self._place(PAGES),
            f"the content of [{run.start:#x}, {run.end:#x}) is not what was written: its"
            " checksum differs",
            run.offset,
        )

    def check_chunk(self, run: SnapshotRun) -> None:
        """Raise SnapshotFormatError if the content of a run of data is not what was written."""
        if run.stored < run.length:
            self._chunk(run)
            return
        content = reader.read(self._pages.number, run.length, run.offset)
        if len(content) < run.length:
            raise self._is_cut(run)
        if self._sum(content) != run.checksum:
            raise self._differs(run)

    def pages_fileno(self) -> int:
        """Return the descriptor of the file `pages`."""
        return self._pages.number

    def pages_source(self) -> FileSource | None:
        """Return the file `pages` as a page source; None if it is empty."""
        if not os.fstat(self._pages.number).st_size:
            return None
        source = FileSource(self._pages.number)
        source._warns = False  # a program never sees it
        return source

    def regions_in(self, start: int, end: int) -> list[SnapshotRegion]:
        """Return the regions that touch [start, end)."""
        first = bisect_right(self.regions, start, key=lambda region: region.end)
        last = bisect_left(self.regions, end, key=lambda region: region.start)
        return self.regions[first:last]

    def region_at(self, address: int) -> SnapshotRegion | None:
        """Return the region that holds an address."""
        return next(iter(self.regions_in(address, address + 1)), None)

    def read_part(self, part: Part) -> bytes:
        """Return the content of a part; LookupError where there is none."""
        run = part.run
        if run is not None and run.state is RunState.DATA:
            return part.image._content(run, part.start, part.end)
        region = self.region_at(part.start)
        if run is None or region is None:
            raise LookupError(f"{part.start:#x} was not mapped")
        if run.state is RunState.ZERO or (run.state is RunState.ABSENT and not region.has_file):
            return bytes(part.end - part.start)
        raise LookupError(
            f"the snapshot does not have [{part.start:#x}, {part.end:#x}) of {region}:"
            f" {run.state.value}"
        )

    # Ending

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._closes

    def hold(self, holder: object) -> None:
        """Keep the files open until `let_go`, also after `close`."""
        with self._holding:
            self._holders.add(holder)

    def let_go(self, holder: object) -> None:
        """Undo a `hold`; may be called again."""
        with self._holding:
            self._holders.discard(holder)
            if self._closes:
                self._close_unless_held()

    def close(self) -> None:
        """Close the files, and the parents'."""
        with self._holding:
            self._closes = True
            self._close_unless_held()

    def _close_unless_held(self) -> None:
        if not self._holders:
            self._steps.close()


_ROOMS = 3  # of a thread: what it uses, what it reads, and one for a signal handler


class Reader(threading.local):
    """Reads chunks into memory that each thread keeps: new memory for each costs more than that.

    A signal handler may read while its thread reads, or uses what was read.
    """

    def __init__(self) -> None:
        self._rooms = [bytearray(CHUNK + 1), bytearray(CHUNK + 1)]

    def read(self, descriptor: int, length: int, offset: int) -> memoryview:
        """Return so much, or up to the end of the file."""
        room = self._free_room()
        view = memoryview(room)
        done = 0
        while done < length:
            more = os.preadv(descriptor, [view[done:length]], offset + done)
            if not more:
                break
            done += more
        if len(self._rooms) < _ROOMS:
            self._rooms.append(room)
        return view[:done]

    def _free_room(self) -> bytearray:
        for _ in range(len(self._rooms)):
            try:
                room = self._rooms.pop(0)
            except IndexError:  # a signal handler has it
                break
            try:
                room.pop()  # BufferError: somebody holds what was read into it
            except BufferError:
                self._rooms.append(room)
            else:
                room.append(0)
                return room
        return bytearray(CHUNK + 1)


reader = Reader()


def _manifest_sha256(path: str) -> str:
    """Return the hash of a manifest; an empty string if there is no snapshot."""
    try:
        with open_directory(path) as folder:
            raw = _read(folder, path, MANIFEST, MANIFEST_MOST)
    except SnapshotFormatError:  # a directory of something else
        return ""
    except OSError as error:
        if error.errno in _NO_DIRECTORY:
            return ""
        raise
    return hashlib.sha256(raw).hexdigest()


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    """Read so much, or up to the end of the file.

    Of a disk that cannot read some of it the kernel returns what comes before, and the error when
    it is asked for the rest.
    """
    content = os.pread(descriptor, length, offset)
    if len(content) == length:
        return content
    parts = [content]
    while content and (length := length - len(content)):
        offset += len(content)
        content = os.pread(descriptor, length, offset)
        parts.append(content)
    return b"".join(parts)


def _regions(rows: list[dict[str, Any]]) -> Iterator[SnapshotRegion]:
    reached = 0
    for row in rows:
        fields = {name: row[name] for name in SnapshotRegion.__slots__}
        for name, value in fields.items():
            if type(value) is not (str if name in _TEXTS else int):
                raise TypeError(f"{name} of a region is {value!r}")
        region = SnapshotRegion(**fields)
        if (
            region.start < reached
            or region.length <= 0
            or (region.start | region.length) % PAGE_SIZE
            or region.end > ADDRESS_LIMIT
        ):
            raise ValueError(f"the region at {region.start:#x} overlaps, or is not of whole pages")
        reached = region.end
        yield region


def _file(folder: Descriptor, path: str, name: str) -> Descriptor:
    try:
        return open_in(folder, name)
    except FileNotFoundError:
        if name == MANIFEST:
            raise SnapshotFormatError(path, f"this is no snapshot: it has no {MANIFEST}") from None
        raise SnapshotFormatError(os.path.join(path, name), "the file is missing") from None
    except OSError as error:
        place = os.path.join(path, name)
        if error.errno == errno.ELOOP:
            raise SnapshotFormatError(place, "a symbolic link, which is not followed") from None
        if error.errno != errno.EINVAL:
            raise OSError(error.errno, error.strerror, place) from None
        raise SnapshotFormatError(place, "not a regular file") from None


def _read(
    folder: Descriptor,
    path: str,
    name: str,
    most: int,
    *,
    is_length: Callable[[int], int] | None = None,
) -> bytes:
    with _file(folder, path, name) as file:
        size = os.fstat(file.number).st_size
        if size > most:
            raise SnapshotFormatError(os.path.join(path, name), f"{size} bytes are too many")
        if is_length is not None and size != is_length(runs_count(os.pread(file.number, 64, 0))):
            raise SnapshotFormatError(
                os.path.join(path, name), f"{size} bytes: truncated, or longer than its table"
            )
        parts = []
        while data := os.read(file.number, 1 << 24):
            parts.append(data)
        return b"".join(parts)
