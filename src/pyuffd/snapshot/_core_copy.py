"""The memory of a stopped process, into the segments of a core."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyuffd._abi import PageCategory
from pyuffd._errors import UffdOSError
from pyuffd.pagemap import PageRanges
from pyuffd.remote import Mapping, MappingKind, Process
from pyuffd.snapshot import _core_plan as plan
from pyuffd.snapshot._core_elf import PAGE_SIZE
from pyuffd.snapshot._core_plan import Part, Wanted

if TYPE_CHECKING:
    from pyuffd.snapshot._core_elf import Segment

_STEP = 64 << 20  # bytes between two looks at the clock, and two chances for Ctrl-C
_CONTENT = PageCategory.PRESENT | PageCategory.SWAPPED
_SMALL = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """What a stopped process has.

    Attributes:
        parts: All mappings, and how much of each belongs into the core.
        data: The pages with content among that.
        unseen: Mappings of shared memory of which only those pages are known that the process has
            touched itself.
    """

    parts: list[Wanted]
    data: PageRanges
    unseen: list[Mapping]


def look(process: Process, flags: plan.Flags, dump_filter: plan.Filter, *, full: bool) -> Memory:
    """Decide what of a stopped process belongs into its core."""
    mappings = _with_flags(process, flags)
    spans = [(m.start, m.end) for m in mappings]
    length = spans[-1][1] - spans[0][0]
    zero = PageCategory.PFNZERO
    not_own = PageCategory.FILE | zero
    own = process.pagemap.scan(
        spans[0][0],
        length,
        category_mask=not_own,
        category_inverted=not_own,
        category_anyof_mask=_CONTENT,
        return_mask=PageCategory(0),
    ).ranges
    parts = [
        Wanted(m, plan.wanted(m, size, dump_filter, full=full))
        for m, size in zip(mappings, own.bytes_in(spans), strict=True)
    ]
    parts = _with_headers(process, parts)
    found = _Content(process, own)
    for one in parts:
        found.add(one)
    return Memory(parts, found.all(), found.unseen)


def _with_flags(process: Process, flags: plan.Flags) -> list[Mapping]:
    """Return its mappings, without the kernel's page that every process has."""
    found = [m for m in process.mappings() if m.path != "[vsyscall]"]
    known = [flags.of(m) for m in found]
    if None in known:
        return [m for m in process.mappings(details=True) if m.path != "[vsyscall]"]
    return [replace(m, flags=of) for m, of in zip(found, known, strict=True) if of is not None]


def _with_headers(process: Process, parts: list[Wanted]) -> list[Wanted]:
    """Keep a first page only where it begins as an ELF file does."""
    heads = [one.mapping for one in parts if one.part is Part.HEADER]
    if not heads:
        return parts
    pages = PageRanges.of((m.start, m.start + PAGE_SIZE) for m in heads)
    text = bytearray(pages.bytes)
    process.copy(pages, text)
    magic = len(plan.ELF_MAGIC)
    elf = {
        m.start
        for m, at in zip(heads, range(0, len(text), PAGE_SIZE), strict=True)
        if text[at : at + magic] == plan.ELF_MAGIC
    }
    return [
        Wanted(one.mapping, Part.NOTHING)
        if one.part is Part.HEADER and one.mapping.start not in elf
        else one
        for one in parts
    ]


class _Content:
    """Collects which pages of the wanted mappings have content."""

    def __init__(self, process: Process, own: PageRanges) -> None:
        self._process = process
        self._own = own
        self._own_spans: list[tuple[int, int]] = []
        self._whole: list[tuple[int, int]] = []
        self._present: list[tuple[int, int]] = []
        self.unseen: list[Mapping] = []

    def add(self, one: Wanted) -> None:
        """Add a mapping."""
        m = one.mapping
        if one.part is Part.HEADER:
            self._whole.append((m.start, m.start + PAGE_SIZE))
        elif one.part is Part.NOTHING:
            return
        elif m.kind is MappingKind.SHMEM:
            self._own_spans.append((m.start, m.end))
            self._add_file(m)
        elif m.kind is MappingKind.HUGETLB:
            self._present.append((m.start, m.end))
        elif m.inode or m.kind is MappingKind.SPECIAL:
            self._whole.append((m.start, m.end))
        else:
            self._own_spans.append((m.start, m.end))

    def _add_file(self, m: Mapping) -> None:
        fd = plan.map_file(self._process.pid, m)
        if fd is None:
            self.unseen.append(m)
            self._present.append((m.start, m.end))
            return
        try:
            self._whole += plan.file_extents(fd, m)
        finally:
            os.close(fd)

    def all(self) -> PageRanges:
        """Return all of it."""
        data = (self._own & PageRanges.of(self._own_spans)) | PageRanges.of(self._whole)
        for start, end in self._present:
            scan = self._process.pagemap.scan
            data |= scan(
                start, end - start, category_anyof_mask=_CONTENT, return_mask=PageCategory(0)
            ).ranges
        return data


