"""The write-protect series: fork, with and without EVENT_FORK (layer L5)."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Child, Context
from pyuffd.conformance._pin import Pin, needs_pin, syscall
from pyuffd.conformance._types import ALL, ANY, FILE, PRIVATE, SMALL, wp_features
from pyuffd.conformance._wp import (
    DATA,
    HOLE,
    IN_FILE,
    MARKER,
    WRITTEN,
    expect_write_fault,
    frame,
    in_one_place,
    marker_features,
    page_out,
    present,
    protected,
)
from pyuffd.regions import Region
from pyuffd.testing._memory_types import MemoryType
from pyuffd.testing._need import needs_privilege, needs_swap

FORK_MESSAGE = 0x13  # UFFD_EVENT_FORK
_MESSAGE = struct.Struct("=B7xI")


@dataclass(frozen=True)
class _State:
    """A state of the page at the time of the fork.

    `make` makes it and returns the region and the byte that is read afterwards.
    """

    name: str
    text: str
    memory: tuple[str, ...]
    make: Callable[[Context], tuple[Region, int]]
    is_swap: bool = False


def _present(ctx: Context) -> tuple[Region, int]:
    return protected(ctx), DATA


def _zapped(ctx: Context) -> tuple[Region, int]:
    region = protected(ctx)
    region.madvise(mmap.MADV_DONTNEED)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    return region, DATA if ctx.memory.shared else IN_FILE


def _swapped(ctx: Context) -> tuple[Region, int]:
    in_one_place(ctx)
    region = protected(ctx)
    page_out(ctx, region)
    ctx.expect_pagemap(region.start, "-?-W-")
    return region, DATA


def _hole(ctx: Context) -> tuple[Region, int]:
    region = ctx.make(1)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    ctx.expect_pagemap(region.start, MARKER[ctx.memory.name])
    return region, 0


STATES = (
    _State("present", "a protected page that is mapped", ALL, _present),
    _State("zapped", "a protected page after MADV_DONTNEED", FILE, _zapped),
    _State("swapped", "a protected page that is swapped out", SMALL, _swapped, is_swap=True),
    _State("hole", "a protected hole", ALL, _hole),
)


def _fork_without_event(ctx: Context, state: _State) -> None:
    region, value = state.make(ctx)
    child = ctx.fork()
    seen = ctx.is_protected(region.start, pid=child.pid)
    ctx.expect("child's uffd-wp bit", seen, False)
    ctx.expect("the child's write", ctx.silently(child.write, region.start, bytes([WRITTEN])), None)
    rest = ctx.silently(child.read, region.start + 1, 8)
    ctx.expect("rest of the child's page", rest, bytes([value]) * 8)
    ctx.expect("parent's uffd-wp bit", ctx.is_protected(region.start), True)
    expect_write_fault(ctx, region.start)


def _fork_with_event(ctx: Context, state: _State) -> None:
    region, value = state.make(ctx)
    child = ctx.fork()
    assert child.uffd is not None
    seen = ctx.is_protected(region.start, pid=child.pid)
    ctx.expect("child's uffd-wp bit", seen, True)
    expect_write_fault(ctx, region.start, child.uffd, child.write)
    ctx.expect_quiet()
    rest = ctx.start(child.read, region.start + 1, 8).result()
    ctx.expect("rest of the child's page", rest, bytes([value]) * 8)
    ctx.expect("parent's uffd-wp bit", ctx.is_protected(region.start), True)
    expect_write_fault(ctx, region.start)
    ctx.expect_quiet(child.uffd)


def _with_event(memory: MemoryType) -> Feature:
    return marker_features(memory) | Feature.EVENT_FORK


def _add(state: _State) -> None:
    case(
        f"wp-series.14.fork-{state.name}",
        summary=f"Without EVENT_FORK, {state.text} is not protected in a forked child",
        origin="patch 14, and David Hildenbrand's mail of 19 Jul 2021",
        memory=state.memory,
        features=marker_features,
        needs=[needs_swap()] if state.is_swap else [],
    )(lambda ctx: _fork_without_event(ctx, state))
    case(
        f"wp-series.14.fork-{state.name}-with-event",
        summary=f"With EVENT_FORK, {state.text} is protected in a forked child too",
        origin="patch 14, and David Hildenbrand's mail of 19 Jul 2021",
        memory=state.memory,
        features=_with_event,
        needs=[needs_swap()] if state.is_swap else [],
    )(lambda ctx: _fork_with_event(ctx, state))


for _each in STATES:
    _add(_each)


def _fork_pinned(ctx: Context) -> tuple[Region, Child]:
    region = ctx.make(1)
    ctx.register(region, RegisterMode.WP)
    region.fill(DATA)
    pin = Pin(region.start, ctx.page)
    # Pin before protecting, since the pin is for writing.
    ring = pin.take(syscall)
    ctx.callback(os.close, ring)
    ctx.uffd.writeprotect(region)
    before = frame(region.start)
    child = ctx.fork()
    ctx.expect(
        "whether the parent's frame is the pinned one", frame(region.start) == before != 0, True
    )
    ctx.expect("parent's uffd-wp bit", ctx.is_protected(region.start), True)
    seen = frame(region.start, pid=child.pid)
    ctx.expect("whether the child has a frame of its own", seen not in (0, before), True)
    return region, child


@case(
    "wp-series.14.fork-pinned",
    origin="patch 14: copies made early, of pinned pages",
    memory=PRIVATE,
    features=wp_features,
    needs=[needs_pin(), needs_privilege("CAP_SYS_ADMIN")],
)
def fork_pinned(ctx: Context) -> None:
    """Fork copies a pinned private page at once; without EVENT_FORK the copy is not protected."""
    region, child = _fork_pinned(ctx)
    ctx.expect("child's uffd-wp bit", ctx.is_protected(region.start, pid=child.pid), False)
    ctx.expect("the child's write", ctx.silently(child.write, region.start, b"\1"), None)
    expect_write_fault(ctx, region.start)


@case(
    "wp-series.14.fork-pinned-with-event",
    origin="patch 14: copies made early, of pinned pages",
    memory=PRIVATE,
    features=_with_event,
    needs=[needs_pin(), needs_privilege("CAP_SYS_ADMIN")],
)
def fork_pinned_with_event(ctx: Context) -> None:
    """With EVENT_FORK, the child's copy of a pinned private page is protected too."""
    region, child = _fork_pinned(ctx)
    assert child.uffd is not None
    ctx.expect("child's uffd-wp bit", ctx.is_protected(region.start, pid=child.pid), True)
    expect_write_fault(ctx, region.start, child.uffd, child.write)
    expect_write_fault(ctx, region.start)


