"""Which mappings are tracked, and how; clipping them to the requested ranges."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from pyuffd import _dirty_calls as calls
from pyuffd._arguments import shown
from pyuffd._dirty_calls import Backing, Track
from pyuffd._pages import RangeLike, check_range, page_size_of, resolve_range
from pyuffd.pagemap import Pagemap
from pyuffd.regions import Region
from pyuffd.remote import Process
from pyuffd.remote._mappings import Mapping, MappingKind, Mappings, clipped

# Protecting a hole makes page tables: 4 KiB for each 2 MiB. Up to this size that is cheap.
DENSE_BYTES = 64 << 20
# Above it a mapping must be populated to a quarter.
DENSE_PART = 4

SHOWN_SPANS = 3

Span = tuple[int, int]

# Their items, if they have any, are no ranges: bytes are numbers, and a file's are its lines.
_NO_RANGES = (str, bytes, bytearray, memoryview, int, os.PathLike, io.IOBase)


@dataclass(frozen=True, slots=True)
class Row:
    """One mapping, or the requested part of it, and how it is tracked."""

    mapping: Mapping
    track: Track

    @property
    def start(self) -> int:
        """First address."""
        return self.mapping.start

    @property
    def end(self) -> int:
        """The address behind the last."""
        return self.mapping.end

    @property
    def length(self) -> int:
        """Size in bytes."""
        return self.mapping.length

    @property
    def page_size(self) -> int:
        """The unit of its faults."""
        return self.mapping.page_size

    @property
    def backing(self) -> Backing:
        """The content of a page that is in no page table."""
        mapping = self.mapping
        if not mapping.has_file:
            return Backing.ZERO
        return Backing.FILE if mapping.shared else Backing.COPIED

    def packed(self, uffd: int) -> tuple[int, int, Track, Backing, int]:
        """Return it for C, with the userfaultfd that it is registered with."""
        mapping = self.mapping
        return mapping.start, mapping.end, self.track, self.backing, uffd


def in_scope(mappings: Mappings, scope: Sequence[Span] | None) -> Iterator[Mapping]:
    """Yield the mappings, or their parts, inside sorted spans; all of them if there are none."""
    if scope is None:
        yield from mappings
        return
    spans = iter(scope)
    span = next(spans, None)
    for mapping in mappings:
        while span is not None and span[1] <= mapping.start:
            span = next(spans, None)
        while span is not None and span[0] < mapping.end:
            yield clipped(mapping, *span)
            if span[1] > mapping.end:
                break
            span = next(spans, None)
        if span is None:
            return


def spans_of(ranges: Iterable[RangeLike], purpose: str) -> list[Span]:
    """Return ranges, checked and merged; without any, the error names the purpose."""
    found = []
    for item in ranges:
        start, length = resolve_range(item, None, name="ranges")
        check_range(start, length, page_size_of(item))
        found.append((start, start + length))
    if not found:
        raise ValueError(f"no ranges to {purpose}")
    return merged(found)


def refuse_own_memory(process: Process, ranges: Iterable[RangeLike]) -> None:
    """Raise ValueError for a region of this process whose addresses another one does not use.

    A fork has the memory of its parent, so it may be meant.
    """
    if process.pid == os.getpid():
        return
    for one in ranges:
        if not isinstance(one, Region):
            continue
        if not process._mappings_in(packed([(one.start, one.start + one.length)])):
            raise ValueError(
                f"ranges: {one!r} is memory of this process, and process {process.pid} has nothing"
                " at its addresses"
            )


def refuse_unmapped(process: Process, spans: Sequence[Span]) -> None:
    """Raise ValueError if the process has nothing mapped in any of the spans."""
    if not process._mappings_in(packed(spans)):
        raise ValueError(
            f"ranges: process {process.pid} has nothing mapped in"
            f" {', '.join(f'[{start:#x}, {end:#x})' for start, end in spans[:SHOWN_SPANS])}"
            f"{', ...' if len(spans) > SHOWN_SPANS else ''}"
        )


def spans_of_target(target: object, purpose: str) -> list[Span]:
    """Return the ranges of memory of this process that a target is: one, or several.

    Raises:
        TypeError: it is neither memory nor anything else that a target may be.
    """
    is_one = hasattr(target, "length") and not isinstance(target, type)
    if is_one:
        return spans_of([cast(RangeLike, target)], purpose)
    if isinstance(target, _NO_RANGES) or not isinstance(target, Iterable):
        hint = f": of a process id, make Process({target})" if type(target) is int else ""
        raise TypeError(
            f"target must be a Process, memory, or a Userfaultfd, not {shown(target)}{hint}"
        )
    return spans_of(target, purpose)


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return sorted spans; those that touch or overlap become one."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def packed(spans: Iterable[Span]) -> memoryview:
    """Return sorted spans as C takes them."""
    words = [word for start, end in spans for word in (start, end, 0)]
    return memoryview(b"".join(word.to_bytes(8, "little") for word in words)).cast("Q")


def chosen_track(mapping: Mapping, pagemap: Pagemap, *, may_be_dense: bool) -> Track:
    """Choose how to track a mapping that has not been seen before."""
    if mapping.kind is MappingKind.HUGETLB:
        return Track.HUGE
    if mapping.has_file or mapping.shared:
        return Track.DENSE  # reclaim drops written pages of a file without a trace but the marker
    if not may_be_dense:
        return Track.SPARSE
    if mapping.length <= DENSE_BYTES:
        return Track.DENSE
    filled = calls.populated(pagemap.fileno(), mapping.start, mapping.end)
    return Track.DENSE if filled * DENSE_PART >= mapping.length else Track.SPARSE


def is_tracked_kind(mapping: Mapping) -> bool:
    """Whether the kernel has a page table for it that says what is written."""
    return mapping.kind is not MappingKind.SPECIAL
