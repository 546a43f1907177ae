"""Which changes WP_ASYNC reports and which it does not: what trackers of writes depend on (L5).

Each case of `wp-async.*` changes the content of a tracked page in one way, and checks whether
PAGEMAP_SCAN reports it. A change that is not reported is no kernel bug, but a tracker has to know
of it. `pagemap-scan.*` has kernel bugs that can be seen without a race.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

from pyuffd import _memory
from pyuffd._abi import ContinueMode, CopyMode, PageCategory, RegisterMode, ScanFlag
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import Pin, needs_pin, syscall
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._thp import MADV_COLLAPSE
from pyuffd.conformance._types import (
    ALL,
    ANON,
    FILE,
    SHARED,
    SMALL,
    minor_features,
    missing_features,
)
from pyuffd.conformance._wp import (
    PUNCH_HOLE,
    expect_fault,
    in_page_cache,
    move_mapping,
    page_out,
    reserve,
)
from pyuffd.conformance.cases.kernel_access import (
    BLOCK,
    direct_pread,
    proc_mem,
    process_vm_writev,
)
from pyuffd.conformance.cases.pagemap_scan import FEATURES, WP_SCAN, WRITTEN, end_of, scan
from pyuffd.conformance.cases.pagemap_scan_memory import Area
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import needs_swap

PAGES = 4
PROTECTED = 2  # MODE_WP of COPY and CONTINUE
LOCKED = ("anon", "shmem-private")
MADV_FREE = 8
SYS_READ, SYS_MADVISE, SYS_MLOCK = 0, 28, 149
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
ORIGIN = "what trackers of writes depend on"
NONE: list[tuple[int, int]] = []
SECOND = [(1, 1)]  # of the pages: first, count


def tracked(ctx: Context, pages: int = PAGES) -> tuple[Region, Area]:
    """Make memory of the case's type, write all of it, and track it."""
    region = ctx.make(pages)
    region.fill(7)
    return region, Area(ctx, region.start, pages, region.page_size)


def second(region: Region) -> int:
    """Return the address of the second page."""
    return region.start + region.page_size


def expect_byte(ctx: Context, region: Region, value: int) -> None:
    """Check the first byte of the second page."""
    ctx.expect("first byte of the second page", region.read(region.page_size, 1)[0], value)


# Changes that are reported, and changes that are not


@case("wp-async.write.reported", origin=ORIGIN, features=FEATURES)
def write(ctx: Context) -> None:
    """A write is reported until the page is protected again."""
    _, area = tracked(ctx)
    area.expect("ranges before the write")
    area.write(1, 1)
    area.expect("ranges after a write", *SECOND)
    area.protect()
    area.expect("ranges after protecting again")


@case("wp-async.read-into.reported", origin=ORIGIN, features=FEATURES)
def read_into(ctx: Context) -> None:
    """A page that read(2) writes to is reported."""
    region, area = tracked(ctx)
    zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    ctx.callback(os.close, zero)
    ctx.silently(syscall, SYS_READ, zero, second(region), 16)
    area.expect("ranges after read(2)", *SECOND)


@case("wp-async.direct-read-into.reported", origin=ORIGIN, features=FEATURES)
def direct_read_into(ctx: Context) -> None:
    """A page that pread(2) writes to with O_DIRECT, which pins it, is reported."""
    region, area = tracked(ctx)
    ctx.expect("pread", ctx.silently(direct_pread(ctx, second(region))), BLOCK)
    area.expect("ranges after pread(2)", *SECOND)


@case("wp-async.process_vm_writev.reported", origin=ORIGIN, features=FEATURES)
def written_by_another(ctx: Context) -> None:
    """A page that another process writes with process_vm_writev(2) is reported."""
    region, area = tracked(ctx)
    ctx.expect("process_vm_writev", ctx.silently(process_vm_writev(ctx, second(region))), 1)
    area.expect("ranges after process_vm_writev(2)", *SECOND)


@case("wp-async.proc-mem.reported", origin=ORIGIN, features=FEATURES)
def written_by_a_debugger(ctx: Context) -> None:
    """A page that is written through /proc/PID/mem is reported."""
    region, area = tracked(ctx)
    ctx.expect("pwrite", ctx.silently(proc_mem(ctx, second(region))), 1)
    area.expect("ranges after a write to /proc/PID/mem", *SECOND)


