"""Crossings: each operation on a page in each state, after each event, on all memory types (L5).

The states are in `_page_states`, events and operations in `_crossing_parts`, and the expected
results in `_page_model`. Each operation is crossed with each state, and each event with each state.
The slow cases cross all three.
"""

from __future__ import annotations

import errno
import mmap
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyuffd import _memory
from pyuffd._abi import Feature
from pyuffd._memory import Interrupted
from pyuffd.conformance import _page_model as model
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Access, Context
from pyuffd.conformance._crossing_parts import (
    BETWEENS,
    OPS,
    Between,
    Op,
    can_meet,
    read_only,
    why_not,
)
from pyuffd.conformance._page_model import CLOSED, Entry, Page
from pyuffd.conformance._page_states import STATES, State, Subject, prepare
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import minor_features, missing_wp_features
from pyuffd.conformance._wp import (
    HOLE,
    MARKER,
    MISSING_READ,
    MISSING_WRITE,
    READ_WRITE,
    UNPROTECT,
    WP_WRITE,
    WRITTEN,
    expect_fault,
)
from pyuffd.testing._memory_types import MemoryType

FRESH = 0x66  # fills the pages that missing faults ask for
SIGNAL = {Entry.POISON: 7, Entry.GUARD: 11}
ORIGIN = "the crossings of operations, states and events"
_MINOR = Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS
Features = Callable[[MemoryType], Feature]


def _features(memory: MemoryType, *extra: Feature) -> Feature:
    """Return the features that a crossing enables; for minor faults, that of the memory type."""
    wanted = missing_wp_features(memory)
    for bits in extra:
        wanted |= bits & ~_MINOR
        if bits & _MINOR and not memory.is_anon:
            wanted |= minor_features(memory)
    return wanted


# What a page must look like


def expect_page(subject: Subject, page: Page) -> None:
    """Check the page table entry, a read and a write against the model."""
    _expect_entry(subject, page)
    page = _expect_read(subject, page)
    _expect_entry(subject, page)
    _expect_write(subject, page)


def _pattern(page: Page, memory: MemoryType) -> str:
    protected = "W" if page.wp else "-"
    match page.entry:
        case Entry.NONE:
            return HOLE
        case Entry.MARKER:
            return MARKER[memory.name]
        case Entry.GUARD:
            return "-S--?"
        case Entry.POISON:
            return "----?" if memory.is_hugetlb else "-S--?"
        case Entry.SWAP:
            return f"-S?{protected}?"
        case _:
            return f"P-?{protected}?"


def _expect_entry(subject: Subject, page: Page) -> None:
    ctx = subject.ctx
    seen = ctx.pagemap(subject.at, pid=subject.pid)
    ctx.expect("pagemap", seen, _pattern(page, ctx.memory))


def _finish(subject: Subject, access: Access[Any], flags: int) -> None:
    """Expect the message of an access, and resolve it."""
    ctx = subject.ctx
    expect_fault(ctx, access, flags, subject.at, subject.uffd)
    if flags == WP_WRITE:
        subject.uffd.writeprotect(subject.at, ctx.page, mode=UNPROTECT)
    else:
        subject.uffd.copy(subject.at, bytes([FRESH]) * ctx.page)


def _signal(seen: object) -> object:
    return seen.number if isinstance(seen, Interrupted) else seen


def _expect_read(subject: Subject, page: Page) -> Page:
    ctx = subject.ctx
    length = min(ctx.page, 4096)
    if page.entry in CLOSED:
        ctx.expect("signal of a read", _signal(ctx.silently(subject.read, 1)), SIGNAL[page.entry])
        return page
    if page.is_missing and page.registered:
        reading = ctx.start(subject.read, length)
        _finish(subject, reading, MISSING_READ)
        _, _, page = model.copy(page, ctx.memory, FRESH)
        ctx.expect("content", reading.result(), bytes([FRESH]) * length)
        return page
    seen = ctx.silently(subject.read, length)
    ctx.expect("content", seen, bytes([page.content]) * length)
    return _read(page, ctx.memory)


def _read(page: Page, memory: MemoryType) -> Page:
    """Return the state of a page after a read that sent no message."""
    if page.entry in (Entry.PAGE, Entry.ZERO):
        return page
    if page.entry is Entry.SWAP:
        return replace(page, entry=Entry.PAGE)
    if memory.is_anon:
        return replace(page, entry=Entry.ZERO, value=0)
    return replace(page, entry=Entry.PAGE, value=page.content, cache=page.content)


def _expect_write(subject: Subject, page: Page) -> None:
    ctx = subject.ctx
    data = bytes([WRITTEN])
    if page.entry in CLOSED:
        seen = _signal(ctx.silently(subject.write, data))
        ctx.expect("signal of a write", seen, SIGNAL[page.entry])
        return
    rest = page.content
    if page.is_missing and page.registered:
        flags, rest = MISSING_WRITE, FRESH
    elif page.wp:
        flags = WP_WRITE
    else:
        ctx.expect("a write", ctx.silently(subject.write, data), None)
        flags = None
    if flags is not None:
        writing = ctx.start(subject.write, data)
        _finish(subject, writing, flags)
        ctx.expect("the write", writing.result(), None)
        ctx.expect_quiet(subject.uffd)
    seen = ctx.silently(subject.read, 4)
    ctx.expect("content after the write", seen, data + bytes([rest]) * 3)
    state = ctx.pagemap(subject.at, pid=subject.pid)
    ctx.expect("pagemap after the write", state, "P-?-?")


# Operations on states

GUARDS = (
    Variant("guard-goes", "a guard is replaced as a marker would be, which is a kernel bug"),
    Variant("guard-stays", "EEXIST; no feature bit tells"),
)


