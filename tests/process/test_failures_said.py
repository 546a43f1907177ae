"""A failed page is always reported: on stderr, in the log, by the exception of populate()."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import logging.handlers
import mmap
import os
import signal
import sys
from typing import Literal

import pytest

from pyuffd import (
    Feature,
    FileSource,
    Handler,
    HandlerError,
    Region,
    UffdOSError,
    Userfaultfd,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._serving import content, is_lost

Driver = Literal["native", "inline", "thread", "process"]
DRIVERS: tuple[Driver, ...] = ("native", "inline", "thread", "process")
IN_PYTHON = ("thread", "process")
INLINE = ("inline", "stall")  # it does not exist

pytestmark = needs(Feature.POISON)


class Failing:
    """A source in Python with a bug: it has the first page only."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size, self.length = data, size, len(data)

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            return self._later(offset, length)
        return self.data[offset : offset + length]

    def _later(self, offset: int, length: int) -> bytes:
        raise KeyError(f"no page at {offset:#x}")


class Kept:
    """The log records."""

    def __init__(self) -> None:
        handler = logging.handlers.BufferingHandler(1 << 10)
        self.records = handler.buffer
        logging.getLogger("pyuffd").addHandler(handler)


def uffd_for(driver: Driver) -> Userfaultfd:
    return Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))


def serve_failing(driver: Driver, handler: Handler, region: Region, data: bytes) -> None:
    """All but the first page cannot be read."""
    if driver in IN_PYTHON:
        handler.serve(region, Failing(data, region.page_size))
        return
    with open(os.memfd_create("short"), "r+b", buffering=0) as file:
        file.write(data)
        handler.serve(region, FileSource(file.fileno()))
        os.truncate(file.fileno(), region.page_size)


def reason(driver: Driver) -> str:
    return "KeyError" if driver in IN_PYTHON else "truncated"


# A thread that dies of the failed page


def dies(driver: Driver, memory: str, on_error: Literal["poison", "kill"]) -> None:
    with (
        contextlib.closing(memory_of(memory)) as make,
        uffd_for(driver) as uffd,
        Handler(uffd, driver=driver, on_error=on_error) as handler,
    ):
        region = make.pages(3)
        serve_failing(driver, handler, region, content(region.length))
        assert region.read(0, 1) == content(region.length)[:1]
        print(f"{region.start + region.page_size:#x}", flush=True)
        # Without the GIL, which the thread driver needs.
        ctypes.memmove(ctypes.create_string_buffer(1), region.start + region.page_size, 1)
        raise AssertionError("it lives on")


@pytest.mark.crossing
@pytest.mark.parametrize("on_error", ["poison", "kill"])
@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize("driver", DRIVERS)
def test_said_before_it_dies(driver: Driver, memory: str, on_error: str) -> None:
    number = signal.SIGBUS if on_error == "poison" else signal.SIGKILL
    ended = run_child(dies, driver, memory, on_error, expect=-number)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("pyuffd: ")]
    assert f"page {ended.stdout.split()[-1]} " in line
    assert "<Region [0x" in line
    assert reason(driver) in line
    assert ("Failing" if driver in IN_PYTHON else "FileSource") in line
    assert ("poisoned" if on_error == "poison" else "is killed") in line
    if driver in IN_PYTHON:
        assert "no page at" in line
        assert "test_failures_said.py" in line  # where it was raised


# Later failures are counted, and the log has them


def counted(driver: Driver, shown: bool) -> None:
    if shown:
        logging.basicConfig(level=logging.INFO)
    else:
        log = Kept()
    with contextlib.closing(memory_of("anon")) as make, uffd_for(driver) as uffd:
        region = make.pages(4)
        size = region.page_size
        handler = Handler(uffd, driver=driver)
        handler.start()
        serve_failing(driver, handler, region, content(region.length))
        for page in range(1, 4):
            assert is_lost(region, page * size, size)
        with pytest.raises(HandlerError, match="3 pages in all") as caught:
            handler.stop()
        assert caught.value.start == region.start + size
        if driver in IN_PYTHON:
            assert isinstance(caught.value.__cause__, KeyError)
    if shown:
        return
    errors = [record for record in log.records if record.levelno == logging.ERROR]
    (record,) = errors
    assert "could not be read" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is not None


@pytest.mark.parametrize("shown", [False, True], ids=["log", "log-on-stderr"])
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_said_once_and_logged(driver: Driver, shown: bool) -> None:
    """One line for the first page; a log on stderr does not repeat it."""
    ended = run_child(counted, driver, shown)
    lines = [line for line in ended.stderr.splitlines() if "could not be read" in line]
    assert sum(line.startswith("pyuffd: page") for line in lines) == (
        0 if shown and driver == "thread" else 1
    )


def without_logging(driver: Driver) -> None:
    assert not logging.getLogger("pyuffd").hasHandlers()
    with contextlib.closing(memory_of("anon")) as make, uffd_for(driver) as uffd:
        region = make.pages(2)
        handler = Handler(uffd, driver=driver)
        handler.start()
        serve_failing(driver, handler, region, content(region.length))
        assert is_lost(region, region.page_size, region.page_size)
        with contextlib.suppress(HandlerError):
            handler.stop()


