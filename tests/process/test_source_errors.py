"""Exceptions of page sources whose text is long, or cannot be read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Literal

import pytest

from pyuffd import (
    AsyncSource,
    CallableSource,
    Handler,
    HandlerError,
    PagePoisonedError,
    Region,
    Userfaultfd,
)
from pyuffd._describe import TEXT_MOST, described, shortened, traceback_of
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests.process import _process_sources as sources
from tests.process._process_sources import PAGE

Driver = Literal["thread", "process"]
both_drivers = pytest.mark.parametrize("driver", ["thread", "process"])


@both_drivers
def test_a_long_text_is_cut(
    driver: Driver, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with Userfaultfd() as uffd, Region.anonymous(PAGE) as region:
        handler = Handler(uffd, driver=driver)
        handler.serve(region, CallableSource(sources.long_text))
        handler.start()
        with caplog.at_level(logging.DEBUG, "pyuffd"), pytest.raises(PagePoisonedError):
            region.read(0, 1)
        with caplog.at_level(logging.DEBUG, "pyuffd"), pytest.raises(HandlerError) as said:
            handler.stop()
    assert len(str(said.value)) < TEXT_MOST
    # The program gets all of it.
    assert str(said.value.__cause__) == "x" * sources.LONG
    err = capfd.readouterr().err
    left_out = f"({sources.LONG - TEXT_MOST} more characters)"
    assert left_out in err
    assert len(err) < 4 * TEXT_MOST
    assert caplog.text.count(left_out) >= (driver == "thread")
    assert len(caplog.text) < 20 * TEXT_MOST


def cause_of(driver: Driver, source: Callable[[int, int], bytes]) -> BaseException | None:
    """Touch a page that fails and one that does not; return the cause that stop() tells."""
    with Userfaultfd() as uffd, Region.anonymous(2 * PAGE) as region:
        handler = Handler(uffd, driver=driver, stall_timeout_s=math.inf)
        handler.serve(region, CallableSource(source))
        handler.start()
        with pytest.raises(PagePoisonedError):
            region.read(0, 1)
        assert region.read(PAGE, 1) == b"g"
        with pytest.raises(HandlerError) as said:
            handler.stop()
    return said.value.__cause__


@both_drivers
@needs_kernel_faults()
def test_no_text(driver: Driver, capfd: pytest.CaptureFixture[str]) -> None:
    """The page is poisoned at once, and the worker lives."""
    assert type(cause_of(driver, sources.no_text)).__name__ == "NoText"
    assert "__str__ raises ZeroDivisionError" in capfd.readouterr().err


@both_drivers
@needs_kernel_faults()
@pytest.mark.parametrize("source", [sources.no_errno, sources.huge_errno])
def test_no_errno(driver: Driver, source: Callable[[int, int], bytes]) -> None:
    assert isinstance(cause_of(driver, source), OSError)


def coroutine_exits(driver: Driver) -> None:
    with Userfaultfd() as uffd, Region.anonymous(2 * PAGE) as region:
        handler = Handler(uffd, driver=driver, stall_timeout_s=math.inf)
        handler.serve(region, sources.exits)
        handler.start()
        with pytest.raises(PagePoisonedError):
            region.read(0, 1)
        assert region.read(PAGE, 1) == b"g"
        with pytest.raises(HandlerError) as said:
            handler.stop()
    assert "SystemExit" in str(said.value.__cause__)


@both_drivers
@needs_kernel_faults()
def test_a_coroutine_that_exits(driver: Driver) -> None:
    """The loop lives: it has other coroutines."""
    run_child(coroutine_exits, driver, budget_s=20)


def test_a_log_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter of the program's own raises as the failure is reported: the page must not wait."""

    def fails(record: logging.LogRecord) -> bool:
        raise RuntimeError("no log today")

    log = logging.getLogger("pyuffd.handlers._threads")
    monkeypatch.setattr(log, "filters", [fails])
    with Userfaultfd() as uffd, Region.anonymous(2 * PAGE) as region:
        handler = Handler(uffd, driver="thread", stall_timeout_s=math.inf)
        handler.serve(region, CallableSource(sources.no_text))
        handler.start()
        with pytest.raises(PagePoisonedError):
            region.read(0, 1)
        assert region.read(PAGE, 1) == b"g"
        with pytest.raises(HandlerError):
            handler.stop()


def test_texts() -> None:
    assert shortened("a" * TEXT_MOST) == "a" * TEXT_MOST
    assert shortened("a" * 12, 10) == "a" * 10 + "... (2 more characters)"
    assert described(ValueError("short")) == "ValueError: short"
    outer = RuntimeError("o" * 3 * TEXT_MOST)
    outer.__cause__ = ValueError("i" * 3 * TEXT_MOST)
    text = traceback_of(outer)
    assert text.count("more characters)") == 2
    assert len(text) < 3 * TEXT_MOST


def forked(driver: Driver, name: str) -> None:
    with Userfaultfd() as uffd, Region.anonymous(4 * PAGE) as region:
        with Handler(uffd, driver=driver) as handler:
            function = getattr(sources, name)
            kind = AsyncSource if name == "forks_later" else CallableSource
            handler.serve(region, kind(function))
            assert region.read(0, 4 * PAGE) == sources.page(0, 4 * PAGE)
        assert handler.stats().faults["missing"] == 4


@both_drivers
@pytest.mark.parametrize("name", ["forks", "forks_and_raises", "forks_later"])
def test_a_source_that_forks(driver: Driver, name: str) -> None:
    """The child would answer too, and live on with the userfaultfd; the source waits for it."""
    ended = run_child(forked, driver, name, budget_s=20)
    assert ended.stderr.count("a process that a page source forked came back") == 4
