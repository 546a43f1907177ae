"""What a snapshot keeps for cores besides its pages: the file `notes`.

It has ELF notes, one behind the other: those of a core, and behind them notes of our own, with
memory that a core has and the pages of a snapshot do not have: the vdso, and first pages of mapped
ELF files.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pyuffd._errors import SnapshotFormatError, UffdOSError
from pyuffd._pages import ADDRESS_LIMIT, PAGE_SIZE
from pyuffd.pagemap import PageRanges
from pyuffd.remote._mappings import keys_of
from pyuffd.snapshot import _core_elf as elf
from pyuffd.snapshot import _core_plan as plan
from pyuffd.snapshot import _memory_files as shared
from pyuffd.snapshot._core_about import About
from pyuffd.snapshot._core_places import DISK_FILES
from pyuffd.snapshot._core_wanted import VDSO, elf_pages

if TYPE_CHECKING:
    from pyuffd.remote import Mapping, Mappings, Process, RegisterSet, Stop
    from pyuffd.snapshot._capture import Placed

OWNER = b"pyuffd"
NT_MEMORY = 1
_MEMORY = struct.Struct("<2Q8s")  # start and length of the mapping, its permissions
_HEADER = struct.Struct("<3I")  # lengths of the name and of the content, the type
# In NT_PRSTATUS: the thread's id, and whether there are floating-point registers.
_TID, _HAS_FLOATING = (struct.Struct("<32xi"), struct.Struct("<328xi4x"))


class Notes:
    """Collects what belongs into `notes`; made before the stop, so that the stop is short."""

    def __init__(self, process: Process) -> None:
        self._process = process
        try:
            self._about = About(process)
        except OSError:
            process.check()  # it may have ended
            raise
        self._memory: dict[tuple[int, int, int, int], bytes] = {}
        self._seen: set[tuple[int | bytes, ...]] = set()
        self._registers: Callable[[], list[RegisterSet]] | None = None
        self._tids: set[int] | None = None  # None: all that were stopped
        self._failed: UffdOSError | None = None
        self._mappings = process.mappings()
        self._keep(self._mappings)

    def in_stop(self, stop: Stop, mappings: Mappings, _layout: Sequence[Placed]) -> None:
        """Read the registers, and memory of mappings that are new; the last call counts."""
        self._registers = self._failed = self._tids = None
        try:
            self._registers = stop._read_registers()
        except UffdOSError as error:
            if error.errno == errno.ETIMEDOUT:
                # The threads were let go. `Stop.check`, after the stop, says so.
                self._failed = error
                return
            if error.errno != errno.ENOEXEC:
                raise
            return  # 32-bit code: the snapshot has no notes
        if len(stop.pids) > 1:  # others share the memory, and are stopped too
            self._tids = set(self._about.tids())
        if mappings != self._mappings:
            self._keep(mappings)

    def pack(self) -> bytes | None:
        """Return the content of the file; None if there is none."""
        if self._failed is not None:
            raise self._failed
        if self._registers is None:
            return None
        sets = [one for one in self._registers() if self._tids is None or one.tid in self._tids]
        if not sets:
            return None
        parts = [self._about.notes(sets, self._mappings)]
        for mapping in self._mappings:
            if content := self._memory.get(_key(mapping)):
                head = _MEMORY.pack(mapping.start, mapping.length, mapping.permissions.encode())
                parts.append(elf.note(NT_MEMORY, head + content, OWNER))
        return b"".join(parts)

    def _keep(self, mappings: Mappings) -> None:
        """Note the mappings, and read what is not known of them."""
        self._mappings = mappings
        on_disk = []
        for index, row in enumerate(keys_of(mappings)):
            if row in self._seen:
                continue
            self._seen.add(row)
            mapping = mappings[index]
            key = _key(mapping)
            if key in self._memory or mapping.offset:
                continue
            self._memory[key] = b""
            if mapping.path == VDSO:
                self._memory[key] = self._process.read(mapping.start, mapping.length)
            elif shared.is_file_of_memory(mapping):
                self._memory[key] = self._first_page(mapping)
            elif mapping.kind in DISK_FILES and not mapping.path.startswith("/dev/"):
                # Reading a device may have effects.
                on_disk.append(mapping)
        for mapping, page in elf_pages(self._process, on_disk):
            self._memory[_key(mapping)] = page

    def _first_page(self, mapping: Mapping) -> bytes:
        """Return the first page of a memfd or the like: reading the mapping might fill a hole."""
        with ExitStack() as stack:
            fd = shared.try_open(self._process, mapping, stack)
            content = b"" if fd is None else os.pread(fd, PAGE_SIZE, 0)
        return content.ljust(PAGE_SIZE, b"\0") if content.startswith(plan.ELF_MAGIC) else b""


def _key(mapping: Mapping) -> tuple[int, int, int, int]:
    return mapping.start, mapping.device, mapping.inode, mapping.offset


class Kept(NamedTuple):
    """Memory that is not among the pages: the first bytes of a mapping."""

    start: int
    end: int
    permissions: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """The content of a file `notes`.

    Attributes:
        of_core: The notes that a core has, packed.
        threads: How many threads are in them.
        partial: Those without floating-point registers.
        kept: Memory by address.
    """

    of_core: bytes
    threads: int
    partial: tuple[int, ...]
    kept: dict[int, Kept]


def parse(path: str, raw: bytes) -> Read:
    """Return what is in the content of a file `notes`.

    Raises:
        SnapshotFormatError: it is something else.
    """
    of_core, tids, partial, kept = [], [], [], {}
    try:
        for owner, kind, content, packed in _notes(raw):
            if owner != OWNER:
                of_core.append(packed)
                if owner == b"CORE" and kind == elf.NT_PRSTATUS:
                    (tid,) = _TID.unpack_from(content)
                    tids.append(tid)
                    if not _HAS_FLOATING.unpack(content)[0]:
                        partial.append(tid)
            elif kind == NT_MEMORY:
                one = _kept(content)
                kept[one.start] = one
    except (struct.error, ValueError) as error:
        raise SnapshotFormatError(path, f"no table of ELF notes: {error}") from None
    return Read(b"".join(of_core), len(tids), tuple(partial), kept)


def _notes(raw: bytes) -> Iterable[tuple[bytes, int, bytes, bytes]]:
    """Yield owner, type and content of each note, and the whole note."""
    at = 0
    while at < len(raw):
        name_size, size, kind = _HEADER.unpack_from(raw, at)
        name_at = at + _HEADER.size
        content_at = name_at + name_size + -name_size % 4
        end = content_at + size + -size % 4
        if end > len(raw):
            raise ValueError(f"the note at {at} ends behind the file")
        name = raw[name_at : name_at + name_size].rstrip(b"\0")
        yield name, kind, raw[content_at : content_at + size], raw[at:end]
        at = end


def _kept(note: bytes) -> Kept:
    start, length, permissions = _MEMORY.unpack_from(note)
    content = note[_MEMORY.size :]
    whole_pages = not (start | length | len(content)) % PAGE_SIZE
    if not whole_pages or not 0 < len(content) <= length or start + length > ADDRESS_LIMIT:
        raise ValueError(f"{len(content)} bytes of memory at {start:#x} of {length}")
    return Kept(start, start + length, permissions.rstrip(b"\0").decode("ascii"), content)


def others(kept: Iterable[Kept], regions: Iterable[tuple[int, int]]) -> Iterator[Kept]:
    """Yield what lies in none of the regions."""
    covered = PageRanges.of(regions)
    for one in kept:
        if not len(PageRanges.of([(one.start, one.end)]) & covered):
            yield one
