"""Races: what an operation guarantees while a thread writes the same pages (layer L5).

The writer calls memset(3) over all pages again and again, and does not run Python meanwhile. On one
CPU it would rarely run during an operation, so these cases need two.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._thp import MADV_COLLAPSE
from pyuffd.conformance._types import ALL, ANON, SMALL, missing_features, wp_features
from pyuffd.conformance._wp import UNPROTECT
from pyuffd.conformance.cases.kselftest_unit import release
from pyuffd.conformance.cases.pagemap_scan import FEATURES, WP_SCAN, end_of, scan, tracked
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE
from pyuffd.testing._need import Need, needs_swap, needs_thp

ORIGIN = "two CPUs at the same pages"
ROUNDS = 40
PAGES, HUGE_PAGES = 16, 2
SAMPLE = 4096  # bytes of a page that are compared
SEED = 1
SYS_PROCESS_VM_READV = 310
MEMSET = ctypes.CDLL(None).memset
MEMSET.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
MEMSET.restype = ctypes.c_void_p


def _needs_two_cpus() -> Need:
    def missing() -> tuple[list[str], str]:
        count = len(os.sched_getaffinity(0))
        return (["two-cpus"] if count < 2 else []), f"CPUs available: {count}"

    return Need("two CPUs", missing)


def _pages(ctx: Context) -> int:
    return HUGE_PAGES if ctx.memory.is_hugetlb else PAGES


@contextmanager
def _over_and_over(ctx: Context, step: Callable[[], object]) -> Iterator[None]:
    """Call a function in a thread again and again until the end of the block."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            step()

    ctx.callback(is_over.set)
    access = ctx.start(run)
    yield
    is_over.set()
    access.result()


def _writer(region: Region) -> Callable[[], object]:
    """Return a function that fills a region, each time with another value except 0."""
    values = iter(lambda: random.randrange(1, 256), 0)
    return lambda: MEMSET(region.start, next(values), region.length)


def _drain(ctx: Context) -> None:
    while select.select([ctx.uffd], [], [], 0)[0]:
        ctx.uffd.read_events()


# Protection is kept, whatever else happens to the page


@dataclass(frozen=True)
class Beside:
    """What a third thread does to the memory meanwhile.

    Attributes:
        name: Its name in ids.
        text: Its text in summaries.
        memory: The memory types on which it is possible.
        step: Does it once to a region.
        needs: What it needs.
        is_huge: Whether the memory has the size of a transparent huge page.
    """

    name: str
    text: str
    memory: tuple[str, ...]
    step: Callable[[Region], object] | None = None
    needs: tuple[Need, ...] = ()
    is_huge: bool = False


def _split_and_merge(region: Region) -> None:
    middle = region.length // 2 // region.page_size * region.page_size
    for advice in (mmap.MADV_RANDOM, mmap.MADV_NORMAL):
        region.madvise(advice, middle, region.page_size)


def _pin(region: Region) -> None:
    buffer = ctypes.create_string_buffer(64)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 64)
    remote = (ctypes.c_uint64 * 2)(region.start, 64)
    vectors = (ctypes.addressof(local), 1, ctypes.addressof(remote), 1)
    syscall(SYS_PROCESS_VM_READV, os.getpid(), *vectors, 0)


def _collapse(region: Region) -> None:
    try:
        region.madvise(MADV_COLLAPSE)
    except OSError as error:
        # A page is protected or in use, or no huge page is free.
        if error.errno not in (errno.EINVAL, errno.EBUSY, errno.EAGAIN, errno.ENOMEM):
            raise


BESIDE = (
    Beside("alone", "a writer of the same pages", ALL),
    Beside("reclaim", "a writer and reclaim", SMALL, Region.pageout, (needs_swap(),)),
    Beside("split", "a writer and splits of the mapping", ALL, _split_and_merge),
    Beside("pin", "a writer and process_vm_readv", ALL, _pin),
    Beside("collapse", "a writer and MADV_COLLAPSE", ANON, _collapse, (needs_thp(),), True),
)


