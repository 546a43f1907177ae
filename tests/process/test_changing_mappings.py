"""Images of a program that maps, unmaps, moves, drops and protects memory all the time, and forks.

Each is of one instant, and has no old content.

PYUFFD_SEED is the program's seed, PYUFFD_SOAK_S the seconds of the long run.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, suppress
from operator import itemgetter
from pathlib import Path
from typing import Self

import pytest

from pyuffd import Process, RunState, Snapshot, SnapshotError, StopTimeoutError, write_core
from pyuffd.snapshot._capture import Used
from pyuffd.testing import huge_pages
from pyuffd.testing._run import SCALE
from tests._child import limit_s
from tests._memory import PAGE
from tests.process import _mapper
from tests.process._core import Core
from tests.process._mapper import Checked, Mapper
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
LIMIT_S = 5.0
IMAGES = 4
HUGE_PAGES = 4
SOAK_S = float(os.environ.get("PYUFFD_SOAK_S", "60"))
# The taker is stopped for so long, by a signal, and the program must not wait for it.
FROZEN_S = 1.5 * SCALE
STALL_S = 0.3 * SCALE
SLACK_S = 0.3 * SCALE
DELAYS = 3  # of the machine, that the program may wait for too
TAKES_S = 60.0
RATE = "4"  # MiB/s, so that it takes some time
METHODS: tuple[Used, ...] = ("precopy", "cow", "stopped")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _mapper.compiled(tmp_path_factory.mktemp("mapper"))


@pytest.fixture
def target(program: str, tmp_path: Path) -> Iterator[Mapper]:
    seed = int(os.environ.get("PYUFFD_SEED", random.randrange(1 << 31)))
    print("seed", seed)
    with huge_pages(2 * HUGE_PAGES), Mapper(program, seed, tmp_path, HUGE_PAGES) as mapper:
        yield mapper


def snapshot(process: Process, target: Mapper, method: Used, path: Path) -> Checked:
    Snapshot.take(process, path, method=method, shared="pause", max_stall_s=LIMIT_S, durable=False)
    with Snapshot.open(path) as taken:
        checked = target.check(taken.read, lambda at: taken.state(at) is RunState.LOST)
    shutil.rmtree(path)
    return checked


def core(process: Process, target: Mapper, method: Used, path: Path) -> Checked:
    done = write_core(process, path, method=method, full=True, max_stall_s=LIMIT_S)
    lost = {at for each in done.lost for at in range(each.start, each.end, PAGE)}
    with Core(path) as core, path.open("rb") as file:
        segments = sorted(
            (one["p_vaddr"], one["p_memsz"], one["p_filesz"], one["p_offset"]) for one in core.loads
        )

        def read(address: int, length: int) -> bytes:
            content = b""
            while len(content) < length:
                at = address + len(content)
                index = bisect_right(segments, at, key=itemgetter(0)) - 1
                start, size, in_file, offset = segments[index]
                assert at < start + size, f"{at:#x} is in no segment"
                count = min(length - len(content), size - (at - start))
                file.seek(offset + at - start)
                found = file.read(max(min(count, start + in_file - at), 0))
                content += found.ljust(count, b"\0")  # as debuggers read it
            return content

        checked = target.check(read, lost.__contains__)
    path.unlink()
    return checked


TAKE = {"snapshot": snapshot, "core": core}


def images(target: Mapper, method: Used, what: str, folder: Path) -> Generator[int]:
    """Take and check images; yield how many pages of each were compared."""
    with Process(target.pid) as process:
        for number in itertools.count():
            # A busy machine may not let it get ahead of the program, or stop it in time.
            with suppress(SnapshotError, StopTimeoutError):
                checked = TAKE[what](process, target, method, folder / f"{what}{number}")
                # Only what is given back before "cow" has saved it.
                assert method == "cow" or not checked.lost, checked.lost
                yield checked.compared


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", TAKE)
def test_images(target: Mapper, what: str, method: Used, tmp_path: Path) -> None:
    with closing(images(target, method, what, tmp_path)) as taken:
        compared = sum(itertools.islice(taken, IMAGES))
    assert compared > IMAGES * 100


class Delays:
    """How long a thread waits for a CPU of this machine, at most."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.is_set():
            begin = time.monotonic()
            time.sleep(0.001)
            self.longest_s = max(self.longest_s, time.monotonic() - begin)


def frozen_while_it_takes(target: Mapper, method: Used, path: Path, after_s: float) -> bool:
    """Stop who takes a snapshot for a while; return whether it got one, which is right."""
    words = ["snapshot", str(target.pid), "-o", str(path), "--method", method, "--shared", "skip"]
    words += ["--max-stall", str(STALL_S), "--rate", RATE, "--no-sync"]
    target.longest_s()
    with (
        Delays() as delays,
        subprocess.Popen(
            [sys.executable, "-m", "pyuffd", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as taker,
    ):
        try:
            time.sleep(after_s)
            taker.send_signal(signal.SIGSTOP)
            time.sleep(FROZEN_S)
            taker.send_signal(signal.SIGCONT)
            _, said = taker.communicate(timeout=limit_s(TAKES_S))
        finally:
            taker.kill()
    longest_s = target.longest_s()
    assert longest_s <= STALL_S + SLACK_S + DELAYS * delays.longest_s, (said, delays.longest_s)
    if taker.returncode:
        assert taker.returncode == 2, said
        assert not path.exists()
        return False
    with Snapshot.open(path) as taken:
        checked = target.check(
            taken.read, lambda at: taken.state(at) in (RunState.LOST, RunState.SHARED)
        )
    shutil.rmtree(path)
    assert checked.compared > 0
    return True


@pytest.mark.parametrize("method", METHODS)
def test_a_taker_that_is_stopped(target: Mapper, method: Used, tmp_path: Path) -> None:
    after_s = random.uniform(0.2, 1.0) * SCALE
    print("after", after_s)
    frozen_while_it_takes(target, method, tmp_path / "frozen", after_s)


@pytest.mark.stress
def test_a_taker_that_is_stopped_often(target: Mapper, tmp_path: Path) -> None:
    until = time.monotonic() + SOAK_S / 2
    taken = dict.fromkeys(METHODS, 0)
    for method in itertools.cycle(METHODS):
        after_s = random.uniform(0.2, 1.5) * SCALE
        print(method, "after", after_s)
        taken[method] += frozen_while_it_takes(target, method, tmp_path / "frozen", after_s)
        if time.monotonic() > until:
            break
    assert sum(taken.values()) > 0, taken


@pytest.mark.stress
@pytest.mark.parametrize("what", TAKE)
def test_many_images(target: Mapper, what: str, tmp_path: Path) -> None:
    until = time.monotonic() + SOAK_S / 2
    with ExitStack() as stack:
        each = [
            stack.enter_context(closing(images(target, method, what, tmp_path)))
            for method in METHODS
        ]
        while time.monotonic() < until:
            for taken in each:
                assert next(taken) > 0
