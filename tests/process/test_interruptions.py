"""A signal handler that raises, anywhere: nothing is left behind, and what was begun can be ended.

PYUFFD_SEED says which places are tried; `-m stress` tries all of them.
"""

from __future__ import annotations

import os
import random

import pytest

from pyuffd import Feature
from tests._child import run_child
from tests._need import needs
from tests.process._interrupted import SCENARIOS
from tests.process._interruptions import How, pester, places, sweep

SEED = int(os.environ.get("PYUFFD_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
# What `make test` has time for.
FEW = 2
RUNS = 20
MANY_RUNS = 2000
BUDGET_S = 60.0
STRESS_BUDGET_S = 1800.0

pytestmark = needs(Feature(0))

scenarios = pytest.mark.parametrize("name", list(SCENARIOS))
hows = pytest.mark.parametrize("how", ["lines", "checks"])


def interrupt(name: str, how: How, seed: int, most: int | None) -> None:
    numbers = range(1, places(SCENARIOS[name], how) + 1)
    chosen = sorted(random.Random(seed).sample(numbers, min(most or len(numbers), len(numbers))))
    wrong = sweep(SCENARIOS[name], how, chosen)
    assert not wrong, f"seed {seed}, {len(numbers)} places:\n" + "\n".join(wrong)


def bother(name: str, seed: int, runs: int) -> None:
    wrong = pester(SCENARIOS[name], seed, runs)
    assert not wrong, "\n".join(wrong)


@scenarios
@hows
def test_at_some_places(name: str, how: str) -> None:
    run_child(interrupt, name, how, SEED, FEW, budget_s=BUDGET_S)


@pytest.mark.stress
@scenarios
@hows
def test_at_every_place(name: str, how: str) -> None:
    run_child(interrupt, name, how, SEED, None, budget_s=STRESS_BUDGET_S)


@scenarios
def test_by_signals(name: str) -> None:
    run_child(bother, name, SEED, RUNS, budget_s=BUDGET_S)


@pytest.mark.stress
@scenarios
def test_by_many_signals(name: str) -> None:
    run_child(bother, name, SEED, MANY_RUNS, budget_s=STRESS_BUDGET_S)
