"""How long a region's memory stays mapped: its views, its parts, and its end (layer L3)."""

from __future__ import annotations

import builtins
import os
import warnings
import weakref
from threading import get_ident
from typing import TYPE_CHECKING, NoReturn

from pyuffd import _memory
from pyuffd._arguments import check_int, shown
from pyuffd._closing import CloseCallbacks
from pyuffd._errors import ClosedError
from pyuffd._latch import RLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from pyuffd._owned import MappedMemory
    from pyuffd.regions._mapping import Mapping


# By user. The garbage collector unmaps what only garbage refers to, and does not wait for a handler
# that another thread stops: the addresses might be another region's by then.
_kept: dict[int, MappedMemory] = {}
os.register_at_fork(after_in_child=_kept.clear)


class Divisible(CloseCallbacks):
    """The part of `Region` that keeps memory mapped: one mapping, its views and its parts.

    A part is a region whose mapping owns no memory and whose `_whole` is the region it belongs to.
    The whole keeps what ends with the memory: views, and callbacks before close.
    """

    _mapping: Mapping
    _pid: int
    _open: bool

    def _begin(self, mapping: Mapping) -> None:
        """Set everything but `_open`."""
        self._mapping = mapping
        self._pid = os.getpid()
        self._before_close = []
        self._whole: Divisible | None = None
        self._keeps: object = None
        self._closer = 0  # the thread that closes it
        self._served_spans: list[tuple[int, int]] = []
        self._replaced_spans: list[tuple[int, int]] = []
        self._exports: list[weakref.ref[Buffer]] = []  # the buffers that views refer to
        self._exports_lock = RLock()
        self._accesses: list[MappedMemory] = []  # one for each access under way
        self._keepers: set[int] = set()
        self._before_unmap: list[Callable[[], None]] = []
        self._why_lost: list[Callable[[int], BaseException | None]] = []
        self._checks: list[Callable[[int, int], None]] = []

    @property
    def _root(self) -> Divisible:
        """The region that owns the memory."""
        return self if self._whole is None else self._whole

    # Parts

    def _become_part(self, of: Divisible, offset: int, length: int) -> None:
        """Make a part of a region."""
        self._begin(of._mapping.part(offset, length))
        self._whole = of._root
        self._keeps = of  # what serves its memory may end with it
        self._why_lost = self._whole._why_lost
        self._checks = self._whole._checks
        self._open = True

    # A sequence has these by default; they would access each byte separately.
    __iter__ = None
    __contains__ = None
    __reversed__ = None

    @property
    def was_served(self) -> bool:
        """Whether a Handler has served some of it, so that its content may come from there."""
        spans = self._root._served_spans
        start, end = self._mapping.span if spans else (0, 0)
        return any(first < end and start < past for first, past in spans)

    def _note_served(self, offset: int = 0, length: int | None = None) -> None:
        """Note that a Handler has served it, or a part of it."""
        start = self._mapping.start + offset
        span = (start, start + (self._mapping.length if length is None else length))
        if span not in self._root._served_spans:
            self._root._served_spans.append(span)

    def _note_replaced(self) -> None:
        """Note that a file is mapped now where it was: only /proc tells what its pages have."""
        self._root._replaced_spans.append(self._mapping.span)

    @property
    def _is_replaced(self) -> bool:
        spans = self._root._replaced_spans
        start, end = self._mapping.span if spans else (0, 0)
        return any(first < end and start < past for first, past in spans)

    # Python's own view of it

    def memoryview(self) -> builtins.memoryview:
        """Return a view of the memory, without copying.

        The memory stays mapped, even after close(), as long as the view, a slice of it or an array
        over it is alive.

        GIL: held while Python reads or writes through it. Use it on registered memory only if the
            faults are resolved by a native handler or another process.  Threads: safe.  Blocks: no;
            an access through the view waits until its fault is resolved.
        """
        self._check_open()
        root = self._root
        memory = root._mapping.memory
        buffer = _memory.buffer_of(self._mapping.start, self._mapping.length, keeps=(self, memory))
        with root._exports_lock:
            root._exports = [*root._living_exports(), weakref.ref(buffer)]
        self._check_open()  # again: now close() sees that it is used
        view = memoryview(buffer)
        return view if self._mapping.writable else view.toreadonly()

    @property
    def __array_interface__(self) -> dict[str, object]:
        """For `numpy.asarray(region)`: the bytes, not copied; the rules are those of `memoryview`.

        The array has shape (length,) and dtype uint8.
        """
        return {
            "version": 3,
            "shape": (self._mapping.length,),
            "typestr": "|u1",
            "data": self.memoryview(),
        }

    def _begin_access(self) -> list[MappedMemory]:
        """Keep the memory mapped until an element of the list is removed, whoever closes it."""
        root = self._root
        root._accesses.append(root._mapping.memory)
        return root._accesses

    def _living_exports(self) -> list[weakref.ref[Buffer]]:
        # Check here, since an exception in a weak reference's callback would be lost.
        return [buffer for buffer in self._exports if buffer() is not None]

    def _is_used(self) -> bool:
        return bool(self._living_exports() or self._accesses)

    def _keep_mapped(self, user: int) -> None:
        """Keep the memory mapped until `_let_unmap`, even if all that refers to it is garbage."""
        root = self._root
        root._keepers.add(user)
        _kept[user] = root._mapping.memory

    def _let_unmap(self, user: int) -> None:
        """Undo `_keep_mapped`; may be called again."""
        self._root._keepers.discard(user)
        _kept.pop(user, None)

    def _on_unmap(self, callback: Callable[[], None]) -> None:
        """Call `callback` before close() unmaps the memory, unless something uses it then."""
        self._root._before_unmap.append(callback)

    # The end

    def _on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` when closing begins; for a part also when its region is closed."""
        super()._on_close(callback)
        if self._whole is not None:
            self._whole._on_close(callback)

    def _forget_on_close(self, callback: Callable[[], None]) -> None:
        """Undo an `_on_close`; unknown callbacks are ignored."""
        super()._forget_on_close(callback)
        if self._whole is not None:
            self._whole._forget_on_close(callback)

    @property
    def closed(self) -> bool:
        """Whether close() was called, of the region or of the one that it is a part of."""
        return not (self._open and self._root._open)

    def _check_open(self) -> None:
        # close() has looked at what is in use: what begins later might find pages without content.
        if self.closed or self._root._closer not in (0, get_ident()):
            raise ClosedError("this region is closed")

    def _check_usable(self) -> None:
        self._check_open()

    def outlives_close(self) -> bool:
        """Return whether the memory stays mapped if the region is closed now.

        It does if it was adopted with `at`, while a memoryview or an array over it is alive or
        another thread accesses it, and if the region is a part of another one that stays open.
        """
        root = self._root
        if self is not root and not root._closer:
            return True
        return not root._mapping.memory.start or root._is_used()

    def _begin_close(self) -> None:
        """Let no access begin in another thread from now on; close() has to follow."""
        self._closer = get_ident()

    def _goes_away(self) -> bool:
        """Return whether its close() has begun, and nothing keeps the memory mapped any more."""
        return bool(self._root._closer) and not self.outlives_close()

    def close(self) -> None:
        """End serving it, unmap it (unless it was adopted with `at`) and close its descriptor.

        The memory stays mapped until the last memoryview or array over it is gone, and the last
        access by a method in another thread has ended; one that begins meanwhile raises
        ClosedError. In memory that stays mapped, pages that a handler had not filled are poisoned,
        as by `Handler.unserve`.
        All addresses of the region are unmapped, also where the program has unmapped or moved a
        part by munmap(2) or mremap(2) and other memory, such as a block of malloc(), has been
        mapped since: map something else there at once, or adopt such memory with `at`.
        Closing a part of a region ends its serving; the memory stays the region's.

        GIL: released.  Threads: safe.  Blocks: until its handlers have stopped serving it (see
            `Handler.unserve`). With Feature.EVENT_UNMAP enabled, until the Unmap event of what the
            program has registered is read; none is sent for what a stopped handler had to leave
            registered.
        """
        if self._open:
            if self._pid == os.getpid():
                self._closer = get_ident()
                try:
                    self._run_before_close()
                except BaseException:
                    self._closer = 0
                    raise
            self._open = False
        if self._whole is not None:
            return
        # If one of these is interrupted, the next call does it again.
        if self._is_used() or (self._keepers and self._pid == os.getpid()):
            self._mapping = self._mapping.without_memory()  # what uses it owns it
        elif self._mapping.memory.start and self._pid == os.getpid():
            for callback in self._before_unmap:
                callback()
        self._mapping.close()

    def __del__(self) -> None:
        if not getattr(self, "_open", False) or self._whole is not None:
            return
        if self._mapping.memory.start and self._pid == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        self._close_dropped()


def span_of(part: object, length: int) -> tuple[int, int]:
    """Return offset and length of a slice of `length` bytes; negative numbers count from the end.

    Python would cut off the outside. A slice of memory that does not exist is a mistake: refuse it.
    """
    if not isinstance(part, slice):
        _refuse_index(part)
    if part.step is not None and check_int("step", part.step) != 1:
        raise ValueError(f"step {part.step}: a part of a region is contiguous")
    begin = 0 if part.start is None else check_int("start", part.start)
    end = length if part.stop is None else check_int("stop", part.stop)
    begin += length if begin < 0 else 0
    end += length if end < 0 else 0
    shown_part = "".join(
        (
            "" if part.start is None else hex(part.start),
            ":",
            "" if part.stop is None else hex(part.stop),
        )
    )
    if not (0 <= begin <= length and 0 <= end <= length):
        raise ValueError(f"[{shown_part}] reaches outside a region of {length:#x} bytes")
    if begin >= end:
        raise ValueError(f"[{shown_part}] of a region of {length:#x} bytes is empty")
    return begin, end - begin


def _refuse_index(index: object) -> NoReturn:
    what = f"[{index}]" if isinstance(index, int) else f"[{shown(index)}]"
    raise TypeError(
        f"region{what}: a region has parts, region[start:stop] in bytes; read(offset, length)"
        " returns bytes, and memoryview() and numpy.asarray(region) index them"
    )
