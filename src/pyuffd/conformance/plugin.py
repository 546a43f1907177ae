"""The pytest plugin: runs cases, watches the kernel's log, and reports (layer L5).

`-p pyuffd.conformance.plugin` loads it, and so does `pyuffd conformance run`. It works under xdist:
a worker's results reach the controller with the test's report.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import _pyuffd_pytestplugin
from pyuffd.conformance._case import Case, load
from pyuffd.conformance._context import Context, Mismatch
from pyuffd.conformance._kmsg import Kmsg, Record
from pyuffd.conformance._report import FAILED, PASSED, SKIPPED, Message, Report, Result
from pyuffd.conformance._writing import write_report
from pyuffd.testing import _machine
from pyuffd.testing._memory_types import MEMORY_TYPES
from pyuffd.testing._need import (
    Lack,
    kernel_features,
    needs,
    needs_hugepages,
    strict,
)
from pyuffd.testing._run import SCALE
from pyuffd.testing._skips import skip
from pyuffd.testing._user_mode import make_do

SUITE = Path(__file__).with_name("test_suite.py")
HUGE_PAGES = 16  # what a case on hugetlb may use without naming a need
PROPERTY = "pyuffd-conformance"
NOTHING_CHECKED = 77  # GNU Automake's exit status of a skipped test
_NUMBER = re.compile(r"\b(0x)?[0-9a-f]*[0-9][0-9a-f]*\b")

_state = pytest.StashKey["_State"]()
_outcome = pytest.StashKey[dict[str, Any]]()


class Gathering:
    """A report that grows with each result, wherever the cases run.

    Attributes:
        report: The report so far.
    """

    def __init__(self) -> None:
        self.report: Report = Report.of_this_kernel(0)
        self._messages: dict[int | str, Message] = {}

    def add(self, data: dict[str, Any]) -> None:
        """Add the result of a test; several workers may report the same record of the log."""
        log = data.pop("kernel")
        self.report.features = data.pop("features")
        self.report.log_readable &= log["readable"]
        for sequence, priority, text, is_fatal in log["records"]:
            # Warnings that differ only in numbers (a pid, an address) count as one; fatal ones do
            # not.
            key = sequence if is_fatal else _NUMBER.sub("N", text)
            if key not in self._messages:
                self._messages[key] = Message(text, priority, is_fatal, [])
                self.report.messages.append(self._messages[key])
            if data["id"] not in self._messages[key].tests:
                self._messages[key].tests.append(data["id"])
        self.report.results[data["id"]] = Result(**data)

    def add_between(self, records: list[Record]) -> None:
        """Add fatal messages that appeared while no case was running, for instance late ones."""
        for record in records:
            if record.is_fatal and record.sequence not in self._messages:
                message = Message(record.text, record.priority, True, [])
                self._messages[record.sequence] = message
                self.report.messages.append(message)

    def sort(self) -> None:
        """Sort the results by case: workers send them as they finish."""
        results = self.report.results
        ordered = [name for case in load().values() for name in case.ids if name in results]
        self.report.results = {name: results[name] for name in ordered}


class _State(Gathering):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[Path] = []
        self.reservation: _machine.Reservation | None = None
        self.kmsg: Kmsg | None = None

    def add_failure(self, nodeid: str, text: str) -> None:
        """Add a failure for a test that returned no result."""
        name = nodeid.partition("[")[2].removesuffix("]")
        case, memory = load().get(name.rpartition(".")[0]), name.rpartition(".")[2]
        if case is not None and memory in case.memory:
            self.report.results[name] = Result(name, case.name, memory, case.summary, FAILED, text)


# pytest_runtest_logreport does not get the configuration.
_reporting: _State | None = None
# For the tracebacks of a case that stalls.
_stderr = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; keep the real stderr, as pytest begins to capture it after this."""
    global _stderr
    _stderr = os.dup(2)
    group = parser.getgroup("userfaultfd conformance")
    group.addoption(
        "--uffd-report", metavar="FILE", help="write the conformance report to FILE.json and .html"
    )
    group.addoption(
        "--uffd-reserve",
        action="store_true",
        help="reserve huge pages and swap for the run, and give them back",
    )
    group.addoption(
        "--uffd-nonempty",
        action="store_true",
        help=f"end with status {NOTHING_CHECKED} if every conformance case was skipped",
    )
    group.addoption("--uffd-slow", action="store_true", help="run the slow conformance cases too")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the report, register the marks, reserve what the run needs of the machine."""
    global _reporting
    config.addinivalue_line("markers", "conformance: a case of the conformance suite")
    config.addinivalue_line("markers", "conformance_crossing: one of a table of combinations")
    if not config.pluginmanager.is_registered(_pyuffd_pytestplugin):
        # PYTEST_DISABLE_PLUGIN_AUTOLOAD is set. This plugin is needed: it has the strict mode.
        config.pluginmanager.register(_pyuffd_pytestplugin)
    make_do(strictly=strict())
    path = config.getoption("--uffd-report")
    if path and not Path(path).absolute().parent.is_dir():
        raise pytest.UsageError(f"--uffd-report={path}: there is no such folder")
    state = config.stash[_state] = _State()
    if not hasattr(config, "workerinput"):
        _reporting = state
        state.kmsg = Kmsg()
        if config.getoption("--uffd-reserve"):
            state.reservation = _machine.reserve(getattr(config.option, "numprocesses", None) or 1)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what was reserved."""
    reservation = config.stash[_state].reservation
    return reservation.notes if reservation is not None else None


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give back what was reserved."""
    state = config.stash.get(_state, None)
    if state is None:  # the configuration was refused
        return
    if state.kmsg is not None:
        state.kmsg.close()
    if state.reservation is not None:
        state.reservation.release()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each case and memory type; of slow cases only with --uffd-slow."""
    if "uffd_case" not in metafunc.fixturenames:
        return
    is_slow_wanted = metafunc.config.getoption("--uffd-slow")
    params = [
        pytest.param((case.name, memory), id=case.id_on(memory), marks=_marks(case))
        for case in load().values()
        for memory in case.memory
        if is_slow_wanted or not case.is_slow
    ]
    metafunc.parametrize("uffd_case", params)


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    crossing = [pytest.mark.conformance_crossing] if case.is_crossing else []
    return [pytest.mark.conformance, *crossing]


