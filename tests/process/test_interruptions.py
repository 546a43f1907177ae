"""A signal handler that raises, anywhere: nothing is left behind, and calls can be repeated.

PYUFFD_SEED chooses the places that are tried; `-m stress` tries all of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable

import pytest

from pyuffd import Feature
from pyuffd.testing import needs, needs_privilege
from tests._child import run_child
from tests.process._interrupted import SCENARIOS
from tests.process._interrupted_targets import TARGETS
from tests.process._interruptions import How, pester, places, sweep

SEED = int(os.environ.get("PYUFFD_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
HOWS: tuple[How, ...] = ("lines", "checks")
# `make test` has time for few of these: a helper process needs half a second of a CPU to start.
HELPERS = [name for name in SCENARIOS if name.startswith(("process-", "auto-"))]
QUICK = [name for name in SCENARIOS if name not in HELPERS]
STOPS = ["native-stop", "thread-stop", "native-waiting", "thread-waiting"]
HELPER_STOPS = ["process-stop", "process-waiting"]
SOME_RUNS = {"native-with": 60, "thread-with": 60, "process-with": 3, "stop_process": 40}
# About every 20th of the places that are not in `Process`, and every 10th.
MORE_PLACES = {"track_by_own_userfaultfd": 40, "close_tracker": 12}
MANY_RUNS = 1000
MANY_HELPER_RUNS = 100
BUDGET_S = 60.0
STRESS_BUDGET_S = 1800.0
# The second exception may come this many places later.
SOON = range(1, 40)

pytestmark = needs(Feature(0))
OTHERS = needs(Feature.WP_ASYNC), needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")


def interrupt(
    tried: list[tuple[str, How]], seed: int, most: int | None, twice: bool = False
) -> None:
    chance = random.Random(seed)
    for name, how in tried:
        numbers = range(1, places(SCENARIOS[name], how) + 1)
        chosen = chance.sample(numbers, min(most, len(numbers))) if most else numbers
        later = chance.choice(SOON) if twice else 0
        wrong = sweep(SCENARIOS[name], how, chosen, later)
        assert not wrong, f"seed {seed}, {name}, {len(numbers)} places:\n" + "\n".join(wrong)


def bother(name: str, seed: int, runs: int) -> None:
    wrong = pester(SCENARIOS[name], seed, runs)
    assert not wrong, "\n".join(wrong)


def marked(names: Iterable[str]) -> list[object]:
    """Say what scenarios with other processes need."""
    others = {one.__name__ for one in TARGETS}
    return [pytest.param(name, marks=OTHERS if name in others else ()) for name in names]


hows = pytest.mark.parametrize("how", HOWS)


@pytest.mark.crossing(every=3)
@pytest.mark.parametrize("name", marked(QUICK))
def test_at_some_places(name: str) -> None:
    run_child(interrupt, [(name, how) for how in HOWS], SEED, 1, budget_s=BUDGET_S)


def test_helpers_at_some_places() -> None:
    chance = random.Random(SEED)
    tried = [(chance.choice(HELPERS), how) for how in HOWS]
    run_child(interrupt, tried, SEED, 1, budget_s=BUDGET_S)


@pytest.mark.parametrize("name", marked(MORE_PLACES))
def test_at_more_places(name: str) -> None:
    tried = [(name, how) for how in HOWS]
    run_child(interrupt, tried, SEED, MORE_PLACES[name], budget_s=BUDGET_S)


@pytest.mark.stress
@hows
@pytest.mark.parametrize("name", marked(SCENARIOS))
def test_at_every_place(name: str, how: How) -> None:
    run_child(interrupt, [(name, how)], SEED, None, budget_s=STRESS_BUDGET_S)


@pytest.mark.parametrize("name", STOPS)
def test_stop_twice_at_some_places(name: str) -> None:
    run_child(interrupt, [(name, how) for how in HOWS], SEED, 2, True, budget_s=BUDGET_S)


@pytest.mark.stress
@hows
@pytest.mark.parametrize("name", STOPS + HELPER_STOPS)
def test_stop_twice_at_every_place(name: str, how: How) -> None:
    run_child(interrupt, [(name, how)], SEED, None, True, budget_s=STRESS_BUDGET_S)


@pytest.mark.parametrize("name", marked(SOME_RUNS))
def test_by_signals(name: str) -> None:
    run_child(bother, name, SEED, SOME_RUNS[name], budget_s=BUDGET_S)


@pytest.mark.stress
@pytest.mark.parametrize("name", marked(SCENARIOS))
def test_by_many_signals(name: str) -> None:
    runs = MANY_HELPER_RUNS if name in HELPERS else MANY_RUNS
    run_child(bother, name, SEED, runs, budget_s=STRESS_BUDGET_S)
