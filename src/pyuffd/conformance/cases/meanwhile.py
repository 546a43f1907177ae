"""Changes while a thread waits for a fault, or COPY for its source; two unread events (layer L5).

A thread that waits holds no lock, so the kernel must repeat its checks afterwards.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode, WriteprotectMode
from pyuffd._events import Pagefault, Remove
from pyuffd._memory import Interrupted
from pyuffd.conformance import _raw
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Access, Context
from pyuffd.conformance._starve import small_file_system
from pyuffd.conformance._types import (
    ALL,
    ANY,
    FILE,
    HUGETLB,
    SHARED,
    minor_features,
    missing_features,
    missing_wp_features,
)
from pyuffd.conformance._wp import (
    DATA,
    IN_FILE,
    MAP_NORESERVE,
    MISSING_READ,
    MISSING_WRITE,
    PUNCH_HOLE,
    READ_WRITE,
    WRITTEN,
    expect_fault,
    in_page_cache,
)
from pyuffd.conformance.cases.errno_fill import OPS, Target
from pyuffd.conformance.cases.events import expect_asleep
from pyuffd.conformance.cases.reading import wait_pending
from pyuffd.conformance.cases.waiters import MINOR_READ
from pyuffd.regions import Region
from pyuffd.testing._memory_types import SMALL_PAGE, MemoryType
from pyuffd.testing._need import needs_kernel_faults, needs_privilege

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
MAP_FIXED = 0x10
SIGBUS, SIGSEGV = 7, 11
WAITER = "fs/userfaultfd.c: handle_userfault, VM_FAULT_RETRY"
RETRY = "mm/userfaultfd.c: mfill_atomic, retry"


def _replace(region: Region) -> None:
    """Map other memory, which is not registered, over a region."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    _memory.mmap(region.length, READ_WRITE, flags, -1, 0, region.start)


def _truncate(region: Region) -> None:
    assert region.fd is not None
    os.ftruncate(region.fd, 0)


# A thread that waits for a fault, and is woken without its page


@dataclass(frozen=True)
class Change:
    """A change of the mapping in which a thread waits, and the result of the thread's access.

    `wanted` is the byte that it reads, None if its write succeeds, or the number of its signal.
    """

    name: str
    text: str
    memory: tuple[str, ...]
    act: Callable[[Region], None]
    wanted: int | bytes | None
    writes: bool = False


def _protection(protection: int) -> Callable[[Region], None]:
    return lambda region: _memory.mprotect(region.start, region.length, protection)


CHANGES = (
    Change("truncated", "for its page, and the file is truncated: SIGBUS", FILE, _truncate, SIGBUS),
    Change(
        "no-access",
        "for its page, and mprotect(2) removes all access: SIGSEGV",
        ALL,
        _protection(0),
        SIGSEGV,
    ),
    Change(
        "read-only",
        "to write, and mprotect(2) makes its page read-only: SIGSEGV",
        ALL,
        _protection(mmap.PROT_READ),
        SIGSEGV,
        writes=True,
    ),
    Change(
        "replaced",
        "for its page, and other memory is mapped there: it reads that",
        ALL,
        _replace,
        b"\0",
    ),
    Change(
        "replaced-for-write",
        "to write, and other memory is mapped there: it writes to that",
        ALL,
        _replace,
        None,
        writes=True,
    ),
    Change(
        "in-file",
        "for its page, and the page is written to the file: it reads that",
        FILE,
        lambda region: in_page_cache(region, IN_FILE),
        bytes([IN_FILE]),
    ),
)


def _add_change(change: Change) -> None:
    def run(ctx: Context) -> None:
        region = ctx.make(1)
        ctx.register(region, MISSING)
        flags = MISSING_WRITE if change.writes else MISSING_READ
        access: Access[Any] = (
            ctx.start(ctx.write, region.start, bytes([WRITTEN]))
            if change.writes
            else ctx.start(ctx.read, region.start)
        )
        expect_fault(ctx, access, flags, region.start)
        change.act(region)
        ctx.expect("whether the access returned before UFFDIO_WAKE", access.done, False)
        ctx.uffd.wake(region)
        seen = access.result()
        met = seen.number if isinstance(seen, Interrupted) else seen
        ctx.expect("result of the access after UFFDIO_WAKE", met, change.wanted)
        ctx.expect_quiet()

    case(
        f"fault.meanwhile.{change.name}",
        summary=f"A thread waits {change.text}",
        origin=WAITER,
        memory=change.memory,
        features=missing_features,
    )(run)


