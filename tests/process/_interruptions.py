"""Calls interrupted everywhere: a signal handler's exception must leave nothing behind.

A scenario is a function that arms a part of its body. `sweep` runs it once for each place in pyuffd
that the armed part passes, each time in a fork, and raises an exception there:

- "lines": before each line, as a trace function sees them;
- "checks": where CPython itself checks for signals, between two instructions: after a call of a C
  function, at the start of a function and at the end of a loop's pass. This finds the place between
  the return of a C function and the store of its result, which are on the same line.

`pester` does the same with real signals, at random instants. Afterwards the process must have what
it had before: descriptors, mappings, threads, children, file names.

"lines" leaves out four places. No signal handler runs at three of them. At the end of a `with`
block its line is passed again, and an exception there would leave a lock held. An exception that
replaces another one as it leaves the block makes CPython lose count of references (3.11 to 3.13).
And a line without an instruction (`try:`) is outside of the blocks around it. At the jump back of a
comprehension CPython 3.13 does not leave the `with` block around it if a trace function raises; a
signal handler's exception does leave it, and "checks" has that place too.
"""

from __future__ import annotations

import contextlib
import dis
import faulthandler
import gc
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

import psutil

import pyuffd
from pyuffd import _left
from pyuffd.testing import _leaks

PACKAGE = str(Path(pyuffd.__file__).parent)
SETTLE_S = 5.0
# A scenario that takes longer hangs; the watchdog ends it, whichever thread holds the GIL.
LIMIT_S = 40
SHARED = "/memfd:"
# The allocator maps anonymous memory too; the mappings of scenarios are larger.
LARGE = 1 << 40
# Powers of ten, in seconds: from a microsecond to the time that a helper process takes to start.
# Some runs end before the signal.
EXPONENTS = -6.0, -0.3
AGAIN_US = 20

# Instructions before which no exception is raised in "lines".
LEFT_OUT = {"PUSH_EXC_INFO", "NOP", "JUMP_BACKWARD"}

How = Literal["lines", "checks"]
Scenario = Callable[["Interrupter"], None]


class Injected(BaseException):
    """The exception of a signal handler."""


