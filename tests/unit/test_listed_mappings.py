"""Mappings that change while the kernel lists them: the lists stay ascending and disjoint."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise

import pytest

from pyuffd import Region, _memory, _vmas
from pyuffd._remote_calls import maps_read
from pyuffd._vmas import Vma
from pyuffd.remote._mappings import Kinds, Mappings, with_details
from tests._memory import PAGE

A, B, C, D = (0x10000 * n for n in (1, 2, 3, 4))
ROW = "{:x}-{:x} rw-p {:08x} 00:00 {} {}\n"
MAPPINGS = 400


def text_of(*rows: tuple[int, int, str]) -> str:
    return "".join(ROW.format(start, end, 0, 0, name) for start, end, name in rows)


def listed(text: str) -> Mappings:
    """Return mappings as they are read from a /proc/PID/maps that has this text."""
    with ExitStack() as stack:
        fd = os.memfd_create("maps")
        stack.callback(os.close, fd)
        os.write(fd, text.encode())
        return Mappings(*maps_read(fd, os.getpid()), Kinds("self", -1))


def spans(found: Iterator[Vma] | Mappings | list[Vma]) -> list[tuple[int, int]]:
    return [(each.start, each.end) for each in found]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(A, B, "a"), (A, C, "a")], [(A, C, "a")]),
        ([(A, B, "a"), (B, C, "b"), (A, D, "a")], [(A, D, "a")]),
        ([(A, C, "a"), (B, D, "b")], [(A, B, "a"), (B, D, "b")]),
        ([(A, B, "a"), (B, C, "bb"), (B, D, "c")], [(A, B, "a"), (B, D, "c")]),
        ([(B, C, "b"), (A, D, "")], [(A, D, "")]),
        ([(A, B, "a"), (C, D, "c")], [(A, B, "a"), (C, D, "c")]),
    ],
)
def test_listed_twice(
    rows: list[tuple[int, int, str]], expected: list[tuple[int, int, str]]
) -> None:
    found = listed(text_of(*rows))
    assert [(m.start, m.end, m.path) for m in found] == expected
    vmas = _vmas.disjoint(Vma(start, end, "rw-p", 0, 0, 0, name) for start, end, name in rows)
    assert [(vma.start, vma.end, vma.path) for vma in vmas] == expected


def listed_while_they_merge() -> str:
    """List this process's mappings; whenever the kernel pauses, merge the last with the next."""
    readable, unreadable = mmap.PROT_READ, 0
    with Region.anonymous(MAPPINGS * PAGE) as region, ExitStack() as stack:
        for page in range(MAPPINGS):
            _memory.mprotect(region.start + page * PAGE, PAGE, readable if page % 2 else unreadable)
        fd = os.open("/proc/self/maps", os.O_RDONLY)
        stack.callback(os.close, fd)
        text = b""
        while piece := os.pread(fd, 1 << 16, len(text)):
            text += piece
            end = int(piece.splitlines()[-1].split()[0].partition(b"-")[2], 16)
            page = (end - region.start) // PAGE
            if 0 < page < MAPPINGS:
                _memory.mprotect(end, PAGE, unreadable if page % 2 else readable)
        return text.decode()


def test_merged_while_listed() -> None:
    text = listed_while_they_merge()
    heads = [line.split()[0].split("-") for line in text.splitlines()]
    raw = [(int(start, 16), int(end, 16)) for start, end in heads]
    assert any(after[0] < before[1] for before, after in pairwise(raw))  # what the kernel says
    found = spans(listed(text))
    assert all(before[1] <= after[0] for before, after in pairwise(found))
    assert found == spans(_vmas.disjoint(_vmas._listed(text.splitlines(True), 0, 1 << 64)))


def test_details_of_mappings_that_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    later = [
        Vma(A, C, "rw-p", 0, 0, 0, "", flags=frozenset({"um"})),
        Vma(D, D + PAGE, "rw-p", 0, 0, 0, "", flags=frozenset({"uw"})),
    ]
    monkeypatch.setattr(_vmas, "overlapping", lambda *_, **__: iter(later))
    before = listed(text_of((A, B, ""), (B, C, ""), (C, D, ""), (D, D + PAGE, "")))
    flags = [set(m.flags) for m in with_details(before, "self")]
    assert flags == [{"um"}, {"um"}, set(), {"uw"}]
