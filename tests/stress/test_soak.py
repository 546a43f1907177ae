"""Threads and processes that use three regions in all ways at once, checked against a model.

Every page belongs to one worker at a time, whose model tells what it must find there. A worker
reads, writes, drops, punches, moves and forks its pages; all the workers share the regions, the
userfaultfd and the handler. PYUFFD_SEED sets the seed, PYUFFD_SOAK_S the seconds.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    PageSource,
    Region,
    RegisterMode,
    Userfaultfd,
    _memory,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests.kernel._faults import fork
from tests.kernel._serving import open_fds, thread_names, wait_until
from tests.process._pitfalls import BOTH, EVENTS, Driver

SEED = int(os.environ.get("PYUFFD_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
SOAK_S = float(os.environ.get("PYUFFD_SOAK_S", "60"))
# `make test` has time for this much.
SHORT_S = 2.5

PAGE = os.sysconf("SC_PAGE_SIZE")
SLOTS = 6  # workers: four threads and two processes
RUN = 8  # pages that a worker has of each region
PAGES = SLOTS * RUN
THREADS, CHILDREN = 4, 2
MAYMOVE, FIXED = 1, 2
STALLED_S = 10.0  # a worker that does no step in this time has stalled

ZEROS = bytes(PAGE)


def pattern(region: int, page: int) -> bytes:
    """Return the content of a page, as its source has it."""
    return bytes([1 + (region * 83 + page) % 255]) * PAGE


@dataclass
class Piece:
    """A worker's pages of one region: where they are, and what they must hold."""

    start: int
    shared: bool
    model: list[bytes]

    def view(self) -> Region:
        return Region.at(self.start, len(self.model) * PAGE, PAGE)


