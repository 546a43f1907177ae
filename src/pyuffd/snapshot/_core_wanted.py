"""How much of each mapping of a process belongs into its core."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from pyuffd.pagemap import PageRanges
from pyuffd.remote import Mapping, Process
from pyuffd.snapshot import _core_plan as plan
from pyuffd.snapshot import _memory_files as shared
from pyuffd.snapshot import _own_pages
from pyuffd.snapshot._core_elf import PAGE_SIZE
from pyuffd.snapshot._core_plan import Part

VDSO = "[vdso]"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A mapping, and how much of it belongs into the core: NOTHING, HEADER or ALL."""

    mapping: Mapping
    part: Part


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        wanted: The mapping, and how much of it.
        is_new: Whether its VmFlags are not known.
        is_settled: Whether it stays so while the mapping is the same; a file's private mapping
            belongs into the core as soon as the process has written there.
    """

    wanted: Wanted
    is_new: bool
    is_settled: bool


class Chooser:
    """Chooses, by the flags that the mappings have when it is made.

    Attributes:
        filtered: What the process's coredump_filter leaves out and the kernel's default does not.
    """

    def __init__(self, process: Process, mappings: Iterable[Mapping], *, full: bool) -> None:
        self._process = process
        self._full = full
        self._filter = plan.read_filter(process.memory_tid)
        self._flags = plan.Flags(mappings)
        self.filtered = () if full else plan.filtered(self._filter)

    def choose(self, mappings: Iterable[Mapping]) -> Iterator[Choice]:
        """Yield a choice for each mapping."""
        choices = [self._choice(mapping) for mapping in mappings]
        heads = [one.wanted.mapping for one in choices if one.wanted.part is Part.HEADER]
        elf = self._with_magic(heads) if heads else set()
        for one in choices:
            mapping = one.wanted.mapping
            if one.wanted.part is Part.HEADER and mapping.start not in elf:
                yield Choice(Wanted(mapping, Part.NOTHING), one.is_new, one.is_settled)
            else:
                yield one

    def _choice(self, mapping: Mapping) -> Choice:
        if mapping.path == VDSO:
            return Choice(Wanted(mapping, Part.ALL), False, True)
        flags = self._flags.of(mapping)
        part, otherwise = plan.wanted(mapping, flags or frozenset(), self._filter, full=self._full)
        is_settled = True
        if part is Part.IF_WRITTEN:
            own = _own_pages.own(self._process, mapping.start, mapping.end, any_will_do=True)
            is_written = bool(len(own))
            part = Part.ALL if is_written else otherwise
            is_settled = is_written or not mapping.writable
        return Choice(Wanted(mapping, part), flags is None, is_settled)

    def _with_magic(self, mappings: Iterable[Mapping]) -> set[int]:
        """Return the addresses of those that begin as an ELF file does."""
        found, on_disk = set(), []
        for m in mappings:
            if not shared.is_file_of_memory(m):
                on_disk.append(m)
                continue
            with ExitStack() as stack:
                fd = shared.try_open(self._process, m, stack)
                if fd is None:
                    continue
                with suppress(OSError):
                    if os.pread(fd, len(plan.ELF_MAGIC), 0) == plan.ELF_MAGIC:
                        found.add(m.start)
        found.update(m.start for m, _ in elf_pages(self._process, on_disk))
        return found


def elf_pages(process: Process, mappings: Sequence[Mapping]) -> Iterator[tuple[Mapping, bytes]]:
    """Read the first page of each mapping; yield those that begin as an ELF file does."""
    if not mappings:
        return
    pages = PageRanges.of((m.start, m.start + PAGE_SIZE) for m in mappings)
    text = bytearray(pages.bytes)
    process.copy(pages, text)
    for mapping, at in zip(mappings, range(0, len(text), PAGE_SIZE), strict=True):
        if text.startswith(plan.ELF_MAGIC, at):
            yield mapping, bytes(text[at : at + PAGE_SIZE])
