"""Sources that block their reader forever: stop() returns, and no thread reads zeros."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from dataclasses import dataclass

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    Handler,
    HandlerError,
    RangeBusyError,
    Region,
    Userfaultfd,
    _memory,
)
from pyuffd.handlers import _aftermath
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests._memory import PAGE, memory_of, memory_params
from tests.kernel._faults import Task
from tests.kernel._serving import is_lost, thread_names, wait_for_stalled, wait_until
from tests.process._pitfalls import with_and_without_events

pytestmark = needs_kernel_faults()

LIMIT_S = 0.5
# Sealing, joining and the rest, on a busy machine.
REST_S = 5.0
DRIVERS = ("native", "thread")
MAP_AT = 0x100000  # MAP_FIXED_NOREPLACE, not in the mmap module


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
        """Begin to read a page, and check whether it is lost."""
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


@pytest.mark.crossing
@pytest.mark.parametrize("memory", memory_params())
@with_and_without_events
@pytest.mark.parametrize("driver", DRIVERS)
def test_stop(driver: str, memory: str, features: Feature) -> None:
    run_child(check_stop, driver, memory, int(features), budget_s=20)


def test_timeout_is_checked() -> None:
    with Userfaultfd() as uffd, Handler(uffd) as handler, Region.anonymous(4096):
        with pytest.raises(ValueError, match="timeout_s -1 is"):
            handler.stop(timeout_s=-1)
        handler.stop(timeout_s=0)


def check_unserve(driver: str, memory: str) -> None:
    _aftermath.PATIENCE_S = LIMIT_S  # type: ignore[attr-defined]
    stuck = Stuck(driver, memory, Feature(0))
    reader = stuck.reading(1)
    wait_for_stalled(stuck.never, 1)
    began = time.monotonic()
    with pytest.raises(HandlerError, match="BufferSource") as caught:
        stuck.handler.unserve(stuck.region)
    assert time.monotonic() - began < LIMIT_S + REST_S
    assert f"{stuck.region.start + stuck.region.page_size:#x}" in str(caught.value)
    assert reader.result(), "zeros"
    with contextlib.suppress(HandlerError):
        stuck.handler.stop(timeout_s=LIMIT_S)


@pytest.mark.crossing
@pytest.mark.parametrize("memory", memory_params("anon", "shmem", "hugetlb"))
@pytest.mark.parametrize("driver", DRIVERS)
def test_unserve(driver: str, memory: str) -> None:
    run_child(check_unserve, driver, memory, budget_s=20)


def check_left_behind(driver: str) -> None:
    """The thread is named, its descriptor's number is not reused, and it writes nowhere."""
    stuck = Stuck(driver, "anon", Feature(0))
    stuck.reading(1)
    wait_for_stalled(stuck.never, 1)
    with pytest.raises(HandlerError) as caught:
        stuck.handler.stop(timeout_s=LIMIT_S)
    for part in ("BufferSource", "uffd-", "left behind"):
        assert part in str(caught.value)
    fd, start, length = stuck.uffd.fileno(), stuck.region.start, stuck.region.length
    stuck.uffd.close()
    assert os.readlink(f"/proc/self/fd/{fd}") == os.devnull
    with Userfaultfd() as other:
        # UFFDIO_COPY does not check whose registration its target has.
        stuck.region.close()
        _memory.mmap(length, 3, MAP_AT | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0, start)
        with pytest.raises(RangeBusyError, match="may still write there"):
            other.register(start, length)
        stuck.never.zeropage(stuck.source.start + PAGE, PAGE)  # it comes back after all
        wait_until(lambda: not left_threads(), "the thread ends")
        other.register(start, length)
        assert not os.path.exists(f"/proc/self/fd/{fd}")


def left_threads() -> list[str]:
    return [name for name in thread_names() if name.startswith("uffd-h")]


@pytest.mark.parametrize("driver", ["native"])
def test_left_behind(driver: str) -> None:
    run_child(check_left_behind, driver, budget_s=20)
