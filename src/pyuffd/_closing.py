"""Base classes of objects that own resources: no copies, and callbacks before close (layer L1)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import ClassVar, NoReturn, Self, TypeVar

from pyuffd._describe import described, text_of
from pyuffd._dropped import close_dropped
from pyuffd._latch import RLock

log = logging.getLogger(__name__)

T = TypeVar("T")


def attach(exc: BaseException, error: BaseException, what: str) -> None:
    """Keep `error`, raised by a context manager's exit, with `exc`, raised by the body.

    `error` is logged, added to `exc` as a note, and put at the end of the `__context__` chain of
    `exc`.
    """
    if error is exc:
        return
    cause = error.__cause__
    because = "" if cause is None else f" (because of {described(cause)})"
    if log.hasHandlers():  # otherwise logging writes to stderr, where the traceback has it too
        log.error("%s: %s%s", what, text_of(error), because)
    exc.add_note(f"and {what}: {text_of(error)}{because}")
    # Python has made `exc` the context of `error`, which would make a circle.
    error.__context__ = None
    seen = {id(error)}
    last = exc
    while last.__context__ is not None and id(last) not in seen:
        seen.add(id(last))
        last = last.__context__
    if id(last) not in seen:
        last.__context__ = error


def alive(members: Iterable[T]) -> list[T]:
    """Return what is in a WeakSet or in a WeakKeyDictionary, while other threads add to it."""
    while True:
        try:
            return list(members)
        except RuntimeError:  # before Python 3.14 their iterators raise it then
            continue


class SoleOwner:
    """Mixin for an object that owns a resource: it can be neither copied nor pickled.

    A copy would be a second owner, and would close or unmap the resource under the first. In
    another process an address or a descriptor means something else, or nothing.
    """

    _instead: ClassVar[str]  # the part of the TypeError's text that says what to do

    def __reduce__(self) -> NoReturn:
        """Refuse copy.copy, copy.deepcopy and pickle, unless a subclass overrides this."""
        raise TypeError(
            f"{type(self).__name__} objects cannot be copied or pickled: {self._instead}"
        )


class Closing(SoleOwner):
    """Mixin: a context manager that closes the object; its errors are kept with the body's."""

    _failed: ClassVar[str]  # what an error of close() means, as "closing the region failed"

    def close(self) -> None:
        """Close what the object owns."""
        raise NotImplementedError

    def _check_usable(self) -> None:
        """Raise ClosedError if the object is closed, or belongs to another process."""

    def __enter__(self) -> Self:
        self._check_usable()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as error:
            if exc is None:
                raise
            attach(exc, error, self._failed)


class CloseSteps:
    """The steps by which an object is closed, the newest first.

    A step is forgotten when it has been done. So if a signal handler raises inside `close`, the
    next `close` continues with the step that was interrupted, which must bear being done again.
    (`contextlib.ExitStack` forgets a step before it begins.) In a `with` statement it closes what
    was made if the block raises, and does nothing otherwise.

    Threads: safe; a second one waits for the first.
    """

    def __init__(self) -> None:
        self._left: list[Callable[[], object]] = []
        self._lock = RLock()

    def __bool__(self) -> bool:
        """Whether there is something to be done."""
        return bool(self._left)

    def add(self, step: Callable[[], object]) -> None:
        """Do `step` when closing begins, before the steps that were added earlier."""
        self._left.append(step)

    def close(self) -> None:
        """Do what is left, then raise the first error.

        A step that raises an Exception is done once more: the exception was a signal handler's, or
        the step has failed, and is given up. What is no Exception ends this call.
        """
        first: Exception | None = None
        with self._lock:
            while True:
                if not self._left:
                    break
                step = self._left[-1]
                try:
                    step()
                except Exception as error:
                    first = first or error
                    with suppress(Exception):
                        step()
                with suppress(ValueError):  # a signal handler called this and has done it
                    self._left.remove(step)
        if first is not None:
            raise first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            return
        try:
            self.close()
        except Exception as error:
            attach(exc, error, "closing what was made failed")


class CloseCallbacks(Closing):
    """Mixin: callbacks before the object is closed, for handlers that use it."""

    _before_close: list[Callable[[], None]]

    def _on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` when closing begins, the newest first.

        If the callback, or the object whose bound method it is, has a true attribute `must_end`
        after the call, an exception came before it was done: the object stays open, and the next
        close calls it again.
        """
        self._before_close.append(callback)

    def _forget_on_close(self, callback: Callable[[], None]) -> None:
        """Undo an `_on_close`; unknown callbacks are ignored."""
        with suppress(ValueError):
            self._before_close.remove(callback)

    def _run_before_close(self) -> None:
        """Call all callbacks, then raise the first exception."""
        first: BaseException | None = None
        for callback in reversed(self._before_close.copy()):
            try:
                callback()
            except BaseException as error:  # the other callbacks must be called too
                first = first or error
            # Only now, so that an interrupted callback is called again.
            if not _must_end(callback):
                self._forget_on_close(callback)
        if first is not None:
            raise first

    def _close_dropped(self) -> None:
        """Close, for a destructor: a callback may wait for another thread."""
        if self._before_close:
            close_dropped(self.close)
        else:
            self.close()

    def _may_close(self) -> bool:
        """Whether every callback has done its work."""
        return not any(_must_end(callback) for callback in self._before_close)


def _must_end(callback: Callable[[], None]) -> bool:
    return bool(getattr(getattr(callback, "__self__", callback), "must_end", False))