def run_case(stash: pytest.Stash, name: str, memory: str) -> None:
    """Run one case; leave its result in the stash of the test."""
    case = load()[name]
    result: dict[str, Any] = {
        "id": case.id_on(memory),
        "case": name,
        "memory": memory,
        "summary": case.summary,
        "variant": "",
        "features": 0,
        "kernel": {"readable": True, "records": []},
    }
    stash[_outcome] = result
    with _machine.use(alone=case.is_alone), contextlib.closing(Kmsg()) as kmsg:
        result["kernel"]["readable"] = kmsg.readable
        _watched(case, memory, result, kmsg)


def _watched(case: Case, memory: str, result: dict[str, Any], kmsg: Kmsg) -> None:
    # A thread that waits for a fault with the GIL held stops all Python code, so a timeout in
    # Python would not fire.
    faulthandler.dump_traceback_later(case.budget_s * SCALE, exit=True, file=_stderr)
    try:
        _run(case, memory, result)
    finally:
        faulthandler.cancel_dump_traceback_later()
        result["kernel"]["records"] = records(kmsg, case)


def records(kmsg: Kmsg, case: Case) -> list[tuple[int, int, str, bool]]:
    """Return the new records of the kernel's log that belong in the report."""
    return [
        (record.sequence, record.priority, record.text, record.is_fatal)
        for record in kmsg.read()
        if record.is_fatal or (record.is_warning and not case.is_noisy)
    ]


def _run(case: Case, memory: str, result: dict[str, Any]) -> None:
    try:
        result["features"] = kernel_features()
        check_needs(case, memory)
        context = Context(case, memory)
        try:
            case.run(context)
            for monitor in context._monitors:
                monitor.stop()
        except Mismatch as mismatch:
            mismatch.add_note(context.describe())
            raise
        finally:
            result["variant"] = context.variant
            context.close()
    except Lack as lack:
        skip(lack)


def check_needs(case: Case, memory: str) -> None:
    """Raise Lack if the kernel or the machine lacks what a case needs."""
    of = MEMORY_TYPES.get(memory, MEMORY_TYPES["anon"])
    features = case.features_on(of)
    if features:
        needs(features).check()
    if of.is_hugetlb:
        needs_hugepages(HUGE_PAGES).check()
    for need in case.needs:
        need.check()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the case's result to its report, which xdist sends to the controller."""
    report = yield
    result = item.stash.get(_outcome, None)
    if result is None or report.when != "call":
        return report
    error = call.excinfo.value if call.excinfo is not None else None
    text = str(error) if error is not None else ""
    if isinstance(error, Mismatch) and call.excinfo is not None:
        text = "\n".join([text, *_place(call.excinfo), *getattr(error, "__notes__", [])])
        report.longrepr = f"{result['id']}: {result['summary']}\n{text}"
    elif report.failed:
        text = report.longreprtext
    outcome = {"passed": PASSED, "skipped": SKIPPED}.get(report.outcome, FAILED)
    result |= {"outcome": outcome, "text": text, "duration_s": round(report.duration, 4)}
    report.user_properties.append((PROPERTY, json.dumps(result)))
    return report


def _place(excinfo: pytest.ExceptionInfo[BaseException]) -> list[str]:
    """Return the lines of the case that led to the failure, not those of the suite."""
    entries = list(excinfo.traceback)
    while entries and Path(entries[0].path) != Path(__file__):
        del entries[0]
    return [
        f"at {entry.path}:{entry.lineno + 1}"
        for entry in entries
        if Path(entry.path).parent != SUITE.parent
    ]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a result to the report of the run; under xdist, in the controller only."""
    state = _reporting
    if state is None:
        return
    raw = next((value for key, value in report.user_properties if key == PROPERTY), None)
    if raw is not None and report.when == "call":
        state.add(json.loads(str(raw)))
    elif report.failed and report.when != "call":
        # Its fixtures failed, or its worker died: the watchdog kills a process that stalls.
        state.add_failure(report.nodeid, report.longreprtext)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report; a fatal kernel message fails the run."""
    state = session.config.stash[_state]
    if hasattr(session.config, "workerinput") or not state.report.results:
        return
    if state.kmsg is not None:
        state.add_between(state.kmsg.read())
    state.sort()
    if state.report.fatal and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    is_empty = set(state.report.counts()) == {SKIPPED}
    if is_empty and session.exitstatus == 0 and session.config.getoption("--uffd-nonempty"):
        session.exitstatus = NOTHING_CHECKED
    if path := session.config.getoption("--uffd-report"):
        state.written = write_report(state.report, path)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the matrix."""
    state = config.stash[_state]
    if state.report.results:
        terminalreporter.section("userfaultfd conformance")
        for line in state.report.lines():
            terminalreporter.write_line(line)
        for path in state.written:
            terminalreporter.write_line(f"report: {path}")