for _change in CHANGES:
    _add_change(_change)


@case(
    "fault.meanwhile.punched",
    origin="mm/shmem.c: shmem_get_folio_gfp; mm/hugetlb.c: hugetlb_no_page",
    memory=FILE,
    features=lambda memory: missing_features(memory) | minor_features(memory),
)
def punched(ctx: Context) -> None:
    """A thread waits for a minor fault; its page is punched out: woken, it has a missing fault."""
    region = ctx.make(1)
    assert region.fd is not None
    in_page_cache(region, IN_FILE)
    ctx.register(region, MISSING | MINOR)
    reading = ctx.start(ctx.read, region.start)
    expect_fault(ctx, reading, MINOR_READ, region.start)
    _memory.fallocate(region.fd, PUNCH_HOLE, 0, region.length)
    answer = ctx.ioctl("CONTINUE", region.start, ctx.page)
    ctx.expect("errno of CONTINUE", answer.errno, errno.EFAULT)
    ctx.uffd.wake(region)
    expect_fault(ctx, reading, MISSING_READ, region.start)
    ctx.uffd.copy(region.start, bytes([DATA]) * ctx.page)
    ctx.expect("the byte", reading.result(), bytes([DATA]))
    ctx.expect_quiet()


# A COPY that waits for its source


@dataclass(frozen=True)
class Turn:
    """A change of the destination of a COPY that waits for its source, and the COPY's errno."""

    name: str
    text: str
    code: int
    act: Callable[[Context, Region, int], None]
    memory: tuple[str, ...] = ALL


def _unregister(ctx: Context, region: Region, _: int) -> None:
    ctx.uffd.unregister(region)


def _replace_and_register(ctx: Context, region: Region, _: int) -> None:
    _replace(region)
    ctx.uffd.register(region.start, region.length, mode=MISSING)


def _fill(ctx: Context, region: Region, at: int) -> None:
    ctx.uffd.copy(region.start + at, bytes([WRITTEN]) * ctx.page)


def _fill_file(ctx: Context, region: Region, at: int) -> None:
    assert region.fd is not None
    with Region.file(region.fd, region.length) as view:
        view.fill(WRITTEN, at, ctx.page)


def _begin_event(ctx: Context, _: Region, __: int) -> None:
    other = ctx.make(1, "anon")
    ctx.uffd.register(other, mode=MISSING)
    dropping = ctx.start(other.madvise, mmap.MADV_DONTNEED)
    ctx.wait_readable()
    ctx.note(f"whether madvise returned before its event was read: {dropping.done}")


TURNS = (
    Turn(
        "unmapped",
        "other memory is mapped at its destination",
        errno.ENOENT,
        lambda _, region, __: _replace(region),
    ),
    Turn("unregistered", "its destination is unregistered", errno.ENOENT, _unregister),
    Turn(
        "other-kind",
        "small pages are mapped and registered at its destination",
        errno.ENOENT,
        _replace_and_register,
        HUGETLB,
    ),
    Turn("filled", "its page is filled", errno.EEXIST, _fill),
    Turn("in-file", "its page is written to the file", errno.EEXIST, _fill_file, SHARED),
    Turn("layout-changing", "a layout change begins", errno.EAGAIN, _begin_event),
    Turn(
        "truncated",
        "the file is truncated",
        errno.EFAULT,
        lambda _, region, __: _truncate(region),
        ("shmem", "shmem-private", "hugetlb"),
    ),
)


