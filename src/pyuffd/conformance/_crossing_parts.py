"""The parts of crossings besides page states: events, operations, impossible combinations (L5)."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from pyuffd import _memory
from pyuffd._abi import (
    ContinueMode,
    CopyMode,
    Feature,
    PageBit,
    RegisterMode,
    WriteprotectMode,
)
from pyuffd._events import Remap
from pyuffd.conformance import _page_model as model
from pyuffd.conformance._page_model import Page
from pyuffd.conformance._page_states import (
    ELSEWHERE,
    NEW,
    NOTHING,
    SWAP,
    State,
    Subject,
)
from pyuffd.conformance._types import ALL, ANON, FILE, SMALL
from pyuffd.conformance._wp import (
    MISSING_WP,
    PUNCH_HOLE,
    READ_WRITE,
    move_mapping,
    reserve,
)
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE, MemoryType
from pyuffd.testing._need import Need

# Events before the operation


@dataclass(frozen=True)
class Between:
    """What the program or memory management does before the operation.

    Attributes:
        name: Its name in ids.
        text: Its text in summaries.
        memory: The memory types on which it is possible.
        act: Does it; may change which descriptor and which process the subject uses.
        rule: The model's prediction.
        features: What must be enabled.
        needs: What else is required.
        elsewhere: Why it is impossible on the other memory types, if ELSEWHERE does not say so.
    """

    name: str
    text: str
    memory: tuple[str, ...]
    act: Callable[[Subject], None]
    rule: Callable[[Page, MemoryType], Page]
    features: Feature = NOTHING
    needs: tuple[Need, ...] = ()
    elsewhere: str = ""


def _in_fork(subject: Subject) -> None:
    child = subject.ctx.fork(subject.uffd)
    if child.uffd is None:
        subject.ctx.fail("the fork's descriptor", "none", "one")
    subject.child, subject.uffd = child, child.uffd


def _in_fork_without_event(subject: Subject) -> None:
    subject.child = subject.ctx.fork_only()


def _beside_fork(subject: Subject) -> None:
    subject.ctx.fork(subject.uffd)


def _remap(subject: Subject) -> None:
    ctx, region = subject.ctx, subject.region
    offset = subject.at - region.start
    target = reserve(ctx, region.length, HUGE_PAGE)
    moving = ctx.start(move_mapping, ctx, region, target)
    if subject.uffd.features & Feature.EVENT_REMAP:
        ctx.expect_event(Remap, subject.uffd)
    moving.result()
    subject.at = target + offset


def _mprotect(subject: Subject) -> None:
    for protection in (mmap.PROT_READ, 0, READ_WRITE):
        _memory.mprotect(subject.region.start, subject.region.length, protection)


def _reclaim(subject: Subject) -> None:
    subject.region.pageout()
    # Pinned, shared and zero pages stay. Any other page must have gone, as the model assumes.
    for _ in range(3):
        if PageBit.PRESENT not in subject.ctx.bits(subject.at):
            break
        subject.region.pageout()


def _punch(subject: Subject) -> None:
    assert subject.region.fd is not None
    _memory.fallocate(subject.region.fd, PUNCH_HOLE, 0, subject.region.length)


def _truncate(subject: Subject) -> None:
    assert subject.region.fd is not None
    os.ftruncate(subject.region.fd, 0)
    os.ftruncate(subject.region.fd, subject.region.length)


def _dontneed(subject: Subject) -> None:
    subject.region.madvise(mmap.MADV_DONTNEED, subject.at - subject.region.start, subject.ctx.page)


def _free(subject: Subject) -> None:
    subject.region.madvise(mmap.MADV_FREE)


def _cold(subject: Subject) -> None:
    subject.region.madvise(MADV_COLD)


def _second_descriptor(subject: Subject) -> None:
    ctx = subject.ctx
    other = ctx.make(1)
    second = ctx.open(subject.uffd.features)
    second.register(other, mode=RegisterMode.MISSING)
    second.close()


def _register(subject: Subject) -> None:
    subject.uffd.register(subject.region, mode=MISSING_WP)


def _register_anew(subject: Subject) -> None:
    subject.uffd.unregister(subject.region)
    _register(subject)


MADV_COLD = 20
FORK = Feature.EVENT_FORK
NOT_HUGE = SMALL
BETWEENS = (
    Between(
        "fork.in-child",
        "in a fork, by its own descriptor",
        ALL,
        _in_fork,
        lambda page, memory: model.inherited(page, memory, has_event=True),
        FORK,
    ),
    Between(
        "fork.in-child-without-event",
        "in a fork without EVENT_FORK",
        ALL,
        _in_fork_without_event,
        lambda page, memory: model.inherited(page, memory, has_event=False),
    ),
    Between("fork.in-parent", "that a fork has too", ALL, _beside_fork, lambda page, _: page, FORK),
    Between(
        "mremap.without-event",
        "moved by mremap without EVENT_REMAP",
        ALL,
        _remap,
        lambda page, _: model.remapped(page, has_event=False),
    ),
    Between(
        "mremap.with-event",
        "moved by mremap with EVENT_REMAP",
        ALL,
        _remap,
        lambda page, _: page,
        Feature.EVENT_REMAP,
    ),
    Between(
        "mprotect.and-back", "after mprotect to READ, NONE and back", ALL, _mprotect, lambda p, _: p
    ),
    Between("madvise.dontneed", "after MADV_DONTNEED", ALL, _dontneed, model.dontneed),
    Between(
        "madvise.free",
        "after MADV_FREE",
        ANON,
        _free,
        lambda page, _: model.freed(page),
        elsewhere="MADV_FREE of file memory fails with EINVAL",
    ),
    Between("madvise.cold", "after MADV_COLD", SMALL, _cold, lambda page, _: page),
    Between("reclaim.out", "after reclaim", SMALL, _reclaim, model.reclaimed, needs=SWAP),
    Between("fallocate.punch-hole", "after a hole was punched", FILE, _punch, model.hole_punched),
    Between("ftruncate.and-back", "after its file was truncated", FILE, _truncate, model.truncated),
    Between(
        "descriptor.second-one",
        "after a second descriptor came and went",
        ALL,
        _second_descriptor,
        lambda page, _: page,
    ),
    Between("registration.again", "registered once more", ALL, _register, lambda page, _: page),
    Between(
        "registration.anew",
        "unregistered and registered",
        ALL,
        _register_anew,
        lambda page, _: replace(model.unregister(page), registered=True),
    ),
)

# Operations

Act = Callable[[Subject], tuple[int, int]]


@dataclass(frozen=True)
class Op:
    """An operation on the page.

    Attributes:
        name: Its name in ids: the ioctl, or the access.
        text: Its text in summaries.
        act: Makes the call; returns errno and result in pages (or -errno).
        rule: The model's prediction.
        features: What the kernel must have.
        is_local: It works only on the memory of this process.
    """

    name: str
    text: str
    act: Act
    rule: Callable[[Page, MemoryType], model.Answer]
    features: Feature = NOTHING
    is_local: bool = False


def _ioctl(name: str, *, mode: int = 0, has_source: bool = False) -> Act:
    def act(subject: Subject) -> tuple[int, int]:
        ctx = subject.ctx
        words = [subject.at]
        if has_source:
            source = ctx.make(ctx.page // SMALL_PAGE, "anon")
            source.madvise(mmap.MADV_DONTFORK)
            source.fill(NEW)
            words.append(source.start)
        answer = ctx.ioctl(name, *words, ctx.page, mode, uffd=subject.uffd)
        pages = answer.result // ctx.page if answer.result > 0 else answer.result
        return answer.errno, pages

    return act


def _call(name: str, *, mode: int | None = None) -> Act:
    def act(subject: Subject) -> tuple[int, int]:
        words = (subject.at, subject.ctx.page, *(() if mode is None else (mode,)))
        return subject.ctx.ioctl(name, *words, uffd=subject.uffd).errno, 0

    return act


OPS = (
    Op(
        "UFFDIO_COPY",
        "COPY",
        _ioctl("COPY", has_source=True),
        lambda page, memory: model.copy(page, memory, NEW),
    ),
    Op(
        "UFFDIO_COPY.MODE_WP",
        "COPY with MODE_WP",
        _ioctl("COPY", mode=CopyMode.WP, has_source=True),
        lambda page, memory: model.copy(page, memory, NEW, wp=True),
    ),
    Op("UFFDIO_ZEROPAGE", "ZEROPAGE", _ioctl("ZEROPAGE"), model.zeropage),
    Op(
        "UFFDIO_CONTINUE",
        "CONTINUE",
        _ioctl("CONTINUE"),
        model.continue_,
        Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS,
    ),
    Op(
        "UFFDIO_CONTINUE.MODE_WP",
        "CONTINUE with MODE_WP",
        _ioctl("CONTINUE", mode=ContinueMode.WP),
        lambda page, memory: model.continue_(page, memory, wp=True),
        # No feature bit tells of CONTINUE_MODE_WP. This one was added later, so it implies it.
        Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS | Feature.WP_UNPOPULATED,
    ),
    Op(
        "UFFDIO_MOVE",
        "MOVE",
        _ioctl("MOVE", has_source=True),
        lambda page, memory: model.move(page, memory, NEW),
        Feature.MOVE,
        is_local=True,
    ),
    Op("UFFDIO_POISON", "POISON", _ioctl("POISON"), model.poison, Feature.POISON),
    Op(
        "UFFDIO_WRITEPROTECT",
        "WRITEPROTECT",
        _call("WRITEPROTECT", mode=WriteprotectMode.WP),
        lambda page, _: (0, 0, model.protect(page)),
        Feature.WP_UNPOPULATED,
    ),
    Op(
        "UFFDIO_WRITEPROTECT.off",
        "WRITEPROTECT with mode 0",
        _call("WRITEPROTECT", mode=0),
        lambda page, _: (0, 0, model.unprotect(page)),
    ),
    Op(
        "UFFDIO_UNREGISTER",
        "UNREGISTER",
        _call("UNREGISTER"),
        lambda page, _: (0, 0, model.unregister(page)),
    ),
    Op("UFFDIO_WAKE", "WAKE", _call("WAKE"), lambda page, _: (0, 0, page)),
)


def read_only(op: Op) -> Op:
    """Return an operation as it is on read-only memory: MOVE requires both sides writable."""
    if op.name != "UFFDIO_MOVE":
        return op
    return replace(op, rule=lambda page, _: (errno.EINVAL, -errno.EINVAL, page))


# Meaningless or impossible combinations


def why_not(between: Between, state: State, memory: str) -> str:
    """Return why an event cannot happen to a page in a state, or ""."""
    if memory not in between.memory:
        return between.elsewhere or ELSEWHERE[between.memory]
    if memory not in state.memory:
        return ELSEWHERE[state.memory]
    if between.name == "reclaim.out" and state.name in ("forked", "pinned", "huge"):
        return "whether reclaim takes a shared, pinned or huge page is a matter of chance"
    if state.name == "huge" and between.name.startswith(("fork", "mremap")):
        return "whether the huge page is split is the kernel's choice"
    if state.name == "forked" and between.name.startswith("fork"):
        return "a second fork shares the page just as the first does"
    if state.name == "pinned" and between.name.startswith(("fork", "mremap", "madv", "ftr", "fal")):
        return "a pinned page is copied early, or stays pinned in place: see the cases about pins"
    return ""


def can_meet(op: Op, between: Between) -> bool:
    if between.name in ("fork.in-child-without-event", "mremap.without-event"):
        return False  # nothing is registered any more
    return not (op.is_local and between.name == "fork.in-child")
