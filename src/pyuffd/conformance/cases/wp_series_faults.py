"""The write-protect series: messages, registration, and writes that are not tracked (layer L5)."""

from __future__ import annotations

import errno
import os

from pyuffd._abi import Feature, Ioctl, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._raw import ioctl
from pyuffd.conformance._types import ANY, FILE, HUGETLB, SHARED, wp_features
from pyuffd.conformance._wp import (
    DATA,
    UNPROTECT,
    WP_WRITE,
    WRITTEN,
    expect_fault,
    expect_read,
    expect_silent_write,
    expect_write_fault,
    present,
    protected,
)
from pyuffd.conformance.cases.masks import MASK_VARIANTS, check_mask
from pyuffd.testing._opening import open_userfaultfd

API = 0xAA
UNKNOWN_FEATURE = 1 << 62
INSIDE = 0x123  # offset of a write in its page


@case(
    "wp-series.17.write-fault",
    origin="patch 17: hugetlb: userfaultfd-wp faults",
    memory=HUGETLB,
    features=wp_features,
)
def hugetlb_write_fault(ctx: Context) -> None:
    """A write to a protected huge page sends message 3 with the page's address, once per page."""
    region = protected(ctx, 2)
    for index in range(2):
        at = region.start + index * ctx.page
        expect_write_fault(ctx, at + ctx.page - 4096 + INSIDE)
        ctx.expect_pagemap(at, present(ctx, protected=False))
        expect_silent_write(ctx, at)


@case(
    "wp-series.17.exact-address",
    origin="patch 17: addresses of messages; UFFD_FEATURE_EXACT_ADDRESS",
    features=lambda memory: wp_features(memory) | Feature.EXACT_ADDRESS,
)
def exact_address(ctx: Context) -> None:
    """With EXACT_ADDRESS, message 3 has the exact address of the write."""
    region = protected(ctx)
    at = region.start + ctx.page - 1
    access = ctx.start(ctx.write, at, b"\1")
    expect_fault(ctx, access, WP_WRITE, at)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect("the write", access.result(), None)


@case(
    "wp-series.17.unprotect-wakes",
    origin="patch 17: hugetlb: userfaultfd-wp faults",
    features=wp_features,
)
def unprotect_wakes(ctx: Context) -> None:
    """Unprotecting with DONTWAKE leaves a writer asleep; WAKE wakes it."""
    region = protected(ctx)
    access = ctx.start(ctx.write, region.start, b"\1")
    expect_fault(ctx, access, WP_WRITE, region.start)
    answer = ctx.ioctl("WRITEPROTECT", region.start, ctx.page, 2)
    ctx.expect("errno of WRITEPROTECT with DONTWAKE", answer.errno, 0)
    ctx.expect("whether the page is protected", ctx.is_protected(region.start), False)
    ctx.expect("whether the write returned before WAKE", access.done, False)
    ctx.uffd.wake(region)
    ctx.expect("the write", access.result(), None)
    ctx.expect_quiet()


@case(
    "wp-series.17.wake-alone-faults-again",
    origin="patch 17: hugetlb: userfaultfd-wp faults",
    features=wp_features,
)
def wake_alone(ctx: Context) -> None:
    """After WAKE without unprotecting, the writer faults again and sends a second message."""
    region = protected(ctx)
    access = ctx.start(ctx.write, region.start, b"\1")
    expect_fault(ctx, access, WP_WRITE, region.start)
    ctx.uffd.wake(region)
    expect_fault(ctx, access, WP_WRITE, region.start)
    ctx.uffd.writeprotect(region, mode=UNPROTECT)
    ctx.expect("the write", access.result(), None)
    ctx.expect_quiet()


@case(
    "wp-series.19.alignment",
    origin="patch 19: UFFDIO_WRITEPROTECT on hugetlb",
    memory=HUGETLB,
    features=wp_features,
)
def hugetlb_alignment(ctx: Context) -> None:
    """WRITEPROTECT of a part of a huge page is EINVAL and changes nothing."""
    region = protected(ctx, 2)
    for what, start, length in (
        ("start + 4 KiB, 4 KiB", region.start + 4096, 4096),
        ("start, 4 KiB", region.start, 4096),
        ("start + 4 KiB, a huge page", region.start + 4096, ctx.page),
    ):
        answer = ctx.ioctl("WRITEPROTECT", start, length, 0)
        ctx.expect(f"errno of {what}", answer.errno, errno.EINVAL)
    for index in range(2):
        ctx.expect_pagemap(region.start + index * ctx.page, present(ctx))


@case(
    "wp-series.19.protect-unprotect",
    origin="patch 19: UFFDIO_WRITEPROTECT on hugetlb",
    memory=HUGETLB,
    features=wp_features,
)
def hugetlb_protect(ctx: Context) -> None:
    """WRITEPROTECT changes only the huge pages of its range; an unregistered range is ENOENT."""
    region = protected(ctx, 3)
    middle = region.start + ctx.page
    ctx.uffd.writeprotect(middle, ctx.page, mode=UNPROTECT)
    states = [ctx.is_protected(region.start + index * ctx.page) for index in range(3)]
    ctx.expect("which pages are protected", states, [True, False, True])
    expect_silent_write(ctx, middle)
    ctx.uffd.unregister(region.start + 2 * ctx.page, ctx.page)
    answer = ctx.ioctl("WRITEPROTECT", region.start + 2 * ctx.page, ctx.page, 1)
    ctx.expect("errno of an unregistered range", answer.errno, errno.ENOENT)
    expect_read(ctx, region.start, DATA)


