"""The files of a snapshot, as docs/snapshots.md describes them: reading and writing both."""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from pyuffd._arguments import checked_index
from pyuffd._enums import Word
from pyuffd._errors import SnapshotFormatError
from pyuffd._image_calls import first_bad_row
from pyuffd._pages import ADDRESS_LIMIT, PAGE_SIZE
from pyuffd._vmas import is_of_file

FORMAT = "pyuffd-snapshot"
VERSION = 1
MANIFEST, PAGES, RUNS, NOTES = "manifest.json", "pages", "runs", "notes"
# No run of data is longer, so that reading one page needs a checksum of this much at most.
CHUNK = 1 << 20
# Larger manifests are refused before they are read.
MANIFEST_MOST = 256 << 20

_MAGIC = b"pyuffdRN"
_HEADER = struct.Struct("<8sIIQQ")
_ROW = struct.Struct("<6Q")
SEAL = "manifest_sha256"
_BLANK = "0" * 64


class RunState(Word):
    """What a snapshot knows of pages.

    Attributes:
        DATA: Their content is in the snapshot.
        ZERO: They were present and all zeros.
        PARENT: They are as in the parent, the snapshot before.
        ABSENT: They were mapped, and the process had nothing of its own there: zeros, or what the
            file of a private mapping holds. Shared memory is never ABSENT.
        LOST: Their content at the instant is unknown: they could not be read, or the process gave
            them back before they were saved.
        SHARED: Shared memory that was left out, since others write it too.
    """

    DATA = "data"
    ZERO = "zero"
    PARENT = "parent"
    ABSENT = "absent"
    LOST = "lost"
    SHARED = "shared"


NUMBERS = {state: number for number, state in enumerate(RunState, 1)}
_STATES = {number: state for state, number in NUMBERS.items()}


# A run as numbers: start, length, number of the state, offset, stored, checksum.
Row = tuple[int, int, int, int, int, int]


class SnapshotRun(NamedTuple):
    """Pages in one state.

    Attributes:
        start: First address.
        length: Bytes.
        state: What is known of them.
        offset: Where their content is in the file `pages`; 0 unless `state` is DATA.
        stored: Bytes there; less than `length` if they are compressed.
        checksum: Of the content.
    """

    start: int
    length: int
    state: RunState
    offset: int = 0
    stored: int = 0
    checksum: int = 0

    @property
    def end(self) -> int:
        """The address behind the last."""
        return self.start + self.length


