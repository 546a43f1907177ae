"""Errors and effects of UFFDIO_MOVE alone (layer L5).

MOVE works only in the address space of its caller, so there is no case of a process that has ended.
"""

from __future__ import annotations

import errno
import mmap
import os

from pyuffd import _memory
from pyuffd._abi import Feature, MoveMode, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import Pin, needs_pin, syscall
from pyuffd.conformance._types import ANON, FILE, missing_features
from pyuffd.conformance._wp import page_out
from pyuffd.conformance.cases.errno_fill import DATA, MOVE, Target
from pyuffd.regions import Region
from pyuffd.testing._need import needs_swap

SYS_MLOCK, SYS_MUNLOCK, SYS_MLOCK2 = 149, 150, 325
MLOCK_ONFAULT = 1
ORIGIN = "UFFDIO_MOVE(2const): "
# Below any program, and above vm.mmap_min_addr: a lower address is EINVAL.
UNMAPPED = 0x100000


def _refused(ctx: Context, target: Target, code: int, **call: int) -> None:
    """Make the ioctl; it must fail and leave the source in place."""
    target.expect(code, -code, **call)
    ctx.expect("byte of the source", ctx.silently(ctx.read, target.source), DATA)


@case(
    "UFFDIO_MOVE.EINVAL.src-unaligned", origin=ORIGIN + "EINVAL", memory=ANON, features=Feature.MOVE
)
def src_unaligned(ctx: Context) -> None:
    """A source that is not a multiple of the page size is refused."""
    target = Target(ctx, MOVE)
    target.expect(errno.EINVAL, 0, source=target.source + 1)


@case(
    "UFFDIO_MOVE.EINVAL.unregistered", origin=ORIGIN + "EINVAL", memory=ANON, features=Feature.MOVE
)
def unregistered(ctx: Context) -> None:
    """A destination that is not registered is refused."""
    _refused(ctx, Target(ctx, MOVE, registered=0), errno.EINVAL)


@case(
    "UFFDIO_MOVE.EINVAL.dst-past-end", origin=ORIGIN + "EINVAL", memory=ANON, features=Feature.MOVE
)
def past_end(ctx: Context) -> None:
    """A destination whose end is not registered is refused, and nothing is moved."""
    target = Target(ctx, MOVE, registered=1)
    _refused(ctx, target, errno.EINVAL, length=2 * ctx.page)


@case("UFFDIO_MOVE.EINVAL.other-uffd", origin=ORIGIN + "EINVAL", memory=ANON, features=Feature.MOVE)
def other_uffd(ctx: Context) -> None:
    """A destination that is registered with another userfaultfd is refused."""
    target = Target(ctx, MOVE)
    _refused(ctx, target, errno.EINVAL, uffd=ctx.open().fileno())


@case(
    "UFFDIO_MOVE.EINVAL.other-process",
    origin=ORIGIN + "EINVAL",
    memory=ANON,
    features=Feature.MOVE | Feature.EVENT_FORK,
)
def other_process(ctx: Context) -> None:
    """A userfaultfd of another process is refused."""
    target = Target(ctx, MOVE)
    child = ctx.fork()
    assert child.uffd is not None
    target.expect(errno.EINVAL, 0, uffd=child.uffd.fileno())


