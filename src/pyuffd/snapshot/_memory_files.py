"""The content of mapped memfds, tmpfs files and hugetlb files, read from the files themselves.

Reading it through the mapping would do harm: it fills holes of the file, and if the memory is
registered with a userfaultfd for missing or minor faults, it waits for a handler that is stopped.
And a page table does not tell what only another process has touched. So only pages that the process
has copied are read there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from pyuffd import _image_calls as calls
from pyuffd._errors import raise_if_short
from pyuffd._owned import Descriptor
from pyuffd._pages import PAGE_SIZE, round_up
from pyuffd.pagemap import PageRanges
from pyuffd.remote import Mapping, MappingKind, Process
from pyuffd.snapshot import _own_pages
from pyuffd.snapshot._capture import Captured, Placed, in_parts
from pyuffd.snapshot._file_pages import Span, extents, is_huge_without_a_file, read
from pyuffd.snapshot._output import punch, write_at


def is_file_of_memory(mapping: Mapping) -> bool:
    """Whether its file may have content, which has to be read from the file."""
    if mapping.kind is MappingKind.HUGETLB:
        return not is_huge_without_a_file(mapping)
    return mapping.kind is MappingKind.SHMEM


def open_mapped(process: Process, mapping: Mapping) -> Descriptor:
    """Open what is mapped, whatever its name is by now; OSError without the privilege."""
    try:
        return _opened(process, mapping.start, mapping.end)
    except FileNotFoundError:
        # A part of a mapping.
        found = process.mappings().at(mapping.start)
        if found is None:
            raise
        return _opened(process, found.start, found.end)


def _opened(process: Process, start: int, end: int) -> Descriptor:
    return Descriptor.open(f"/proc/{process.memory_tid}/map_files/{start:x}-{end:x}", os.O_RDONLY)


def try_open(process: Process, mapping: Mapping, stack: ExitStack) -> int | None:
    """Open it until the end of the stack; None without the privilege."""
    try:
        return stack.enter_context(open_mapped(process, mapping)).number
    except OSError as error:
        raise_if_short(f"open {error.filename}", error)
        return None


@dataclass
class FilesCopied:
    """What `FilesCopy.in_stop` has done.

    Attributes:
        data: Pages with content, in the file.
        lost: Pages that cannot be read: poisoned, or behind the end of the file.
        unseen: What is not known without the privilege to open the file: pages that the process has
            not touched.
        holes: Pages that the file has not.
    """

    data: list[Span] = field(default_factory=list)
    lost: list[Span] = field(default_factory=list)
    unseen: list[Span] = field(default_factory=list)
    holes: list[Span] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes with content."""
        return sum(end - start for start, end in self.data)


@dataclass
class _Work:
    """What is to be read of one part: from its file, and from the process."""

    part: Placed
    of_file: PageRanges
    of_process: PageRanges
    present: PageRanges

    @property
    def bytes(self) -> int:
        return self.of_file.bytes + self.of_process.bytes


class FilesCopy:
    """Copies mapped files of memory to their places, and what private mappings have copied of them.

    Reading in the stop what was copied before it, and comparing, is much faster than writing it:
    the kernel makes whoever writes faster than the disk wait.

    Args:
        process: Whose memory it is.
        fd: Where to put it.
        tell: Called with the bytes done and those in all.
        rate: Bytes a second before the stop.
    """

    def __init__(
        self,
        process: Process,
        fd: int,
        tell: Callable[[int, int], None],
        rate: float | None = None,
    ) -> None:
        self._process = process
        self._fd = fd
        self._tell = tell
        self._rate = rate
        self._written = PageRanges.of([])
        self._layouts: list[Sequence[Placed]] = []  # of that

    def ahead(self, parts: Sequence[Placed]) -> None:
        """Copy while the process runs and may change it: what the files have, if they can be read.

        The places are empty.
        """
        result = FilesCopied()
        works = [_work(self._process, part, result) for part in parts]
        total = sum(work.of_file.bytes for work in works)
        begin, done = time.monotonic(), 0
        for work in works:
            with suppress(FileNotFoundError):  # unmapped since, which the stop sees
                for size in _copied_of_file(
                    self._process, work, self._fd, result, if_changed=False
                ):
                    done += size
                    self._tell(done, total)
                    if self._rate:
                        time.sleep(max(0.0, begin + done / self._rate - time.monotonic()))
        self._note(parts, result)

    def in_stop(self, parts: Sequence[Placed]) -> FilesCopied:
        """Copy while the process is stopped; the last call counts.

        Of a file that cannot be opened, the pages are copied that are in the process's page table.
        """
        result = FilesCopied()
        works = [_work(self._process, part, result) for part in parts]
        done, total = 0, sum(work.bytes for work in works)
        if_changed = any(self._layouts)
        for work in works:
            for size in _copied(self._process, work, self._fd, result, if_changed=if_changed):
                done += size
                self._tell(done, total)
        self._note(parts, result)
        return result

    def _note(self, parts: Sequence[Placed], result: FilesCopied) -> None:
        self._layouts.append(parts)
        self._written |= PageRanges.of(result.data)

    def free(self, captured: Captured, data: memoryview) -> None:
        """Free the places of what was copied, and is not among the packed pages of `data`.

        That includes what was captured of private memory that is shared memory now.
        """
        stale = (self._written | PageRanges(captured.written)) - PageRanges(data)
        for layout in self._layouts:
            for part, start, end in in_parts(layout, stale.memoryview()):
                punch(self._fd, part.offset + start - part.start, end - start)


