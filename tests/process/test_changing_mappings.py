"""Images of a program that maps, unmaps, drops and protects memory all the time.

Each is of one instant, and has no old content.

PYUFFD_SEED is the program's seed, PYUFFD_SOAK_S the seconds of the long run.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from pyuffd import Process, RunState, Snapshot, SnapshotError, StopTimeoutError, write_core
from pyuffd.snapshot._capture import Used
from tests.process import _mapper
from tests.process._core import Core
from tests.process._mapper import Mapper
from tests.process._tracking import OF_OTHERS

pytestmark = OF_OTHERS
LIMIT_S = 5.0
IMAGES = 6
SOAK_S = float(os.environ.get("PYUFFD_SOAK_S", "60"))
METHODS: tuple[Used, ...] = ("precopy", "cow", "stopped")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _mapper.compiled(tmp_path_factory.mktemp("mapper"))


@pytest.fixture
def target(program: str, tmp_path: Path) -> Iterator[Mapper]:
    seed = int(os.environ.get("PYUFFD_SEED", random.randrange(1 << 31)))
    print("seed", seed)
    with Mapper(program, seed, tmp_path) as mapper:
        yield mapper


def snapshot(process: Process, target: Mapper, method: Used, path: Path) -> int:
    Snapshot.take(process, path, method=method, shared="pause", max_stall_s=LIMIT_S, durable=False)
    with Snapshot.open(path) as taken:
        compared = target.check(taken.read, lambda at: taken.state(at) is RunState.LOST)
    shutil.rmtree(path)
    return compared


def core(process: Process, target: Mapper, method: Used, path: Path) -> int:
    done = write_core(process, path, method=method, full=True, max_stall_s=LIMIT_S)
    lost = [(each.start, each.end) for each in done.lost]
    with Core(path) as file:

        def read(address: int, length: int) -> bytes:
            content = file.read(address, length)
            return bytes(length) if content is None else content  # as debuggers read it

        compared = target.check(read, lambda at: any(start <= at < end for start, end in lost))
    path.unlink()
    return compared


TAKE = {"snapshot": snapshot, "core": core}


def images(target: Mapper, method: Used, what: str, folder: Path) -> Generator[int]:
    """Take and check images; yield how many pages of each were compared."""
    with Process(target.pid) as process:
        for number in itertools.count():
            # A busy machine may not let it get ahead of the program, or stop it in time.
            with suppress(SnapshotError, StopTimeoutError):
                yield TAKE[what](process, target, method, folder / f"{what}{number}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", TAKE)
def test_images(target: Mapper, what: str, method: Used, tmp_path: Path) -> None:
    with closing(images(target, method, what, tmp_path)) as taken:
        compared = sum(itertools.islice(taken, IMAGES))
    assert compared > IMAGES * 100


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
