"""Blocking reads, and poll, while messages come and are read (layer L5)."""

from __future__ import annotations

import errno
import mmap
import os
import select
import time
from collections.abc import Callable

from pyuffd._abi import Feature, RegisterMode
from pyuffd._events import MESSAGE_SIZE, Remove
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Access, Context
from pyuffd.conformance._types import SMALL, missing_features
from pyuffd.conformance.cases.errno_read import counters
from pyuffd.regions import Region

ROOM = 8 * MESSAGE_SIZE
ORIGIN = "fs/userfaultfd.c: userfaultfd_read"
POLL = "fs/userfaultfd.c: userfaultfd_poll"
PAGES = 3


def _registered(ctx: Context) -> Region:
    region = ctx.make(PAGES)
    ctx.register(region, RegisterMode.MISSING)
    return region


def _fault(ctx: Context, region: Region, page: int) -> Access[object]:
    return ctx.start(ctx.write, region.start + page * ctx.page, b"\1")


def _ready(ctx: Context, timeout_s: float = 0) -> int:
    poll = select.poll()
    poll.register(ctx.uffd, select.POLLIN)
    ready = poll.poll(timeout_s * 1000)
    return ready[0][1] if ready else 0


def _resolve(ctx: Context, region: Region, page: int, access: Access[object]) -> None:
    ctx.uffd.copy(region.start + page * ctx.page, bytes(ctx.page))
    ctx.expect("the write", access.result(), None)


@case("read.ok.blocking-one-queued", origin=ORIGIN, features=missing_features)
def blocking_one(ctx: Context) -> None:
    """A blocking read with room for several messages returns the one queued at once."""
    region = _registered(ctx)
    os.set_blocking(ctx.uffd.fileno(), True)
    for page in range(PAGES):
        access = _fault(ctx, region, page)
        # Not with poll(2), which reports POLLERR for a blocking descriptor.
        wait_pending(ctx, 1)
        reading = ctx.start(os.read, ctx.uffd.fileno(), ROOM)
        ctx.expect("bytes read", len(reading.result()), MESSAGE_SIZE)
        _resolve(ctx, region, page, access)
    os.set_blocking(ctx.uffd.fileno(), False)
    ctx.expect_quiet()


@case("read.ok.blocking-waits", origin=ORIGIN, features=missing_features)
def blocking_waits(ctx: Context) -> None:
    """A blocking read of an empty queue waits for the first message and returns it."""
    region = _registered(ctx)
    os.set_blocking(ctx.uffd.fileno(), True)
    reading = ctx.start(os.read, ctx.uffd.fileno(), ROOM)
    access = _fault(ctx, region, 0)
    ctx.expect("bytes read", len(reading.result()), MESSAGE_SIZE)
    os.set_blocking(ctx.uffd.fileno(), False)
    ctx.expect("pending and total after the read", counters(ctx.uffd), (0, 1))
    _resolve(ctx, region, 0, access)


@case("read.ok.as-many-as-queued", origin=ORIGIN, features=missing_features)
def as_many(ctx: Context) -> None:
    """A read returns the queued messages, oldest first, as many as fit in its buffer."""
    region = _registered(ctx)
    accesses = []
    for page in range(PAGES):
        accesses.append(_fault(ctx, region, page))
        wait_pending(ctx, page + 1)
    first = ctx.uffd.read_events(PAGES - 1)
    second = ctx.uffd.read_events(PAGES)
    seen = [[getattr(event, "address", 0) for event in events] for events in (first, second)]
    pages = [region.start + page * ctx.page for page in range(PAGES)]
    ctx.expect("addresses, by read", seen, [pages[:-1], pages[-1:]])
    for page, access in enumerate(accesses):
        _resolve(ctx, region, page, access)


@case("poll.ok.quiet-after-read", origin=POLL, features=missing_features)
def quiet_after_read(ctx: Context) -> None:
    """Poll reports POLLIN while a message is unread, and nothing once it was read."""
    region = _registered(ctx)
    accesses = []
    for page in range(PAGES):
        ctx.expect("poll before the fault", _ready(ctx), 0)
        accesses.append(_fault(ctx, region, page))
        ctx.expect("poll with a message", _ready(ctx, WAIT_S), select.POLLIN)
        ctx.expect("poll again", _ready(ctx), select.POLLIN)
        ctx.expect_fault(1, region.start + page * ctx.page)
        ctx.expect("poll after the read", _ready(ctx), 0)
        ctx.expect_errno(errno.EAGAIN, os.read, ctx.uffd.fileno(), ROOM)
    for page, access in enumerate(accesses):
        _resolve(ctx, region, page, access)
    ctx.expect("poll at the end", _ready(ctx), 0)


def _expect_wakes(ctx: Context, region: Region, send: Callable[[int], Access[object]]) -> None:
    """Sleep in poll, epoll and select before a message is sent; each must wake."""
    epoll = ctx.enter(select.epoll())
    fd = ctx.uffd.fileno()
    epoll.register(fd, select.EPOLLIN | select.EPOLLET)
    sleeps: tuple[tuple[str, Callable[[], object]], ...] = (
        ("poll", lambda: _ready(ctx, WAIT_S) == select.POLLIN),
        ("edge-triggered epoll", lambda: epoll.poll(WAIT_S) == [(fd, select.EPOLLIN)]),
        ("select", lambda: select.select([fd], [], [], WAIT_S)[0] == [fd]),
    )
    for page, (name, sleep) in enumerate(sleeps):
        sleeping = ctx.start(sleep)
        access = send(page)
        ctx.expect(f"whether {name} wakes", sleeping.result(), True)
        epoll.poll(0)
        (event,) = ctx.uffd.read_events(1)
        ctx.expect("poll after the read", _ready(ctx), 0)
        if isinstance(event, Remove):
            access.result()
        else:
            _resolve(ctx, region, page, access)


@case("poll.ok.wakes-fault", origin=POLL, features=missing_features)
def wakes_fault(ctx: Context) -> None:
    """Poll, epoll and select wake for a fault after earlier ones were read."""
    region = _registered(ctx)
    _expect_wakes(ctx, region, lambda page: _fault(ctx, region, page))


@case(
    "poll.ok.wakes-event",
    origin=POLL,
    features=lambda memory: missing_features(memory) | Feature.EVENT_REMOVE,
    memory=SMALL,  # old kernels have the event, but not MADV_DONTNEED of huge pages
)
def wakes_event(ctx: Context) -> None:
    """Poll, epoll and select wake for a layout event after earlier ones were read."""
    region = _registered(ctx)

    def send(page: int) -> Access[object]:
        return ctx.start(region.madvise, mmap.MADV_DONTNEED, page * ctx.page, ctx.page)

    _expect_wakes(ctx, region, send)


def wait_pending(ctx: Context, count: int) -> None:
    """Wait until fdinfo shows this many unread faults."""
    deadline = time.monotonic() + WAIT_S
    while counters(ctx.uffd)[0] != count:
        if time.monotonic() > deadline:
            ctx.fail("pending and total in fdinfo", counters(ctx.uffd), count)
        os.sched_yield()