def _work(process: Process, part: Placed, result: FilesCopied) -> _Work:
    m, span = part.mapping, PageRanges.of([(part.start, part.end)])
    present = _own_pages.present(process, part.start, part.end)
    # In a shared one nothing is the process's own, but it may be unable to read pages.
    own_pages = _own_pages.poisoned if m.shared else _own_pages.own
    own = own_pages(process, part.start, part.end)
    try:
        with open_mapped(process, m) as file:
            found = PageRanges.of(extents(file.number, m, part.start, part.end))
            length = round_up(os.fstat(file.number).st_size, PAGE_SIZE)
    except OSError as error:
        raise_if_short(f"open {error.filename}", error)
        result.unseen += _spans(span - present - own)
        return _Work(part, PageRanges.of([]), present | own, present)
    end = max(part.start, min(part.end, length - m.offset + m.start))
    behind = PageRanges.of([(end, part.end)] if end < part.end else []) - own
    result.lost += _spans(behind)
    result.holes += _spans(span - found - own - behind)
    return _Work(part, found - own, own, present)


def _copied(
    process: Process, work: _Work, fd: int, result: FilesCopied, *, if_changed: bool
) -> Iterator[int]:
    """Copy it; yield the bytes of each step."""
    part = work.part
    yield from _copied_of_file(process, work, fd, result, if_changed=if_changed)
    if len(work.of_process):
        copied = process.copy(work.of_process, fd, base=part.start, offset=part.offset)
        lost = copied.lost
        if len(lost):
            lost -= PageRanges.of(_copied_by_mem(process, part, lost, fd))
        result.data += _spans(work.of_process - lost)
        result.lost += _spans(lost)
        yield work.of_process.bytes


def _copied_by_mem(process: Process, part: Placed, pages: PageRanges, fd: int) -> Iterator[Span]:
    """Copy pages that the process itself cannot read (PROT_NONE); yield those that could be."""
    try:
        mem = Descriptor.open(f"/proc/{process.memory_tid}/mem", os.O_RDONLY)
    except OSError as error:
        raise_if_short(f"open {error.filename}", error)
        return
    with mem:
        for each in pages:
            for at in range(each.start, each.end, PAGE_SIZE):
                content = b""
                with suppress(OSError):  # poisoned
                    content = os.pread(mem.number, PAGE_SIZE, at)
                if len(content) == PAGE_SIZE:
                    write_at(fd, content, part.offset + at - part.start)
                    yield at, at + PAGE_SIZE


def _copied_of_file(
    process: Process, work: _Work, fd: int, result: FilesCopied, *, if_changed: bool
) -> Iterator[int]:
    part = work.part
    if not len(work.of_file):
        return
    pieces = calls.Pieces([(part.start, part.end, part.offset, True)])
    with open_mapped(process, part.mapping) as file:
        for start, end, content in read(file.number, part.mapping, work.of_file):
            if not content:
                result.lost.append((start, end))
            else:
                span = PageRanges.of([(start, end)])
                zero = PageRanges(
                    calls.write(span.memoryview(), content, pieces, fd, if_changed=if_changed)
                )
                result.data += _spans(span - zero)
                if part.mapping.kind is MappingKind.HUGETLB:
                    # Or pages of zeros, which nobody can tell.
                    result.holes += _spans(zero - work.present)
            yield end - start


def _spans(pages: PageRanges) -> list[Span]:
    return [(each.start, each.end) for each in pages]