class Runs(Sequence[SnapshotRun]):
    """The table of runs, packed, in ascending order and without overlaps."""

    def __init__(self, packed: bytes) -> None:
        self._packed = packed
        self._starts = memoryview(packed).cast("Q")[:: _ROW.size // 8]

    def __len__(self) -> int:
        return len(self._packed) // _ROW.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = checked_index("run", index, len(self))
        return self._run(*_ROW.unpack_from(self._packed, index * _ROW.size))

    def __iter__(self) -> Iterator[SnapshotRun]:
        for row in _ROW.iter_unpack(self._packed):
            yield self._run(*row)

    def _run(
        self, start: int, length: int, state: int, offset: int, stored: int, checksum: int
    ) -> SnapshotRun:
        return SnapshotRun(start, length, _STATES[state], offset, stored, checksum)

    def at(self, address: int) -> SnapshotRun | None:
        """Return the run that holds an address, or None."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        run: SnapshotRun = self[index]
        return run if address < run.end else None

    def within(self, start: int, end: int) -> Iterator[SnapshotRun]:
        """Yield the runs that touch [start, end)."""
        index = max(0, bisect_right(self._starts, start) - 1)
        while index < len(self):
            run: SnapshotRun = self[index]
            if run.start >= end:
                return
            if run.end > start:
                yield run
            index += 1

    @property
    def rows(self) -> bytes:
        """The rows as they are in the file `runs`, behind its header."""
        return self._packed

    def pack(self) -> bytes:
        """Return the content of the file `runs`."""
        return _HEADER.pack(_MAGIC, VERSION, _ROW.size, len(self), 0) + self._packed

    @classmethod
    def of(cls, runs: Sequence[SnapshotRun]) -> Runs:
        """Pack runs that are in ascending order."""
        return cls.of_rows([(*run[:2], NUMBERS[run.state], *run[3:]) for run in runs])

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> Runs:
        """Pack rows that are in ascending order."""
        return cls(array("Q", chain.from_iterable(rows)).tobytes())


def runs_length(count: int) -> int:
    """Return the length of the file `runs` with this many rows."""
    return _HEADER.size + count * _ROW.size


def runs_count(head: bytes) -> int:
    """Return how many rows the file `runs` says it has; -1 if it has no header."""
    return int(_HEADER.unpack_from(head)[3]) if len(head) >= _HEADER.size else -1


def read_runs(path: str, raw: bytes, sha256: str, pages_length: int) -> Runs:
    """Check the content of the file `runs`, and return it."""

    def wrong(text: str, offset: int | None = None) -> SnapshotFormatError:
        return SnapshotFormatError(path, text, offset)

    if hashlib.sha256(raw).hexdigest() != sha256:
        raise wrong("its SHA-256 is not the one in the manifest: truncated, changed, or not its")
    if len(raw) < _HEADER.size:
        raise wrong("truncated: it has no header")
    magic, version, row, count, _ = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != VERSION or row != _ROW.size:
        raise wrong(f"version {version}, rows of {row} bytes: this version cannot read it")
    if len(raw) != _HEADER.size + count * row:
        raise wrong(f"{len(raw)} bytes for {count} runs")
    rows = raw[_HEADER.size :]
    bad = first_bad_row(rows, count, pages_length, CHUNK)
    if bad < count:
        reached = sum(_ROW.unpack_from(rows, (bad - 1) * row)[:2]) if bad else 0
        start, length, state, *_ = _ROW.unpack_from(rows, bad * row)
        at = _HEADER.size + bad * row
        if start < reached or not length or start + length >= ADDRESS_LIMIT:
            raise wrong(f"the run at {start:#x} overlaps, or is out of order", at)
        if start % PAGE_SIZE or length % PAGE_SIZE:
            raise wrong(f"the run at {start:#x} is not of whole pages", at)
        if state not in _STATES:
            raise wrong(f"the run at {start:#x} has the unknown state {state}", at)
        raise wrong(f"the content of the run at {start:#x} is outside of the file", at)
    return Runs(rows)


@dataclass(frozen=True, slots=True)
class SnapshotRegion:
    """A mapping of the process at the instant.

    Attributes:
        start: First address.
        length: Size in bytes.
        permissions: As in /proc/PID/maps, "rw-p".
        kind: The kind of memory, a value of `MappingKind`.
        path: The file's path, or a name such as "[heap]"; "" without either.
        file_offset: Where in the file it begins.
        device: The file's device; 0 without a file.
        inode: The file's inode; 0 without a file, and of the first System V segment.
        page_size: The size of its pages in bytes.
    """

    start: int
    length: int
    permissions: str
    kind: str
    path: str
    file_offset: int
    device: int
    inode: int
    page_size: int

    @property
    def end(self) -> int:
        """The address behind the last."""
        return self.start + self.length

    @property
    def has_file(self) -> bool:
        """Whether it was of a file."""
        return is_of_file(self.device, self.path, shared=self.permissions[3] == "s")

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x}) {self.permissions} {self.path or self.kind}"


@dataclass(frozen=True, slots=True)
class SnapshotGap:
    """A range of which the snapshot does not have the content of the instant, and why.

    Attributes:
        start: First address.
        length: Bytes.
        reason: "shared": left out, or copied in the stop although others write it. "file": a shared
            mapping of a file that the process cannot write. "special": the kernel's own pages, or
            its devices. "dropped": the process gave it back before it was saved. "unfilled": a
            userfaultfd fills it when it is touched, which nobody had done. "unreadable". "unseen":
            shared memory that the process had not touched, which only CAP_SYS_ADMIN or
            CAP_CHECKPOINT_RESTORE could have shown.
        detail: More about it: the file's name.
    """

    start: int
    length: int
    reason: str
    detail: str = ""


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the content of the manifest's file, which tells its own SHA-256."""
    facts = {**manifest, SEAL: _BLANK}
    text = "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(facts[key])}" for key in sorted(facts))
    text += "\n}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(f'"{SEAL}": "{_BLANK}"', f'"{SEAL}": "{digest}"').encode()


def _lines(value: object) -> str:
    """Return JSON with a line for each member of a list: `indent` would need ten times as long."""
    if not isinstance(value, list) or not value:
        return json.dumps(value, sort_keys=True)
    return "[\n " + ",\n ".join(json.dumps(one, sort_keys=True) for one in value) + "\n]"


def unseal(path: str, raw: bytes) -> dict[str, Any]:
    """Check the content of a manifest's file, and return it."""
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise SnapshotFormatError(path, f"truncated or changed: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SnapshotFormatError(path, "not the manifest of a snapshot")
    if manifest.get("version") != VERSION:
        raise SnapshotFormatError(
            path, f"version {manifest.get('version')!r}: this pyuffd reads version {VERSION}"
        )
    digest = str(manifest.get(SEAL))
    blank = raw.replace(f'"{SEAL}": "{digest}"'.encode(), f'"{SEAL}": "{_BLANK}"'.encode())
    if hashlib.sha256(blank).hexdigest() != digest:
        raise SnapshotFormatError(path, "its SHA-256 is not the one that it says: changed")
    return manifest
