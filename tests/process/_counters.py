"""A program whose memory shows the instant of an image, and a check of such images."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests._memory import PAGE

MOVED_PAGES = 64
POLL_S = 0.001  # asking without a pause would take the CPU that the program needs
Read = Callable[[int, int], bytes]


def compiled(folder: Path) -> str:
    """Compile counters.c."""
    program = folder / "counters"
    source = Path(__file__).parent / "counters.c"
    subprocess.run(["cc", "-O2", "-pthread", "-o", program, source], check=True)
    return str(program)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The compiled program, for modules that import this."""
    return compiled(tmp_path_factory.mktemp("counters"))


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A descriptor of a file that did not exist."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


class Counters:
    """The running program."""

    def __init__(self, program: str, threads: int, pages: int, how: str = "") -> None:
        self.popen = subprocess.Popen(
            [program, str(threads), str(pages), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self.popen.stdout is not None
        word, *addresses = self.popen.stdout.readline().split()
        assert word == b"ready"
        *self.areas, self.moved, self.other = (int(address, 16) for address in addresses)
        self.pid = self.popen.pid
        self.pages = pages
        self.how = how

    def rounds(self) -> int:
        """Ask it how many rounds it has done; fails if it does not run."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(b"\n")
        return int(self.popen.stdout.readline())

    def works_on(self) -> None:
        """Wait until every thread has done two more rounds: none is blocked or lost."""
        before = self.rounds()
        while self.rounds() < before + 2:
            assert self.popen.poll() is None
            time.sleep(POLL_S)

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()

    def check(self, read: Read, lost: Callable[[int], bool] = lambda address: False) -> None:
        """Check an image of one instant: one boundary per thread at most, causes before effects."""
        firsts: list[int | None] = []
        words = []
        for area in self.areas:
            both = np.frombuffer(read(area, self.pages * PAGE), "<u8").reshape(self.pages, -1)
            known = [not lost(area + index * PAGE) for index in range(self.pages)]
            counted = both[:, 0].astype(np.int64)
            if "d" in self.how:  # one page may have been dropped just before
                dropped = (both[:, 0] == 0) & (both[:, 1] == 0)
                assert dropped.sum() <= 1
                known = [
                    is_known and not gone for is_known, gone in zip(known, dropped, strict=True)
                ]
            words.append((both[:, 1], known))
            steps = np.diff(counted[known])
            assert set(steps.tolist()) <= {0, -1}, (hex(area), counted.tolist())
            assert int(counted[known][0]) - int(counted[known][-1]) <= 1, counted.tolist()
            firsts.append(int(counted[0]) if known[0] else None)
        for index, (seen, known) in enumerate(words):
            first = firsts[index - 1]
            if first is not None:
                assert int(seen[known].max()) <= first, f"thread {index} saw a later round"
        self.check_moved(read, lost)

    def check_moved(self, read: Read, lost: Callable[[int], bool]) -> None:
        """Check that the memory which is moved back and forth is complete at one of its places."""
        expected = [0x5EED + index for index in range(MOVED_PAGES)]
        found = []
        for address in (self.moved, self.other):
            try:
                data = read(address, MOVED_PAGES * PAGE)
            except LookupError:  # not mapped at the instant
                continue
            found.append(np.frombuffer(data, "<u8")[:: PAGE // 8].tolist())
        places = (
            at + index * PAGE for at in (self.moved, self.other) for index in range(MOVED_PAGES)
        )
        assert expected in found or any(lost(place) for place in places)


@contextmanager
def counters(program: str, threads: int, pages: int, how: str = "") -> Iterator[Counters]:
    """Run it for a while."""
    running = Counters(program, threads, pages, how)
    try:
        running.works_on()  # in the first round, pages are zeros as if they had been dropped
        yield running
    finally:
        running.close()
