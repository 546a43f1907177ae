"""Checks of the known pitfalls of userfaultfd, by their numbers.

A module marks its checks with `@pitfall(number, name)` and ends with `test_pitfalls =
checks_of(__name__)`. Each check is a test with the id `pitfall.<number>.<name>`, and runs in a
child process with all its drivers and kinds of memory. For hugetlb memory there is a separate id,
which ends in `.hugetlb`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    PageSource,
    Region,
    Userfaultfd,
)
from pyuffd.testing import layout_is_changing, needs, needs_hugepages
from pyuffd.testing._run import Expect
from tests._child import run_child
from tests._memory import DEFAULT_HUGE_PAGES, Memory
from tests.kernel._faults import Task
from tests.kernel._serving import is_lost, serving, wait_until

NAMES = {
    1: "GIL self-deadlock",
    2: "EAGAIN while the layout changes",
    3: "EEXIST does not wake",
    4: "handler dies or descriptor closes with faults in flight",
    5: "partial results",
    6: "owner process dies",
    7: "handshake",
    8: "opening",
    9: "poll and read quirks",
    10: "duplicate fault messages",
    11: "REMOVE and UNMAP against copies",
    12: "write-protect semantics",
    13: "page size and range rules",
    14: "fork",
    15: "MOVE, POISON and CONTINUE errors",
    16: "latency, concurrency, lifetime",
}

Driver = Literal["native", "thread", "process"]
NATIVE: tuple[Driver, ...] = ("native",)
BOTH: tuple[Driver, ...] = ("native", "thread")
# For checks that do not stop a thread of an engine or source in this process.
ALL: tuple[Driver, ...] = (*BOTH, "process")

ANON = ("anon",)
SMALL = ("anon", "shmem", "shmem-private")
EVERY = (*SMALL, "hugetlb", "hugetlb-private")

LAYOUT = Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP
EVENTS = LAYOUT | Feature.EVENT_FORK
with_and_without_events = pytest.mark.parametrize(
    "features",
    [
        pytest.param(Feature(0), id="no-events"),
        pytest.param(EVENTS, id="events", marks=needs(EVENTS)),
    ],
)


@dataclass(frozen=True)
class Setting:
    """The driver and memory with which a check runs."""

    driver: Driver
    memory: str

    @contextlib.contextmanager
    def serving(
        self,
        features: Feature = Feature(0),  # noqa: B008 - an immutable flag
        **options: Any,
    ) -> Iterator[tuple[Handler, Memory]]:
        """A handler that is not started, and a factory of regions that outlive it."""
        if self.driver != "native":
            options.setdefault("workers", 2)
        with serving(self.driver, self.memory, features, **options) as both:
            yield both

    @contextlib.contextmanager
    def served(
        self,
        pages: int,
        features: Feature = Feature(0),  # noqa: B008
        **options: Any,
    ) -> Iterator[tuple[Handler, Region, Pages]]:
        """A started handler, its one region, and the content of the region's pages."""
        with self.serving(features, **options) as (handler, memory):
            region = memory.pages(pages)
            data = Pages(pages, memory.page_size)
            handler.serve(region, self.source(data.all))
            handler.start()
            yield handler, region, data

    def source(self, data: bytes) -> PageSource:
        """Return a source of the kind that the driver is for."""
        if self.driver == "process":
            return Data(data)
        if self.driver == "thread":
            return CallableSource(lambda offset, length: data[offset : offset + length], len(data))
        return BufferSource(data)


class Data:
    """A source in Python that can be pickled."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.length = len(data)

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes."""
        return self.data[offset : offset + length]


class Pages:
    """Content that differs from page to page and from seed to seed, and has no zeros."""

    def __init__(self, count: int, size: int, seed: int = 1) -> None:
        self.size = size
        self.zeros = bytes(size)
        self.all = b"".join(
            bytes([1 + (page * 7 + seed * 31) % 255]) * size for page in range(count)
        )

    def __getitem__(self, page: int) -> bytes:
        return self.all[page * self.size : (page + 1) * self.size]

    def of(self, *pages: int | None) -> bytes:
        """The content of some consecutive pages; None is a page of zeros."""
        return b"".join(self.zeros if page is None else self[page] for page in pages)


Check = Callable[[Setting], object]

NANOSLEEP, FUTEX, CLOCK_NANOSLEEP = "35", "202", "230"  # as /proc/PID/syscall shows them