@case("UFFDIO_MOVE.EINVAL.src-file", origin=ORIGIN + "EINVAL", memory=FILE, features=Feature.MOVE)
def src_file(ctx: Context) -> None:
    """A source that is not anonymous memory is refused."""
    region, source = ctx.make(ctx.page // 4096, "anon"), ctx.make(1)
    source.fill(DATA[0])
    ctx.register(region, RegisterMode.MISSING)
    answer = ctx.ioctl("MOVE", region.start, source.start, ctx.page)
    ctx.expect("errno and move", (answer.errno, answer.result), (errno.EINVAL, -errno.EINVAL))


@case(
    "UFFDIO_MOVE.EINVAL.dst-file",
    origin=ORIGIN + "EINVAL",
    memory=FILE,
    features=lambda memory: Feature.MOVE | missing_features(memory),
)
def dst_file(ctx: Context) -> None:
    """A destination that is not anonymous is refused, although REGISTER offers MOVE for shmem."""
    _refused(ctx, Target(ctx, MOVE), errno.EINVAL)


@case(
    "UFFDIO_MOVE.EINVAL.src-read-only", origin=ORIGIN + "EINVAL", memory=ANON, features=Feature.MOVE
)
def src_read_only(ctx: Context) -> None:
    """A source with other access rights (mprotect) than the destination is refused."""
    target = Target(ctx, MOVE)
    _memory.mprotect(target.source, 2 * ctx.page, mmap.PROT_READ)
    _refused(ctx, target, errno.EINVAL)


@case("UFFDIO_MOVE.EINVAL.src-locked", origin=ORIGIN + "EINVAL", memory=ANON, features=Feature.MOVE)
def src_locked(ctx: Context) -> None:
    """A source that is mlocked is refused if the destination is not."""
    target = Target(ctx, MOVE)
    ctx.expect("mlock", syscall(SYS_MLOCK, target.source, 2 * ctx.page), 0)
    _refused(ctx, target, errno.EINVAL)


@case(
    "UFFDIO_MOVE.ok.both-locked", origin="UFFDIO_MOVE(2const)", memory=ANON, features=Feature.MOVE
)
def both_locked(ctx: Context) -> None:
    """A page can be moved between two mlocked ranges."""
    target = Target(ctx, MOVE)
    for start in (target.start, target.source):
        # mlock would fault in the missing pages, and wait.
        ctx.expect("mlock2", syscall(SYS_MLOCK2, start, 2 * ctx.page, MLOCK_ONFAULT), 0)
    target.expect(0, ctx.page)
    ctx.expect("byte", ctx.silently(ctx.read, target.start), DATA)
    for start in (target.start, target.source):
        ctx.expect("munlock", syscall(SYS_MUNLOCK, start, 2 * ctx.page), 0)


@case(
    "UFFDIO_MOVE.EINVAL.both-read-only",
    origin=ORIGIN + "EINVAL",
    memory=ANON,
    features=Feature.MOVE,
)
def both_read_only(ctx: Context) -> None:
    """Nothing is moved between two read-only ranges."""
    target = Target(ctx, MOVE)
    for start in (target.start, target.source):
        _memory.mprotect(start, 2 * ctx.page, mmap.PROT_READ)
    _refused(ctx, target, errno.EINVAL)


@case(
    "UFFDIO_MOVE.EINVAL.src-past-end", origin=ORIGIN + "EINVAL", memory=ANON, features=Feature.MOVE
)
def src_past_end(ctx: Context) -> None:
    """A source that reaches into another mapping is refused, and nothing is moved."""
    target = Target(ctx, MOVE)
    _memory.mprotect(target.source + ctx.page, ctx.page, mmap.PROT_READ)
    _refused(ctx, target, errno.EINVAL, length=2 * ctx.page)


# Entries in place of a page: the mode to register the source in, and the feature that the entry
# needs.
_ENTRIES: tuple[tuple[str, str, RegisterMode, Feature], ...] = (
    ("src-poison", "poison", RegisterMode.MISSING, Feature.POISON),
    ("src-marker", "a write-protect marker", RegisterMode.WP, Feature.WP_UNPOPULATED),
)


def _add_entry(name: str, text: str, mode: RegisterMode, feature: Feature) -> None:
    def run(ctx: Context) -> None:
        target = Target(ctx, MOVE)
        source = ctx.make(1)
        ctx.uffd.register(source, mode=mode)
        if feature is Feature.POISON:
            ctx.uffd.poison(source)
        else:
            ctx.uffd.writeprotect(source)
        before = ctx.pagemap(source.start)
        for flags in (0, MoveMode.ALLOW_SRC_HOLES):
            target.expect(errno.EFAULT, -errno.EFAULT, source=source.start, mode=int(flags))
        ctx.expect("pagemap of the source", ctx.pagemap(source.start), before)
        ctx.expect_pagemap(target.start, "-----")

    case(
        f"UFFDIO_MOVE.EFAULT.{name}",
        origin="mm/userfaultfd.c: move_pages_pte",
        memory=ANON,
        features=Feature.MOVE | feature | Feature.PAGEFAULT_FLAG_WP,
        summary=f"A source page with {text} is neither moved nor taken for a hole",
    )(run)


for _entry in _ENTRIES:
    _add_entry(*_entry)


@case(
    "UFFDIO_MOVE.EBUSY.src-shared-swapped",
    origin=ORIGIN + "EBUSY",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_swap()],
)
def src_shared_swapped(ctx: Context) -> None:
    """A page in swap that is shared by fork is EBUSY; after a write it can be moved."""
    region, source = ctx.make(1), ctx.make(1)
    source.fill(DATA[0])
    page_out(ctx, source)
    ctx.register(region, RegisterMode.MISSING)
    child = ctx.fork()
    for when in ("errno and move, child alive", "errno and move, child ended"):
        answer = ctx.ioctl("MOVE", region.start, source.start, ctx.page)
        ctx.expect(when, (answer.errno, answer.result), (errno.EBUSY, -errno.EBUSY))
        child.close()
    ctx.expect("a write", ctx.write(source.start, DATA), None)
    answer = ctx.ioctl("MOVE", region.start, source.start, ctx.page)
    ctx.expect("errno and move after a write", (answer.errno, answer.result), (0, ctx.page))
    ctx.expect("byte", ctx.silently(ctx.read, region.start), DATA)