@case(
    "wp-series.25.register",
    origin="patch 25: allow shmem and hugetlb to be registered for wp",
    features=wp_features,
)
def register_mask(ctx: Context) -> None:
    """REGISTER offers WRITEPROTECT in mode WP only, whichever features are enabled."""
    region = ctx.make(1)
    ctx.open(Feature(0))
    for mode, wanted in (
        (RegisterMode.WP, True),
        (RegisterMode.WP | RegisterMode.MISSING, True),
        (RegisterMode.MISSING, False),
    ):
        ioctls = ctx.register(region, mode)
        ctx.expect(
            f"whether mode {int(mode)} offers WRITEPROTECT", Ioctl.WRITEPROTECT in ioctls, wanted
        )
        ctx.uffd.unregister(region)


@case(
    "wp-series.25.masks",
    origin="patch 25: the ioctls of a range depend on its memory and mode",
    features=wp_features,
    variants=MASK_VARIANTS,
)
def register_masks(ctx: Context) -> None:
    """Each combination of MISSING, WP and MINOR offers exactly its ioctls, or is EINVAL."""
    region = ctx.make(1)
    ctx.open(Feature(0))
    for bits in range(8):
        check_mask(ctx, ctx.memory, RegisterMode(bits), region.start, region.length)
        ctx.ioctl("UNREGISTER", region.start, region.length)


@case(
    "wp-series.25.feature-decides",
    origin="patch 25: UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
    memory=FILE,
    features=Feature.PAGEFAULT_FLAG_WP,
)
def feature_decides(ctx: Context) -> None:
    """File memory can be registered in mode WP if and only if WP_HUGETLBFS_SHMEM is offered."""
    region = ctx.make(1)
    ctx.open(Feature(0))
    answer = ctx.ioctl("REGISTER", region.start, ctx.page, int(RegisterMode.WP))
    wanted = 0 if Feature.WP_HUGETLBFS_SHMEM & ctx.offered else errno.EINVAL
    ctx.expect("errno of REGISTER", answer.errno, wanted)


@case(
    "wp-series.26.unknown-feature",
    origin="patch 26: programs that ask for the whole mask of their header",
    memory=ANY,
)
def unknown_feature(ctx: Context) -> None:
    """A handshake with an unknown feature bit is EINVAL; another handshake then works."""
    fd = open_userfaultfd()
    ctx.callback(os.close, fd)
    answer = ioctl(fd, "API", API, ctx.offered & ~Feature.EVENT_FORK | UNKNOWN_FEATURE)
    ctx.expect("errno with the unknown bit", answer.errno, errno.EINVAL)
    ctx.expect("the argument", answer.words, (0, 0, 0))
    answer = ioctl(fd, "API", API)
    ctx.expect("errno of the second handshake", answer.errno, 0)
    ctx.expect("features", answer.words[1], ctx.offered)


@case(
    "wp-series.00.alias-write",
    origin="David Hildenbrand's mail of 22 Jul 2021: tracking is per address space",
    memory=SHARED,
    features=wp_features,
)
def alias_write(ctx: Context) -> None:
    """A write through another mapping sends no message and keeps the bit; the data changes."""
    region = protected(ctx)
    alias = ctx.alias(region)
    expect_silent_write(ctx, alias.start)
    ctx.expect("whether the page is protected", ctx.is_protected(region.start), True)
    ctx.expect("byte read afterwards", ctx.silently(ctx.read, region.start), bytes([WRITTEN]))
    expect_write_fault(ctx, region.start)


@case(
    "wp-series.00.file-write",
    origin="David Hildenbrand's mail of 22 Jul 2021: tracking is per address space",
    memory=("shmem",),
    features=wp_features,
)
def file_write(ctx: Context) -> None:
    """A pwrite(2) to the memfd sends no message and keeps the bit; the data changes."""
    region = protected(ctx)
    assert region.fd is not None
    ctx.expect("pwrite", ctx.silently(os.pwrite, region.fd, bytes([WRITTEN]), 0), 1)
    ctx.expect("whether the page is protected", ctx.is_protected(region.start), True)
    ctx.expect("byte read afterwards", ctx.silently(ctx.read, region.start), bytes([WRITTEN]))
    expect_write_fault(ctx, region.start)


@case(
    "wp-series.00.child-write",
    origin="David Hildenbrand's mail of 22 Jul 2021: tracking is per address space",
    memory=SHARED,
    features=wp_features,
)
def child_write(ctx: Context) -> None:
    """Without EVENT_FORK, a child's write to shared memory sends no message and keeps the bit."""
    region = protected(ctx)
    child = ctx.fork()
    seen = ctx.silently(child.write, region.start, bytes([WRITTEN]))
    ctx.expect("the child's write", seen, None)
    ctx.expect("parent's uffd-wp bit", ctx.is_protected(region.start), True)
    ctx.expect("byte read afterwards", ctx.silently(ctx.read, region.start), bytes([WRITTEN]))
    expect_write_fault(ctx, region.start)