class Interrupter:
    """Interrupts the armed part of a scenario."""

    place = ""

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Interrupt the calls inside the block, which catches the exception."""
        try:
            self.on()
            try:
                yield
            finally:
                self.off()
        except Injected:
            pass

    def on(self) -> None:
        """Begin."""

    def off(self) -> None:
        """End."""


class Tracer(Interrupter):
    """Raises at the places with these numbers, counted from 1; without numbers it only counts."""

    def __init__(self, at: Iterable[int], how: How) -> None:
        self.at = set(at)
        self.seen = 0
        self._how = how
        self._after_call: dict[FrameType, int | None] = {}  # the place of the C call, if any

    def on(self) -> None:
        """Begin to trace."""
        sys.settrace(self._enter)

    def off(self) -> None:
        """End tracing."""
        sys.settrace(None)
        self._after_call.clear()

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        caller = frame.f_back
        if caller in self._after_call and _is_plain(frame.f_code):
            self._after_call[caller] = None
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = self._how == "checks"
        return self._line if self._how == "lines" else self._instruction

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        left_out = _instruction(frame) in LEFT_OUT or _leaves_with(frame)
        if event == "line" and not left_out:
            self._pass(frame)
        return self._line

    def _instruction(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            name = _instruction(frame)
            call = self._after_call.pop(frame, None)
            if name.startswith("CALL"):
                self._after_call[frame] = frame.f_lasti
            # An exception here is handled as one at the call, unless a block ends in between.
            after_call = call is not None and _handler(frame, call) == _handler(frame)
            if after_call or name.startswith(("RESUME", "JUMP_BACKWARD")):
                self._pass(frame)
        elif event == "return":
            self._after_call.pop(frame, None)
        return self._instruction

    def _pass(self, frame: FrameType) -> None:
        self.seen += 1
        if self.seen in self.at:
            place = f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}"
            self.place += f"[{place} in {frame.f_code.co_name}]"
            self._after_call.clear()  # frames keep their objects alive
            raise Injected(self.place)


def _instruction(frame: FrameType) -> str:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]]


def _leaves_with(frame: FrameType) -> bool:
    """Return whether a frame passes the line of a `with` again because it leaves the block."""
    return any(last < frame.f_lasti for last in _entered(frame.f_code).get(frame.f_lineno, ()))


@cache
def _entered(code: CodeType) -> dict[int, list[int]]:
    """Return where the `with` statements of each line enter their blocks."""
    found: dict[int, list[int]] = {}
    line = 0
    for one in dis.get_instructions(code):
        line = one.positions.lineno or line if one.positions else line
        if one.opname in ("BEFORE_WITH", "LOAD_SPECIAL"):
            found.setdefault(line, []).append(one.offset)
    return found


def _handler(frame: FrameType, at: int | None = None) -> int | None:
    """Return where a frame continues after an exception, here or at another instruction."""
    offset = frame.f_lasti if at is None else at
    table: Any = getattr(dis, "_parse_exception_table")(frame.f_code)  # noqa: B009
    return next((one.target for one in table if one.start <= offset < one.end), None)


def _is_plain(code: CodeType) -> bool:
    """Whether calling it is not a C call: signals are not checked when it returns."""
    generator = 0x20  # CO_GENERATOR
    return code.co_name != "__init__" and not code.co_flags & generator


class Timer(Interrupter):
    """Raises from a signal handler at a random instant, inside a call of pyuffd."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._is_on = False
        signal.signal(signal.SIGALRM, self._handle)

    def on(self) -> None:
        """Start the timer."""
        self.place = ""
        self._is_on = True
        signal.setitimer(signal.ITIMER_REAL, 10 ** self._chance.uniform(*EXPONENTS))

    def off(self) -> None:
        """Stop it."""
        self._is_on = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_on:
            return
        if not _is_inside(frame):  # between two calls: the scenario keeps their results
            signal.setitimer(signal.ITIMER_REAL, AGAIN_US / 1e6)
            return
        self._is_on = False
        self.place = "".join(traceback.format_stack(frame, limit=6))
        raise Injected


def _is_inside(frame: FrameType | None) -> bool:
    """Whether the scenario is inside a call of pyuffd."""
    while frame is not None and frame.f_code.co_filename != __file__:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


def places(scenario: Scenario, how: How) -> int:
    """Return how many places the armed part of a scenario passes."""
    number, verdict = _in_fork(lambda: _count(scenario, how))
    assert not verdict, verdict
    return int(number)


def _count(scenario: Scenario, how: How) -> tuple[str, str]:
    _prepare(scenario, how)
    tracer = Tracer((), how)
    scenario(tracer)
    return str(tracer.seen), ""


def _prepare(scenario: Scenario, how: How) -> None:
    """Run a scenario once: from 3.12 on, CPython traces instructions from the second call on."""
    if how == "checks" and sys.version_info >= (3, 12):
        scenario(Tracer((), how))


def sweep(scenario: Scenario, how: How, numbers: Iterable[int], twice: int = 0) -> list[str]:
    """Interrupt a scenario at the places of these numbers; return what went wrong.

    `twice`: raise again this many places later, while the first exception propagates.
    """
    wrong = []
    for number in numbers:
        at = (number, number + twice)
        place, verdict = _in_fork(partial(_once_at, scenario, at, how))
        if verdict:
            wrong.append(f"{how} {at} ({place or 'nowhere'}): {verdict}")
    return wrong


def _once_at(scenario: Scenario, at: Iterable[int], how: How) -> tuple[str, str]:
    _prepare(scenario, how)
    return _once(scenario, Tracer(at, how))


