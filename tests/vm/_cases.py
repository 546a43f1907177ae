"""In a guest: cases of the conformance suite one after the other, without pytest.

Under emulation pytest costs several times what most cases do. A case that stalls, or that takes its
process with it, ends that process only; the next one runs in a new one.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from pyuffd.conformance._case import DEFAULT_BUDGET_S, Case, load
from pyuffd.conformance._context import Context
from pyuffd.conformance.plugin import check_needs
from pyuffd.testing._need import Lack
from pyuffd.testing._run import SCALE

# Most cases are over within milliseconds. One that waits in vain gives up by itself before this.
# Long ones have budgets of their own.
STALL_S = 15.0 * SCALE
PASSED, SKIPPED, STALLED = "", "skipped", "stalled"
# It stalled, and cannot be killed.
STUCK = "stuck"


def split(test: str) -> tuple[str, str]:
    """Return the case and the memory type of an id."""
    name, _, memory = test.rpartition(".")
    return name, memory


def run(case: Case, memory: str) -> str:
    """Run one case here; return PASSED, SKIPPED, or what was wrong, in one line."""
    context = None
    try:
        check_needs(case, memory)
        context = Context(case, memory)
        case.run(context)
        for monitor in context._monitors:
            monitor.stop()
    except Lack:
        return SKIPPED
    except BaseException as error:
        return (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    finally:
        if context is not None:
            context.close()
    return PASSED


def outcomes(
    tests: Sequence[str], switch: Callable[[bool], None] = lambda is_on: None
) -> Generator[tuple[str, str], None, None]:
    """Run tests by id in a child; yield each with its outcome, as it comes.

    Args:
        tests: Their ids.
        switch: Called with True before and False after each, and with False in the end.
    """
    cases = load()
    waiting = list(tests)
    while waiting:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reading)
            _child(cases, waiting, writing, switch)
        os.close(writing)
        try:
            for line in _lines(reading, lambda: _limit_s(cases, waiting)):
                yield waiting.pop(0), line
        finally:
            os.close(reading)
            # Before it is killed, for what a mutant holds, and after, for what it did meanwhile.
            switch(False)
            os.kill(pid, signal.SIGKILL)
            has_ended = _wait(pid)
            switch(False)
        if waiting:
            yield waiting.pop(0), STALLED if has_ended else STUCK


def _child(
    cases: dict[str, Case], tests: Sequence[str], writing: int, switch: Callable[[bool], None]
) -> None:
    os.setpgid(0, 0)
    try:
        for test in tests:
            name, memory = split(test)
            switch(True)
            outcome = run(cases[name], memory)
            switch(False)
            os.write(writing, f"{outcome[:300]}\n".encode())
    finally:
        os._exit(0)


def _limit_s(cases: dict[str, Case], waiting: Sequence[str]) -> float:
    """Return how long the test that is running may say nothing."""
    budget_s = cases[split(waiting[0])[0]].budget_s if waiting else DEFAULT_BUDGET_S
    return budget_s * SCALE if budget_s > DEFAULT_BUDGET_S else STALL_S


def _lines(fd: int, limit_s: Callable[[], float]) -> Iterator[str]:
    """Yield lines until the other end closes, or says nothing for as long as may be now."""
    data = b""
    while select.select([fd], [], [], limit_s())[0]:
        # One at a time, so that the next one's limit is asked for.
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
