"""Another process's memory in a file, in C (layer L2).

Everything is packed and in ascending order. Every call releases the GIL.
"""

from __future__ import annotations

import errno
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pyuffd._dirty_calls import intersect
from pyuffd._errors import raise_errno
from pyuffd._rows import new_ranges, owned, rows_of, take_ranges
from pyuffd._shim import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

_OWN, _ALL = int(lib.UFFD_IMAGE_OWN), int(lib.UFFD_IMAGE_ALL)
_PIECE = struct.Struct("=3Q")


_OPS = {
    int(lib.UFFD_REPLACE_REGISTER): "UFFDIO_REGISTER",
    int(lib.UFFD_REPLACE_LOOK): "PAGEMAP_SCAN",
    int(lib.UFFD_REPLACE_MAP): "mmap",
}


def replace_untouched(
    uffd: int,
    pagemap_fd: int,
    spans: Sequence[tuple[int, int]],
    mapped: Iterable[tuple[int, int, int, int]],
) -> int | None:
    """Map files in the place of memory, private; return None, or where it has pages.

    Who touches it meanwhile waits until all is mapped. It is not changed if it has pages.

    Args:
        uffd: A userfaultfd after UFFDIO_API, with nothing registered; -1 if none can be opened:
            what others write meanwhile may be lost.
        pagemap_fd: /proc/self/pagemap; -1 if that cannot be read.
        spans: The memory, (start, length) each.
        mapped: (start, length, offset, descriptor) each, in the order of the spans.
    """
    packed = array("Q", [number for span in spans for number in span])
    rows = array("Q", [number for row in mapped for number in row])
    step, at = ffi.new("uint32_t *"), ffi.new("uint64_t *")
    with (
        ffi.from_buffer("uint64_t[]", packed) as memory,
        ffi.from_buffer("struct uffd_replacement[]", rows) as vec,
    ):
        code = lib.uffd_replace_untouched(
            uffd, pagemap_fd, memory, len(spans), vec, len(rows) // 4, step, at
        )
    if code == -errno.EEXIST and step[0] == lib.UFFD_REPLACE_LOOK:
        return int(at[0])
    if code:
        length = dict(spans).get(int(at[0])) if step[0] != lib.UFFD_REPLACE_MAP else None
        raise_errno(_OPS[step[0]], -code, int(at[0]), length)
    return None


