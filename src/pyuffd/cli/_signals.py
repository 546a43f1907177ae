"""End a command cleanly on a signal, even if other code swallows the exception it raises."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

# The delay before a swallowed exception is raised again. The code that swallowed it has usually
# returned by then. The alarm repeats until that is done: one that arrives just before a system call
# that sleeps does not interrupt it.
AGAIN_S: Final = 0.005


class Ended(BaseException):
    """A signal arrived that ends this command."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that a shell shows for a program that this signal has ended."""
        return 128 + self.number


class _State:
    """Shared by the whole process, as signal handlers are."""

    depth = 0
    last = 0  # the number of the last signal that arrived
    is_swallowed = False  # its exception was, and is to be raised again
    hook = sys.unraisablehook
    # The command's result is complete, and its exit status says so, whatever signal arrives now.
    is_late = False
    ignored: Final[dict[signal.Signals, Any]] = {}  # with their former handlers


@contextmanager
def ended_by(*numbers: signal.Signals) -> Iterator[None]:
    """Raise in the block when one of these signals arrives: KeyboardInterrupt or Ended.

    Python may run a finalizer or a callback (`__del__`, weakref, gc) between any two steps, and
    drops an exception raised in it. An exception lost that way is raised again a moment later; one
    that other code swallowed is raised at the end of the block. Signals that are ignored (nohup) or
    that the program handles itself are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    before: dict[signal.Signals, Any] = {}
    try:
        _State.depth += 1
        if _State.depth == 1:
            _State.last, _State.hook, _State.is_late = 0, sys.unraisablehook, False
            _State.is_swallowed = False
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
    """Let no more signals end the command, until `restore` or the end of this process.

    Call it right before the step that completes the result. Then either a signal has ended the
    command and there is no result, or there is a result and the exit status says so.
    """
    if not _State.depth:
        return
    _State.is_late = True
    if _State.last:  # a signal did arrive, and its exception was swallowed
        _State.is_late = False
        raise _exception(_State.last)


def restore() -> None:
    """Restore the signal handlers of before the command, in a program that continues."""
    for each, action in _State.ignored.items():
        signal.signal(each, action)
    _State.ignored.clear()


def _end(number: int, frame: FrameType | None) -> None:
    if _State.is_late:
        return
    _State.last = number
    while frame is not None:
        if frame.f_code is _unraisable.__code__:  # an exception in the hook is swallowed as well
            _raise_again_later()
            return
        frame = frame.f_back
    raise _exception(number)


def _raise_again_later() -> None:
    _State.is_swallowed = True
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)


def _again(_number: int, frame: FrameType | None) -> None:
    if _State.is_swallowed:  # an alarm may be left over
        _State.is_swallowed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        _end(_State.last, frame)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Ended(number)


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    """Have a swallowed exception raised again; pass everything else to the previous hook."""
    ours = what.exc_value
    while ours is not None and not isinstance(ours, KeyboardInterrupt | Ended):
        ours = ours.__context__  # another exception may have replaced it
    is_swallowed = ours is not None and _State.last != 0
    if is_swallowed:
        _raise_again_later()
    if not is_swallowed or ours is not what.exc_value:
        _State.hook(what)
