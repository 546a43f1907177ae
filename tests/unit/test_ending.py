"""The end of a handler, when the interpreter exits and ends other threads where they are."""

from __future__ import annotations

import sys

import pytest

from pyuffd.handlers._ending import Ending


def ending_of(done: list[int]) -> Ending:
    return Ending("end", lambda _: done.append(1), lambda _: None, lambda: None, 1.0)


@pytest.mark.parametrize("is_over", [True, False])
def test_exit_does_not_wait_for_a_thread_that_ended_with_the_lock(
    is_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    ending = ending_of(done)
    if is_over:
        ending.wait()
    ending._work_lock.acquire()
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    ending.wait()
    assert done == [1]
