"""Each lost page's error has the exception of its source as its cause, and keeps nothing open."""

from __future__ import annotations

import os

import pytest

from pyuffd import CallableSource, Handler, HandlerError, PagePoisonedError, Region, Userfaultfd
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child

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
