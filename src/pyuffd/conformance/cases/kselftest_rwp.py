"""Read-write protection (Linux 7.3), as uffd-unit-tests checks it (layer L5)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from pyuffd import _memory
from pyuffd._abi import Feature, PageCategory, PagefaultFlag, RegisterMode, RwprotectMode
from pyuffd._events import Pagefault
from pyuffd._uffd import Event
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context, Monitor
from pyuffd.conformance._pin import Pin, needs_pin, syscall
from pyuffd.conformance._types import ANON, wp_features
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.testing._need import needs_swap

PAGES = 4
RWP, ASYNC = Feature.RWP, Feature.RWP | Feature.RWP_ASYNC
UNPROTECT = RwprotectMode(0)
SYS_VMSPLICE = 278
PROT_NONE = 0
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def _protected(ctx: Context, pages: int = PAGES) -> Region:
    """Make a region with all its pages, and protect it."""
    region = ctx.make(pages)
    for index in range(pages):
        region.fill(index % 255 + 1, index * ctx.page, ctx.page)
    ctx.register(region, RegisterMode.RWP)
    ctx.uffd.rwprotect(region)
    return region


def _read_all(ctx: Context, region: Region, first: int = 0, end: int = PAGES) -> None:
    for index in range(first, end):
        seen = ctx.start(region.read, index * ctx.page, ctx.page).result()
        ctx.expect(f"page {index}", seen, bytes([index % 255 + 1]) * ctx.page)


def _resolver(ctx: Context) -> Monitor:
    """Unprotect each page that sends a read-write-protect fault."""

    def resolve(event: Event) -> None:
        assert isinstance(event, Pagefault)
        ctx.uffd.rwprotect(event.address, ctx.page, mode=UNPROTECT)

    return ctx.monitor(resolve)


@case("kselftest.rwp-async", origin="uffd-unit-tests: rwp-async (7.3)", features=ASYNC)
def rwp_async(ctx: Context) -> None:
    """With RWP_ASYNC, a read of a protected page removes its protection without a message."""
    region = _protected(ctx)
    for index in range(PAGES):
        seen = ctx.silently(region.read, index * ctx.page, ctx.page)
        ctx.expect(f"page {index}", seen, bytes([index % 255 + 1]) * ctx.page)


@case("kselftest.rwp-sync", origin="uffd-unit-tests: rwp-sync (7.3)", features=RWP)
def rwp_sync(ctx: Context) -> None:
    """A read of a protected page sends a message with flag RWP; RWPROTECT with mode 0 wakes it."""
    region = _protected(ctx)
    monitor = _resolver(ctx)
    _read_all(ctx, region)
    monitor.stop()
    ctx.expect("RWP faults", monitor.count(PagefaultFlag.RWP), PAGES)


@case("kselftest.rwp-pagemap", origin="uffd-unit-tests: rwp-pagemap (7.3)", features=ASYNC)
def rwp_pagemap(ctx: Context) -> None:
    """PAGEMAP_SCAN reports just the pages read since they were protected as ACCESSED."""
    region = _protected(ctx)
    _read_all(ctx, region, end=PAGES // 2)
    with Pagemap() as pagemap:
        accessed = PageCategory.ACCESSED
        found = pagemap.scan(region, category_mask=accessed, return_mask=accessed)
    middle = region.start + PAGES // 2 * ctx.page
    seen = [(part.start, part.end) for part in found.ranges]
    ctx.expect("accessed ranges", seen, [(region.start, middle)])


@case("kselftest.rwp-mprotect", origin="uffd-unit-tests: rwp-mprotect (7.3)", features=ASYNC)
def rwp_mprotect(ctx: Context) -> None:
    """mprotect(2) to PROT_NONE and back keeps the protection; an access then removes it."""
    region = _protected(ctx)
    for protection in (PROT_NONE, READ_WRITE):
        _memory.mprotect(region.start, region.length, protection)
    for index in range(PAGES):
        seen = ctx.is_protected(region.start + index * ctx.page)
        ctx.expect(f"whether page {index} is protected", seen, True)
    _read_all(ctx, region)
    with Pagemap() as pagemap:
        accessed = PageCategory.ACCESSED
        found = pagemap.scan(region, category_mask=accessed, category_inverted=accessed)
    ctx.expect("ranges not accessed", list(found.ranges), [])


@case("kselftest.rwp-gup", origin="uffd-unit-tests: rwp-gup (7.3)", features=ASYNC)
def rwp_gup(ctx: Context) -> None:
    """The kernel can pin a protected page: vmsplice(2) reads its byte."""
    region = ctx.make(1)
    region.fill(0xCD)
    ctx.register(region, RegisterMode.RWP)
    ctx.uffd.rwprotect(region)
    readable, writable = os.pipe()
    ctx.callback(os.close, readable)
    ctx.callback(os.close, writable)
    vector = (ctypes.c_uint64 * 2)(region.start, 1)
    address = ctypes.addressof(vector)
    done = ctx.start(syscall, SYS_VMSPLICE, writable, address, 1, 0).result()
    ctx.expect("bytes of vmsplice", done, 1)
    ctx.expect("the byte", os.read(readable, 1), b"\xcd")


@case(
    "kselftest.rwp-async-toggle", origin="uffd-unit-tests: rwp-async-toggle (7.3)", features=ASYNC
)
def rwp_async_toggle(ctx: Context) -> None:
    """SET_MODE switches RWP_ASYNC off and on; messages are sent only while it is off."""
    region = _protected(ctx)
    half = PAGES // 2
    _read_all(ctx, region, end=half)
    ctx.expect_quiet()
    ctx.uffd.set_mode(disable=Feature.RWP_ASYNC)
    monitor = _resolver(ctx)
    _read_all(ctx, region, first=half)
    monitor.stop()
    ctx.expect("RWP faults while off", monitor.count(PagefaultFlag.RWP), PAGES - half)
    ctx.uffd.set_mode(enable=Feature.RWP_ASYNC)
    ctx.uffd.rwprotect(region)
    ctx.silently(region.touch)


@case("kselftest.rwp-close", origin="uffd-unit-tests: rwp-close (7.3)", features=RWP)
def rwp_close(ctx: Context) -> None:
    """Closing the userfaultfd makes every page readable again and keeps its content."""
    region = _protected(ctx)
    ctx.uffd.close()
    _read_all(ctx, region)


@case(
    "kselftest.rwp-fork",
    origin="uffd-unit-tests: rwp-fork (7.3)",
    features=RWP | Feature.EVENT_FORK,
)
def rwp_fork(ctx: Context) -> None:
    """With EVENT_FORK a child has the parent's read-write protection."""
    region = _protected(ctx, 1)
    child = ctx.fork()
    ctx.expect("child's uffd-wp bit", ctx.is_protected(region.start, pid=child.pid), True)
    ctx.expect("parent's uffd-wp bit", ctx.is_protected(region.start), True)


