"""Handler: many threads that wait at once, each for a page of its own (csrc/engine/crowd.h)."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    PagePoisonedError,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
)
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._barriers import Point, holding
from tests._child import run_child
from tests._memory import PAGE, memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import (
    content,
    handler_of,
    serving,
    states,
    wait_for_stalled,
    wait_until,
)

# More than CROWD in csrc/engine/crowd.h, so that their faults are resolved together.
THREADS = 200
# And a page for the fault with which the leader is kept busy.
PAGES = THREADS + 1


@contextlib.contextmanager
def gathered(
    handler: Handler, region: Region, touch: Callable[[int], object]
) -> Iterator[list[Task[object]]]:
    """Have threads wait for pages 0 to THREADS - 1, whose faults the leader has read together.

    It resolves them when the block ends.
    """
    with contextlib.ExitStack() as stack:
        with holding(Point.FAULT_WOKEN) as woken:
            first = Task(touch, THREADS)
            woken.wait()
            order = random.Random(1).sample(range(THREADS), THREADS)
            tasks: list[Task[object]] = [Task(touch, index) for index in order]
            wait_for_stalled(handler.uffd, THREADS)
            applied = stack.enter_context(holding(Point.STEP_APPLIED))
        applied.wait()
        yield [first, *tasks]


def ended(tasks: list[Task[object]]) -> int:
    return sum(not task.running for task in tasks)


def is_poisoned(task: Task[object]) -> bool:
    try:
        task.result()
    except PagePoisonedError:
        return True
    return False


def content_arrives(name: str) -> None:
    """Each thread gets its page; on huge pages many threads share one."""
    with serving("native", name) as (handler, memory):
        size = memory.page_size
        region = memory.pages(4 if memory.is_hugetlb else PAGES)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()

        def touch(index: int) -> bytes:
            page = index if size == PAGE else 3 if index == THREADS else index % 3
            return region.read(page * size + 8, 64)

        with gathered(handler, region, touch) as tasks:
            pass
        for task in tasks:
            task.result()
        assert region.read() == data
        assert handler.stats().filled_pages == region.length // size
        handler.stop()


@pytest.mark.parametrize(
    "name", memory_params("anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private")
)
def test_all_get_their_content(name: str) -> None:
    run_child(content_arrives, name, budget_s=30)


def from_a_file(path: str) -> None:
    """The last page holds the end of the file."""
    with handler_of("native") as handler:
        data = content(PAGES * PAGE - 100)
        Path(path).write_bytes(data)
        with Region.anonymous(PAGES * PAGE) as region:
            handler.serve(region, FileSource(path))
            handler.start()
            with gathered(handler, region, lambda index: region.read(index * PAGE, 1)) as tasks:
                pass
            for task in tasks:
                task.result()
            assert region.read() == data + bytes(100)
            handler.stop()


def test_content_of_a_file(tmp_path: Path) -> None:
    run_child(from_a_file, f"{tmp_path}/content", budget_s=30)


def woken_together() -> None:
    """A call that wakes looks at all threads that wait: one page in place is not worth one."""
    with serving("native", "anon") as (handler, memory):
        region = memory.pages(PAGES)
        handler.serve(region, BufferSource(content(region.length)))
        handler.start()
        with contextlib.ExitStack() as stack:
            with gathered(handler, region, lambda index: region.read(index * PAGE, 1)) as tasks:
                woken = stack.enter_context(holding(Point.FAULT_WOKEN))
            woken.wait()
            assert handler.stats().filled_pages == 2
            assert ended(tasks) == 1


def test_few_calls_wake_all() -> None:
    run_child(woken_together, budget_s=30)


def written() -> None:
    """Pages of a crowd of writers are DIRTY, and no other one."""
    with (
        handler_of("native", Feature.PAGEFAULT_FLAG_WP) as handler,
        Region.anonymous(2 * PAGES * PAGE) as region,
    ):
        data = content(region.length)
        region.write(0, data)
        handler.serve(region, None, mode=RegisterMode.WP)
        handler.start()
        handler.writeprotect(region)

        def touch(index: int) -> None:
            region.write(2 * index * PAGE, b"new")

        with gathered(handler, region, touch) as tasks:
            pass
        for task in tasks:
            task.result()
        found = states(handler, region)
        assert found == [PageState.DIRTY, PageState.CLEAN] * PAGES
        handler.stop()


@needs(Feature.PAGEFAULT_FLAG_WP)
def test_writers_of_protected_pages() -> None:
    run_child(written, budget_s=30)


def mapped() -> None:
    """Minor faults: the page cache has the content."""
    with (
        handler_of("native", Feature.MINOR_SHMEM) as handler,
        Region.memfd(PAGES * PAGE) as region,
    ):
        data = content(region.length)
        with region.alias() as alias:
            alias.write(0, data)
        handler.serve(region, None, mode=RegisterMode.MINOR)
        handler.start()
        with gathered(handler, region, lambda index: region.read(index * PAGE, 1)) as tasks:
            pass
        for task in tasks:
            task.result()
        assert region.read() == data
        assert handler.stats().faults["minor"] == PAGES
        handler.stop()


@needs(Feature.MINOR_SHMEM)
def test_minor_faults() -> None:
    run_child(mapped, budget_s=30)


def held() -> None:
    """Faults that were put off are resolved together as well."""
    with serving("native", "anon") as (handler, memory):
        region = memory.pages(PAGES)
        data = content(region.length)
        handler.serve(region, BufferSource(data))
        handler.start()
        with handler.hold(limit_s=60.0):
            order = random.Random(1).sample(range(PAGES), PAGES)
            tasks: list[Task[object]] = [Task(region.read, index * PAGE, 8) for index in order]
            wait_until(lambda: handler.stats().messages >= PAGES, "all faults are read")
            assert ended(tasks) == 0
        for task, index in zip(tasks, order, strict=True):
            assert task.result() == data[index * PAGE :][:8]
        assert handler.stats().filled_pages == PAGES
        handler.stop()


def test_faults_of_a_hold() -> None:
    run_child(held, budget_s=30)


def waits_for_none() -> None:
    """From the middle on the content is in memory that nobody fills: it blocks the leader."""
    half = THREADS // 2
    backing, region = Region.anonymous(PAGES * PAGE), Region.anonymous(PAGES * PAGE)
    never, uffd = Userfaultfd(), Userfaultfd()
    backing.write(0, content(half * PAGE))
    backing.write(THREADS * PAGE, b"last")
    never.register(backing[half * PAGE : THREADS * PAGE])
    handler = Handler(uffd)
    handler.serve(region, BufferSource(backing))
    handler.start()
    with gathered(handler, region, lambda index: region.read(index * PAGE, 8)) as tasks:
        pass
    wait_for_stalled(never, 1)
    wait_until(lambda: ended(tasks) == half + 1, "all go on whose pages are in place")
    assert handler.stats().filled_pages == half + 1
    with pytest.raises(HandlerError, match="BufferSource"):
        handler.stop(timeout_s=0.5)
    assert sorted(is_poisoned(task) for task in tasks) == [False] * (half + 1) + [True] * half


@needs_kernel_faults()
@needs(Feature.POISON)
def test_a_blocked_source_keeps_only_its_own_page() -> None:
    run_child(waits_for_none, budget_s=30)


def dismissed(mode: int) -> None:
    """stop() does not wait for the leader, which has threads to wake when it comes back."""
    features = Feature.MINOR_SHMEM if mode & RegisterMode.MINOR else Feature(0)
    with Userfaultfd(features=features) as uffd, Region.memfd(PAGES * PAGE) as region:
        data = content(region.length)
        handler = Handler(uffd)
        if mode & RegisterMode.MINOR:
            with region.alias() as alias:
                alias.write(0, data)
            handler.serve(region, None, mode=RegisterMode.MINOR)
        else:
            handler.serve(region, BufferSource(data))
        handler.start()
        with contextlib.ExitStack() as stack:
            with gathered(handler, region, lambda index: region.read(index * PAGE, 8)) as tasks:
                woken = stack.enter_context(holding(Point.FAULT_WOKEN))
            woken.wait()
            claimed = stack.enter_context(holding(Point.FAULT_CLAIMED))
            woken.release()
            claimed.wait()
            with contextlib.suppress(HandlerError):
                handler.stop(timeout_s=0.5)
            assert tasks[0].result() == data[THREADS * PAGE :][:8]
            claimed.release()
            for task in tasks:
                is_poisoned(task)


@pytest.mark.parametrize("mode", [RegisterMode.MISSING, RegisterMode.MINOR])
@needs(Feature.POISON | Feature.MINOR_SHMEM | Feature.MISSING_SHMEM)
def test_a_leader_that_was_dismissed(mode: RegisterMode) -> None:
    run_child(dismissed, int(mode), budget_s=30)


def dismissed_writer() -> None:
    """stop() does not wait for the leader, which has just lifted a protection and woken nobody."""
    with (
        Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
    ):
        region.write(0, content(region.length))
        handler = Handler(uffd)
        handler.serve(region, None, mode=RegisterMode.WP)
        handler.start()
        handler.writeprotect(region)
        with contextlib.ExitStack() as stack:
            with gathered(handler, region, lambda index: region.write(index * PAGE, b"n")) as tasks:
                lifted = stack.enter_context(holding(Point.LIFTED))
            lifted.wait()
            with contextlib.suppress(HandlerError):
                handler.stop(timeout_s=0.5)
            lifted.release()
            for task in tasks:
                task.result()
        assert region.read()[::PAGE] == b"n" * PAGES


@needs(Feature.PAGEFAULT_FLAG_WP)
def test_a_leader_that_was_dismissed_wakes_its_writer() -> None:
    run_child(dismissed_writer, budget_s=20)
