"""Sources that hold up whoever reads them, for good: stop() returns, and nobody reads zeros."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from pyuffd import BufferSource, Feature, Handler, HandlerError, Region, Userfaultfd
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import is_lost, wait_for_stalled
from tests.process._pitfalls import EVENTS

LIMIT_S = 0.5
# Sealing, joining and the rest, on a busy machine.
REST_S = 5.0
DRIVERS = ("native", "thread")


@dataclass
class Stuck:
    """A handler whose source is memory that another userfaultfd never fills."""

    driver: str
    memory: str
    features: Feature

    def __post_init__(self) -> None:
        self.pages = memory_of(self.memory)
        self.source, self.region = self.pages.pages(4), self.pages.pages(4)
        self.never = Userfaultfd()
        view = self.source.memoryview()
        self.uffd = Userfaultfd(features=self.features)
        self.handler = Handler(self.uffd, driver=self.driver)  # type: ignore[arg-type]
        self.handler.serve(self.region, BufferSource(view))
        self.never.register(self.source)
        self.handler.start()

    def reading(self, page: int) -> Task[bool]:
        """Begin to read a page, and see whether it is lost."""
        size = self.region.page_size
        return Task(is_lost, self.region, page * size, size)


def check_stop(driver: str, memory: str, features: int) -> None:
    stuck = Stuck(driver, memory, Feature(features))
    reader = stuck.reading(1)
    wait_for_stalled(stuck.never, 1)
    began = time.monotonic()
    with pytest.raises(HandlerError) as caught:
        stuck.handler.stop(timeout_s=LIMIT_S)
    assert time.monotonic() - began < LIMIT_S + REST_S
    assert caught.value.start == stuck.region.start + stuck.region.page_size
    assert reader.result(), "zeros"
    assert is_lost(stuck.region), "a page nobody asked for"


@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize("features", [Feature(0), EVENTS], ids=["no-events", "events"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_stop(driver: str, memory: str, features: Feature) -> None:
    run_child(check_stop, driver, memory, int(features), budget_s=20)


def test_timeout_is_checked() -> None:
    with Userfaultfd() as uffd, Handler(uffd) as handler, Region.anonymous(4096):
        with pytest.raises(ValueError, match="-1"):
            handler.stop(timeout_s=-1)
        handler.stop(timeout_s=0)
