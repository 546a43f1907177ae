"""What changed between two readings of a process's mappings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pyuffd.remote._mappings import Mapping, MappingKind, clipped


@dataclass(frozen=True, slots=True)
class Mapped:
    """A new mapping, whose populated pages are in `written`; the rest reads as zeros, or its file.

    Attributes:
        start: First address.
        end: The address behind the last.
        mapping: What was mapped.
    """

    start: int
    end: int
    mapping: Mapping


@dataclass(frozen=True, slots=True)
class Unmapped:
    """A range that is no longer mapped."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Moved:
    """A mapping of a file that has moved, with the same length and place in the file.

    Its populated pages are in `written` as those of a new mapping. Private anonymous memory that
    moves is an Unmapped and a Mapped: the kernel does not tell that they are the same memory.

    Attributes:
        old_start: Its first address before.
        start: Its first address.
        end: The address behind its last.
        mapping: The mapping as it is now.
    """

    old_start: int
    start: int
    end: int
    mapping: Mapping


@dataclass(frozen=True, slots=True)
class Grown:
    """The part by which a mapping has grown: the stack downwards, the heap and others upwards.

    Attributes:
        start: First address of the new part.
        end: The address behind its last.
        mapping: The whole mapping.
    """

    start: int
    end: int
    mapping: Mapping


@dataclass(frozen=True, slots=True)
class Protected:
    """A range whose permissions have changed (mprotect); its content has not.

    Attributes:
        start: First address.
        end: The address behind the last.
        mapping: The mapping with its new permissions.
    """

    start: int
    end: int
    mapping: Mapping


# These grow by themselves, in a mapping of their own where the old one is registered.
_GROWING = (MappingKind.HEAP, MappingKind.STACK)

LayoutChange = Mapped | Unmapped | Moved | Grown | Protected


def changes(old: Iterable[Mapping], new: Iterable[Mapping]) -> list[LayoutChange]:
    """Return what changed, in ascending order of address. Splits and merges are no change."""
    before, after = _only_different(old, new)
    found = _with_moves(list(_differences(before, after)), before)
    return _joined(sorted(found, key=lambda change: (change.start, isinstance(change, Mapped))))


def _only_different(
    old: Iterable[Mapping], new: Iterable[Mapping]
) -> tuple[list[Mapping], list[Mapping]]:
    first, second = set(old), set(new)
    return sorted(first - second, key=_start), sorted(second - first, key=_start)


def _start(mapping: Mapping) -> int:
    return mapping.start


def _identity(mapping: Mapping) -> tuple[object, ...]:
    """Return what stays the same of a mapping that is split, merged or protected."""
    if not mapping.has_file:
        return (mapping.kind is MappingKind.SPECIAL, mapping.shared)
    return (mapping.device, mapping.inode, mapping.offset - mapping.start, mapping.shared)


def _segments(
    before: Sequence[Mapping], after: Sequence[Mapping]
) -> Iterator[tuple[int, int, Mapping | None, Mapping | None]]:
    """Yield (start, end, mapping before, mapping after) of each range that either has."""
    edges = sorted({edge for mapping in (*before, *after) for edge in (mapping.start, mapping.end)})
    i = j = 0
    for start, end in pairwise(edges):
        while i < len(before) and before[i].end <= start:
            i += 1
        while j < len(after) and after[j].end <= start:
            j += 1
        was = before[i] if i < len(before) and before[i].start <= start else None
        now = after[j] if j < len(after) and after[j].start <= start else None
        if was is not None or now is not None:
            yield start, end, was, now


def _differences(before: Sequence[Mapping], after: Sequence[Mapping]) -> Iterator[LayoutChange]:
    for start, end, was, now in _segments(before, after):
        if now is None:
            yield Unmapped(start, end)
        elif was is None:
            is_grown = now.kind in _GROWING or (start, end) != (now.start, now.end)
            yield Grown(start, end, now) if is_grown else Mapped(start, end, now)
        elif _identity(was) != _identity(now):
            yield Unmapped(start, end)
            yield Mapped(start, end, clipped(now, start, end))
        elif was.permissions != now.permissions:
            yield Protected(start, end, now)


def _with_moves(found: list[LayoutChange], before: Sequence[Mapping]) -> list[LayoutChange]:
    """Join Unmapped and Mapped of the same part of a file, where both are whole mappings."""
    unmapped = {(change.start, change.end) for change in found if isinstance(change, Unmapped)}
    gone = {
        _place_in_file(mapping): mapping.start
        for mapping in before
        if mapping.has_file and (mapping.start, mapping.end) in unmapped
    }
    moved: set[int] = set()
    for index, change in enumerate(found):
        if isinstance(change, Mapped) and change.mapping.has_file:
            old_start = gone.pop(_place_in_file(change.mapping), None)
            if old_start is not None:
                moved.add(old_start)
                found[index] = Moved(old_start, change.start, change.end, change.mapping)
    return [
        change for change in found if not (isinstance(change, Unmapped) and change.start in moved)
    ]


def _joined(found: Iterable[LayoutChange]) -> list[LayoutChange]:
    """Make one of adjacent Unmapped."""
    result: list[LayoutChange] = []
    for change in found:
        last = result[-1] if result else None
        if isinstance(change, Unmapped) and isinstance(last, Unmapped) and last.end == change.start:
            result[-1] = Unmapped(last.start, change.end)
        else:
            result.append(change)
    return result


def _place_in_file(mapping: Mapping) -> tuple[object, ...]:
    return (mapping.device, mapping.inode, mapping.offset, mapping.length, mapping.shared)
