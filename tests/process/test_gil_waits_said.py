"""A loop of one's own in Python that is stopped for want of the GIL is reported on stderr."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable

import pytest

from pyuffd import (
    Event,
    Feature,
    Pagefault,
    PagefaultFlag,
    Region,
    RegisterMode,
    Userfaultfd,
    WriteprotectMode,
)
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import PAGE, memory_of
from tests.process.test_waits_said import (
    BUDGET_S,
    LATE_S,
    MINOR,
    MODES,
    SILENT_S,
    WP,
    end_when_said,
    prepare,
)

HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()

pytestmark = [
    needs(Feature(0)),
    pytest.mark.skipif(not HAS_GIL, reason="no thread waits for the GIL here"),
]


# Loops


def answer(uffd: Userfaultfd, events: Iterable[Event]) -> None:
    for event in events:
        assert isinstance(event, Pagefault)
        page = event.address // PAGE * PAGE
        if event.flags & PagefaultFlag.WP:
            uffd.writeprotect(page, PAGE, mode=WriteprotectMode(0))
        else:
            uffd.fill_copy(page, b"x" * PAGE)


def by_reading(uffd: Userfaultfd) -> None:
    while True:
        answer(uffd, uffd.read_events())


def by_select(uffd: Userfaultfd) -> None:
    while True:
        select.select([uffd], [], [])
        answer(uffd, uffd.read_events())


def by_asyncio(uffd: Userfaultfd) -> None:
    async def loop() -> None:
        async for event in uffd.events():
            answer(uffd, [event])

    asyncio.run(loop())


def by_reading_slowly(uffd: Userfaultfd) -> None:
    """It does something without the GIL between reading and answering."""
    while True:
        events = uffd.read_events()
        time.sleep(0.2)
        answer(uffd, events)


LOOPS = {"read": by_reading, "select": by_select, "asyncio": by_asyncio}


def touches(loop: str, blocking: bool, mode: str, memory: str, adopted: bool) -> None:
    end_when_said()
    with (
        contextlib.closing(memory_of(memory)) as make,
        Userfaultfd(features=MODES[mode], nonblocking=not blocking) as own,
        contextlib.ExitStack() as stack,
    ):
        uffd = own
        if adopted:
            uffd = stack.enter_context(
                Userfaultfd.from_fd(os.dup(own.fileno()), owner_pid=os.getpid())
            )
        region = make.pages(3)
        prepare(region, mode)
        uffd.register(region, mode=RegisterMode[mode.upper()])
        if mode == "wp":
            uffd.writeprotect(region)
        print(f"{region.start:#x} {uffd.fileno()}", flush=True)
        threading.Thread(target=LOOPS[loop], args=(uffd,), daemon=True).start()
        time.sleep(0.2)  # it waits in its first call
        address = region.start + region.page_size
        if mode == "wp":
            (ctypes.c_char * 1).from_address(address)[0] = b"x"
        else:
            ctypes.string_at(address, 1)
        raise AssertionError("it went on")


def check(
    loop: str,
    blocking: bool,
    mode: str = "missing",
    memory: str = "anon",
    adopted: bool = False,
) -> None:
    ended = run_child(
        touches,
        *(loop, blocking, mode, memory, adopted),
        expect=-signal.SIGTERM,
        budget_s=BUDGET_S,
    )
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("pyuffd: ")]
    start, number = ended.stdout.split()
    assert f"[{start}, " in line
    assert f"userfaultfd {number}" in line
    assert " waits for the GIL: " in line
    assert "Use a Handler, or access the memory by region.read()" in line


@pytest.mark.parametrize(
    ("loop", "blocking"), [("read", True), ("read", False), ("select", False), ("asyncio", False)]
)
def test_a_loop_without_the_gil(loop: str, blocking: bool) -> None:
    check(loop, blocking)


@pytest.mark.parametrize(
    ("mode", "memory"),
    [
        pytest.param("wp", "anon", marks=needs(WP)),
        pytest.param("minor", "shmem", marks=needs(MINOR)),
        ("missing", "hugetlb"),
    ],
)
def test_by_mode(mode: str, memory: str) -> None:
    check("read", True, mode, memory)


def test_an_adopted_descriptor() -> None:
    check("read", True, adopted=True)


def touches_meanwhile() -> None:
    """The loop reads the message of a thread without the GIL, and loses the GIL then."""
    end_when_said()
    with Userfaultfd(nonblocking=False) as uffd, Region.anonymous(4 * PAGE) as region:
        uffd.register(region)
        threading.Thread(target=by_reading_slowly, args=(uffd,), daemon=True).start()
        threading.Thread(target=region.touch, daemon=True).start()
        time.sleep(0.1)
        ctypes.string_at(region.start + 3 * PAGE, 1)


def test_a_loop_that_loses_the_gil_between_reading_and_answering() -> None:
    ended = run_child(touches_meanwhile, expect=-signal.SIGTERM, budget_s=BUDGET_S)
    assert " waits for the GIL: " in ended.stderr


# Where the GIL is not what stops it


def read_slowly() -> None:
    """The reader takes long, and polls without the GIL, while another thread uses the CPU."""
    ended = threading.Event()

    def slow(uffd: Userfaultfd) -> None:
        while not (events := uffd.read_events()):
            time.sleep(0.01)
        give_up = time.monotonic() + 2 * SILENT_S
        while time.monotonic() < give_up:
            time.sleep(0.001)
        answer(uffd, events)

    def compute() -> None:
        while not ended.is_set():
            sum(range(1000))

    with Userfaultfd() as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        for work in (lambda: slow(uffd), compute):
            threading.Thread(target=work, daemon=True).start()
        region.touch()
        ended.set()


def read_by_a_slow_child() -> None:
    """Another process answers late; the thread that waits holds the GIL, and others want it."""
    with Userfaultfd() as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        pid = os.fork()
        if pid == 0:
            adopted = Userfaultfd.from_fd(os.dup(uffd._number.fd))
            select.select([adopted], [], [])
            events = adopted.read_events()
            time.sleep(2 * SILENT_S)
            answer(adopted, events)
            os._exit(0)

        def work() -> None:
            for _ in range(50):
                time.sleep(0.01)

        worker = threading.Thread(target=work)
        worker.start()
        ctypes.string_at(region.start, 1)
        worker.join()
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("slow", [read_slowly, read_by_a_slow_child])
def test_a_slow_answer_is_not_blamed_on_the_gil(slow: Callable[[], None]) -> None:
    ended = run_child(slow, budget_s=4 * SILENT_S + LATE_S)
    assert "pyuffd: " not in ended.stderr
