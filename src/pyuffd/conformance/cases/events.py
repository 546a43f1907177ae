"""Layout events: which events each call sends, and that it waits until they are read (layer L5).

A forked child makes the calls, on ranges of the userfaultfd that the Fork event brought. In this
process, another thread could map something in the hole that a call leaves.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyuffd._abi import Feature, RegisterMode
from pyuffd._events import Remap, Remove, Unmap
from pyuffd._uffd import Event, Fork, Userfaultfd
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Access, Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import ALL, FILE, missing_features
from pyuffd.regions import Region
from pyuffd.testing._memory_types import MemoryType

SYS_MMAP, SYS_MPROTECT, SYS_MUNMAP, SYS_BRK, SYS_MREMAP, SYS_MADVISE = 9, 10, 11, 12, 25, 28
SYS_FTRUNCATE, SYS_FALLOCATE = 77, 285
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
FIXED_ANONYMOUS = 0x10 | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MADV_FREE, MADV_COLD, MADV_PAGEOUT = 8, 20, 21
MADV_DONTNEED_LOCKED, MADV_GUARD_INSTALL = 24, 102
PUNCH_HOLE = 3  # with KEEP_SIZE
ALL_EVENTS = Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
NO_DESCRIPTOR = (1 << 64) - 1
SLEEPING = "D"
ORIGIN = "userfaultfd(2): Reading from the userfaultfd structure"

FORK = Feature.EVENT_FORK
NEITHER = (False, False)

# The errno of a call, 0 for success, and the events that it sends, in order.
Outcome = tuple[int, list[Event]]


@dataclass(frozen=True)
class Action:
    """A call on the first page of a region.

    Attributes:
        name: The call.
        text: What it does, for the summary.
        call: System call number and arguments, given the region and another one.
        outcome: Its errno and events.
        memory: The memory types that it supports.
        sends: The events that it sends on success, for the case's id.
        by_descriptor: It acts on the file, not on the mapping.
        left: The page that other calls use meanwhile, which is still registered afterwards.
        variants: The accepted outcomes, if there are several.
    """

    name: str
    text: str
    call: Callable[[Region, Region], tuple[int, ...]]
    outcome: Callable[[MemoryType, Region, Region], Outcome]
    sends: str = "none"
    memory: tuple[str, ...] = ALL
    by_descriptor: bool = False
    variants: tuple[Variant, ...] = ()
    left: int = 1


def _advice(advice: int) -> Callable[[Region, Region], tuple[int, ...]]:
    return lambda region, _: (SYS_MADVISE, region.start, region.page_size, advice)


def _removed(region: Region) -> list[Event]:
    return [Remove(region.start, region.start + region.page_size)]


def _unmapped(region: Region) -> list[Event]:
    return [Unmap(region.start, region.start + region.page_size)]


def _second_to(region: Region, pages: int) -> Event:
    """Return the event of unmapping the second page and those after it, up to this many pages."""
    return Unmap(region.start + region.page_size, region.start + pages * region.page_size)


def _remove(memory: MemoryType, region: Region, _: Region) -> Outcome:
    if memory.is_anon:
        return errno.EINVAL, []
    return (0, _removed(region)) if memory.shared else (errno.EACCES, [])


def _free(memory: MemoryType, region: Region, _: Region) -> Outcome:
    if memory.is_hugetlb:
        return errno.EINVAL, []
    # On file memory the call sends its event and then fails; the pages are still present.
    return (0 if memory.is_anon else errno.EINVAL), _removed(region)


def _not_hugetlb(memory: MemoryType, _region: Region, _other: Region) -> Outcome:
    return (errno.EINVAL if memory.is_hugetlb else 0), []


def _nothing(_memory: MemoryType, _region: Region, _other: Region) -> Outcome:
    return 0, []


def _remap(_: MemoryType, region: Region, other: Region) -> Outcome:
    moved = Remap(region.start, other.start, region.page_size)
    return 0, [moved, *_unmapped(region)]


USUAL = Variant("usual", "as the manual page says")
# No feature bit tells whether hugetlb supports a call; this one came in that release or the next.
OLD_HUGETLB = (
    USUAL,
    Variant("refused", "EINVAL on hugetlb, and no event", lacks=Feature.WP_HUGETLBFS_SHMEM),
)
ACTIONS = (
    Action(
        "MADV_DONTNEED",
        "drops a page",
        _advice(mmap.MADV_DONTNEED),
        lambda _, region, __: (0, _removed(region)),
        sends="remove",
        variants=OLD_HUGETLB,
    ),
    Action(
        "MADV_DONTNEED_LOCKED",
        "drops a page, mlocked or not",
        _advice(MADV_DONTNEED_LOCKED),
        lambda _, region, __: (0, _removed(region)),
        sends="remove",
        variants=(USUAL, Variant("refused", "EINVAL on kernels without this advice, and no event")),
    ),
    Action("MADV_REMOVE", "drops a page of the file", _advice(mmap.MADV_REMOVE), _remove, "remove"),
    Action(
        "MADV_FREE",
        "lets reclaim drop a page",
        _advice(MADV_FREE),
        _free,
        sends="remove",
        variants=(USUAL, Variant("refused", "EINVAL on file memory, and no event")),
    ),
    Action("MADV_COLD", "keeps the page", _advice(MADV_COLD), _not_hugetlb),
    Action("MADV_PAGEOUT", "keeps the content", _advice(MADV_PAGEOUT), _not_hugetlb),
    Action(
        "MADV_GUARD_INSTALL",
        "makes a guard page",
        _advice(MADV_GUARD_INSTALL),
        _not_hugetlb,
        variants=(
            USUAL,
            Variant("refused", "EINVAL if the kernel lacks this advice for the memory type"),
        ),
    ),
    Action(
        "PUNCH_HOLE",
        "drops a page through the file descriptor",
        lambda region, _: (SYS_FALLOCATE, _fd(region), PUNCH_HOLE, 0, region.page_size),
        _nothing,
        memory=FILE,
        by_descriptor=True,
    ),
    Action(
        "ftruncate",
        "truncates the file through its descriptor",
        lambda region, _: (SYS_FTRUNCATE, _fd(region), 0),
        _nothing,
        memory=FILE,
        by_descriptor=True,
    ),
    Action(
        "mprotect",
        "changes the protection",
        lambda region, _: (SYS_MPROTECT, region.start, region.page_size, mmap.PROT_READ),
        _nothing,
    ),
    Action(
        "munmap",
        "unmaps a page",
        lambda region, _: (SYS_MUNMAP, region.start, region.page_size),
        lambda _, region, __: (0, _unmapped(region)),
        sends="unmap",
    ),
    Action(
        "mmap-fixed",
        "replaces a mapping by another",
        lambda region, _: (
            SYS_MMAP,
            region.start,
            region.page_size,
            mmap.PROT_READ,
            FIXED_ANONYMOUS,
            NO_DESCRIPTOR,
            0,
        ),
        lambda _, region, __: (0, _unmapped(region)),
        sends="unmap",
    ),
    Action(
        "mremap",
        "moves the mapping",
        lambda region, other: (
            SYS_MREMAP,
            region.start,
            region.page_size,
            region.page_size,
            MREMAP_MAYMOVE | MREMAP_FIXED,
            other.start,
        ),
        _remap,
        sends="remap-unmap",
        variants=OLD_HUGETLB,
    ),
    Action(
        "munmap-more",
        "unmaps two mappings, one of them registered",
        lambda region, _: (SYS_MUNMAP, region.start + region.page_size, 2 * region.page_size),
        lambda _, region, __: (0, [_second_to(region, 3)]),
        sends="unmap",
        left=0,
    ),
    Action(
        "mremap-onto",
        "moves another mapping onto a registered one",
        lambda region, other: (
            SYS_MREMAP,
            other.start,
            region.page_size,
            region.page_size,
            MREMAP_MAYMOVE | MREMAP_FIXED,
            region.start,
        ),
        lambda _, region, __: (0, _unmapped(region)),
        sends="unmap",
        variants=OLD_HUGETLB,
    ),
    Action(
        "mremap-shrink",
        "shrinks the mapping",
        lambda region, _: (SYS_MREMAP, region.start, 2 * region.page_size, region.page_size, 0),
        lambda _, region, __: (0, [_second_to(region, 2)]),
        sends="unmap",
        left=0,
        variants=OLD_HUGETLB,
    ),
)


def _fd(region: Region) -> int:
    assert region.fd is not None
    return region.fd


def expect_asleep(ctx: Context, thread_id: int, process: int | None = None) -> None:
    """Wait until a thread sleeps uninterruptibly."""
    deadline = time.monotonic() + WAIT_S
    path = Path(f"/proc/{process or os.getpid()}/task/{thread_id}/stat")
    while (state := path.read_text().rpartition(")")[2].split()[0]) != SLEEPING:
        if time.monotonic() > deadline:
            ctx.fail("state of the thread whose event is unread", state, SLEEPING)
        os.sched_yield()


def _meanwhile(ctx: Context, page: int, uffd: Userfaultfd) -> None:
    """Check that REGISTER and WAKE work while the event is unread, and that COPY does not."""
    source = ctx.make(ctx.page // 4096, "anon")
    answer = ctx.ioctl("COPY", page, source.start, ctx.page, uffd=uffd)
    ctx.expect("errno of COPY", answer.errno, errno.EAGAIN)
    answer = ctx.ioctl("REGISTER", page, ctx.page, RegisterMode.MISSING, uffd=uffd)
    ctx.expect("errno of REGISTER", answer.errno, 0)
    ctx.expect("errno of WAKE", ctx.ioctl("WAKE", page, ctx.page, uffd=uffd).errno, 0)


def _observe(ctx: Context, action: Action, region: Region, other: Region) -> Outcome:
    """Make the call, and read one by one the events that it waits for."""
    child = ctx.fork()
    assert child.uffd is not None
    # The child has no descriptors. A call through one does not change the address space.
    uffd = ctx.uffd if action.by_descriptor else child.uffd
    call = syscall if action.by_descriptor else child.syscall
    access = ctx.start(call, *action.call(region, other))
    left = region.start + action.left * ctx.page
    events = _read_all(ctx, access, uffd, left, None if action.by_descriptor else child.pid)
    ctx.expect_quiet(child.uffd)
    # mmap and mremap return addresses.
    code = max(-access.result(), 0)
    if events:
        # The call has returned, so the layout change is over.
        answer = ctx.ioctl("POISON", left, ctx.page, uffd=uffd)
        ctx.expect("whether POISON is EAGAIN afterwards", answer.errno == errno.EAGAIN, False)
    return code, events


def _read_all(
    ctx: Context, access: Access[int], uffd: Userfaultfd, left: int, process: int | None
) -> list[Event]:
    """Read the events of a call until it returns; its thread must sleep before each is read."""
    events: list[Event] = []
    while True:
        ready, _, _ = select.select([uffd.fileno(), access.fileno()], [], [], WAIT_S)
        if uffd.fileno() in ready:
            expect_asleep(ctx, process or access.thread_id, process)
            ctx.expect("whether the call returned before its event was read", access.done, False)
            if not events:
                _meanwhile(ctx, left, uffd)
            events += uffd.read_events(1)
        elif ready:
            return events
        else:
            ctx.fail("the call", f"neither an event nor its end in {WAIT_S:g} s", "one of them")


def _with(extra: Feature) -> Callable[[MemoryType], Feature]:
    return lambda memory: missing_features(memory) | Feature.EVENT_FORK | extra


def _add(action: Action) -> None:
    def on(ctx: Context) -> None:
        region, other = ctx.make(3), ctx.make(1)
        ctx.register(region, RegisterMode.MISSING, 2)
        seen = _observe(ctx, action, region, other)
        wanted = action.outcome(ctx.memory, region, other)
        if not action.variants:
            ctx.expect("errno and events", seen, wanted)
            return
        ctx.expect_variant("errno and events", seen, usual=wanted, refused=(errno.EINVAL, []))

    def off(ctx: Context) -> None:
        region, other = ctx.make(3), ctx.make(1)
        ctx.register(region, RegisterMode.MISSING, 2)
        child = ctx.fork()
        assert child.uffd is not None
        access = ctx.start(child.syscall, *action.call(region, other))
        seen = max(-access.result(), 0)
        wanted, _ = action.outcome(ctx.memory, region, other)
        if action.variants:
            ctx.expect_variant("errno of the call", seen, usual=wanted, refused=errno.EINVAL)
        else:
            ctx.expect("errno of the call", seen, wanted)
        ctx.expect_quiet(child.uffd)

    sends = action.sends
    case(
        f"event.{action.name}.{sends}",
        origin=ORIGIN,
        memory=action.memory,
        features=_with(ALL_EVENTS),
        variants=action.variants,
        summary=f"{action.name}: {action.text}"
        + ("; the call waits until each event is read" if sends != "none" else "; no event"),
    )(on)
    if sends != "none":
        case(
            f"event.{action.name}.off",
            origin=ORIGIN,
            memory=action.memory,
            features=_with(Feature(0)),
            variants=action.variants,
            summary=f"{action.name} sends no event and does not wait if the feature is not enabled",
        )(off)


for _action in ACTIONS:
    _add(_action)


@case(
    "event.brk.unmap",
    origin=ORIGIN,
    memory=("anon",),
    features=FORK | Feature.EVENT_UNMAP,
)
def brk(ctx: Context) -> None:
    """brk: unmaps the end of the heap; the call waits until the event is read."""
    # A fork sends an event only if something is registered.
    ctx.register(ctx.make(1), RegisterMode.MISSING)
    child = ctx.fork()
    assert child.uffd is not None
    # brk(2) takes any byte as the end, and maps whole pages.
    old = child.syscall(SYS_BRK, 0)
    start = -(-old // ctx.page) * ctx.page
    end = start + 2 * ctx.page
    ctx.expect("brk up", child.syscall(SYS_BRK, end), end)
    child.uffd.register(start, 2 * ctx.page, mode=RegisterMode.MISSING)
    access = ctx.start(child.syscall, SYS_BRK, start + ctx.page)
    events = _read_all(ctx, access, child.uffd, start, child.pid)
    wanted = [Unmap(start + ctx.page, end)]
    ctx.expect(
        "new end of the heap, and events", (access.result(), events), (start + ctx.page, wanted)
    )
    ctx.expect_quiet(child.uffd)


@case("event.fork.fork", origin=ORIGIN, features=lambda kind: missing_features(kind) | FORK)
def fork(ctx: Context) -> None:
    """A fork waits until its event is read; the event has a userfaultfd for the child's ranges."""
    region = ctx.make(2)
    ctx.register(region, RegisterMode.MISSING)
    forking = threading.get_native_id()

    def receive() -> Event:
        ctx.wait_readable()
        expect_asleep(ctx, forking)
        _meanwhile(ctx, region.start, ctx.uffd)
        return ctx.uffd.read_events(1)[0]

    received = ctx.start(receive)
    child = ctx.fork_only()
    event = received.result()
    if not isinstance(event, Fork):
        ctx.fail("the event of the fork", event, "Fork")
    child.uffd = event.uffd
    fd = event.uffd.fileno()
    ctx.expect("O_NONBLOCK and FD_CLOEXEC", (os.get_blocking(fd), os.get_inheritable(fd)), NEITHER)
    reading = ctx.start(child.read, region.start, 1)
    ctx.expect_fault(0, region.start, event.uffd)
    event.uffd.copy(region.start, b"\7" * ctx.page)
    ctx.expect("byte in the child", reading.result(), b"\7")
    ctx.expect_quiet()
    # The parent's pages can be filled again, too.
    at = region.start + ctx.page
    ctx.expect("bytes filled", ctx.uffd.copy(at, b"\6" * ctx.page), ctx.page)


@case("event.fork.off", origin=ORIGIN, features=missing_features)
def fork_off(ctx: Context) -> None:
    """Without EVENT_FORK the child's memory is not registered."""
    region = ctx.make(1)
    ctx.register(region, RegisterMode.MISSING)
    child = ctx.fork()
    ctx.expect("byte in the child", ctx.silently(child.read, region.start, 1), b"\0")
