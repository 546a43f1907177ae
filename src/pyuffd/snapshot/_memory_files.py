"""The content of mapped memfds, tmpfs files and hugetlb files, read from the files themselves.

Reading it through the mapping would do harm: it fills holes of the file, and if the memory is
registered with a userfaultfd for missing or minor faults, it waits for a handler, which stands. And
a page table does not tell what only another process has touched. So only pages that the process has
copied are read there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from pyuffd import _image_calls as calls
from pyuffd._errors import raise_if_short
from pyuffd._owned import Descriptor
from pyuffd._pages import PAGE_SIZE, round_up
from pyuffd.pagemap import PageRanges
from pyuffd.remote import Mapping, MappingKind, Process
from pyuffd.snapshot import _own_pages
from pyuffd.snapshot._capture import Placed
from pyuffd.snapshot._file_pages import Span, extents, is_huge_without_a_file, read


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
    """What `copy_files` has done.

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


def copy_files(
    process: Process, parts: Sequence[Placed], fd: int, tell: Callable[[int, int], None]
) -> FilesCopied:
    """Copy mapped files of memory to their places, and what a private mapping has copied of them.

    The process stands. The places in `fd` are empty. `tell` is called with the bytes done and those
    in all. Of a file that cannot be opened, the pages are copied that are in the process's page
    table.
    """
    result = FilesCopied()
    works = [_work(process, part, result) for part in parts]
    done, total = 0, sum(work.bytes for work in works)
    for work in works:
        for size in _copied(process, work, fd, result):
            done += size
            tell(done, total)
    return result


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


def _copied(process: Process, work: _Work, fd: int, result: FilesCopied) -> Iterator[int]:
    """Copy it; yield the bytes of each step."""
    part = work.part
    if len(work.of_file):
        pieces = calls.Pieces([(part.start, part.end, part.offset, True)])
        with open_mapped(process, part.mapping) as file:
            for start, end, content in read(file.number, part.mapping, work.of_file):
                if content:
                    _put(start, content, pieces, fd, work, result)
                else:
                    result.lost.append((start, end))
                yield end - start
    if len(work.of_process):
        copied = process.copy(work.of_process, fd, base=part.start, offset=part.offset)
        result.data += _spans(work.of_process - copied.lost)
        result.lost += _spans(copied.lost)
        yield copied.bytes


def _put(
    start: int, content: bytes, pieces: calls.Pieces, fd: int, work: _Work, result: FilesCopied
) -> None:
    span = PageRanges.of([(start, start + len(content))])
    zero = PageRanges(calls.write(span.memoryview(), content, pieces, fd, overwrite=False))
    result.data += _spans(span - zero)
    if work.part.mapping.kind is MappingKind.HUGETLB:
        result.holes += _spans(zero - work.present)  # or pages of zeros, which nobody can tell


def _spans(pages: PageRanges) -> list[Span]:
    return [(each.start, each.end) for each in pages]