class Pieces:
    """Where memory is in a file: (start, end, offset, whether file pages count) of each, in C."""

    def __init__(self, pieces: Iterable[tuple[int, int, int, bool]]) -> None:
        rows = sorted(pieces)
        for before, row in pairwise(rows):
            if row[0] < before[1]:
                raise ValueError(f"pieces overlap at {row[0]:#x}")
        self._count = len(rows)
        packed = b"".join(_PIECE.pack(*row[:3]) for row in rows)
        what = struct.pack(f"={len(rows)}I", *(_ALL if row[3] else _OWN for row in rows))
        self._vec: Any = ffi.from_buffer("struct uffd_image_piece[]", packed)
        self._what: Any = ffi.from_buffer("uint32_t[]", what)

    def __len__(self) -> int:
        return self._count

    def scan(
        self,
        pagemap_fd: int,
        *,
        unprotected: bool = False,
        within: memoryview | None = None,
    ) -> memoryview:
        """Return the pages that are in memory or on swap, packed; by PAGEMAP_SCAN.

        Args:
            pagemap_fd: An open /proc/PID/pagemap.
            unprotected: Only those without write-protection.
            within: Only those in these packed ranges; nothing else is looked at.
        """
        flags = lib.UFFD_IMAGE_UNPROTECTED if unprotected else 0
        return self._scan(pagemap_fd, flags, within)[0]

    def scan_apart(
        self, pagemap_fd: int, *, unprotected: bool = False, within: memoryview | None = None
    ) -> tuple[memoryview, memoryview]:
        """Return what `scan` does, and those of them on swap, or with a mark that looks like it."""
        flags = lib.UFFD_IMAGE_UNPROTECTED if unprotected else 0
        return self._scan(pagemap_fd, flags, within)

    def _scan(
        self, pagemap_fd: int, flags: int, within: memoryview | None
    ) -> tuple[memoryview, memoryview]:
        found = new_ranges()
        swapped = new_ranges()
        limits = ffi.NULL
        if within is not None:
            vec, count = rows_of(within)
            limits = ffi.new("struct uffd_image_ranges *", (vec, count))
        code = lib.uffd_image_scan(
            pagemap_fd, self._vec, self._what, self._count, flags, limits, found, swapped
        )
        packed, apart = take_ranges(found), take_ranges(swapped)
        if code:
            raise_errno("PAGEMAP_SCAN", -code)
        if within is None:
            return packed, apart
        return intersect(packed, within), intersect(apart, within)


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy found, packed; `lost` pages are in `zero` too."""

    zero: memoryview
    lost: memoryview
    bytes: int


def copy(
    pid: int,
    mem_fd: int,
    ranges: memoryview,
    pieces: Pieces,
    fd: int,
    *,
    overwrite: bool,
    gentle: bool = False,
) -> Copied:
    """Copy packed ranges to their places in a file; pages of zeros are left out.

    Args:
        pid: The process, or a thread of it.
        mem_fd: An open /proc/PID/mem, or -1.
        ranges: What to copy.
        pieces: Where it goes.
        fd: The file.
        overwrite: The file may have content at these places.
        gentle: Let other threads of the machine have the CPU first.
    """
    vec, count = rows_of(ranges)
    zero, lost = new_ranges(), new_ranges()
    done = ffi.new("uint64_t *")
    flags = lib.UFFD_IMAGE_OVERWRITE if overwrite else 0
    flags |= lib.UFFD_IMAGE_GENTLE if gentle else 0
    code = lib.uffd_image_copy(
        pid, mem_fd, vec, count, pieces._vec, len(pieces), fd, flags, zero, lost, done
    )
    found = Copied(take_ranges(zero), take_ranges(lost), int(done[0]))
    if code:
        raise_errno("copying memory to a file", -code, completed=found.bytes)
    return found


def write(
    ranges: memoryview,
    data: Buffer,
    pieces: Pieces,
    fd: int,
    *,
    overwrite: bool = False,
    if_changed: bool = False,
) -> memoryview:
    """Write packed ranges whose content is packed in a buffer; return the pages of zeros.

    Args:
        ranges: What to write.
        data: Their content.
        pieces: Where it goes.
        fd: The file.
        overwrite: The file may have content at these places.
        if_changed: It may even have the same content: read it, and write what differs.
    """
    vec, count = rows_of(ranges)
    zero = new_ranges()
    flags = lib.UFFD_IMAGE_OVERWRITE if overwrite else 0
    flags |= lib.UFFD_IMAGE_IF_CHANGED if if_changed else 0
    with ffi.from_buffer("char[]", data) as pointer:
        code = lib.uffd_image_write(vec, count, pointer, pieces._vec, len(pieces), fd, flags, zero)
    packed = take_ranges(zero)
    if code:
        raise_errno("writing memory to a file", -code)
    return packed


def begin_sync(fd: int) -> None:
    """Have the kernel write a file's new content to the disk; fsync(2) waits for it, and tells."""
    lib.uffd_image_begin_sync(fd)


def be_gentle() -> None:
    """Have this thread go behind others of the machine, from now on: for threads made for that."""
    lib.uffd_be_gentle()


def differ(a: Buffer, b: Buffer, start: int) -> memoryview:
    """Return the pages in which two buffers of one length differ, as ranges from `start`."""
    found = new_ranges()
    with ffi.from_buffer("char[]", a) as one, ffi.from_buffer("char[]", b) as other:
        code = lib.uffd_image_differ(one, other, min(len(one), len(other)), start, found)
    packed = take_ranges(found)
    if code:
        raise_errno("comparing pages", -code, start)
    return packed


