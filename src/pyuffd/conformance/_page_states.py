"""The page states of crossings, and how each is made (layer L5)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from pyuffd._abi import CopyMode, Feature
from pyuffd._memory import Interrupted
from pyuffd._uffd import Userfaultfd
from pyuffd.conformance import _page_model as model
from pyuffd.conformance._context import Child, Context
from pyuffd.conformance._page_model import Entry, Page
from pyuffd.conformance._pin import Pin, needs_pin, syscall
from pyuffd.conformance._thp import mapped_huge
from pyuffd.conformance._types import ALL, ANON, FILE, PRIVATE, SHMEM, SMALL
from pyuffd.conformance._wp import (
    DATA,
    IN_FILE,
    MISSING_WP,
    in_one_place,
    in_page_cache,
    page_out,
)
from pyuffd.regions import Region
from pyuffd.testing._memory_types import HUGE_PAGE, SMALL_PAGE, MemoryType
from pyuffd.testing._need import Need, needs_swap, needs_thp

NOTHING = Feature(0)
NEW = 0x77
MADV_GUARD_INSTALL = 102
PRIVATE_FILE = ("shmem-private", "hugetlb-private")
PRIVATE_SMALL = ("anon", "shmem-private")

# Why something that exists only on these memory types is impossible on the others.
ELSEWHERE = {
    FILE: "anonymous memory has no file",
    PRIVATE_FILE: "only a private mapping of a file has pages besides the file's",
    PRIVATE_SMALL: "shared memory has ordinary pages full of zeros, and hugetlb no zero page",
    SMALL: "hugetlb has neither swap nor guard pages",
    SHMEM: "anonymous memory has no file, and hugetlb no guard pages",
    PRIVATE: "the pages of shared memory are in the file, which a fork does not change",
    ANON: "a huge page of shmem is split when it is protected: `wp-series.12`",
}


class Subject:
    """The page under test: where it is, its userfaultfd, and the process that touches it."""

    def __init__(self, ctx: Context, region: Region, uffd: Userfaultfd, at: int) -> None:
        self.ctx = ctx
        self.region = region
        self.uffd = uffd
        self.at = at
        self.child: Child | None = None

    @property
    def pid(self) -> int | None:
        """The process whose page it is; None for this one."""
        return self.child.pid if self.child else None

    def read(self, length: int) -> bytes | Interrupted:
        """Read its first bytes; waits for faults."""
        if self.child is None:
            return self.ctx.read(self.at, length)
        return self.child.read(self.at, min(length, 4096))

    def write(self, data: bytes) -> Interrupted | None:
        """Write its first bytes; waits for faults."""
        return (self.child or self.ctx).write(self.at, data)


@dataclass(frozen=True)
class State:
    """A state that a page can be in.

    Attributes:
        name: Its name in ids.
        text: Its text in summaries, after "a page".
        memory: The memory types that have it.
        prepare: Brings a page of newly registered memory into the state.
        page: The model's page.
        features: What the kernel must have besides missing faults and write-protection.
        needs: What else is required.
        pages: How many pages the region has; the subject is in the middle.
        is_cached: The file has the page before it is registered.
        is_read_first: The page is read before it is registered.
        is_written_first: The page is written before it is registered.
    """

    name: str
    text: str
    memory: tuple[str, ...]
    prepare: Callable[[Subject], None]
    page: Callable[[MemoryType], Page]
    features: Feature = NOTHING
    needs: tuple[Need, ...] = ()
    pages: int = 1
    is_cached: bool = False
    is_read_first: bool = False
    is_written_first: bool = False


def _nothing(_: Subject) -> None:
    pass


def _copy(subject: Subject) -> None:
    subject.uffd.copy(subject.at, bytes([DATA]) * subject.ctx.page)


def _copy_protected(subject: Subject) -> None:
    data = bytes([DATA]) * subject.ctx.page
    subject.uffd.copy(subject.at, data, mode=CopyMode.WP)


def _protect(subject: Subject) -> None:
    subject.uffd.writeprotect(subject.at, subject.ctx.page)


def _zero(subject: Subject) -> None:
    subject.uffd.zeropage(subject.at, subject.ctx.page)


def _zero_protected(subject: Subject) -> None:
    _zero(subject)
    _protect(subject)


def _poison(subject: Subject) -> None:
    subject.uffd.poison(subject.at, subject.ctx.page)


def _guard(subject: Subject) -> None:
    region = subject.region
    try:
        region.madvise(MADV_GUARD_INSTALL, subject.at - region.start, region.page_size)
    except OSError:
        name = subject.ctx.memory.name
        subject.ctx.lack("guard-regions", f"MADV_GUARD_INSTALL on {name} is EINVAL")


def _swapped(subject: Subject) -> None:
    _copy(subject)
    page_out(subject.ctx, subject.region)


def _swapped_protected(subject: Subject) -> None:
    _copy_protected(subject)
    page_out(subject.ctx, subject.region)


def _read_back(subject: Subject) -> None:
    subject.ctx.expect("byte back from swap", subject.read(1), bytes([DATA]))


def _swap_cache(subject: Subject) -> None:
    _swapped(subject)
    _read_back(subject)


def _swap_cache_protected(subject: Subject) -> None:
    _swapped_protected(subject)
    _read_back(subject)


def _forked(subject: Subject) -> None:
    _copy(subject)
    subject.ctx.fork_only()


def _pinned(subject: Subject) -> None:
    _copy(subject)
    ring = Pin(subject.at, subject.ctx.page).take(syscall)
    subject.ctx.callback(os.close, ring)


def _huge(subject: Subject) -> None:
    """Check that the region was one huge page before it was registered."""
    if mapped_huge(subject.region.start) != HUGE_PAGE:
        subject.ctx.lack("THP", "the kernel gave no transparent huge page")


def _filled(memory: MemoryType) -> Page:
    return Page(Entry.PAGE, DATA, cache=DATA if memory.shared else None)


def _protected(memory: MemoryType) -> Page:
    return replace(_filled(memory), wp=True)


def _cached(memory: MemoryType) -> Page:
    return Page(cache=IN_FILE)


def _read(memory: MemoryType) -> Page:
    return Page(Entry.PAGE, IN_FILE, cache=IN_FILE)


SWAP = (needs_swap(),)
STATES = (
    State("hole", "that is missing", ALL, _nothing, lambda _: Page()),
    State("cached", "that only the file has", FILE, _nothing, _cached, is_cached=True),
    State("filled", "that COPY filled", ALL, _copy, _filled),
    State(
        "read",
        "of the file that was read",
        FILE,
        _nothing,
        _read,
        is_cached=True,
        is_read_first=True,
    ),
    State(
        "copied-on-write",
        "of the file that was written privately",
        PRIVATE_FILE,
        _nothing,
        lambda _: Page(Entry.PAGE, DATA, cache=IN_FILE),
        is_cached=True,
        is_written_first=True,
    ),
    State("zero", "that is the zero page", PRIVATE_SMALL, _zero, lambda _: Page(Entry.ZERO, 0)),
    State("protected", "that COPY filled and protected", ALL, _copy_protected, _protected),
    State(
        "read-protected",
        "of the file that was read and is protected",
        FILE,
        _protect,
        lambda memory: replace(_read(memory), wp=True),
        is_cached=True,
        is_read_first=True,
    ),
    State(
        "zero-protected",
        "that is the zero page, protected",
        PRIVATE_SMALL,
        _zero_protected,
        lambda _: Page(Entry.ZERO, 0, wp=True),
    ),
    State(
        "marker",
        "that is missing and protected",
        ALL,
        _protect,
        lambda _: Page(Entry.MARKER, wp=True),
        Feature.WP_UNPOPULATED,
    ),
    State(
        "cached-marker",
        "that only the file has, protected",
        FILE,
        _protect,
        lambda _: Page(Entry.MARKER, wp=True, cache=IN_FILE),
        is_cached=True,
    ),
    State("poison", "that is poisoned", ALL, _poison, lambda _: Page(Entry.POISON), Feature.POISON),
    State(
        "cached-poison",
        "that the file has and that is poisoned",
        FILE,
        _poison,
        lambda _: Page(Entry.POISON, cache=IN_FILE),
        Feature.POISON,
        is_cached=True,
    ),
    State("guard", "that is a guard page", SMALL, _guard, lambda _: Page(Entry.GUARD)),
    State(
        "cached-guard",
        "that the file has and that is a guard page",
        SHMEM,
        _guard,
        lambda _: Page(Entry.GUARD, cache=IN_FILE),
        is_cached=True,
    ),
    State(
        "swapped",
        "that is swapped out",
        SMALL,
        _swapped,
        lambda memory: model.reclaimed(_filled(memory), memory),
        needs=SWAP,
    ),
    State(
        "swapped-protected",
        "that is swapped out and protected",
        SMALL,
        _swapped_protected,
        lambda memory: model.reclaimed(_protected(memory), memory),
        needs=SWAP,
    ),
    State("swap-cache", "that came back from swap", SMALL, _swap_cache, _filled, needs=SWAP),
    State(
        "swap-cache-protected",
        "that came back from swap protected",
        SMALL,
        _swap_cache_protected,
        _protected,
        needs=SWAP,
    ),
    State("forked", "that a fork shares", PRIVATE, _forked, _filled),
    State("pinned", "that is pinned", ALL, _pinned, _filled, needs=(needs_pin(),)),
    State(
        "huge",
        "in a transparent huge page",
        ANON,
        _huge,
        _filled,
        needs=(needs_thp(),),
        pages=HUGE_PAGE // SMALL_PAGE,
        is_written_first=True,
    ),
)


def prepare(ctx: Context, state: State, features: Feature) -> tuple[Subject, Page]:
    """Bring a page into a state; return it and the model's page."""
    in_one_place(ctx)
    region = ctx.make(state.pages)
    if state.pages > 1:
        region.advise_thp()
    if state.is_cached:
        in_page_cache(region, IN_FILE)
    if state.is_read_first:
        ctx.expect("byte of the file", ctx.read(region.start), bytes([IN_FILE]))
    if state.is_written_first:
        region.fill(DATA)
    uffd = ctx.open(features)
    uffd.register(region, mode=MISSING_WP)
    at = region.start + state.pages // 2 * ctx.page
    subject = Subject(ctx, region, uffd, at)
    state.prepare(subject)
    return subject, state.page(ctx.memory)
