"""What every call of the C engine needs: the engine, alive, and names for C (layer L4)."""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

from pyuffd import _left
from pyuffd._closing import SoleOwner
from pyuffd._errors import ClosedError, raise_errno
from pyuffd._latch import RLock
from pyuffd._shim import ffi, lib
from pyuffd.handlers._types import RangeId


class EngineLife:
    """The C engine's memory, freed when no call and no thread is inside the engine.

    The garbage collector finalizes the members of a circle in any order, also those that a
    destructor has handed to another thread before. An engine with an owner outlives that: its
    owner ends it.
    """

    def __init__(self) -> None:
        self.place = ffi.new("struct uffd_engine **")  # C notes the engine here
        self.is_over = False  # no call is inside, and none will come
        self._is_owned = self._is_freed = False
        self._pointer: weakref.ref[Any] | None = None
        self._lock = RLock()
        # Modules may be gone before a destructor runs.
        self._tidy = _left.tidy
        self._is_exiting = sys.is_finalizing
        self._discard = lib.uffd_engine_discard  # last: the destructor needs all of these

    def pointer(self) -> Any:
        """Return the pointer for calls; each holds a reference, and the last one lets it end."""
        pointer = ffi.gc(self.place[0], self._pointer_is_gone)
        self._pointer = weakref.ref(pointer)
        return pointer

    def own(self) -> None:
        """Note that somebody will call `let_go`."""
        self._is_owned = True

    def let_go(self) -> None:
        """Note that the owner makes no more calls; other threads may be inside one."""
        self._is_owned = False
        if self._is_let_go():
            self._end()

    def _pointer_is_gone(self, pointer: object) -> None:
        # Python drops an exception that a signal handler raises in here: so nothing is only noted
        # here, and `free_if_deserted` looks again.
        del pointer
        if self._is_let_go():
            self._end()

    def _is_let_go(self) -> bool:
        """Whether nobody owns it, and no call can be made."""
        is_gone = self._pointer is not None and self._pointer() is None
        return is_gone and not self._is_owned

    def _end(self) -> None:
        # The last pointer may go long after the handler's end: free-threaded Python lets the thread
        # that made it drop what another one released, when it runs Python code again.
        if self.free_if_deserted():
            self._tidy()

    def free_if_deserted(self) -> bool:
        """Free it if it is over; return whether it is freed."""
        # At the interpreter's exit the thread that holds the lock has ended, or is still in C.
        if self._is_exiting() and not self._lock.acquire(blocking=False):
            return False
        with self._lock:
            if not self.is_over:
                self.is_over = self._is_let_go()
            if self.is_over and not self._is_freed:
                self._is_freed = bool(self._discard(self.place))
            return self._is_freed

    def __del__(self) -> None:
        if hasattr(self, "_discard") and not self._is_owned:
            self.is_over = True
            self._end()


class EngineCalls(SoleOwner):
    """The base of `Engine`: a pointer that is good as long as a call holds it."""

    life: EngineLife
    _pointer: Any

    def _engine(self) -> Any:
        # The garbage collector may end it before the object that would stop it.
        pointer = self._pointer  # once: another thread, or a signal handler, may end it meanwhile
        if pointer is None or self.life.is_over:
            raise ClosedError("this handler has stopped")
        return pointer


def range_ref(served: RangeId) -> Any:
    """Return a range's name for C."""
    return ffi.new("struct uffd_range_ref *", (served.space, served.number, served.start))


def pointer_to(address: int) -> Any:
    """Return a pointer for C."""
    return ffi.cast("void *", address)


class Dropping(NamedTuple):
    """Memory of this process that is registered, dropped, and served by a helper process."""

    fd: int
    start: int
    length: int
    mode: int
    shared: bool

    def send(self, sock: int, message: bytes) -> None:
        """Register and drop it, and send the message that has it served."""
        row = (self.fd, self.shared, self.start, self.length, self.mode)
        dropping = ffi.new("struct uffd_dropping *", row)
        code = lib.uffd_register_dropped(dropping, sock, message, len(message))
        if code:
            raise_errno("UFFDIO_REGISTER", -code, self.start, self.length, mode=self.mode)
