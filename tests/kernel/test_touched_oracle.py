"""Random serves and restores beside threads that touch the memory all the time.

Each call either refuses and leaves everything as it was, or all of the memory has the content of
its source, apart from the bytes that the threads have written. PYUFFD_SEED repeats a run.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from pyuffd import (
    Feature,
    FileSource,
    Handler,
    Region,
    RegisterMode,
    Snapshot,
    UffdError,
    Userfaultfd,
)
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._present import Present
from pyuffd.testing import needs
from tests._child import run_child
from tests._images import START, data, write
from tests._memory import PAGE, memory_of, memory_params
from tests.kernel._serving import AnyDriver, handler_of, run_threads
from tests.kernel.test_touched_while_served import SEED, source_of

EVERY: tuple[AnyDriver, ...] = ("native", "inline", "thread", "process")
PAGES, VALUE = 8, 7
# Where in a page the threads write, and what.
AT, MARK = 100, 0xEE
SECONDS = 1.5
TRACKING = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM


class Touchers:
    """Threads that read and write memory."""

    def __init__(self, regions: Sequence[Region], rng: random.Random) -> None:
        self._regions, self._ends = regions, threading.Event()
        self._delay = rng.choice((0, 0.002, 0.02))
        seeds = [rng.random() for _ in range(2)]
        self._threads = [threading.Thread(target=self._touch, args=(seed,)) for seed in seeds]
        self.errors: list[BaseException] = []

    def _touch(self, seed: float) -> None:
        rng = random.Random(seed)
        time.sleep(self._delay)
        try:
            while not self._ends.is_set():
                region = rng.choice(self._regions)
                at = rng.randrange(0, region.length, region.page_size) + AT
                if rng.random() < 0.7:
                    assert region.read(at, 1)[0] in (0, VALUE, MARK)
                else:
                    region.write(at, bytes([MARK]))
                if rng.random() < 0.1:
                    time.sleep(0.0003)
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> Touchers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()


def is_all(region: Region, value: int) -> bool:
    """Return whether all of it has a value, apart from what the threads write."""
    content = bytearray(region.read())
    for at in range(AT, len(content), region.page_size):
        if content[at] == MARK:
            content[at] = value
    return content == bytes([value]) * len(content)


@contextlib.contextmanager
def slowly(rng: random.Random) -> Iterator[None]:
    """Leave the threads time between the first look for present pages and the registration."""
    register, many = Userfaultfd._register_by, Engine.serve_many

    def wait() -> None:
        time.sleep(rng.choice((0, 0.0002, 0.002)))

    def registered(*args: Any) -> object:
        wait()
        return register(*args)

    def served(*args: Any) -> None:
        wait()
        many(*args)

    with (
        patch.object(Userfaultfd, "_register_by", registered),
        patch.object(Engine, "serve_many", served),
    ):
        yield


def serves(driver: AnyDriver, name: str, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    counts = {"served": 0, "refused": 0}
    until = time.monotonic() + SECONDS
    with tempfile.TemporaryFile() as file:
        file.write(bytes([VALUE]) * PAGES * PAGE)
        file.flush()
        while time.monotonic() < until or not counts["served"]:
            features = rng.choice((Feature(0), TRACKING))
            if driver != "inline":
                features |= rng.choice((Feature(0), Feature.EVENT_REMOVE | Feature.EVENT_FORK))
            options = {"prefetch": rng.choice((0, 1 << 16))}
            with (
                contextlib.closing(memory_of(name)) as memory,
                handler_of(driver, features, **options) as handler,
            ):
                handler.start()
                for _ in range(8 if driver == "process" else 2):
                    one_round(rng, driver, name, memory, handler, file.fileno(), counts)
                stats = handler.stats()
                assert (stats.unserved, stats.failed) == (0, 0)
    return counts


def one_round(
    rng: random.Random,
    driver: AnyDriver,
    name: str,
    memory: Any,
    handler: Handler,
    fd: int,
    counts: dict[str, int],
) -> None:
    count = PAGES // 4 if memory.is_hugetlb else PAGES
    regions = [memory.pages(count) for _ in range(rng.choice((1, 1, 5)))]
    present: Present | None = rng.choice((None, "refuse", "drop", "drop"))
    if name == "shmem-private" or (len(regions) > 1 and rng.random() < 0.5):
        present = None
    modes = [RegisterMode.MISSING]
    if handler.uffd.features & Feature.PAGEFAULT_FLAG_WP:
        modes.append(RegisterMode.MISSING | RegisterMode.WP)
    served: list[Region] = []
    with Touchers(regions, rng) as touchers, slowly(rng):
        if driver == "native" and present is None and len(regions) > 1:
            with contextlib.suppress(ValueError), FileSource(fd) as source:
                handler._serve_many([(region, source) for region in regions])
            spans = [(one.start, one.start + one.length) for one in regions]
            served = [
                one
                for one, span in zip(regions, spans, strict=True)
                if handler.uffd._has_registered(*span)
            ]
        else:
            for region in regions:
                with contextlib.suppress(ValueError):
                    source_ = source_of(driver, region.length, VALUE)
                    handler.serve(region, source_, mode=rng.choice(modes), present=present)
                    served.append(region)
        for region in regions:
            assert is_all(region, VALUE if region in served else 0)
    assert not touchers.errors
    counts["served"] += len(served)
    counts["refused"] += len(regions) - len(served)
    for region in served:
        handler.populate(region)
        handler.unserve(region)
        assert is_all(region, VALUE)


@needs(Feature.EVENT_REMOVE | Feature.EVENT_FORK)
@pytest.mark.parametrize("driver", EVERY)
@pytest.mark.parametrize("name", memory_params("anon", "shmem", "shmem-private", "hugetlb"))
def test_serves(driver: AnyDriver, name: str) -> None:
    print(f"PYUFFD_SEED={SEED}")
    run_child(serves, driver, name, SEED, budget_s=40)


def restores(seed: int) -> None:
    rng = random.Random(seed)
    counts = {"restored": 0, "refused": 0}
    step = 64 * PAGE
    with tempfile.TemporaryDirectory(prefix="restore-") as path:
        parts = [(START + n * step, [data(PAGES, n + 1)]) for n in range(5)]
        folder = write(Path(path) / "first", parts)
        until = time.monotonic() + 2 * SECONDS
        with Snapshot.open(folder) as snapshot:
            while time.monotonic() < until:
                count = rng.choice((1, 5))
                regions = [Region.anonymous(PAGES * PAGE) for _ in range(count)]
                pairs = [(START + n * step, region) for n, region in enumerate(regions)]
                both: list[str] = []

                def restore(
                    pairs: list[tuple[int, Region]] = pairs, both: list[str] = both
                ) -> None:
                    with slowly(random.Random(1)):
                        try:
                            with snapshot.restore(pairs, mode="copy") as restored:
                                assert restored.wait(10)
                                both.append("restored")
                        except (ValueError, UffdError):
                            both.append("refused")

                def touch(regions: list[Region] = regions) -> None:
                    time.sleep(random.random() / 500)
                    regions[-1].read(AT, 1)

                run_threads(*rng.choice(([restore, restore], [restore, touch])))
                for one in both:
                    counts[one] += 1
                if "restored" in both:
                    for start, region in pairs:
                        assert region.read() == snapshot.read(start, region.length)
                assert both.count("restored") <= 1
                for region in regions:
                    region.close()
    assert all(counts.values()), counts


@needs(Feature.EVENT_REMOVE)
def test_restores() -> None:
    print(f"PYUFFD_SEED={SEED}")
    run_child(restores, SEED, budget_s=40)
