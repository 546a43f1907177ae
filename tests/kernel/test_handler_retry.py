"""Handler.retry, and failures that are mended: no HandlerError at stop()."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from pyuffd import (
    CallableSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    Region,
    UffdOSError,
)
from pyuffd.sources import PROMISED, Promised
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import content, states, wait_until
from tests.kernel._verbs import ABSENT, CLEAN, NEEDED, PAGES, PYTHON, Driver, filling, handling

# Than the limit that a handler has by default.
LONGER_S = 2.3


class Recovering:
    """A source that raises until a file exists."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, offset: int, length: int) -> bytes:
        """Return sevens, or raise."""
        if not os.path.exists(self.path):
            raise OSError("not there yet")
        return b"\7" * length


def stalls_and_recovers(driver: Driver, name: str) -> None:
    path = f"{os.getcwd()}/ready-{driver}-{name}-{os.getpid()}"
    with handling(driver, on_error="stall") as handler:
        source = CallableSource(Recovering(path))
        with filling(handler, name, source) as region:
            size = region.page_size
            seen: list[bytes] = []
            thread = threading.Thread(target=lambda: seen.append(region.read(0, 1)))
            thread.start()
            wait_until(lambda: handler.stats().failed == 1, "the source has raised")
            assert handler.retry(region, size) == 0
            assert handler.retry(region) == 1
            wait_until(lambda: handler.stats().failed == 2, "the source has raised again")
            assert states(handler, region) == [ABSENT] * PAGES
            open(path, "w").close()
            try:
                handler.retry(region)
                thread.join()
            finally:
                os.unlink(path)
            assert seen == [b"\7"]
            assert handler.retry(region) == 0
            assert states(handler, region)[0] is CLEAN
        assert handler.stats().failed == 2


def check_recovery(name: str) -> None:
    for driver in PYTHON:
        stalls_and_recovers(driver, name)


