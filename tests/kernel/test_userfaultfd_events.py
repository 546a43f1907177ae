"""Layout events through `read_events`: the thread that causes one waits until it is read."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import signal
from typing import Any

import pytest

from pyuffd import (
    Feature,
    Fork,
    PageBit,
    Pagefault,
    PagefaultFlag,
    Pagemap,
    PartialResolveError,
    Region,
    RegisterMode,
    Remap,
    Remove,
    Unmap,
    Userfaultfd,
)
from pyuffd import _memory as raw
from pyuffd._uffd import Event
from pyuffd.testing import needs, needs_privilege
from tests._child import run_child
from tests._memory import Memory
from tests.kernel._faults import (
    WAIT_S,
    Task,
    next_events,
    next_fault,
    no_events,
    readable,
    registered,
    wait_for_pending,
)

REMOVE, UNMAP, REMAP = Feature.EVENT_REMOVE, Feature.EVENT_UNMAP, Feature.EVENT_REMAP
pytestmark = needs(REMOVE | UNMAP | REMAP)

PAGE = 4096
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
SYS_FORK = 57


def read_until_done(uffd: Userfaultfd, task: Task[Any]) -> list[Event]:
    """Read events while a thread changes the layout, one batch for each call that waits."""
    events = next_events(uffd)
    task.result()
    return events + uffd.read_events()


def test_remove(memory: Memory) -> None:
    region = memory.pages(3)
    size = memory.page_size
    region.fill(1)
    with registered(region, features=REMOVE) as uffd:
        task = Task(region.madvise, mmap.MADV_DONTNEED, size, size)
        assert readable(uffd, WAIT_S)
        assert task.running
        assert read_until_done(uffd, task) == [Remove(region.start + size, region.start + 2 * size)]
        assert region.read(0, 1) == b"\x01"


def test_punching_a_hole_through_the_mapping(memory: Memory) -> None:
    """MADV_REMOVE sends an event; fallocate(2) through the file does not."""
    if not memory.shared:
        return
    region = memory.pages(2)
    region.fill(1)
    with registered(region, features=REMOVE) as uffd:
        task = Task(region.madvise, mmap.MADV_REMOVE)
        assert read_until_done(uffd, task) == [Remove(region.start, region.start + region.length)]
        assert region.fd is not None
        raw.fallocate(region.fd, 0x1 | 0x2, 0, memory.page_size)  # KEEP_SIZE | PUNCH_HOLE
        assert no_events(uffd)


def test_a_removed_page_is_missing_again(memory: Memory) -> None:
    """If the file still has the page, dropping it from the mapping causes no missing fault."""
    region = memory.pages(1)
    with registered(region, features=REMOVE) as uffd:
        uffd.copy(region.start, b"\x01" * memory.page_size)
        advice = mmap.MADV_REMOVE if memory.shared else mmap.MADV_DONTNEED
        task = Task(region.madvise, advice)
        assert read_until_done(uffd, task) == [Remove(region.start, region.start + region.length)]
        reader = Task(region.read, 0, 1)
        assert next_fault(uffd).address == region.start
        uffd.copy(region.start, b"\x02" * memory.page_size)
        assert reader.result() == b"\x02"


def test_no_event_without_the_feature(memory: Memory) -> None:
    region = memory.pages(1)
    region.fill(1)
    with registered(region) as uffd:
        region.madvise(mmap.MADV_DONTNEED)
        assert no_events(uffd)


def test_unmap(memory: Memory) -> None:
    region = memory.pages(2)
    start, length = region.start, region.length
    with registered(region, features=UNMAP) as uffd:
        task = Task(region.close)
        assert read_until_done(uffd, task) == [Unmap(start, start + length)]


def test_unregistered_first_is_silent(memory: Memory) -> None:
    region = memory.pages(1)
    with registered(region, features=UNMAP) as uffd:
        uffd.unregister(region)
        region.close()
        assert no_events(uffd)


def test_mapping_over_a_range() -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    with Region.anonymous(2 * PAGE) as region, registered(region, features=UNMAP) as uffd:
        task = Task(lambda: raw.mmap(PAGE, mmap.PROT_READ, flags, address=region.start))
        assert read_until_done(uffd, task) == [Unmap(region.start, region.start + PAGE)]


def move_away(length: int, start: int, to: int) -> int:
    return raw.mremap(start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to)


def test_remap() -> None:
    """The registration and the content move to the new place."""
    prot, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    length = 2 * PAGE
    old, new = raw.mmap(length, prot, flags), raw.mmap(length, prot, flags)
    try:
        with Userfaultfd(features=REMAP | UNMAP) as uffd:
            uffd.register(old, length)
            uffd.copy(old, b"\x01" * PAGE)
            task = Task(move_away, length, old, new)
            events = next_events(uffd)
            while task.running or readable(uffd):
                if readable(uffd, 0.01):
                    events += uffd.read_events()
            assert task.result() == new
            assert events == [Remap(old, new, length), Unmap(old, old + length)]
            assert raw.read(new, 1) == b"\x01"
            reader = Task(raw.read, new + PAGE, 1)
            assert next_fault(uffd) == Pagefault(new + PAGE, PagefaultFlag(0), 0)
            uffd.copy(new + PAGE, b"\x02" * PAGE)
            assert reader.result() == b"\x02"
            uffd.unregister(new, length)
    finally:
        raw.munmap(new, length)


def test_remap_without_the_feature_ends_the_registration() -> None:
    prot, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    old, new = raw.mmap(PAGE, prot, flags), raw.mmap(PAGE, prot, flags)
    try:
        with Userfaultfd() as uffd:
            uffd.register(old, PAGE)
            assert move_away(PAGE, old, new) == new
            assert raw.read(new, 1) == b"\0"
            assert no_events(uffd)
    finally:
        raw.munmap(new, PAGE)


CHANGING = {
    "copy": lambda uffd, at: uffd.copy(at, bytes(PAGE)),
    "zeropage": lambda uffd, at: uffd.zeropage(at, PAGE),
    "poison": lambda uffd, at: uffd.poison(at, PAGE),
    "writeprotect": lambda uffd, at: uffd.writeprotect(at, PAGE),
    "move": lambda uffd, at: uffd.move(at, at + 2 * PAGE, PAGE),
}


@needs(Feature.POISON | Feature.MOVE)
@pytest.mark.parametrize("call", CHANGING)
def test_the_layout_is_changing(call: str) -> None:
    """Until the event is read no page can be filled; waking and registering still work."""
    features = REMOVE | Feature.MOVE
    mode = RegisterMode.MISSING | RegisterMode.WP
    with Region.anonymous(4 * PAGE) as region, registered(region, mode, features) as uffd:
        uffd.zeropage(region.start + 2 * PAGE, PAGE)
        task = Task(region.madvise, mmap.MADV_DONTNEED, PAGE, PAGE)
        assert readable(uffd, WAIT_S)
        with pytest.raises(PartialResolveError) as caught:
            CHANGING[call](uffd, region.start)
        assert caught.value.completed == 0
        uffd.wake(region)
        uffd.register(region, mode=mode)
        assert read_until_done(uffd, task) == [Remove(region.start + PAGE, region.start + 2 * PAGE)]
        CHANGING[call](uffd, region.start)


def test_faults_come_before_older_layout_events() -> None:
    with Region.anonymous(2 * PAGE) as region, registered(region, features=REMOVE) as uffd:
        remover = Task(region.madvise, mmap.MADV_DONTNEED, 0, PAGE)
        assert readable(uffd, WAIT_S)
        reader = Task(region.read, PAGE, 1)
        wait_for_pending(uffd, 1)  # the kernel counts faults only
        events: list[Event] = []
        while batch := uffd.read_events():
            events += batch
        assert events == [
            Pagefault(region.start + PAGE, PagefaultFlag(0), 0),
            Remove(region.start, region.start + PAGE),
        ]
        remover.result()
        uffd.fill_zero(region)
        assert reader.result() == b"\0"


def fork_with_protection() -> dict[str, bool]:
    """Fork with the GIL released, and read the event in this process."""
    libc = ctypes.CDLL(None)
    # Not fork(3): it holds malloc's locks until the event is read, and reading it allocates.
    fork = functools.partial(libc.syscall, SYS_FORK)
    mode = RegisterMode.MISSING | RegisterMode.WP
    with (
        Region.anonymous(PAGE) as region,
        registered(region, RegisterMode.WP, Feature.EVENT_FORK) as uffd,
        Pagemap() as pagemap,
    ):
        region.fill(1)
        uffd.writeprotect(region)
        # The child never gets past acquiring the GIL: it is killed below.
        task = Task(lambda: int(fork()) or libc.pause())
        (event,) = next_events(uffd)
        assert isinstance(event, Fork)
        pid = task.result()
        try:
            with event.uffd as child, Pagemap(pid) as child_pagemap:
                inherited = PageBit.UFFD_WP in child_pagemap.read(region).at(region.start)
                # The child's registrations are known, so that losing WP lifts the protection.
                child.register(region, mode=RegisterMode.MISSING)
                left = PageBit.UFFD_WP in child_pagemap.read(region).at(region.start)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        uffd.register(region, mode=mode)
        return {
            "inherited": inherited,
            "left in the child": left,
            "kept in the parent": PageBit.UFFD_WP in pagemap.read(region).at(region.start),
            "closed": event.uffd.closed,
        }


@needs(Feature.EVENT_FORK | Feature.PAGEFAULT_FLAG_WP)
@needs_privilege("CAP_SYS_PTRACE")
def test_fork_event_knows_what_is_registered() -> None:
    assert run_child(fork_with_protection).value == {
        "inherited": True,
        "left in the child": False,
        "kept in the parent": True,
        "closed": True,
    }
