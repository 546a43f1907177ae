"""Faults of one process and how they are resolved, as uffd-unit-tests checks them (layer L5)."""

from __future__ import annotations

import errno
import mmap
import signal

from pyuffd import _memory
from pyuffd._abi import (
    ContinueMode,
    CopyMode,
    Feature,
    Ioctl,
    MoveMode,
    PoisonMode,
    RegisterMode,
    WriteprotectMode,
)
from pyuffd._events import Pagefault
from pyuffd._memory import Interrupted
from pyuffd._uffd import Event
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context, Monitor
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._thp import MADV_COLLAPSE, mapped_huge
from pyuffd.conformance._types import (
    ANON,
    FILE,
    minor_features,
    missing_features,
    missing_wp_features,
    poison_features,
    wp_features,
)
from pyuffd.conformance._wp import page_out
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE, MemoryType
from pyuffd.testing._need import needs_swap, needs_thp

PUNCH_HOLE = 0x1 | 0x2  # with FALLOC_FL_KEEP_SIZE
UNPROTECT = WriteprotectMode(0)
MISSING_READ, MISSING_WRITE, WP_WRITE, MINOR_READ = 0, 1, 3, 4


def content(ctx: Context, index: int) -> bytes:
    """Return the content of page `index` of a source: not zeros, and not that of other pages."""
    return bytes([index % 255 + 1]) * ctx.page