def _guards(*states: State) -> tuple[Variant, ...]:
    return GUARDS if any("guard" in state.name for state in states) else ()


def _operate(subject: Subject, op: Op, page: Page) -> Page:
    """Make the call, check its errno and result, and return the page that the rule predicts."""
    ctx = subject.ctx
    code, pages, after = op.rule(page, ctx.memory)
    what, seen = f"errno and result of {op.text}, in pages", op.act(subject)
    if page.entry is Entry.GUARD and after.entry is not Entry.GUARD:
        # Kernels differ here, so accept either.
        kept = (errno.EEXIST, -errno.EEXIST)
        variant = ctx.expect_variant(what, seen, guard_goes=(code, pages), guard_stays=kept)
        return after if variant == "guard-goes" else page
    ctx.expect(what, seen, (code, pages))
    return after


def _operate_read_only(ctx: Context, op: Op, state: State, enabled: Feature) -> None:
    """Make the call while the page is mapped read-only, which it must still be afterwards."""
    subject, page = prepare(ctx, state, enabled)
    ctx.note(f"{op.text} of a page {state.text}, mapped read-only")
    _memory.mprotect(subject.region.start, subject.region.length, mmap.PROT_READ)
    page = _operate(subject, read_only(op), page)
    _expect_entry(subject, page)
    seen = _signal(ctx.silently(subject.write, bytes([WRITTEN])))
    ctx.expect("signal of a write to memory mapped read-only", seen, signal.SIGSEGV)
    _expect_entry(subject, page)
    _memory.mprotect(subject.region.start, subject.region.length, READ_WRITE)
    expect_page(subject, page)


def _add_op(op: Op, state: State) -> None:
    def run(ctx: Context) -> None:
        enabled = _features(ctx.memory, state.features, op.features)
        subject, page = prepare(ctx, state, enabled)
        expect_page(subject, _operate(subject, op, page))
        ctx.release()
        _operate_read_only(ctx, op, state, enabled)

    case(
        f"{op.name}.on.{state.name}",
        variants=_guards(state),
        summary=f"{op.text} of a page {state.text}, and again while it is mapped read-only",
        origin=ORIGIN,
        crossing=True,
        memory=state.memory,
        features=lambda memory: _features(memory, state.features, op.features),
        needs=state.needs,
    )(run)


def _add_read(state: State) -> None:
    def run(ctx: Context) -> None:
        subject, page = prepare(ctx, state, _features(ctx.memory, state.features))
        _expect_entry(subject, page)
        page = _expect_read(subject, page)
        _expect_entry(subject, page)

    case(
        f"fault.read.{state.name}",
        summary=f"Reading a page {state.text}",
        origin=ORIGIN,
        crossing=True,
        memory=state.memory,
        features=lambda memory: _features(memory, state.features),
        needs=state.needs,
    )(run)


def _add_write(state: State) -> None:
    def run(ctx: Context) -> None:
        subject, page = prepare(ctx, state, _features(ctx.memory, state.features))
        _expect_entry(subject, page)
        _expect_write(subject, page)

    case(
        f"fault.write.{state.name}",
        summary=f"Writing a page {state.text}",
        origin=ORIGIN,
        crossing=True,
        memory=state.memory,
        features=lambda memory: _features(memory, state.features),
        needs=state.needs,
    )(run)


# Events and states


def _happened(ctx: Context, between: Between, state: State, *more: Feature) -> tuple[Subject, Page]:
    enabled = _features(ctx.memory, state.features, between.features, *more)
    subject, page = prepare(ctx, state, enabled)
    ctx.note(f"{between.text}: from {page}")
    between.act(subject)
    return subject, between.rule(page, ctx.memory)


def _add_between(between: Between, state: State) -> None:
    memory = [name for name in state.memory if not why_not(between, state, name)]
    if not memory:
        return

    def run(ctx: Context) -> None:
        subject, page = _happened(ctx, between, state)
        expect_page(subject, page)
        ctx.release()
        subject, page = _happened(ctx, between, state)
        _expect_write(subject, page)

    case(
        f"{between.name}.{state.name}",
        summary=f"A page {state.text}, {between.text}",
        origin=ORIGIN,
        crossing=True,
        memory=memory,
        features=lambda kind: _features(kind, state.features, between.features),
        needs=dict.fromkeys((*state.needs, *between.needs)),
    )(run)


# Operations on states after events


def _add_everything(op: Op) -> None:
    def run(ctx: Context) -> None:
        for between in BETWEENS:
            if not can_meet(op, between):
                continue
            for state in STATES:
                if why_not(between, state, ctx.memory.name):
                    continue
                ctx.note(f"{op.name} of a page {state.text}, {between.text}")
                subject, page = _happened(ctx, between, state, op.features)
                expect_page(subject, _operate(subject, op, page))
                ctx.release()

    everything = Feature(0)
    for each in (*STATES, *BETWEENS, op):
        everything |= each.features
    case(
        f"{op.name}.after.everything",
        variants=_guards(*STATES),
        summary=f"{op.text} of a page in every state after every event",
        origin=ORIGIN,
        crossing=True,
        memory=tuple(dict.fromkeys(name for state in STATES for name in state.memory)),
        features=lambda memory: _features(memory, everything),
        needs=dict.fromkeys(need for each in (*STATES, *BETWEENS) for need in each.needs),
        budget_s=120,
        slow=True,
    )(run)


for _op in OPS:
    for _state in STATES:
        _add_op(_op, _state)
for _state in STATES:
    _add_read(_state)
    _add_write(_state)
for _between in BETWEENS:
    for _state in STATES:
        _add_between(_between, _state)
for _op in OPS:
    _add_everything(_op)