def _add_filled(name: str, mode: RegisterMode, memory: tuple[str, ...]) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(PAGES)
        if mode is RegisterMode.MINOR:
            in_page_cache(region, 7)
        ctx.register(region, mode | RegisterMode.WP)
        ctx.uffd.writeprotect(region)
        pages = [region.start + index * ctx.page for index in range(PAGES)]

        def fill(index: int, how: int) -> None:
            if mode is RegisterMode.MINOR:
                ctx.uffd.continue_(pages[index], ctx.page, mode=ContinueMode(how))
            else:
                ctx.uffd.copy(pages[index], b"\7" * ctx.page, mode=CopyMode(how))

        writing = ctx.start(ctx.write, pages[0], b"\x09")
        expect_fault(ctx, writing, 1 | mode & RegisterMode.MINOR, pages[0])
        fill(0, PROTECTED)
        ctx.expect("the write", writing.result(), None)
        fill(1, PROTECTED)
        fill(2, 0)
        ctx.expect_quiet()
        found = scan(ctx, region.start, end_of(region)).ranges
        seen = [(first - region.start, end - region.start) for first, end, _ in found]
        ctx.expect("ranges written", seen, [(0, ctx.page), (2 * ctx.page, 3 * ctx.page)])

    case(
        f"wp-async.{name.lower()}.reported",
        summary=f"A page that {name} fills is reported; with MODE_WP, only after a write to it",
        origin=ORIGIN,
        memory=memory,
        features=lambda kind: (
            FEATURES | (minor_features(kind) if name == "CONTINUE" else missing_features(kind))
        ),
    )(run)


_add_filled("COPY", RegisterMode.MISSING, ALL)
_add_filled("CONTINUE", RegisterMode.MINOR, FILE)


@case("wp-async.dontneed.reported", origin=ORIGIN, memory=ANON, features=FEATURES)
def dontneed_of_zeros(ctx: Context) -> None:
    """MADV_DONTNEED of anonymous memory is reported; the page reads as zeros."""
    region, area = tracked(ctx)
    region.madvise(mmap.MADV_DONTNEED, region.page_size, region.page_size)
    area.expect("ranges after MADV_DONTNEED", *SECOND)
    expect_byte(ctx, region, 0)


@case("wp-async.dontneed.hidden", origin=ORIGIN, memory=FILE, features=FEATURES)
def dontneed_of_a_file(ctx: Context) -> None:
    """MADV_DONTNEED of file memory is not reported, although it drops a private copy."""
    region, area = tracked(ctx)
    region.madvise(mmap.MADV_DONTNEED, region.page_size, region.page_size)
    area.expect("ranges after MADV_DONTNEED")
    expect_byte(ctx, region, 7 if region.shared else 0)


@case("wp-async.punch-hole.hidden", origin=ORIGIN, memory=SHARED, features=FEATURES)
def punch_hole(ctx: Context) -> None:
    """A hole punched in the file is not reported; the page reads as zeros."""
    region, area = tracked(ctx)
    assert region.fd is not None
    _memory.fallocate(region.fd, PUNCH_HOLE, region.page_size, region.page_size)
    area.expect("ranges after PUNCH_HOLE")
    expect_byte(ctx, region, 0)


@case("wp-async.truncate.hidden", origin=ORIGIN, memory=("shmem",), features=FEATURES)
def truncate(ctx: Context) -> None:
    """Truncating the file and growing it again is not reported; the page reads as zeros."""
    region, area = tracked(ctx)
    assert region.fd is not None
    os.ftruncate(region.fd, region.page_size)
    os.ftruncate(region.fd, region.length)
    area.expect("ranges after ftruncate(2)")
    expect_byte(ctx, region, 0)


@case("wp-async.pwrite.hidden", origin=ORIGIN, memory=("shmem",), features=FEATURES)
def pwrite(ctx: Context) -> None:
    """A write through the file descriptor is not reported."""
    region, area = tracked(ctx)
    assert region.fd is not None
    os.pwrite(region.fd, b"\x09", region.page_size)
    area.expect("ranges after pwrite(2)")
    expect_byte(ctx, region, 9)


