"""Memory that is pinned for direct access, as far as /proc/PID/fdinfo tells."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from pyuffd import _vmas
from pyuffd._errors import raise_if_short
from pyuffd._pages import ADDRESS_LIMIT, HUGE_PAGE_2M
from pyuffd._remote_calls import pinners

# "    0: 0x7f0123456000/4096"
_BUFFER = re.compile(r"\s+\d+:\s+0x([0-9a-f]+)/(\d+)")
_RING = "anon_inode:[io_uring]"
# A process that has one of these open may have pinned any page; the kernel does not list them.
_DEVICES = ("/dev/vfio/", "/dev/iommu", "/dev/infiniband/", "anon_inode:[vfio")
# The line is in the first half of the file, which has about 1500 bytes.
_STATUS_MOST = 8192


@dataclass(frozen=True, slots=True)
class Pin:
    """A pinned range, or the whole address space if the kernel does not tell which pages."""

    start: int
    end: int
    detail: str


def buffers(pid: int) -> list[Pin]:
    """Return what a process has pinned, by its descriptors; several may be of one ring.

    A ring may have no descriptor: io_uring_register(2) can give it a number instead. Then the whole
    address space may be pinned, if the kernel counts more pages than the other rings have.
    """
    found: dict[tuple[int, int], Pin] = {}
    for fd in pinners(pid):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:  # closed since
            continue
        for pin in _of_descriptor(pid, fd, link):
            found.setdefault((pin.start, pin.end), pin)
    if hidden := _hidden(pid, found):
        whole = (0, ADDRESS_LIMIT)
        found.setdefault(whole, Pin(*whole, hidden))
    return sorted(found.values(), key=lambda pin: (pin.start, pin.end))


def _hidden(pid: int, found: Iterable[tuple[int, int]]) -> str:
    """Say how much is pinned by what no descriptor shows; an empty string if nothing is."""
    counted = _counted(pid)
    if not counted:
        return ""
    # A small page of a huge one counts as the huge one.
    shown = 0
    for start, end in found:
        shown += -(-end // HUGE_PAGE_2M) * HUGE_PAGE_2M - start // HUGE_PAGE_2M * HUGE_PAGE_2M
    if counted <= shown and not _has_hidden_ring(pid):
        return ""
    return f"{counted >> 10} KiB are pinned, not all by descriptors: a ring without one may be"


def _counted(pid: int) -> int:
    """Return how many bytes the kernel counts as pinned for a process."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            _, _, rest = file.read(_STATUS_MOST).partition(b"\nVmPin:")
    except OSError as error:  # it has ended
        raise_if_short(f"open {error.filename}", error)
        return 0
    return int(rest.split(None, 1)[0]) << 10 if rest else 0


def _has_hidden_ring(pid: int) -> bool:
    """Return whether a ring is mapped that no descriptor is of; each has an inode of its own."""
    shown: set[int] = set()
    for fd in pinners(pid):
        with suppress(OSError):
            shown.add(os.stat(f"/proc/{pid}/fd/{fd}").st_ino)
    try:
        mapped = {vma.inode for vma in _vmas.overlapping(0, 1 << 64, pid=pid) if vma.path == _RING}
    except OSError as error:  # it has ended
        raise_if_short(f"open {error.filename}", error)
        return False
    return bool(mapped - shown)


def _of_descriptor(pid: int, fd: int, link: str) -> Iterator[Pin]:
    if link.startswith(_DEVICES):
        yield Pin(0, ADDRESS_LIMIT, f"descriptor {fd} is {link}, which may have pinned any page")
    if link != _RING:
        return
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as lines:
            text = lines.read()
    except OSError as error:
        raise_if_short(f"open {error.filename}", error)
        return
    _, found, rest = text.partition("UserBufs:")
    if not found:
        return
    for line in rest.split("\n")[1:]:
        match = _BUFFER.fullmatch(line.rstrip())
        if not match:
            break
        start, length = int(match[1], 16), int(match[2])
        if length:
            yield Pin(start, start + length, f"fixed buffer of io_uring, descriptor {fd}")
