"""Fork, pins and layout events, as uffd-unit-tests checks them (layer L5)."""

from __future__ import annotations

import errno
import mmap
import os
import select

from pyuffd._abi import CopyMode, Feature, PagefaultFlag, RegisterMode, WriteprotectMode
from pyuffd._events import Pagefault, Remap, Remove
from pyuffd._memory import Interrupted
from pyuffd._uffd import Event, Userfaultfd
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Child, Context
from pyuffd.conformance._pin import Pin, ReadPin, needs_pin, needs_read_pin, syscall
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import missing_features, wp_features
from pyuffd.conformance.cases.kselftest_unit import UNPROTECT, WP_WRITE, content, release
from pyuffd.testing._memory_types import MemoryType

MADV_PAGEOUT = 21
SYS_MREMAP, SYS_MADVISE = 25, 28
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


def _wp_fork_features(memory: MemoryType) -> Feature:
    return wp_features(memory) | Feature.EVENT_FORK


# Two bugs were fixed in one release: in the copy of a private hugetlb page, and in a pin for
# writing that has to wait for a fault.
FORK_VARIANTS = (
    Variant("now", "as described"),
    Variant(
        "old",
        "as described, but on private hugetlb the child may or may not have the bit, and a pin by"
        " the child is EFAULT; known by the lack of WP_UNPOPULATED",
        lacks=Feature.WP_UNPOPULATED,
    ),
)
NO_HUGETLB_VARIANTS = (
    Variant("now", "as described"),
    Variant(
        "old",
        "mremap of hugetlb memory and MADV_DONTNEED of private hugetlb memory are EINVAL;"
        " known by the lack of WP_HUGETLBFS_SHMEM",
        lacks=Feature.WP_HUGETLBFS_SHMEM,
    ),
)


def _expect_bits(ctx: Context, when: str, address: int, child: Child, wanted: bool) -> bool:
    """Check the protection in parent and child; return that in the child."""
    ctx.expect(f"parent's uffd-wp bit, {when}", ctx.is_protected(address), True)
    seen = ctx.is_protected(address, pid=child.pid)
    old = seen if ctx.memory.name == "hugetlb-private" else wanted
    ctx.expect_variant(f"child's uffd-wp bit, {when}", seen, now=wanted, old=old)
    return seen


def _wp_fork(ctx: Context, *, child_has: bool) -> None:
    region = ctx.make(1)
    ctx.register(region, RegisterMode.WP)
    region.write(0, b"\1")
    ctx.uffd.writeprotect(region)
    ctx.expect("uffd-wp bit before the fork", ctx.is_protected(region.start), True)
    child = ctx.fork()
    _expect_bits(ctx, "page present", region.start, child, child_has)
    child.close()
    # Dropping an anonymous page would drop its bit, so page it out, if there is swap.
    try:
        region.madvise(MADV_PAGEOUT if ctx.memory.is_anon else mmap.MADV_DONTNEED)
    except OSError as error:
        ctx.note(f"zap: {error}")
    _expect_bits(ctx, "page zapped", region.start, ctx.fork(), child_has)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect("uffd-wp bit after unprotecting", ctx.is_protected(region.start), False)
    ctx.silently(ctx.write, region.start, b"\2")
    ctx.expect("uffd-wp bit after a write", ctx.is_protected(region.start), False)


@case(
    "kselftest.wp-fork",
    origin="uffd-unit-tests: wp-fork",
    features=wp_features,
    variants=FORK_VARIANTS,
)
def wp_fork(ctx: Context) -> None:
    """Without EVENT_FORK, pages, present or zapped, are protected in the parent only."""
    _wp_fork(ctx, child_has=False)


@case(
    "kselftest.wp-fork-with-event",
    origin="uffd-unit-tests: wp-fork-with-event",
    features=_wp_fork_features,
    variants=FORK_VARIANTS,
)
def wp_fork_with_event(ctx: Context) -> None:
    """With EVENT_FORK, pages, present or zapped, are protected in the child too."""
    _wp_fork(ctx, child_has=True)


