"""Which threads are woken: several in a page, those with unread messages, none on failure (L5).

fdinfo counts the threads that wait: those whose message nobody has read, and all of them.
"""

from __future__ import annotations

import errno
from typing import Any

from pyuffd._abi import RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Access, Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import missing_features, wp_features
from pyuffd.conformance._wp import MISSING_READ, UNPROTECT, WP_WRITE, expect_fault
from pyuffd.conformance.cases.errno_fill import CONTINUE, OPS, Op, Target
from pyuffd.conformance.cases.errno_read import counters
from pyuffd.conformance.cases.reading import wait_pending
from pyuffd.conformance.cases.waiters import (
    MINOR_READ,
    RESOLVERS,
    Resolver,
    expect_over,
    ready,
    touch,
)
from pyuffd.regions import Region

WAKE = "fs/userfaultfd.c: wake_userfault"
DONTWAKE = 1  # the same bit for every ioctl that fills
CROWD = 4


def _count(ctx: Context, when: str, unread: int, waiting: int) -> None:
    seen = counters(ctx.uffd)
    ctx.expect(f"unread messages and threads that wait, {when}", seen, (unread, waiting))


# Threads whose messages nobody has read


def _unread(ctx: Context, resolver: Resolver) -> None:
    region = ready(ctx, resolver, 2)
    waiting = [touch(ctx, resolver, region.start + index * ctx.page) for index in range(2)]
    wait_pending(ctx, 2)
    resolver.resolve(ctx, region.start, ctx.page)
    _count(ctx, f"after {resolver.name} of one page", 1, 1)
    expect_over(ctx, resolver, waiting[0])
    # Only the message of the other page is left.
    ctx.expect_fault(resolver.flags, region.start + ctx.page)
    ctx.expect_quiet()
    resolver.resolve(ctx, region.start + ctx.page, ctx.page)
    expect_over(ctx, resolver, waiting[1])