@case(
    "kselftest.rwp-fork-pin",
    origin="uffd-unit-tests: rwp-fork-pin (7.3)",
    memory=ANON,
    features=ASYNC | Feature.EVENT_FORK,
    needs=[needs_pin()],
)
def rwp_fork_pin(ctx: Context) -> None:
    """The child's copy of a pinned page is protected; with RWP_ASYNC a read removes that."""
    region = ctx.make(1)
    region.fill(1)
    ring = Pin(region.start, ctx.page).take(syscall)
    ctx.callback(os.close, ring)
    ctx.register(region, RegisterMode.RWP)
    ctx.uffd.rwprotect(region)
    child = ctx.fork()
    ctx.expect("child's uffd-wp bit", ctx.is_protected(region.start, pid=child.pid), True)
    ctx.expect("child's byte", ctx.start(child.read, region.start, 1).result(), b"\1")
    ctx.expect("child's uffd-wp bit after", ctx.is_protected(region.start, pid=child.pid), False)


@case(
    "kselftest.rwp-swap-cow",
    origin="uffd-unit-tests: rwp-swap-cow (7.3)",
    memory=ANON,
    features=RWP,
    needs=[needs_swap()],
)
def rwp_swap_cow(ctx: Context) -> None:
    """A write to a protected page that was swapped out and forked sends an RWP fault first."""
    region = _protected(ctx, 1)
    region.pageout()
    ctx.fork()
    access = ctx.start(ctx.write, region.start, b"\7")
    fault = ctx.expect_event(Pagefault)
    ctx.expect("flag RWP", bool(fault.flags & PagefaultFlag.RWP), True)
    ctx.uffd.rwprotect(region, mode=UNPROTECT)
    ctx.expect("the write", access.result(), None)


@case(
    "kselftest.rwp-wp-exclusive",
    origin="uffd-unit-tests: rwp-wp-exclusive (7.3)",
    features=lambda memory: RWP | wp_features(memory),
)
def rwp_wp_exclusive(ctx: Context) -> None:
    """Registering a range in modes WP and RWP at once is EINVAL."""
    region = ctx.make(1)
    ctx.open()
    answer = ctx.ioctl("REGISTER", region.start, ctx.page, RegisterMode.WP | RegisterMode.RWP)
    ctx.expect("errno of REGISTER", answer.errno, errno.EINVAL)
