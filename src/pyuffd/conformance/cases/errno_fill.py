"""Errors of the ioctls that fill pages, and the byte counts that they return (layer L5).

UFFDIO_COPY, ZEROPAGE, MOVE, CONTINUE and POISON make mostly the same checks, so they share one
table of conditions. Each has a result field (copy, zeropage, ...), in which the kernel returns the
byte count or a negative errno. Cases of ENOMEM are in `errno_memory`.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd._events import Remove
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Child, Context
from pyuffd.conformance._raw import Answer
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import (
    ALL,
    ANON,
    FILE,
    HUGETLB,
    SMALL,
    minor_features,
    missing_features,
    poison_features,
)
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE, MemoryType

UNKNOWN_MODE = 1 << 63
KERNEL_ADDRESS = 1 << 63
LAYOUT = Feature.EVENT_REMOVE
NOTHING = Feature(0)
DATA = b"\x5a"
GAP = 0x100000  # nothing is mapped there
MODE_WP = 2  # of COPY and CONTINUE


@dataclass(frozen=True)
class Op:
    """One ioctl that fills pages, and its arguments.

    Attributes:
        name: Its name without UFFDIO_.
        memory: The memory types that it supports.
        mode: The register mode whose faults it resolves.
        features: The features that it needs.
        words: Returns its argument, given destination, source, length and mode.
        to: The name of the destination in its manual page.
    """

    name: str
    memory: tuple[str, ...]
    mode: RegisterMode
    features: Callable[[MemoryType], Feature]
    words: Callable[[int, int, int, int], tuple[int, ...]]
    to: str = "start"


def with_source(to: int, source: int, length: int, mode: int) -> tuple[int, ...]:
    """Return the argument of COPY and MOVE."""
    return to, source, length, mode


def without_source(to: int, _source: int, length: int, mode: int) -> tuple[int, ...]:
    """Return the argument of ZEROPAGE, CONTINUE and POISON."""
    return to, length, mode


COPY = Op("COPY", ALL, RegisterMode.MISSING, missing_features, with_source, "dst")
ZEROPAGE = Op("ZEROPAGE", SMALL, RegisterMode.MISSING, missing_features, without_source)
MOVE = Op("MOVE", ANON, RegisterMode.MISSING, lambda _: Feature.MOVE, with_source, "dst")
CONTINUE = Op("CONTINUE", FILE, RegisterMode.MINOR, minor_features, without_source)
POISON = Op(
    "POISON",
    ALL,
    RegisterMode.MISSING,
    poison_features,
    without_source,
)
OPS = (COPY, ZEROPAGE, MOVE, CONTINUE, POISON)


class Target:
    """A region registered for an ioctl, a source, and for CONTINUE pages in the page cache."""

    def __init__(self, ctx: Context, op: Op, pages: int = 2, registered: int | None = None) -> None:
        self._ctx = ctx
        self._op = op
        self.page: int = ctx.page
        self.region: Region = ctx.make(pages)
        self.start: int = self.region.start
        if op is CONTINUE:
            fill_file(ctx, self.region)
        # A page that a fork has shared cannot be moved.
        source = ctx.make(pages * self.page // SMALL_PAGE, "anon")
        if op is MOVE:
            source.madvise(mmap.MADV_DONTFORK)
        source.fill(DATA[0])
        self.source: int = source.start
        if registered != 0:
            ctx.register(self.region, op.mode, registered)
        else:
            ctx.open()

    def call(
        self,
        *,
        at: int = 0,
        length: int | None = None,
        mode: int = 0,
        source: int | None = None,
        uffd: int | None = None,
    ) -> Answer:
        """Make the ioctl at an offset, by default for one page."""
        words = self._op.words(
            self.start + at,
            self.source + at if source is None else source,
            self.page if length is None else length,
            mode,
        )
        return self._ctx.ioctl(self._op.name, *words, uffd=uffd)

    def expect(self, code: int, result: int, **call: int) -> None:
        """Make the ioctl, and check its errno and its result field."""
        answer = self.call(**call)
        self._ctx.expect(
            f"errno and result of {self._op.name}", (answer.errno, answer.result), (code, result)
        )


def fill_file(ctx: Context, region: Region, pages: int | None = None) -> None:
    """Write data to the file behind a region, without mapping pages in the region."""
    assert region.fd is not None
    length = region.length if pages is None else pages * region.page_size
    flags = mmap.MAP_SHARED
    address = _memory.mmap(length, mmap.PROT_READ | mmap.PROT_WRITE, flags, region.fd)
    ctx.callback(_memory.munmap, address, length)
    _memory.fill(address, length, DATA[0])


def _ok(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    target.expect(0, ctx.page)
    if op is POISON:
        ctx.expect_pagemap(target.start, "----?" if ctx.memory.is_hugetlb else "-S--?")
        return
    is_the_files = ctx.memory.shared or op is CONTINUE
    ctx.expect_pagemap(target.start, "P-F-?" if is_the_files else "P---?")
    seen = ctx.silently(ctx.read, target.start, 8)
    ctx.expect(f"bytes after {op.name}", seen, bytes(8) if op is ZEROPAGE else DATA * 8)


def _to_unaligned(ctx: Context, op: Op) -> None:
    Target(ctx, op).expect(errno.EINVAL, 0, at=1)


def _length_unaligned(ctx: Context, op: Op) -> None:
    Target(ctx, op).expect(errno.EINVAL, 0, length=ctx.page - 1)


def _length_zero(ctx: Context, op: Op) -> None:
    Target(ctx, op).expect(errno.EINVAL, 0, length=0)


def _length_wraps(ctx: Context, op: Op) -> None:
    Target(ctx, op).expect(errno.EINVAL, 0, length=-ctx.page % (1 << 64))


def _kernel_address(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    target.expect(errno.EINVAL, 0, at=KERNEL_ADDRESS - target.start, source=target.source)


def _mode_unknown(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    target.expect(errno.EINVAL, 0, mode=UNKNOWN_MODE)
    target.expect(errno.EINVAL, 0, mode=1 << 5)


def _small_page_to(ctx: Context, op: Op) -> None:
    Target(ctx, op).expect(errno.EINVAL, -errno.EINVAL, at=SMALL_PAGE)


def _small_page_length(ctx: Context, op: Op) -> None:
    Target(ctx, op).expect(errno.EINVAL, -errno.EINVAL, length=SMALL_PAGE)


def _unregistered(ctx: Context, op: Op) -> None:
    Target(ctx, op, registered=0).expect(errno.ENOENT, -errno.ENOENT)


def _unmapped(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    target.region.close()
    target.expect(errno.ENOENT, -errno.ENOENT)


def _past_end(ctx: Context, op: Op) -> None:
    target = Target(ctx, op, registered=1)
    target.expect(errno.ENOENT, -errno.ENOENT, length=2 * ctx.page)
    target.expect(0, ctx.page)


def _present(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    target.expect(0, ctx.page)
    target.expect(errno.EEXIST, -errno.EEXIST)


def _second_present(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    target.expect(0, ctx.page, at=ctx.page)
    target.expect(errno.EAGAIN, ctx.page, length=2 * ctx.page)


def _layout_changing(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    # Not in the target: a change anywhere in the address space must stop the ioctl.
    other = ctx.make(1, "anon")
    ctx.register(other, RegisterMode.MISSING)
    dropping = ctx.start(other.madvise, mmap.MADV_DONTNEED)
    ctx.wait_readable()
    answer = target.call()
    ctx.expect(f"errno of {op.name}", answer.errno, errno.EAGAIN)
    ctx.expect_variant(f"result field of {op.name}", answer.result, told=-errno.EAGAIN, untouched=0)
    ctx.expect("whether madvise returned before its event was read", dropping.done, False)
    ctx.expect_event(Remove)
    dropping.result()
    # The thread of madvise ends the change a little after its event was read.
    for _ in range(1000):
        answer = target.call()
        if answer.errno != errno.EAGAIN:
            break
        os.sched_yield()
    ctx.expect("errno and result afterwards", (answer.errno, answer.result), (0, ctx.page))


def orphan(ctx: Context, child: Child) -> int:
    """End a child and return a duplicate of its userfaultfd, closed when the case ends."""
    assert child.uffd is not None
    fd = os.dup(child.uffd.fileno())
    ctx.callback(os.close, fd)
    child.close()
    anywhere = 1 << 30, HUGE_PAGE, 0
    ctx.until(errno.ESRCH, lambda: ctx.ioctl("WRITEPROTECT", *anywhere, uffd=fd).errno)
    return fd


def _owner_gone(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    child = ctx.fork()
    assert child.uffd is not None
    # If one of these calls leaked a reference, the address space would outlive its process.
    fd = child.uffd.fileno()
    target.expect(0, ctx.page, uffd=fd)
    target.expect(errno.EEXIST, -errno.EEXIST, uffd=fd)
    target.expect(errno.ESRCH, 0, uffd=orphan(ctx, child))


_TOLD = (
    Variant("told", "the result field is -EAGAIN"),
    Variant("untouched", "the result field is not written; only errno is EAGAIN"),
)


@dataclass(frozen=True)
class Condition:
    """What is wrong with a call, and its errno."""

    code: str
    name: str
    text: str
    run: Callable[[Context, Op], None]
    memory: tuple[str, ...] = ALL
    without: tuple[Op, ...] = ()
    extra: Feature = NOTHING
    variants: tuple[Variant, ...] = ()


_CONDITIONS = (
    Condition("ok", "page", "A page is filled, and the result field is its size", _ok),
    Condition(
        "EINVAL",
        "{to}-unaligned",
        "A {to} that is not a multiple of the page size is refused",
        _to_unaligned,
    ),
    Condition(
        "EINVAL",
        "length-unaligned",
        "A len that is not a multiple of the page size is refused",
        _length_unaligned,
    ),
    Condition("EINVAL", "length-zero", "A len of 0 is refused", _length_zero),
    Condition(
        "EINVAL",
        "length-wraps",
        "A range that wraps around the end of all addresses is refused",
        _length_wraps,
    ),
    Condition("EINVAL", "{to}-not-user", "A {to} outside user space is refused", _kernel_address),
    Condition("EINVAL", "mode-unknown", "An unknown mode bit is refused", _mode_unknown),
    Condition(
        "EINVAL",
        "{to}-small-page",
        "A {to} inside a huge page is refused",
        _small_page_to,
        memory=HUGETLB,
    ),
    Condition(
        "EINVAL",
        "length-small-page",
        "A len smaller than a huge page is refused",
        _small_page_length,
        memory=HUGETLB,
    ),
    Condition(
        "ENOENT",
        "unregistered",
        "A range that is not registered is refused",
        _unregistered,
        without=(MOVE,),
    ),
    Condition("ENOENT", "unmapped", "A range that is no longer mapped is refused", _unmapped),
    Condition(
        "ENOENT",
        "past-end",
        "A range whose end is not registered is refused, and nothing is filled",
        _past_end,
        without=(MOVE,),
    ),
    Condition("EEXIST", "present", "A page that is present is not filled again", _present),
    Condition(
        "EAGAIN",
        "partial",
        "If the second page is present, the first is filled and counted",
        _second_present,
    ),
    Condition(
        "EAGAIN",
        "layout-changing",
        "Nothing is filled while a layout event is unread",
        _layout_changing,
        extra=LAYOUT,
        variants=_TOLD,
    ),
    Condition(
        "ESRCH",
        "owner-gone",
        "After the process has ended, nothing can be filled",
        _owner_gone,
        without=(MOVE,),
        extra=Feature.EVENT_FORK,
    ),
)


def _add(op: Op, condition: Condition) -> None:
    memory = tuple(name for name in op.memory if name in condition.memory)
    if op in condition.without or not memory:
        return
    name = condition.name.format(to=op.to)
    case(
        f"UFFDIO_{op.name}.{condition.code}.{name}",
        origin=f"UFFDIO_{op.name}(2const): {condition.code}",
        memory=memory,
        features=lambda kind: op.features(kind) | condition.extra,
        variants=condition.variants,
        summary=condition.text.format(to=op.to),
    )(lambda ctx: condition.run(ctx, op))


for _op in OPS:
    for _condition in _CONDITIONS:
        _add(_op, _condition)


# A call that fails must release its locks: layout changes and others wait for them


def _failures(ctx: Context, op: Op, target: Target) -> list[int]:
    """Make a call for each way to fail, and return their errnos."""
    page = ctx.page
    calls = [(0, page, 0, target.source + page), (2 * page, 2 * page, 0, target.source)]
    if ctx.memory.is_hugetlb:
        calls.append((page, SMALL_PAGE, 0, target.source))
    if op in (COPY, MOVE):
        calls.append((page, page, 0, GAP))
    if op in (COPY, CONTINUE):
        calls.append((page, page, MODE_WP, target.source))
    found = []
    for at, length, mode, source in calls:
        answer = target.call(at=at, length=length, mode=mode, source=source)
        found.append(answer.errno)
    return found


def _add_lets_go(op: Op) -> None:
    def run(ctx: Context) -> None:
        target = Target(ctx, op, 3, registered=2)
        target.expect(0, ctx.page)
        seen = _failures(ctx, op, target)
        ctx.expect("calls that succeeded, of those that must fail", seen.count(0), 0)
        # Each of these waits for a lock that the calls have taken.
        other = ctx.make(1, "anon")
        ctx.uffd.register(other, mode=RegisterMode.MISSING)
        dropping = ctx.start(other.madvise, mmap.MADV_DONTNEED)
        ctx.expect_event(Remove)
        dropping.result()
        protecting = ctx.start(_memory.mprotect, target.start, target.region.length, mmap.PROT_READ)
        protecting.result()

    case(
        f"UFFDIO_{op.name}.ok.lets-go-after-errors",
        summary="Calls that fail release their locks, so that the layout can change",
        origin="mm/userfaultfd.c: up_read(&ctx->map_changing_lock), uffd_mfill_unlock",
        memory=op.memory,
        features=lambda kind: op.features(kind) | LAYOUT,
    )(run)


for _op in OPS:
    _add_lets_go(_op)


# Beyond the end of the file


_PAST_END = (
    Variant("told", "EFAULT, but EINVAL from CONTINUE; no feature bit tells"),
    Variant("otherwise", "ENOMEM from COPY and ZEROPAGE in a shared mapping, EFAULT from CONTINUE"),
)


def _add_past_file_end(op: Op, memory: tuple[str, ...], code: int, other: int) -> None:
    def run(ctx: Context) -> None:
        target = Target(ctx, op)
        assert target.region.fd is not None
        os.ftruncate(target.region.fd, ctx.page)
        answer = target.call(at=ctx.page)
        seen = (answer.errno, answer.result)
        ctx.expect_variant(
            f"errno and result of {op.name}", seen, told=(code, -code), otherwise=(other, -other)
        )
        if op is not CONTINUE:  # CONTINUE finds its first page still in the file
            target.expect(errno.EAGAIN, ctx.page, length=2 * ctx.page)
        ctx.expect_pagemap(target.start + ctx.page, "-----")
        os.ftruncate(target.region.fd, 2 * ctx.page)
        if op is CONTINUE:
            target.expect(errno.EFAULT, -errno.EFAULT, at=ctx.page)
        else:
            target.expect(0, ctx.page, at=ctx.page)

    case(
        f"UFFDIO_{op.name}.{errno.errorcode[code]}.past-file-end",
        origin="mm/userfaultfd.c: mfill_file_over_size",
        memory=memory,
        features=op.features,
        variants=_PAST_END,
        summary="A page beyond the end of the file is not filled; pages before it are counted"
        if op is not CONTINUE
        else "A page beyond the end of the file is not mapped; once the file grows, it is a hole",
    )(run)


_add_past_file_end(COPY, ("shmem", "shmem-private", "hugetlb"), errno.EFAULT, errno.ENOMEM)
_add_past_file_end(ZEROPAGE, ("shmem", "shmem-private"), errno.EFAULT, errno.ENOMEM)
_add_past_file_end(POISON, ("shmem", "shmem-private"), errno.EFAULT, errno.ENOMEM)
_add_past_file_end(CONTINUE, ("shmem", "shmem-private"), errno.EINVAL, errno.EFAULT)
