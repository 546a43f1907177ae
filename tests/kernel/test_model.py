"""Some random programs of fixed seeds against the model; `make soak` runs others for longer."""

from __future__ import annotations

import pytest

from pyuffd import Feature
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_params
from tests.stress._programs import (
    DRIVERS,
    FEATURES,
    MISSING,
    WP,
    Program,
    Setting,
    Step,
    attempt,
    make,
)

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


# Found by chance, and often wrong: pages before and steps of shared memory that has forks.
FORKS: list[tuple[list[int], list[Step]]] = [
    ([3], [["wp", 0, 12], ["fork", [["read", 8, 1], ["read", 1, 2]]]]),
    ([], [["file", 2, "here", 3], ["evict", 2, 3], ["fork", [["read", 10, 4], ["read", 3, 5]]]]),
]


def check_forks(driver: str) -> None:
    for before, steps in FORKS:
        setting = Setting(
            "shmem",
            int(MISSING | WP),
            "file",
            driver,
            int(Feature.EVENT_FORK),
            True,
            100,
            False,
            before,
        )
        if why := attempt(program := Program(0, setting, steps)):
            raise AssertionError(f"{program}\n{why}")


@needs(FEATURES | Feature.EVENT_FORK)
@pytest.mark.parametrize("driver", ["native", "thread"])
def test_forks_fill_ahead(driver: str) -> None:
    """A run of pages that a fork fills, one of which was there, may have been written."""
    run_child(check_forks, driver, budget_s=60)
