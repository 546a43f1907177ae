"""Every page that differs is in a round or in `blind`: random operations and a byte compare."""

from __future__ import annotations

import os
import random

import pytest

from pyuffd import Feature
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import memory_params

_ASYNC = [needs(Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM)]
METHODS = [
    pytest.param("wp-async", False, marks=_ASYNC, id="wp-async"),
    pytest.param("wp-async", True, marks=[*_ASYNC, needs(Feature.EVENT_REMOVE)], id="watch-drops"),
    pytest.param(
        "wp-sync",
        False,
        id="wp-sync",
        marks=[needs(Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM), needs_kernel_faults()],
    ),
]
ROUNDS, STRESS_ROUNDS = 25, 200


def seed() -> int:
    """Return the seed of this run; PYUFFD_SEED repeats one."""
    return int(os.environ.get("PYUFFD_SEED") or random.randrange(1 << 32))


@pytest.mark.crossing
@pytest.mark.parametrize(("method", "watch_drops"), METHODS)
@pytest.mark.parametrize("memory", memory_params())
def test_nothing_goes_unseen(memory: str, method: str, watch_drops: bool) -> None:
    run_child(
        "tests.kernel._dirty_oracle:run", memory, method, watch_drops, ROUNDS, seed(), budget_s=30
    )


@pytest.mark.stress
@pytest.mark.parametrize(("method", "watch_drops"), METHODS)
@pytest.mark.parametrize("memory", memory_params())
def test_nothing_goes_unseen_in_many_rounds(memory: str, method: str, watch_drops: bool) -> None:
    for _ in range(5):
        run_child(
            "tests.kernel._dirty_oracle:run",
            memory,
            method,
            watch_drops,
            STRESS_ROUNDS,
            seed(),
            budget_s=120,
        )