@pytest.mark.parametrize("name", memory_params())
@needs(NEEDED)
def test_stalls_and_recovers(name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    run_child(check_recovery, name, budget_s=30)


def of_a_file() -> None:
    """A file that was truncated and is whole again, with the native driver."""
    with open(os.memfd_create("image"), "w+b") as file:
        file.write(content(PAGES * 4096))
        file.flush()
        with (
            FileSource(file) as source,
            handling("native", on_error="stall") as handler,
            filling(handler, "anon", source) as region,
        ):
            os.ftruncate(file.fileno(), 4096)
            thread = threading.Thread(target=lambda: region.read(2 * 4096, 1))
            thread.start()
            wait_until(lambda: handler.stats().failed == 1, "the page cannot be read")
            os.pwrite(file.fileno(), content(PAGES * 4096), 0)
            assert handler.retry(region) == 1
            thread.join()
            assert region.read(2 * 4096, 4096) == content(PAGES * 4096)[8192:12288]


@needs(NEEDED)
def test_of_a_file() -> None:
    run_child(of_a_file)


def of_populate() -> None:
    """populate() that failed, and then did not."""
    down = threading.Event()
    down.set()

    def read(offset: int, length: int) -> bytes:
        if down.is_set():
            raise OSError("down")
        return content(length)

    with handling("thread") as handler, filling(handler, "anon", CallableSource(read)) as region:
        with pytest.raises(UffdOSError):
            handler.populate(region)
        down.clear()
        handler.populate(region)
        assert handler.stats().failed > 0


@needs(NEEDED)
def test_of_populate() -> None:
    run_child(of_populate)


def one_of_two_is_mended() -> None:
    """The error names the page that was not mended, and what its source raised."""
    raised: dict[int, Exception] = {0: KeyError("first"), 4096: IndexError("second")}

    def read(offset: int, length: int) -> bytes:
        if offset in raised:
            raise raised[offset]
        return content(length)

    with (
        pytest.raises(HandlerError) as failed,
        handling("thread", on_error="stall") as handler,
        filling(handler, "anon", CallableSource(read)) as region,
    ):
        start = region.start
        threads = []
        for page in (0, 1):
            thread = threading.Thread(target=lost, args=(region.read, page * 4096))
            thread.start()
            threads.append(thread)
            wait_until(partial(has_failed, handler, page + 1), "it has failed")
        del raised[0]
        assert handler.retry(region, 0, 4096) == 1
        threads[0].join()
        handler.stop()
    assert failed.value.start == start + 4096
    assert isinstance(failed.value.__cause__, IndexError)
    assert "1 page in all" in str(failed.value)


def has_failed(handler: Handler, times: int) -> bool:
    return handler.stats().failed == times


def lost(read: Callable[[int, int], object], at: int) -> None:
    try:
        read(at, 1)
    except UffdOSError:
        return


@needs(NEEDED | Feature.POISON)
def test_names_what_was_not_mended() -> None:
    run_child(one_of_two_is_mended)


def asked_again(handler: Handler, region: Region, asked: list[int]) -> bool:
    handler.retry(region)  # the first may have come before the source returned
    return len(asked) > 1 and set(asked) == {4096}


def broken_promises() -> None:
    """retry() has the source asked again for what it promised."""
    asked: list[int] = []

    def promise(offset: int, length: int) -> Promised:
        del length
        asked.append(offset)
        return PROMISED

    with (
        handling("thread", stall_timeout_s=math.inf) as handler,
        filling(handler, "anon", CallableSource(promise)) as region,
    ):
        thread = threading.Thread(target=lambda: region.read(4096, 1))
        thread.start()
        wait_until(lambda: asked == [4096], "the page is asked for")
        assert handler.retry(region, 0, 4096) == 0
        assert handler.retry(region) == 0
        wait_until(lambda: asked_again(handler, region, asked), "it is asked for again")
        assert handler.fill(region, 0, content(PAGES * 4096)) == PAGES * 4096
        thread.join()
        assert handler.stats().failed == handler.stats().stalled_requests == 0


@needs(NEEDED)
def test_asks_again_for_what_was_promised() -> None:
    run_child(broken_promises)


class Waiting:
    """A source that waits until a file exists, in whatever process."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, offset: int, length: int) -> bytes:
        """Return sevens, late."""
        while not os.path.exists(self.path):
            time.sleep(0.01)
        return b"\7" * length


def waits(path: str, driver: Driver) -> None:
    source = Waiting(path)
    with (
        handling(driver, stall_timeout_s=math.inf) as handler,
        filling(handler, "anon", CallableSource(source)) as region,
    ):
        reading = Task(region.read, 0, 1)
        wait_until(lambda: handler.stats().requests == 1, "the page is asked for")
        time.sleep(LONGER_S)
        assert reading.running
        assert handler.stats().failed == 0
        open(path, "w").close()
        assert reading.result() == b"\7"
        assert handler.stats().stalled_requests == 0


def waits_forever() -> None:
    """stall_timeout_s=inf: a source is waited for as long as it takes."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(waits, f"{folder}/{driver}", driver) for driver in PYTHON]
        for task in tasks:
            task.result()


@needs(NEEDED)
def test_waits_without_a_limit() -> None:
    run_child(waits_forever, budget_s=20)


def chunks(handler: Handler, prefetch: int) -> None:
    asked: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return content(length)

    for chunk in (4096, 2 * 4096, 4 * 4096):
        asked.clear()
        with filling(handler, "anon", CallableSource(read)) as region:
            handler.populate(region, chunk=chunk)
        expected = [(at, chunk) for at in range(0, PAGES * 4096, chunk)]
        assert asked == expected, (prefetch, chunk)


def chunks_and_prefetch() -> None:
    for prefetch in (0, 4096, 3 * 4096, 1 << 20):
        with handling("thread", prefetch=prefetch) as handler:
            chunks(handler, prefetch)


@needs(NEEDED)
def test_chunk_is_independent_of_prefetch() -> None:
    run_child(chunks_and_prefetch)
