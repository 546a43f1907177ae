"""Scenarios for `_interruptions`: what a careful program does, with an armed part.

These use one object at a time; `_interrupted_handlers` has those with handlers, and
`_interrupted_targets` those with other processes.

Run one: `python -m tests.process._interrupted SCENARIO lines|checks [FIRST END STEP]`, or
`SCENARIO signals RUNS`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import struct
import tempfile

from pyuffd import FileSource, Pagemap, Region, Userfaultfd, lazy, probe
from pyuffd._image_calls import resolve_chain
from pyuffd._owned import Descriptor
from pyuffd._rows import state_runs
from pyuffd._stdio import STDIO
from pyuffd.handover import connect_unix, listen_unix, recv_uffd, send_uffd
from pyuffd.snapshot._format import NUMBERS, RunState
from tests.process._interrupted_handlers import HANDLERS
from tests.process._interrupted_targets import RESTORES, TARGETS
from tests.process._interruptions import LARGE, MARK, Interrupter, Scenario, main

PAGE = 4096
PAGES = 8
DATA_STATE = NUMBERS[RunState.DATA]
LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD = -3


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h (glibc 2.33)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


# One object at a time.


def open_userfaultfd(at: Interrupter) -> None:
    with at.armed(), Userfaultfd():
        pass


def adopt_userfaultfd(at: Interrupter) -> None:
    """If from_fd() raises, the caller still owns the descriptor; otherwise the object does."""
    with Userfaultfd() as uffd:
        fd = os.dup(uffd.fileno())
        taken = None
        with at.armed():
            taken = Userfaultfd.from_fd(fd)
        if taken is None:
            os.close(fd)
        else:
            taken.close()


def detach_userfaultfd(at: Interrupter) -> None:
    uffd = Userfaultfd()
    fd = -1
    with at.armed():
        fd = uffd.detach()
    if fd >= 0:
        os.close(fd)
    uffd.close()


def map_anonymous(at: Interrupter) -> None:
    with at.armed(), Region.anonymous(LARGE, noreserve=True) as region:
        region.fill(1, 0, PAGE)


def map_memfd(at: Interrupter) -> None:
    with at.armed(), Region.memfd(PAGES * PAGE, seal=True) as region, region.alias() as alias:
        alias.fill(1)


def map_shared_memory(at: Interrupter) -> None:
    with at.armed(), Region.shm(MARK, PAGES * PAGE, unlink=True, reserve=True) as region:
        region.fill(1)


def keep_shared_memory(at: Interrupter) -> None:
    """The name is kept only if the constructor returned."""
    made = None
    with at.armed():
        made = Region.shm(MARK, PAGES * PAGE)
    if made is not None:
        made.close()
        os.unlink(f"/dev/shm/{MARK}")


def map_existing_shared_memory(at: Interrupter) -> None:
    """An existing name is removed at the end of a region, but not by a failed attempt."""
    made = None
    Region.shm(MARK, PAGES * PAGE).close()
    with at.armed():
        made = Region.shm(MARK, PAGES * PAGE, unlink=True)
    if made is not None:
        made.close()
    else:
        os.unlink(f"/dev/shm/{MARK}")


def map_file(at: Interrupter) -> None:
    with tempfile.NamedTemporaryFile(prefix=MARK) as file:
        file.truncate(PAGES * PAGE)
        with at.armed(), Region.file(file.name) as region:
            region.fill(1)


def close_region(at: Interrupter) -> None:
    """An interrupted close() continues when it is called again."""
    region = Region.shm(MARK, PAGES * PAGE, unlink=True)
    with at.armed():
        region.close()
    region.close()
    assert region.closed


def view_region(at: Interrupter) -> None:
    """After an interrupted call the region can still be closed."""
    with Region.memfd(PAGES * PAGE) as region, at.armed():
        region.memoryview().release()
        region.digest()


def open_pagemap(at: Interrupter) -> None:
    with Region.anonymous(PAGE) as region, at.armed(), Pagemap() as pagemap:
        pagemap.read(region)


def look_at_pages(at: Interrupter) -> None:
    with Region.memfd(PAGES * PAGE) as region, at.armed():
        region.residency()


def look_at_kernel(at: Interrupter) -> None:
    with at.armed():
        probe()


def open_file_source(at: Interrupter) -> None:
    with at.armed(), FileSource("/proc/self/exe") as source:
        source.read(0, PAGE)


def refuse_file_source(at: Interrupter) -> None:
    with at.armed(), contextlib.suppress(ValueError):
        FileSource("/proc/self/exe", offset=1 << 40)


def hand_over(at: Interrupter) -> None:
    """The Handover owns the descriptors that arrived over a socket, or they are closed."""
    ours, theirs = socket.socketpair()
    with ours, theirs, Userfaultfd() as uffd, Region.memfd(PAGE) as region:
        send_uffd(theirs, uffd, [region], memory=True)
        with at.armed(), recv_uffd(ours) as handover:
            assert handover.regions[0].fd is not None


def listen(at: Interrupter) -> None:
    """accept() is left out: Python's own loses a connection between the call and its object."""
    path = f"{tempfile.gettempdir()}/{MARK}"
    with at.armed(), listen_unix(path), connect_unix(path):
        pass


