"""The log of demand faults: complete and in order, bounded, and taken once."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from typing import Any

import pytest

import pyuffd
from pyuffd import (
    FaultLog,
    Feature,
    Handler,
    LoggedFault,
    PagefaultFlag,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import everywhere, in_fork, serving

DRIVERS: Any = ("native", "inline", "thread", "process")
FEATURES = Feature.WP_UNPOPULATED | Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM


def in_order(driver: Any, name: str) -> None:
    mode = RegisterMode.MISSING | RegisterMode.WP
    with serving(driver, name, FEATURES, fault_log=100) as (handler, memory):
        handler.start()
        page = memory.page_size
        pages = 16 if page == PAGE else 4
        region = memory.pages(pages)
        handler.serve(region, ZeroSource(), mode=mode)
        order = random.Random(1).sample(range(pages), pages - 1)
        for index in order:
            region.read(index * page + 5, 1)
            region.write(index * page, b"a write-protect fault, which is not logged")
        handler.populate(region)  # without a fault
        log = handler.take_faults()
        assert list(log.offsets(region)) == [index * page for index in order]
        assert [each - region.start for each in log.addresses] == [
            fault.address - region.start for fault in log
        ]
        assert (len(log), log.lost) == (len(order), 0)
        times = [fault.time_ns for fault in log]
        assert times == sorted(times)
        assert {fault.space for fault in log} == {0}
        assert list(log.offsets(region, space=1)) == []
        assert list(log.offsets(region[page:])) == [(index - 1) * page for index in order if index]
        assert len(handler.take_faults()) == 0
        handler.unserve(region)
        handler.stop()
        assert len(handler.take_faults()) == 0


test_demand_faults_in_order = pytest.mark.crossing(everywhere(in_order, drivers=DRIVERS))


def minor_faults() -> None:
    with (
        Userfaultfd(features=Feature.MINOR_SHMEM) as uffd,
        Region.memfd(4 * PAGE, shared=True) as region,
        region.alias() as alias,
        Handler(uffd, fault_log=10) as handler,
    ):
        alias.fill(7)
        handler.serve(region, None, mode=RegisterMode.MINOR)
        region.read(2 * PAGE, 1)
        region.write(PAGE, b"x")
        log = handler.take_faults()
        assert list(log.offsets(region)) == [2 * PAGE, PAGE]
        assert log[0].flags & PagefaultFlag.MINOR


def test_minor_faults() -> None:
    run_child(minor_faults)


def full(driver: Any) -> None:
    """The oldest are kept, later ones counted; taking some makes room."""
    with serving(driver, "anon", fault_log=5) as (handler, memory):
        handler.start()
        region = memory.pages(20)
        handler.serve(region, ZeroSource())
        for index in range(8):
            region.read(index * PAGE, 1)
        log = handler.take_faults()
        assert list(log.offsets(region)) == [index * PAGE for index in range(5)]
        assert log.lost == 3
        assert "5 faults, 3 lost" in repr(log)
        for index in range(8, 12):
            region.read(index * PAGE, 1)
        assert handler.take_faults().lost == 0
        for index in range(12, 20):
            region.read(index * PAGE, 1)
        handler.stop()
        log = handler.take_faults()
        assert list(log.offsets(region)) == [index * PAGE for index in range(12, 17)]
        assert log.lost == 3
        log = handler.take_faults()
        assert (len(log), log.lost) == (0, 0)


@pytest.mark.parametrize(
    "driver", [pytest.param("native", id="pitfall.16.full-fault-log"), *DRIVERS[1:]]
)
def test_a_full_log(driver: str) -> None:
    run_child(full, driver)


def from_many_threads(driver: Any) -> None:
    """While threads fault and two take, every fault is returned once, in the order of its time."""
    threads, pages = 4, 500
    with serving(driver, "anon", fault_log=64) as (handler, memory):
        handler.start()
        region = memory.pages(threads * pages)
        handler.serve(region, ZeroSource())
        taken: list[list[FaultLog]] = [[], []]
        over = threading.Event()

        def touch(first: int) -> None:
            for index in range(first, first + pages):
                region.read(index * PAGE, 1)

        def take(logs: list[FaultLog]) -> None:
            while not over.is_set():
                logs.append(handler.take_faults())

        touching = [threading.Thread(target=touch, args=(at * pages,)) for at in range(threads)]
        taking = [threading.Thread(target=take, args=(logs,)) for logs in taken]
        for thread in touching + taking:
            thread.start()
        for thread in touching:
            thread.join()
        over.set()
        for thread in taking:
            thread.join()
        logs = [*itertools.chain(*taken), handler.take_faults()]
        found = [address for log in logs for address in log.addresses]
        assert len(found) == len(set(found))
        assert len(found) + sum(log.lost for log in logs) == threads * pages
        # Each thread's faults are in its order.
        for log in logs:
            addresses = list(log.addresses)
            for first in range(0, threads * pages, pages):
                begin, end = region.start + first * PAGE, region.start + (first + pages) * PAGE
                own = [address for address in addresses if begin <= address < end]
                assert own == sorted(own)


@pytest.mark.parametrize("driver", ["native", "inline"])
def test_while_threads_fault(driver: str) -> None:
    run_child(from_many_threads, driver, budget_s=30)


def killed_worker() -> None:
    """The log outlives a worker process."""
    with (
        Userfaultfd() as uffd,
        Region.anonymous(8 * PAGE) as region,
        Handler(uffd, driver="process", fault_log=100) as handler,
    ):
        handler.serve(region, ZeroSource())
        region.read(3 * PAGE, 1)
        assert handler.stats().faults["missing"] == 1
        os.kill(handler._engine.pids()[1], signal.SIGKILL)  # type: ignore[union-attr]
        region.read(PAGE, 1)
        assert list(handler.take_faults().offsets(region)) == [3 * PAGE, PAGE]


def test_a_killed_worker() -> None:
    run_child(killed_worker)


def forks() -> None:
    with (
        Userfaultfd(features=Feature.EVENT_FORK) as uffd,
        Region.anonymous(4 * PAGE) as region,
        Handler(uffd, fault_log=100) as handler,
    ):
        handler.serve(region, ZeroSource())
        region.read(PAGE, 1)
        assert in_fork(lambda: region.read(2 * PAGE, 1)) == 0
        log = handler.take_faults()
        assert list(log.offsets(region)) == [PAGE]
        (space,) = {fault.space for fault in log} - {0}
        assert list(log.offsets(region, space=space)) == [2 * PAGE]


@needs(Feature.EVENT_FORK)
def test_forks_are_told_apart() -> None:
    run_child(forks)


def test_a_sequence_of_faults() -> None:
    with pyuffd.lazy(bytes(3 * PAGE), fault_log=10) as memory:
        for index in (2, 0, 1):
            memory.read(index * PAGE, 1)
        log = memory.handler.take_faults()
    assert isinstance(log[0], LoggedFault)
    assert [fault.address for fault in log[1:]] == list(log.addresses[1:])
    assert log[-1] == log[2] == list(log)[2]
    assert log[0] in log
    for bad in (3, -4):
        with pytest.raises(IndexError):
            log[bad]
    with pytest.raises(TypeError):
        log["a"]  # type: ignore[call-overload]


def test_bad_arguments() -> None:
    with Userfaultfd() as uffd:
        for bad, error in ((-1, ValueError), (1 << 40, ValueError), ("5", TypeError)):
            with pytest.raises(error, match="fault_log"):
                Handler(uffd, fault_log=bad)  # type: ignore[arg-type]
        with Handler(uffd) as handler, pytest.raises(ValueError, match="fault_log"):
            handler.take_faults()
