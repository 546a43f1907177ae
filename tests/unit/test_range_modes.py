"""The record of registered ranges, compared with a model that has one entry per page."""

from __future__ import annotations

import linecache
import random
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from pyuffd import RegisterMode, _range_modes
from pyuffd._range_modes import RangeModes

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
PAGES = 24


class Model:
    """As the kernel does: a subset of a page's modes changes nothing, other modes replace them."""

    def __init__(self) -> None:
        self.pages: list[RegisterMode | None] = [None] * PAGES

    def set(self, start: int, end: int, mode: RegisterMode) -> None:
        for page in range(start, end):
            old = self.pages[page]
            if old is None or int(old) | int(mode) != int(old):
                self.pages[page] = mode

    def clear(self, start: int, end: int) -> None:
        self.pages[start:end] = [None] * (end - start)


def by_page(modes: RangeModes) -> list[RegisterMode | None]:
    pages: list[RegisterMode | None] = [None] * PAGES
    last_end = 0
    for start, end, mode in modes.overlapping(0, PAGES):
        assert last_end <= start < end, "ranges overlap, or are empty or out of order"
        pages[start:end] = [mode] * (end - start)
        last_end = end
    return pages


@pytest.mark.parametrize("seed", range(50))
def test_many_at_once(seed: int) -> None:
    rng = random.Random(seed)
    modes, model = RangeModes(), Model()
    for _ in range(60):
        edges = sorted(rng.sample(range(PAGES + 1), 2 * rng.randint(0, 4)))
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        if rng.random() < 0.25:
            modes.clear_all(spans)
            for span in spans:
                model.clear(*span)
        else:
            mode = rng.choice([MISSING, WP, MINOR, MISSING | WP, WP | MINOR, MISSING | WP | MINOR])
            modes.set_all(spans, mode)
            for span in spans:
                model.set(*span, mode)
        assert by_page(modes) == model.pages


@pytest.mark.parametrize("seed", range(50))
def test_against_the_model(seed: int) -> None:
    rng = random.Random(seed)
    modes, model = RangeModes(), Model()
    for _ in range(60):
        start = rng.randrange(PAGES)
        end = rng.randint(start + 1, PAGES)
        if rng.random() < 0.25:
            modes.clear(start, end)
            model.clear(start, end)
        else:
            mode = rng.choice([MISSING, WP, MINOR, MISSING | WP, WP | MINOR, MISSING | WP | MINOR])
            modes.set(start, end, mode)
            model.set(start, end, mode)
        assert by_page(modes) == model.pages


def test_overlapping_is_cut_to_the_question() -> None:
    modes = RangeModes()
    modes.set(0, 10, MISSING)
    modes.set(12, 20, WP)
    assert modes.overlapping(5, 15) == [(5, 10, MISSING), (12, 15, WP)]
    assert modes.overlapping(10, 12) == []
    assert modes.overlapping(20, 30) == []


def test_clear_splits() -> None:
    modes = RangeModes()
    modes.set(0, 10, MISSING | WP)
    modes.clear(3, 5)
    assert modes.overlapping(0, 10) == [(0, 3, MISSING | WP), (5, 10, MISSING | WP)]


# Nothing can come between it and the comparison before it.
ASSIGNMENT = "self._changes, self._rows[where] ="

Change = Callable[[RangeModes | Model], None]
OUTER: tuple[Change, ...] = (
    lambda modes: modes.set(10, 14, WP),
    lambda modes: modes.set(9, 15, MISSING),
    lambda modes: modes.clear(10, 14),
)
INNER: tuple[Change, ...] = (
    lambda modes: modes.clear(0, 4),
    lambda modes: modes.set(2, 3, WP),
    lambda modes: modes.clear(16, 24),
    lambda modes: modes.set(5, 7, MINOR),
)


def filled() -> RangeModes:
    modes = RangeModes()
    for start in (0, 8, 16):
        modes.set(start, start + 8, MISSING)
    return modes


def changed_at(line: int, outer: Change, inner: Change) -> tuple[RangeModes, int]:
    """Make a change before the line with this number of another one; return how many it has."""
    modes, seen = filled(), 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != _range_modes.__file__:
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not text.strip().startswith(ASSIGNMENT):
            seen += 1
            if seen == line:
                inner(modes)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        outer(modes)
    finally:
        sys.settrace(before)
    return modes, seen


@pytest.mark.parametrize("inner", range(len(INNER)))
@pytest.mark.parametrize("outer", range(len(OUTER)))
def test_a_change_inside_another_one(outer: int, inner: int) -> None:
    model = Model()
    model.set(0, PAGES, MISSING)
    INNER[inner](model)
    OUTER[outer](model)
    _, lines = changed_at(0, OUTER[outer], INNER[inner])
    for line in range(1, lines):
        modes, _ = changed_at(line, OUTER[outer], INNER[inner])
        assert by_page(modes) == model.pages, f"line {line} of {lines}"


@pytest.mark.parametrize("inner", range(len(INNER)))
@pytest.mark.parametrize("outer", range(len(OUTER)))
def test_a_change_by_another_thread(outer: int, inner: int) -> None:
    """Without the GIL it may come between the comparison and the assignment too."""
    modes, model = filled(), Model()
    model.set(0, PAGES, MISSING)
    INNER[inner](model)
    OUTER[outer](model)
    other = threading.Thread(target=INNER[inner], args=(modes,))

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and text.strip().startswith(ASSIGNMENT):
            other.start()
            other.join(0.1)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        OUTER[outer](modes)
    finally:
        sys.settrace(before)
    other.join()
    assert by_page(modes) == model.pages