def pester(scenario: Scenario, seed: int, runs: int) -> list[str]:
    """Interrupt a scenario at random instants, always in the same fork."""

    def repeat() -> tuple[str, str]:
        timer = Timer(random.Random(seed))
        scenario(Interrupter())  # run it once for what is kept: imports, caches
        for run in range(runs):
            faulthandler.dump_traceback_later(LIMIT_S, exit=True)
            place, verdict = _once(scenario, timer)
            if verdict:
                return f"run {run} of seed {seed}:\n{place}", verdict
        return "", ""

    place, verdict = _in_fork(repeat)
    return [f"{place}{verdict}"] if verdict else []


def _in_fork(function: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """Run a function in a fork; return its result, or a sentence on how it ended."""
    with tempfile.TemporaryFile() as errors:
        read_fd, write_fd = os.pipe()
        # The fork lacks the watchdog's thread, and would wait for it before starting its own.
        faulthandler.cancel_dump_traceback_later()
        pid = os.fork()
        if pid == 0:
            os.close(read_fd)
            os.dup2(errors.fileno(), 2)
            faulthandler.dump_traceback_later(LIMIT_S, exit=True)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ResourceWarning)
                    answer = function()
            except BaseException:
                answer = "", traceback.format_exc()
            finally:
                with open(write_fd, "w", errors="replace") as pipe:
                    pipe.write("\n\0".join(answer))
                os._exit(0)
        os.close(write_fd)
        with open(read_fd, errors="replace") as pipe:
            place, _, verdict = pipe.read().partition("\n\0")
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if status:
        verdict = f"ended with {status}; {verdict}\n{said}"
    elif "AttributeError" in said:  # in __del__ of a half-initialised object
        verdict += said
    return place, verdict


def _once(scenario: Scenario, interrupter: Interrupter) -> tuple[str, str]:
    before = _held()
    problem = ""
    try:
        scenario(interrupter)
    except BaseException:
        problem = traceback.format_exc()
    give_up = time.monotonic() + SETTLE_S
    while (now := _held()) - before or _owned(before) - now:
        gc.collect()
        _left.tidy()  # as whoever uses a userfaultfd next: a thread may have ended since
        if time.monotonic() > give_up:
            gone = _owned(before) - now
            problem += f"left behind: {now - before or 'nothing'}, gone: {gone or 'nothing'}"
            break
        time.sleep(0.005)
    return interrupter.place, problem


def _owned(held: set[str]) -> set[str]:
    """Leave out threads and processes that end by themselves, and may be about to."""
    return {name for name in held if not name.startswith(("thread ", "process "))}


def _held() -> set[str]:
    held = {name for look in (_leaks._fds, _leaks._threads, _leaks._processes) for name in look()}
    # Not smaps, which walks the page tables and would dominate the run time.
    held |= {line for line in Path("/proc/self/maps").read_text().splitlines() if SHARED in line}
    held |= {f"name {path}" for folder in FOLDERS for path in Path(folder).glob(f"*{MARK}*")}
    address_space = psutil.Process().memory_info().vms
    held.add(f"{address_space // LARGE} TiB of address space")
    return held


# Scenarios put this in the names of their files, so that leftovers are found.
MARK = f"pyuffd-interrupted-{os.getpid()}"
FOLDERS = ("/dev/shm", tempfile.gettempdir())


def main(scenarios: dict[str, Scenario]) -> None:
    """Sweep the scenario of the command line, and print what went wrong."""
    name, how, *rest = sys.argv[1:]
    if how == "signals":
        wrong = pester(scenarios[name], random.randrange(1 << 32), int(rest[0]))
    else:
        kind: How = "checks" if how == "checks" else "lines"
        numbers = range(*map(int, rest)) if rest else range(1, places(scenarios[name], kind) + 1)
        print(f"{name}: {how} {numbers}")
        wrong = sweep(scenarios[name], kind, numbers)
    print("\n".join(wrong), flush=True)
    sys.exit(bool(wrong))
