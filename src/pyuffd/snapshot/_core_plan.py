"""Which memory belongs into a core: coredump_filter, MADV_DONTDUMP, and what has content at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import TYPE_CHECKING

from pyuffd.remote import Mapping, MappingKind
from pyuffd.snapshot._core_elf import PAGE_SIZE, Segment

if TYPE_CHECKING:
    from pyuffd.pagemap import PageRanges

# Part of a mapping without content costs nothing in a sparse file, but counts in its length, which
# file systems limit (ext4: 16 TiB). So in blocks of this size nothing is left out only if there is
# something, and the rest of a larger mapping has no bytes in the file.
BLOCK = 1 << 30
ELF_MAGIC = b"\x7fELF"

_DONT_DUMP, _SHARED = "dd", "sh"
_DEVICE = frozenset(("io", "pf"))  # reading device memory may have effects
_DELETED = " (deleted)"


class Filter(IntFlag):
    """The bits of /proc/PID/coredump_filter, see core(5)."""

    ANONYMOUS_PRIVATE = 1 << 0
    ANONYMOUS_SHARED = 1 << 1
    FILE_PRIVATE = 1 << 2
    FILE_SHARED = 1 << 3
    ELF_HEADERS = 1 << 4
    HUGETLB_PRIVATE = 1 << 5
    HUGETLB_SHARED = 1 << 6


class Part(IntFlag):
    """How much of a mapping is wanted."""

    NOTHING = 0
    HEADER = 1  # its first page, if that begins with ELF_MAGIC
    ALL = 2


def read_filter(pid: int) -> Filter:
    """Return a process's coredump_filter."""
    return Filter(int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) & 0x7F)


def wanted(mapping: Mapping, own_bytes: int, dump_filter: Filter, *, full: bool) -> Part:
    """Return how much of a mapping belongs into the core, by the kernel's rules for its own cores.

    Args:
        mapping: With flags.
        own_bytes: What it has of pages of its own: anonymous, or copied on write.
        dump_filter: The process's.
        full: All that can be read, whatever the filter and MADV_DONTDUMP say.
    """
    if mapping.path == "[vdso]":
        return Part.ALL
    if mapping.kind is MappingKind.SPECIAL or mapping.flags & _DEVICE:
        return Part.NOTHING
    if full:
        return Part.ALL if not _is_reserved(mapping, own_bytes) else Part.NOTHING
    if _DONT_DUMP in mapping.flags:
        return Part.NOTHING
    shared = _SHARED in mapping.flags if mapping.flags else mapping.shared
    if mapping.kind is MappingKind.HUGETLB:
        bit = Filter.HUGETLB_SHARED if shared else Filter.HUGETLB_PRIVATE
        return Part.ALL if dump_filter & bit else Part.NOTHING
    if shared:
        gone = mapping.path.endswith(_DELETED)
        bit = Filter.ANONYMOUS_SHARED if gone else Filter.FILE_SHARED
        return Part.ALL if dump_filter & bit else Part.NOTHING
    if dump_filter & Filter.ANONYMOUS_PRIVATE and (
        own_bytes or (not mapping.inode and not _is_reserved(mapping, own_bytes))
    ):
        return Part.ALL
    if not mapping.inode:
        return Part.NOTHING
    if dump_filter & Filter.FILE_PRIVATE:
        return Part.ALL
    if dump_filter & Filter.ELF_HEADERS and not mapping.offset:
        return Part.HEADER
    return Part.NOTHING


def _is_reserved(mapping: Mapping, own_bytes: int) -> bool:
    """Whether it is address space without content, and not small memory that reads as zeros."""
    if mapping.inode or own_bytes:
        return False
    return mapping.permissions.startswith("---") or mapping.length > BLOCK


@dataclass(frozen=True, slots=True)
class Wanted:
    """A mapping and how much of it belongs into the core."""

    mapping: Mapping
    part: Part


def lay_out(parts: Iterable[Wanted], data: PageRanges, first: int) -> list[Segment]:
    """Return the segments, in ascending order, with their places in the file from `first` on.

    Args:
        parts: All mappings; those of which nothing is wanted have segments too, without bytes.
        data: What has content.
        first: The first free byte of the file, page-aligned.
    """
    segments: list[Segment] = []
    at = first
    for one in parts:
        for start, end, size in _pieces(one, data):
            # Readers (elfutils) need an ascending offset of empty segments too.
            segments.append(Segment(start, end, one.mapping.permissions, size, at))
            at += size
    return segments


def _pieces(one: Wanted, data: PageRanges) -> Sequence[tuple[int, int, int]]:
    """Return (start, end, bytes in the file) of a mapping's pieces."""
    start, end = one.mapping.start, one.mapping.end
    if one.part is Part.NOTHING:
        return ((start, end, 0),)
    if one.part is Part.HEADER:
        return ((start, end, PAGE_SIZE),)
    if end - start <= BLOCK:
        return ((start, end, end - start),)
    blocks = [(at, min(at + BLOCK, end)) for at in range(start, end, BLOCK)]
    pieces: list[tuple[int, int, int]] = []
    for (first, last), used in zip(blocks, data.bytes_in(blocks), strict=True):
        size = last - first if used else 0
        if pieces and bool(pieces[-1][2]) == bool(size):
            before = pieces.pop()
            pieces.append((before[0], last, before[2] + size))
        else:
            pieces.append((first, last, size))
    return pieces


class Flags:
    """VmFlags of mappings, read while the process runs: smaps walks all of its page tables."""

    def __init__(self, mappings: Iterable[Mapping]) -> None:
        self._by_start: dict[tuple[int, str, int, int], frozenset[str]] = {}
        self._by_end: dict[tuple[int, str, int], frozenset[str]] = {}
        for m in mappings:
            self._by_start[m.start, m.permissions, m.inode, m.offset] = m.flags
            self._by_end[m.end, m.permissions, m.inode] = m.flags

    def of(self, mapping: Mapping) -> frozenset[str] | None:
        """Return those of a mapping, which may have grown since; None for a new one."""
        key = mapping.start, mapping.permissions, mapping.inode, mapping.offset
        found = self._by_start.get(key)
        if found is None:
            found = self._by_end.get((mapping.end, mapping.permissions, mapping.inode))
        return found


def map_file(pid: int, mapping: Mapping) -> int | None:
    """Open what is mapped, whatever its name is by now; None without the privilege."""
    try:
        return os.open(
            f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDONLY | os.O_CLOEXEC
        )
    except OSError:
        return None


def file_extents(fd: int, mapping: Mapping) -> list[tuple[int, int]]:
    """Return the addresses at which a mapped file has content, by whole pages."""
    found = []
    at, last = mapping.offset, mapping.offset + mapping.length
    while at < last:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, begin, os.SEEK_HOLE)
        except OSError:  # nothing any more
            break
        if begin >= last:
            break
        begin, end = begin & -PAGE_SIZE, min(-(-end & -PAGE_SIZE), last)
        found.append((begin - mapping.offset + mapping.start, end - mapping.offset + mapping.start))
        at = end
    return found
