"""Two userfaultfds of one process: each has its own ranges, messages and events (layer L5)."""

from __future__ import annotations

import errno
import mmap

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd._events import Unmap
from pyuffd._uffd import Userfaultfd
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Child, Context
from pyuffd.conformance._types import ANON, ANY, missing_features
from pyuffd.conformance._wp import MAP_NORESERVE, MISSING_READ, READ_WRITE, expect_fault
from pyuffd.conformance.cases.errno_register import vm_flags
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType

MISSING = RegisterMode.MISSING
FORK = Feature.EVENT_FORK
SYS_MUNMAP = 11
FIRST, SECOND = 0x11, 0x22


def serves(ctx: Context, uffd: Userfaultfd, other: Userfaultfd, at: int, value: int) -> None:
    """Check that a read of a page sends its message to this userfaultfd, not to the other one."""
    reading = ctx.start(ctx.read, at)
    expect_fault(ctx, reading, MISSING_READ, at, uffd)
    ctx.expect_quiet(other)
    uffd.copy(at, bytes([value]) * ctx.page)
    ctx.expect("the byte", reading.result(), bytes([value]))


def neighbours_of_two(ctx: Context) -> tuple[Userfaultfd, Userfaultfd, list[int]]:
    """Return two userfaultfds and four pages of one mapping, two registered with each."""
    region = ctx.make(4)
    first, second = ctx.open(), ctx.open()
    pages = [region.start + index * ctx.page for index in range(4)]
    first.register(pages[0], 2 * ctx.page, mode=MISSING)
    second.register(pages[2], 2 * ctx.page, mode=MISSING)
    return first, second, pages


@case(
    "UFFDIO_REGISTER.ok.neighbours-of-two-descriptors",
    origin="include/linux/userfaultfd_k.h: is_mergeable_vm_userfaultfd_ctx",
    features=missing_features,
)
def neighbours(ctx: Context) -> None:
    """Two userfaultfds may share one mapping; each gets the messages of its own pages."""
    first, second, pages = neighbours_of_two(ctx)
    serves(ctx, first, second, pages[1], FIRST)
    serves(ctx, second, first, pages[2], SECOND)
    first.close()
    reading = ctx.start(ctx.read, pages[0])
    ctx.expect("byte of the first's page after its close", reading.result(), b"\0")
    reading = ctx.start(ctx.read, pages[3])
    expect_fault(ctx, reading, MISSING_READ, pages[3], second)
    second.copy(pages[3], bytes([SECOND]) * ctx.page)
    ctx.expect("the byte", reading.result(), bytes([SECOND]))


@case(
    "UFFDIO_REGISTER.EBUSY.second-part",
    origin="fs/userfaultfd.c: userfaultfd_register",
    features=missing_features,
)
def busy_second(ctx: Context) -> None:
    """If the last part of the range has another userfaultfd, nothing is registered."""
    region = ctx.make(3)
    first, second = ctx.open(), ctx.open()
    second.register(region.start + 2 * ctx.page, ctx.page, mode=MISSING)
    answer = ctx.ioctl("REGISTER", region.start, region.length, MISSING, uffd=first)
    ctx.expect("errno of REGISTER", answer.errno, errno.EBUSY)
    ctx.expect("VmFlags of the first page", vm_flags(region.start), set())
    ctx.expect("the byte", ctx.silently(ctx.read, region.start), b"\0")


# Forks


def _with_fork(memory: MemoryType) -> Feature:
    return missing_features(memory) | FORK


def _forked(ctx: Context, *uffds: Userfaultfd) -> tuple[Child, list[Userfaultfd]]:
    """Fork; return the child and the new userfaultfd of each event."""
    child, found = ctx.fork_with_events(*uffds)
    for uffd in found:
        ctx.callback(uffd.close)
    return child, found


@case(
    "fork-descriptor.two.own-events",
    origin="fs/userfaultfd.c: dup_userfaultfd",
    features=_with_fork,
)
def own_events(ctx: Context) -> None:
    """A fork sends an event to each of two userfaultfds; each new one has its own ranges."""
    region = ctx.make(4)
    first, second = ctx.open(), ctx.open()
    pages = [region.start + index * ctx.page for index in range(4)]
    # Alternate, so that each has two mappings.
    for index, uffd in enumerate((first, second, first, second)):
        uffd.register(pages[index], ctx.page, mode=MISSING)
    child, found = _forked(ctx, first, second)
    for index, value in enumerate((FIRST, SECOND)):
        own, other = found[index], found[1 - index]
        for at in (pages[index], pages[index + 2]):
            reading = ctx.start(child.read, at, 1)
            expect_fault(ctx, reading, MISSING_READ, at, own)
            ctx.expect_quiet(other)
            own.copy(at, bytes([value]) * ctx.page)
            ctx.expect("byte in the child", reading.result(), bytes([value]))
    ctx.expect_quiet(first)
    ctx.expect_quiet(second)


