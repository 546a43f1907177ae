"""The library's mutants still fit its sources, and leave no pitfall out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine_mutants._mutants import ROOT, Mutant, StaleMutantError, mutants
from tests.process._pitfalls import NAMES

MUTANTS = mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_fits_the_source(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert mutant.caught_by
    for test in mutant.caught_by:
        assert test.startswith(f"pitfall.{mutant.pitfall}.")


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_every_pitfall_has_a_mutant() -> None:
    assert {mutant.pitfall for mutant in MUTANTS} == set(NAMES)


def test_page_is_of_these_mutants() -> None:
    page = (ROOT / "docs/generated/engine-mutants.md").read_text()
    rows = [line.split(" | ")[1].strip("`") for line in page.splitlines() if line.startswith("| ")]
    assert rows[1:] == [mutant.name for mutant in MUTANTS]


@pytest.mark.parametrize("text", ["", "old old"])
def test_text_that_is_not_there_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    mutant = Mutant("name", 1, "what", "file", "old", "new", ("pitfall.1.x",))
    with pytest.raises(StaleMutantError):
        mutant.apply(tmp_path)
    assert (tmp_path / "file").read_text() == text