class Worker:
    """Does random steps to its pages, one after the other."""

    def __init__(self, pieces: list[Piece], chance: random.Random, depth: int) -> None:
        self.pieces = pieces
        self.chance = chance
        self.depth = depth  # how many generations of forks it may have
        self.steps = 0
        self.did: dict[str, int] = {}
        self.doing = "nothing"

    def run(self, until: float) -> None:
        actions = [self.read] * 6 + [self.write] * 5 + [self.drop, self.punch] * 2
        actions += [self.move, self.move, self.split]
        if self.depth:
            actions.append(self.fork)
        while time.monotonic() < until:
            action = self.chance.choice(actions)
            self.doing = action.__name__
            action()
            self.did[self.doing] = self.did.get(self.doing, 0) + 1
            self.steps += 1

    def pick(self) -> tuple[Piece, int]:
        return self.chance.choice(self.pieces), self.chance.randrange(RUN)

    def check(self, piece: Piece, index: int) -> None:
        at = piece.start + index * PAGE
        found = _memory.read(at, PAGE)
        assert found == piece.model[index], (
            f"page {index} at {at:#x}: {found[:8]!r} and not {piece.model[index][:8]!r}"
            f" (shared: {piece.shared}, step {self.steps})"
        )

    def read(self) -> None:
        self.check(*self.pick())

    def write(self) -> None:
        piece, index = self.pick()
        at, data = self.chance.randrange(PAGE - 8), self.chance.randbytes(8)
        _memory.write(piece.start + index * PAGE + at, data)
        old = piece.model[index]
        piece.model[index] = old[:at] + data + old[at + 8 :]

    def drop(self) -> None:
        """MADV_DONTNEED of private pages; shared ones keep their page cache: the content stays."""
        piece, index = self.pick()
        count = self.chance.randrange(1, RUN - index + 1)
        if piece.shared:
            # Fill them first: the engine calls them removed, so absent ones would be zeros.
            for page in range(index, index + count):
                self.check(piece, page)
        _memory.madvise(piece.start + index * PAGE, count * PAGE, mmap.MADV_DONTNEED)
        if not piece.shared:
            piece.model[index : index + count] = [ZEROS] * count

    def punch(self) -> None:
        piece, index = self.pick()
        advice = mmap.MADV_REMOVE if piece.shared else mmap.MADV_DONTNEED
        _memory.madvise(piece.start + index * PAGE, PAGE, advice)
        piece.model[index] = ZEROS

    def move(self) -> None:
        """Move a piece to new addresses, replacing the mapping there."""
        piece = self.chance.choice(self.pieces)
        length = RUN * PAGE
        to = _memory.mmap(length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        piece.start = _memory.mremap(piece.start, length, length, MAYMOVE | FIXED, to)

    def split(self) -> None:
        """Split a mapping in two, and join the parts again."""
        piece, index = self.pick()
        at = piece.start + index * PAGE
        # A private mapping gets its anon_vma with its first page. If it is split before that,
        # faults and prefetching may give its parts one each. Then they never join again, and
        # mremap() fails with EFAULT, since it moves one mapping at a time.
        self.check(piece, (index + 1) % RUN)
        _memory.mprotect(at, PAGE, mmap.PROT_READ)
        self.check(piece, index)
        _memory.mprotect(at, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)

    def fork(self) -> None:
        """A fork checks its pages, reads shared ones, and changes private ones, its own copies."""
        pid = fork()
        if pid == 0:
            status = 1
            try:
                child = Worker(
                    [piece for piece in self.pieces if not piece.shared],
                    random.Random(self.chance.random()),
                    self.depth - 1,
                )
                for piece in self.pieces:
                    self.check(piece, self.chance.randrange(RUN))
                child.run(time.monotonic() + self.chance.choice([0, 0, 0.01, 0.05]))
                status = 0
            except BaseException as error:
                os.write(2, f"in a fork: {error!r}\n".encode())
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def run_process(worker: Worker, until: float, seed: int) -> int:
    """Run a worker in a fork; return its pid."""
    pid = fork()
    if pid == 0:
        status = 1
        try:
            worker.chance.seed(seed)
            worker.run(until)
            status = 0
        except BaseException as error:
            os.write(2, f"in a process: {worker.doing}: {error!r}\n".encode())
        finally:
            os._exit(status)
    return pid


# Anonymous, shared and private memory.
FLAGS = (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.MAP_SHARED, mmap.MAP_PRIVATE)


def mapped(flags: int) -> Region:
    """Map memory until the process ends, since workers reuse its addresses."""
    fd = -1
    if not flags & mmap.MAP_ANONYMOUS:
        fd = os.memfd_create("soak")
        os.ftruncate(fd, PAGES * PAGE)
    start = _memory.mmap(PAGES * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd)
    if fd >= 0:
        os.close(fd)
    return Region.at(start, PAGES * PAGE, PAGE)


@contextlib.contextmanager
def three_regions(driver: Driver, handler: Handler) -> Iterator[list[Region]]:
    """Anonymous memory from a buffer, shared memory from a file, private memory from Python."""
    with contextlib.ExitStack() as stack:
        regions = [mapped(flags) for flags in FLAGS]
        content = [b"".join(pattern(number, page) for page in range(PAGES)) for number in range(3)]
        file = os.memfd_create("source")
        stack.callback(os.close, file)
        os.write(file, content[1])

        def fetch(offset: int, length: int) -> bytes:
            return content[2][offset : offset + length]

        last: PageSource = BufferSource(content[2])
        if driver == "thread":
            last = CallableSource(fetch)
        sources: list[PageSource] = [
            BufferSource(content[0]),
            stack.enter_context(FileSource(file)),
            last,
        ]
        modes = [RegisterMode.MISSING | RegisterMode.WP, RegisterMode.MISSING, RegisterMode.MISSING]
        for region, source, mode in zip(regions, sources, modes, strict=True):
            handler.serve(region, source, mode=mode)
        yield regions


def soak(driver: Driver, seconds: float, seed: int) -> dict[str, int]:
    """Run the workers for some time; return how often each kind of step was done."""
    print("seed", seed, flush=True)
    fds = open_fds()
    did: dict[str, int] = {}
    options = {"workers": 2} if driver == "thread" else {"prefetch": 3 * PAGE}
    features = EVENTS | Feature.PAGEFAULT_FLAG_WP
    with (
        Userfaultfd(features=features) as uffd,
        contextlib.ExitStack() as stack,
        Handler(uffd, driver=driver, **options) as handler,  # type: ignore[arg-type]
    ):
        regions = stack.enter_context(three_regions(driver, handler))
        handler.start()

        def worker(slot: int) -> Worker:
            first = slot * RUN
            pieces = [
                Piece(
                    region.start + first * PAGE,
                    FLAGS[number] == mmap.MAP_SHARED,
                    [pattern(number, first + page) for page in range(RUN)],
                )
                for number, region in enumerate(regions)
            ]
            return Worker(pieces, random.Random(seed * 100 + slot), depth=2)

        until = time.monotonic() + seconds
        pids = [
            run_process(worker(THREADS + number), until, seed * 100 + 50 + number)
            for number in range(CHILDREN)
        ]
        workers = [worker(slot) for slot in range(THREADS)]
        watch_threads(workers, until)
        for pid in pids:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert status == 0, f"a process ended with {status}"
        for one in workers:
            for piece in one.pieces:
                for index in range(RUN):
                    one.check(piece, index)
            for name, count in one.did.items():
                did[name] = did.get(name, 0) + count
        wait_until(lambda: handler.spaces == 1, "the forks are forgotten")
        stats = handler.stats()
        assert (stats.failed, stats.unserved, stats.poisoned_pages) == (0, 0, 0)
        handler.stop()
    wait_until(lambda: open_fds() == fds, "no descriptor is left")
    wait_until(lambda: not any(name.startswith("uffd-") for name in thread_names()), "no thread")
    did |= {"forks followed": stats.forks, "faults": sum(stats.faults.values())}
    did |= {"layout events": stats.layout_events, "deferred": stats.deferred}
    print(did, flush=True)
    return did


def watch_threads(workers: list[Worker], until: float) -> None:
    """Run the workers in threads; fail when one makes no more steps."""
    errors: list[BaseException] = []

    def run(worker: Worker) -> None:
        try:
            worker.run(until)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    steps, since = [-1] * len(workers), [time.monotonic()] * len(workers)
    while not errors and any(thread.is_alive() for thread in threads):
        now = time.monotonic()
        for index, worker in enumerate(workers):
            if worker.steps != steps[index] or not threads[index].is_alive():
                steps[index], since[index] = worker.steps, now
            stalled_s = now - since[index]
            assert stalled_s < STALLED_S, f"stalled for {stalled_s:.0f} s in {worker.doing}"
        threads[0].join(0.05)
        time.sleep(0.01)  # how often to look
    if errors:
        raise errors[0]


def check_short(driver: Driver, seed: int) -> dict[str, int]:
    return soak(driver, SHORT_S, seed)


def run(function: Callable[[Driver, int], object], driver: Driver, seconds: float) -> None:
    found = run_child(function, driver, SEED, budget_s=seconds + 30).value
    assert all(found[name] for name in ("read", "write", "drop", "punch", "move", "split", "fork"))


def check_long(driver: Driver, seed: int) -> dict[str, int]:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return soak(driver, SOAK_S / 2, seed)


@needs(EVENTS)
@pytest.mark.parametrize("driver", BOTH)
def test_short_soak(driver: Driver) -> None:
    """A seed's first seconds, in every run of the tests."""
    run(check_short, driver, SHORT_S)


@needs(EVENTS)
@pytest.mark.stress
@pytest.mark.parametrize("driver", BOTH)
def test_soak(driver: Driver) -> None:
    """As long as PYUFFD_SOAK_S says, half of it for each driver."""
    run(check_long, driver, SOAK_S / 2)