def copy(
    process: Process,
    memory: Memory,
    segments: Iterable[Segment],
    fd: int,
    tell: Callable[[int], None],
) -> PageRanges:
    """Copy it into the segments' places; return the pages that cannot be read.

    `tell` is called with the number of bytes copied, every _STEP bytes at least.
    """
    lost: list[tuple[int, int]] = []
    with _Memory(process) as behind:
        for start, end, offset in _runs(segments):
            for ranges in _steps(memory.data & PageRanges.of([(start, end)]), start, end):
                copied = process.copy(ranges, fd, base=start, offset=offset)
                for page in copied.lost:
                    if not behind.copy(page.start, page.end, fd, page.start - start + offset):
                        lost.append((page.start, page.end))
                tell(copied.bytes)
    return PageRanges.of(lost)


def _runs(segments: Iterable[Segment]) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, offset) of what is contiguous both in memory and in the file."""
    run: tuple[int, int, int] | None = None
    for part in segments:
        if not part.size:
            continue
        if run is not None and part.start == run[1] and part.offset - part.start == run[2] - run[0]:
            run = (run[0], part.start + part.size, run[2])
            continue
        if run is not None:
            yield run
        run = (part.start, part.start + part.size, part.offset)
    if run is not None:
        yield run


def _steps(data: PageRanges, start: int, end: int) -> Iterator[PageRanges]:
    """Yield ranges in parts of about _STEP bytes."""
    if data.bytes <= _STEP:
        if len(data):
            yield data
        return
    blocks: Sequence[tuple[int, int]] = [
        (at, min(at + _STEP, end)) for at in range(start, end, _STEP)
    ]
    for block, used in zip(blocks, data.bytes_in(blocks), strict=True):
        if used:
            yield data & PageRanges.of([block])


class _Memory:
    """/proc/PID/mem, which reads memory without PROT_READ too."""

    def __init__(self, process: Process) -> None:
        self._path = f"/proc/{process.pid}/mem"
        self._fd = -1

    def __enter__(self) -> _Memory:
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def copy(self, start: int, end: int, fd: int, offset: int) -> bool:
        """Copy a range to a file; False if it cannot be read."""
        while start < end:
            try:
                content = os.pread(self._fd, min(end - start, _SMALL), start)
            except OSError as error:
                if error.errno in (errno.EIO, errno.EFAULT, errno.ENXIO):
                    return False
                raise
            if not content:
                return False
            write(fd, content, offset)
            start += len(content)
            offset += len(content)
        return True


def write(fd: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        try:
            done = os.pwrite(fd, view, offset)
        except OSError as error:
            raise UffdOSError(error.errno or errno.EIO, "copying memory to a file") from None
        view, offset = view[done:], offset + done


class Clock:
    """Ends a copy that holds the process for longer than agreed."""

    def __init__(self, since: float, limit_s: float | None) -> None:
        self._since = since
        self._limit_s = limit_s

    def check(self, done: int, of: int) -> None:
        """Raise UffdOSError (ETIMEDOUT) if the time is over."""
        passed = time.monotonic() - self._since
        if self._limit_s is not None and passed > self._limit_s:
            raise UffdOSError(
                errno.ETIMEDOUT,
                "copying memory in the stop",
                hint=f"at most {self._limit_s:g} s were allowed; {done / of:.0%} is copied",
            )
