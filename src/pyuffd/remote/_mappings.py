"""A process's mappings: packed, typed on access, cheap to compare."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pyuffd import _remote_calls as calls
from pyuffd import _vmas
from pyuffd._arguments import checked_index
from pyuffd._enums import Word
from pyuffd._errors import raise_if_short
from pyuffd._pages import PAGE_SIZE

_ROW = struct.Struct(f"={calls.MAP_WORDS}Q")
_LETTERS = (
    (calls.MAP_READ, "r-"),
    (calls.MAP_WRITE, "w-"),
    (calls.MAP_EXECUTE, "x-"),
    (calls.MAP_SHARED, "sp"),
)
_PERMISSIONS = {
    flags: "".join(letters[not flags & bit] for bit, letters in _LETTERS)
    for flags in range(1 << len(_LETTERS))
}
_SPECIAL = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]")
# Files of the kernel's own mounts of tmpfs, which no mount table lists.
_SHMEM_NAMES = ("/memfd:", "/dev/zero", "/SYSV", "/dev/shm/", "/drm", "/i915")
_HUGE_NAMES = ("/anon_hugepage", "/memfd:", "/SYSV")
_NO_FLAGS: frozenset[str] = frozenset()

# Above is [vsyscall].
USER_ADDRESSES = 1 << 47

# A line of the file costs as much as an ioctl.
_QUERIES_MOST = 64


class MappingKind(Word):
    """The kind of memory that is mapped.

    Attributes:
        ANONYMOUS: Private memory without a file.
        HEAP: The same, grown by brk(2).
        STACK: The main thread's stack, which grows downwards by itself.
        PRIVATE_FILE: A file, copied on write.
        SHARED_FILE: A file on a disk or network, written through.
        SHMEM: Shared memory: a memfd, a file on tmpfs, System V or MAP_SHARED | MAP_ANONYMOUS.
        HUGETLB: Pages of the hugetlb pool, shared or private.
        SPECIAL: The kernel's own pages: vdso, vvar, vsyscall.
    """

    ANONYMOUS = "anonymous"
    HEAP = "heap"
    STACK = "stack"
    PRIVATE_FILE = "private file"
    SHARED_FILE = "shared file"
    SHMEM = "shmem"
    HUGETLB = "hugetlb"
    SPECIAL = "special"


@dataclass(frozen=True, slots=True)
class Mapping(_vmas.Vma):
    """One mapping of a process.

    Attributes:
        start: First address.
        end: The address behind the last.
        permissions: As in /proc/PID/maps, "rw-p".
        offset: Where in the file it begins, in bytes.
        device: The file's device, as `os.stat` gives it; 0 without a file.
        inode: The file's inode; 0 without a file, and of the first System V segment.
        path: The file's path, or a name such as "[heap]"; "" without either.
        kind: The kind of memory.
        page_size: The size of its pages in bytes; transparent huge pages do not count.
        flags: The two-letter VmFlags of smaps ("uw": registered for write-protect faults, "dd":
            left out of core dumps); only of mappings that were asked for with details.
    """

    kind: MappingKind = field(kw_only=True)

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x}) {self.permissions} {self.path or self.kind.value}"


class Mappings:
    """The mappings of a process at one moment, packed, in ascending order.

    Iterating and indexing make one `Mapping` at a time. Two of them are equal if the process had
    the same mappings; that is one comparison of bytes.
    """

    __slots__ = ("_details", "_kinds", "_names", "_packed")

    def __init__(
        self,
        packed: bytes,
        names: bytes,
        kinds: Kinds,
        details: dict[int, frozenset[str]] | None = None,
    ) -> None:
        self._packed = packed
        self._names = names
        self._kinds = kinds
        self._details = details or {}

    def __len__(self) -> int:
        return len(self._packed) // _ROW.size

    def __getitem__(self, index: int) -> Mapping:
        index = checked_index("mapping", index, len(self))
        return self._mapping(*_ROW.unpack_from(self._packed, index * _ROW.size))

    def __iter__(self) -> Iterator[Mapping]:
        for row in _ROW.iter_unpack(self._packed):
            yield self._mapping(*row)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mappings):
            return NotImplemented
        return self._packed == other._packed and self._names == other._names

    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Mappings: {len(self)}, {self.bytes:#x} bytes>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Mappings, (self._packed, self._names, self._kinds.known(), self._details)

    @property
    def bytes(self) -> int:
        """The sum of their sizes in bytes."""
        return sum(row[1] - row[0] for row in _ROW.iter_unpack(self._packed))

    def at(self, address: int) -> Mapping | None:
        """Return the mapping that holds an address, or None."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            start, end = struct.unpack_from("=2Q", self._packed, middle * _ROW.size)
            if end <= address:
                low = middle + 1
            elif start > address:
                high = middle
            else:
                return self[middle]
        return None

    def _mapping(
        self,
        start: int,
        end: int,
        flags: int,
        offset: int,
        device: int,
        inode: int,
        name_at: int,
        name_length: int,
    ) -> Mapping:
        path, kind, page_size = "", MappingKind.ANONYMOUS, PAGE_SIZE
        permissions = _PERMISSIONS[flags]
        if device or name_length:
            path = os.fsdecode(self._names[name_at : name_at + name_length])
            kind, page_size = self._kinds.of(start, device, permissions[3] == "s", path)
        return Mapping(
            start,
            end,
            permissions,
            offset,
            device,
            inode,
            path,
            page_size,
            self._details.get(start, _NO_FLAGS),
            kind=kind,
        )


