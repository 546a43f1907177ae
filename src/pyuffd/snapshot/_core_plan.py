"""Which memory belongs into a core: coredump_filter, MADV_DONTDUMP, and what has content at all."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path

from pyuffd._errors import raise_errno
from pyuffd.remote import Mapping, MappingKind

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


# The kernel's default (core(5)), with the words for what one of these bits writes.
_DEFAULT = {
    Filter.ANONYMOUS_PRIVATE: "anonymous private memory",
    Filter.ANONYMOUS_SHARED: "anonymous shared memory",
    Filter.ELF_HEADERS: "first pages of ELF files",
    Filter.HUGETLB_PRIVATE: "private huge pages",
}


class Part(IntFlag):
    """How much of a mapping is wanted."""

    NOTHING = 0
    HEADER = 1  # its first page, if that begins with ELF_MAGIC
    IF_WRITTEN = 2  # all of a file's private mapping if the process has written there
    ALL = 3


def read_filter(pid: int) -> Filter:
    """Return a process's coredump_filter; ProcessGoneError if it has no memory any more."""
    name = f"/proc/{pid}/coredump_filter"
    try:
        text = Path(name).read_text()
    except (FileNotFoundError, ProcessLookupError):
        text = ""
    if not text:  # so reads that of a zombie
        raise_errno(f"read {name}", errno.ESRCH)
    return Filter(int(text, 16) & 0x7F)


def filtered(dump_filter: Filter) -> tuple[str, ...]:
    """Return what a filter leaves out that the kernel's default does not."""
    return tuple(words for bit, words in _DEFAULT.items() if not dump_filter & bit)


def wanted(
    mapping: Mapping, flags: frozenset[str], dump_filter: Filter, *, full: bool
) -> tuple[Part, Part]:
    """Return how much of a mapping belongs into the core, by the kernel's rules for its own cores.

    Args:
        mapping: The mapping.
        flags: Its VmFlags; empty if they are unknown.
        dump_filter: The process's.
        full: All that can be read, whatever the filter and MADV_DONTDUMP say.

    Returns:
        How much, and for IF_WRITTEN how much if the process has not.
    """
    if mapping.kind is MappingKind.SPECIAL or flags & _DEVICE:
        return Part.NOTHING, Part.NOTHING
    if full:
        return Part.ALL, Part.ALL
    if _DONT_DUMP in flags:
        return Part.NOTHING, Part.NOTHING
    shared = _SHARED in flags if flags else mapping.shared
    if mapping.kind is MappingKind.HUGETLB:
        bit = Filter.HUGETLB_SHARED if shared else Filter.HUGETLB_PRIVATE
        return _all_if(dump_filter & bit)
    if shared:
        gone = mapping.path.endswith(_DELETED)
        return _all_if(dump_filter & (Filter.ANONYMOUS_SHARED if gone else Filter.FILE_SHARED))
    if not mapping.has_file:
        return _all_if(dump_filter & Filter.ANONYMOUS_PRIVATE)
    if dump_filter & Filter.FILE_PRIVATE:
        return Part.ALL, Part.ALL
    has_header = dump_filter & Filter.ELF_HEADERS and not mapping.offset
    otherwise = Part.HEADER if has_header else Part.NOTHING
    if dump_filter & Filter.ANONYMOUS_PRIVATE:
        return Part.IF_WRITTEN, otherwise
    return otherwise, otherwise


def _all_if(wanted: int) -> tuple[Part, Part]:
    part = Part.ALL if wanted else Part.NOTHING
    return part, part


def is_left_out(flags: frozenset[str]) -> bool:
    """Whether a mapping was marked by MADV_DONTDUMP."""
    return _DONT_DUMP in flags


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
