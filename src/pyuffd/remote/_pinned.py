"""Memory that is pinned for direct access, as far as /proc tells."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from pyuffd import _remote_calls as calls
from pyuffd import _vmas
from pyuffd._errors import raise_if_short
from pyuffd._pages import ADDRESS_LIMIT, HUGE_PAGE_2M, PAGE_SIZE, round_up

# "    0: 0x7f0123456000/4096"
_BUFFER = re.compile(r"\s+\d+:\s+0x([0-9a-f]+)/(\d+)")
_POLL = re.compile(r"^\s+op=\d+, task_works=", re.MULTILINE)
_RING = "anon_inode:[io_uring]"
_AIO = "/[aio]"
# How many requests a ring has taken, and how many it has completed.
_COUNTERS = ("CachedSqHead", "CachedCqTail")
_EVERYTHING = (0, ADDRESS_LIMIT)
_ATTEMPTS = 20
_PAUSE_S = 0.0005
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

    @property
    def pages(self) -> tuple[int, int]:
        """The pages that it has a part of, as packed ranges of 64 bits can have them."""
        # Nothing is mapped in the last page.
        end = min(round_up(self.end, PAGE_SIZE), ADDRESS_LIMIT - PAGE_SIZE)
        return self.start - self.start % PAGE_SIZE, end


class Pinned(NamedTuple):
    """What may be written past the page table.

    Attributes:
        pins: Ranges, in ascending order; several may be of one ring.
        is_doubtful: Threads run that may have begun a direct read: what was written just now may
            change once more.
    """

    pins: list[Pin]
    is_doubtful: bool


def look(pid: int) -> Pinned:
    """Return what a process has pinned, by its descriptors and by what its threads sleep in.

    A ring may have no descriptor: io_uring_register(2) can give it a number instead. Then the whole
    address space may be pinned, if the kernel counts more pages than the other rings have.
    So it may if the queues of a ring are in the program's memory (IORING_SETUP_NO_MMAP), which the
    kernel pins and writes.

    A direct read (O_DIRECT, or a FUSE file system's choice) pins its buffer for as long as it
    lasts. Those of io_submit(2) and of io_uring are listed nowhere.
    """
    pinners = calls.pinners(pid)
    rings = cache(lambda: _mapped_rings(pid))
    found: dict[tuple[int, int], Pin] = {}
    queue = ""
    for fd in pinners.fds:
        try:
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:  # closed since
            continue
        if link.startswith(_DEVICES):
            detail = f"descriptor {fd} is {link}, which may have pinned any page"
            found.setdefault(_EVERYTHING, Pin(*_EVERYTHING, detail))
        elif link == _RING:
            text = _ring(pid, fd)
            for pin in _buffers(text, fd):
                found.setdefault((pin.start, pin.end), pin)
            if text and _inode(pid, fd) not in rings():
                detail = f"io_uring, descriptor {fd}, has its queues in memory of the program's own"
                found.setdefault(_EVERYTHING, Pin(*_EVERYTHING, detail))
            if _has_requests(text) and (pinners.direct_fd >= 0 or _has_files(text)):
                queue = f"requests of io_uring, descriptor {fd}, may be under way"
    if hidden := _hidden(pid, found):
        found.setdefault(_EVERYTHING, Pin(*_EVERYTHING, hidden))
    if pinners.direct_fd >= 0 and not queue and _is_mapped(pid, _AIO):
        queue = "requests of io_submit(2) may be under way"
    if queue:
        found.setdefault(_EVERYTHING, Pin(*_EVERYTHING, f"{queue}, and read directly (O_DIRECT)"))
    pages, running = calls.reads(pid)
    for start, end in zip(pages[0::3], pages[1::3], strict=True):
        found.setdefault((start, end), Pin(start, end, "a read(2) of a file is under way"))
    if pid == os.getpid():
        running -= 1
    pins = sorted(found.values(), key=lambda pin: (pin.start, pin.end))
    return Pinned(pins, running > 0 and pinners.direct_fd >= 0)


def fixed_buffers(pid: int) -> list[Pin]:
    """Return the fixed buffers of io_uring that are listed, even if the process is stopped."""
    found: list[Pin] = []
    for fd in calls.pinners(pid).fds:
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{fd}") == _RING:
                found += _buffers(_ring(pid, fd, attempts=3), fd)
    return [pin for pin in found if (pin.start, pin.end) != _EVERYTHING]


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
    return bool(_mapped_rings(pid) - {_inode(pid, fd) for fd in calls.pinners(pid).fds})


def _inode(pid: int, fd: int) -> int:
    """Return the inode of an open file, or 0."""
    try:
        return os.stat(f"/proc/{pid}/fd/{fd}").st_ino
    except OSError:  # closed since
        return 0


def _mapped_rings(pid: int) -> set[int]:
    """Return the inodes of rings whose queues the kernel has allocated."""
    return {vma.inode for vma in _mapped(pid) if vma.path == _RING}


def _is_mapped(pid: int, path: str) -> bool:
    return any(vma.path.startswith(path) for vma in _mapped(pid))


def _mapped(pid: int) -> list[_vmas.Vma]:
    try:
        return list(_vmas.overlapping(0, 1 << 64, pid=pid))
    except OSError as error:  # it has ended
        raise_if_short(f"open {error.filename}", error)
        return []


def _ring(pid: int, fd: int, attempts: int = _ATTEMPTS) -> str:
    """Return what fdinfo says about a ring; it says nothing while a request is taken from it."""
    text = ""
    for attempt in range(attempts):
        try:
            with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as lines:
                text = lines.read()
        except OSError as error:
            raise_if_short(f"open {error.filename}", error)
            return ""
        if "UserBufs:" in text:
            break
        time.sleep(_PAUSE_S * attempt)
    return text


def _buffers(text: str, fd: int) -> Iterator[Pin]:
    """Yield the fixed buffers of a ring, or everything if it never says which it has."""
    if not text:  # closed since
        return
    _, found, rest = text.partition("UserBufs:")
    if not found:
        yield Pin(*_EVERYTHING, f"fixed buffers of io_uring, descriptor {fd}, which is always busy")
    for line in rest.split("\n")[1:]:
        match = _BUFFER.fullmatch(line.rstrip())
        if not match:
            break
        start, length = int(match[1], 16), int(match[2])
        if length:
            yield Pin(start, start + length, f"fixed buffer of io_uring, descriptor {fd}")


def _has_requests(text: str) -> bool:
    """Return whether requests may be under way that do not just wait for a file to be ready.

    One request that completes several times is counted for as many, so this says yes too often.
    """
    taken, done = (re.search(rf"^{name}:\s*(\d+)", text, re.MULTILINE) for name in _COUNTERS)
    if not taken or not done:
        return bool(text)
    return (int(taken[1]) - int(done[1])) % (1 << 32) != len(_POLL.findall(text))


def _has_files(text: str) -> bool:
    """Return whether files are registered, which may be open with O_DIRECT."""
    found = re.search(r"^UserFiles:\s*(\d+)", text, re.MULTILINE)
    return found is None or int(found[1]) > 0
