"""The order and the priority in which a `Drain` does its work."""

from __future__ import annotations

import os
import threading

import pytest

from pyuffd.snapshot import _drain
from pyuffd.snapshot._drain import Drain


def test_what_is_first_has_the_priority_of_the_program() -> None:
    """Somebody waits for it; pieces go behind all others."""
    found: list[tuple[str, int]] = []

    def note(what: str) -> int:
        found.append((what, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        return 0

    own = os.getpriority(os.PRIO_PROCESS, 0)
    drain = Drain(note, lambda: None, ["piece"], threads=1, held=True)
    drain.start()
    assert drain.first([lambda: note("first")] * 2).wait(10)
    drain.hold(False)
    assert drain.wait(10)
    assert found[:2] == [("first", own)] * 2
    assert found[2][0] == "piece"
    assert own < found[2][1] or own == found[2][1] == 19


def test_one_thread_does_the_first_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would be in the way of who touches the memory first; then all work at once."""
    # A gentle thread hardly runs on a busy machine, and those without a GIL yield while they wait.
    monkeypatch.setattr(_drain, "be_gentle", lambda: None)
    began, go_on = threading.Event(), threading.Event()
    together = threading.Barrier(3)

    def work(piece: int) -> int:
        if piece == 0:
            began.set()
            assert go_on.wait(10)
        else:
            together.wait(10)
        return 0

    drain = Drain(work, lambda: None, range(4), threads=3)
    drain.start()
    assert began.wait(10)
    assert len(drain._threads) == 1
    go_on.set()
    assert drain.wait(10)
    drain.stop()
    assert drain.error is None


@pytest.mark.parametrize("how", ["fails", "stopped", "nothing"])
def test_an_end_before_the_others_start(how: str) -> None:
    finished: list[bool] = []
    began, go_on = threading.Event(), threading.Event()

    def work(piece: int) -> int:
        began.set()
        assert go_on.wait(10)
        assert how != "fails", "as told"
        return 0

    pieces = range(0 if how == "nothing" else 4)
    drain = Drain(work, lambda: finished.append(True), pieces, threads=3, paused=how == "stopped")
    drain.start()
    if how == "stopped":
        drain.stop()
    elif how == "fails":
        assert began.wait(10)
        go_on.set()
    assert drain.wait(10)
    assert drain.was_stopped == (how != "nothing")
    assert bool(finished) == (how == "nothing")
    assert isinstance(drain.error, AssertionError) == (how == "fails")
