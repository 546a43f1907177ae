"""Some random programs of fixed seeds against the model; `make soak` runs others for longer."""

from __future__ import annotations

import pytest

from pyuffd import Feature
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_params
from tests.stress._programs import DRIVERS, FEATURES, attempt, make

SEED = 20_000
# A helper process needs a while to start, and some programs start several.
PROGRAMS = {"process": 2}


def check(driver: str, name: str) -> None:
    for seed in range(SEED, SEED + PROGRAMS.get(driver, 6)):
        program = make(seed, (driver,), [name])
        if why := attempt(program):
            raise AssertionError(f"{program}\n{why}")


@pytest.mark.crossing
@needs(FEATURES | Feature.EVENT_FORK)
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", memory_params())
def test_programs(driver: str, name: str) -> None:
    run_child(check, driver, name, budget_s=60)
