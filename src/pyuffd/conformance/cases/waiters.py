"""Resolving a range wakes exactly the threads that wait in it (layer L5).

Three or four threads wait on neighbouring pages.  Each operation resolves those in the middle; the
others must stay asleep, which fdinfo counts at once, and send no second message.
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
        memory: What it works on.
        features: What the kernel must have.
        mode: How the range is registered.
        flags: Of the message each thread sends.
        resolve: Resolves some bytes from an address on.
        value: The byte that is read afterwards; None where the thread meets SIGBUS.
        starts_full: The pages are there, and protected, before.
        again: Its threads fault again, because nothing was resolved.
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
    """Make a region whose pages will wait for an operation."""
    region = ctx.make(pages)
    if resolver.mode is MINOR:
        in_page_cache(region, OLD)
    ctx.register(region, resolver.mode)
    if resolver.starts_full:
        region.fill(OLD)
        ctx.uffd.writeprotect(region)
    return region


def touch(ctx: Context, resolver: Resolver, at: int) -> Access[Any]:
    """Have a thread make the access that waits for an operation."""
    if resolver.flags == WP_WRITE:
        return ctx.start(ctx.write, at, bytes([OLD]))
    return ctx.start(ctx.read, at)


def _asleep(
    ctx: Context, resolver: Resolver, pages: int, offset: int, exact: bool
) -> tuple[Region, Waiting]:
    """Have a thread wait in each page, at this offset in it; read their messages."""
    region = ready(ctx, resolver, pages)
    waiting: Waiting = []
    for index in range(pages):
        page = region.start + index * ctx.page
        at = page + offset % ctx.page
        waiting.append(touch(ctx, resolver, at))
        ctx.expect_fault(resolver.flags, at if exact else page)
    ctx.expect("threads that wait", counters(ctx.uffd), (0, pages))
    return region, waiting


def expect_over(ctx: Context, resolver: Resolver, access: Access[Any]) -> None:
    """Expect of an access what comes of it once its page is resolved."""
    seen = access.result()
    if resolver.value is None:
        signal = seen.number if isinstance(seen, Interrupted) else seen
        ctx.expect("the access meets", signal, SIGBUS)
    else:
        written = resolver.flags == WP_WRITE
        ctx.expect("the access", seen, None if written else bytes([resolver.value]))


def _run(ctx: Context, resolver: Resolver, pages: int, resolved: range, offset: int = 0) -> None:
    exact = bool(ctx.case.features_on(ctx.memory) & Feature.EXACT_ADDRESS)
    region, waiting = _asleep(ctx, resolver, pages, offset, exact)
    start = region.start + resolved[0] * ctx.page
    resolver.resolve(ctx, start, len(resolved) * ctx.page)
    others = [index for index in range(pages) if index not in resolved]
    if resolver.again:
        _expect_again(ctx, resolver, region, resolved, offset % ctx.page if exact else 0)
        ctx.expect("threads that wait", counters(ctx.uffd), (0, pages))
    else:
        ctx.expect(f"threads that wait after {resolver.name}", counters(ctx.uffd), (0, len(others)))
        for index in resolved:
            expect_over(ctx, resolver, waiting[index])
    ctx.expect_quiet()
    # The others are there to be resolved, one after the other.
    left = [*others, *resolved] if resolver.again else others
    while left:
        index = left.pop(0)
        at = region.start + index * ctx.page
        (_copy if resolver.again else resolver.resolve)(ctx, at, ctx.page)
        ctx.expect("threads that wait", counters(ctx.uffd), (0, len(left)))
        if resolver.again:
            ctx.expect("the access", waiting[index].result(), bytes([NEW]))
        else:
            expect_over(ctx, resolver, waiting[index])
    ctx.expect_quiet()


def _expect_again(
    ctx: Context, resolver: Resolver, region: Region, resolved: range, offset: int
) -> None:
    """Expect a second message of each thread that was woken, in any order, and no other."""
    faults = {ctx.expect_fault(resolver.flags).address for _ in resolved}
    wanted = {region.start + index * ctx.page + offset for index in resolved}
    ctx.expect("pages that fault again", sorted(faults), sorted(wanted))


def _add(resolver: Resolver) -> None:
    origin = "fs/userfaultfd.c: userfaultfd_wake_function"
    what = "faults again" if resolver.again else "goes on"
    case(
        f"{resolver.name}.ok.neighbours-sleep",
        summary=f"The thread in the page {what}; those in the pages before and after sleep on",
        origin=origin,
        memory=resolver.memory,
        features=resolver.features,
    )(lambda ctx: _run(ctx, resolver, 3, range(1, 2), -1))
    case(
        f"{resolver.name}.ok.two-of-four-wake",
        summary="Of four neighbours one call for the two in the middle wakes exactly those",
        origin=origin,
        memory=resolver.memory,
        features=resolver.features,
    )(lambda ctx: _run(ctx, resolver, 4, range(1, 3)))
    case(
        f"{resolver.name}.ok.neighbours-sleep-exact",
        summary="With EXACT_ADDRESS a thread waits at its byte, here the page's last, and is woken"
        " with its page alone",
        origin=origin,
        memory=resolver.memory,
        features=lambda memory: resolver.features(memory) | Feature.EXACT_ADDRESS,
    )(lambda ctx: _run(ctx, resolver, 3, range(1, 2), -1))


for _resolver in RESOLVERS:
    _add(_resolver)


# UNREGISTER and other modes than MISSING

_WAKES = (
    Variant("awake", "the thread goes on"),
    Variant("asleep", "it sleeps until UFFDIO_WAKE or the last close: a kernel bug"),
)


def _add_unregister(mode: RegisterMode, memory: tuple[str, ...], resolver: Resolver) -> None:
    def run(ctx: Context) -> None:
        region, (waiting,) = _asleep(ctx, resolver, 1, 0, False)
        ctx.uffd.unregister(region)
        left = counters(ctx.uffd)
        ctx.expect_variant("threads that wait after UNREGISTER", left, awake=(0, 0), asleep=(0, 1))
        ctx.uffd.wake(region)
        expect_over(ctx, resolver, waiting)
        ctx.expect_quiet()

    case(
        f"UFFDIO_UNREGISTER.ok.wakes-{str(mode.name).lower()}",
        summary=f"A thread that waits for a {mode.name} fault to be resolved, and UNREGISTER",
        origin="fs/userfaultfd.c: userfaultfd_unregister",
        memory=memory,
        features=resolver.features,
        variants=_WAKES,
    )(run)


_add_unregister(WP, ALL, next(one for one in RESOLVERS if one.mode is WP))
_add_unregister(MINOR, FILE, next(one for one in RESOLVERS if one.mode is MINOR))


# DONTWAKE of the operations that fill; those of COPY and WRITEPROTECT are with `errno_read`


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
        ctx.expect("errno and result", seen, (0, ctx.page))
        ctx.expect("threads that wait after DONTWAKE", counters(ctx.uffd), (0, 1))
        ctx.expect("the access is over", waiting.done, False)
        ctx.uffd.wake(region)
        expect_over(ctx, resolver, waiting)
        ctx.expect_quiet()

    case(
        f"{resolver.name}.ok.dontwake",
        summary="DONTWAKE fills the page and leaves its thread asleep until UFFDIO_WAKE",
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