@case("wp-async.alias.hidden", origin=ORIGIN, memory=SHARED, features=FEATURES)
def alias(ctx: Context) -> None:
    """A write through another mapping is not reported."""
    region, area = tracked(ctx)
    ctx.alias(region).write(region.page_size, b"\x09")
    area.expect("ranges after a write through the other mapping")
    expect_byte(ctx, region, 9)


@case("wp-async.madv-free.hidden", origin=ORIGIN, memory=ANON, features=FEATURES)
def madv_free(ctx: Context) -> None:
    """MADV_FREE alone is not reported: the page keeps its content until it is reclaimed."""
    region, area = tracked(ctx)
    region.madvise(MADV_FREE, region.page_size, region.page_size)
    area.expect("ranges after MADV_FREE")
    area.write(1, 1)
    area.expect("ranges after a write", *SECOND)


@case(
    "wp-async.mlock.false-reports",
    origin=ORIGIN,
    memory=("anon", "shmem-private"),
    features=FEATURES,
)
def mlock(ctx: Context) -> None:
    """After mlock(2) of private memory, pages are reported although nobody wrote them."""
    region, area = tracked(ctx)
    ctx.expect("mlock", syscall(SYS_MLOCK, second(region), region.page_size), 0)
    area.expect("ranges after mlock(2)", *SECOND)
    expect_byte(ctx, region, 7)


@case("wp-async.mprotect.silent", origin=ORIGIN, features=FEATURES)
def mprotect(ctx: Context) -> None:
    """mprotect(2) to PROT_NONE and back is not reported; the next write is."""
    region, area = tracked(ctx)
    for prot in (0, mmap.PROT_READ, READ_WRITE):
        _memory.mprotect(region.start, region.length, prot)
    area.expect("ranges after mprotect(2)")
    area.write(1, 1)
    area.expect("ranges after a write", *SECOND)


@case("wp-async.read-of-a-hole.silent", origin=ORIGIN, features=FEATURES)
def read_of_a_hole(ctx: Context) -> None:
    """A read of a protected hole is not reported; the next write is."""
    region = ctx.make(PAGES)
    area = Area(ctx, region.start, PAGES, region.page_size)
    ctx.silently(_memory.read, second(region), 1)
    area.expect("ranges after a read")
    area.write(1, 1)
    area.expect("ranges after a write", *SECOND)


@case("wp-async.fork.own-pages", origin=ORIGIN, memory=SMALL, features=FEATURES)
def fork(ctx: Context) -> None:
    """A child's write is not reported in the parent; the parent's own write then is."""
    region, area = tracked(ctx)
    child = ctx.fork_only()
    child.write(second(region), b"\x09")
    area.expect("ranges after the child's write")
    expect_byte(ctx, region, 9 if region.shared else 7)
    area.write(1, 1)
    area.expect("ranges after the parent's write", *SECOND)


@case("wp-async.mremap.unregistered", origin=ORIGIN, features=FEATURES)
def mremap(ctx: Context) -> None:
    """mremap(2) unregisters memory; a scan of it with CHECK_WPASYNC is EPERM."""
    region, _ = tracked(ctx)
    target = reserve(ctx, region.length)
    move_mapping(ctx, region, target)
    result = scan(ctx, target, target + region.length, flags=WP_SCAN)
    ctx.expect("errno of the scan", result.errno, errno.EPERM)


@case("wp-async.map-over.unregistered", origin=ORIGIN, memory=SMALL, features=FEATURES)
def map_over(ctx: Context) -> None:
    """A mapping over a tracked page is not registered; a scan with CHECK_WPASYNC is EPERM."""
    region, _ = tracked(ctx)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
    _memory.mmap(region.page_size, READ_WRITE, flags, address=second(region))
    result = scan(ctx, region.start, end_of(region), flags=WP_SCAN)
    ctx.expect("errno of the scan", result.errno, errno.EPERM)


@case("wp-async.pinned.hidden", origin=ORIGIN, memory=SMALL, features=FEATURES, needs=[needs_pin()])
def pinned(ctx: Context) -> None:
    """Pinning a page for writing is reported; once protected again, the pinned page is not."""
    region, area = tracked(ctx)
    pin = Pin(second(region), region.page_size)
    ring = pin.take(syscall)
    ctx.callback(os.close, ring)
    area.expect("ranges after pinning", *SECOND)
    area.protect()
    area.expect("ranges after protecting the pinned page")
    pin.drop(syscall, ring)