def _copy_that_waits(
    ctx: Context, start: int, pages: int, mode: int = 0
) -> tuple[Access[_raw.Answer], Callable[[], None]]:
    """Begin a COPY whose last source page is missing; return it, and a call that fills the page."""
    length = pages * ctx.page
    source = ctx.make(length // SMALL_PAGE, "anon")
    source.advise_thp(False)
    other = ctx.open(Feature(0))
    other.register(source, mode=MISSING)
    last = source.start + length - SMALL_PAGE
    if length > SMALL_PAGE:
        other.copy(source.start, bytes([DATA]) * (length - SMALL_PAGE))
    copying = ctx.start(ctx.ioctl, "COPY", start, source.start, length, mode)
    expect_fault(ctx, copying, MISSING_READ, last, other)
    return copying, lambda: _bring(other, last)


def _bring(other: Any, at: int) -> None:
    other.copy(at, bytes([DATA]) * SMALL_PAGE)


def _add_turn(turn: Turn) -> None:
    def once(ctx: Context, pages: int) -> None:
        region = ctx.make(pages)
        ctx.register(region, MISSING)
        copying, bring = _copy_that_waits(ctx, region.start, pages)
        turn.act(ctx, region, (pages - 1) * ctx.page)
        bring()
        answer = copying.result()
        # A page that was copied before is counted.
        wanted = (turn.code, -turn.code) if pages == 1 else (errno.EAGAIN, (pages - 1) * ctx.page)
        ctx.expect("errno and .copy", (answer.errno, answer.result), wanted)
        if turn.name == "filled":
            at = region.start + (pages - 1) * ctx.page
            ctx.expect(
                "byte of the page that was filled meanwhile",
                ctx.silently(ctx.read, at),
                bytes([WRITTEN]),
            )

    def run(ctx: Context) -> None:
        once(ctx, 1)
        ctx.release()
        once(ctx, 2)

    case(
        f"UFFDIO_COPY.{errno.errorcode[turn.code]}.meanwhile-{turn.name}",
        summary=f"COPY fails if {turn.text} while it waits for its source",
        origin=RETRY,
        memory=turn.memory,
        features=lambda memory: missing_features(memory) | Feature.EVENT_REMOVE,
        needs=[needs_kernel_faults()],
    )(run)


for _turn in TURNS:
    _add_turn(_turn)


@case(
    "UFFDIO_COPY.ENOMEM.meanwhile-full",
    origin="mm/shmem.c: shmem_mfill_atomic_pte, shmem_inode_acct_blocks",
    memory=("shmem",),
    features=missing_features,
    needs=[needs_privilege("CAP_SYS_ADMIN"), needs_kernel_faults()],
)
def meanwhile_full(ctx: Context) -> None:
    """COPY fails if the file system becomes full while it waits for its source."""
    file = ctx.enter(small_file_system("tmpfs", ctx.page))
    os.ftruncate(file, 2 * ctx.page)
    flags = mmap.MAP_SHARED | MAP_NORESERVE
    start = _memory.mmap(2 * ctx.page, READ_WRITE, flags, file)
    ctx.callback(_memory.munmap, start, 2 * ctx.page)
    ctx.open().register(start, 2 * ctx.page, mode=MISSING)
    copying, bring = _copy_that_waits(ctx, start, 1)
    os.pwrite(file, b"\1", ctx.page)
    bring()
    answer = copying.result()
    ctx.expect("errno and .copy", (answer.errno, answer.result), (errno.ENOMEM, -errno.ENOMEM))
    _memory.fallocate(file, PUNCH_HOLE, ctx.page, ctx.page)
    ctx.expect(".copy with room", ctx.uffd.copy(start, bytes([DATA]) * ctx.page), ctx.page)
    ctx.expect("the byte", ctx.silently(ctx.read, start), bytes([DATA]))


@case(
    "UFFDIO_COPY.ok.meanwhile-waits",
    origin=RETRY,
    features=missing_wp_features,
    needs=[needs_kernel_faults()],
)
def meanwhile_waits(ctx: Context) -> None:
    """A COPY that waits for its source keeps its mode, and does not block REGISTER and COPY."""
    region = ctx.make(2)
    ctx.register(region, MISSING | WP)
    copying, bring = _copy_that_waits(ctx, region.start, 1, mode=2)
    other = ctx.make(1)
    ctx.uffd.register(other, mode=MISSING)
    ctx.uffd.unregister(other)
    ctx.uffd.copy(region.start + ctx.page, bytes([DATA]) * ctx.page)
    bring()
    answer = copying.result()
    ctx.expect("errno and .copy", (answer.errno, answer.result), (0, ctx.page))
    ctx.expect(
        "which pages are protected",
        [ctx.is_protected(region.start + at) for at in (0, ctx.page)],
        [True, False],
    )


# Two events that nobody has read


def _two_drops(ctx: Context) -> tuple[Region, list[Access[None]]]:
    """Start two threads that drop a page each, one after the other; both events stay unread."""
    region = ctx.make(2, "anon")
    ctx.register(region, MISSING)
    dropping = []
    for index in range(2):
        dropping.append(
            ctx.start(region.madvise, mmap.MADV_DONTNEED, index * SMALL_PAGE, SMALL_PAGE)
        )
        ctx.wait_readable()
        expect_asleep(ctx, dropping[-1].thread_id)
    return region, dropping


def _removed(region: Region, index: int) -> Remove:
    start = region.start + index * SMALL_PAGE
    return Remove(start, start + SMALL_PAGE)


@case(
    "read.ok.events-in-order",
    origin="fs/userfaultfd.c: userfaultfd_ctx_read",
    memory=ANY,
    features=Feature.EVENT_REMOVE,
)
def events_in_order(ctx: Context) -> None:
    """One read returns a fault and two events, the older event first."""
    region, dropping = _two_drops(ctx)
    faulting = ctx.make(1)
    ctx.uffd.register(faulting, mode=MISSING)
    reading = ctx.start(ctx.read, faulting.start)
    wait_pending(ctx, 1)
    seen = ctx.uffd.read_events(4)
    faults = [event.address for event in seen if isinstance(event, Pagefault)]
    ctx.expect("addresses of the faults", faults, [faulting.start])
    events = [event for event in seen if not isinstance(event, Pagefault)]
    ctx.expect("events", events, [_removed(region, 0), _removed(region, 1)])
    for access in dropping:
        access.result()
    ctx.uffd.unregister(faulting)
    ctx.expect("the byte", reading.result(), b"\0")


def _add_second_event(name: str, memory: tuple[str, ...], features: Any, call: Any) -> None:
    def run(ctx: Context) -> None:
        answer = call(ctx)
        region, dropping = _two_drops(ctx)
        for index in range(2):
            ctx.wait_readable()
            ctx.expect("errno while an event is unread", answer(), errno.EAGAIN)
            ctx.expect("the event", ctx.expect_event(Remove), _removed(region, index))
            dropping[index].result()
        ctx.expect("errno afterwards", answer(), 0)

    case(
        f"UFFDIO_{name}.EAGAIN.second-event-unread",
        summary="Nothing is filled or protected while the second of two layout events is unread",
        origin="fs/userfaultfd.c: mmap_changing is a count",
        memory=memory,
        features=lambda kind: features(kind) | Feature.EVENT_REMOVE,
    )(run)


def _filling(op: Any) -> Callable[[Context], Callable[[], int]]:
    def prepare(ctx: Context) -> Callable[[], int]:
        target = Target(ctx, op)
        return lambda: target.call().errno

    return prepare


def _protecting(ctx: Context) -> Callable[[], int]:
    region = ctx.make(1)
    ctx.register(region, WP)
    words = (region.start, ctx.page, WriteprotectMode.WP)
    return lambda: ctx.ioctl("WRITEPROTECT", *words).errno


def _wp(memory: MemoryType) -> Feature:
    return missing_wp_features(memory)


for _op in OPS:
    _add_second_event(_op.name, _op.memory, _op.features, _filling(_op))
_add_second_event("WRITEPROTECT", ALL, _wp, _protecting)
