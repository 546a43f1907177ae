"""Faults in ranges that are registered and not served: they wait for a while, then fail."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Literal

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    HandlerError,
    Region,
    Userfaultfd,
)
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.testing import kill, needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import content, is_lost, wait_for_stalled, wait_until

Driver = Literal["native", "thread", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "thread", "process")
LIMIT_S = 5.0
PAGE = os.sysconf("SC_PAGE_SIZE")

pytestmark = needs(Feature.POISON)


class Bytes:
    """A source for every driver but the native one."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.length = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def source(driver: Driver, data: bytes) -> BufferSource | Bytes:
    return BufferSource(data) if driver == "native" else Bytes(data)


def served_late(driver: Driver, memory: str) -> None:
    """A thread that faults before serve() gets the content, not SIGBUS."""
    with (
        contextlib.closing(memory_of(memory)) as make,
        Userfaultfd() as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        first, second = make.pages(2), make.pages(2)
        data = content(first.length)
        for region in (first, second):
            uffd.register(region)
        tasks = [Task(region.read) for region in (first, second)]
        wait_for_stalled(uffd, 2)
        wait_until(lambda: handler.stats().messages == 2, "the messages are read")
        handler.serve(first, source(driver, data))
        handler.serve(second, source(driver, data))
        assert [task.result() for task in tasks] == [data, data]
        handler.stop()  # and nothing was refused
        assert handler.stats().unserved == 0


@pytest.mark.crossing
@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize("driver", DRIVERS)
def test_served_late(driver: Driver, memory: str) -> None:
    run_child(served_late, driver, memory)


def refused(driver: Driver, memory: str, how: str) -> None:
    with (
        contextlib.closing(memory_of(memory)) as make,
        Userfaultfd() as uffd,
    ):
        handler = Handler(uffd, driver=driver)
        handler.start()
        region = make.pages(1)
        uffd.register(region)
        began = time.monotonic()
        task = Task(is_lost, region)
        wait_until(lambda: handler.stats().messages == 1, "the message is read")
        if how == "time":
            assert task.result()
            assert time.monotonic() - began > LIMIT_S * 0.9
            wait_until(lambda: handler.stats().unserved == 1, "the fault is counted")
        with pytest.raises(HandlerError, match="not served") as caught:
            handler.stop(drain=how != "stop-at-once")
        assert caught.value.start == region.start
        assert task.result()


@pytest.mark.crossing
@pytest.mark.parametrize("how", ["stop", "stop-at-once"])
@pytest.mark.parametrize("memory", memory_params("anon", "shmem", "hugetlb"))
@pytest.mark.parametrize("driver", DRIVERS)
def test_refused_at_stop(driver: Driver, memory: str, how: str) -> None:
    run_child(refused, driver, memory, how)


@pytest.mark.parametrize("driver", DRIVERS)
def test_refused_in_time(driver: Driver) -> None:
    run_child(refused, driver, "anon", "time")


def worker_dies() -> None:
    """Faults that a killed worker had read are sent again, also in ranges not served yet."""
    with (
        Userfaultfd() as uffd,
        Region.anonymous(2 * PAGE) as served,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd, driver="process") as handler,
    ):
        data = content(2 * PAGE)
        handler.serve(served, Bytes(data))
        assert served.read(0, PAGE) == data[:PAGE]
        uffd.register(region)
        task = Task(region.read)
        wait_until(lambda: handler.stats().messages >= 2, "the message is read")
        engine = handler._engine
        assert isinstance(engine, RemoteEngine)
        kill(engine.pids()[1], number=signal.SIGKILL)
        wait_until(lambda: handler.stats().restarts == 1, "another worker took over")
        handler.serve(region, Bytes(data))
        assert task.result() == data
        assert served.read() == data


def test_the_worker_dies() -> None:
    run_child(worker_dies)


def in_python() -> None:
    """The same with "auto", which becomes the process driver meanwhile."""
    with (
        Userfaultfd() as uffd,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        uffd.register(region)
        task = Task(region.read)
        wait_until(lambda: handler.stats().messages == 1, "the message is read")
        handler.serve(region, CallableSource(letters))
        assert handler.driver == "process"
        assert task.result() == letters(0, 2 * PAGE)


def letters(offset: int, length: int) -> bytes:
    return b"a" * length


def test_auto_changes_its_driver() -> None:
    run_child(in_python)
