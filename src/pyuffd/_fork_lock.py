"""A lock for what is held for a moment, which a fork does not leave held (layer L1)."""

from __future__ import annotations

import os
from typing import final

from pyuffd._latch import RLock


@final
class ForkLock:
    """Use as ``with lock.now:``, at the level of a module: it is never freed.

    A thread that does not exist in the child of a fork may have held the parent's lock. So the
    child has another one.
    """

    now: RLock

    def __init__(self) -> None:
        self._start_anew()
        os.register_at_fork(after_in_child=self._start_anew)

    def _start_anew(self) -> None:
        self.now = RLock()
