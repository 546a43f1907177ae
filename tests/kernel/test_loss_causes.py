"""Each lost page's error has the exception of its source as its cause, and keeps nothing open."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing

import pytest

from pyuffd import (
    CallableSource,
    Feature,
    Handler,
    HandlerError,
    PagePoisonedError,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
    _memory,
)
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import memory_of, memory_params

PAGES = 4
DRIVERS = ["thread", "process"]

pytestmark = needs_kernel_faults()


def fail(offset: int, length: int) -> bytes:
    raise LookupError(f"no page at {offset}")


def returns_too_little(offset: int, length: int) -> bytes:
    return b"x"


def error_at(region: Region, offset: int) -> PagePoisonedError:
    with pytest.raises(PagePoisonedError) as caught:
        region.read(offset, 1)
    return caught.value


def errors_with(driver: str, source: CallableSource) -> list[Exception]:
    with Userfaultfd() as uffd, Region.anonymous(PAGES * 4096) as region:
        handler = Handler(uffd, driver=driver)  # type: ignore[arg-type]
        handler.serve(region, source)
        handler.start()
        errors: list[Exception] = [
            error_at(region, offset) for offset in range(0, region.length, 4096)
        ]
        with pytest.raises(HandlerError) as caught:
            handler.stop()
    return [*errors, caught.value]


@pytest.mark.parametrize("driver", DRIVERS)
def test_cause_of_each_page(driver: str) -> None:
    *lost, _ = errors_with(driver, CallableSource(fail))
    causes = [str(error.__cause__) for error in lost]
    assert causes == [f"no page at {offset}" for offset in range(0, PAGES * 4096, 4096)]


def kept_errors() -> None:
    """Whoever keeps the errors, with their tracebacks, keeps no descriptor of the engine."""
    for driver in DRIVERS:
        for source in (CallableSource(fail), CallableSource(returns_too_little)):
            before = os.listdir("/proc/self/fd")
            errors = errors_with(driver, source)
            assert os.listdir("/proc/self/fd") == before
            assert len(errors) == PAGES + 1


def test_kept_errors() -> None:
    run_child(kept_errors, budget_s=30)


NOBODY = "no started handler of driver='inline' serves it"
SOMEBODY = "that serves it now"
TRACKING = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM


def hint_of(access: Callable[[], object]) -> str:
    with pytest.raises(UffdOSError) as caught:
        access()
    return caught.value.hint


def registered_only(uffd: Userfaultfd, region: Region) -> str:
    uffd.register(region)
    return hint_of(lambda: region.read(0, 1))


def protected_only(uffd: Userfaultfd, region: Region) -> str:
    region.fill(1)
    uffd.register(region, mode=RegisterMode.WP)
    uffd.writeprotect(region.start, region.length)
    return hint_of(lambda: region.write(0, b"new"))


def not_started(uffd: Userfaultfd, region: Region) -> str:
    with Handler(uffd, driver="inline", autostart=False) as handler:
        handler.serve(region, ZeroSource())
        return hint_of(lambda: region.read(0, 1))


def unserved_again(uffd: Userfaultfd, region: Region) -> str:
    """Another part is served still."""
    size = region.page_size
    with Handler(uffd, driver="inline") as handler:
        handler.serve(region, ZeroSource())
        handler.unserve(region, 0, size)
        uffd.register(region[:size])
        region.read(size, 1)
        return hint_of(lambda: region.read(0, 1))


def started_since(uffd: Userfaultfd, region: Region) -> str:
    """Between the access and the look at its address a handler was started."""
    with Handler(uffd, driver="inline") as handler:
        handler.serve(region, ZeroSource())
        with pytest.raises(UffdOSError) as caught:
            _memory.raise_lost("read", region.start)
        return caught.value.hint


REASONS = {
    registered_only: NOBODY,
    protected_only: NOBODY,
    not_started: NOBODY,
    unserved_again: NOBODY,
    started_since: SOMEBODY,
}


def reasons(name: str) -> None:
    for access, reason in REASONS.items():
        with (
            closing(memory_of(name)) as memory,
            Userfaultfd(features=Feature.SIGBUS | TRACKING) as uffd,
        ):
            hint = access(uffd, memory.pages(2))
            assert reason in hint, (access.__name__, hint)


@needs(Feature.SIGBUS | TRACKING)
@pytest.mark.parametrize("name", memory_params())
def test_asks_who_serves_the_address(name: str) -> None:
    run_child(reasons, name, budget_s=30)


def served_again_and_again() -> None:
    """A region keeps one way to ask a handler, however often it is served."""
    with Userfaultfd() as uffd, Region.anonymous(4096) as region, Handler(uffd) as handler:
        for _ in range(3):
            handler.serve(region, ZeroSource())
            handler.unserve(region)
        assert len(region._why_lost) == 1


def test_served_again_and_again() -> None:
    run_child(served_again_and_again)
