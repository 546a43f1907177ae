"""Errors and effects of one of UFFDIO_COPY, ZEROPAGE, CONTINUE and POISON alone (layer L5)."""

from __future__ import annotations

import errno
import mmap
import signal
from pathlib import Path

from pyuffd import _memory
from pyuffd._abi import ContinueMode, CopyMode, Feature, RegisterMode, WriteprotectMode
from pyuffd._memory import Interrupted
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._types import (
    ANON,
    FILE,
    HUGETLB,
    minor_features,
    missing_features,
    missing_wp_features,
    poison_features,
    wp_features,
)
from pyuffd.conformance.cases.errno_fill import CONTINUE, COPY, DATA, POISON, ZEROPAGE, Target
from pyuffd.regions import Region
from pyuffd.testing._memory_types import MemoryType

PROT_NONE = 0
PUNCH_HOLE = 3  # with KEEP_SIZE
BUS_ADRERR, BUS_MCEERR_AR = 2, 4
WP_WRITE = 3
MEMORY_FAILURE = Path("/proc/sys/vm/memory_failure_recovery")


def _continue_wp(memory: MemoryType) -> Feature:
    # CONTINUE_MODE_WP has no feature bit, but every kernel with WP_UNPOPULATED has it.
    return minor_features(memory) | wp_features(memory) | Feature.WP_UNPOPULATED


def _wp_target(ctx: Context, op_mode: RegisterMode) -> Region:
    region = ctx.make(1)
    ctx.register(region, op_mode | RegisterMode.WP)
    return region