def _protection_holds(ctx: Context, beside: Beside) -> None:
    region = ctx.make(HUGE_PAGE // SMALL_PAGE if beside.is_huge else _pages(ctx))
    if beside.is_huge:
        region.advise_thp()
    region.fill(1)
    ctx.register(region, RegisterMode.WP)
    choose = random.Random(SEED)
    changed, unprotected = [], []
    with ExitStack() as stack:
        stack.enter_context(_over_and_over(ctx, _writer(region)))
        if beside.step is not None:
            step = beside.step
            stack.enter_context(_over_and_over(ctx, lambda: step(region)))
        for _ in range(ROUNDS):
            index = choose.randrange(region.length // ctx.page)
            at = region.start + index * ctx.page
            ctx.uffd.writeprotect(at, ctx.page)
            before = ctx.read(at, SAMPLE)
            for _ in range(3):
                os.sched_yield()
            if ctx.read(at, SAMPLE) != before:
                changed.append(index)
            if not ctx.is_protected(at):
                unprotected.append(index)
            ctx.uffd.writeprotect(at, ctx.page, mode=UNPROTECT)
            _drain(ctx)
    ctx.expect("pages that changed while they were protected", changed, [])
    ctx.expect("pages that lost their protection", unprotected, [])


def _add_beside(beside: Beside) -> None:
    case(
        f"race.writeprotect.holds-{beside.name}",
        summary=f"A page does not change after WRITEPROTECT returns, beside {beside.text}",
        origin=ORIGIN,
        memory=beside.memory,
        features=wp_features,
        needs=[_needs_two_cpus(), *beside.needs],
    )(lambda ctx: _protection_holds(ctx, beside))


for _beside in BESIDE:
    _add_beside(_beside)


@case(
    "race.pagemap-scan.reports-every-write",
    origin=ORIGIN,
    features=FEATURES,
    needs=[_needs_two_cpus()],
)
def scan_reports(ctx: Context) -> None:
    """A scan with WP_MATCHING reports every page that changed since the last such scan."""
    region = tracked(ctx, _pages(ctx))
    pages = range(0, region.length, ctx.page)

    def look() -> list[bytes]:
        return [region.read(offset, SAMPLE) for offset in pages]

    hidden = []
    with _over_and_over(ctx, _writer(region)):
        after = look()
        scan(ctx, region.start, end_of(region), flags=WP_SCAN)
        after = look()
        for _ in range(ROUNDS):
            os.sched_yield()
            before = look()
            found = scan(ctx, region.start, end_of(region), flags=WP_SCAN)
            reported = {at for start, end, _ in found.ranges for at in range(start, end, ctx.page)}
            hidden += [
                index
                for index, offset in enumerate(pages)
                if region.start + offset not in reported and before[index] != after[index]
            ]
            after = look()
    ctx.expect("pages that changed without being reported", hidden, [])


@case(
    "race.move.takes-all-writes",
    origin=ORIGIN,
    memory=ANON,
    features=lambda memory: missing_features(memory) | Feature.MOVE,
    needs=[_needs_two_cpus()],
)
def move_takes_all(ctx: Context) -> None:
    """A page that MOVE takes from a writer no longer changes at its destination."""
    source, target = ctx.make(PAGES), ctx.make(PAGES)
    source.fill(1)
    ctx.register(target, RegisterMode.MISSING)
    choose = random.Random(SEED)
    changed = []
    moved = 0
    with _over_and_over(ctx, _writer(source)):
        for _ in range(10 * ROUNDS):
            offset = choose.randrange(PAGES) * ctx.page
            answer = ctx.ioctl("MOVE", target.start + offset, source.start + offset, ctx.page, 0)
            if answer.errno:  # a hole, or a page in use
                os.sched_yield()
                continue
            moved += 1
            before = ctx.read(target.start + offset, SAMPLE)
            for _ in range(3):
                os.sched_yield()
            if ctx.read(target.start + offset, SAMPLE) != before:
                changed.append(offset // ctx.page)
            target.madvise(mmap.MADV_DONTNEED, offset, ctx.page)
            if moved == ROUNDS:
                break
    ctx.expect("pages that changed after MOVE", changed, [])
    ctx.expect("whether pages were moved", moved > 0, True)


# One page is filled once


def _fill(ctx: Context, region: Region, name: str, source: int) -> int:
    """Fill the missing pages of a region from start to end; return the number filled."""
    filled, at = 0, region.start
    while at < end_of(region):
        words = (end_of(region) - at, 0) if name == "ZEROPAGE" else (source, end_of(region) - at, 0)
        answer = ctx.ioctl(name, at, *words)
        done = max(answer.result, 0)
        filled += done // ctx.page
        source += done
        at += done
        if answer.errno == errno.EEXIST:
            at, source = at + ctx.page, source + ctx.page
        elif answer.errno not in (0, errno.EAGAIN):
            ctx.fail(f"errno of {name}", errno.errorcode[answer.errno], "EEXIST or EAGAIN")
    return filled


def _filled_once(ctx: Context, other: str) -> None:
    pages = HUGE_PAGES if ctx.memory.is_hugetlb else 4 * PAGES
    region, one, two = ctx.make(pages), ctx.make(pages), ctx.make(pages)
    one.fill(1)
    two.fill(2)
    second = 0 if other == "ZEROPAGE" else 2
    ctx.register(region, RegisterMode.MISSING)
    for _ in range(ROUNDS // 4):
        reading = ctx.start(lambda: [ctx.read(at, 1) for at in _starts(ctx, region)])
        filling = ctx.start(_fill, ctx, region, other, two.start)
        total = _fill(ctx, region, "COPY", one.start) + filling.result()
        seen = reading.result()
        _drain(ctx)
        ctx.expect("pages filled by both together", total, pages)
        torn = [
            number
            for number, at in enumerate(_starts(ctx, region))
            if region.read(at - region.start, SAMPLE)
            not in (bytes([1]) * SAMPLE, bytes([second]) * SAMPLE)
        ]
        ctx.expect("pages with content of both", torn, [])
        wrong = [
            number
            for number, at in enumerate(_starts(ctx, region))
            if seen[number] != region.read(at - region.start, 1)
        ]
        ctx.expect("pages that a reader saw with other content", wrong, [])
        release(region)


def _starts(ctx: Context, region: Region) -> range:
    return range(region.start, end_of(region), ctx.page)


def _add_filled(other: str, memory: tuple[str, ...]) -> None:
    case(
        f"race.copy.fills-once-beside-{other.lower()}",
        summary=f"If a COPY and a {other} fill the same pages at once, one of them fills each page",
        origin=ORIGIN,
        memory=memory,
        features=missing_features,
        needs=[_needs_two_cpus()],
    )(lambda ctx: _filled_once(ctx, other))


_add_filled("COPY", ALL)
_add_filled("ZEROPAGE", SMALL)


# No thread is left asleep


def _one_goes(ctx: Context, region: Region, end: Callable[[], object], spin: int) -> None:
    reading = ctx.start(ctx.read, region.start)
    for _ in range(spin):
        os.sched_yield()
    end()
    ctx.expect("the read", reading.result(), b"\0")


@case(
    "race.unregister.lets-go",
    origin=ORIGIN,
    features=missing_features,
    needs=[_needs_two_cpus()],
)
def unregister_lets_go(ctx: Context) -> None:
    """A thread that faults while its page is being unregistered goes on, in either order."""
    region = ctx.make(1)
    ctx.open()
    for round_ in range(ROUNDS // 2):
        ctx.register(region, RegisterMode.MISSING)
        _one_goes(ctx, region, lambda: ctx.uffd.unregister(region), round_ % 8)
        ctx.expect_quiet()
        release(region)


@case(
    "race.close.lets-go",
    origin=ORIGIN,
    features=missing_features,
    needs=[_needs_two_cpus()],
)
def close_lets_go(ctx: Context) -> None:
    """A thread that faults while the userfaultfd is being closed goes on, in either order."""
    region = ctx.make(1)
    for round_ in range(ROUNDS // 2):
        uffd = ctx.open()
        uffd.register(region, mode=RegisterMode.MISSING)
        _one_goes(ctx, region, uffd.close, round_ % 8)
        release(region)