def release(region: Region) -> None:
    """Drop the pages of a shared file, or the private copies."""
    try:
        region.madvise(mmap.MADV_REMOVE if region.shared else mmap.MADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL or region.fd is None:
            raise
        # Private hugetlb before Linux 5.18: a hole in the file removes the private copies too.
        _memory.fallocate(region.fd, PUNCH_HOLE, 0, region.length)


@case("kselftest.zeropage", origin="uffd-unit-tests: zeropage", features=missing_features)
def zeropage(ctx: Context) -> None:
    """ZEROPAGE, if offered, fills a page with zeros; a second call, also by an alias, is EEXIST."""
    region = ctx.make(2)
    ioctls = ctx.register(region, RegisterMode.MISSING, pages=1)
    start = region.start
    ctx.expect(
        "whether REGISTER offers ZEROPAGE", Ioctl.ZEROPAGE in ioctls, not ctx.memory.is_hugetlb
    )
    answer = ctx.ioctl("ZEROPAGE", start, ctx.page)
    if ctx.memory.is_hugetlb:
        ctx.expect("errno and .zeropage", (answer.errno, answer.result), (errno.EINVAL, -22))
        return
    ctx.expect("errno and .zeropage", (answer.errno, answer.result), (0, ctx.page))
    if ctx.memory.shared:
        alias = ctx.alias(region)
        ctx.uffd.register(alias.start, ctx.page)
        start = alias.start
    again = ctx.ioctl("ZEROPAGE", start, ctx.page)
    ctx.expect(
        "errno and .zeropage of the second call",
        (again.errno, again.result),
        (errno.EEXIST, -errno.EEXIST),
    )
    ctx.expect("bytes", ctx.silently(region.read, 0, ctx.page), bytes(ctx.page))


def _move(ctx: Context, unit: int, pages: int, src: Region, dst: Region) -> None:
    """Read all of `dst` and resolve its faults by moving `unit` bytes each from `src`."""
    src.madvise(mmap.MADV_DONTFORK)
    for index in range(pages):
        src.fill(index % 255 + 1, index * ctx.page, ctx.page)
    ctx.register(dst, RegisterMode.MISSING)
    moved = []

    def resolve(event: Event) -> None:
        assert isinstance(event, Pagefault)
        at = event.address - event.address % unit
        moved.append(
            ctx.uffd.move(at, src.start + at - dst.start, unit, mode=MoveMode.ALLOW_SRC_HOLES)
        )

    monitor = ctx.monitor(resolve)
    for index in range(pages):
        seen = ctx.start(dst.read, index * ctx.page, ctx.page).result()
        ctx.expect(f"page {index} of the destination", seen, content(ctx, index))
        seen = src.read(index * ctx.page, ctx.page)
        ctx.expect(f"page {index} of the source", seen, bytes(ctx.page))
    monitor.stop()
    ctx.expect("bytes moved by each fault", moved, [unit] * (pages * ctx.page // unit))
    ctx.expect("flags of the messages", {int(fault.flags) for fault in monitor.faults}, {0})


@case("kselftest.move", origin="uffd-unit-tests: move", memory=ANON, features=Feature.MOVE)
def move(ctx: Context) -> None:
    """MOVE resolves missing faults; the source page becomes a hole that reads as zeros."""
    src, dst = ctx.make(16), ctx.make(16)
    src.advise_thp(False)
    _move(ctx, ctx.page, 16, src, dst)


@case(
    "kselftest.move-pmd",
    origin="uffd-unit-tests: move-pmd",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def move_pmd(ctx: Context) -> None:
    """MOVE moves a transparent huge page whole: one fault for each 2 MiB."""
    src, dst = (ctx.make(HUGE_PAGE // SMALL_PAGE) for _ in range(2))
    src.advise_thp()
    dst.advise_thp()
    _move(ctx, HUGE_PAGE, HUGE_PAGE // SMALL_PAGE, src, dst)


@case(
    "kselftest.move-pmd-split",
    origin="uffd-unit-tests: move-pmd-split",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_thp()],
)
def move_pmd_split(ctx: Context) -> None:
    """MOVE of a huge page to a range with MADV_NOHUGEPAGE splits it and moves all of it."""
    src, dst = (ctx.make(HUGE_PAGE // SMALL_PAGE) for _ in range(2))
    src.advise_thp()
    dst.advise_thp(False)
    _move(ctx, HUGE_PAGE, HUGE_PAGE // SMALL_PAGE, src, dst)


@case(
    "kselftest.wp-unpopulated",
    origin="uffd-unit-tests: wp-unpopulated",
    memory=ANON,
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED,
)
def wp_unpopulated(ctx: Context) -> None:
    """A hole can be protected; MADV_DONTNEED removes the protection, and a read keeps it."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.WP)
    start = region.start
    ctx.uffd.writeprotect(region)
    ctx.expect("uffd-wp bit of a protected hole", ctx.is_protected(start), True)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect("uffd-wp bit after unprotecting", ctx.is_protected(start), False)
    ctx.uffd.writeprotect(region)
    region.madvise(mmap.MADV_DONTNEED)
    ctx.expect("uffd-wp bit after MADV_DONTNEED", ctx.is_protected(start), False)
    ctx.silently(ctx.write, start, b"\1")
    ctx.expect("uffd-wp bit after a write", ctx.is_protected(start), False)
    region.madvise(mmap.MADV_DONTNEED)
    ctx.uffd.writeprotect(region)
    ctx.expect("byte read through a marker", ctx.silently(ctx.read, start), b"\0")
    ctx.expect("uffd-wp bit after a read", ctx.is_protected(start), True)
    region.madvise(mmap.MADV_DONTNEED)
    ctx.expect("uffd-wp bit at the end", ctx.is_protected(start), False)


def _cache_view(ctx: Context, region: Region) -> Region:
    """Map the file behind a region once more, shared and unregistered."""
    assert region.fd is not None
    return ctx.enter(Region.file(region.fd, region.length))


def _minor(ctx: Context, pages: int, mode: ContinueMode, extra: RegisterMode) -> Region:
    """Fill the page cache, then read all pages; each minor fault inverts the page and maps it."""
    region = ctx.make(pages)
    view = _cache_view(ctx, region)
    ctx.register(region, RegisterMode.MINOR | extra)
    for index in range(pages):
        view.fill(index % 255, index * ctx.page, ctx.page)
    ctx.expect_quiet()

    def resolve(event: Event) -> None:
        assert isinstance(event, Pagefault)
        index = (event.address - region.start) // ctx.page
        view.fill(~(index % 255) & 0xFF, index * ctx.page, ctx.page)
        ctx.uffd.continue_(event.address, ctx.page, mode=mode)
        again = ctx.ioctl("CONTINUE", event.address, ctx.page, mode)
        wanted = (errno.EEXIST, -errno.EEXIST)
        ctx.expect("errno and .mapped of a second CONTINUE", (again.errno, again.result), wanted)

    monitor = ctx.monitor(resolve)
    for index in range(pages):
        seen = ctx.start(region.read, index * ctx.page, ctx.page).result()
        ctx.expect(f"page {index}", seen, bytes([~(index % 255) & 0xFF]) * ctx.page)
    monitor.stop()
    flags = [int(fault.flags) for fault in monitor.faults]
    ctx.expect("flags of the messages", flags, [MINOR_READ] * pages)
    return region


@case("kselftest.minor", origin="uffd-unit-tests: minor", memory=FILE, features=minor_features)
def minor(ctx: Context) -> None:
    """A page in the page cache sends a minor fault; CONTINUE maps it; a second call is EEXIST."""
    _minor(ctx, 4, ContinueMode(0), RegisterMode(0))


def _minor_wp(memory: MemoryType) -> Feature:
    # CONTINUE_MODE_WP has no feature bit, but every kernel with WP_UNPOPULATED has it.
    return minor_features(memory) | wp_features(memory) | Feature.WP_UNPOPULATED


@case("kselftest.minor-wp", origin="uffd-unit-tests: minor-wp", memory=FILE, features=_minor_wp)
def minor_wp(ctx: Context) -> None:
    """CONTINUE with MODE_WP maps the page write-protected; only a write sends message 3."""
    region = _minor(ctx, 4, ContinueMode.WP, RegisterMode.WP)
    ctx.expect("uffd-wp bit after CONTINUE with MODE_WP", ctx.is_protected(region.start), True)
    access = ctx.start(ctx.write, region.start, b"\7")
    ctx.expect_fault(WP_WRITE, region.start)
    ctx.uffd.writeprotect(region.start, ctx.page, mode=UNPROTECT)
    ctx.expect("the write", access.result(), None)


@case(
    "kselftest.minor-collapse",
    origin="uffd-unit-tests: minor-collapse",
    memory=("shmem",),
    features=Feature.MINOR_SHMEM,
    needs=[needs_thp()],
)
def minor_collapse(ctx: Context) -> None:
    """MADV_COLLAPSE works in a range registered in mode MINOR and keeps the content."""
    pages = HUGE_PAGE // SMALL_PAGE
    region = _minor(ctx, pages, ContinueMode(0), RegisterMode(0))
    try:
        region.madvise(MADV_COLLAPSE)
    except OSError as error:
        ctx.lack("collapse", f"MADV_COLLAPSE: {error.strerror}")
    ctx.expect("bytes mapped by huge pages", mapped_huge(region.start), HUGE_PAGE)
    seen = ctx.silently(region.read)
    wanted = b"".join(bytes([~(index % 255) & 0xFF]) * ctx.page for index in range(pages))
    ctx.expect("whether the content is kept", seen == wanted, True)


def _sigbus(ctx: Context, *, wp: bool) -> None:
    pages = 4
    half = pages // 2
    region = ctx.make(pages)
    ctx.register(region, RegisterMode.MISSING | (RegisterMode.WP if wp else RegisterMode(0)))
    mode = CopyMode.WP if wp else CopyMode(0)
    for index in range(half):
        at = region.start + index * ctx.page
        _expect_sigbus(ctx, f"read of missing page {index}", ctx.read(at))
        ctx.uffd.copy(at, content(ctx, index), mode=mode)
        ctx.expect(f"page {index} after COPY", ctx.read(at), content(ctx, index)[:1])
        if wp:
            _expect_sigbus(ctx, f"write of protected page {index}", ctx.write(at, b"\xee"))
            ctx.uffd.writeprotect(at, ctx.page, mode=UNPROTECT)
        ctx.expect(f"write of page {index}", ctx.write(at, b"\xee"), None)
    ctx.expect_quiet()
    release(region)
    monitor = ctx.monitor(lambda _: None)
    child = ctx.fork_only()
    for index in range(half):
        at = region.start + index * ctx.page
        _expect_sigbus(ctx, f"read of page {index} in the child", child.read(at, 1))
    child.close()
    monitor.stop()
    ctx.callback(_close_forks, monitor)
    ctx.expect("page faults among the messages", monitor.faults, [])
    ctx.expect("Fork events", len(monitor.events), 1)


def _close_forks(monitor: Monitor) -> None:
    for event in monitor.events:
        event.uffd.close()  # type: ignore[union-attr]


def _expect_sigbus(ctx: Context, what: str, seen: object) -> None:
    if not isinstance(seen, Interrupted) or seen.number != signal.SIGBUS:
        ctx.fail(what, seen, "SIGBUS")
    ctx.note(f"{what}: SIGBUS")


@case(
    "kselftest.sigbus",
    origin="uffd-unit-tests: sigbus",
    features=lambda memory: missing_features(memory) | Feature.SIGBUS | Feature.EVENT_FORK,
)
def sigbus(ctx: Context) -> None:
    """With SIGBUS, an access to a missing page, also by a child, gets SIGBUS, no message."""
    _sigbus(ctx, wp=False)


@case(
    "kselftest.sigbus-wp",
    origin="uffd-unit-tests: sigbus-wp",
    features=lambda memory: missing_wp_features(memory) | Feature.SIGBUS | Feature.EVENT_FORK,
)
def sigbus_wp(ctx: Context) -> None:
    """With SIGBUS, a write to a protected page gets SIGBUS until the page is unprotected."""
    _sigbus(ctx, wp=True)


@case(
    "kselftest.poison",
    origin="uffd-unit-tests: poison",
    features=poison_features,
)
def poison(ctx: Context) -> None:
    """POISON resolves faults with SIGBUS; COPY resolves those of other pages as usual."""
    pages = 4
    region = ctx.make(pages)
    ioctls = ctx.register(region, RegisterMode.MISSING)
    wanted = Ioctl.COPY | Ioctl.POISON
    ctx.expect("COPY and POISON among the ioctls of REGISTER", ioctls & wanted, wanted)
    poisoned: list[int] = []

    def resolve(event: Event) -> None:
        assert isinstance(event, Pagefault)
        if (event.address - region.start) // ctx.page % 2:
            ctx.uffd.copy(event.address, bytes(ctx.page))
        else:
            answer = ctx.ioctl("POISON", event.address, ctx.page, PoisonMode(0))
            poisoned.append(answer.result)

    monitor = ctx.monitor(resolve)
    for index in range(pages):
        seen = ctx.start(ctx.read, region.start + index * ctx.page, ctx.page).result()
        if index % 2:
            ctx.expect(f"page {index}", seen, bytes(ctx.page))
        else:
            _expect_sigbus(ctx, f"page {index}", seen)
    monitor.stop()
    ctx.expect(".updated of each POISON", poisoned, [ctx.page] * (pages // 2))


def _changing(memory: MemoryType) -> Feature:
    minor = Feature(0) if memory.is_anon else minor_features(memory)
    return (
        missing_features(memory)
        | minor
        | Feature.EVENT_REMOVE
        | Feature.POISON
        | Feature.MOVE
        | wp_features(memory)
    )


@case(
    "kselftest.mmap-changing",
    origin="uffd-unit-tests: mmap-changing (7.3)",
    features=_changing,
    variants=[
        Variant("reported", "every result field is -EAGAIN"),
        Variant("untouched", "result fields are not written"),
    ],
)
def mmap_changing(ctx: Context) -> None:
    """While a Remove event is unread, each ioctl that fills is EAGAIN and fills nothing."""
    region = ctx.make(2)
    mode = RegisterMode.MISSING | RegisterMode.WP
    if not ctx.memory.is_anon:
        mode |= RegisterMode.MINOR
    ctx.register(region, mode)
    ctx.uffd.copy(region.start, content(ctx, 0))
    advice = mmap.MADV_REMOVE if ctx.memory.shared else mmap.MADV_DONTNEED
    waiting = ctx.start(region.madvise, advice, 0, ctx.page)
    # The kernel refuses the ioctls before it queues the event.
    ctx.wait_readable()
    start = region.start
    source = ctx.make(1, "anon").start
    calls = {
        "ZEROPAGE": (start, ctx.page, 0, 1),
        "COPY": (start, source, ctx.page, 0, 1),
        "MOVE": (start, source, ctx.page, 0, 1),
        "POISON": (start, ctx.page, 0, 1),
        "CONTINUE": (start, ctx.page, 0, 1),
    }
    if ctx.memory.is_anon:
        del calls["CONTINUE"]
    fields = {}
    for name, words in calls.items():
        answer = ctx.ioctl(name, *words)
        ctx.expect(f"errno of {name}", answer.errno, errno.EAGAIN)
        fields[name] = answer.result
    answer = ctx.ioctl("WRITEPROTECT", start, ctx.page, 1)
    ctx.expect("errno of WRITEPROTECT", answer.errno, errno.EAGAIN)
    ctx.expect("whether madvise returned before its event was read", waiting.done, False)
    ctx.expect_variant(
        "result fields",
        fields,
        reported=dict.fromkeys(calls, -errno.EAGAIN),
        untouched=dict.fromkeys(calls, 1),
    )
    ctx.uffd.read_events(1)
    waiting.result()
    ctx.expect_pagemap(start, "-----")


@case(
    "kselftest.wp-close",
    origin="uffd-unit-tests, common clear-up; pyuffd: what it relies on",
    features=wp_features,
)
def wp_close(ctx: Context) -> None:
    """Closing the userfaultfd removes the protection of all pages and wakes a waiting writer."""
    region = ctx.make(2)
    ctx.register(region, RegisterMode.WP)
    region.fill(1)
    ctx.uffd.writeprotect(region)
    access = ctx.start(ctx.write, region.start, b"\2")
    ctx.expect_fault(WP_WRITE, region.start)
    ctx.uffd.close()
    ctx.expect("the write", access.result(), None)
    ctx.expect("uffd-wp bit of the other page", ctx.is_protected(region.start + ctx.page), False)


def _wp_pagemap(ctx: Context, *, huge: bool) -> None:
    region = ctx.make(HUGE_PAGE // SMALL_PAGE)
    region.advise_thp(huge)
    region.fill(1)
    if huge and mapped_huge(region.start) != HUGE_PAGE:
        ctx.lack("THP", "the kernel gave no transparent huge page")
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    ctx.expect_pagemap(region.start, "P--WX")
    child = ctx.fork()
    ctx.expect_pagemap(region.start, "P---?", pid=child.pid)
    ctx.expect_pagemap(region.start, "P--W-")
    child.close()
    page_out(ctx, region)
    ctx.expect_pagemap(region.start, "-S-W-")
    # In the case of a huge page, this page is a part of it, in swap.
    ctx.uffd.writeprotect(region.start, ctx.page, mode=UNPROTECT)
    ctx.expect_pagemap(region.start, "-S---")
    ctx.expect("the write", ctx.silently(ctx.write, region.start, b"\2"), None)
    ctx.expect("the rest of the page", region.read(1, ctx.page - 1), b"\1" * (ctx.page - 1))
    ctx.expect_pagemap(region.start, "P---X")
    ctx.expect("uffd-wp bit of the next page", ctx.is_protected(region.start + ctx.page), True)


@case(
    "kselftest.wp-pagemap",
    origin="userfaultfd.c (Linux 6.1): uffd-wp with pagemap, 4 KiB",
    memory=ANON,
    features=wp_features,
    needs=[needs_swap()],
)
def wp_pagemap(ctx: Context) -> None:
    """Pagemap shows protection and exclusive mapping of each page, through fork and swap."""
    _wp_pagemap(ctx, huge=False)


@case(
    "kselftest.wp-pagemap-thp",
    origin="userfaultfd.c (Linux 6.1): uffd-wp with pagemap, 2 MiB",
    memory=ANON,
    features=wp_features,
    needs=[needs_swap(), needs_thp()],
)
def wp_pagemap_thp(ctx: Context) -> None:
    """Pagemap shows the protection of a huge page that is swapped out and unprotected in part."""
    _wp_pagemap(ctx, huge=True)


@case(
    "kselftest.mkdirty-copy",
    origin="mkdirty: UFFDIO_COPY",
    memory=ANON,
)
def mkdirty_copy(ctx: Context) -> None:
    """COPY fills a page of a PROT_READ mapping, but a write of user code is still SIGSEGV."""
    region = ctx.make(1)
    _memory.mprotect(region.start, ctx.page, mmap.PROT_READ)
    ctx.register(region, RegisterMode.MISSING)
    ctx.uffd.copy(region.start, content(ctx, 3))
    seen = ctx.write(region.start, b"\xee")
    if not isinstance(seen, Interrupted) or seen.number != signal.SIGSEGV:
        ctx.fail("a write", seen, "SIGSEGV")
    ctx.expect("content", region.read(), content(ctx, 3))
