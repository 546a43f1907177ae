"""Random programs against the model of a page in `_worlds`, in the soak.

PYUFFD_SEED is the first program's seed, PYUFFD_SOAK_S the seconds. A program that disagrees with
the model is shortened, and printed with its seed and what was seen.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from pyuffd import Feature
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_params
from tests.stress._programs import DRIVERS, FEATURES, attempt, make, shorten

SEED = int(os.environ.get("PYUFFD_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
SOAK_S = float(os.environ.get("PYUFFD_SOAK_S", "60"))
SHORTENING_S = 120.0


def check(name: str, seed: int, seconds: float) -> int:
    """Run programs for some time; return how many."""
    until = time.monotonic() + seconds
    first = seed
    while time.monotonic() < until:
        program = make(seed, DRIVERS, [name])
        if why := attempt(program):
            shorter, found = shorten(program, attempt, SHORTENING_S)
            raise AssertionError(f"{shorter or program}\n{found or why + ' (not every time)'}")
        seed += 1
    return seed - first


@needs(FEATURES | Feature.EVENT_FORK)
@pytest.mark.stress
@pytest.mark.parametrize("name", memory_params())
def test_random_programs(name: str) -> None:
    seconds = SOAK_S / 5
    assert run_child(check, name, SEED, seconds, budget_s=seconds + SHORTENING_S + 60).value
