"""In a guest: run cases of the conformance suite one after the other, without pytest.

Under emulation pytest costs several times as much as most cases. If a case stalls or kills its
process, the next one runs in a new process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict

from pyuffd.conformance import Result, _report
from pyuffd.conformance._case import DEFAULT_BUDGET_S, Case, load
from pyuffd.conformance._context import Context, Mismatch
from pyuffd.conformance.plugin import check_needs
from pyuffd.testing._need import Lack
from pyuffd.testing._run import SCALE

# Most cases end within milliseconds. One that waits in vain gives up before this limit. Long cases
# have their own budgets.
STALL_S = 15.0 * SCALE
PASSED, SKIPPED, STALLED = "", "skipped", "stalled"
# The case stalled, and its process cannot be killed.
STUCK = "stuck"


def split(test: str) -> tuple[str, str]:
    """Return the case and the memory type of an id."""
    name, _, memory = test.rpartition(".")
    return name, memory


def run(case: Case, memory: str) -> str:
    """Run one case in this process; return PASSED, SKIPPED, or what was wrong, in one line."""
    found = result(case, memory)
    if found.outcome == _report.FAILED:
        return found.text.partition("\n")[0][:300]
    return SKIPPED if found.outcome == _report.SKIPPED else PASSED


def result(case: Case, memory: str) -> Result:
    """Run one case in this process; return its result for a report."""
    outcome, text, variant = _report.PASSED, "", ""
    started = time.monotonic()
    context = None
    try:
        check_needs(case, memory)
        context = Context(case, memory)
        case.run(context)
        for monitor in context._monitors:
            monitor.stop()
    except Lack as lack:
        outcome, text = _report.SKIPPED, lack.reason
    except BaseException as error:
        outcome, text = _report.FAILED, str(error).strip() or type(error).__name__
        if isinstance(error, Mismatch) and context is not None:
            text += f"\n{context.describe()}"
    finally:
        if context is not None:
            variant = context.variant
            context.close()
    took_s = round(time.monotonic() - started, 4)
    name = case.id_on(memory)
    return Result(name, case.name, memory, case.summary, outcome, text, variant, took_s)


def results(tests: Sequence[str]) -> Iterator[tuple[str, Result]]:
    """Run tests by id in a child; yield each with its result for a report, as it arrives."""
    cases = load()
    for test, line in outcomes(
        tests, call=lambda case, memory: json.dumps(asdict(result(case, memory)))
    ):
        if line in (STALLED, STUCK):
            name, memory = split(test)
            case = cases[name]
            text = f"{line}: it printed nothing for {_limit_s(cases, [test]):g} s"
            yield test, Result(test, name, memory, case.summary, _report.FAILED, text)
        else:
            yield test, Result(**json.loads(line))


def outcomes(
    tests: Sequence[str],
    switch: Callable[[bool], None] = lambda is_on: None,
    call: Callable[[Case, str], str] | None = None,
) -> Generator[tuple[str, str], None, None]:
    """Run tests by id in a child; yield each with its outcome, as it arrives.

    Args:
        tests: Their ids.
        switch: Called with True before and False after each, and with False at the end.
        call: Runs one, and returns its outcome in one line; `run` by default.
    """
    cases = load()
    waiting = list(tests)
    while waiting:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reading)
            _child(cases, waiting, writing, switch, call or run)
        os.close(writing)
        try:
            for line in _lines(reading, lambda: _limit_s(cases, waiting)):
                yield waiting.pop(0), line
        finally:
            os.close(reading)
            # Switch off before it is killed, in case the mutant keeps it from ending, and again
            # afterwards, in case it switched the mutant on meanwhile.
            switch(False)
            os.kill(pid, signal.SIGKILL)
            has_ended = _wait(pid)
            switch(False)
        if waiting:
            yield waiting.pop(0), STALLED if has_ended else STUCK


def _child(
    cases: dict[str, Case],
    tests: Sequence[str],
    writing: int,
    switch: Callable[[bool], None],
    call: Callable[[Case, str], str],
) -> None:
    os.setpgid(0, 0)
    try:
        for test in tests:
            name, memory = split(test)
            switch(True)
            outcome = call(cases[name], memory)
            switch(False)
            os.write(writing, f"{outcome}\n".encode())
    finally:
        os._exit(0)


def _limit_s(cases: dict[str, Case], waiting: Sequence[str]) -> float:
    """Return for how long the running test may print nothing."""
    budget_s = cases[split(waiting[0])[0]].budget_s if waiting else DEFAULT_BUDGET_S
    return budget_s * SCALE if budget_s > DEFAULT_BUDGET_S else STALL_S


def _lines(fd: int, limit_s: Callable[[], float]) -> Iterator[str]:
    """Yield lines until the other end closes, or prints nothing for the current limit."""
    data = b""
    while select.select([fd], [], [], limit_s())[0]:
        # Byte by byte, so that each line ends before the next limit is computed.
        part = os.read(fd, 1)
        if not part:
            return
        if part == b"\n":
            yield data.decode(errors="replace")
            data = b""
        else:
            data += part


def _wait(pid: int) -> bool:
    """Wait for a killed child, but not for one that the kernel holds; return whether it is gone."""
    deadline = time.monotonic() + 5 * SCALE
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    return False
