"""What every call of the C engine needs: the engine, alive, and names for C (layer L4)."""

from __future__ import annotations

import threading
from typing import Any

from pyuffd._closing import SoleOwner
from pyuffd._errors import ClosedError
from pyuffd._shim import ffi, lib
from pyuffd.handlers._types import RangeId


class EngineLife:
    """The C engine's memory, freed when no call and no thread is inside the engine."""

    def __init__(self, place: Any) -> None:
        self._place = place
        self._lock = threading.Lock()
        self.is_unused = self._is_freed = False

    def end(self, pointer: object) -> None:
        """Note that no call is inside and none will come: the last pointer to it is gone."""
        del pointer
        self.is_unused = True
        self.free_if_deserted()

    def free_if_deserted(self) -> bool:
        """Free it if it is unused; return whether it is freed."""
        with self._lock:
            if self.is_unused and not self._is_freed:
                self._is_freed = bool(lib.uffd_engine_discard(self._place))
            return self._is_freed


class EngineCalls(SoleOwner):
    """The base of `Engine`: a pointer that is good as long as a call holds it."""

    life: EngineLife
    _pointer: Any

    def _engine(self) -> Any:
        # The garbage collector may end it before the object that would stop it.
        if self._pointer is None or self.life.is_unused:
            raise ClosedError("this handler has stopped")
        return self._pointer


def range_ref(served: RangeId) -> Any:
    """Return a range's name for C."""
    return ffi.new("struct uffd_range_ref *", (served.space, served.number, served.start))


def pointer_to(address: int) -> Any:
    """Return a pointer for C."""
    return ffi.cast("void *", address)
