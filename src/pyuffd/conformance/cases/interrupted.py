"""Signals and layout changes while a thread waits for a fault or an event (layer L5)."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import signal
import time
from pathlib import Path
from typing import Any

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd._events import Remove, Unmap
from pyuffd._uffd import Event
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import (
    ALL,
    ANON,
    HUGETLB,
    SHARED,
    SMALL,
    missing_features,
    wp_features,
)
from pyuffd.conformance._wp import HOLE, MISSING_READ, UNPROTECT, WP_WRITE, expect_fault
from pyuffd.conformance.cases.errno_read import counters
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType

SYS_MUNMAP = 11
MISSING = RegisterMode.MISSING
STOPPED = "T"
# How long to watch a process that must not stop.
WATCHED_S = 0.02


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _wait_state(ctx: Context, pid: int, wanted: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while (seen := _state(pid)) != wanted:
        if time.monotonic() > deadline:
            ctx.fail("state of the process", seen, wanted)
        os.sched_yield()


def _with_fork(memory: MemoryType) -> Feature:
    return missing_features(memory) | wp_features(memory) | Feature.EVENT_FORK


def _add_stopped(name: str, flags: int, mode: RegisterMode) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(1)
        ctx.register(region, mode)
        if flags == WP_WRITE:
            region.fill(1)
        child = ctx.fork()
        uffd = child.uffd
        assert uffd is not None
        if flags == WP_WRITE:
            uffd.writeprotect(region)

        def touch() -> object:
            if flags == WP_WRITE:
                return child.write(region.start, b"\2")
            return child.read(region.start, 1)

        access = ctx.start(touch)
        expect_fault(ctx, access, flags, region.start, uffd)
        os.kill(child.pid, signal.SIGSTOP)
        _wait_state(ctx, child.pid, STOPPED)
        ctx.expect("pending and total while the process is stopped", counters(uffd), (0, 0))
        os.kill(child.pid, signal.SIGCONT)
        expect_fault(ctx, access, flags, region.start, uffd)
        if flags == WP_WRITE:
            uffd.writeprotect(region, mode=UNPROTECT)
        else:
            uffd.copy(region.start, b"\3" * ctx.page)
        access.result()
        ctx.expect_quiet(uffd)

    case(
        f"fault.ok.stopped-{name}",
        summary=f"A process that waits for a {name} fault can be stopped, and faults again later",
        origin="fs/userfaultfd.c: userfaultfd_get_blocking_state",
        memory=ALL,
        features=_with_fork,
    )(run)


_add_stopped("missing", MISSING_READ, MISSING)
_add_stopped("write-protect", WP_WRITE, RegisterMode.WP)


@case(
    "event.munmap.stopped",
    origin="fs/userfaultfd.c: userfaultfd_event_wait_completion",
    memory=SMALL,
    features=lambda memory: missing_features(memory) | Feature.EVENT_FORK | Feature.EVENT_UNMAP,
)
def event_stopped(ctx: Context) -> None:
    """A process whose event is unread cannot be stopped, and the event stays queued."""
    region = ctx.make(2)
    ctx.register(region, MISSING)
    child = ctx.fork()
    uffd = child.uffd
    assert uffd is not None
    call = ctx.start(child.syscall, SYS_MUNMAP, region.start, ctx.page)
    ctx.wait_readable(uffd)
    _wait_state(ctx, child.pid, "D")
    os.kill(child.pid, signal.SIGSTOP)
    end = time.monotonic() + WATCHED_S
    while time.monotonic() < end:
        ctx.expect("state of the process", _state(child.pid), "D")
    event = ctx.expect_event(Unmap, uffd)
    ctx.expect("the event", event, Unmap(region.start, region.start + ctx.page))
    _wait_state(ctx, child.pid, STOPPED)
    os.kill(child.pid, signal.SIGCONT)
    ctx.expect("munmap", call.result(), 0)
    ctx.expect_quiet(uffd)


@case(
    "event.munmap.killed-unread",
    origin="fs/userfaultfd.c: userfaultfd_event_wait_completion",
    memory=SMALL,
    features=lambda memory: missing_features(memory) | Feature.EVENT_FORK | Feature.EVENT_UNMAP,
)
def event_killed(ctx: Context) -> None:
    """A process that is killed while its event is unread takes the event with it."""
    region = ctx.make(2)
    ctx.register(region, MISSING)
    child = ctx.fork()
    uffd = child.uffd
    assert uffd is not None
    call = ctx.start(child.syscall, SYS_MUNMAP, region.start, ctx.page)
    ctx.wait_readable(uffd)
    os.kill(child.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        call.result()
    ctx.expect_quiet(uffd)


@case(
    "event.MADV_DONTNEED.changed-meanwhile",
    origin="mm/madvise.c: madvise_dontneed_free",
    memory=ANON,
    features=Feature.EVENT_REMOVE,
    variants=[
        Variant("repeated", "the second part is dropped with an event of its own"),
        Variant("left", "the second part is not dropped; no feature bit tells"),
    ],
)
def changed_meanwhile(ctx: Context) -> None:
    """If the mapping is split while the event is unread, the rest is dropped with another event."""
    region = ctx.make(3)
    region.fill(1)
    ctx.register(region, MISSING)
    pages = [region.start + index * ctx.page for index in range(3)]
    dropping = ctx.start(region.madvise, mmap.MADV_DONTNEED, 0, 2 * ctx.page)
    ctx.wait_readable()
    _memory.mprotect(pages[1], ctx.page, mmap.PROT_READ)
    event = ctx.expect_event(Remove)
    ctx.expect("the event", event, Remove(pages[0], pages[2]))
    more: list[Event] = []
    waited: list[Any] = [dropping, ctx.uffd]
    while select.select(waited, [], [], WAIT_S)[0] == [ctx.uffd]:
        more += ctx.uffd.read_events(1)
    dropping.result()
    second = [Remove(pages[1], pages[2])]
    ctx.expect_variant("further events", more, repeated=second, left=[])
    ctx.expect_pagemap(pages[0], HOLE)
    states = {"repeated": HOLE, "left": "P????"}
    ctx.expect_variant("pagemap of the second page", ctx.pagemap(pages[1]), **states)
    ctx.expect("byte behind the dropped range", ctx.silently(ctx.read, pages[2]), b"\1")


@case(
    "event.MADV_DONTNEED-two.remove-each",
    origin="mm/madvise.c: madvise_walk_vmas",
    memory=ANON,
    features=Feature.EVENT_REMOVE | Feature.PAGEFAULT_FLAG_WP,
)
def remove_each(ctx: Context) -> None:
    """MADV_DONTNEED of two mappings sends an event for each, one after the other."""
    region = ctx.make(4)
    region.fill(1)
    middle = region.start + 2 * ctx.page
    ctx.open().register(region.start, 2 * ctx.page, mode=MISSING)
    ctx.uffd.register(middle, 2 * ctx.page, mode=MISSING | RegisterMode.WP)
    dropping = ctx.start(region.madvise, mmap.MADV_DONTNEED, ctx.page, 2 * ctx.page)
    wanted = (
        Remove(region.start + ctx.page, middle),
        Remove(middle, middle + ctx.page),
    )
    for remove in wanted:
        ctx.expect("the event", ctx.expect_event(Remove), remove)
    dropping.result()
    states = [ctx.bits(region.start + index * ctx.page) >> 63 & 1 for index in range(4)]
    ctx.expect("which pages are present", states, [1, 0, 0, 1])


@case(
    "event.MADV_REMOVE.drops-what-it-said",
    origin="mm/madvise.c: madvise_remove",
    memory=SHARED,
    features=lambda memory: missing_features(memory) | Feature.EVENT_REMOVE,
)
def remove_part(ctx: Context) -> None:
    """MADV_REMOVE of one page of three drops only that page of the file."""
    region = ctx.make(3)
    region.fill(1)
    ctx.register(region, MISSING)
    middle = region.start + ctx.page
    dropping = ctx.start(region.madvise, mmap.MADV_REMOVE, ctx.page, ctx.page)
    event = ctx.expect_event(Remove)
    ctx.expect("the event", event, Remove(middle, middle + ctx.page))
    dropping.result()
    for index in (0, 2):
        at = region.start + index * ctx.page
        ctx.expect("byte of a neighbour", ctx.silently(ctx.read, at), b"\1")
    reading = ctx.start(ctx.read, middle)
    expect_fault(ctx, reading, MISSING_READ, middle)
    ctx.uffd.copy(middle, b"\2" * ctx.page)
    ctx.expect("the byte", reading.result(), b"\2")


@case(
    "event.MADV_DONTNEED-part-of-huge.remove-whole-pages",
    origin="mm/madvise.c: madvise_dontneed_free_valid_vma",
    memory=HUGETLB,
    features=lambda memory: missing_features(memory) | Feature.EVENT_REMOVE,
    variants=[
        Variant("whole", "the length is rounded down to whole huge pages, also in the event"),
        Variant("refused", "EINVAL on hugetlb, and no event", lacks=Feature.WP_HUGETLBFS_SHMEM),
    ],
)
def part_of_huge(ctx: Context) -> None:
    """MADV_DONTNEED of a huge page and a part of the next drops, and reports, only the first."""
    region = ctx.make(2)
    region.fill(1)
    ctx.register(region, MISSING)

    def drop(length: int) -> int:
        try:
            _memory.madvise(region.start, length, mmap.MADV_DONTNEED)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    ctx.expect_variant(
        "errno of a part of a huge page", ctx.silently(drop, SMALL_PAGE), whole=0, refused=22
    )
    ctx.expect_pagemap(region.start, "P????")
    if ctx.variant == "refused":
        return
    dropping = ctx.start(drop, ctx.page + SMALL_PAGE)
    event = ctx.expect_event(Remove)
    ctx.expect("the event", event, Remove(region.start, region.start + ctx.page))
    ctx.expect("errno of a huge page and a part", dropping.result(), 0)
    ctx.expect_pagemap(region.start, HOLE)
    ctx.expect_pagemap(region.start + ctx.page, "P????")
