"""Which message an access sends in each register mode, for a page in each state (layer L5).

Each combination of MISSING, WP and MINOR is tried with a page that is a hole, in the file only, a
protected hole, or mapped. A read and a write each send exactly the messages of the mode.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._types import (
    ALL,
    FILE,
    SHMEM,
    minor_features,
    missing_features,
    wp_features,
)
from pyuffd.conformance._wp import (
    DATA,
    IN_FILE,
    UNPROTECT,
    WP_WRITE,
    WRITTEN,
    expect_fault,
    in_one_place,
    in_page_cache,
    page_out,
)
from pyuffd.regions import Region
from pyuffd.testing._memory_types import MemoryType
from pyuffd.testing._need import needs_swap

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
MISSING_FAULT, MINOR_FAULT = 0, 4  # and 1 more for a write
SIGBUS, SIGSEGV = 7, 11


@dataclass(frozen=True)
class State:
    """A state of a page, how to make it, and the message that an access sends in a mode."""

    name: str
    before: Callable[[Region], None]
    is_protected: bool
    wanted: Callable[[RegisterMode, bool], int | None]
    memory: tuple[str, ...] = ALL


def _nothing(_: Region) -> None:
    pass


def _hole(mode: RegisterMode, writes: bool) -> int | None:
    return MISSING_FAULT + writes if MISSING in mode else None


def _cached(mode: RegisterMode, writes: bool) -> int | None:
    return MINOR_FAULT + writes if MINOR in mode else None


def _protected(_: RegisterMode, writes: bool) -> int | None:
    return WP_WRITE if writes else None


def _first_of(*rules: Callable[[RegisterMode, bool], int | None]) -> Callable[..., int | None]:
    def wanted(mode: RegisterMode, writes: bool) -> int | None:
        found = (rule(mode, writes) for rule in rules)
        return next((flags for flags in found if flags is not None), None)

    return wanted


STATES = (
    State("a hole", _nothing, False, _hole),
    State("in the file only", lambda r: in_page_cache(r, IN_FILE), False, _cached, FILE),
    State("a protected hole", _nothing, True, _first_of(_hole, _protected)),
    State(
        "protected, in the file only",
        lambda r: in_page_cache(r, IN_FILE),
        True,
        _first_of(_cached, _protected),
        FILE,
    ),
    State("mapped", lambda r: r.fill(DATA), False, lambda _mode, _writes: None),
    State("mapped and protected", lambda r: r.fill(DATA), True, _protected),
)


def _features(mode: RegisterMode, memory: MemoryType) -> Feature:
    found = Feature(0)
    if MISSING in mode:
        found |= missing_features(memory)
    if WP in mode:
        found |= wp_features(memory) | Feature.WP_UNPOPULATED
    if MINOR in mode:
        found |= minor_features(memory)
    return found


def _resolve(ctx: Context, at: int, flags: int) -> None:
    if flags == WP_WRITE:
        ctx.uffd.writeprotect(at, ctx.page, mode=UNPROTECT)
    elif flags >= MINOR_FAULT:
        ctx.uffd.continue_(at, ctx.page)
    else:
        ctx.uffd.copy(at, bytes([DATA]) * ctx.page)


def _access(ctx: Context, mode: RegisterMode, state: State, *, writes: bool) -> None:
    verb = "writing" if writes else "reading"
    ctx.note(f"{verb} a page that is {state.name}")
    region = ctx.make(1)
    state.before(region)
    ctx.register(region, mode)
    if state.is_protected:
        ctx.uffd.writeprotect(region)
    flags = state.wanted(mode, writes)

    def call() -> object:
        if writes:
            return ctx.write(region.start, bytes([WRITTEN]))
        return ctx.read(region.start)

    if flags is None:
        seen = ctx.silently(call)
    else:
        access = ctx.start(call)
        expect_fault(ctx, access, flags, region.start)
        _resolve(ctx, region.start, flags)
        seen = access.result()
        ctx.expect_quiet()
    ctx.expect(f"signal of {verb} a page that is {state.name}", hasattr(seen, "number"), False)
    ctx.release()


def _add(mode: RegisterMode) -> None:
    def run(ctx: Context) -> None:
        for state in STATES:
            if ctx.memory.name not in state.memory or (state.is_protected and WP not in mode):
                continue
            for writes in (False, True):
                _access(ctx, mode, state, writes=writes)

    names = [name for bit, name in ((1, "missing"), (2, "wp"), (4, "minor")) if mode & bit]
    case(
        f"fault.in-mode.{'-'.join(names)}",
        summary=f"In mode {' | '.join(name.upper() for name in names)}, accesses to a page in each"
        " state send exactly the messages of this mode",
        origin="mm/memory.c, mm/shmem.c, mm/hugetlb.c: handle_userfault",
        memory=FILE if MINOR in mode else ALL,
        features=lambda memory: _features(mode, memory),
    )(run)


for _bits in range(1, 8):
    _add(RegisterMode(_bits))


@case(
    "fault.minor.swapped",
    origin="mm/shmem.c: shmem_get_folio_gfp",
    memory=SHMEM,
    features=minor_features,
    needs=[needs_swap()],
)
def minor_swapped(ctx: Context) -> None:
    """A page of a file that is swapped out sends a minor fault, and CONTINUE swaps it in."""
    in_one_place(ctx)
    region = ctx.make(1)
    assert region.fd is not None
    with Region.file(region.fd, region.length) as view:
        view.fill(IN_FILE)
        page_out(ctx, view)
    ctx.register(region, MINOR)
    reading = ctx.start(ctx.read, region.start)
    expect_fault(ctx, reading, MINOR_FAULT, region.start)
    ctx.uffd.continue_(region.start, ctx.page)
    ctx.expect("the byte", reading.result(), bytes([IN_FILE]))
    ctx.expect("a write", ctx.silently(ctx.write, region.start, bytes([WRITTEN])), None)
    seen = ctx.silently(ctx.read, region.start, 2)
    ctx.expect("content", seen, bytes([WRITTEN, IN_FILE]))


@case(
    "fault.SIGBUS.past-file-end",
    origin="mm/shmem.c: shmem_get_folio_gfp; mm/hugetlb.c: hugetlb_no_page",
    memory=FILE,
    features=lambda memory: missing_features(memory) | minor_features(memory),
)
def past_file_end(ctx: Context) -> None:
    """An access beyond the end of the file gets SIGBUS and sends no message."""
    for mode in (MISSING, MINOR, MISSING | MINOR):
        region = ctx.make(2)
        assert region.fd is not None
        os.ftruncate(region.fd, ctx.page)
        ctx.register(region, mode)
        at = region.start + ctx.page
        for seen in (ctx.silently(ctx.read, at), ctx.silently(ctx.write, at, b"\1")):
            ctx.expect(f"signal, registered {mode!r}", getattr(seen, "number", None), SIGBUS)
        ctx.release()


@case(
    "fault.SIGBUS.minor",
    origin="fs/userfaultfd.c: handle_userfault, UFFD_FEATURE_SIGBUS",
    memory=FILE,
    features=lambda memory: minor_features(memory) | Feature.SIGBUS,
)
def sigbus_minor(ctx: Context) -> None:
    """With SIGBUS, an access to a page that is only in the file gets SIGBUS until CONTINUE."""
    region = ctx.make(1)
    in_page_cache(region, IN_FILE)
    ctx.register(region, MINOR)
    for seen in (
        ctx.silently(ctx.read, region.start),
        ctx.silently(ctx.write, region.start, b"\1"),
    ):
        ctx.expect("signal of the access", getattr(seen, "number", None), SIGBUS)
    ctx.uffd.continue_(region.start, ctx.page)
    ctx.expect("the byte", ctx.silently(ctx.read, region.start), bytes([IN_FILE]))


@case(
    "fault.SIGSEGV.no-access",
    origin="mm/memory.c: handle_mm_fault; the access is checked before",
    features=missing_features,
)
def no_access(ctx: Context) -> None:
    """An access that the mapping does not allow gets SIGSEGV and sends no message."""
    region = ctx.make(1)
    ctx.register(region, MISSING)
    for protection, reads in ((0, True), (0, False), (mmap.PROT_READ, False)):
        _memory.mprotect(region.start, region.length, protection)
        if reads:
            seen: object = ctx.silently(ctx.read, region.start)
        else:
            seen = ctx.silently(ctx.write, region.start, b"\1")
        ctx.expect(f"signal, protection {protection}", getattr(seen, "number", None), SIGSEGV)
    reading = ctx.start(ctx.read, region.start)
    expect_fault(ctx, reading, MISSING_FAULT, region.start)
    ctx.uffd.copy(region.start, bytes([DATA]) * ctx.page)
    ctx.expect("the byte", reading.result(), bytes([DATA]))
