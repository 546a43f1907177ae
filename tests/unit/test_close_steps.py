"""The steps by which an object is closed: none is lost, however often closing is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from pyuffd._closing import CloseSteps

SOON_S = 5.0


class Injected(BaseException):
    """As from a signal handler."""


def steps_of(*calls: Callable[[], object]) -> CloseSteps:
    steps = CloseSteps()
    for call in calls:
        steps.add(call)
    return steps


def test_the_newest_comes_first_and_each_comes_once() -> None:
    done: list[int] = []
    steps = steps_of(*(partial(done.append, number) for number in range(3)))
    assert steps
    steps.close()
    steps.close()
    assert done == [2, 1, 0]
    assert not steps


@pytest.mark.parametrize("at", range(3))
def test_an_interrupted_close_is_continued(at: int) -> None:
    done: list[int] = []
    times = [0, 0, 0]

    def step(number: int) -> None:
        times[number] += 1
        if (number, times[number]) == (at, 1):
            raise Injected
        done.append(number)

    steps = steps_of(*(partial(step, number) for number in range(3)))
    with pytest.raises(Injected):
        steps.close()
    assert done == [number for number in (2, 1, 0) if number > at]
    steps.close()
    assert done == [2, 1, 0]
    assert times[at] == 2


def test_an_exception_of_a_signal_handler_is_raised_when_all_is_closed() -> None:
    done: list[str] = []
    times = iter([TimeoutError("of a signal handler"), None])

    def step() -> None:
        if (error := next(times)) is not None:
            raise error
        done.append("second")

    steps = steps_of(partial(done.append, "first"), step)
    with pytest.raises(TimeoutError, match="of a signal handler"):
        steps.close()
    assert done == ["second", "first"]
    assert not steps


def test_a_step_that_fails_for_good_keeps_nothing_else_open() -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError(5, "cannot be closed")

    steps = steps_of(partial(done.append, "first"), fail)
    with pytest.raises(OSError, match="cannot be closed"):
        steps.close()
    steps.close()
    assert done == ["first"]


def test_a_block_that_raises_closes_what_was_made() -> None:
    done: list[str] = []
    with CloseSteps() as kept:
        kept.add(partial(done.append, "kept"))
    assert not done

    def fail() -> None:
        raise OSError(5, "cannot be closed")

    with pytest.raises(ValueError, match="of the block") as caught, CloseSteps() as steps:
        steps.add(partial(done.append, "made"))
        steps.add(fail)
        raise ValueError("of the block")
    assert done == ["made"]
    assert "cannot be closed" in caught.value.__notes__[0]


def test_a_signal_handler_may_close_it_meanwhile() -> None:
    done: list[str] = []
    steps = steps_of(partial(done.append, "first"))

    def interrupted() -> None:
        done.append("second")
        if len(done) == 1:
            steps.close()

    steps.add(interrupted)
    steps.close()
    assert done == ["second", "second", "first"]


def test_a_second_thread_waits_for_the_first() -> None:
    begun, goes_on = threading.Event(), threading.Event()
    done: list[str] = []

    def slow() -> None:
        begun.set()
        goes_on.wait(SOON_S)
        done.append("slow")

    steps = steps_of(slow)
    first = threading.Thread(target=steps.close)
    first.start()
    assert begun.wait(SOON_S)

    def close() -> None:
        steps.close()
        done.append("second")

    second = threading.Thread(target=close)
    second.start()
    goes_on.set()
    for thread in (first, second):
        thread.join(SOON_S)
    assert done == ["slow", "second"]
