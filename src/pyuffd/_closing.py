"""What objects that own something share: no copies, closing under their users (layer L1)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ClassVar, NoReturn

log = logging.getLogger(__name__)


def attach(exc: BaseException, error: BaseException, what: str) -> None:
    """Keep `error`, which came while the one of a with statement's body was on its way, with it.

    It is logged, a note of `exc` says it, and it is the last of its `__context__` chain.
    """
    if error is exc:
        return
    cause = error.__cause__
    because = "" if cause is None else f" (because of {type(cause).__name__}: {cause})"
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


class CloseCallbacks(SoleOwner):
    """Mixin: others may ask to be told before the object goes away; handlers stop there."""

    _before_close: list[Callable[[], None]]

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` when closing begins, newest first; handlers stop here."""
        self._before_close.append(callback)

    def forget_on_close(self, callback: Callable[[], None]) -> None:
        """Take back an `on_close`; unknown callbacks are ignored."""
        if callback in self._before_close:
            self._before_close.remove(callback)

    def _run_before_close(self) -> None:
        """Call them all; the first exception is raised when that is done."""
        first: BaseException | None = None
        while self._before_close:
            try:
                self._before_close.pop()()
            except BaseException as error:  # the others must be told all the same
                first = first or error
        if first is not None:
            raise first
