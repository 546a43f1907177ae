"""stop() interrupted by a signal's exception: it raises soon, and the promise holds."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pyuffd import Feature, Handler, PageSource, Region, Userfaultfd
from pyuffd.handlers import _ending, _handler
from pyuffd.handlers.process import _link
from pyuffd.testing import child_pids
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._faults import Task
from tests.kernel._serving import is_lost, open_fds, wait_for_stalled, wait_until
from tests.process._pitfalls import with_and_without_events

PAGES = 16
SLOW_S = 4.0
# Tenths of a second, on a busy machine.
SOON_S = 2.0
# An end that was cut short waits this long for a source; the second signal comes before that.
LONG_GRACE_S = 2.0
SECOND_S = 0.1
AT_ONCE_S = 1.0

DRIVERS = ("thread", "process")
WAYS = ("stop", "stop-twice", "exit", "close", "uffd-close")


class Slow:
    """Data, and one slow page."""

    length = PAGES * PAGE

    def read(self, offset: int, length: int) -> bytes:
        if offset == 5 * PAGE:
            time.sleep(SLOW_S)
        return b"d" * length


@contextlib.contextmanager
def interrupted(after_s: float, times: int = 1) -> Iterator[None]:
    """Send SIGINT to this process some time later."""

    def send() -> None:
        for _ in range(times):
            time.sleep(after_s)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        yield
    assert time.monotonic() - began < after_s * times + SOON_S


@contextlib.contextmanager
def twice(after_s: float) -> Iterator[None]:
    """Interrupt this process, and again when that was noticed: stop() raises at once."""
    noticed: list[float] = []

    def notice(number: int, frame: object) -> None:
        noticed.append(time.monotonic())
        if len(noticed) == 1:
            signal.setitimer(signal.ITIMER_REAL, SECOND_S)
        raise KeyboardInterrupt

    for module in (_ending, _handler):
        vars(module)["GRACE_S"] = LONG_GRACE_S
    _link.HURRY_LIMIT_S = LONG_GRACE_S + SOON_S
    signal.signal(signal.SIGALRM, notice)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    with pytest.raises(KeyboardInterrupt):
        yield
    left = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(noticed) == 2
    assert left - noticed[1] < AT_ONCE_S


def end(way: str, handler: Handler, uffd: Userfaultfd) -> None:
    ways: dict[str, Callable[[], object]] = {
        "stop": handler.stop,
        "stop-twice": handler.stop,
        "exit": lambda: handler.__exit__(None, None, None),
        "close": handler.close,
        "uffd-close": uffd.close,
    }
    ways[way]()


def check_interrupted(driver: str, way: str, features: int) -> None:
    source: PageSource = Slow()
    before, tasks = open_fds(), set(os.listdir("/proc/self/task"))
    uffd, region = Userfaultfd(features=Feature(features)), Region.anonymous(PAGES * PAGE)
    handler = Handler(uffd, driver=driver, stall_timeout_s=60)  # type: ignore[arg-type]
    handler.serve(region, source)
    handler.start()
    reader = Task(is_lost, region, 5 * PAGE, PAGE)
    wait_for_stalled(uffd, 1)
    with twice(0.3) if way == "stop-twice" else interrupted(0.3):
        end(way, handler, uffd)
    handler.stop()  # only waiting is left, and there is no failure
    uffd.close()
    assert reader.result(), "zeros for a page that was asked for"
    assert is_lost(region, 9 * PAGE, PAGE), "zeros for a page that was not"
    region.close()
    assert not child_pids()
    # The source returns eventually, and so does its thread.
    wait_until(lambda: set(os.listdir("/proc/self/task")) <= tasks, "all threads end")
    Userfaultfd().close()  # the next one tidies up
    assert open_fds() <= before


@pytest.mark.crossing
@with_and_without_events
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_interrupted(driver: str, way: str, features: Feature) -> None:
    run_child(check_interrupted, driver, way, int(features), budget_s=20)
