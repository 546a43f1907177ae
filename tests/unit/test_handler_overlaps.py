"""Spans of memory and their purposes, compared with a search of all spans."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable

import pytest

from pyuffd.handlers._overlaps import Spans


def brute_force(known: list[tuple[int, int, int]], start: int, length: int) -> set[int]:
    return {what for a, n, what in known if a < start + length and start < a + n}


def test_finds_what_a_search_of_all_finds() -> None:
    rng = random.Random(7)
    spans: Spans[int] = Spans()
    known: list[tuple[int, int, int]] = []
    for what in range(3_000):
        if known and rng.random() < 0.45:
            spans.remove(*known.pop(rng.randrange(len(known))))
        else:
            one = (rng.randrange(5_000), rng.choice([1, 2, 7, 16, 100, 2_000]), what)
            known.append(one)
            spans.add(*one)
        start, length = rng.randrange(5_000), rng.choice([1, 10, 300])
        right = brute_force(known, start, length)
        found = spans.find(start, length)
        assert found in right if right else found is None


def test_the_same_span_twice() -> None:
    spans: Spans[str] = Spans()
    spans.add(10, 5, "a")
    spans.add(10, 5, "b")
    spans.remove(10, 5, "a")
    assert spans.find(14, 1) == "b"
    spans.remove(10, 5, "b")
    assert spans.find(14, 1) is None


def test_ends_do_not_belong_to_it() -> None:
    spans: Spans[str] = Spans()
    spans.add(10, 5, "a")
    assert [spans.find(at, 1) for at in (9, 10, 14, 15)] == [None, "a", "a", None]
    assert spans.find(0, 10) is None


def seconds_for(count: int) -> float:
    """CPU time of adding spans that do not touch, each after a search for it."""
    spans: Spans[int] = Spans()
    began = time.thread_time()
    for index in range(count):
        assert spans.find(index * 8192, 4096) is None
        spans.add(index * 8192, 4096, index)
    return time.thread_time() - began


def test_time_does_not_grow_with_their_number() -> None:
    few, many = 2_000, 32_000
    # Other processes slow one of a pair down, and the collector visits all objects of the session:
    # use the best pair.
    gc.disable()
    try:
        times = min(seconds_for(many) / seconds_for(few) for _ in range(5))
    finally:
        gc.enable()
    assert times < 3 * many / few  # quadratic time would be the square of that


class Counted:
    """Counts comparisons with others."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return self is other

    def __hash__(self) -> int:
        return object.__hash__(self)


def test_many_purposes_of_one_span() -> None:
    """As if thousands of ranges were served from one buffer: none is compared with all others."""
    spans: Spans[Counted] = Spans()
    all_of_them = [Counted() for _ in range(1_000)]
    before = Counted.compared
    for one in all_of_them:
        assert (spans.find(0, 1) is None) is (one is all_of_them[0])
        spans.add(0, 10, one)
    assert [*spans] == spans.within(5, 1) == all_of_them
    for one in all_of_them[::2]:
        spans.remove(0, 10, one)
    assert Counted.compared - before < len(all_of_them)
    assert spans.within(5, 1) == all_of_them[1::2]


class Meddling:
    """What changes the spans while they are compared, as a signal handler may."""

    def __init__(self, change: Callable[[], object]) -> None:
        self._change = change

    def __eq__(self, other: object) -> bool:
        self._change()
        return self is other

    def __hash__(self) -> int:
        return hash("second")  # it is compared with this one


@pytest.mark.parametrize("inner", ["add", "remove", "add longer", "remove all"])
@pytest.mark.parametrize("outer", ["add", "remove"])
def test_a_change_inside_another_one(outer: str, inner: str) -> None:
    spans: Spans[object] = Spans()
    done: list[str] = []

    def change() -> None:
        if done:
            return
        done.append(inner)
        if inner == "add":
            spans.add(5, 10, "new")
        elif inner == "add longer":
            spans.add(0, 1000, "new")
        else:
            spans.remove(10, 10, "first")
            spans.remove(25, 10, "third" if inner == "remove all" else "none")

    one = Meddling(change)
    spans.add(10, 10, "first")
    spans.add(15, 10, one)
    spans.add(25, 10, "third")
    if outer == "add":
        spans.add(15, 10, "second")
    else:
        spans.remove(15, 10, "second")
        spans.remove(15, 10, one)
    assert done
    expected = {"first", "third", "new", "second"}
    expected -= {"new"} if inner.startswith("remove") else set()
    expected -= {"first"} if inner.startswith("remove") else set()
    expected -= {"third"} if inner == "remove all" else set()
    expected -= {"second"} if outer == "remove" else set()
    found = [one for one in spans.within(0, 1000) if isinstance(one, str)]
    assert sorted(found) == sorted(expected)
    assert sorted(str(one) for one in spans if isinstance(one, str)) == sorted(expected)
