"""tests/vm: the patches that break a kernel, and the two generated pages."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import pytest

from pyuffd.conformance import Report, Result, load
from tests.vm import _matrix, _matrix_rows, _mutants
from tests.vm._mutants import Builder, BuildError, Mutant, Outcome

MUTANTS = _mutants.mutants()


def result(case: str, memory: str, outcome: str, *, text: str = "", variant: str = "") -> Result:
    return Result(f"{case}.{memory}", case, memory, "What it does", outcome, text, variant)


def column(version: str, *results: Result, sentence: str = "") -> _matrix.Column:
    kernel = {"release": f"{version}.1", "version": "#1", "machine": "x86_64"}
    report = Report(kernel, 0x1FF, {one.id: one for one in results})
    return _matrix.Column(version, None if sentence else report, sentence, 4.0, 60.0)


def test_there_are_ten_mutants_at_least() -> None:
    assert len(MUTANTS) >= 10


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_names_tests_that_exist(mutant: Mutant) -> None:
    ids = [name for case in load().values() for name in case.ids]
    assert fnmatch.filter(ids, mutant.caught_by)
    assert mutant.name.partition("-")[0] in mutant.caught_by
    assert mutant.what.endswith(".")
    assert mutant.files


def outcome(name: str, *failed: str, sentence: str = "", passed: int = 3) -> Outcome:
    return Outcome(name, sentence, frozenset(failed), passed, "6.12.117", 60.0)


PATCHES = [
    Mutant("10-a", "Breaks a.", "wp-series.10.*", ""),
    Mutant("11-b", "Breaks b.", "wp-series.11.*", ""),
]


def test_all_caught() -> None:
    outcomes = [
        outcome("unmodified"),
        outcome("10-a", "wp-series.10.zap.shmem", "kselftest.x.anon"),
        outcome("11-b", "wp-series.11.hole.shmem"),
    ]
    assert _mutants.verdicts(PATCHES, outcomes) == []
    page = _mutants.page(PATCHES, outcomes)
    assert "| 1 | `10-a` | Breaks a. | `wp-series.10.zap.shmem` | 1 |" in page
    assert "| `kselftest.x.anon` | x |  |" in page


def test_a_mutant_is_caught_by_its_own_patch_only() -> None:
    outcomes = [
        outcome("unmodified"),
        outcome("10-a", "wp-series.11.hole.shmem"),
        outcome("11-b", sentence="it hung"),
    ]
    assert _mutants.verdicts(PATCHES, outcomes) == [
        "10-a is caught by no wp-series.10.* (1 other tests failed)",
        "11-b is caught by no wp-series.11.* (it hung)",
    ]
    assert "| **nothing** it hung | - |" in _mutants.page(PATCHES, outcomes)


@pytest.mark.parametrize(
    ("unmodified", "reason"),
    [
        (outcome("unmodified", "a.b"), "a.b"),
        (outcome("unmodified", sentence="no boot"), "no boot"),
        (outcome("unmodified", passed=0), "nothing ran"),
    ],
)
def test_the_unmodified_kernel_has_to_pass(unmodified: Outcome, reason: str) -> None:
    assert _mutants.verdicts([], [unmodified]) == [f"the unmodified kernel does not pass: {reason}"]


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs patch(1)")
def test_a_tree_is_restored_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pristine = tmp_path / "tree"
    (pristine / "mm").mkdir(parents=True)
    (pristine / "mm/a.c").write_text("good\n")
    (pristine / "Makefile").write_text(
        "kernelversion:\n\t@echo 6.12.1\n%:\n\t@cat mm/a.c >&2; exit 1\n"
    )
    tree = shutil.copytree(pristine, tmp_path / "copy")
    patch = "--- a/mm/a.c\n+++ b/mm/a.c\n@@ -1 +1 @@\n-good\n+bad\n"
    mutants = [
        Mutant("10-a", "Breaks a.", "*", patch),
        Mutant("10-b", "Does not apply.", "*", patch.replace("-good", "-absent")),
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_mutants, "_BUILD_PROGRAMS", ("make", "patch"))
    monkeypatch.setattr(_mutants, "mutants", lambda: mutants)
    monkeypatch.setattr(Builder, "configure", lambda self: None)
    builder = Builder(tree, 1, mutants, pristine)
    with pytest.raises(BuildError, match="bad"):
        builder.image(mutants[0])
    assert (tree / "mm/a.c").read_text() == "good\n"
    # As after a build that was killed.
    (tree / "mm/a.c").write_text("bad\n")
    with pytest.raises(BuildError, match="does not apply"):
        builder.image(mutants[1])
    assert (tree / "mm/a.c").read_text() == "good\n"


def test_building_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="flex"):
        Builder(tmp_path, 1)


def test_cells() -> None:
    assert _matrix.cell([]) == "."
    same = [result("a.b", "anon", "passed"), result("a.b", "shmem", "passed")]
    assert _matrix.cell(same) == "pass"
    mixed = [
        *same,
        result("a.b", "hugetlb", "failed"),
        result("a.b", "hugetlb-private", "passed", variant="old"),
    ]
    assert _matrix.cell(mixed) == (
        "pass: anon, shmem; **FAIL**: hugetlb; pass (old): hugetlb-private"
    )


def test_the_page_has_every_case_and_failure() -> None:
    page = _matrix.page(
        [
            column("5.10", result("a.b", "anon", "skipped", text="needs Feature.MOVE")),
            column("6.12", result("a.b", "anon", "failed", text="saw X\nmore")),
            column("7.3", sentence="it did not boot"),
        ]
    )
    assert "| release | 5.10.1 | 6.12.1 | it did not boot |" in page
    assert "| `a.b` | skip | **FAIL** | . |" in page
    assert "- 1: needs Feature.MOVE" in page
    assert "## Failures on 6.12\n\n- `a.b.anon`: saw X\n" in page


def test_a_kernel_is_good_if_it_ran_and_nothing_failed() -> None:
    assert column("6.12", result("a.b", "anon", "passed")).ok
    assert not column("6.12", result("a.b", "anon", "failed")).ok
    assert not column("6.12", sentence="it did not boot").ok


def test_a_folder_of_patches(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="has no"):
        _mutants.mutants(tmp_path)
    text = "mm: my change\n\nWhy.\n---\n--- a/mm/a.c\n+++ b/mm/a.c\n"
    (tmp_path / "0001-mine.patch").write_text(text)
    (mutant,) = _mutants.mutants(tmp_path)
    assert (mutant.name, mutant.what, mutant.files) == ("0001-mine", "mm: my change", ["mm/a.c"])
    assert _mutants.verdicts([mutant], [outcome("unmodified"), outcome("0001-mine", "x.y")]) == []


def test_building_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Makefile").write_text(
        "kernelversion:\n\t@echo 6.12.1\n"
        "all:\n\t@echo '  CC      mm/a.o'; echo '  CC      mm/b.o'\n"
        "bad:\n\t@echo '  CC      mm/a.o'; echo 'mm/a.c:1: error' >&2; exit 1\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_mutants, "_BUILD_PROGRAMS", ("make",))
    monkeypatch.setattr(_mutants, "PROGRESS_S", 0.0)
    builder = Builder(tmp_path, 1)
    builder.make("all")
    assert "  2 files compiled, now mm/b.o\n" in capsys.readouterr().out
    with pytest.raises(BuildError, match=r"mm/a\.c:1: error"):
        builder.make("bad")


def whole(case: str, outcome: str, text: str = "") -> list[Result]:
    return [result(case, memory, outcome, text=text) for memory in load()[case].memory]


CASES = [name for name, case in load().items() if len(case.memory) > 1][:3]


def test_a_run_of_some_cases_renews_their_rows() -> None:
    kept, mended, new = CASES
    page = _matrix.page(
        [
            column(
                "6.1",
                *whole(kept, "passed"),
                *whole(mended, "failed", "saw X"),
                result("gone.case", "any", "passed"),
            ),
            column("6.12", *whole(kept, "skipped", "needs Y")),
        ]
    )
    report = column("6.1", *whole(mended, "passed"), *whole(new, "failed", "saw Z")).report
    part = column("6.12", *whole(kept, "failed", "saw W")[1:], *whole(new, "passed")).report
    assert report is not None
    assert part is not None
    text, said = _matrix_rows.added(page, [report, part])
    assert said == ["6.1: 2 of 2 cases", "6.12: 1 of 2 cases"]
    assert f"| `{kept}` | pass | skip |\n" in text
    assert f"| `{mended}` | pass | . |\n" in text
    assert f"| `{new}` | **FAIL** | pass |\n" in text
    assert "gone.case" not in text
    size = {name: len(load()[name].memory) for name in CASES}
    assert f"| passed | {size[kept] + size[mended]} | {size[new]} |" in text
    assert f"| failed | {size[new]} | 0 |" in text
    assert f"| skipped | 0 | {size[kept]} |" in text
    assert "saw X" not in text
    assert "saw W" not in text
    assert text.count("saw Z") == size[new]
    assert f"- {size[kept]}: needs Y" in text
    assert _matrix_rows.added(text, [report, part])[0] == text


def test_the_matrix_in_docs_is_a_page_that_rows_can_be_put_into() -> None:
    text, _ = _matrix_rows.added(_matrix.PAGE.read_text(), [])
    assert "| `UFFDIO_API.ok.reply` | pass | pass | pass | pass | pass |\n" in text
    assert _matrix_rows.added(text, [])[0] == text


def test_rows_of_another_release_are_refused() -> None:
    page = _matrix.page([column("6.1")])
    report = column("6.12", *whole(CASES[0], "passed")).report
    assert report is not None
    with pytest.raises(ValueError, match=r"6\.12\.1 is none of the page's: 6\.1\.1"):
        _matrix_rows.added(page, [report])