def close_listener(at: Interrupter) -> None:
    listener = listen_unix(f"{tempfile.gettempdir()}/{MARK}")
    with at.armed():
        listener.close()
    listener.close()


def serve_lazily(at: Interrupter) -> None:
    with at.armed(), lazy(MARK.encode() * 4096, kind="memfd") as memory:
        memory.read(PAGE, 1)


def close_lazily_served(at: Interrupter) -> None:
    memory = lazy(MARK.encode() * 4096, kind="memfd")
    memory.read(0, 1)
    with at.armed():
        memory.close()
    memory.close()


def make_a_pipe(at: Interrupter) -> None:
    with at.armed():
        one, other = Descriptor.pipe(STDIO)
        one.close()
        other.close()


def mapped_by_malloc() -> int:
    """Return the bytes of large blocks that malloc(3) has mapped."""
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # and keep it, whatever is freed
    LIBC.mallinfo2.restype = MallInfo
    return int(LIBC.mallinfo2().hblkhd)


def take_ranges(at: Interrupter) -> None:
    """Ranges that C has allocated, 1.5 MiB each time."""
    states = bytes([0, 1]) * (1 << 16)
    gc.collect()
    before = mapped_by_malloc()
    with at.armed():
        packed = state_runs(states, 0, PAGE, 1)
        assert len(packed) == 3 << 16
        del packed
    gc.collect()
    assert mapped_by_malloc() == before


def resolve_ranges(at: Interrupter) -> None:
    """The same, where they are parts of another result."""
    rows = struct.pack("=6Q", 0, 1 << 40, DATA_STATE, 0, 1 << 40, 0)
    gc.collect()
    before = mapped_by_malloc()
    with at.armed():
        chain = resolve_chain([rows], 0, 1 << 40, 1 << 26)
        assert len(chain.pieces) == 3 << 14
        del chain
    gc.collect()
    assert mapped_by_malloc() == before


def take_a_part(at: Interrupter) -> None:
    with Region.memfd(PAGES * PAGE) as region, at.armed(), region[PAGE:] as part:
        part.memoryview().release()


OBJECTS: list[Scenario] = [
    serve_lazily,
    close_lazily_served,
    take_a_part,
    make_a_pipe,
    take_ranges,
    resolve_ranges,
    hand_over,
    listen,
    close_listener,
    open_userfaultfd,
    adopt_userfaultfd,
    detach_userfaultfd,
    map_anonymous,
    map_memfd,
    map_shared_memory,
    keep_shared_memory,
    map_existing_shared_memory,
    map_file,
    close_region,
    view_region,
    open_pagemap,
    look_at_pages,
    look_at_kernel,
    open_file_source,
    refuse_file_source,
]
SCENARIOS: dict[str, Scenario] = {one.__name__: one for one in OBJECTS + TARGETS}
SCENARIOS |= HANDLERS | RESTORES

if __name__ == "__main__":
    main(SCENARIOS)
