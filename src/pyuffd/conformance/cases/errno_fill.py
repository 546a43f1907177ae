"""What the ioctls that fill pages refuse, and what they say of how far they came (layer L5).

UFFDIO_COPY, ZEROPAGE, MOVE, CONTINUE and POISON check most things alike, so they share one table
of conditions; `result` is the field that the kernel leaves its count or error in.  ENOMEM has its
own module, `errno_memory`.
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
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType

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
        memory: What it works on.
        mode: The register mode whose faults it resolves.
        features: What the kernel must have for it.
        words: Its argument, of destination, source, length and mode.
        to: What its manual page calls the destination.
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
    """Return the argument of the others."""
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
    """A region registered for an ioctl, a source for it, and the page cache it may need."""

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
        """Make the ioctl at an offset, for one page unless told otherwise."""
        words = self._op.words(
            self.start + at,
            self.source + at if source is None else source,
            self.page if length is None else length,
            mode,
        )
        return self._ctx.ioctl(self._op.name, *words, uffd=uffd)

    def expect(self, code: int, result: int, **call: int) -> None:
        """Make the ioctl; it must give this errno and this result field."""
        answer = self.call(**call)
        self._ctx.expect("errno and result", (answer.errno, answer.result), (code, result))


def fill_file(ctx: Context, region: Region, pages: int | None = None) -> None:
    """Put data into the file behind a region, and nothing into its page table."""
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
    ctx.expect("bytes", seen, bytes(8) if op is ZEROPAGE else DATA * 8)


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
    # Another region than the target: it is the address space that must not change.
    other = ctx.make(1, "anon")
    ctx.register(other, RegisterMode.MISSING)
    dropping = ctx.start(other.madvise, mmap.MADV_DONTNEED)
    ctx.wait_readable()
    answer = target.call()
    ctx.expect("errno", answer.errno, errno.EAGAIN)
    ctx.expect_variant("result", answer.result, told=-errno.EAGAIN, untouched=0)
    ctx.expect("the call that waits is over", dropping.done, False)
    ctx.expect_event(Remove)
    dropping.result()
    # Its thread runs again before it has taken the mark off.
    for _ in range(1000):
        answer = target.call()
        if answer.errno != errno.EAGAIN:
            break
        os.sched_yield()
    ctx.expect("errno and result afterwards", (answer.errno, answer.result), (0, ctx.page))


def orphan(ctx: Context, child: Child) -> int:
    """End a child and return a descriptor of its userfaultfd, which closes with the case."""
    assert child.uffd is not None
    fd = os.dup(child.uffd.fileno())
    ctx.callback(os.close, fd)
    child.close()
    return fd


def _owner_gone(ctx: Context, op: Op) -> None:
    target = Target(ctx, op)
    child = ctx.fork()
    assert child.uffd is not None
    # Neither a call that works nor one that fails may keep its memory when it has ended.
    fd = child.uffd.fileno()
    target.expect(0, ctx.page, uffd=fd)
    target.expect(errno.EEXIST, -errno.EEXIST, uffd=fd)
    target.expect(errno.ESRCH, 0, uffd=orphan(ctx, child))


_TOLD = (
    Variant("told", "the result field is -EAGAIN"),
    Variant("untouched", "the result field is as it was; errno says it all the same"),
)


@dataclass(frozen=True)
class Condition:
    """What is wrong with a call, and the errno that says so."""

    code: str
    name: str
    text: str
    run: Callable[[Context, Op], None]
    memory: tuple[str, ...] = ALL
    without: tuple[Op, ...] = ()
    extra: Feature = NOTHING
    variants: tuple[Variant, ...] = ()


_CONDITIONS = (
    Condition("ok", "page", "A page is filled, and the result field says so", _ok),
    Condition("EINVAL", "{to}-unaligned", "{to} is not a multiple of the page size", _to_unaligned),
    Condition(
        "EINVAL", "length-unaligned", "len is not a multiple of the page size", _length_unaligned
    ),
    Condition("EINVAL", "length-zero", "len is 0", _length_zero),
    Condition("EINVAL", "length-wraps", "The range passes the end of all addresses", _length_wraps),
    Condition("EINVAL", "{to}-not-user", "{to} is no address of user space", _kernel_address),
    Condition("EINVAL", "mode-unknown", "A mode bit is unknown", _mode_unknown),
    Condition(
        "EINVAL", "{to}-small-page", "{to} is inside a huge page", _small_page_to, memory=HUGETLB
    ),
    Condition(
        "EINVAL",
        "length-small-page",
        "len is less than a huge page",
        _small_page_length,
        memory=HUGETLB,
    ),
    Condition(
        "ENOENT", "unregistered", "The range is not registered", _unregistered, without=(MOVE,)
    ),
    Condition("ENOENT", "unmapped", "The range is not mapped any more", _unmapped),
    Condition(
        "ENOENT",
        "past-end",
        "The end is not registered: nothing is filled",
        _past_end,
        without=(MOVE,),
    ),
    Condition("EEXIST", "present", "The page is there", _present),
    Condition(
        "EAGAIN", "partial", "The second page is there: the first is counted", _second_present
    ),
    Condition(
        "EAGAIN",
        "layout-changing",
        "A layout event is unread: nothing is filled until it is",
        _layout_changing,
        extra=LAYOUT,
        variants=_TOLD,
    ),
    Condition(
        "ESRCH",
        "owner-gone",
        "The process has ended",
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


# What a call that fails must have let go of: the locks that layout changes, and others, wait for


def _failures(ctx: Context, op: Op, target: Target) -> list[int]:
    """Make calls that fail in as many ways as there are; return their errnos."""
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
        ctx.expect("calls that succeed", seen.count(0), 0)
        # Each of these waits for a lock that the calls have held.
        other = ctx.make(1, "anon")
        ctx.uffd.register(other, mode=RegisterMode.MISSING)
        dropping = ctx.start(other.madvise, mmap.MADV_DONTNEED)
        ctx.expect_event(Remove)
        dropping.result()
        protecting = ctx.start(_memory.mprotect, target.start, target.region.length, mmap.PROT_READ)
        protecting.result()

    case(
        f"UFFDIO_{op.name}.ok.lets-go-after-errors",
        summary="After calls that fail in every way the layout can change, which waits for locks",
        origin="mm/userfaultfd.c: up_read(&ctx->map_changing_lock), uffd_mfill_unlock",
        memory=op.memory,
        features=lambda kind: op.features(kind) | LAYOUT,
    )(run)


for _op in OPS:
    _add_lets_go(_op)


# Beyond the end of the file


_PAST_END = (
    Variant("told", "EFAULT of what fills, EINVAL of CONTINUE; no feature bit tells"),
    Variant("otherwise", "ENOMEM of COPY and ZEROPAGE into a shared file, EFAULT of CONTINUE"),
)


def _add_past_file_end(op: Op, memory: tuple[str, ...], code: int, other: int) -> None:
    def run(ctx: Context) -> None:
        target = Target(ctx, op)
        assert target.region.fd is not None
        os.ftruncate(target.region.fd, ctx.page)
        answer = target.call(at=ctx.page)
        seen = (answer.errno, answer.result)
        ctx.expect_variant("errno and result", seen, told=(code, -code), otherwise=(other, -other))
        if op is not CONTINUE:  # whose first page the truncation has left in the file
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
        summary="The file ends before the page: nothing is filled, and what is before is counted"
        if op is not CONTINUE
        else "The file ends before the page: nothing is mapped, and a hole it grows is EFAULT",
    )(run)


_add_past_file_end(COPY, ("shmem", "shmem-private", "hugetlb"), errno.EFAULT, errno.ENOMEM)
_add_past_file_end(ZEROPAGE, ("shmem", "shmem-private"), errno.EFAULT, errno.ENOMEM)
_add_past_file_end(POISON, ("shmem", "shmem-private"), errno.EFAULT, errno.ENOMEM)
_add_past_file_end(CONTINUE, ("shmem", "shmem-private"), errno.EINVAL, errno.EFAULT)
