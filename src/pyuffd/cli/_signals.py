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
    # The command has done what it was to: its exit status says so, whatever comes.
    is_late = False
    ignored: Final[dict[signal.Signals, Any]] = {}  # and what handled them before


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
            _State.last, _State.hook, _State.is_late = 0, sys.unraisablehook, False
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
            if _State.is_late and each != signal.SIGALRM:
                _State.ignored[each] = action
                action = signal.SIG_IGN
            signal.signal(each, action)


def come_too_late() -> None:
    """Let no signal end the command any more, until this process ends or `restore`.

    Right before the step that makes its result complete: then either a signal has ended the command
    and there is no result, or there is one and the exit status says so.
    """
    if not _State.depth:
        return
    _State.is_late = True
    if _State.last:  # it was swallowed just now
        _State.is_late = False
        raise _exception(_State.last)


def restore() -> None:
    """Handle signals as before the command, in a program that goes on."""
    for each, action in _State.ignored.items():
        signal.signal(each, action)
    _State.ignored.clear()


def _end(number: int, frame: FrameType | None) -> None:
    if _State.is_late:
        return
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
