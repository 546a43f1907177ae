"""What a fork does about tracked ranges: its work grows with their number, not the square of it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pyuffd import Feature, RegisterMode, _fork_writes, _vmas
from pyuffd._vmas import Vma

FEW, MANY = 150, 600
# Four times as many are four times the work; with its square, 16 times.
MOST = 7
STEP = 0x4000


class Counted(int):
    """An address that counts how often one is compared."""

    compared = 0

    def __lt__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) < int(other)

    def __le__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) <= int(other)

    def __gt__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) > int(other)

    def __ge__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) >= int(other)


class Uffd:
    """A userfaultfd with ranges for WP."""

    adopted = False
    closed = False
    features = Feature(0)

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self._ranges = ranges
        self._pid = os.getpid()

    def _registered_for(self, mode: RegisterMode) -> list[tuple[int, int]]:
        assert mode == RegisterMode.WP
        return self._ranges


def registered(count: int) -> Uffd:
    """Two ranges, and then a gap, each time."""
    uffd = Uffd(
        [
            (Counted(i * STEP + part), Counted(i * STEP + part + 0x1000))
            for i in range(count)
            for part in (0, 0x1000)
        ]
    )
    _fork_writes.track(uffd)
    return uffd


def mapped(monkeypatch: pytest.MonkeyPatch, spans: list[tuple[int, int]]) -> None:
    """Have these shared mappings, registered with some userfaultfd."""

    def overlapping(start: int, end: int, *, details: bool) -> Iterator[Vma]:
        assert details
        for first, past in spans:
            if first < end and past > start:
                yield Vma(first, past, "rw-s", 0, 1, 1, "/memfd:x", flags=frozenset({"uw"}))

    monkeypatch.setattr(_vmas, "overlapping", overlapping)


def compared(monkeypatch: pytest.MonkeyPatch, count: int) -> int:
    # In the gaps, so that no range is found.
    mapped(monkeypatch, [(i * STEP + 0x2000, i * STEP + 0x3000) for i in range(count - 1)])
    before = Counted.compared
    assert _fork_writes._unseen(registered(count)) is None
    return Counted.compared - before


def test_work_grows_with_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    few = compared(monkeypatch, FEW)
    assert few > FEW
    assert compared(monkeypatch, MANY) <= MOST * few


@pytest.mark.parametrize(
    ("mapping", "found"),
    [
        ((0x0, 0x1000), (0x0, 0x1000)),
        ((0x1800, 0x8000), (0x1800, 0x2000)),
        ((0x2000, 0x4800), (0x4000, 0x4800)),
        ((0x2000, 0x4000), None),
        ((0x9000, 0x10000), (0x9000, 0xA000)),
        ((0xA000, 0x10000), None),
    ],
)
def test_the_first_common_part_is_returned(
    mapping: tuple[int, int], found: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped(monkeypatch, [mapping])
    assert _fork_writes._unseen(registered(3)) == found


def test_a_mapping_behind_others_that_are_in_no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped(monkeypatch, [(0x2000, 0x3000), (0x3000, 0x4000), (0x6000, 0x8800)])
    assert _fork_writes._unseen(registered(3)) == (0x8000, 0x8800)