@case("UFFDIO_COPY.ok.src-unaligned", origin="UFFDIO_COPY(2const): .src", features=missing_features)
def copy_src_unaligned(ctx: Context) -> None:
    """COPY accepts a source that is not aligned."""
    region, source = ctx.make(1), ctx.make(ctx.page // 4096 + 1, "anon")
    source.write(0, bytes(range(251)))
    ctx.register(region, RegisterMode.MISSING)
    answer = ctx.ioctl("COPY", region.start, source.start + 1, ctx.page)
    ctx.expect("errno and copy", (answer.errno, answer.result), (0, ctx.page))
    ctx.expect("bytes after COPY", ctx.silently(ctx.read, region.start, 3), b"\1\2\3")


@case("UFFDIO_COPY.EINVAL.src-wraps", origin="UFFDIO_COPY(2const): EINVAL")
def copy_src_wraps(ctx: Context) -> None:
    """A source that wraps around the end of all addresses is refused."""
    Target(ctx, COPY).expect(errno.EINVAL, 0, source=-ctx.page % (1 << 64))


@case("UFFDIO_COPY.EINVAL.src-past-end", origin="fs/userfaultfd.c: validate_unaligned_range")
def copy_src_past_end(ctx: Context) -> None:
    """A source that reaches beyond user space is EINVAL; one at the end of user space is EFAULT."""
    target = Target(ctx, COPY)
    # With page tables of five levels, and of four.
    for end in (1 << 56) - 4096, (1 << 47) - 4096:
        answer = target.call(source=end - ctx.page)
        if answer.errno == errno.EFAULT:
            break
    ctx.expect(
        "errno and result of a source at the end of user space",
        (answer.errno, answer.result),
        (errno.EFAULT, -errno.EFAULT),
    )
    target.expect(errno.EINVAL, 0, source=end - ctx.page + 4096)
    target.expect(errno.EINVAL, 0, source=end)


@case("UFFDIO_COPY.EFAULT.src", origin="UFFDIO_COPY(2const): .copy", features=missing_features)
def copy_src_faults(ctx: Context) -> None:
    """If the source cannot be read, nothing is filled."""
    target = Target(ctx, COPY)
    _memory.mprotect(target.source, 2 * ctx.page, PROT_NONE)
    target.expect(errno.EFAULT, -errno.EFAULT)
    ctx.expect_pagemap(target.start, "----?")


@case(
    "UFFDIO_COPY.EAGAIN.second-src-faults",
    origin="UFFDIO_COPY(2const): EAGAIN",
    features=missing_features,
)
def copy_second_src_faults(ctx: Context) -> None:
    """If the second page of the source cannot be read, the first is copied and counted."""
    target = Target(ctx, COPY)
    _memory.mprotect(target.source + ctx.page, ctx.page, PROT_NONE)
    target.expect(errno.EAGAIN, ctx.page, length=2 * ctx.page)
    ctx.expect("bytes after COPY", ctx.silently(ctx.read, target.start, 2), DATA * 2)


@case(
    "UFFDIO_COPY.EINVAL.mode-wp-unregistered",
    origin="UFFDIO_COPY(2const): EINVAL",
    features=missing_wp_features,
)
def copy_wp_unregistered(ctx: Context) -> None:
    """COPY_MODE_WP needs a range registered in mode WP."""
    target = Target(ctx, COPY)
    target.expect(errno.EINVAL, -errno.EINVAL, mode=CopyMode.WP)


@case(
    "UFFDIO_COPY.ok.mode-wp",
    origin="UFFDIO_COPY(2const): UFFDIO_COPY_MODE_WP",
    features=missing_wp_features,
)
def copy_wp(ctx: Context) -> None:
    """COPY_MODE_WP fills the page write-protected; a write to it sends message 3."""
    region = _wp_target(ctx, RegisterMode.MISSING)
    ctx.uffd.copy(region.start, DATA * ctx.page, mode=CopyMode.WP)
    ctx.expect_pagemap(region.start, "P-FW?" if ctx.memory.shared else "P--W?")
    ctx.expect("bytes after COPY", ctx.silently(ctx.read, region.start, 2), DATA * 2)
    write = ctx.start(ctx.write, region.start, b"\1")
    ctx.expect_fault(WP_WRITE, region.start)
    ctx.uffd.writeprotect(region, mode=WriteprotectMode(0))
    ctx.expect("the write", write.result(), None)


@case("UFFDIO_COPY.ok.range-wp-only", origin="UFFDIO_COPY(2const)", features=missing_wp_features)
def copy_wp_only(ctx: Context) -> None:
    """COPY also fills a range that is registered in mode WP only."""
    region = _wp_target(ctx, RegisterMode(0))
    ctx.expect("bytes copied", ctx.uffd.copy(region.start, DATA * ctx.page), ctx.page)
    ctx.expect("bytes after COPY", ctx.silently(ctx.read, region.start, 2), DATA * 2)


@case(
    "UFFDIO_COPY.ok.over-poison",
    origin="UFFDIO_POISON(2const)",
    features=poison_features,
)
def copy_over_poison(ctx: Context) -> None:
    """COPY replaces a poisoned page."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    ctx.uffd.poison(region)
    ctx.expect("bytes copied", ctx.uffd.copy(region.start, DATA * ctx.page), ctx.page)
    ctx.expect("bytes after COPY", ctx.silently(ctx.read, region.start, 2), DATA * 2)


@case(
    "UFFDIO_ZEROPAGE.EINVAL.hugetlb",
    origin="UFFDIO_ZEROPAGE(2const): EINVAL",
    memory=HUGETLB,
    features=missing_features,
)
def zeropage_hugetlb(ctx: Context) -> None:
    """ZEROPAGE does not support hugetlb memory."""
    Target(ctx, ZEROPAGE).expect(errno.EINVAL, -errno.EINVAL)


@case(
    "UFFDIO_ZEROPAGE.EEXIST.over-poison",
    origin="UFFDIO_ZEROPAGE(2const)",
    memory=("anon", "shmem-private"),
    features=poison_features,
)
def zeropage_over_private_poison(ctx: Context) -> None:
    """ZEROPAGE does not replace a poisoned page of private memory."""
    target = Target(ctx, ZEROPAGE)
    ctx.uffd.poison(target.start, ctx.page)
    target.expect(errno.EEXIST, -errno.EEXIST)
    _expect_poisoned(ctx, target.start)


@case(
    "UFFDIO_ZEROPAGE.ok.over-poison",
    origin="UFFDIO_ZEROPAGE(2const)",
    memory=("shmem",),
    features=poison_features,
)
def zeropage_over_shared_poison(ctx: Context) -> None:
    """ZEROPAGE replaces a poisoned page of shared memory."""
    target = Target(ctx, ZEROPAGE)
    ctx.uffd.poison(target.start, ctx.page)
    target.expect(0, ctx.page)
    ctx.expect("bytes after ZEROPAGE", ctx.silently(ctx.read, target.start, 2), bytes(2))


@case(
    "UFFDIO_CONTINUE.EFAULT.no-page",
    origin="UFFDIO_CONTINUE(2const): EFAULT",
    memory=FILE,
    features=minor_features,
)
def continue_no_page(ctx: Context) -> None:
    """CONTINUE fails if the page cache has no page."""
    target = Target(ctx, CONTINUE)
    assert target.region.fd is not None
    _memory.fallocate(target.region.fd, PUNCH_HOLE, 0, target.region.length)
    target.expect(errno.EFAULT, -errno.EFAULT)


@case(
    "UFFDIO_CONTINUE.EAGAIN.second-not-there",
    origin="UFFDIO_CONTINUE(2const): EAGAIN",
    memory=FILE,
    features=minor_features,
)
def continue_second_not_there(ctx: Context) -> None:
    """If the page cache has no second page, the first is mapped and counted."""
    target = Target(ctx, CONTINUE)
    assert target.region.fd is not None
    _memory.fallocate(target.region.fd, PUNCH_HOLE, ctx.page, ctx.page)
    target.expect(errno.EAGAIN, ctx.page, length=2 * ctx.page)
    ctx.expect("bytes after CONTINUE", ctx.silently(ctx.read, target.start, 2), DATA * 2)


@case(
    "UFFDIO_CONTINUE.EINVAL.anon",
    origin="UFFDIO_CONTINUE(2const): EINVAL",
    memory=ANON,
    features=Feature.MINOR_SHMEM,
)
def continue_anon(ctx: Context) -> None:
    """CONTINUE does not support anonymous memory."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    answer = ctx.ioctl("CONTINUE", region.start, ctx.page)
    ctx.expect("errno and mapped", (answer.errno, answer.result), (errno.EINVAL, -errno.EINVAL))


@case(
    "UFFDIO_CONTINUE.EINVAL.mode-wp-unregistered",
    origin="UFFDIO_CONTINUE(2const): EINVAL",
    memory=FILE,
    features=_continue_wp,
)
def continue_wp_unregistered(ctx: Context) -> None:
    """CONTINUE_MODE_WP needs a range registered in mode WP."""
    target = Target(ctx, CONTINUE)
    target.expect(errno.EINVAL, -errno.EINVAL, mode=ContinueMode.WP)


@case(
    "UFFDIO_CONTINUE.ok.mode-wp",
    origin="UFFDIO_CONTINUE(2const): UFFDIO_CONTINUE_MODE_WP",
    memory=FILE,
    features=_continue_wp,
)
def continue_wp(ctx: Context) -> None:
    """CONTINUE_MODE_WP maps the page write-protected; a write to it sends message 3."""
    target = Target(ctx, CONTINUE)
    ctx.uffd.register(target.region, mode=RegisterMode.MINOR | RegisterMode.WP)
    target.expect(0, ctx.page, mode=ContinueMode.WP)
    ctx.expect_pagemap(target.start, "P-FW?")
    ctx.expect("bytes after CONTINUE", ctx.silently(ctx.read, target.start, 2), DATA * 2)
    write = ctx.start(ctx.write, target.start, b"\1")
    ctx.expect_fault(WP_WRITE, target.start)
    ctx.uffd.writeprotect(target.start, ctx.page, mode=WriteprotectMode(0))
    ctx.expect("the write", write.result(), None)


def _expect_poisoned(ctx: Context, address: int) -> None:
    seen = ctx.silently(ctx.read, address)
    if not isinstance(seen, Interrupted):
        ctx.fail("the read", seen, "SIGBUS")
    # A kernel with CONFIG_MEMORY_FAILURE gives the code of a memory error.
    code = BUS_MCEERR_AR if MEMORY_FAILURE.exists() else BUS_ADRERR
    ctx.expect("signal and code", seen[:2], (signal.SIGBUS, code))
    ctx.expect("address of the signal", hex(seen.address), hex(address))


@case("UFFDIO_POISON.ok.access", origin="UFFDIO_POISON(2const)", features=poison_features)
def poison_access(ctx: Context) -> None:
    """Accessing a poisoned page gives SIGBUS in user code and EFAULT in the kernel, no message."""
    target = Target(ctx, POISON)
    target.expect(0, ctx.page)
    _expect_poisoned(ctx, target.start)
    seen = ctx.silently(ctx.write, target.start, b"\1")
    ctx.expect("signal of a write", isinstance(seen, Interrupted) and seen.number, signal.SIGBUS)
    # COPY reads its source in the kernel.
    other = ctx.make(1, "anon")
    ctx.register(other, RegisterMode.MISSING)
    answer = ctx.ioctl("COPY", other.start, target.start, 4096)
    ctx.expect("errno of a kernel access", answer.errno, errno.EFAULT)


@case("UFFDIO_POISON.ok.unregister-keeps", origin="UFFDIO_POISON(2const)", features=poison_features)
def poison_unregister(ctx: Context) -> None:
    """A page stays poisoned after UNREGISTER; MADV_DONTNEED removes the poison."""
    target = Target(ctx, POISON)
    target.expect(0, ctx.page)
    ctx.uffd.unregister(target.region)
    _expect_poisoned(ctx, target.start)
    target.region.madvise(mmap.MADV_DONTNEED)
    ctx.expect("byte afterwards", ctx.silently(ctx.read, target.start), b"\0")


@case(
    "UFFDIO_POISON.ok.writeprotect-ignores",
    origin="UFFDIO_POISON(2const)",
    features=lambda memory: poison_features(memory) | wp_features(memory),
)
def poison_writeprotect(ctx: Context) -> None:
    """Write-protecting a poisoned page succeeds and changes nothing."""
    region = _wp_target(ctx, RegisterMode.MISSING)
    ctx.uffd.poison(region)
    before = ctx.pagemap(region.start)
    ctx.uffd.writeprotect(region)
    ctx.expect("pagemap", ctx.pagemap(region.start), before)
    _expect_poisoned(ctx, region.start)
    ctx.uffd.writeprotect(region, mode=WriteprotectMode(0))
    _expect_poisoned(ctx, region.start)
