"""The mappings of a range of memory, as /proc/PID/maps and smaps list them (layer L2)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pyuffd._machine import raise_without_procfs
from pyuffd._pages import PAGE_SIZE

_HEAD = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)"
)
_SHARED = 3  # index in the permissions


@dataclass(frozen=True, slots=True)
class Vma:
    """A line of /proc/PID/maps; `remote.Mapping` adds what kind of memory it is.

    `flags` are the two-letter flags of smaps; "um", "uw" and "ui" mean that it is registered with a
    userfaultfd for missing, write-protect and minor faults. Flags and page size are known only if
    details were requested.
    """

    start: int
    end: int
    permissions: str
    offset: int
    device: int
    inode: int
    path: str
    page_size: int = PAGE_SIZE
    flags: frozenset[str] = frozenset()

    @property
    def length(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def has_file(self) -> bool:
        """Whether it is of a file; see `is_of_file`."""
        return is_of_file(self.device, self.path, shared=self.shared)

    @property
    def shared(self) -> bool:
        """Whether writes go to the file, where other mappings see them."""
        return self.permissions[_SHARED] == "s"

    @property
    def writable(self) -> bool:
        """Whether it can be written now."""
        return "w" in self.permissions

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


def is_of_file(device: int, path: str, *, shared: bool) -> bool:
    """Return whether a mapping is of a file.

    The first System V segment is one, and has the inode 0. A private mapping of /dev/zero is memory
    without a file to the kernel, too.
    """
    return device != 0 and (shared or path != "/dev/zero")


def overlapping(
    start: int, end: int, *, pid: int | str = "self", details: bool = False
) -> Iterator[Vma]:
    """Yield the mappings that overlap [start, end), ascending and disjoint.

    Details come from smaps, which walks the page tables of every mapping up to the last one. No
    page is faulted in, but it is slow in a large process.
    """
    source = f"/proc/{pid}/{'smaps' if details else 'maps'}"
    try:
        opened = open(source, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    except OSError as error:
        raise_without_procfs(f"open {source}", error)
        raise
    with opened as lines:
        found = disjoint(_listed(lines, start, end))
    yield from found


def disjoint(listed: Iterable[Vma]) -> list[Vma]:
    """Return mappings without overlaps; of what was listed twice, as it was listed last.

    The kernel lists a mapping again that grew or was merged just behind what it had listed.
    """
    found: list[Vma] = []
    for vma in listed:
        while found and found[-1].start >= vma.start:
            found.pop()
        if found and found[-1].end > vma.start:
            found[-1] = replace(found[-1], end=vma.start)
        found.append(vma)
    return found


def _listed(lines: Iterable[str], start: int, end: int) -> Iterator[Vma]:
    vma: Vma | None = None
    for line in lines:
        # Only lines of details begin with a capital letter.
        if not "A" <= line[0] <= "Z" and (head := _HEAD.match(line)):
            if vma is not None:
                yield vma
            vma = _vma(head)
            if vma.start >= end:
                return
            if vma.end <= start:
                vma = None
        elif vma is None:
            continue
        elif line.startswith("KernelPageSize:"):
            vma = replace(vma, page_size=int(line.split()[1]) << 10)
        elif line.startswith("VmFlags:"):
            vma = replace(vma, flags=frozenset(line.split()[1:]))
    if vma is not None:
        yield vma


def _vma(head: re.Match[str]) -> Vma:
    first, last, permissions, offset, major, minor, inode, path = head.groups()
    return Vma(
        int(first, 16),
        int(last, 16),
        permissions,
        int(offset, 16),
        os.makedev(int(major, 16), int(minor, 16)),
        int(inode),
        path,
    )
