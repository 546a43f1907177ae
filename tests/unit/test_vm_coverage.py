"""tests/vm: which lines of the kernel are reached, and the reasons for those that are not."""

from __future__ import annotations

import re

import pytest

from tests.vm import _coverage
from tests.vm._coverage import Line, Source
from tests.vm._mutants import BuildError

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


def test_assertions_have_no_branches_to_reach() -> None:
    text = [
        "	BUG_ON(!a);",
        "	if (WARN_ON_ONCE(a) ||",
        "	mmap_assert_locked(mm);",
        "	if (a)",
    ]
    entries = [entry(number, 1, 1, 0) for number in range(1, 5)]
    counted = _coverage.source("mm/userfaultfd.c", text, entries)
    assert [line.branches for line in counted.lines.values()] == [[], [], [], [1, 0]]


def test_other_files_count_where_they_name_userfaultfd() -> None:
    counted = _coverage.source("mm/memory.c", TEXT, [entry(number, 1) for number in range(3, 6)])
    assert list(counted.lines) == [5]
    scan = _coverage.source(
        "fs/proc/task_mmu.c", TEXT, [entry(3, 1), entry(4, 1, function="pagemap_scan_output")]
    )
    assert list(scan.lines) == [4]


def test_patterns_choose_tests() -> None:
    some = _coverage.chosen(["UFFDIO_COPY.ok.page.*"], crossings=True)
    assert some[:2] == ["UFFDIO_COPY.ok.page.anon", "UFFDIO_COPY.ok.page.shmem"]
    every, plain = (_coverage.chosen([], crossings=with_them) for with_them in (True, False))
    assert len(plain) < len(every)
    with pytest.raises(BuildError, match="no case nothing"):
        _coverage.chosen(["nothing"], crossings=True)


def test_page_lists_what_is_not_reached_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {3: Line(3, "f", 2, [2, 0]), 4: Line(4, "f"), 5: Line(5, "f")}
    known = {("mm/a.c", "f", "if (a) ... return 1;"): "it cannot be"}
    monkeypatch.setattr(_coverage, "reasons", lambda: known)
    page = _coverage.page([Source("mm/a.c", TEXT, lines)], "6.12.1", "3 passed")
    shares = "1 of 3 (33 %) | 1 of 2 (50 %) | 1 of 2 (50 %) | 1 of 1 (100 %)"
    assert f"| mm/a.c | {shares} |" in page
    assert "| mm/a.c | `f` | `if (a) ... return 1;` | it cannot be |" in page
    missing = f"| mm/a.c | `f` | `if (a) ... return uffd_wp(b);` | {_coverage.MISSING} |"
    assert missing in page


def test_a_reason_for_a_line_that_is_reached_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "if (a) ... return 1;"
    known = {("mm/a.c", "f", text): "cannot be", ("mm/a.c", "f", "if (a)"): "old"}
    monkeypatch.setattr(_coverage, "reasons", lambda: known)
    source = Source("mm/a.c", TEXT, {3: Line(3, "f", 2), 4: Line(4, "f")})
    assert _coverage.stale([source]) == [("mm/a.c", "f", "if (a)")]


# One row of the last table of the page: file, function, text of the line, and why.
_ROW = re.compile(r"\| (\S+) \| `(\w*)` \| `(.*)` \| (.*) \|")


def test_every_line_that_is_not_reached_has_its_reason() -> None:
    """The page of the last run and the list of reasons are about the same lines."""
    _, _, table = _coverage.PAGE.read_text().partition("## Lines that are not reached")
    rows = [match.groups() for line in table.splitlines() if (match := _ROW.fullmatch(line))]
    listed = {(file, where, text.replace("\\|", "|")): why for file, where, text, why in rows}
    assert listed == _coverage.reasons()


# What the two userfaultfd.c files and PAGEMAP_SCAN are to have, in percent of what can be reached.
LINES, BRANCHES = 95, 85


@pytest.mark.parametrize("file", [*_coverage.WHOLE, _coverage.SCAN])
def test_most_of_the_kernels_own_code_is_reached(file: str) -> None:
    row = re.search(rf"^\| {file} \| .*", _coverage.PAGE.read_text(), re.MULTILINE)
    assert row is not None
    shares = [int(part) / int(whole) for part, whole in re.findall(r"(\d+) of (\d+)", row[0])]
    assert shares[2] * 100 >= LINES
    assert shares[3] * 100 >= BRANCHES