class Kinds:
    """What mappings are of, by device and name; page sizes are asked for once per device."""

    def __init__(self, pid: int | str, maps_fd: int) -> None:
        self._pid = pid
        self._maps_fd = maps_fd
        self._page_sizes: dict[int, int] = {}
        self._tmpfs: set[int] | None = None

    def known(self) -> Kinds:
        """Return the same without a process to ask: for what is known already."""
        other = Kinds(self._pid, -1)
        other._page_sizes = dict(self._page_sizes)
        other._tmpfs = set(self._tmpfs or ())
        return other

    def of(self, start: int, device: int, shared: bool, path: str) -> tuple[MappingKind, int]:
        """Return kind and page size of a mapping."""
        if not _vmas.is_of_file(device, path, shared=shared):
            return _anonymous(path), PAGE_SIZE
        page_size = self._page_size(start, device, path)
        if page_size > PAGE_SIZE:
            return MappingKind.HUGETLB, page_size
        if path.startswith(_SHMEM_NAMES) or device in self._tmpfs_devices():
            return MappingKind.SHMEM, page_size
        return (MappingKind.SHARED_FILE if shared else MappingKind.PRIVATE_FILE), page_size

    def _page_size(self, start: int, device: int, path: str) -> int:
        # The files of one device have pages of one size: hugetlbfs mounts have theirs.
        size = self._page_sizes.get(device)
        if size is None:
            if os.major(device) and not path.startswith(_HUGE_NAMES):
                return PAGE_SIZE
            size = self._page_sizes[device] = self._asked_size(start)
        return size

    def _asked_size(self, start: int) -> int:
        size = None if self._maps_fd < 0 else calls.maps_page_size(self._maps_fd, start)
        if size is not None:
            return size
        try:
            found = list(_vmas.overlapping(start, start + 1, pid=self._pid, details=True))
        except OSError as error:  # the process is gone
            raise_if_short(f"open {error.filename}", error)
            return PAGE_SIZE
        return found[0].page_size if found else PAGE_SIZE

    def _tmpfs_devices(self) -> set[int]:
        if self._tmpfs is None:
            found: set[int] = set()
            try:
                with open(f"/proc/{self._pid}/mountinfo", encoding="utf-8", errors="replace") as f:
                    for line in f:
                        before, _, after = line.partition(" - ")
                        if after.startswith(("tmpfs ", "shmem ")):
                            major, minor = before.split()[2].split(":")
                            found.add(os.makedev(int(major), int(minor)))
            except OSError as error:
                raise_if_short(f"open {error.filename}", error)
            self._tmpfs = found
        return self._tmpfs


def _anonymous(path: str) -> MappingKind:
    if path == "[heap]":
        return MappingKind.HEAP
    if path == "[stack]":
        return MappingKind.STACK
    return MappingKind.SPECIAL if path in _SPECIAL else MappingKind.ANONYMOUS


def read_mappings(fd: int, pid: int, kinds: Kinds) -> Mappings:
    """Read an open /proc/PID/maps."""
    packed, names = calls.maps_read(fd, pid)
    return Mappings(packed, names, kinds)


def query_mappings(fd: int, pid: int, kinds: Kinds, spans: memoryview) -> Mappings | None:
    """Read those that overlap packed ranges, by an open /proc/PID/maps; None: read all of them."""
    found = calls.maps_query(fd, pid, spans, _QUERIES_MOST)
    return None if found is None else Mappings(*found, kinds)


def with_details(mappings: Mappings, pid: int | str) -> Mappings:
    """Return mappings with the flags of smaps, which walks the page tables."""
    details: dict[int, frozenset[str]] = {}
    vmas = _vmas.overlapping(0, 1 << 64, pid=pid, details=True)
    vma = next(vmas, None)
    for start, *_ in _ROW.iter_unpack(mappings._packed):
        # It may have grown or been merged since they were read.
        while vma is not None and vma.end <= start:
            vma = next(vmas, None)
        if vma is not None and vma.start <= start:
            details[start] = vma.flags
    return Mappings(mappings._packed, mappings._names, mappings._kinds, details)


def of_flags(mappings: Mappings, flags: int, among: int) -> Iterator[Mapping]:
    """Yield those that have these flags (MAP_READ and so on), and no others `among` so many."""
    for row in _ROW.iter_unpack(mappings._packed):
        if row[2] & among == flags:
            yield mappings._mapping(*row)


def named(mappings: Mappings, name: bytes) -> Mapping | None:
    """Return the first that has a name, or None."""
    names = mappings._names
    for row in _ROW.iter_unpack(mappings._packed):
        if row[7] == len(name) and names[row[6] : row[6] + row[7]] == name:
            return mappings._mapping(*row)
    return None


def middle_of_gap(mappings: Mappings) -> int:
    """Return the middle of the largest range between mappings, a multiple of the page size."""
    largest = middle = behind = 0
    for start, end, *_ in _ROW.iter_unpack(mappings._packed):
        if behind and start < USER_ADDRESSES and start - behind > largest:
            largest, middle = start - behind, (start + behind) // 2
        behind = end
    return middle // PAGE_SIZE * PAGE_SIZE


def keys_of(mappings: Mappings) -> Iterator[tuple[int | bytes, ...]]:
    """Yield what tells each mapping from others: cheaper than a `Mapping`, and can be a key."""
    names = mappings._names
    for row in _ROW.iter_unpack(mappings._packed):
        yield (*row[:6], names[row[6] : row[6] + row[7]])


def clipped(mapping: Mapping, start: int, end: int) -> Mapping:
    """Return the part of a mapping inside [start, end)."""
    first, last = max(mapping.start, start), min(mapping.end, end)
    if (first, last) == (mapping.start, mapping.end):
        return mapping
    offset = mapping.offset + (first - mapping.start) if mapping.device else mapping.offset
    return replace(mapping, start=first, end=last, offset=offset)