def _with_hole(ctx: Context) -> tuple[Target, Region]:
    """Return a target whose source has no second page."""
    target = Target(ctx, MOVE)
    _memory.madvise(target.source + ctx.page, ctx.page, mmap.MADV_DONTNEED)
    return target, target.region


@case("UFFDIO_MOVE.ENOENT.src-hole", origin=ORIGIN + "ENOENT", memory=ANON, features=Feature.MOVE)
def src_hole(ctx: Context) -> None:
    """A source without a page is ENOENT."""
    target, _ = _with_hole(ctx)
    target.expect(errno.ENOENT, -errno.ENOENT, at=ctx.page)


@case(
    "UFFDIO_MOVE.ENOENT.src-unmapped", origin=ORIGIN + "ENOENT", memory=ANON, features=Feature.MOVE
)
def src_unmapped(ctx: Context) -> None:
    """A source that is not mapped is ENOENT."""
    target = Target(ctx, MOVE)
    target.expect(errno.ENOENT, -errno.ENOENT, source=UNMAPPED)


@case(
    "UFFDIO_MOVE.EAGAIN.second-src-hole",
    origin=ORIGIN + "EAGAIN",
    memory=ANON,
    features=Feature.MOVE,
)
def second_src_hole(ctx: Context) -> None:
    """If the source has no second page, the first is moved and counted."""
    target, region = _with_hole(ctx)
    target.expect(errno.EAGAIN, ctx.page, length=2 * ctx.page)
    ctx.expect("byte", ctx.silently(ctx.read, region.start), DATA)


@case(
    "UFFDIO_MOVE.ok.allow-src-holes",
    origin=ORIGIN + "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES",
    memory=ANON,
    features=Feature.MOVE,
)
def allow_holes(ctx: Context) -> None:
    """With ALLOW_SRC_HOLES a hole counts as moved, and the destination stays a hole."""
    target, region = _with_hole(ctx)
    target.expect(0, 2 * ctx.page, length=2 * ctx.page, mode=MoveMode.ALLOW_SRC_HOLES)
    ctx.expect("byte", ctx.silently(ctx.read, region.start), DATA)
    ctx.expect_pagemap(region.start + ctx.page, "-----")


@case(
    "UFFDIO_MOVE.ok.source-empty", origin="UFFDIO_MOVE(2const)", memory=ANON, features=Feature.MOVE
)
def source_empty(ctx: Context) -> None:
    """The moved page is gone from the source, which then reads as zeros."""
    target = Target(ctx, MOVE)
    target.expect(0, ctx.page)
    ctx.expect_pagemap(target.source, "-----")
    ctx.expect("byte of the source", ctx.silently(ctx.read, target.source), b"\0")


@case("UFFDIO_MOVE.ok.zero-page", origin="UFFDIO_MOVE(2const)", memory=ANON, features=Feature.MOVE)
def zero_page(ctx: Context) -> None:
    """The zero page can be moved."""
    target, region = _with_hole(ctx)
    ctx.expect("byte of the source", ctx.read(target.source + ctx.page), b"\0")
    target.expect(0, ctx.page, at=ctx.page)
    ctx.expect("byte", ctx.silently(ctx.read, region.start + ctx.page), b"\0")


@case("UFFDIO_MOVE.EBUSY.src-shared", origin=ORIGIN + "EBUSY", memory=ANON, features=Feature.MOVE)
def src_shared(ctx: Context) -> None:
    """A page that is shared by fork is EBUSY, even after the child has ended."""
    region, source = ctx.make(1), ctx.make(1)
    source.fill(DATA[0])
    ctx.register(region, RegisterMode.MISSING)
    child = ctx.fork()
    for when in ("errno and move, child alive", "errno and move, child ended"):
        answer = ctx.ioctl("MOVE", region.start, source.start, ctx.page)
        ctx.expect(when, (answer.errno, answer.result), (errno.EBUSY, -errno.EBUSY))
        child.close()


@case(
    "UFFDIO_MOVE.EBUSY.src-pinned",
    origin=ORIGIN + "EBUSY",
    memory=ANON,
    features=Feature.MOVE,
    needs=[needs_pin()],
)
def src_pinned(ctx: Context) -> None:
    """A pinned page is EBUSY until it is unpinned."""
    target = Target(ctx, MOVE)
    pin = Pin(target.source, ctx.page)
    ring = pin.take(syscall)
    ctx.callback(os.close, ring)
    _refused(ctx, target, errno.EBUSY)
    pin.drop(syscall, ring)
    target.expect(0, ctx.page)
