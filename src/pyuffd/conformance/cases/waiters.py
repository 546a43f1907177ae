"""Resolving a range wakes exactly the threads that wait in it (layer L5).

Three or four threads wait on neighbouring pages, and each operation resolves those in the middle.
The others must stay asleep and send no second message. The total in fdinfo tells how many wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyuffd._abi import (
    ContinueMode,
    Feature,
    MoveMode,
    PoisonMode,
    RegisterMode,
    WriteprotectMode,
    ZeropageMode,
)
from pyuffd._memory import Interrupted
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Access, Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import (
    ALL,
    ANON,
    FILE,
    SMALL,
    minor_features,
    missing_features,
    poison_features,
    wp_features,
)
from pyuffd.conformance._wp import in_page_cache
from pyuffd.conformance.cases.errno_read import counters
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType

MISSING_READ, MISSING_WRITE, WP_WRITE, MINOR_READ = 0, 1, 3, 4
OLD, NEW = 0x11, 0x22
SIGBUS = 7


@dataclass(frozen=True)
class Resolver:
    """An operation that wakes, and the kind of fault that it resolves.

    Attributes:
        name: The operation.
        memory: The memory types that it supports.
        features: The features that it needs.
        mode: The register mode.
        flags: The flags of the message that each thread sends.
        resolve: Resolves the faults of a range, given its address and length.
        value: The byte that is read afterwards; None if the thread gets SIGBUS.
        starts_full: The pages are present and protected before.
        again: The threads fault again, because the operation resolves nothing.
    """

    name: str
    memory: tuple[str, ...]
    features: Callable[[MemoryType], Feature]
    mode: RegisterMode
    flags: int
    resolve: Callable[[Context, int, int], object]
    value: int | None
    starts_full: bool = False
    again: bool = False


def _copy(ctx: Context, start: int, length: int) -> None:
    ctx.uffd.copy(start, bytes([NEW]) * length)


def _zeropage(ctx: Context, start: int, length: int) -> None:
    ctx.uffd.zeropage(start, length)


def _continue(ctx: Context, start: int, length: int) -> None:
    ctx.uffd.continue_(start, length)


def _move(ctx: Context, start: int, length: int) -> None:
    source = ctx.make(length // SMALL_PAGE, "anon")
    source.fill(NEW)
    ctx.uffd.move(start, source.start, length)


def _poison(ctx: Context, start: int, length: int) -> None:
    ctx.uffd.poison(start, length)


def _unprotect(ctx: Context, start: int, length: int) -> None:
    ctx.uffd.writeprotect(start, length, mode=WriteprotectMode(0))


def _unregister(ctx: Context, start: int, length: int) -> None:
    ctx.uffd.unregister(start, length)


def _wake(ctx: Context, start: int, length: int) -> None:
    ctx.uffd.wake(start, length)


MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
RESOLVERS = (
    Resolver("UFFDIO_COPY", ALL, missing_features, MISSING, MISSING_READ, _copy, NEW),
    Resolver("UFFDIO_ZEROPAGE", SMALL, missing_features, MISSING, MISSING_READ, _zeropage, 0),
    Resolver("UFFDIO_CONTINUE", FILE, minor_features, MINOR, MINOR_READ, _continue, OLD),
    Resolver("UFFDIO_MOVE", ANON, lambda _: Feature.MOVE, MISSING, MISSING_READ, _move, NEW),
    Resolver("UFFDIO_POISON", ALL, poison_features, MISSING, MISSING_READ, _poison, None),
    Resolver(
        "UFFDIO_WRITEPROTECT", ALL, wp_features, WP, WP_WRITE, _unprotect, OLD, starts_full=True
    ),
    Resolver("UFFDIO_UNREGISTER", ALL, missing_features, MISSING, MISSING_READ, _unregister, 0),
    Resolver("UFFDIO_WAKE", ALL, missing_features, MISSING, MISSING_READ, _wake, 0, again=True),
)
Waiting = list[Access[Any]]


def ready(ctx: Context, resolver: Resolver, pages: int) -> Region:
    """Make a region in which each access waits for an operation."""
    region = ctx.make(pages)
    if resolver.mode is MINOR:
        in_page_cache(region, OLD)
    ctx.register(region, resolver.mode)
    if resolver.starts_full:
        region.fill(OLD)
        ctx.uffd.writeprotect(region)
    return region


def touch(ctx: Context, resolver: Resolver, at: int) -> Access[Any]:
    """Start a thread whose access waits for an operation."""
    if resolver.flags == WP_WRITE:
        return ctx.start(ctx.write, at, bytes([OLD]))
    return ctx.start(ctx.read, at)


def _asleep(
    ctx: Context, resolver: Resolver, pages: int, offset: int, exact: bool
) -> tuple[Region, Waiting]:
    """Start a thread that waits at this offset in each page, and read all messages."""
    region = ready(ctx, resolver, pages)
    waiting: Waiting = []
    for index in range(pages):
        page = region.start + index * ctx.page
        at = page + offset % ctx.page
        waiting.append(touch(ctx, resolver, at))
        ctx.expect_fault(resolver.flags, at if exact else page)
    ctx.expect("pending and total after the reads", counters(ctx.uffd), (0, pages))
    return region, waiting


def expect_over(ctx: Context, resolver: Resolver, access: Access[Any]) -> None:
    """Check the result of an access whose page is resolved."""
    seen = access.result()
    if resolver.value is None:
        signal = seen.number if isinstance(seen, Interrupted) else seen
        ctx.expect("signal of the access", signal, SIGBUS)
    else:
        written = resolver.flags == WP_WRITE
        ctx.expect("result of the access", seen, None if written else bytes([resolver.value]))


def _run(ctx: Context, resolver: Resolver, pages: int, resolved: range, offset: int = 0) -> None:
    exact = bool(ctx.case.features_on(ctx.memory) & Feature.EXACT_ADDRESS)
    region, waiting = _asleep(ctx, resolver, pages, offset, exact)
    start = region.start + resolved[0] * ctx.page
    resolver.resolve(ctx, start, len(resolved) * ctx.page)
    others = [index for index in range(pages) if index not in resolved]
    if resolver.again:
        _expect_again(ctx, resolver, region, resolved, offset % ctx.page if exact else 0)
        ctx.expect("pending and total after the second reads", counters(ctx.uffd), (0, pages))
    else:
        ctx.expect(f"pending and total after {resolver.name}", counters(ctx.uffd), (0, len(others)))
        for index in resolved:
            expect_over(ctx, resolver, waiting[index])
    ctx.expect_quiet()
    # Resolve the rest one by one.
    left = [*others, *resolved] if resolver.again else others
    while left:
        index = left.pop(0)
        at = region.start + index * ctx.page
        (_copy if resolver.again else resolver.resolve)(ctx, at, ctx.page)
        ctx.expect("pending and total after one more page", counters(ctx.uffd), (0, len(left)))
        if resolver.again:
            ctx.expect("result of the access", waiting[index].result(), bytes([NEW]))
        else:
            expect_over(ctx, resolver, waiting[index])
    ctx.expect_quiet()


def _expect_again(
    ctx: Context, resolver: Resolver, region: Region, resolved: range, offset: int
) -> None:
    """Expect a second message from each thread that was woken, in any order, and no other."""
    faults = {ctx.expect_fault(resolver.flags).address for _ in resolved}
    wanted = {region.start + index * ctx.page + offset for index in resolved}
    ctx.expect("pages that fault again", sorted(faults), sorted(wanted))


def _add(resolver: Resolver) -> None:
    origin = "fs/userfaultfd.c: userfaultfd_wake_function"
    what = "faults again" if resolver.again else "goes on"
    case(
        f"{resolver.name}.ok.neighbours-sleep",
        summary=f"Only the thread in the page {what}; threads in the pages beside it sleep on",
        origin=origin,
        memory=resolver.memory,
        features=resolver.features,
    )(lambda ctx: _run(ctx, resolver, 3, range(1, 2), -1))
    case(
        f"{resolver.name}.ok.two-of-four-wake",
        summary="A call for the middle two of four pages wakes the threads of just these two",
        origin=origin,
        memory=resolver.memory,
        features=resolver.features,
    )(lambda ctx: _run(ctx, resolver, 4, range(1, 3)))
    case(
        f"{resolver.name}.ok.neighbours-sleep-exact",
        summary="With EXACT_ADDRESS, a thread that waits at the last byte of its page is woken with"
        " that page only",
        origin=origin,
        memory=resolver.memory,
        features=lambda memory: resolver.features(memory) | Feature.EXACT_ADDRESS,
    )(lambda ctx: _run(ctx, resolver, 3, range(1, 2), -1))


for _resolver in RESOLVERS:
    _add(_resolver)


# UNREGISTER and other modes than MISSING

_WAKES = (
    Variant("awake", "the thread goes on"),
    Variant(
        "asleep", "the thread sleeps until UFFDIO_WAKE or the last close, which is a kernel bug"
    ),
)


def _add_unregister(mode: RegisterMode, memory: tuple[str, ...], resolver: Resolver) -> None:
    def run(ctx: Context) -> None:
        region, (waiting,) = _asleep(ctx, resolver, 1, 0, False)
        ctx.uffd.unregister(region)
        left = counters(ctx.uffd)
        ctx.expect_variant("pending and total after UNREGISTER", left, awake=(0, 0), asleep=(0, 1))
        ctx.uffd.wake(region)
        expect_over(ctx, resolver, waiting)
        ctx.expect_quiet()

    case(
        f"UFFDIO_UNREGISTER.ok.wakes-{str(mode.name).lower()}",
        summary=f"UNREGISTER wakes a thread that waits for a {mode.name} fault",
        origin="fs/userfaultfd.c: userfaultfd_unregister",
        memory=memory,
        features=resolver.features,
        variants=_WAKES,
    )(run)


_add_unregister(WP, ALL, next(one for one in RESOLVERS if one.mode is WP))
_add_unregister(MINOR, FILE, next(one for one in RESOLVERS if one.mode is MINOR))


# DONTWAKE of ZEROPAGE, CONTINUE, MOVE and POISON; the cases of COPY are in `errno_read`


def _dontwake(ctx: Context, name: str, mode: int, start: int) -> tuple[int, int]:
    words = [start]
    if name == "MOVE":
        source = ctx.make(ctx.page // SMALL_PAGE, "anon")
        source.fill(NEW)
        words.append(source.start)
    answer = ctx.ioctl(name, *words, ctx.page, mode)
    return answer.errno, answer.result


def _add_dontwake(resolver: Resolver, mode: int) -> None:
    name = resolver.name.partition("_")[2]

    def run(ctx: Context) -> None:
        region, (waiting,) = _asleep(ctx, resolver, 1, 0, False)
        seen = _dontwake(ctx, name, mode, region.start)
        ctx.expect(f"errno and result of {name}", seen, (0, ctx.page))
        ctx.expect("pending and total after DONTWAKE", counters(ctx.uffd), (0, 1))
        ctx.expect("whether the access returned before UFFDIO_WAKE", waiting.done, False)
        ctx.uffd.wake(region)
        expect_over(ctx, resolver, waiting)
        ctx.expect_quiet()

    case(
        f"{resolver.name}.ok.dontwake",
        summary="With DONTWAKE the page is filled and its thread sleeps until UFFDIO_WAKE",
        origin=f"{resolver.name}(2const)",
        memory=resolver.memory,
        features=resolver.features,
    )(run)


for _resolver, _mode in (
    (RESOLVERS[1], ZeropageMode.DONTWAKE),
    (RESOLVERS[2], ContinueMode.DONTWAKE),
    (RESOLVERS[3], MoveMode.DONTWAKE),
    (RESOLVERS[4], PoisonMode.DONTWAKE),
):
    _add_dontwake(_resolver, int(_mode))
