"""`with Handler(...)` starts it: no thread waits because start() was forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import Any, Literal

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    ClosedError,
    Feature,
    FileSource,
    Handler,
    PageSource,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.handlers import _engine
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._serving import open_fds, thread_names, wait_for_stalled, wait_until
from tests.process import _process_sources as sources
from tests.process._process_sources import PAGE, content

Driver = Literal["auto", "native", "inline", "thread", "process"]
DRIVERS: tuple[Driver, ...] = ("auto", "native", "inline", "thread", "process")
WP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM

pytestmark = needs(Feature(0))


def source_for(driver: Driver, data: bytes) -> PageSource:
    """A source that every driver supports: the process driver has none in memory."""
    if driver != "process":
        return BufferSource(data)
    with open(os.memfd_create("content"), "w+b") as file:
        file.write(data)
        file.flush()
        return FileSource(file.fileno())


def uffd_for(driver: Driver, features: Feature = Feature(0)) -> Userfaultfd:  # noqa: B008
    return Userfaultfd(features=features | (Feature.SIGBUS if driver == "inline" else 0))


def by_with(driver: Driver, memory: str) -> None:
    with contextlib.closing(memory_of(memory)) as make, uffd_for(driver) as uffd:
        region = make.pages(2)
        data = content(region.length)
        with Handler(uffd, driver=driver) as handler:
            assert "running" in repr(handler)
            handler.serve(region, source_for(driver, data))
            assert region.read() == data
            handler.start()
            with handler:  # this starts and stops it once more, like close()
                assert "running" in repr(handler)
            assert "stopped" in repr(handler)
        with pytest.raises(ClosedError), handler:
            pass


@pytest.mark.crossing
@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize("driver", DRIVERS)
def test_with_starts(driver: Driver, memory: str) -> None:
    run_child(by_with, driver, memory)


def by_async_with(driver: Driver) -> None:
    async def main() -> None:
        with uffd_for(driver) as uffd, Region.anonymous(2 * PAGE) as region:
            async with Handler(uffd, driver=driver) as handler:
                handler.serve(region, source_for(driver, content(2 * PAGE)))
                assert await asyncio.to_thread(region.read) == content(2 * PAGE)

    asyncio.run(main())


@pytest.mark.parametrize("driver", DRIVERS)
def test_async_with_starts(driver: Driver) -> None:
    run_child(by_async_with, driver)


def not_by_itself(driver: Driver) -> None:
    """Protect first, slowly; writes meanwhile wait for start()."""
    with uffd_for(driver, WP) as uffd, Region.anonymous(2 * PAGE) as region:
        region.fill(1)
        with Handler(uffd, driver=driver, autostart=False) as handler:
            assert "not started" in repr(handler)
            handler.serve(region, None, mode=RegisterMode.WP)
            handler.writeprotect(region)
            writer = threading.Thread(target=region.write, args=(0, b"x"))
            writer.start()
            wait_for_stalled(uffd, 1)
            assert list(handler.page_states(region)) == [PageState.CLEAN] * 2
            handler.start()
            writer.join()
            assert list(handler.page_states(region)) == [PageState.DIRTY, PageState.CLEAN]


@needs(WP)
@pytest.mark.parametrize("driver", [driver for driver in DRIVERS if driver != "inline"])
def test_autostart_can_be_switched_off(driver: Driver) -> None:
    run_child(not_by_itself, driver)


def write_protected(driver: Driver) -> None:
    with (
        uffd_for(driver, WP) as uffd,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd, driver=driver) as handler,
    ):
        region.fill(1)
        handler.serve(region, None, mode=RegisterMode.WP)
        handler.writeprotect(region)
        region.write(0, b"x")
        assert list(handler.page_states(region)) == [PageState.DIRTY, PageState.CLEAN]


@needs(WP)
@pytest.mark.parametrize("driver", DRIVERS)
def test_write_protection(driver: Driver) -> None:
    run_child(write_protected, driver)


def forked(driver: Driver) -> None:
    """fork() waits for its event to be read, forever if start() was forgotten."""
    with (
        uffd_for(driver, Feature.EVENT_FORK) as uffd,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd, driver=driver) as handler,
    ):
        handler.serve(region, source_for(driver, content(2 * PAGE)))
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)


@needs(Feature.EVENT_FORK)
@pytest.mark.parametrize("driver", [driver for driver in DRIVERS if driver != "inline"])
def test_fork(driver: Driver) -> None:
    run_child(forked, driver)


# "auto"


def to_the_process_driver(started: bool) -> None:
    before = open_fds()
    with (
        Userfaultfd() as uffd,
        Userfaultfd() as other,
        Region.anonymous(16 * PAGE) as region,
        Handler(uffd, autostart=started) as handler,
        Region.anonymous(PAGE) as second,
    ):
        with pytest.raises(ValueError):  # `other` gets a space of its own, without ranges
            handler.serve(second, BufferSource(b""), uffd=other)
        assert str(handler.driver) == "native"
        handler.serve(region, CallableSource(sources.page))
        assert handler.driver == "process"
        assert ("running" if started else "not started") in repr(handler)
        assert f"uffd-h{uffd.fileno()}" not in thread_names()
        handler.start()
        handler.serve(second, ZeroSource(), uffd=other)
        with region.memoryview() as view:
            assert bytes(view) == content(16 * PAGE)
        assert second.read() == bytes(PAGE)
    assert open_fds() == before


@pytest.mark.parametrize("started", [True, False])
def test_auto_takes_the_process_driver(started: bool) -> None:
    run_child(to_the_process_driver, started)


def stays_native(unserve: bool) -> None:
    """The results of the native engine are not lost."""
    with (
        Userfaultfd() as uffd,
        Region.anonymous(PAGE) as region,
        Region.anonymous(PAGE) as other,
        Handler(uffd) as handler,
    ):
        handler.serve(region, ZeroSource())
        region.touch()
        if unserve:
            handler.unserve(region)
        with pytest.raises(ValueError, match="driver='process'"):
            handler.serve(other, CallableSource(sources.page))
        assert handler.driver == "native"
        assert handler.stats().faults["missing"] == 1


@pytest.mark.parametrize("unserve", [True, False])
def test_auto_stays_native_once_it_served(unserve: bool) -> None:
    run_child(stays_native, unserve)


# Failures at the start


def start_fails(driver: Driver) -> None:
    fds = open_fds()
    with uffd_for(driver) as uffd:
        name = "uffd_inline_start" if driver == "inline" else "uffd_native_start"
        module: Any = _engine
        right, module.lib = module.lib, Broken(module.lib, name)
        try:
            with pytest.raises(OSError), Handler(uffd, driver=driver):
                raise AssertionError("it did not start")
        finally:
            module.lib = right
        with Region.anonymous(PAGE) as region, Handler(uffd, driver=driver) as handler:
            handler.serve(region, ZeroSource())
            region.touch()
    wait_until(lambda: open_fds() == fds, "no descriptor is left")
    wait_until(lambda: not any(name.startswith("uffd-") for name in thread_names()), "no thread")


class Broken:
    """The compiled module, except that one function fails with EAGAIN."""

    def __init__(self, lib: Any, name: str) -> None:
        self._lib, self._name = lib, name

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: -11) if name == self._name else getattr(self._lib, name)


@pytest.mark.parametrize("driver", ["native", "inline", "thread"])
def test_a_failed_start_leaves_nothing(driver: Driver) -> None:
    run_child(start_fails, driver)
