"""The memory of this process that an engine serves, and that it reads and writes (layer L4).

The engine must never touch a missing page that it serves itself: it could not resolve the fault.
Nor may engines of several handlers wait for each other in a circle.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Generic, TypeVar
from weakref import WeakSet

from pyuffd._abi import RegisterMode
from pyuffd._fork_lock import ForkLock
from pyuffd._latch import RLock
from pyuffd._overlay import leaves_of
from pyuffd._pages import RangeLike
from pyuffd.regions import Region
from pyuffd.sources import BufferSource, PageSource

T = TypeVar("T")

# A plain number: arithmetic with flags is slow, and a restore serves thousands of ranges.
FILLED = int(RegisterMode.MISSING | RegisterMode.MINOR)

# Of all handlers of this process. The lock guards what they hold; reentrant, as a signal handler
# may serve too.
_all: WeakSet[Overlaps] = WeakSet()
_lock = ForkLock()
# Ranges to forget. A handler may have to end in a destructor, which the garbage collector runs in a
# thread that has the lock; so the next thread that takes the lock forgets them.
_removed: deque[tuple[Overlaps, Range]] = deque()


def overlaps_lock() -> RLock:
    """Return the lock of all handlers, the last that is acquired."""
    return _lock.now


def _start_anew() -> None:
    """In a fork: its handlers are its own."""
    global _all
    _all = WeakSet()
    _removed.clear()


def _settle() -> None:
    """Forget what was removed; the caller has just taken the lock."""
    while _removed:
        row = _removed[0]
        row[0]._remove(row[1])
        with suppress(ValueError):  # a signal handler has served meanwhile
            _removed.remove(row)


os.register_at_fork(after_in_child=_start_anew)


class Spans(Generic[T]):
    """Spans of addresses, which may overlap, each with its purpose.

    Spans are kept in one sorted list for each power of two above their lengths. A span of a list
    that reaches an address starts less than that power before it, so a search looks at few spans
    that do not reach it.

    The caller holds the lock. Each change is made at once, and only if no signal handler has made
    one since the lists were looked at, see `RangeModes`.
    """

    def __init__(self) -> None:
        self._lists: dict[int, list[tuple[int, int]]] = {}
        # Thousands of ranges may be served from one buffer: each span has its purposes in a dict.
        self._known: dict[tuple[int, int], dict[T, None]] = {}
        self._changes = 0

    def add(self, start: int, length: int, what: T) -> None:
        """Note a span; after an interruption this may be repeated."""
        span = (start, start + length)
        spans = self._lists.setdefault(length.bit_length(), [])
        while True:
            changes = self._changes
            users = self._known.get(span)
            if users is not None and what in users:
                return
            at = bisect_left(spans, span)
            if self._changes == changes:
                # Without a call no signal handler runs in between.
                self._changes = changes + 1
                if users is None:
                    spans[at:at], self._known[span] = [span], {what: None}
                else:
                    users[what] = None
                return

    def remove(self, start: int, length: int, what: T) -> None:
        """Forget a span, if it was noted."""
        span = (start, start + length)
        spans = self._lists.get(length.bit_length(), [])
        while True:
            changes = self._changes
            users = self._known.get(span)
            if users is None or what not in users:
                return
            at = bisect_left(spans, span)
            if self._changes == changes:
                self._changes = changes + 1
                del users[what]
                if not users:
                    del spans[at], self._known[span]
                return

    def find(self, start: int, length: int) -> T | None:
        """Return the purpose of the first span that reaches into [start, start + length)."""
        while True:
            changes = self._changes
            span = next(self._reaching(start, start + length), None)
            users = None if span is None else self._known.get(span)
            if self._changes == changes:
                for what in users or ():
                    return what
                return None

    def within(self, start: int, length: int) -> list[T]:
        """Return the purposes of the spans that reach into [start, start + length)."""
        while True:
            changes = self._changes
            spans = [*self._reaching(start, start + length)]
            users = [list(self._known.get(span, ())) for span in spans]
            if self._changes == changes:
                return list(chain.from_iterable(users))

    def _reaching(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for bits, spans in list(self._lists.items()):
            first = bisect_left(spans, (start - (1 << bits), 0))
            last = bisect_left(spans, (end, 0))
            yield from (span for span in spans[first:last] if span[1] > start)

    def __bool__(self) -> bool:
        return bool(self._known)

    def __iter__(self) -> Iterator[T]:
        for users in list(self._known.values()):
            yield from list(users)


@dataclass(frozen=True, slots=True, eq=False)  # compared and hashed without a call of Python
class Use:
    """Memory of this process that the engine reads or writes for a served range."""

    start: int
    length: int
    written: bool
    what: str  # its repr


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """A served range and the memory that it needs; two with the same values are distinct."""

    start: int
    length: int
    mode: RegisterMode
    is_here: bool  # memory of this process
    uses: tuple[Use, ...]
    file: tuple[int, int] | None = None  # the device and inode of shared memory with a descriptor
    file_start: int = 0  # the address that the beginning of the file has in this mapping

    def __str__(self) -> str:
        return f"[{self.start:#x}, +{self.length:#x})"

    def parts(self, spans: Iterable[tuple[int, int]]) -> list[Range]:
        """Return parts of it as ranges; the first one has what it uses."""
        found = [replace(self, start=start, length=length, uses=()) for start, length in spans]
        return [replace(found[0], uses=self.uses), *found[1:]]


def range_of(
    region: RangeLike,
    mode: RegisterMode,
    *,
    is_here: bool,
    source: PageSource | None,
    preserve: tuple[int, int],
    local: RangeLike | None,
    writes_local: bool,
) -> Range:
    """Return the range to serve; `preserve` is an address and a length, (0, 0) without one."""
    uses = []
    for leaf in leaves_of(source):
        if isinstance(leaf, BufferSource):
            uses.append(Use(leaf.address, leaf.length, False, repr(leaf)))
    if preserve[0]:
        uses.append(Use(*preserve, True, f"preserve={preserve[0]:#x} + {preserve[1]:#x} bytes"))
    if local is not None and (preserve[0] or writes_local):
        uses.append(Use(local.start, region.length, writes_local, f"local={local!r}"))
    file, file_start = None, 0
    if is_here and isinstance(region, Region) and region.shared and region.fd is not None:
        status = os.fstat(region.fd)
        file, file_start = (status.st_dev, status.st_ino), region.start - region.offset
    return Range(region.start, region.length, mode, is_here, tuple(uses), file, file_start)


class Overlaps:
    """The ranges that one engine serves, to refuse one whose content is in another."""

    def __init__(self) -> None:
        self._filled: Spans[Range] = Spans()  # ranges whose pages may be missing
        self._served: Spans[Range] = Spans()  # all ranges: writing to one may fault
        self._files: dict[tuple[int, int], Spans[Range]] = {}  # those of `_filled`, by file
        self._read: Spans[tuple[Range, Use]] = Spans()
        self._written: Spans[tuple[Range, Use]] = Spans()
        # Engines for whose pages this one may wait; some of them perhaps no longer.
        self._waits_for: WeakSet[Overlaps] = WeakSet()
        with _lock.now:
            _all.add(self)

    def check(self, new: Range) -> None:
        """Raise ValueError if the engine would wait for itself with `new` among the ranges."""
        with _lock.now:
            _settle()
            self._check_alone(new)
            self._check_circle(new)

    def check_many(self, new: Iterable[Range]) -> None:
        """Check several ranges, which use no memory."""
        with _lock.now:
            _settle()
            if not any(one._read or one._written for one in _all):
                return  # nobody waits for memory of any
            for each in new:
                self._check_alone(each)
                self._check_circle(each)

    def _check_alone(self, new: Range) -> None:
        for use in new.uses:
            served = (self._served if use.written else self._filled).find(use.start, use.length)
            if served is None and new.is_here and _faults(use, new) and _meet(use, new):
                served = new
            if served is not None:
                raise ValueError(f"{use.what} lies inside the served range {served}")
        if not new.is_here:
            return
        found = self._written.find(new.start, new.length)
        if found is None and int(new.mode) & FILLED:
            found = self._read.find(new.start, new.length)
        if found is not None:
            other, use = found
            raise ValueError(
                f"the range {new} cannot be served: {use.what} of the served range {other} lies"
                " in it, and its faults would wait for each other"
            )

    def _check_circle(self, new: Range) -> None:
        if len(_all) < 2:
            return  # no other one
        others = [one for one in _all if one is not self]
        for one in others:
            if any(one._answers(use) for use in new.uses):
                self._waits_for.add(one)
            if new.is_here and one._touches(new):
                one._waits_for.add(self)

        def needed_now(by: Overlaps) -> list[Overlaps]:
            uses = list(by._uses())
            if by is self:
                uses += new.uses
            found = [one for one in others if one is not by and any(map(one._answers, uses))]
            if by is not self and any(self._answers(use, new) for use in uses):
                found.append(self)
            return found

        # Looking at every use is expensive: first see if the engines that ever waited are a circle.
        if not _is_circle(self, lambda by: list(by._waits_for)) or not _is_circle(self, needed_now):
            return
        raise ValueError(
            f"the range {new} cannot be served: handlers of this process would wait for each other,"
            " as each has content in memory that another one serves"
        )

    def _answers(self, use: Use, new: Range | None = None) -> bool:
        """Return whether a use may fault on a page that this engine serves, or will serve."""
        spans = self._served if use.written else self._filled
        if spans.find(use.start, use.length) is not None:
            return True
        return new is not None and new.is_here and _faults(use, new) and _meet(use, new)

    def _touches(self, new: Range) -> bool:
        """Return whether this engine may fault on a page of a new range."""
        if self._written.find(new.start, new.length) is not None:
            return True
        return bool(int(new.mode) & FILLED) and self._read.find(new.start, new.length) is not None

    def _uses(self) -> Iterator[Use]:
        for spans in (self._read, self._written):
            for _, use in spans:
                yield use

    def check_drop(self, start: int, length: int) -> None:
        """Raise ValueError if pages would be dropped that are served already."""
        with _lock.now:
            _settle()
            served = self._served.find(start, length)
        if served is not None:
            raise ValueError(
                f"present='drop' of [{start:#x}, +{length:#x}): the range {served} is served; call"
                " unserve() first"
            )

    def check_read(self, start: int, length: int, name: str) -> None:
        """Raise ValueError if the engine would wait for itself when it reads this memory."""
        with _lock.now:
            _settle()
            served = self._filled.find(start, length)
        if served is not None:
            raise ValueError(
                f"{name} [{start:#x}, +{length:#x}) lies inside the served range {served}"
            )

    def check_elsewhere(self, one: Range, start: int, length: int, op: str) -> None:
        """Raise ValueError if pages to be dropped are served at another address too.

        The handler there is not told, so it would take them as dropped by their owner: zeros.
        """
        if one.file is None:
            return
        offset = start - one.file_start
        with _lock.now:
            _settle()
            others = (
                other
                for by in _all
                if one.file in by._files
                for other in by._files[one.file].within(offset, length)
                if other.file_start != one.file_start
            )
            other = next(others, None)
        if other is not None:
            raise ValueError(
                f"{op} of [{start:#x}, +{length:#x}): the served range {other} of this process is"
                " the same memory, and would read zeros there; call unserve() for it first"
            )

    def add(self, new: Range) -> None:
        """Note a range that is served from now on."""
        self.add_many([new])

    def add_many(self, all_new: Iterable[Range]) -> None:
        """Note ranges that are served from now on."""
        with _lock.now:
            _settle()
            for new in all_new:
                for spans, start in self._entries(new):
                    spans.add(start, new.length, new)
                for use in new.uses:
                    self._spans_of(use).add(use.start, use.length, (new, use))

    def remove(self, old: Range) -> None:
        """Forget a range that is no longer served."""
        _removed.append((self, old))

    def _remove(self, old: Range) -> None:
        for spans, start in self._entries(old):
            spans.remove(start, old.length, old)
        # Without a call no signal handler runs in between.
        if old.file in self._files and not self._files[old.file]._known:
            del self._files[old.file]
        for use in old.uses:
            self._spans_of(use).remove(use.start, use.length, (old, use))

    def _entries(self, one: Range) -> Iterator[tuple[Spans[Range], int]]:
        if one.is_here:
            yield self._served, one.start
            if int(one.mode) & FILLED:
                yield self._filled, one.start
                if one.file is not None:
                    files = self._files.setdefault(one.file, Spans())
                    yield files, one.start - one.file_start

    def _spans_of(self, use: Use) -> Spans[tuple[Range, Use]]:
        return self._written if use.written else self._read


def _is_circle(one: Overlaps, needed: Callable[[Overlaps], list[Overlaps]]) -> bool:
    """Return whether following those that each one needs leads back to the first."""
    seen: set[Overlaps] = set()
    left = needed(one)
    while left:
        by = left.pop()
        if by is one:
            return True
        if by not in seen:
            seen.add(by)
            left += needed(by)
    return False


def _faults(use: Use, served: Range) -> bool:
    """Return whether this use of a range's pages may fault; reading protected pages does not."""
    return use.written or bool(int(served.mode) & FILLED)


def _meet(use: Use, served: Range) -> bool:
    return use.start < served.start + served.length and served.start < use.start + use.length
