"""What objects that own something share: no copies, closing under their users (layer L1)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar, NoReturn, Self

log = logging.getLogger(__name__)


def attach(exc: BaseException, error: BaseException, what: str) -> None:
    """Keep `error`, which came while the one of a with statement's body was on its way, with it.

    It is logged, a note of `exc` says it, and it is the last of its `__context__` chain.
    """
    if error is exc:
        return
    cause = error.__cause__
    because = "" if cause is None else f" (because of {type(cause).__name__}: {cause})"
    if log.hasHandlers():  # else its last resort is stderr, where the traceback says it
        log.error("%s: %s%s", what, error, because)
    exc.add_note(f"and {what}: {error}{because}")
    # Python has made `exc` the context of `error`: that would be a circle.
    error.__context__ = None
    seen = {id(error)}
    last = exc
    while last.__context__ is not None and id(last) not in seen:
        seen.add(id(last))
        last = last.__context__
    if id(last) not in seen:
        last.__context__ = error


class SoleOwner:
    """Mixin: what the object owns ends once, so it is neither copied nor pickled.

    A copy would be a second owner, which closes or unmaps under the first; unpickled in another
    process, an address or a descriptor is that of something else, or of nothing.
    """

    _instead: ClassVar[str]  # the sentence of the TypeError that says what to do

    def __reduce__(self) -> NoReturn:
        """Refuse copy.copy, copy.deepcopy and pickle; a subclass may know better."""
        raise TypeError(
            f"{type(self).__name__} objects cannot be copied or pickled: {self._instead}"
        )


class Closing(SoleOwner):
    """Mixin: a context manager that closes; an error of that is kept with the body's."""

    _what: ClassVar[str]  # is closed, for the note

    def close(self) -> None:
        """Close what the object owns."""
        raise NotImplementedError

    def __enter__(self) -> Self:
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
            attach(exc, error, f"closing the {self._what} failed")


class CloseCallbacks(Closing):
    """Mixin: others may ask to be told before the object goes away; handlers stop there."""

    _before_close: list[Callable[[], None]]

    def _on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` when closing begins, newest first; handlers stop here.

        One with an attribute `must_end`, or the bound method of an object that has it, is called
        again by the next close as long as that is true: nothing is closed after an exception that
        came before it was done.
        """
        self._before_close.append(callback)

    def _forget_on_close(self, callback: Callable[[], None]) -> None:
        """Take back an `on_close`; unknown callbacks are ignored."""
        if callback in self._before_close:
            self._before_close.remove(callback)

    def _run_before_close(self) -> None:
        """Call them all; the first exception is raised when that is done."""
        first: BaseException | None = None
        for callback in reversed(self._before_close.copy()):
            try:
                callback()
            except BaseException as error:  # the others must be told all the same
                first = first or error
            # Only now: what was interrupted is called again.
            if not _must_end(callback):
                self._forget_on_close(callback)
        if first is not None:
            raise first

    def _may_close(self) -> bool:
        """Whether nobody is left who was interrupted before it had ended."""
        return not any(_must_end(callback) for callback in self._before_close)


def _must_end(callback: Callable[[], None]) -> bool:
    return bool(getattr(getattr(callback, "__self__", callback), "must_end", False))
