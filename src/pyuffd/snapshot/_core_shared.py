"""The content of mapped memfds, tmpfs files and hugetlb files, read from the files themselves.

Reading it through the mapping would do harm: it fills holes of the file, and if the memory is
registered with a userfaultfd for missing or minor faults, it waits for a handler, which stands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from pyuffd._abi import PageCategory
from pyuffd._owned import Descriptor
from pyuffd.pagemap import PageRanges
from pyuffd.remote import Mapping, MappingKind, Process
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


def copy_files(
    process: Process, parts: Sequence[Placed], fd: int, tell: Callable[[int, int], None]
) -> int:
    """Copy the content of mapped files to its places; return the number of bytes.

    `tell` is called with the bytes done and those in all. Pages that a private mapping has copied
    are left to others.
    """
    work = [(part, start, end) for part in parts for start, end in _spans(process, part)]
    total = sum(end - start for _, start, end in work)
    done = written = 0
    for part, start, end in work:
        with open_mapped(process.pid, part.mapping) as file:
            for content, at in _read(file.number, part.mapping, start, end):
                done += len(content)
                if content.count(0) < len(content):
                    write(fd, content, part.offset + at - part.start)
                    written += len(content)
                tell(done, total)
    return written


def _spans(process: Process, part: Placed) -> Iterator[tuple[int, int]]:
    """Yield the addresses whose content is to be read."""
    m = part.mapping
    if m.kind is MappingKind.SHMEM:
        with open_mapped(process.pid, m) as file:
            found = PageRanges.of(_extents(file.number, part))
    else:
        found = PageRanges.of([(part.start, part.end)])  # hugetlbfs does not tell its holes
    if not m.shared:
        found -= _own(process, part)
    for one in found:
        yield one.start, one.end


def _own(process: Process, part: Placed) -> PageRanges:
    file = PageCategory.FILE
    scan = process.pagemap.scan(
        part.start,
        part.end - part.start,
        category_mask=file,
        category_inverted=file,
        category_anyof_mask=PageCategory.PRESENT | PageCategory.SWAPPED,
        return_mask=PageCategory(0),
    )
    return scan.ranges


def _extents(fd: int, part: Placed) -> Iterator[tuple[int, int]]:
    """Yield the addresses at which a file has content, by whole pages."""
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
