"""The rules that the conformance suite's crossings are checked by."""

from __future__ import annotations

import errno

import pytest

from pyuffd.conformance import _crossing_parts as parts
from pyuffd.conformance import _page_model as model
from pyuffd.conformance import _page_states as states
from pyuffd.conformance import load
from pyuffd.conformance._page_model import CLOSED, FULL, Entry, Page
from pyuffd.testing._memory_types import MEMORY_TYPES

ANON, SHMEM, PRIVATE = (MEMORY_TYPES[name] for name in ("anon", "shmem", "shmem-private"))
PAIRS = [(state, name) for state in states.STATES for name in state.memory]


def test_a_page_that_is_there_is_not_replaced() -> None:
    page = Page(Entry.PAGE, 1)
    assert model.copy(page, ANON, 2) == (errno.EEXIST, -errno.EEXIST, page)
    assert model.move(page, ANON, 2) == (errno.EEXIST, -errno.EEXIST, page)
    assert model.poison(page, ANON) == (errno.EEXIST, -errno.EEXIST, page)


def test_a_page_of_the_file_is_one_that_is_there_only_for_a_shared_mapping() -> None:
    page = Page(cache=1)
    assert model.copy(page, SHMEM, 2)[0] == errno.EEXIST
    assert model.copy(page, PRIVATE, 2) == (0, 1, Page(Entry.PAGE, 2, cache=1))


def test_a_marker_goes_with_protection_and_stays_with_the_file() -> None:
    marker = model.protect(Page())
    assert marker == Page(Entry.MARKER, wp=True)
    assert model.unprotect(marker) == Page()
    assert model.dontneed(marker, ANON) == Page()
    assert model.dontneed(marker, SHMEM) == marker


@pytest.mark.parametrize(("state", "name"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_a_state_and_what_comes_of_it_are_pages_that_can_be(state: states.State, name: str) -> None:
    memory = MEMORY_TYPES[name]
    start = state.page(memory)
    pages = [start]
    pages += [between.rule(start, memory) for between in parts.BETWEENS if name in between.memory]
    pages += [op.rule(page, memory)[2] for op in parts.OPS for page in pages]
    for page in pages:
        assert (page.value is not None) == (page.entry in FULL)
        assert page.wp or page.entry is not Entry.MARKER
        assert not (page.wp and page.entry in (Entry.NONE, *CLOSED))
        if memory.shared and page.entry in FULL:
            assert page.value == page.cache
        if memory.is_anon:
            assert page.cache is None


@pytest.mark.parametrize("between", parts.BETWEENS, ids=lambda between: between.name)
def test_what_cannot_be_has_a_reason(between: parts.Between) -> None:
    for state, name in PAIRS:
        is_a_case = f"{between.name}.{state.name}" in load() and name in (
            load()[f"{between.name}.{state.name}"].memory
        )
        assert is_a_case != bool(parts.why_not(between, state, name))


def test_every_operation_meets_every_state() -> None:
    crossings = {case.name for case in load().values() if case.is_crossing}
    assert {
        f"{op.name}.on.{state.name}" for op in parts.OPS for state in states.STATES
    } <= crossings
    for state in states.STATES:
        assert load()[f"fault.write.{state.name}"].memory == state.memory