def _crowd(ctx: Context, resolver: Resolver) -> None:
    region = ready(ctx, resolver, 1)
    waiting: list[Access[Any]] = []
    for index in range(CROWD):
        waiting.append(touch(ctx, resolver, region.start + 8 * index))
        if index < CROWD // 2:
            ctx.expect_fault(resolver.flags, region.start)
        else:
            wait_pending(ctx, index + 1 - CROWD // 2)
    _count(ctx, "before", CROWD - CROWD // 2, CROWD)
    resolver.resolve(ctx, region.start, ctx.page)
    if resolver.again:
        wait_pending(ctx, CROWD)
        ctx.uffd.copy(region.start, bytes([0]) * ctx.page)
    _count(ctx, "afterwards", 0, 0)
    for access in waiting:
        expect_over(ctx, resolver, access)
    ctx.expect_quiet()


def _add(resolver: Resolver) -> None:
    if not resolver.again:
        case(
            f"{resolver.name}.ok.wakes-unread",
            summary="A thread is woken although its message is unread, and the message is gone",
            origin=WAKE,
            memory=resolver.memory,
            features=resolver.features,
        )(lambda ctx: _unread(ctx, resolver))
    case(
        f"{resolver.name}.ok.wakes-crowd",
        summary="All threads that wait in a page are woken, with their messages read or unread",
        origin=WAKE,
        memory=resolver.memory,
        features=resolver.features,
    )(lambda ctx: _crowd(ctx, resolver))


for _resolver in RESOLVERS:
    _add(_resolver)


def _add_close(name: str, resolver: Resolver) -> None:
    def run(ctx: Context) -> None:
        region = ready(ctx, resolver, 2)
        waiting = [touch(ctx, resolver, region.start)]
        ctx.expect_fault(resolver.flags, region.start)
        waiting.append(touch(ctx, resolver, region.start + ctx.page))
        wait_pending(ctx, 1)
        ctx.uffd.close()
        for access in waiting:
            seen = access.result()
            if resolver.flags == WP_WRITE:
                ctx.expect("the write", seen, None)
            else:
                value = resolver.value if resolver.flags == MINOR_READ else 0
                ctx.expect("the byte", seen, bytes([value or 0]))

    case(
        f"close.ok.wakes-{name}",
        summary=f"The last close wakes threads with {name} faults, their messages read or unread",
        origin="fs/userfaultfd.c: userfaultfd_release",
        memory=resolver.memory,
        features=resolver.features,
    )(run)


for _name, _of in (
    ("missing", "UFFDIO_COPY"),
    ("minor", "UFFDIO_CONTINUE"),
    ("write-protect", "UFFDIO_WRITEPROTECT"),
):
    _add_close(_name, next(one for one in RESOLVERS if one.name == _of))


# Calls that fail, completely or after a part


def _flags(op: Op) -> int:
    return MINOR_READ if op is CONTINUE else MISSING_READ


def _wait_in(ctx: Context, op: Op, at: int) -> Access[Any]:
    access = ctx.start(ctx.read, at)
    expect_fault(ctx, access, _flags(op), at)
    return access


def _add_partial(op: Op) -> None:
    def run(ctx: Context) -> None:
        target = Target(ctx, op, 3)
        target.expect(0, ctx.page, at=ctx.page)
        first, last = (_wait_in(ctx, op, target.start + at) for at in (0, 2 * ctx.page))
        target.expect(errno.EAGAIN, ctx.page, length=3 * ctx.page)
        _count(ctx, f"after {op.name} of one of three pages", 0, 1)
        first.result()
        ctx.expect("whether the access to the third page returned", last.done, False)
        target.expect(0, ctx.page, at=2 * ctx.page)
        last.result()
        ctx.expect_quiet()

    case(
        f"UFFDIO_{op.name}.EAGAIN.partial-wakes",
        summary="A call that fills only the first of three pages wakes only that page's thread",
        origin=f"fs/userfaultfd.c: userfaultfd_{op.name.lower()}",
        memory=op.memory,
        features=op.features,
    )(run)


def _add_failed(op: Op) -> None:
    def run(ctx: Context) -> None:
        target = Target(ctx, op)
        access = _wait_in(ctx, op, target.start)
        target.expect(0, ctx.page, mode=DONTWAKE)
        _count(ctx, "after DONTWAKE", 0, 1)
        target.expect(errno.EEXIST, -errno.EEXIST, source=target.source + ctx.page)
        _count(ctx, "after EEXIST", 0, 1)
        ctx.expect("whether the access returned before UFFDIO_WAKE", access.done, False)
        ctx.uffd.wake(target.region)
        access.result()

    case(
        f"UFFDIO_{op.name}.EEXIST.wakes-nobody",
        summary="A call that fails wakes nobody: a thread that DONTWAKE left asleep sleeps on",
        origin=f"fs/userfaultfd.c: userfaultfd_{op.name.lower()}",
        memory=op.memory,
        features=op.features,
    )(run)


for _op in OPS:
    _add_partial(_op)
    _add_failed(_op)


def _protected(ctx: Context, pages: int = 1) -> Region:
    region = ctx.make(pages)
    ctx.register(region, RegisterMode.WP)
    region.fill(1)
    ctx.uffd.writeprotect(region)
    return region


@case(
    "UFFDIO_WRITEPROTECT.ok.protecting-wakes-nobody",
    origin="fs/userfaultfd.c: userfaultfd_writeprotect",
    features=wp_features,
)
def protecting(ctx: Context) -> None:
    """Protecting a protected page again does not wake the thread that waits to write it."""
    region = _protected(ctx)
    write = ctx.start(ctx.write, region.start, b"\2")
    ctx.expect_fault(WP_WRITE, region.start)
    ctx.uffd.writeprotect(region)
    _count(ctx, "after WRITEPROTECT with MODE_WP", 0, 1)
    ctx.expect("whether the write returned before unprotecting", write.done, False)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect("the write", write.result(), None)
    ctx.expect_quiet()


@case(
    "UFFDIO_WRITEPROTECT.ENOENT.wakes-nobody",
    origin="fs/userfaultfd.c: userfaultfd_writeprotect",
    features=wp_features,
    variants=[
        Variant("some", "the pages before the first mapping that is not registered are changed"),
        Variant("none", "a range must lie in one mapping, so nothing is changed"),
    ],
)
def failed_unprotect(ctx: Context) -> None:
    """Unprotecting that fails at the end of its range wakes nobody, whatever it has changed."""
    region = ctx.make(2)
    ctx.register(region, RegisterMode.WP, 1)
    region.fill(1)
    ctx.uffd.writeprotect(region.start, ctx.page)
    write = ctx.start(ctx.write, region.start, b"\2")
    ctx.expect_fault(WP_WRITE, region.start)
    answer = ctx.ioctl("WRITEPROTECT", region.start, region.length, 0)
    ctx.expect("errno of unprotecting", answer.errno, errno.ENOENT)
    _count(ctx, "after ENOENT", 0, 1)
    is_left = ctx.is_protected(region.start)
    ctx.expect_variant("whether the first page is protected", is_left, some=False, none=True)
    ctx.uffd.writeprotect(region.start, ctx.page, mode=UNPROTECT)
    ctx.expect("the write", write.result(), None)


@case(
    "UFFDIO_WAKE.ok.other-descriptor",
    origin="fs/userfaultfd.c: userfaultfd_wake",
    features=missing_features,
)
def other_descriptor(ctx: Context) -> None:
    """WAKE does not wake threads that wait for another userfaultfd."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    reading = ctx.start(ctx.read, region.start)
    ctx.expect_fault(MISSING_READ, region.start)
    second = ctx.open()
    second.wake(region)
    _count(ctx, "after WAKE by the other userfaultfd", 0, 1)
    ctx.uffd.copy(region.start, b"\3" * ctx.page)
    ctx.expect("the byte", reading.result(), b"\3")
    ctx.expect_quiet()
