"""The content of mapped memfds, tmpfs files and hugetlb files, read from the files themselves.

Reading it through the mapping would do harm: it fills holes of the file, and if the memory is
registered with a userfaultfd for missing or minor faults, it waits for a handler, which stands. So
only pages that the process has copied are read there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from pyuffd._owned import Descriptor
from pyuffd.pagemap import PageRanges
from pyuffd.remote import Mapping, MappingKind, Process
from pyuffd.snapshot import _own_pages
from pyuffd.snapshot._capture import Placed
from pyuffd.snapshot._core_elf import PAGE_SIZE
from pyuffd.snapshot._core_file import write

_STEP = 1 << 20
_NO_CONTENT = "/anon_hugepage"  # private huge pages are all the process's own


def is_file_of_memory(mapping: Mapping) -> bool:
    """Whether its file may have content, which has to be read from the file."""
    if mapping.kind is MappingKind.HUGETLB:
        return mapping.shared or not mapping.path.startswith(_NO_CONTENT)
    return mapping.kind is MappingKind.SHMEM


def open_mapped(pid: int, mapping: Mapping) -> Descriptor:
    """Open what is mapped, whatever its name is by now; OSError without the privilege."""
    return Descriptor.open(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDONLY)


def try_open(pid: int, mapping: Mapping, stack: ExitStack) -> int | None:
    """Open it until the end of the stack; None without the privilege."""
    try:
        return stack.enter_context(open_mapped(pid, mapping)).number
    except OSError:
        return None


@dataclass
class FilesCopied:
    """What `copy_files` has done: bytes with content, and the ranges that cannot be read."""

    bytes: int = 0
    lost: list[tuple[int, int]] = field(default_factory=list)


def copy_files(
    process: Process, parts: Sequence[Placed], fd: int, tell: Callable[[int, int], None]
) -> FilesCopied:
    """Copy mapped files of memory to their places, and what a private mapping has copied of them.

    The process stands. `tell` is called with the bytes done and those in all. Of a file that cannot
    be opened, the pages are copied that are in the process's page table.
    """
    result = FilesCopied()
    of_file, of_process = _work(process, parts)
    total = sum(end - start for _, start, end in of_file)
    total += sum(ranges.bytes for _, ranges in of_process)
    done = 0
    for part, start, end in of_file:
        with open_mapped(process.memory_tid, part.mapping) as file:
            for content, at in _read(file.number, part.mapping, start, end):
                done += len(content)
                if content.count(0) < len(content):
                    write(fd, content, part.offset + at - part.start)
                    result.bytes += len(content)
                tell(done, total)
    for part, ranges in of_process:
        copied = process.copy(ranges, fd, base=part.start, offset=part.offset)
        result.bytes += copied.bytes - copied.lost.bytes
        result.lost += [(page.start, page.end) for page in copied.lost]
        done += copied.bytes
        tell(done, total)
    return result


def _work(
    process: Process, parts: Sequence[Placed]
) -> tuple[list[tuple[Placed, int, int]], list[tuple[Placed, PageRanges]]]:
    """Return what is to be read from files, and what from the process."""
    of_file: list[tuple[Placed, int, int]] = []
    of_process: list[tuple[Placed, PageRanges]] = []
    for part in parts:
        m = part.mapping
        try:
            with open_mapped(process.memory_tid, m) as file:
                found = PageRanges.of(_extents(file.number, part))
        except OSError:
            of_process.append((part, _own_pages.present(process, part.start, part.end)))
            continue
        if not m.shared:
            own = _own_pages.own(process, part.start, part.end)
            of_process.append((part, own))
            found -= own
        of_file += ((part, one.start, one.end) for one in found)
    return of_file, [(part, ranges) for part, ranges in of_process if len(ranges)]


def _extents(fd: int, part: Placed) -> Iterator[tuple[int, int]]:
    """Yield the addresses at which a file has content, by whole pages."""
    if part.mapping.kind is MappingKind.HUGETLB:  # it does not tell
        yield part.start, part.end
        return
    shift = part.mapping.start - part.mapping.offset
    at, last = part.start - shift, part.end - shift
    while at < last:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA) & -PAGE_SIZE
            at = -(-os.lseek(fd, begin, os.SEEK_HOLE) & -PAGE_SIZE)
        except OSError:  # ENXIO: nothing any more
            return
        if begin < last:
            yield begin + shift, min(at, last) + shift


def _read(fd: int, m: Mapping, start: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Yield content and its address."""
    while start < end:
        content = os.pread(fd, min(_STEP, end - start), start - m.start + m.offset)
        if not content:  # the end of the file
            return
        yield content, start
        start += len(content)