@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_said_once_without_logging(driver: Driver) -> None:
    """logging.lastResort would write it to stderr once more."""
    ended = run_child(without_logging, driver)
    assert ended.stderr.count("could not be read") == 1


def two_regions(driver: Driver, regions: int) -> None:
    with (
        contextlib.closing(memory_of("anon")) as make,
        contextlib.suppress(HandlerError),
        uffd_for(driver) as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        for _ in range(regions):
            region = make.pages(2)
            serve_failing(driver, handler, region, content(region.length))
            assert is_lost(region, region.page_size, region.page_size)


@pytest.mark.parametrize("driver", ["native", "thread"])
@pytest.mark.parametrize(("regions", "lines"), [(2, 2), (20, 8)])
def test_each_region_has_its_line(driver: Driver, regions: int, lines: int) -> None:
    ended = run_child(two_regions, driver, regions)
    assert ended.stderr.count("could not be read") == lines


def no_stderr(driver: Driver) -> None:
    """A program without stderr: descriptor 2 is a file of its own, which stays unchanged."""
    assert sys.__stderr__ is not None
    sys.stderr = sys.__stderr__ = None  # type: ignore[misc]
    file = os.memfd_create("data")
    saved = os.dup(2)
    os.dup2(file, 2)
    try:
        without_logging(driver)
        assert os.fstat(file).st_size == 0
    finally:
        os.dup2(saved, 2)


@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_without_stderr(driver: Driver) -> None:
    run_child(no_stderr, driver)


# Other failures


def nobodys(driver: Driver) -> None:
    with (
        Region.anonymous(mmap.PAGESIZE) as region,
        contextlib.suppress(HandlerError),
        uffd_for(driver) as uffd,
        Handler(uffd, driver=driver),
    ):
        uffd.register(region)
        print(f"{region.start:#x}", flush=True)
        with region.memoryview() as view:
            view[0]


@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_registered_and_not_served(driver: Driver) -> None:
    ended = run_child(nobodys, driver, expect=-signal.SIGBUS, budget_s=20)
    assert f"page {ended.stdout.split()[-1]}: this memory is registered, but no" in ended.stderr


def stalls(on_error: Literal["poison", "stall"]) -> None:
    """The thread waits for itself, with the GIL held."""

    class Slow(Failing):
        def _later(self, offset: int, length: int) -> bytes:
            import time

            time.sleep(3)
            return bytes(length)

    with (
        Region.anonymous(2 * mmap.PAGESIZE) as region,
        Userfaultfd() as uffd,
        Handler(uffd, driver="thread", stall_timeout_s=0.5, on_error=on_error) as handler,
    ):
        handler.serve(region, Slow(bytes(region.length), mmap.PAGESIZE))
        if on_error == "stall":
            import threading

            threading.Timer(2, os._exit, [0]).start()
            region.read(mmap.PAGESIZE, 1)
        with region.memoryview() as view:
            view[mmap.PAGESIZE]


@pytest.mark.parametrize("on_error", ["poison", "stall"])
def test_a_source_that_does_not_answer(on_error: str) -> None:
    expect = -signal.SIGBUS if on_error == "poison" else 0
    ended = run_child(stalls, on_error, expect=expect)
    assert "the source has not answered in time" in ended.stderr
    assert ("poisoned" if on_error == "poison" else "keep waiting") in ended.stderr


# populate()


def populates(driver: Driver, memory: str, on_error: Literal["poison", "stall"]) -> None:
    with (
        contextlib.closing(memory_of(memory)) as make,
        contextlib.suppress(HandlerError),
        uffd_for(driver) as uffd,
        Handler(uffd, driver=driver, on_error=on_error) as handler,
    ):
        region, good = make.pages(3), make.pages(2)
        size = region.page_size
        data = content(region.length)
        serve_failing(driver, handler, region, data)
        with pytest.raises(UffdOSError) as caught:
            handler.populate(region)
        assert caught.value.completed == size  # type: ignore[attr-defined]
        if driver in IN_PYTHON:
            assert isinstance(caught.value.__cause__, KeyError)
            assert "no page at" in str(caught.value.__cause__)
        # The failure of another region is no error here.
        if driver in IN_PYTHON:
            handler.serve(good, Failing(data, 2 * size))
            assert handler.populate(good) == 2 * size
            assert handler.populate(good) == 0
        assert region.read(0, size) == data[:size]


@pytest.mark.crossing
@pytest.mark.parametrize(
    ("driver", "on_error"),
    [(driver, on) for driver in DRIVERS for on in ("poison", "stall") if (driver, on) != INLINE],
)
@pytest.mark.parametrize("memory", memory_params())
def test_populate_raises_with_the_cause(driver: Driver, memory: str, on_error: str) -> None:
    run_child(populates, driver, memory, on_error)
