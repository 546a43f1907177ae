"""tests/vm: which lines of the kernel are reached, and the reasons for those that are not."""

from __future__ import annotations

import pytest

from tests.vm import _coverage
from tests.vm._coverage import Line, Source

TEXT = ["int f(void)", "{", "	if (a)", "		return 1;", "	return uffd_wp(b);", "}"]


def entry(number: int, count: int, *branches: int, function: str = "f") -> dict[str, object]:
    return {
        "line_number": number,
        "function_name": function,
        "count": count,
        "branches": [{"count": times} for times in branches],
    }


def test_copies_of_a_function_count_together() -> None:
    lines = _coverage.merged(
        [entry(3, 2, 2, 0), entry(4, 0), entry(3, 1, 0, 1, function="f.part.0"), entry(5, 2)]
    )
    assert [(line.number, line.count, line.branches) for line in lines.values()] == [
        (3, 3, [2, 1]),
        (4, 0, []),
        (5, 2, []),
    ]
    counted = _coverage.count(list(lines.values()))
    assert str(counted) == "2 of 3 (67 %) | 2 of 2 (100 %)"


def test_page_lists_what_is_not_reached_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {3: Line(3, "f", 2, [2, 0]), 4: Line(4, "f"), 5: Line(5, "f")}
    known = {("mm/a.c", "f", "return 1;"): "it cannot be"}
    monkeypatch.setattr(_coverage, "reasons", lambda: known)
    page = _coverage.page([Source("mm/a.c", TEXT, lines)], "6.12.1", "3 passed")
    assert "| mm/a.c | 1 of 3 (33 %) | 1 of 2 (50 %) |" in page
    assert "| mm/a.c | `f` | `return 1;` | it cannot be |" in page
    assert f"| mm/a.c | `f` | `return uffd_wp(b);` | {_coverage.MISSING} |" in page


def test_a_reason_for_a_line_that_is_reached_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {("mm/a.c", "f", "return 1;"): "cannot be", ("mm/a.c", "f", "if (a)"): "old"}
    monkeypatch.setattr(_coverage, "reasons", lambda: known)
    source = Source("mm/a.c", TEXT, {3: Line(3, "f", 2), 4: Line(4, "f")})
    assert _coverage.stale([source]) == [("mm/a.c", "f", "if (a)")]