def _wp_fork_pin(ctx: Context, *, child_has: bool) -> None:
    region = ctx.make(1)
    pin = Pin(region.start, ctx.page)
    ctx.register(region, RegisterMode.WP)
    region.write(0, b"\1")
    # Pin before protecting, since the pin is for writing.
    ring = pin.take(syscall)
    ctx.callback(os.close, ring)
    ctx.uffd.writeprotect(region)
    child = ctx.fork()
    _expect_bits(ctx, "page pinned in the parent", region.start, child, child_has)
    child.close()
    pin.drop(syscall, ring)
    child = ctx.fork()
    has = _expect_bits(ctx, "page not pinned", region.start, child, child_has)
    if has and child.uffd is None:
        return  # no userfaultfd could resolve the fault of the child's pin
    pinned = ctx.start(pin.take, child.syscall)
    if has and child.uffd is not None:
        poll = select.poll()
        poll.register(pinned, select.POLLIN)
        poll.register(child.uffd, select.POLLIN)
        waits = child.uffd.fileno() in dict(poll.poll(WAIT_S * 1000))
        ctx.expect_variant(
            "whether the child's pin waits for its fault", waits, now=True, old=False
        )
        if not waits:
            ctx.expect_errno(errno.EFAULT, pinned.result)
            return
        ctx.expect_fault(WP_WRITE, region.start, child.uffd)
        child.uffd.writeprotect(region.start, ctx.page, mode=UNPROTECT)
    pinned.result()
    ctx.expect("parent's uffd-wp bit at the end", ctx.is_protected(region.start), True)
    seen = ctx.is_protected(region.start, pid=child.pid)
    ctx.expect("child's uffd-wp bit, page pinned in the child", seen, False)
    ctx.expect_quiet()


@case(
    "kselftest.wp-fork-pin",
    origin="uffd-unit-tests: wp-fork-pin",
    features=wp_features,
    variants=FORK_VARIANTS,
    needs=[needs_pin()],
)
def wp_fork_pin(ctx: Context) -> None:
    """A page pinned by parent or child is not protected in the child."""
    _wp_fork_pin(ctx, child_has=False)


@case(
    "kselftest.wp-fork-pin-with-event",
    origin="uffd-unit-tests: wp-fork-pin-with-event",
    features=_wp_fork_features,
    variants=FORK_VARIANTS,
    needs=[needs_pin()],
)
def wp_fork_pin_with_event(ctx: Context) -> None:
    """With EVENT_FORK, a pinned page is protected in the child too; pinning it there faults."""
    _wp_fork_pin(ctx, child_has=True)


def _wp_fork_read_pin(ctx: Context, *, child_has: bool) -> None:
    region = ctx.make(1)
    pin = ReadPin(region.start, ctx.page)
    ctx.register(region, RegisterMode.WP)
    region.write(0, b"\1")
    ctx.uffd.writeprotect(region)
    fd = pin.take(syscall)
    ctx.callback(os.close, fd)
    child = ctx.fork()
    _expect_bits(ctx, "page pinned in the parent", region.start, child, child_has)
    child.close()
    pin.drop(syscall, fd)
    child = ctx.fork()
    ctx.expect(
        "whether the child can pin the page", ctx.silently(pin.take, child.syscall) >= 0, True
    )
    _expect_bits(ctx, "page pinned in the child", region.start, child, child_has)
    ctx.expect_quiet(child.uffd)


@case(
    "kselftest.wp-fork-read-pin",
    origin="uffd-unit-tests: wp-fork-pin",
    features=wp_features,
    variants=FORK_VARIANTS,
    needs=[needs_read_pin()],
    alone=True,
)
def wp_fork_read_pin(ctx: Context) -> None:
    """A page pinned for reading by parent or child is not protected in the child."""
    _wp_fork_read_pin(ctx, child_has=False)


@case(
    "kselftest.wp-fork-read-pin-with-event",
    origin="uffd-unit-tests: wp-fork-pin-with-event",
    features=_wp_fork_features,
    variants=FORK_VARIANTS,
    needs=[needs_read_pin()],
    alone=True,
)
def wp_fork_read_pin_with_event(ctx: Context) -> None:
    """With EVENT_FORK, a page pinned for reading is protected in the child; no message is sent."""
    _wp_fork_read_pin(ctx, child_has=True)


