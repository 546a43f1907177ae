"""The record of registered ranges, compared with a model that has one entry per page."""

from __future__ import annotations

import random

import pytest

from pyuffd import RegisterMode
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
