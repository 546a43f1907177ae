"""Signals end a command in an orderly way, whoever swallows the exception they raise."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

# Until a swallowed exception is raised again: what has swallowed it is over by then, as a rule.
AGAIN_S: Final = 0.005


class Ended(BaseException):
    """A signal came that ends this command."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that a shell shows for a program that this signal has ended."""
        return 128 + self.number


class _State:
    """Signals belong to the whole process, and so does this."""

    depth = 0
    last = 0  # the number of the last one that came
    hook = sys.unraisablehook


@contextmanager
def ended_by(*numbers: signal.Signals) -> Iterator[None]:
    """Raise in the block if one of these signals comes: KeyboardInterrupt for SIGINT, else Ended.

    Between any two steps Python may run a finalizer or a callback (`__del__`, weakref, gc), and
    drops what is raised in it. Such an exception is raised again a moment later, and what somebody
    else has swallowed at the end of the block.  A signal that is ignored, as by nohup, or that the
    program handles itself, is left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal is handled here
        return
    before: dict[signal.Signals, Any] = {}
    try:
        _State.depth += 1
        if _State.depth == 1:
            _State.last, _State.hook = 0, sys.unraisablehook
            sys.unraisablehook = _unraisable
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _again)
        for number in numbers:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, _end)
        yield
        if _State.last in before:
            raise _exception(_State.last)
    finally:
        _State.depth -= 1
        if not _State.depth:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = _State.hook
        for each, action in before.items():
            signal.signal(each, action)


def _end(number: int, frame: FrameType | None) -> None:
    _State.last = number
    while frame is not None:
        if frame.f_code is _unraisable.__code__:  # which swallows, too
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
            return
        frame = frame.f_back
    raise _exception(number)


def _again(_number: int, frame: FrameType | None) -> None:
    _end(_State.last, frame)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Ended(number)


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    """Have what was swallowed raised again, and leave everything else to the hook before."""
    ours = what.exc_value
    while ours is not None and not isinstance(ours, KeyboardInterrupt | Ended):
        ours = ours.__context__  # another one may have taken its place
    is_swallowed = ours is not None and _State.last != 0
    if is_swallowed:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
    if not is_swallowed or ours is not what.exc_value:
        _State.hook(what)
