"""The pytest plugin of `pyuffd.testing`: its marks and fixtures, and the strict mode of skips.

pytest imports this wherever pyuffd is installed, so it is outside the package and imports it only
in tests that use it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyuffd.testing import FaultingChild


# pyuffd's own suites set this: with PYUFFD_TESTS=require every skip is then a failure.
EVERY_SKIP = "pyuffd_require_every_skip"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the setting of the configuration file."""
    text = "PYUFFD_TESTS=require applies to all skips, not only those of needs*()"
    parser.addini(EVERY_SKIP, text, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark, for --strict-markers; refuse an unknown mode."""
    config.addinivalue_line(
        "markers", "pyuffd_need(need): what a test needs; made by needs*() of pyuffd.testing"
    )
    if "PYUFFD_TESTS" in os.environ:
        from pyuffd.testing._skips import check_mode

        check_mode()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose needs are not met, before its fixtures are made."""
    for mark in item.iter_markers("pyuffd_need"):
        from pyuffd.testing import require

        require(mark)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report a skip as a failure if PYUFFD_TESTS=require demands it."""
    report = yield
    error = call.excinfo.value if call.excinfo is not None else None
    if isinstance(error, pytest.skip.Exception) and not _may_be_skipped(item.config, error):
        report.outcome = "failed"
        report.longrepr = f"PYUFFD_TESTS=require: skipped: {error}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself, which no need does."""
    report = yield
    if report.outcome == "skipped" and not _may_be_skipped(collector.config, Exception()):
        report.outcome = "failed"
        report.longrepr = f"PYUFFD_TESTS=require: module skipped: {report.longreprtext}"
    return report


def _may_be_skipped(config: pytest.Config, error: BaseException) -> bool:
    if "PYUFFD_TESTS" not in os.environ:
        return True
    from pyuffd.testing._skips import may_be_skipped

    return may_be_skipped(error, others=not config.getini(EVERY_SKIP))


@pytest.fixture
def faulting_child() -> Iterator[Callable[..., FaultingChild]]:
    """Make a `pyuffd.testing.FaultingChild` for each call; they end with the test."""
    from pyuffd.testing import FaultingChild

    with ExitStack() as children:

        def make(*args: Any, **options: Any) -> FaultingChild:
            return children.enter_context(FaultingChild(*args, **options))

        yield make


@pytest.fixture
def pyuffd_no_leaks() -> Iterator[None]:
    """Fail a test that leaves descriptors, mappings, threads or child processes behind.

    Request it before the fixtures that it must check: it looks after those behind it have ended.
    """
    from pyuffd.testing import no_leaks

    with no_leaks():
        yield
