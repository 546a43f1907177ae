"""The write-protect series: protection that stays when a range is registered without WP (layer L5).

The library unprotects a range before it replaces mode WP by others. These cases make the ioctls
directly.
"""

from __future__ import annotations

import errno
import time
from pathlib import Path

from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Access, Child, Context
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import HUGETLB, SMALL, missing_features, wp_features
from pyuffd.conformance._wp import (
    DATA,
    MISSING_READ,
    WRITTEN,
    expect_fault,
    expect_silent_write,
    expect_write_fault,
    marker_features,
    protected,
    smaps,
)
from pyuffd.testing._memory_types import MemoryType

ORIGIN = "patch 13: left-over markers; registering again replaces the modes"
REFUSED = Variant("refused", "REGISTER does not replace modes: EBUSY, and nothing is changed")
ENDLESS_FAULTS = 1000  # a write that completes has far fewer


def _features(memory: MemoryType) -> Feature:
    return wp_features(memory) | missing_features(memory)


def _register_again(ctx: Context, start: int, length: int) -> bool:
    """Replace WP by MISSING; return False if the kernel refuses that and changes nothing."""
    answer = ctx.ioctl("REGISTER", start, length, int(RegisterMode.MISSING))
    if answer.errno == errno.EBUSY:
        ctx.expect_variant("errno of REGISTER", answer.errno, refused=errno.EBUSY)
        ctx.expect("whether the page is still protected", ctx.is_protected(start), True)
        expect_write_fault(ctx, start)
        return False
    ctx.expect("errno of REGISTER", answer.errno, 0)
    ctx.expect("whether VmFlags has uw", "uw" in smaps(start).get("VmFlags", "").split(), False)
    answer = ctx.ioctl("WRITEPROTECT", start, length, 0)
    ctx.expect("errno of WRITEPROTECT", answer.errno, errno.ENOENT)
    return True


@case(
    "wp-series.13.register-again-page",
    origin=ORIGIN,
    memory=SMALL,
    features=_features,
    variants=[
        Variant("stays", "bit 57 stays although the page is no longer protected"),
        Variant("cleared", "REGISTER clears bit 57"),
        REFUSED,
    ],
)
def register_again_page(ctx: Context) -> None:
    """After MISSING replaced WP, a write to a page that was protected sends no message."""
    region = protected(ctx)
    if not _register_again(ctx, region.start, region.length):
        return
    expect_silent_write(ctx, region.start)
    bit = ctx.is_protected(region.start)
    ctx.expect_variant("uffd-wp bit after the write", bit, stays=True, cleared=False)


@case(
    "wp-series.13.register-again-marker",
    origin=ORIGIN,
    features=lambda memory: _features(memory) | marker_features(memory),
    variants=[REFUSED],
)
def register_again_marker(ctx: Context) -> None:
    """After MISSING replaced WP, a hole that was protected faults as missing and can be filled."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.WP)
    ctx.uffd.writeprotect(region)
    if not _register_again(ctx, region.start, region.length):
        return
    reading = ctx.start(ctx.read, region.start)
    expect_fault(ctx, reading, MISSING_READ, region.start)
    ctx.uffd.copy(region.start, bytes([DATA]) * ctx.page)
    ctx.expect("the read", reading.result(), bytes([DATA]))
    expect_silent_write(ctx, region.start)


@case(
    "wp-series.13.register-again-endless",
    origin=ORIGIN,
    memory=HUGETLB,
    features=lambda memory: _features(memory) | Feature.EVENT_FORK,
    variants=[
        Variant("endless", "the write faults forever; the thread can be killed"),
        Variant("completes", "the write completes"),
        REFUSED,
    ],
)
def register_again_endless(ctx: Context) -> None:
    """After MISSING replaced WP, a write to a huge page that was protected may never end."""
    region = protected(ctx)
    child = ctx.fork()
    assert child.uffd is not None
    again = (region.start, region.length, int(RegisterMode.MISSING))
    answer = ctx.ioctl("REGISTER", *again, uffd=child.uffd)
    if answer.errno == errno.EBUSY:
        ctx.expect_variant("errno of REGISTER", answer.errno, refused=errno.EBUSY)
        expect_write_fault(ctx, region.start, child.uffd, child.write)
        return
    ctx.expect("errno of REGISTER", answer.errno, 0)
    writing = ctx.start(_write, child, region.start)
    ctx.expect_variant(
        "the write", _outcome(ctx, child, writing), endless="endless", completes="completes"
    )
    ctx.expect_quiet(child.uffd)
    child.close()
    writing.result()
    ctx.expect("parent's uffd-wp bit", ctx.is_protected(region.start), True)


def _write(child: Child, address: int) -> None:
    try:
        child.write(address, bytes([WRITTEN]))
    except ProcessLookupError:  # it was killed
        return


def _outcome(ctx: Context, child: Child, writing: Access[None]) -> str:
    """Wait until the write has completed, or has faulted so often that it never will."""
    first, deadline = _minor_faults(child), time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if writing.done:
            return "completes"
        if _minor_faults(child) - first > ENDLESS_FAULTS:
            return "endless"
    ctx.fail("the write", "neither its end nor faults", "endless faults", "its end")


def _minor_faults(child: Child) -> int:
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7])
