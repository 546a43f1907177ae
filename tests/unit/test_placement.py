"""The search for a CPU of the native thread: when it tries one, and when it gives that up.

It runs on a machine that the test makes up (tests/unit/placement.c), so nothing depends on how
busy this one is.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
WRAPPED = (
    *("clock_gettime", "sched_getcpu", "sched_getaffinity", "sched_setaffinity"),
    *("sysconf", "open"),
)
SPIN_NS = 50_000  # a longer gap is the end of a quick succession: the thread sleeps
QUICK_NS = 10_000
LATE_NS = 1_000_001
FIRST = 128  # quick faults before a trial
TRIAL = 24  # the most faults of one
CPUS = 4


class State(NamedTuple):
    """A trial's former CPU or -1, the CPU it stays on or -1, faults between trials, moves."""

    trial: int
    cpu: int
    interval: int
    moves: int


class Machine:
    """The program; `faults` makes faults come with equal gaps."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def _ask(self, word: str, first: int = 0, second: int = 0, count: int = 0) -> State:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word} {first} {second} {count}\n")
        self._process.stdin.flush()
        return State(*map(int, self._process.stdout.readline().split()))

    def faults(self, count: int, gap_ns: int = QUICK_NS) -> State:
        return self._ask("faults", gap_ns, SPIN_NS, count)

    def runnable(self, threads: int) -> State:
        return self._ask("runnable", threads)

    def waited(self, delay_ns: int) -> State:
        """The thread has been runnable for so long without a CPU."""
        return self._ask("delay", delay_ns)

    def sleep(self) -> State:
        return self._ask("sleep")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler; neither cc nor gcc is there")
    target = str(tmp_path_factory.mktemp("placement") / "placement")
    sources = ["tests/unit/placement.c", "csrc/engine/placement.c", "csrc/base/clock.c"]
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    subprocess.run(
        [compiler, "-std=gnu11", "-Icsrc", *wraps, "-o", target, *sources], check=True, cwd=ROOT
    )
    return target


@contextmanager
def running(program: str) -> Iterator[Machine]:
    with subprocess.Popen(
        [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Machine(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def machine(program: str) -> Iterator[Machine]:
    with running(program) as made:
        yield made


def test_a_trial_ends_after_so_many_faults(machine: Machine) -> None:
    """Each takes no longer than the thread spins: a trial lasts 1.2 ms at most."""
    assert machine.faults(FIRST - 1) == (-1, -1, FIRST, 0)
    assert machine.faults(1)[0] == 0
    assert machine.faults(TRIAL - 1)[0] == 0
    assert machine.faults(1)[:3] == (-1, -1, 2 * FIRST)
    assert TRIAL * SPIN_NS <= 1_200_000


def test_a_late_fault_ends_a_trial(machine: Machine) -> None:
    machine.faults(FIRST + 1)
    assert machine.faults(1, LATE_NS)[:3] == (-1, -1, 8 * FIRST)
    # Such a machine is left alone for so many faults.
    moves = machine.faults(8 * FIRST - 1).moves
    assert machine.faults(0).moves == moves
    assert machine.faults(1)[0] >= 0


def test_a_pause_ends_a_trial(machine: Machine) -> None:
    machine.faults(FIRST + 1)
    assert machine.sleep()[:3] == (-1, -1, 2 * FIRST)


def test_a_better_cpu_is_kept(machine: Machine) -> None:
    machine.faults(FIRST)
    kept = machine.faults(TRIAL, QUICK_NS // 2)
    assert (kept.trial, kept.interval) == (-1, FIRST)
    assert kept.cpu == 1
    # Until a fault is late, or the succession ends.
    assert machine.faults(1, LATE_NS).cpu == -1


@pytest.mark.parametrize("threads", [CPUS + 1, 3 * CPUS])
def test_no_trial_while_threads_wait_for_cpus(machine: Machine, threads: int) -> None:
    """With 2 CPUs and 2 or 6 busy threads beside: nothing is tried, and no call is made."""
    machine.runnable(threads)
    assert machine.faults(1_000 * FIRST) == (-1, -1, FIRST, 0)
    machine.runnable(1)
    assert machine.faults(FIRST).trial == 0


def test_no_trial_for_a_thread_that_waited(machine: Machine) -> None:
    """A sixteenth of the time in the run queue is contention, whatever the load is."""
    machine.waited(FIRST * QUICK_NS // 10)
    assert machine.faults(FIRST) == (-1, -1, FIRST, 0)
    assert machine.faults(FIRST).trial == 0


def test_a_kept_cpu_is_left_when_threads_wait(machine: Machine) -> None:
    machine.faults(FIRST)
    assert machine.faults(TRIAL, QUICK_NS // 2).cpu == 1
    machine.runnable(CPUS + 1)
    assert machine.faults(FIRST)[:2] == (-1, -1)


def test_trials_get_rare(machine: Machine) -> None:
    """Each costs two or three moves; where none helps there are few of them."""
    assert machine.faults(1_000_000).moves <= 3 * 13  # twice as rare each time: 2**13 * FIRST