@case(
    "wp-series.14.fork-unregistered",
    origin="patch 14: only what is registered is copied protected",
    features=_with_event,
)
def fork_unregistered(ctx: Context) -> None:
    """With EVENT_FORK, a part unregistered before the fork is not protected in the child."""
    region = ctx.make(2)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    other = region.start + ctx.page
    ctx.uffd.unregister(other, ctx.page)
    child = ctx.fork()
    ctx.expect_pagemap(other, HOLE, pid=child.pid)
    ctx.expect("child's uffd-wp bit", ctx.is_protected(region.start, pid=child.pid), True)
    ctx.expect("the child's write", ctx.silently(child.write, other, b"\1"), None)


@case(
    "wp-series.14.fork-event-descriptor",
    origin="patch 14: the event; UFFD_EVENT_FORK in userfaultfd(2)",
    memory=ANY,
    features=Feature.PAGEFAULT_FLAG_WP | Feature.EVENT_FORK,
)
def fork_descriptor(ctx: Context) -> None:
    """The descriptor of a Fork event is non-blocking if the parent's is, and close-on-exec."""
    region = protected(ctx)
    reading = ctx.start(_read_message, ctx)
    child = ctx.fork_only()
    code, fd = reading.result()
    try:
        ctx.expect("type of the event", code, FORK_MESSAGE)
        ctx.expect("O_NONBLOCK", bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK), True)
        ctx.expect("FD_CLOEXEC", fcntl.fcntl(fd, fcntl.F_GETFD), fcntl.FD_CLOEXEC)
        ctx.expect("child's uffd-wp bit", ctx.is_protected(region.start, pid=child.pid), True)
    finally:
        os.close(fd)
    ctx.expect("child's page after the close", child.pagemap(region.start), "P----")


def _read_message(ctx: Context) -> tuple[int, int]:
    ctx.wait_readable()
    code, fd = _MESSAGE.unpack_from(os.read(ctx.uffd.fileno(), 32))
    return code, fd


@case(
    "wp-series.14.fork-copies-on-write",
    origin="patch 14: bits and copy-on-write together",
    memory=PRIVATE,
    features=_with_event,
)
def fork_cow(ctx: Context) -> None:
    """With write-protection and copy-on-write on one page, parent and child keep their own data."""
    region = protected(ctx)
    child = ctx.fork()
    assert child.uffd is not None
    ctx.expect_pagemap(region.start, present(ctx))
    expect_write_fault(ctx, region.start)
    ctx.expect("child's uffd-wp bit", ctx.is_protected(region.start, pid=child.pid), True)
    seen = ctx.silently(child.read, region.start, 8)
    ctx.expect("child's data", seen, bytes([DATA]) * 8)
    expect_write_fault(ctx, region.start + 1, child.uffd, child.write)
    parents = ctx.silently(ctx.read, region.start, 2)
    ctx.expect("parent's data", parents, bytes([WRITTEN, DATA]))
    childs = ctx.silently(child.read, region.start, 2)
    ctx.expect("child's data", childs, bytes([DATA, WRITTEN]))
