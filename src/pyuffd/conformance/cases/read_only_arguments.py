"""Ioctls whose argument is read-only, so that the kernel cannot write the result (layer L5).

The kernel writes the result field last, so EFAULT does not mean that nothing has happened: pages
are filled, but threads are not woken.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct

from pyuffd import _memory
from pyuffd._abi import RegisterMode
from pyuffd._events import Remove
from pyuffd.conformance import _raw
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import ANY, missing_features, wp_features
from pyuffd.conformance._wp import WP_WRITE, expect_fault
from pyuffd.conformance.cases.errno_fill import DATA, LAYOUT, OPS, POISON, ZEROPAGE, Op, Target
from pyuffd.conformance.cases.errno_open import API, fresh
from pyuffd.conformance.cases.errno_register import vm_flags
from pyuffd.testing._memory_types import SMALL_PAGE

SYS_IOCTL = 16
ORIGIN = "fs/userfaultfd.c: put_user"
_KEPT = 0x5A5A5A5A  # in the result field before the call


def _call(ctx: Context, name: str, *words: int, fd: int | None = None) -> int:
    """Make an ioctl whose argument lies in memory that cannot be written; return errno."""
    argument = ctx.make(1, "anon")
    argument.write(0, struct.pack(f"={len(words)}Q", *words))
    _memory.mprotect(argument.start, SMALL_PAGE, mmap.PROT_READ)
    fd = ctx.uffd.fileno() if fd is None else fd
    result = syscall(SYS_IOCTL, fd, _raw.request(name), argument.start)
    seen = struct.unpack(f"={len(words)}Q", argument.read(0, 8 * len(words)))
    ctx.expect("the argument afterwards", seen, words)
    return -result


def _words(ctx: Context, op: Op, target: Target) -> tuple[int, ...]:
    return (*op.words(target.start, target.source, ctx.page, 0), _KEPT)


def _filled_all_the_same(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    reading = None
    if op is not POISON:
        reading = ctx.start(ctx.read, target.start)
        ctx.wait_readable()
    ctx.expect(f"errno of {op.name}", _call(ctx, op.name, *_words(ctx, op, target)), errno.EFAULT)
    target.expect(errno.EEXIST, -errno.EEXIST)
    if reading is not None:
        ctx.expect("whether the read returned before UFFDIO_WAKE", reading.done, False)
        ctx.uffd.wake(target.start, ctx.page)
        ctx.expect("byte", reading.result(), b"\0" if op is ZEROPAGE else DATA)


_TOLD = (
    Variant("told", "EFAULT: the kernel tries to write -EAGAIN into the argument"),
    Variant("untouched", "EAGAIN: the kernel does not write into the argument"),
)


def _layout_changing(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    other = ctx.make(1, "anon")
    ctx.register(other, RegisterMode.MISSING)
    dropping = ctx.start(other.madvise, mmap.MADV_DONTNEED)
    ctx.wait_readable()
    seen = _call(ctx, op.name, *_words(ctx, op, target))
    ctx.expect_variant(f"errno of {op.name}", seen, told=errno.EFAULT, untouched=errno.EAGAIN)
    ctx.expect_event(Remove)
    dropping.result()
    ctx.expect_pagemap(target.start, "-----")


def _add(op: Op) -> None:
    case(
        f"UFFDIO_{op.name}.EFAULT.argument-read-only",
        origin=ORIGIN,
        memory=op.memory,
        features=op.features,
        summary="If the result cannot be written, the page is filled, but nobody is woken: EFAULT",
    )(lambda ctx: _filled_all_the_same(ctx, op))
    case(
        f"UFFDIO_{op.name}.EFAULT.layout-changing-argument-read-only",
        origin=ORIGIN,
        memory=op.memory,
        features=lambda kind: op.features(kind) | LAYOUT,
        variants=_TOLD,
        summary="With a read-only argument too, nothing is filled while a layout event is unread",
    )(lambda ctx: _layout_changing(ctx, op))


for _op in OPS:
    _add(_op)


@case("UFFDIO_REGISTER.EFAULT.argument-read-only", origin=ORIGIN, features=missing_features)
def register(ctx: Context) -> None:
    """If the mask of ioctls cannot be written, REGISTER is EFAULT, but the range is registered."""
    region = ctx.make(1)
    ctx.open()
    seen = _call(ctx, "REGISTER", region.start, ctx.page, int(RegisterMode.MISSING), _KEPT)
    ctx.expect("errno of REGISTER", seen, errno.EFAULT)
    ctx.expect("VmFlags", vm_flags(region.start), {"um"})


@case("UFFDIO_WRITEPROTECT.ok.argument-read-only", origin=ORIGIN, features=wp_features)
def writeprotect(ctx: Context) -> None:
    """WRITEPROTECT writes no result, so its argument may be read-only."""
    region = ctx.make(1)
    region.fill(DATA[0])
    ctx.register(region, RegisterMode.WP)
    ctx.expect("errno of protecting", _call(ctx, "WRITEPROTECT", region.start, ctx.page, 1), 0)
    writing = ctx.start(ctx.write, region.start, b"\1")
    expect_fault(ctx, writing, WP_WRITE, region.start)
    ctx.expect("errno of unprotecting", _call(ctx, "WRITEPROTECT", region.start, ctx.page, 0), 0)
    ctx.expect("the write", writing.result(), None)


@case("UFFDIO_UNREGISTER.ok.argument-read-only", origin=ORIGIN, features=missing_features)
def unregister(ctx: Context) -> None:
    """UNREGISTER and WAKE write no result, so their argument may be read-only."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    ctx.expect("errno of WAKE", _call(ctx, "WAKE", region.start, ctx.page), 0)
    ctx.expect("errno of UNREGISTER", _call(ctx, "UNREGISTER", region.start, ctx.page), 0)
    ctx.expect("VmFlags", vm_flags(region.start), set())


@case("UFFDIO_API.EFAULT.argument-read-only", origin="UFFDIO_API(2const): EFAULT", memory=ANY)
def api(ctx: Context) -> None:
    """A handshake whose answer cannot be written is EFAULT; another handshake then works."""
    fd = fresh(ctx)
    for name, version, features in (
        ("bad", API + 1, 0),
        ("unknown", API, 1 << 63),
        ("good", API, 0),
    ):
        seen = _call(ctx, "API", version, features, 0, fd=fd)
        ctx.expect(f"errno of a {name} handshake", seen, errno.EFAULT)
    ctx.expect("errno of a handshake afterwards", ctx.ioctl("API", API, uffd=fd).errno, 0)
    ctx.expect("errno of a read", _read_errno(fd), errno.EAGAIN)


def _read_errno(fd: int) -> int:
    try:
        os.read(fd, 32)
    except OSError as error:
        return error.errno or 0
    return 0