def _events(ctx: Context, *, wp: bool) -> None:
    pages = 4
    half = pages // 2
    region, target = ctx.make(pages), ctx.make(pages)
    ctx.register(region, RegisterMode.MISSING | (RegisterMode.WP if wp else RegisterMode(0)))
    start, length = region.start, region.length
    child = ctx.fork()
    child_uffd = child.uffd
    assert child_uffd is not None
    base = [start]

    def resolve(event: Event) -> None:
        _serve(ctx, child_uffd, event, base, wp)

    monitor = ctx.monitor(resolve, child_uffd)

    def check(index: int, first: int) -> None:
        at = first + index * ctx.page
        seen = ctx.start(child.read, at, 8).result()
        ctx.expect(f"page {index} in the child", seen, content(ctx, index)[:8])
        ctx.expect(
            f"write to page {index} in the child",
            ctx.start(child.write, at, b"\xee").result(),
            None,
        )

    wanted: list[Event] = []
    for index in range(half):
        check(index, start)
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    moved = ctx.start(child.syscall, SYS_MREMAP, start, length, length, flags, target.start)
    refused = -errno.EINVAL if ctx.memory.is_hugetlb else None
    answer = moved.result()
    ctx.expect_variant("mremap", answer, now=target.start, old=refused or target.start)
    place = start if answer == refused else target.start
    if place != start:
        wanted.append(Remap(start, target.start, length))
    for index in range(half, pages):
        check(index, place)
    advice = mmap.MADV_REMOVE if ctx.memory.shared else mmap.MADV_DONTNEED
    dropped = ctx.start(child.syscall, SYS_MADVISE, place, length, advice)
    answer = dropped.result()
    private_hugetlb = ctx.memory.is_hugetlb and not ctx.memory.shared
    ctx.expect_variant("madvise", answer, now=0, old=-errno.EINVAL if private_hugetlb else 0)
    if answer == 0:
        wanted.append(Remove(place, place + length))
        # madvise returns when its event is read, perhaps before the range is unregistered.
        monitor.wait_handled(pages * (2 if wp else 1) + len(wanted))
        for index in range(pages):
            seen = ctx.start(child.read, place + index * ctx.page, 8).result()
            ctx.expect(f"page {index} after its removal", seen, bytes(8))
    monitor.stop()
    ctx.expect("layout events", monitor.events, wanted)
    ctx.expect("missing faults", monitor.count(PagefaultFlag(0)), pages)
    ctx.expect("write-protect faults", monitor.count(PagefaultFlag.WP), pages if wp else 0)
    ctx.expect_quiet()


def _serve(ctx: Context, uffd: Userfaultfd, event: Event, base: list[int], wp: bool) -> None:
    match event:
        case Pagefault(address, flags, _) if flags & PagefaultFlag.WP:
            uffd.writeprotect(address, ctx.page, mode=WriteprotectMode(0))
        case Pagefault(address, _, _):
            index = (address - base[0]) // ctx.page
            uffd.copy(address, content(ctx, index), mode=CopyMode.WP if wp else CopyMode(0))
        case Remap(_, to, _):
            base[0] = to
        case Remove(start, end):
            uffd.unregister(start, end - start)


def _event_features(memory: MemoryType) -> Feature:
    return (
        missing_features(memory) | Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE
    )


@case(
    "kselftest.events",
    origin="uffd-unit-tests: events",
    features=_event_features,
    variants=NO_HUGETLB_VARIANTS,
)
def events(ctx: Context) -> None:
    """A Fork event's userfaultfd resolves the child's faults, through mremap and MADV_DONTNEED."""
    _events(ctx, wp=False)


@case(
    "kselftest.events-wp",
    origin="uffd-unit-tests: events-wp",
    features=lambda memory: _event_features(memory) | wp_features(memory),
    variants=NO_HUGETLB_VARIANTS,
)
def events_wp(ctx: Context) -> None:
    """With pages that COPY write-protects, each first write in the child also sends message 3."""
    _events(ctx, wp=True)


@case(
    "kselftest.events-release",
    origin="uffd-unit-tests: events (release_pages)",
    features=lambda memory: missing_features(memory) | Feature.EVENT_REMOVE,
)
def events_release(ctx: Context) -> None:
    """A call that drops pages waits until its Remove event is read; then the pages are missing."""
    region = ctx.make(2)
    ctx.register(region, RegisterMode.MISSING)
    ctx.uffd.copy(region.start, content(ctx, 0))
    if ctx.memory.name == "hugetlb-private" and not ctx.offered & Feature.WP_HUGETLBFS_SHMEM:
        ctx.lack("hugetlb-dontneed", "needs MADV_DONTNEED of hugetlb memory")
    access = ctx.start(release, region)
    ctx.expect(
        "the event", ctx.expect_event(Remove), Remove(region.start, region.start + len(region))
    )
    access.result()
    reading = ctx.start(ctx.read, region.start)
    ctx.expect_fault(0, region.start)
    ctx.uffd.copy(region.start, content(ctx, 1))
    seen = reading.result()
    if isinstance(seen, Interrupted):
        ctx.fail("the read", seen, "a byte")
    ctx.expect("the read", seen, content(ctx, 1)[:1])