@dataclass(frozen=True, slots=True)
class Chain:
    """Where the content of a range is, in the files of a snapshot and its parents.

    Attributes:
        runs: Packed (offset, leaf, offset in the leaf); leaf 0 is zeros, leaf n + 1 the nth file.
        others: Packed (start, end, number of the state) of what is neither data nor zeros; 0 is
            memory that was not mapped.
        pieces: Packed (start, end, bytes of data), which cover all data.
        data_bytes: Bytes of data.
        is_packed: Whether some of it is compressed, so that the offsets in files mean nothing.
    """

    runs: memoryview
    others: memoryview
    pieces: memoryview
    data_bytes: int
    is_packed: bool


def resolve_chain(tables: Sequence[bytes], start: int, end: int, piece: int) -> Chain:
    """Look up [start, end) in tables of runs, the newest first, as `_format.Runs` packs them.

    Raises:
        UffdOSError: EINVAL - a run refers to a parent that is not there.
    """
    found = owned("struct uffd_chain", lib.uffd_chain_free)
    owners = [ffi.from_buffer("uint64_t[]", table) for table in tables]
    rows = ffi.new(
        "struct uffd_chain_table[]",
        [(owner, len(table) // 48) for owner, table in zip(owners, tables, strict=True)],
    )
    code = lib.uffd_chain_resolve(rows, len(tables), start, end, piece, found)
    parts = (found.runs, found.others, found.pieces)
    runs, others, pieces = (take_ranges(part, found) for part in parts)
    if code:
        raise_errno("snapshot", -code, start, end - start)
    return Chain(runs, others, pieces, int(found.data_bytes), bool(found.is_packed))


def first_bad_row(table: Buffer, count: int, pages_length: int, chunk: int) -> int:
    """Return which row of a table of runs cannot be right; `count` if all can."""
    rows, _ = rows_of(table, "uint64_t")
    return int(lib.uffd_chain_first_bad(rows, count, pages_length, chunk))


@dataclass(frozen=True, slots=True)
class HotPlan:
    """A working set as ranges of memory.

    Attributes:
        ranges: Rows (begin, end, number of the memory), in the order of filling.
        windows: (first row, row behind the last, number of the memory) of each.
        bytes: Bytes of all ranges.
    """

    ranges: memoryview
    windows: list[tuple[int, int, int]]
    bytes: int

    def rows(self, first: int, past: int) -> memoryview:
        """Return the ranges of a window, as an array of three columns."""
        flat = self.ranges[3 * first : 3 * past]
        return flat.cast("B").cast("Q", [past - first, 3])


def hot_check(rows: bytes, image_pages: int, recordings: int, most_pages: int) -> bool:
    """Return whether rows can be those of a working set of an image; see `snapshot/hot.h`."""
    count = len(rows) // int(lib.UFFD_HOT_ROW_SIZE)
    source, _ = rows_of(rows, "char")
    return not lib.uffd_hot_check(source, count, image_pages, recordings, most_pages)


def hot_plan(
    rows: bytes, percent: int, places: Sequence[tuple[int, int, int, int, int]], window: int
) -> HotPlan:
    """Turn the rows of a working set's file into ranges of memory; see `snapshot/hot.h`.

    `places` are (offset in the image, length, number of the memory, offset in it, page size).
    """
    found = owned("struct uffd_hot_plan", lib.uffd_hot_plan_free)
    vec = ffi.new("struct uffd_hot_place[]", [tuple(place) for place in places])
    count = len(rows) // int(lib.UFFD_HOT_ROW_SIZE)
    source, _ = rows_of(rows, "char")
    code = lib.uffd_hot_plan(source, count, percent, vec, len(places), window, found)
    ranges, windows = take_ranges(found.ranges, found), take_ranges(found.windows, found)
    if code:
        raise_errno("reading a working set", -code)
    return HotPlan(ranges, list(_PIECE.iter_unpack(windows)), int(found.bytes))


def read_ahead(ranges: memoryview, runs: memoryview, length: int, fds: Sequence[int]) -> bool:
    """Ask the kernel to read the files of rows of a `HotPlan`, all of one memory: a hint.

    `runs` are those of the memory's `Chain`, up to `length`. Returns whether there was memory to do
    so.
    """
    vec, count = rows_of(ranges)
    table, table_count = rows_of(runs)
    code = lib.uffd_hot_read_ahead(vec, count, table, table_count, length, list(fds), len(fds))
    return not code
