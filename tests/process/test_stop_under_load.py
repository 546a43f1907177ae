"""stop() beside threads that fault without end: it waits only for the faults of its start."""

from __future__ import annotations

import os
import threading
import time

import pytest

from pyuffd import (
    CallableSource,
    Feature,
    FileSource,
    Handler,
    PagePoisonedError,
    PageSource,
    Region,
    Userfaultfd,
)
from pyuffd.testing._needs import needs_kernel_faults
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import wait_until
from tests.process._pitfalls import with_and_without_events

pytestmark = needs_kernel_faults()

PAGES = 4096
READERS = 2
SLOW_S = 0.02
# One page for each reader, and the end; the fault was that all 10 s of timeout_s passed.
LIMIT_S = 3.0 * SCALE


def slow(offset: int, length: int) -> bytes:
    time.sleep(SLOW_S)
    return bytes([1 + offset // length % 255]) * length


def source_of(driver: str) -> PageSource:
    if driver != "native":
        return CallableSource(slow)
    fd = os.memfd_create("content")
    with open(fd, "wb") as file:
        for page in range(PAGES):
            file.write(bytes([1 + page % 255]) * PAGE)
        file.flush()
        return FileSource(fd)


def read_on(region: Region, first: int, seen: list[int]) -> None:
    for page in range(first, PAGES, READERS):
        try:
            data = region.read(page * PAGE, PAGE)
        except PagePoisonedError:
            return
        assert data == bytes([1 + page % 255]) * PAGE, f"page {page}"
        seen[0] += 1


def check_busy(driver: str, features: int, workers: int) -> None:
    with (
        Userfaultfd(features=Feature(features)) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
    ):
        handler = Handler(uffd, driver=driver, workers=workers)  # type: ignore[arg-type]
        handler.serve(region, source_of(driver))
        handler.start()
        seen = [[0] for _ in range(READERS)]
        failed: list[BaseException] = []

        def reader(first: int) -> None:
            try:
                read_on(region, first, seen[first])
            except BaseException as error:
                failed.append(error)

        readers = [threading.Thread(target=reader, args=(first,)) for first in range(READERS)]
        for thread in readers:
            thread.start()
        wait_until(lambda: all(one[0] > 1 for one in seen), "pages are read")
        began = time.monotonic()
        handler.stop()  # no failure to report
        assert time.monotonic() - began < LIMIT_S
        for thread in readers:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        assert not failed, failed
        assert handler.stats().failed == 0


@pytest.mark.crossing
@with_and_without_events
@pytest.mark.parametrize(
    ("driver", "workers"), [("thread", 1), ("thread", 2), ("process", 1), ("native", 1)]
)
def test_busy_readers(driver: str, workers: int, features: Feature) -> None:
    run_child(check_busy, driver, int(features), workers)