@dataclass(frozen=True)
class Case:
    """One check, and how to run it."""

    number: int
    name: str
    function: str
    drivers: tuple[Driver, ...]
    memory: tuple[str, ...]
    budget_s: float
    expect: Expect
    marks: tuple[Any, ...] = field(default=())

    @property
    def id(self) -> str:
        return f"pitfall.{self.number}.{self.name}"


CASES: dict[str, list[Case]] = {}
AFTER_CHECK = contextlib.ExitStack()  # undoes what must not affect the next check


def pitfall(
    number: int,
    name: str,
    *,
    drivers: tuple[Driver, ...] = NATIVE,
    memory: tuple[str, ...] = ANON,
    features: Feature = Feature(0),  # noqa: B008
    budget_s: float = 10.0,
    expect: Expect = 0,
    marks: tuple[Any, ...] = (),
) -> Callable[[Check], Check]:
    """Mark a function as a check of a pitfall; the kernel must have `features`."""
    assert number in NAMES

    def note(check: Check) -> Check:
        case = Case(
            number,
            name,
            check.__name__,
            drivers,
            memory,
            budget_s,
            expect,
            (needs(features), *marks),
        )
        CASES.setdefault(check.__module__, []).append(case)
        return check

    return note


def checks_of(module: str) -> Any:
    """Return the test function of a module's checks, one parameter for each."""
    params = []
    for case in CASES[module]:
        small = [name for name in case.memory if not name.startswith("hugetlb")]
        huge = [name for name in case.memory if name.startswith("hugetlb")]
        if small:
            params.append(pytest.param(case, small, id=case.id, marks=case.marks))
        if huge:
            marks = (*case.marks, needs_hugepages(DEFAULT_HUGE_PAGES))
            params.append(pytest.param(case, huge, id=f"{case.id}.hugetlb", marks=marks))

    @pytest.mark.parametrize(("case", "memory"), params)
    def test(case: Case, memory: list[str]) -> None:
        run_child(
            run_check,
            module,
            case.function,
            case.drivers,
            memory,
            budget_s=case.budget_s * len(case.drivers),
            expect=case.expect,
        )

    return test


def run_check(module: str, function: str, drivers: Sequence[Driver], memory: list[str]) -> None:
    """Run a check for each driver and kind of memory, and print which one is running."""
    check = getattr(importlib.import_module(module), function)
    for driver in drivers:
        # Starting a process for each handler is slow, so use only the first two kinds of memory.
        for name in memory[:2] if driver == "process" else memory:
            print(driver, name, file=sys.stderr, flush=True)
            with AFTER_CHECK:
                check(Setting(driver, name))


def page(region: Region, index: int) -> bytes:
    """Read one page."""
    return region.read(index * region.page_size, region.page_size)


def reading(region: Region, index: int) -> Task[bytes]:
    """Begin to read one page in another thread."""
    return Task(page, region, index)


def losing(region: Region, index: int) -> Task[bool]:
    """Begin to check in another thread whether a page is lost."""
    return Task(is_lost, region, index * region.page_size, region.page_size)


def wait_blocked(task: Task[Any], call: int | None = None) -> None:
    """Wait until a thread sleeps in the kernel, in this system call if one is given."""
    folder = Path(f"/proc/self/task/{task.native_id}")

    def blocked() -> bool:
        state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        number = (folder / "syscall").read_text().split()[0]
        return state in "SD" and (call is None or number == str(call))

    wait_until(blocked, "the thread is blocked")


def wait_changing(uffd: Userfaultfd, task: Task[Any], call: int) -> None:
    """Wait until a thread has changed the layout and waits for its event to be read."""
    wait_until(lambda: layout_is_changing(uffd), "the layout is changing")
    wait_blocked(task, call)


def over_or_blocked(task: Task[Any]) -> None:
    """Wait until a thread has ended, or waits for a lock or before a retry."""
    path = Path(f"/proc/self/task/{task.native_id}/syscall")

    def settled() -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            number, *args = path.read_text().split()
            # A thread that waits for the GIL is in futex(2) too, but with a timeout.
            waits = number in (CLOCK_NANOSLEEP, NANOSLEEP) or (number == FUTEX and args[3] == "0x0")
            return not task.running or waits
        return True

    wait_until(settled, "the thread has ended or waits")


def failed(handler: Handler) -> bool:
    """Whether a running handler has a failure, which stop() would raise."""
    assert handler._engine is not None
    return handler._engine.failure() is not None


def all_pitfalls() -> set[int]:
    """The numbers of the pitfalls for which the imported modules have checks."""
    return {case.number for cases in CASES.values() for case in cases}
