"""A process is stopped while a page source works, and continued later (Ctrl-Z, a freezer, gdb)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable

import pytest

from pyuffd import CallableSource, Feature, Handler, Region, Userfaultfd
from pyuffd.testing import child_pids, needs
from tests._child import run_child
from tests._memory import PAGE
from tests._tasks import of_threads
from tests.kernel._verbs import PYTHON, Driver

LIMIT_S = 1.0  # how long a source may need
STOPPED_S = 2.5


def slow(offset: int, length: int) -> bytes:
    """A page in five steps, half of the limit in all if nothing stops them."""
    for _ in range(5):
        time.sleep(LIMIT_S / 10)
    return bytes([1 + offset // PAGE]) * length


def with_children(pids: Iterable[int]) -> list[int]:
    found = list(pids)
    for pid in found:
        for children in of_threads(pid, "children").values():
            found += map(int, children.split())
    return found


def stopped(driver: Driver) -> None:
    before = child_pids()
    with (
        Userfaultfd() as uffd,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd, driver=driver, stall_timeout_s=LIMIT_S) as handler,
    ):
        handler.serve(region, CallableSource(slow))
        assert region.read(0, 1) == b"\1"
        everybody = " ".join(map(str, [*with_children(child_pids() - before), os.getpid()]))
        script = f"sleep {LIMIT_S / 4}; kill -STOP {everybody}; sleep {STOPPED_S}; "
        script += f"kill -CONT {everybody}"
        began = time.monotonic()
        with subprocess.Popen(["sh", "-c", script]):
            assert region.read(PAGE, 1) == b"\2"
        assert time.monotonic() - began > STOPPED_S
        assert handler.stats().stalled_requests == 0


@needs(Feature.POISON)
@pytest.mark.parametrize("driver", PYTHON)
def test_a_source_gets_its_time_again(driver: Driver) -> None:
    run_child(stopped, driver)
