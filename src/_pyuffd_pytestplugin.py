"""The pytest plugin of `pyuffd.testing`: its marks and fixtures.

pytest imports this wherever pyuffd is installed, so it stands outside the package and imports it
only in tests that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyuffd.testing import FaultingChild


def pytest_configure(config: pytest.Config) -> None:
    """Know the mark, for --strict-markers."""
    config.addinivalue_line(
        "markers", "pyuffd_need(need): what a test needs; made by needs*() of pyuffd.testing"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose needs are not met, before its fixtures are made."""
    for mark in item.iter_markers("pyuffd_need"):
        from pyuffd.testing import require

        require(mark)


@pytest.fixture
def faulting_child() -> Iterator[Callable[..., FaultingChild]]:
    """Make `pyuffd.testing.FaultingChild`s with the arguments given; they end with the test."""
    from pyuffd.testing import FaultingChild

    with ExitStack() as children:

        def make(*args: Any, **options: Any) -> FaultingChild:
            return children.enter_context(FaultingChild(*args, **options))

        yield make


@pytest.fixture
def pyuffd_no_leaks() -> Iterator[None]:
    """Fail a test that leaves descriptors, mappings, threads or child processes behind.

    Request it before the fixtures whose traces count: it looks when those after it are gone.
    """
    from pyuffd.testing import no_leaks

    with no_leaks():
        yield
