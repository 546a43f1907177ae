"""tests/vm: C functions broken by machine, and what is made of the verdicts."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vm import _cases, _machine_mutants, _mutate, _mutate_guest
from tests.vm._mutants import BuildError
from tests.vm._mutate import Mutant

SOURCE = """\
#include <linux/types.h>

static int check(struct vma *vma, unsigned long len)
{
	if (vma->registered && len < vma->length)
		return -EINVAL;
	if (unlikely(!vma->ctx)) {
		flags |= WANTED;
		wake(vma, len);
	}
	spin_lock(&vma->lock);
	pte = pte_mkdirty(pte);
	return 0;
}

static bool may(int a,
		int b)
{
	while (a < b)
		a++;
	return true;
}
"""


def mutants(text: str = SOURCE) -> tuple[str, list[Mutant]]:
    return _mutate.mutate("mm/a.c", text, lambda name, was: True, 1)


def test_functions_are_found() -> None:
    assert [name for name, *_ in _mutate.functions(SOURCE)] == ["check", "may"]


def test_each_kind_of_mutant() -> None:
    _, found = mutants()
    kinds = [(mutant.line, mutant.kind, mutant.becomes) for mutant in found]
    assert kinds == [
        (5, "negate", "!(vma->registered && len < vma->length)"),
        (5, "never", "false"),
        (5, "drop-left", "len < vma->length"),
        (5, "drop-right", "vma->registered"),
        (5, "bound", "vma->registered && len <= vma->length"),
        (6, "succeed", "0"),
        (7, "negate", "!(unlikely(!vma->ctx))"),
        (7, "never", "false"),
        (8, "keep", "flags as it was"),
        (9, "skip", "nothing"),
        (12, "keep", "pte as it was"),
        (13, "fail", "-EINVAL"),
        (19, "bound", "a <= b"),
        (21, "fail", "false"),
    ]
    assert [mutant.number for mutant in found] == list(range(1, 15))


def test_a_lock_is_not_left_out() -> None:
    assert "spin_lock" not in " ".join(mutant.was for mutant in mutants()[1])


def test_a_call_inside_an_expression_is_left_in() -> None:
    text = """\
#include <linux/types.h>

static int f(int a)
{
	bool b = first(a) &&
		second(a);
	third(a,
		b);
	if (a)
		fourth(a);
	else
		fifth(a);
out:
	sixth(a);
	return a;
}
"""
    calls = [mutant.was for mutant in mutants(text)[1] if mutant.kind == "skip"]
    assert calls == ["third(a, b);", "fourth(a);", "fifth(a);", "sixth(a);"]


def test_tests_are_chosen_from_every_case() -> None:
    some = _machine_mutants.choose(one_of=8, types=2)
    cases = {name.rpartition(".")[0] for name in some}
    assert len(some) <= 2 * len(cases)
    assert "UFFDIO_COPY.ok.page" in cases
    assert not any("stress" in name for name in some)


def test_without_a_mutant_a_file_stays_as_it_is() -> None:
    assert _mutate.mutate("a.c", SOURCE, lambda name, was: False, 1) == (SOURCE, [])


PROGRAM = """\
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

static unsigned int mutant;
#define pyuffd_is(number) (mutant == (number))

static int within(int at, int end)
{
	int ret = 0;

	if (at >= 0 && at < end)
		ret |= 2;
	if (ret)
		return 0;
	return 7;
}