@case(
    "fork-descriptor.two.one-without-event",
    origin="fs/userfaultfd.c: dup_userfaultfd",
    features=_with_fork,
)
def one_without(ctx: Context) -> None:
    """In the child, only ranges of a userfaultfd with EVENT_FORK are registered."""
    region = ctx.make(2)
    first, second = ctx.open(), ctx.open(missing_features(ctx.memory))
    pages = [region.start, region.start + ctx.page]
    first.register(pages[0], ctx.page, mode=MISSING)
    second.register(pages[1], ctx.page, mode=MISSING)
    child, (own,) = _forked(ctx, first)
    ctx.expect("byte of the page without EVENT_FORK", ctx.silently(child.read, pages[1], 1), b"\0")
    reading = ctx.start(child.read, pages[0], 1)
    expect_fault(ctx, reading, MISSING_READ, pages[0], own)
    own.copy(pages[0], bytes([FIRST]) * ctx.page)
    ctx.expect("byte in the child", reading.result(), bytes([FIRST]))


@case("fork.ok.dontfork", origin="fs/userfaultfd.c: dup_userfaultfd", features=_with_fork)
def dontfork(ctx: Context) -> None:
    """A fork that copies no registered mapping (MADV_DONTFORK) sends no event."""
    region = ctx.make(1)
    region.madvise(mmap.MADV_DONTFORK)
    ctx.register(region, MISSING)
    ctx.fork_only()
    ctx.expect_quiet()
    reading = ctx.start(ctx.read, region.start)
    ctx.expect_fault(MISSING_READ, region.start)
    ctx.uffd.copy(region.start, bytes([FIRST]) * ctx.page)
    ctx.expect("the byte", reading.result(), bytes([FIRST]))


# Unmapping


@case(
    "event.munmap-two-descriptors.unmap-each",
    origin="fs/userfaultfd.c: has_unmap_ctx",
    memory=ANON,
    features=Feature.EVENT_UNMAP,
)
def unmap_each(ctx: Context) -> None:
    """munmap(2) of ranges of two userfaultfds sends one event to each, with the whole range."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    start = _memory.mmap(4 * SMALL_PAGE, READ_WRITE, flags)
    first, second = ctx.open(), ctx.open()
    for index, uffd in enumerate((first, second, first, second)):
        uffd.register(start + index * SMALL_PAGE, SMALL_PAGE, mode=MISSING)
    unmapping = ctx.start(_memory.munmap, start, 4 * SMALL_PAGE)
    readers = [ctx.start(ctx.expect_event, Unmap, uffd) for uffd in (first, second)]
    for reader in readers:
        ctx.expect("the event", reader.result(), Unmap(start, start + 4 * SMALL_PAGE))
    unmapping.result()
    ctx.expect_quiet(first)
    ctx.expect_quiet(second)


@case(
    "event.munmap-twice.unmap-each",
    origin="fs/userfaultfd.c: has_unmap_ctx",
    memory=ANY,
    features=Feature.EVENT_UNMAP | FORK,
)
def unmap_parts(ctx: Context) -> None:
    """Two calls of munmap send two events, each with its own range."""
    region = ctx.make(3, "anon")
    ctx.register(region, MISSING)
    child = ctx.fork()
    assert child.uffd is not None
    for index in (0, 2):
        at = region.start + index * SMALL_PAGE
        unmapping = ctx.start(child.syscall, SYS_MUNMAP, at, SMALL_PAGE)
        event = ctx.expect_event(Unmap, child.uffd)
        ctx.expect("the event", event, Unmap(at, at + SMALL_PAGE))
        ctx.expect("munmap", unmapping.result(), 0)
    # The rest can be filled again.
    middle = region.start + SMALL_PAGE
    reading = ctx.start(child.read, middle, 1)
    expect_fault(ctx, reading, MISSING_READ, middle, child.uffd)
    child.uffd.copy(middle, bytes([FIRST]) * SMALL_PAGE)
    ctx.expect("byte in the child", reading.result(), bytes([FIRST]))
