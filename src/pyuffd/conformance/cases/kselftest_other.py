"""uffd-wp-mremap, and the parts of other selftests that use userfaultfd (layer L5)."""

from __future__ import annotations

import errno
import mmap
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd._memory import Interrupted
from pyuffd.conformance import _ksm, _thp
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import ANON, ANY, HUGETLB, missing_features, wp_features
from pyuffd.conformance._wp import move_mapping, page_out
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import needs_hugetlb_mremap, needs_privilege, needs_swap, needs_thp

MADV_GUARD_INSTALL = 102
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MAP_NORESERVE, MAP_FIXED = 0x4000, 0x10
PROT_NONE = 0
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
GIB = 1 << 30
PFN_MASK = (1 << 55) - 1
FOLIO_TRIES = 16  # memory may be fragmented at first

# uffd-wp-mremap: mremap drops the bits unless EVENT_REMAP is enabled.


def _wp_mremap(ctx: Context, region: Region, *, swapped: bool) -> None:
    pages = range(region.start, region.start + region.length, SMALL_PAGE)
    ctx.open(Feature(0))
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    if swapped:
        page_out(ctx, region)
    unprotected = [hex(page) for page in pages if not ctx.is_protected(page)]
    ctx.expect("pages without the uffd-wp bit before mremap", unprotected, [])
    target = ctx.enter(_reserved(region.length, max(region.length, ctx.page)))
    move_mapping(ctx, region, target)
    moved = range(target, target + region.length, SMALL_PAGE)
    protected = [hex(page) for page in moved if ctx.is_protected(page)]
    ctx.expect("pages with the uffd-wp bit after mremap", protected, [])
    ctx.expect("content", ctx.silently(ctx.read, target, region.length), b"\1" * region.length)


@contextmanager
def _reserved(length: int, alignment: int) -> Iterator[int]:
    """Reserve aligned address space to map something into."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    start = _memory.mmap(length + alignment, PROT_NONE, flags)
    try:
        yield -(-start // alignment) * alignment
    finally:
        _memory.munmap(start, length + alignment)


def _folio(ctx: Context, size: int) -> Region:
    """Make memory that is one folio of this size."""
    if size == ctx.page:
        region = ctx.make(1)
        region.fill(1)
        return region
    with _thp.switched_on(size, shared=not ctx.memory.is_anon):
        for _ in range(FOLIO_TRIES):
            region = _aligned(ctx, size)
            region.advise_thp()
            region.fill(1)
            if _thp.folio_bytes(region.start) == size:
                return region
    ctx.lack(f"thp-{size >> 10}kB", f"the kernel gave no folio of {size >> 10} KiB")


def _aligned(ctx: Context, size: int) -> Region:
    """Map memory at a multiple of its size, so that one folio fits and no larger one."""
    start = ctx.enter(_reserved(size, size))
    sharing = mmap.MAP_SHARED if ctx.memory.shared else mmap.MAP_PRIVATE
    flags = sharing | mmap.MAP_ANONYMOUS | MAP_FIXED
    _memory.mmap(size, READ_WRITE, flags, address=start)
    return ctx.enter(Region.at(start, size, SMALL_PAGE))


def _add_wp_mremap(size: int, *, swapped: bool) -> None:
    text = f"{size >> 10}k"
    kind = "hugetlb" if size == HUGE_PAGE and not swapped else "small"

    @case(
        f"kselftest.wp-mremap{'-swapped' if swapped else ''}.{text}",
        summary=f"mremap without EVENT_REMAP drops the bits of a {text} folio"
        + (" that was swapped out" if swapped else ""),
        origin=f"uffd-wp-mremap: {text} folio{', swapped' if swapped else ''} ({kind})",
        memory=("anon", "shmem") if size != SMALL_PAGE else ("anon", "shmem", "shmem-private"),
        features=wp_features,
        needs=[
            *([needs_swap()] if swapped else []),
            *([needs_thp(), needs_privilege("CAP_SYS_ADMIN")] if size != SMALL_PAGE else []),
        ],
    )
    def run(ctx: Context) -> None:
        if size != SMALL_PAGE and size not in _thp.sizes():
            ctx.lack(f"thp-{size >> 10}kB", f"this kernel has no folios of {size >> 10} KiB")
        _wp_mremap(ctx, _folio(ctx, size), swapped=swapped)


for _swapped in (False, True):
    _add_wp_mremap(SMALL_PAGE, swapped=_swapped)
    for _order in range(2, 10):
        _add_wp_mremap(SMALL_PAGE << _order, swapped=_swapped)


@case(
    "kselftest.wp-mremap.hugetlb-page",
    origin="uffd-wp-mremap: hugetlb",
    memory=HUGETLB,
    features=wp_features,
)
def wp_mremap_hugetlb(ctx: Context) -> None:
    """mremap(2) without EVENT_REMAP drops the bit of a hugetlb page."""
    region = ctx.make(1)
    region.fill(1)
    _wp_mremap(ctx, region, swapped=False)


def _expect_signal(ctx: Context, what: str, seen: object, number: int) -> None:
    if not isinstance(seen, Interrupted) or seen.number != number:
        ctx.fail(what, seen, signal.Signals(number).name)


@case(
    "kselftest.guard-regions",
    origin="guard-regions: uffd",
    memory=("anon", "shmem", "shmem-private"),
    features=missing_features,
)
def guard_regions(ctx: Context) -> None:
    """An access to a guard page in a missing range gets SIGSEGV, no message; UNREGISTER works."""
    region = ctx.make(10)
    ctx.register(region, RegisterMode.MISSING)
    try:
        region.madvise(MADV_GUARD_INSTALL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        ctx.lack("guard-regions", f"MADV_GUARD_INSTALL on {ctx.memory.name} is EINVAL")
    for index in range(10):
        at = region.start + index * ctx.page
        _expect_signal(ctx, f"read of page {index}", ctx.silently(ctx.read, at), signal.SIGSEGV)
        _expect_signal(
            ctx, f"write of page {index}", ctx.silently(ctx.write, at, b"\1"), signal.SIGSEGV
        )
    ctx.uffd.unregister(region)


@case(
    "kselftest.hugetlb-mremap",
    origin="hugetlb-mremap",
    memory=("hugetlb",),
    features=missing_features,
    needs=[needs_hugetlb_mremap()],
)
def hugetlb_mremap(ctx: Context) -> None:
    """mremap(2) of a registered hugetlb mapping at a multiple of 1 GiB keeps its content."""
    region = ctx.make(4)
    assert region.fd is not None
    for index in range(4):
        region.fill(index + 1, index * ctx.page, ctx.page)
    first = ctx.enter(_reserved(3 * GIB, GIB))
    for at in (first, first + GIB):
        _memory.mmap(region.length, READ_WRITE, mmap.MAP_SHARED | MAP_FIXED, region.fd, 0, at)
    ctx.silently(ctx.read, first + GIB)
    ctx.open()
    ctx.uffd.register(first, region.length)
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    target = first + 2 * GIB
    moved = _memory.mremap(first, region.length, region.length, flags, target)
    ctx.expect("address", moved, target)
    for index in range(4):
        seen = ctx.silently(ctx.read, target + index * ctx.page, 4)
        ctx.expect(f"page {index}", seen, bytes([index + 1]) * 4)


# Three mappings of one page each, with a gap of one page after each, for one mremap over all.
_SPREAD = (0, 2, 4)


def _spread(ctx: Context, registered: tuple[int, ...]) -> tuple[int, int, int]:
    """Make the mappings, register some, and mremap all at once; return errno, source, target."""
    size = SMALL_PAGE
    base = ctx.enter(_reserved(6 * size, size))
    target = ctx.enter(_reserved(6 * size, size))
    for page in range(6):
        at = base + page * size
        if page in _SPREAD:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
            _memory.mmap(size, READ_WRITE, flags, address=at)
            _memory.write(at, b"\1")
        else:
            _memory.munmap(at, size)
    for page in registered:
        ctx.uffd.register(base + page * size, size)
    code = 0
    try:
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        _memory.mremap(base, 5 * size, 5 * size, flags, target)
    except OSError as error:
        code = error.errno or 0
    return code, base, target


def _still_there(ctx: Context, base: int) -> list[int]:
    """Return which of the mappings have not moved."""
    return [page for page in _SPREAD if ctx.read(base + page * SMALL_PAGE) == b"\1"]


@case("kselftest.mremap-all-registered", origin="mremap_test: multiple invalid vmas", memory=ANY)
def mremap_all_registered(ctx: Context) -> None:
    """One mremap of several registered mappings is EFAULT and moves none of them."""
    ctx.open()
    code, base, _ = _spread(ctx, _SPREAD)
    ctx.expect("errno of mremap", code, errno.EFAULT)
    ctx.expect("mappings that have not moved", _still_there(ctx, base), list(_SPREAD))


@case("kselftest.mremap-one-registered", origin="mremap_test: multiple invalid vmas", memory=ANY)
def mremap_one_registered(ctx: Context) -> None:
    """One mremap of a single registered mapping moves it."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    ctx.uffd.copy(region.start, b"\7" * ctx.page)
    target = ctx.enter(_reserved(ctx.page, ctx.page))
    move_mapping(ctx, region, target)
    ctx.expect("content", ctx.silently(ctx.read, target), b"\7")