@case(
    "wp-async.swap.kept",
    origin=ORIGIN,
    memory=SMALL,
    features=FEATURES,
    needs=[needs_swap()],
)
def swap(ctx: Context) -> None:
    """Swapping pages out and in is not reported; an earlier write still is."""
    region, area = tracked(ctx)
    area.write(2, 1)
    page_out(ctx, region)
    area.expect("ranges after swap-out", (2, 1))
    region.read()
    area.expect("ranges after swap-in", (2, 1))


# Kernel bugs that can be seen without a race

_HOLES = (
    Variant("reported", "dropped pages are reported as written, as they should be"),
    Variant(
        "missed",
        "dropped pages are not reported: before two fixes of July 2026, also in stable kernels",
    ),
)


def dropped(ctx: Context, length: int, drop: Callable[[Region], None]) -> int:
    """Track a region, drop a part of it, and return the bytes that a scan with masks finds."""
    region = Region.anonymous(length)
    ctx.enter(region)
    region.fill(7)
    uffd = ctx.open()
    uffd.register(region, mode=RegisterMode.WP)
    uffd.writeprotect(region)
    drop(region)
    with Pagemap() as pagemap:
        found = pagemap.scan(
            region,
            category_anyof_mask=WRITTEN,
            return_mask=PageCategory.WRITTEN | PageCategory.PRESENT,
        )
    return found.ranges.bytes


@case(
    "pagemap-scan.unpopulated.anyof", origin=ORIGIN, memory=ANON, features=FEATURES, variants=_HOLES
)
def unpopulated(ctx: Context) -> None:
    """A scan with category_anyof_mask reports a dropped page too."""
    found = dropped(
        ctx, 2 * HUGE_PAGE, lambda region: region.madvise(mmap.MADV_DONTNEED, 0, SMALL_PAGE)
    )
    ctx.expect_variant("bytes that the scan reports", found, reported=SMALL_PAGE, missed=0)


@case("pagemap-scan.pmd-hole", origin=ORIGIN, memory=ANON, features=FEATURES, variants=_HOLES)
def pmd_hole(ctx: Context) -> None:
    """A scan reports 2 MiB dropped at once, although their page table may be freed."""

    def drop(region: Region) -> None:
        first = -(-region.start // HUGE_PAGE) * HUGE_PAGE - region.start
        region.madvise(mmap.MADV_DONTNEED, first, HUGE_PAGE)

    found = dropped(ctx, 2 * HUGE_PAGE, drop)
    ctx.expect_variant("bytes that the scan reports", found, reported=HUGE_PAGE, missed=0)


@case("pagemap-scan.hugetlb-hole", origin=ORIGIN, memory=("hugetlb-private",), features=FEATURES)
def hugetlb_hole(ctx: Context) -> None:
    """A scan for WRITTEN does not report a hole of hugetlb memory."""
    region = ctx.make(2)
    uffd = ctx.open()
    uffd.register(region, mode=RegisterMode.WP)
    result = scan(ctx, region.start, end_of(region), flags=ScanFlag(0))
    ctx.expect("ranges of the scan", result.count, 0)


@case("wp-async.collapse.refused", origin=ORIGIN, memory=ANON, features=FEATURES)
def collapse(ctx: Context) -> None:
    """MADV_COLLAPSE refuses protected memory, whose protection would be lost."""
    region = Region.anonymous(2 * HUGE_PAGE)
    ctx.enter(region)
    # With THP always enabled, the memory could be huge already, and the collapse would succeed.
    region.advise_thp(False)
    region.fill(7)
    area = Area(ctx, region.start, 2 * HUGE_PAGE // SMALL_PAGE)
    region.advise_thp()
    first = -(-region.start // HUGE_PAGE) * HUGE_PAGE
    result = syscall(SYS_MADVISE, first, HUGE_PAGE, MADV_COLLAPSE)
    ctx.expect("madvise", result, -errno.EINVAL)
    area.expect("ranges after MADV_COLLAPSE")