int main(int argc, char **argv)
{
	mutant = atoi(argv[1]);
	printf("%d %d %d", within(0, 4), within(4, 4), within(-1, 4));
	return argc != 2;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_one_at_a_time_is_on(tmp_path: Path) -> None:
    text, found = _mutate.mutate("a.c", PROGRAM, lambda name, was: name == "within", 1)
    (tmp_path / "a.c").write_text(text.replace(_mutate.INCLUDE, ""))
    subprocess.run(["gcc", "-w", "-o", tmp_path / "a", tmp_path / "a.c"], check=True)

    def run(number: int) -> str:
        return subprocess.run([tmp_path / "a", str(number)], capture_output=True, text=True).stdout

    assert run(0) == "0 7 7"
    seen = {(mutant.kind, mutant.was): run(mutant.number) for mutant in found}
    assert seen["negate", "at >= 0 && at < end"] == "7 0 0"
    assert seen["never", "at >= 0 && at < end"] == "7 7 7"
    assert seen["drop-left", "at >= 0 && at < end"] == "0 7 0"
    assert seen["drop-right", "at >= 0 && at < end"] == "0 0 7"
    assert seen["keep", "2"] == "7 7 7"
    assert seen["fail", "0"] == "-22 7 7" or ("fail", "0") not in seen


REACHED = {
    "a.b.anon": {"test": "a.b.anon", "outcome": "", "took": 0.2, "places": [1, 2]},
    "a.b.shmem": {"test": "a.b.shmem", "outcome": "", "took": 0.1, "places": [1]},
    "a.c.anon": {"test": "a.c.anon", "outcome": "", "took": 0.3, "places": [1]},
    "a.d.anon": {"test": "a.d.anon", "outcome": "skipped", "took": 0.0, "places": [1]},
}


def plan(mutant: Mutant, reached: dict[str, dict[str, Any]], most: int | None = None) -> list[str]:
    return _machine_mutants.Planner(mutants()[1], reached).plan(mutant, most)


def test_a_mutant_meets_what_reaches_it_the_quickest_first() -> None:
    _, found = mutants()
    assert plan(found[0], REACHED)[0] == "a.b.anon"
    assert sorted(plan(found[0], REACHED)) == ["a.b.anon", "a.b.shmem", "a.c.anon"]
    assert plan(found[0], REACHED, 1) == ["a.b.anon"]
    assert plan(found[2], REACHED) == []


def test_a_mutant_meets_first_what_knows_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = mutants()
    near = [mutant.number for mutant in found if mutant.function == found[0].function]
    assert len(near) > 2

    def line(test: str, took: float, *places: int) -> dict[str, Any]:
        return {"test": test, "outcome": "", "took": took, "places": places}

    lines = [
        line("a.quick.one.anon", 0.1, near[0]),
        line("a.quick.two.anon", 0.2, near[0]),
        line("a.every-way.one.anon", 0.4, *near[:-1]),
        line("a.last-way.one.anon", 0.5, near[0], near[-1]),
        line("a.meant.one.anon", 0.6, near[0]),
        line("a.check.one.anon", 0.7, near[0]),
        line("a.elsewhere.one.anon", 0.1, 10**6),
    ]
    case = SimpleNamespace(origin=f"mm/a.c: {found[0].function}()")
    monkeypatch.setattr(_machine_mutants, "load", lambda: {"a.meant.one": case})
    assert plan(found[0], {one["test"]: one for one in lines}) == [
        "a.meant.one.anon",
        "a.every-way.one.anon",
        "a.last-way.one.anon",
        "a.check.one.anon",
        "a.quick.one.anon",
        "a.quick.two.anon",
    ]


def test_a_guest_that_ends_leaves_a_verdict() -> None:
    verdicts: dict[int, dict[str, object]] = {}
    lines: list[dict[str, object]] = [
        {"kind": "trying", "mutant": 1},
        {"kind": "verdict", "mutant": 1, "verdict": "caught", "test": "a.b.anon", "text": "x"},
        {"kind": "trying", "mutant": 2},
        {"kind": "passed", "test": "a.b.anon"},
    ]
    plans = {1: ["a.b.anon"], 2: ["a.b.anon", "a.c.anon", "a.d.anon"]}
    _machine_mutants._take(verdicts, lines, None, plans)
    assert list(verdicts) == [1]
    _machine_mutants._take(verdicts, lines, "it died", plans)
    assert verdicts[1]["verdict"] == "caught"
    assert verdicts[2] == {"verdict": "died", "test": "a.c.anon", "text": "it died", "met": 3}


def test_a_test_of_minutes_meets_only_what_few_others_reach() -> None:
    _, found = mutants()
    many = {
        f"a.{number}.anon": {"test": f"a.{number}.anon", "outcome": "", "took": 1.0, "places": [1]}
        for number in range(_machine_mutants.FIRST)
    }
    long = {"test": "a.long.anon", "outcome": "", "took": 60.0, "places": [1]}
    assert "a.long.anon" in plan(found[0], {**REACHED, "long": long})
    assert "a.long.anon" not in plan(found[0], {**many, "long": long})


class Suite:
    """Tests whose outcomes are known, in place of those of the conformance suite."""

    def __init__(self, **outcomes: list[str]) -> None:
        self._outcomes = outcomes
        self.ran: list[str] = []

    def __call__(self, tests: list[str], switch: Any) -> Generator[tuple[str, str], None, None]:
        for test in list(tests):
            self.ran.append(test)
            yield test, self._outcomes[test].pop(0)


@pytest.mark.parametrize(
    ("outcomes", "verdict", "ran"),
    [
        ({"a": [""], "b": ["skipped"]}, "survives", ["a", "b"]),
        ({"a": ["wrong", "wrong"], "b": [""]}, "caught", ["a", "a"]),
        ({"a": ["wrong", ""], "b": [""]}, "survives", ["a", "a", "b"]),
        ({"a": ["stalled", "stalled"]}, "stalled", ["a", "a"]),
        ({"a": ["stuck"], "b": [""]}, "stuck", ["a"]),
    ],
)
def test_what_a_test_does_once_is_not_the_mutant_s(
    monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, list[str]], verdict: str, ran: list[str]
) -> None:
    suite = Suite(**outcomes)
    monkeypatch.setattr(_cases, "outcomes", suite)
    assert _mutate_guest._first_that_notices(1, list(outcomes))[0] == verdict
    assert suite.ran == ran


