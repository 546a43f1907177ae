"""Faults of code that holds the GIL, with the handlers that can and cannot serve them.

The native driver needs no Python, so every row of the table works. With the thread driver a page
source cannot run: after `stall_timeout_s` the wait ends with tracebacks and `on_error`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cffi import FFI

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    HandlerError,
    Region,
    Userfaultfd,
)
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._barriers import Point, holding
from tests._child import run_child
from tests._gil import needs_gil
from tests.kernel._serving import is_lost, wait_until
from tests.process._pitfalls import (
    ALL,
    EVENTS,
    Pages,
    Setting,
    checks_of,
    page,
    pitfall,
    reading,
)

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 16
DATA = Pages(PAGES, PAGE)
STALL_S = 0.2

Access = Callable[[mmap.mmap, Region], object]


def string_at(mapping: mmap.mmap, region: Region) -> None:
    assert ctypes.string_at(region.start, 4) == DATA[0][:4]


def ffi_memmove(mapping: mmap.mmap, region: Region) -> None:
    ffi = FFI()
    target = bytearray(PAGE)
    ffi.memmove(target, ffi.cast("char *", region.start), PAGE)
    assert target == DATA[0]


def index(mapping: mmap.mmap, region: Region) -> None:
    assert mapping[0] == DATA[0][0]


def part(mapping: mmap.mmap, region: Region) -> None:
    assert mapping[: 2 * PAGE] == DATA.of(0, 1)


def find(mapping: mmap.mmap, region: Region) -> None:
    assert mapping.find(DATA[3][:1]) == 3 * PAGE


def view(mapping: mmap.mmap, region: Region) -> None:
    with memoryview(mapping) as whole:
        assert whole[PAGE] == DATA[1][0]


def assign(mapping: mmap.mmap, region: Region) -> None:
    mapping[0] = 7
    assert page(region, 0) == b"\7" + DATA[0][1:]


def array_sum(mapping: mmap.mmap, region: Region) -> None:
    array = np.frombuffer(mapping, np.uint8)
    assert array.sum(dtype=np.uint64) == sum(DATA.all)


# Accesses that keep the GIL while they fault.
HOLDING: dict[str, Access] = {
    "ctypes.string_at": string_at,
    "ffi.memmove": ffi_memmove,
    "mmap-index": index,
    "mmap-slice": part,
    "mmap.find": find,
    "memoryview-index": view,
    "mmap-assign": assign,
    "numpy.sum": array_sum,
}


def drop(mapping: mmap.mmap, region: Region) -> None:
    mapping.madvise(mmap.MADV_DONTNEED, PAGE, PAGE)
    assert page(region, 1) == bytes(PAGE)


def resize(mapping: mmap.mmap, region: Region) -> None:
    mapping.resize(PAGES // 2 * PAGE)
    assert page(region, 1) == DATA[1]


def fork(mapping: mmap.mmap, region: Region) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(page(region, 2) != DATA[2])
    assert os.waitpid(pid, 0)[1] == 0


def with_preexec(mapping: mmap.mmap, region: Region) -> None:
    subprocess.run([sys.executable, "-S", "-c", ""], check=True, preexec_fn=lambda: None)


# Calls that hold the GIL and wait for an event to be read; C reads it.
EVENTFUL: dict[str, Access] = {
    "mmap.madvise": drop,
    "mmap.resize": resize,
    "os.fork": fork,
    "subprocess-preexec_fn": with_preexec,
}


@contextmanager
def served(driver: str, features: Feature, **options: Any) -> Iterator[tuple[mmap.mmap, Region]]:
    """An mmap object of missing pages, served."""
    mapping = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Not through a buffer, which would prevent resizing.
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    with (
        Region.at(address, PAGES * PAGE, PAGE) as region,
        Userfaultfd(features=features) as uffd,
        Handler(uffd, driver=driver, **options) as handler,  # type: ignore[arg-type]
    ):
        if driver == "native":
            handler.serve(region, BufferSource(DATA.all))
        else:
            handler.serve(region, CallableSource(lambda at, length: DATA.all[at : at + length]))
        handler.start()
        yield mapping, region


def do(driver: str, name: str, **options: Any) -> None:
    """Do one of the accesses."""
    access = (HOLDING | EVENTFUL)[name]
    with served(driver, EVENTS if name in EVENTFUL else Feature(0), **options) as (mapping, region):
        access(mapping, region)


def do_all(driver: str, names: list[str]) -> None:
    for name in names:
        print(name, file=sys.stderr, flush=True)
        do(driver, name)


@needs(EVENTS)
@pytest.mark.parametrize("driver", [pytest.param("native", id="pitfall.1.native-serves-all")])
def test_native_serves_what_holds_the_gil(driver: str) -> None:
    """A Python thread could serve none of these: it would wait for the GIL."""
    run_child(do_all, driver, [*HOLDING, *EVENTFUL])


@needs(EVENTS)
@pytest.mark.parametrize("driver", [pytest.param("thread", id="pitfall.1.events-need-no-python")])
def test_layout_changes_that_hold_the_gil(driver: str) -> None:
    """With the thread driver too the events are read in C."""
    run_child(do_all, driver, list(EVENTFUL))


@needs_gil(there=True)
@needs(Feature(0))
@pytest.mark.parametrize(
    "name", [pytest.param(name, id=f"pitfall.1.thread-{name}") for name in HOLDING]
)
def test_deadlock_ends_in_sigbus(name: str) -> None:
    """The access waits for the source, which waits for the GIL: it ends, and is reported."""
    ended = run_child(do, "thread", name, stall_timeout_s=STALL_S, expect=-signal.SIGBUS)
    # The child writes its tracebacks once more for the SIGBUS.
    shown = ended.stderr.split("Fatal Python error")[0]
    assert "most recent call first" in shown
    function = HOLDING[name].__name__
    assert f"in {function}" in shown, "the traceback shows who faults"
    assert "_threads.py" in shown, "and who would have had to answer"


def hold_the_gil_with_events() -> None:
    with served("thread", EVENTS, stall_timeout_s=STALL_S) as (mapping, region):
        HOLDING["mmap-index"](mapping, region)


@needs_gil(there=True)
@needs(EVENTS)
def test_a_report_makes_no_fork_event() -> None:
    """The thread that would read the event is the one that reports."""
    ended = run_child(hold_the_gil_with_events, expect=-signal.SIGBUS)
    assert "most recent call first" in ended.stderr.split("Fatal Python error")[0]


def stalls_beside_threads(stalls: int) -> int:
    """Python runs while the source is slow: other threads begin, go deep and end."""
    over = threading.Event()

    def deep(depth: int) -> int:
        return deep(depth - 1) + 1 if depth else 0

    def come_and_go() -> None:
        while not over.is_set():
            threads = [threading.Thread(target=deep, args=[300]) for _ in range(4)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()

    def slow_content(at: int, length: int) -> bytes:
        time.sleep(0.06)
        return DATA.all[at : at + length]

    busy = [threading.Thread(target=come_and_go) for _ in range(3)]
    for each in busy:
        each.start()
    with (
        Userfaultfd() as uffd,
        Region.anonymous(stalls * PAGE) as region,
        Handler(uffd, driver="thread", stall_timeout_s=0.02, on_error="stall") as handler,
    ):
        handler.serve(region, CallableSource(slow_content))
        for number in range(stalls):
            assert region.read(number * PAGE, PAGE) == DATA[number]
        stalled = handler.stats().stalled_requests
    over.set()
    for each in busy:
        each.join()
    return stalled


@needs_kernel_faults()
def test_stalls_beside_threads_that_come_and_go() -> None:
    """Their frames may be gone while a report follows them: it must not end the program."""
    ended = run_child(stalls_beside_threads, PAGES, budget_s=30)
    # On a busy machine a stall may go unnoticed, or its report may end early.
    assert 0 < ended.stderr.count("in slow_content") <= ended.value


@needs_gil(there=True)
@needs(Feature(0))
@pytest.mark.parametrize("name", [pytest.param("mmap-index", id="pitfall.1.thread-kill")])
def test_deadlock_ends_in_sigkill(name: str) -> None:
    ended = run_child(
        do, "thread", name, stall_timeout_s=STALL_S, on_error="kill", expect=-signal.SIGKILL
    )
    assert "in index" in ended.stderr


@needs_gil(there=True)
@needs(Feature(0))
@pytest.mark.parametrize("name", [pytest.param("mmap-index", id="pitfall.1.thread-report")])
def test_deadlock_is_reported_only(name: str) -> None:
    """With on_error="stall" the process hangs, but reports where."""
    ended = run_child(
        do,
        "thread",
        name,
        stall_timeout_s=STALL_S,
        on_error="stall",
        budget_s=1.5,
        expect="timeout",
    )
    first = ended.stderr.split("Timeout (")[0]
    assert "in index" in first


def long_call(at: Setting, on_error: str) -> None:
    """A call that keeps the GIL for some time, while another thread waits for a page."""
    limit = 0.2 if on_error == "stall" else 8.0
    with at.serving(stall_timeout_s=limit, on_error=on_error) as (handler, memory):
        region = memory.pages(2)
        data = Pages(2, memory.page_size)
        handler.serve(region, at.source(data.all))
        handler.start()
        # PyDLL calls keep the GIL.
        usleep = ctypes.PyDLL(None).usleep
        usleep.argtypes = [ctypes.c_uint]
        if on_error == "stall":
            with holding(Point.REQUEST_TAKEN) as point:
                reader = reading(region, 1)
                point.wait()  # the page was requested: the answer is late now
                usleep(600_000)
            assert reader.result() == data[1]
            handler.stop()  # what came late is no failure in the end
            stats = handler.stats()
            assert (stats.stalled_requests, stats.failed) == (1, 1)
            return
        reader = reading(region, 1)
        usleep(20_000)  # less than the limit: nothing happens
        assert reader.result() == data[1]
        assert handler.stats().stalled_requests == 0


@pitfall(1, "long-call-is-reported", drivers=("thread",))
def long_call_reported(at: Setting) -> None:
    """on_error="stall": once the GIL is free the page arrives, however late."""
    long_call(at, "stall")


@pitfall(1, "short-call-is-waited-for", drivers=("thread",))
def short_call(at: Setting) -> None:
    """Holding the GIL for less than the limit is no error."""
    long_call(at, "poison")


@pitfall(1, "gil-free-accesses", drivers=ALL, marks=(needs_kernel_faults(),))
def gil_free(at: Setting) -> None:
    """Calls that release the GIL work with both drivers, also if the kernel accesses the page."""
    with at.served(8) as (_, region, data):
        target = ctypes.create_string_buffer(data.size)
        ctypes.memmove(target, region.start, data.size)
        assert target.raw == data[0]
        assert page(region, 1) == data[1]
        assert not is_lost(region, 2 * data.size, data.size)
        file = os.memfd_create("source")
        os.write(file, b"from a file")
        with region.memoryview() as whole, whole[3 * data.size : 4 * data.size] as part:
            assert os.preadv(file, [part], 0) == 11
        assert region.read(3 * data.size, 12) == b"from a file" + data[3][:1]
        os.close(file)
        region.madvise(22, 4 * data.size, data.size)  # MADV_POPULATE_READ
        assert page(region, 4) == data[4]


@pitfall(1, "source-that-faults-itself", drivers=("thread",))
def recursive(at: Setting) -> None:
    """A source reads the page that it must fill: each worker gets the request, until none is left.

    It must end in an error; a lock held around the call would make it a silent hang.
    """
    with at.serving(stall_timeout_s=0.3, workers=1) as (handler, memory):
        region = memory.pages(2)

        def source(offset: int, length: int) -> bytes:
            if offset == 0 and is_lost(region, 0):
                raise RuntimeError("the page is asked for by its own source")
            return bytes([9]) * length

        handler.serve(region, CallableSource(source))
        handler.start()
        assert is_lost(region, 0, memory.page_size)
        assert page(region, 1) == b"\t" * memory.page_size
        wait_until(lambda: handler.stats().stalled_requests > 0, "the stall is counted")
        with pytest.raises(HandlerError):
            handler.stop()


test_pitfalls = checks_of(__name__)
