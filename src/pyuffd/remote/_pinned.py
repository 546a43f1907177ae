"""Memory that is pinned for direct access, as far as /proc/PID/fdinfo tells."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pyuffd._pages import ADDRESS_LIMIT
from pyuffd._remote_calls import pinners

# "    0: 0x7f0123456000/4096"
_BUFFER = re.compile(r"\s+\d+:\s+0x([0-9a-f]+)/(\d+)")
_RING = "anon_inode:[io_uring]"
# A process that has one of these open may have pinned any page; the kernel does not list them.
_DEVICES = ("/dev/vfio/", "/dev/iommu", "/dev/infiniband/", "anon_inode:[vfio")


@dataclass(frozen=True, slots=True)
class Pin:
    """A pinned range, or the whole address space if the kernel does not tell which pages."""

    start: int
    end: int
    detail: str


def buffers(pid: int) -> list[Pin]:
    """Return what a process has pinned, by its descriptors; several may be of one ring."""
    found: dict[tuple[int, int], Pin] = {}
    for fd in pinners(pid):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:  # closed since
            continue
        for pin in _of_descriptor(pid, fd, link):
            found.setdefault((pin.start, pin.end), pin)
    return sorted(found.values(), key=lambda pin: (pin.start, pin.end))


def _of_descriptor(pid: int, fd: int, link: str) -> Iterator[Pin]:
    if link.startswith(_DEVICES):
        yield Pin(0, ADDRESS_LIMIT, f"descriptor {fd} is {link}, which may have pinned any page")
    if link != _RING:
        return
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as lines:
            text = lines.read()
    except OSError:
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