def test_a_survivor_is_tried_again_with_more_tests() -> None:
    survivor = {"verdict": "survives", "met": 3}
    assert not _machine_mutants._is_open(survivor, 3)
    assert _machine_mutants._is_open(survivor, 4)
    assert not _machine_mutants._is_open({"verdict": "caught", "met": 3}, 4)
    assert [_machine_mutants._is_open(None, tests) for tests in (0, 1)] == [False, True]


def test_a_reason_is_shown_beside_its_survivor(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = mutants()
    known = {_machine_mutants.key_of(found[1]): "it cannot be"}
    monkeypatch.setattr(_machine_mutants, "reasons", lambda: known)
    verdicts = {2: {"verdict": "survives", "test": "", "text": "", "met": 3}}
    page = _machine_mutants.page(found, REACHED, verdicts, "6.12.1")
    assert "| it cannot be | yes |" in page


def test_page_counts_and_lists_survivors() -> None:
    _, found = mutants()
    verdicts: dict[int, dict[str, Any]] = {
        1: {"verdict": "caught", "test": "a.b.anon", "text": "errno | 0x7f1234567000", "met": 2},
        2: {"verdict": "survives", "test": "", "text": "", "met": 3},
    }
    page = _machine_mutants.page(found, REACHED, verdicts, "6.12.1")
    assert "**2 tried, 1 noticed, 1 survived**" in page
    row = next(line for line in page.splitlines() if line.startswith("| mm/a.c:5:never | `check`"))
    assert _machine_mutants.MISSING in row
    assert "errno \\| ADDRESS" in page
    assert "| mm/a.c | `may` | 2 |" in page


def test_several_guests_share_the_mutants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = mutants()
    kernel = tmp_path / "kernel"
    kernel.touch()
    reached = {
        "a.b.anon": {"test": "a.b.anon", "outcome": "", "took": 0.1, "places": [1, 2, 3, 4, 5]}
    }
    planner = _machine_mutants.Planner(found, reached)
    guests: list[tuple[str, list[int]]] = []

    def said(
        kernel: Path, name: str, plan: dict[str, Any], stop: threading.Event, until: float
    ) -> tuple[list[dict[str, Any]], str]:
        numbers = [number for number, _ in plan["mutants"]]
        guests.append((name, numbers))
        # Each comes as far as its first mutant, as where every one of them ends its guest.
        return [{"kind": "trying", "mutant": number} for number in numbers[:1]], "it died"

    monkeypatch.setattr(_machine_mutants, "OUTPUT", tmp_path)
    monkeypatch.setattr(_machine_mutants, "SHARE", 2)
    monkeypatch.setattr(_machine_mutants, "said", said)
    until = time.monotonic() + 60.0
    verdicts = _machine_mutants.judge(kernel, found[:5], planner, until, 2)
    assert {number: verdict["verdict"] for number, verdict in verdicts.items()} == dict.fromkeys(
        range(1, 6), "died"
    )
    assert sorted(numbers[0] for _, numbers in guests) == [1, 2, 3, 4, 5]

    monkeypatch.setattr(_machine_mutants, "said", lambda *_: ([], "it did not boot"))
    (tmp_path / "verdicts.json").unlink()
    with pytest.raises(BuildError, match="it did not boot"):
        _machine_mutants.judge(kernel, found[:5], planner, until, 2)
