"""Fixtures, the reserve of huge pages and swap, and the summary of skips for all tests."""

from __future__ import annotations

import gc
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyuffd import Feature, testing
from pyuffd.testing import needs, require
from tests import _crossings
from tests._child import FRESH, zygote
from tests._left_out import left_out
from tests._memory import Memory, memory_of, memory_params

TESTS = Path(__file__).parent
# `make test &` in a shell starts us with the first two ignored, nohup with the last. The programs
# of tests need them.
SIGNALS: dict[signal.Signals, Callable[..., object] | signal.Handlers] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGQUIT: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
# The folders whose tests use the kernel's resources: they get huge pages and swap, and may leak.
KERNEL_FOLDERS = tuple(TESTS / name for name in ("kernel", "process", "stress"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let the conformance suite's plugin reserve huge pages and swap for tests of the kernel.

    Stop ignoring signals, as the programs that tests start would inherit that.
    """
    for number, handler in SIGNALS.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    if not config.option.collectonly and _asks_for_kernel_tests(config):
        config.option.uffd_reserve = True


def _asks_for_kernel_tests(config: pytest.Config) -> bool:
    base = config.invocation_params.dir
    paths = [(base / arg.split("::")[0]).resolve() for arg in config.args]
    return any(
        path.is_relative_to(folder) or folder.is_relative_to(path)
        for path in paths
        for folder in KERNEL_FOLDERS
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a sample of each table of crossings, unless all or individual tests are requested."""
    if _crossings.ALL or config.option.keyword or any("::" in arg for arg in config.args):
        return
    tables: dict[str, list[str]] = {}
    every: dict[str, int] = {}
    for item in items:
        if marker := item.get_closest_marker("crossing"):
            test, _, rest = item.nodeid.partition("[")
            tables.setdefault(test, []).append(rest.removesuffix("]"))
            if "every" in marker.kwargs:
                every[test] = marker.kwargs["every"]
    out = _crossings.left_out(tables, every)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in out])
    items[:] = [item for item in items if item.nodeid not in out]


def pytest_collection_finish() -> None:
    """Exclude the thousands of tests from garbage collection: some tests collect often."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test of the kernel folders without a userfaultfd, before its fixtures are made."""
    if _is_of_the_kernel(item) and not any(item.iter_markers("without_userfaultfd")):
        require(needs(Feature(0)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the skipped tests by reason."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        longrepr = report.longrepr
        reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("skipped, by reason")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5} {reason}")
        ran = sum(len(terminalreporter.stats.get(key, [])) for key in ("passed", "failed", "error"))
        terminalreporter.write_line("")
        terminalreporter.write_line(left_out(sum(reasons.values()), ran))


@pytest.fixture(params=memory_params())
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    """A factory of regions, once for each memory type."""
    factory = memory_of(request.param)
    try:
        yield factory
    finally:
        factory.close()


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test of the kernel folders that leaves a file descriptor or thread behind."""
    if not _is_of_the_kernel(request.node):
        yield
        return
    if not FRESH:
        zygote()  # its socket stays
    with testing.no_leaks(mappings=False, processes=False):
        yield


def _is_of_the_kernel(item: pytest.Item) -> bool:
    return any(item.path.is_relative_to(folder) for folder in KERNEL_FOLDERS)
