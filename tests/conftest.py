"""Fixtures, the strict mode and the skip summary that all tests share."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from pyuffd import Feature
from tests import _machine
from tests._child import FRESH, zygote
from tests._left_out import left_out
from tests._memory import Memory, memory_of, memory_params
from tests._need import needs, require, strict

TESTS = Path(__file__).parent
# The folders whose tests use the kernel's resources: these get huge pages and swap, and may leak.
KERNEL_FOLDERS = tuple(TESTS / name for name in ("kernel", "process", "stress"))
# A joined C thread stays visible in /proc for a moment.
SETTLE_S = 2.0

_reservation = pytest.StashKey[_machine.Reservation | None]()


def pytest_configure(config: pytest.Config) -> None:
    """Take huge pages and swap for the session, in the process that controls it."""
    strict()
    is_worker = hasattr(config, "workerinput")
    reservation = None
    if not is_worker and not config.option.collectonly and _asks_for_kernel_tests(config):
        workers = getattr(config.option, "numprocesses", None) or 1
        reservation = _machine.reserve(workers)
    config.stash[_reservation] = reservation


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give back what pytest_configure took."""
    reservation = config.stash.get(_reservation, None)
    if reservation is not None:
        reservation.release()


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what was reserved."""
    reservation = config.stash.get(_reservation, None)
    return reservation.notes if reservation is not None else None


def _asks_for_kernel_tests(config: pytest.Config) -> bool:
    base = config.invocation_params.dir
    paths = [(base / arg.split("::")[0]).resolve() for arg in config.args]
    return any(
        path.is_relative_to(folder) or folder.is_relative_to(path)
        for path in paths
        for folder in KERNEL_FOLDERS
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check what the test's folder and `needs*` marks ask for, before its fixtures are made."""
    if _is_of_the_kernel(item) and not any(item.iter_markers("without_userfaultfd")):
        require(needs(Feature(0)))
    for mark in item.iter_markers("need"):
        for need in mark.args:
            need.check()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In strict mode, report a skip as a failure."""
    report = yield
    skip = call.excinfo.value if call.excinfo is not None else None
    if (
        isinstance(skip, pytest.skip.Exception)
        and strict()
        and not getattr(skip, "may_lack", False)
    ):
        report.outcome = "failed"
        report.longrepr = f"PYUFFD_TESTS=require: skipped: {skip}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """In strict mode, report a module that skips itself as a failure."""
    report = yield
    if report.outcome == "skipped" and strict():
        report.outcome = "failed"
        report.longrepr = f"PYUFFD_TESTS=require: module skipped: {report.longreprtext}"
    return report


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
    # Listing /proc/self/task skips a thread while another one, of the last test, still exits:
    # those that were there before any test are remembered.
    before = _held() | _held()
    _threads_before.update(name for name in before if name.startswith("thread"))
    before |= _threads_before
    yield
    deadline = time.monotonic() + SETTLE_S
    while True:
        # A thread may end while this one is kept waiting: only what is seen later is left behind.
        is_late = time.monotonic() > deadline
        extra = sorted(_held() - before)
        if not extra:
            return
        if is_late:
            pytest.fail("left behind: " + ", ".join(extra))
        gc.collect()
        os.sched_yield()


_threads_before: set[str] = set()


def _is_of_the_kernel(item: pytest.Item) -> bool:
    return any(item.path.is_relative_to(folder) for folder in KERNEL_FOLDERS)


def _held() -> set[str]:
    """Name this process's open files and threads."""
    held = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            held.add(f"fd {fd} -> {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue
    for thread in os.listdir("/proc/self/task"):
        try:
            name = Path(f"/proc/self/task/{thread}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        held.add(f"thread {thread} ({name})")
    return held
