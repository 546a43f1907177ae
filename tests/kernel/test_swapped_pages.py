"""Write-protected pages that were swapped out: the next write faults on a present page."""

from __future__ import annotations

import time
from typing import Literal, get_args

import pytest

from pyuffd import Feature, Handler, PageState, Region, RegisterMode, Userfaultfd, ZeroSource
from pyuffd.testing import needs, needs_swap
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import states

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
FEATURES = (
    Feature.PAGEFAULT_FLAG_WP
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.WP_UNPOPULATED
    | Feature.MINOR_SHMEM
)
Driver = Literal["native", "inline", "thread", "process"]


def unmap_or_swap_out(region: Region) -> None:
    """The handler maps shared pages too, which keeps them in memory: not mapped here will do."""
    for _ in range(5):
        region.pageout()
        if not any(state.name in ("MAPPED", "PRIVATE") for state in region.residency()):
            return
        time.sleep(0.01)


def written_after(driver: Driver, name: str) -> None:
    anon = name == "anon"
    for mode in (MISSING | WP,) if anon else (MISSING | WP, MISSING | MINOR | WP, MINOR | WP):
        features = FEATURES | (Feature.SIGBUS if driver == "inline" else Feature(0))
        with (
            Userfaultfd(features=features) as uffd,
            memory_of(name).pages(4) as region,
            Handler(uffd, driver=driver) as handler,
        ):
            private = not region.shared
            if mode == MINOR | WP and private:
                handler.serve(region, None, mode=mode)
            else:
                handler.serve(region, ZeroSource(), mode=mode)
            region.touch()
            region.write(0, b"old")
            handler.writeprotect(region)
            unmap_or_swap_out(region)
            Task(lambda: region.write(0, b"new")).result()
            assert region.read(0, 4) == b"new\0", mode
            assert states(handler, region)[0] is PageState.DIRTY, mode


@pytest.mark.crossing
@needs_swap()
@needs(FEATURES)
@pytest.mark.parametrize("driver", get_args(Driver))
@pytest.mark.parametrize("name", memory_params("anon", "shmem", "shmem-private"))
def test_written_after(driver: Driver, name: str) -> None:
    run_child(written_after, driver, name, budget_s=20)
