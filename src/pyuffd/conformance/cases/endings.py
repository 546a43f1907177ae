"""Faults and events that end unanswered: a thread is killed, or the descriptor closed (layer L5).

There is no case of a fork with an unread event: the child has a copy of the descriptor already, so
closing it wakes nobody. One more case is of mremap(2), which grows a registered mapping.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Context
from pyuffd.conformance._types import SMALL, missing_features
from pyuffd.conformance._wp import DATA, MISSING_READ, READ_WRITE, expect_fault, reserve
from pyuffd.conformance.cases.errno_read import counters
from pyuffd.conformance.cases.errno_register import vm_flags
from pyuffd.regions import Region

SYS_MUNMAP, SYS_MREMAP, SYS_MADVISE = 11, 25, 28
MREMAP_TO, MAP_FIXED = 3, 0x10
MISSING = RegisterMode.MISSING
FORK = Feature.EVENT_FORK


@case(
    "fault.ok.killed",
    origin="fs/userfaultfd.c: handle_userfault",
    features=lambda memory: missing_features(memory) | FORK,
)
def killed(ctx: Context) -> None:
    """A process that waits for a fault can be killed, and fdinfo no longer counts it."""
    region = ctx.make(1)
    ctx.register(region, MISSING)
    child = ctx.fork()
    assert child.uffd is not None
    reading = ctx.start(child.read, region.start, 1)
    ctx.expect_fault(MISSING_READ, region.start, child.uffd)
    ctx.expect("pending and total before SIGKILL", counters(child.uffd), (0, 1))
    os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while counters(child.uffd) != (0, 0) and time.monotonic() < deadline:
        os.sched_yield()
    ctx.expect("pending and total after SIGKILL", counters(child.uffd), (0, 0))
    try:
        reading.result()
    except OSError:
        return  # the child is gone
    ctx.fail("the read of the killed child", "a result", "none, since the child has ended")


@dataclass(frozen=True)
class Call:
    """A call in a child that sends an event and waits until the event is read."""

    name: str
    feature: Feature
    arguments: Callable[[Region, Region], tuple[int, ...]]


CALLS = (
    Call(
        "remove",
        Feature.EVENT_REMOVE,
        lambda region, _: (SYS_MADVISE, region.start, region.page_size, mmap.MADV_DONTNEED),
    ),
    Call(
        "unmap",
        Feature.EVENT_UNMAP,
        lambda region, _: (SYS_MUNMAP, region.start, region.page_size),
    ),
    Call(
        "remap",
        Feature.EVENT_REMAP,
        lambda region, other: (
            *(SYS_MREMAP, region.start, region.page_size, region.page_size),
            *(MREMAP_TO, other.start),
        ),
    ),
)


def _add(call: Call) -> None:
    def run(ctx: Context) -> None:
        region, other = ctx.make(2), ctx.make(1)
        ctx.register(region, MISSING)
        child = ctx.fork()
        assert child.uffd is not None
        waiting = ctx.start(child.syscall, *call.arguments(region, other))
        ctx.wait_readable(child.uffd)
        ctx.expect("whether the call returned before the close", waiting.done, False)
        child.uffd.close()
        ctx.expect("whether the call succeeded", waiting.result() >= 0, True)
        # Nothing is registered now, so a read sends no message.
        second = region.start + ctx.page
        ctx.expect("byte in the child", ctx.silently(child.read, second, 1), b"\0")

    case(
        f"close.ok.unread-{call.name}",
        summary=f"A call whose {call.feature.name} is unread returns after the last close",
        origin="fs/userfaultfd.c: userfaultfd_event_wait_completion, userfaultfd_release",
        memory=SMALL,
        features=lambda memory: missing_features(memory) | FORK | call.feature,
    )(run)


for _call in CALLS:
    _add(_call)


@case(
    "mremap.ok.grows-in-place",
    origin="mm/mremap.c: the mapping keeps its flags",
    memory=SMALL,
    features=missing_features,
)
def grows(ctx: Context) -> None:
    """The pages that mremap(2) adds to a registered mapping are registered too."""
    start = reserve(ctx, 2 * ctx.page)
    region = ctx.make(2)
    fd = -1 if region.fd is None else region.fd
    flags = MAP_FIXED | (mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE)
    flags |= mmap.MAP_ANONYMOUS if fd < 0 else 0
    _memory.munmap(start, 2 * ctx.page)
    _memory.mmap(ctx.page, READ_WRITE, flags, fd, 0, start)
    ctx.open().register(start, ctx.page, mode=MISSING)
    ctx.expect("mremap", _memory.mremap(start, ctx.page, 2 * ctx.page, 0), start)
    for at in (start, start + ctx.page):
        ctx.expect("VmFlags", vm_flags(at), {"um"})
        reading = ctx.start(ctx.read, at)
        expect_fault(ctx, reading, MISSING_READ, at)
        ctx.uffd.copy(at, bytes([DATA]) * ctx.page)
        ctx.expect("byte", reading.result(), bytes([DATA]))
