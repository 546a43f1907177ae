"""What a Handler decides before any system call, and what it reports."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Iterator
from typing import Any, cast

import pytest

from pyuffd import Feature, Handler, HandlerError, Latency, PageState, Userfaultfd, ZeroSource
from pyuffd.handlers import _checks
from pyuffd.handlers._checks import handler_error
from pyuffd.handlers._types import Failure, FailureStage


class FakeUserfaultfd:
    """A pipe's end with the features of a userfaultfd; registering it would fail."""

    def __init__(self, fd: int, features: Feature) -> None:
        self._fd = fd
        self.features = features
        self.adopted = False
        self.owner_pid = os.getpid()
        self.callbacks: list[object] = []
        self._memory_key = "a pipe's"

    def fileno(self) -> int:
        return self._fd

    def _registered_ranges(self) -> list[tuple[int, int]]:
        return []

    def _hold_open(self, user: object) -> None:
        """Do nothing: it outlives the handler."""

    def _let_close(self, user: object) -> None:
        """Do nothing, as above."""

    def _leave_behind(self, left: object) -> None:
        """Do nothing, as above."""

    def _claim_events(self, owner: object) -> None:
        """Do nothing: no other code reads a pipe."""

    def _release_events(self, owner: object) -> None:
        """Do nothing, as above."""

    def _on_close(self, callback: object) -> None:
        self.callbacks.append(callback)

    def _forget_on_close(self, callback: object) -> None:
        if callback in self.callbacks:
            self.callbacks.remove(callback)


@pytest.fixture
def pipe() -> Iterator[int]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    yield read
    os.close(read)
    os.close(write)


def make(fd: int, features: Feature = Feature(0), **options: Any) -> Handler:  # noqa: B008
    return Handler(cast("Userfaultfd", FakeUserfaultfd(fd, features)), **options)


@pytest.mark.parametrize(
    ("features", "asked", "driver"),
    [
        (Feature(0), "auto", "native"),
        (Feature.THREAD_ID, "auto", "native"),
        (Feature.SIGBUS, "auto", "inline"),
        (Feature(0), "native", "native"),
        (Feature.SIGBUS | Feature.THREAD_ID, "inline", "inline"),
    ],
)
def test_driver(pipe: int, features: Feature, asked: str, driver: str) -> None:
    with make(pipe, features, driver=asked, autostart=False) as handler:
        assert handler.driver == driver
        assert driver in repr(handler)
        assert "not started" in repr(handler)


@pytest.mark.parametrize(
    ("features", "options"),
    [
        (Feature(0), {"driver": "inline"}),
        (Feature.SIGBUS, {"driver": "native"}),
        (Feature(0), {"driver": "process of elimination"}),
        (Feature(0), {"driver": ""}),
        (Feature(0), {"workers": 0}),
        (Feature(0), {"stall_timeout_s": 0}),
        (Feature(0), {"on_error": "zeros"}),
        (Feature(0), {"prefetch": -1}),
        (Feature(0), {"spin_us": -0.1}),
        (Feature(0), {"cpus": []}),
        (Feature(0), {"cpus": [-1]}),
        (Feature(0), {"cpus": [1 << 20]}),
        (Feature.SIGBUS, {"on_error": "stall"}),
        (Feature.SIGBUS, {"spin_us": 0}),
        (Feature.SIGBUS, {"cpus": [0]}),
        (Feature.EVENT_REMOVE | Feature.SIGBUS, {}),
    ],
    ids=str,
)
def test_bad_options(pipe: int, features: Feature, options: dict[str, Any]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError):
        make(pipe, features, **options)
    assert set(os.listdir("/proc/self/fd")) == before


def test_values_in_hex(pipe: int) -> None:
    with pytest.raises(ValueError, match="-0x1000"):
        make(pipe, prefetch=-4096)


def test_blocking_descriptor(pipe: int) -> None:
    os.set_blocking(pipe, True)
    with pytest.raises(ValueError):
        make(pipe)
    make(pipe, Feature.SIGBUS).stop()


def test_tells_and_forgets_the_userfaultfd(pipe: int) -> None:
    uffd = FakeUserfaultfd(pipe, Feature(0))
    handler = Handler(cast("Userfaultfd", uffd))
    assert uffd.callbacks == [handler._at_close]
    handler.stop()
    assert uffd.callbacks == []
    handler.stop()


def test_unstopped_handler_warns(pipe: int) -> None:
    uffd = FakeUserfaultfd(pipe, Feature(0))
    handler = Handler(cast("Userfaultfd", uffd))
    uffd.callbacks.clear()
    with pytest.warns(ResourceWarning):
        handler.__del__()
    assert "stopped" in repr(handler)


def test_percentiles() -> None:
    latency = Latency(((10, 50), (20, 45), (80, 4), (1000, 1)))
    assert latency.count == 100
    percentiles = {0: 10, 50: 10, 51: 20, 95: 20, 99: 80, 99.5: 1000, 100: 1000}
    assert {percent: latency.percentile(percent) for percent in percentiles} == percentiles
    assert Latency(()).percentile(50) == 0
    assert Latency(()).count == 0


def test_page_states_fit_in_a_byte() -> None:
    assert int(PageState.ABSENT) == 0
    assert len({int(state) for state in PageState}) == 7
    assert all(0 <= state < 256 for state in PageState)


@pytest.mark.parametrize("stage", list(FailureStage))
def test_failure_error(stage: FailureStage) -> None:
    failure = Failure(3, 0xABC000, 0x1000, errno.ENODATA, stage)
    error = handler_error(failure, None)
    assert isinstance(error, HandlerError)
    assert (error.start, error.length) == (0xABC000, 0x1000)
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == errno.ENODATA
    assert "0xabc000" in str(error)
    assert "3 pages" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.start, copy.length) == (str(error), error.start, error.length)


def test_a_failure_begins_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of huge pages that ran out it said "Resource temporarily unavailable"."""
    looked: list[tuple[int, int]] = []

    def why(code: int, address: int, pid: int) -> str:
        looked.append((address, pid))
        return "no huge page was free for it: 0 of 2 are"

    monkeypatch.setattr(_checks, "why_unresolved", why)
    failure = Failure(2, 0xABC000, 0x1000, errno.EAGAIN, FailureStage.RESOLVE)
    assert str(handler_error(failure, None, 7)) == (
        "a fault could not be resolved at 0xabc000: no huge page was free for it: 0 of 2 are"
        " (Resource temporarily unavailable; 2 pages in all)"
    )
    assert looked == [(0xABC000, 7)]
    # Nobody knows whose memory it is: what this process has at the address tells nothing.
    handler_error(failure, None)
    assert len(looked) == 1


def test_failure_without_a_place() -> None:
    error = handler_error(Failure(1, 0, 0, errno.EBADF, FailureStage.READ), None)
    assert (error.start, error.length) == (None, None)


def test_closed_handler_refuses(pipe: int) -> None:
    handler = make(pipe)
    handler.stop()
    region: Any = type("Range", (), {"start": 0x10000, "length": 4096, "page_size": 4096})
    for call in (handler.start, lambda: handler.serve(region, ZeroSource())):
        with pytest.raises(ValueError):  # ClosedError is one
            call()
    assert handler.recent_faults() == []