@case(
    "kselftest.mremap-second-registered",
    origin="mremap_test: multiple invalid vmas",
    memory=ANY,
    variants=[
        Variant(
            "moves-many",
            "mremap accepts several mappings, and moves those before the registered one",
        ),
        Variant("moves-one", "mremap accepts only a single mapping, and moves none"),
    ],
)
def mremap_second_registered(ctx: Context) -> None:
    """One mremap of several mappings, the second registered, is EFAULT and does not move that."""
    ctx.open()
    code, base, _ = _spread(ctx, _SPREAD[1:2])
    ctx.expect("errno of mremap", code, errno.EFAULT)
    seen = _still_there(ctx, base)
    ctx.expect_variant("mappings that have not moved", seen, moves_many=[2, 4], moves_one=[0, 2, 4])


@case(
    "kselftest.ksm-unmerge-wp",
    origin="ksm_functional_tests: test_unmerge_uffd_wp",
    memory=ANON,
    features=Feature.PAGEFAULT_FLAG_WP,
    needs=[needs_privilege("CAP_SYS_ADMIN")],
    variants=[
        Variant("now", "as described"),
        Variant(
            "old",
            "the pages stay merged; known by the lack of WP_UNPOPULATED",
            lacks=Feature.WP_UNPOPULATED,
        ),
    ],
    alone=True,
)
def ksm_unmerge_wp(ctx: Context) -> None:
    """MADV_UNMERGEABLE unmerges write-protected pages: each has a frame of its own again."""
    _ksm.require(ctx)
    region = ctx.make(8)
    region.advise_thp(False)
    region.fill(0xCF)
    with _ksm.running():
        region.madvise(_ksm.MERGEABLE)
        _ksm.wait_until_merged(ctx, region)
        ctx.register(region, RegisterMode.WP)
        ctx.uffd.writeprotect(region)
        ctx.silently(region.madvise, _ksm.UNMERGEABLE)
    ctx.expect_variant("number of different frames", len(set(_ksm.frames(region))), now=8, old=1)
    ctx.expect("content", region.read(), b"\xcf" * region.length)
