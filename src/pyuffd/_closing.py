"""What `Userfaultfd` and `Region` share about being closed under their users (layer L1)."""

from __future__ import annotations

from collections.abc import Callable


class CloseCallbacks:
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
