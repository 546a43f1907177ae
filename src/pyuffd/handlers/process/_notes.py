"""What answered calls and the engine's reports change in the keeper's book (layer L4)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from pyuffd import _memory
from pyuffd._errors import UffdError
from pyuffd.handlers._types import Piece, RangeId, RangeSpec, ReportKind
from pyuffd.handlers.process import _wire
from pyuffd.handlers.process._book import Book, Range, ServedBook, SpaceBook
from pyuffd.handlers.process._calls import Call

# FUSE, NFS, CIFS, SMB2, 9P, Ceph, AFS
REMOTE = {0x65735546, 0x6969, 0xFF534D42, 0xFE534D42, 0x01021997, 0x00C36400, 0x5346414F}


class Notes:
    """Writes the book; descriptors that it keeps are taken out of the lists that it gets."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._by_call: dict[Call, Callable[..., None]] = {
            Call.ADD: self._note_added,
            Call.OPEN: self._note_opened,
            Call.SET_IOCTLS: self._note_ioctls,
            Call.LIST_REGISTERED: self._note_listed,
            Call.UNLIST_REGISTERED: self._note_unlisted,
            Call.UNSERVE: self._note_unserved,
            Call.ADD_SPACE: self._note_space,
            Call.START: self._note_started,
            Call.END: self._note_ended,
            Call.REFUSE: self._note_refusing,
        }

    def note(self, call: Call, fds: list[int], result: object, args: Sequence[object]) -> None:
        """Note what a call has changed."""
        self._by_call[call](fds, result, *args)

    def note_report(
        self,
        kind: ReportKind,
        number: int,
        id_: int,
        pieces: Sequence[Piece],
        sequence: int,
        fds: list[int],
    ) -> None:
        """Note what the engine has reported of a space."""
        spaces = self._book.spaces
        if kind == ReportKind.FORK and fds:
            spaces[number] = SpaceBook(fds[0], True, id_, states_fd=fds[1] if fds[1:] else -1)
        space = spaces.get(number)
        if space is None:
            _wire.close_all(fds)  # the call that adds the space has not been answered yet
            return
        if kind == ReportKind.GONE:
            if number:
                del spaces[number]
                _wire.close_all([fd for fd in (space.fd, space.states_fd) if fd >= 0])
        elif kind == ReportKind.DROPPED:
            space.pieces.pop(id_, None)
        elif kind == ReportKind.ADDED:
            space.pieces.setdefault(id_, []).extend(pieces)
        else:
            space.note_pieces(pieces)
            self._book.reported = sequence

    def _note_added(self, fds: list[int], served: RangeId, spec: RangeSpec) -> None:
        may_hang = any(_is_remote(fd) for fd in fds[: len(spec.content.fds)])
        book = ServedBook(spec, list(fds), closing_may_hang=may_hang)
        self._book.served[served.number] = book
        fds.clear()

    def _note_opened(self, _: list[int], ioctls: int, served: RangeId, __: object) -> None:
        self._note_listed([], None, served.space, [(served.start, served.length)], False)
        self._note_ioctls([], None, served, ioctls)

    def _note_ioctls(self, _: list[int], __: None, served: RangeId, ioctls: int) -> None:
        if served.number in self._book.served:
            self._book.served[served.number].ioctls = ioctls

    def _note_listed(
        self, _: list[int], __: None, number: int, ranges: Sequence[Range], is_all: bool
    ) -> None:
        if number in self._book.spaces:
            self._book.spaces[number].list_registered(ranges, is_all=is_all)

    def _note_unlisted(self, _: list[int], __: None, number: int, start: int, length: int) -> None:
        if number in self._book.spaces:
            self._book.spaces[number].unlist_registered(start, length)

    def _note_unserved(self, _: list[int], done: bool, served: RangeId, *how: object) -> None:
        is_part = how[-1] is not None  # the engine reports which pieces are left
        gone = self._book.served.pop(served.number, None) if done and not is_part else None
        if gone is not None:
            # Files whose close may hang stay open until the process ends.
            left_open = len(gone.spec.content.fds) if gone.closing_may_hang else 0
            _wire.close_all(gone.fds[left_open:])
            if how[1]:  # it was unregistered too
                spec = gone.spec
                self._note_unlisted([], None, spec.space, spec.start, spec.length)

    def _note_space(
        self, fds: list[int], number: int, layout_events: int, owner_pid: int, _: int
    ) -> None:
        self._book.spaces[number] = SpaceBook(fds[0], False, layout_events, owner_pid)
        fds.clear()

    def _note_started(self, _: list[int], __: None, cpus: list[int]) -> None:
        self._book.cpus = cpus

    def _note_ended(self, *_: object) -> None:
        # Leave the descriptors to the end of the process: closing one may hang.
        self._book.cpus = None
        self._book.refusing = True

    def _note_refusing(self, *_: object) -> None:
        self._book.refusing = True


def _is_remote(fd: int) -> bool:
    """Return whether closing a file may wait for a server (statfs(2) lists the numbers)."""
    with contextlib.suppress(UffdError):
        return _memory.fstatfs(fd)[0] & 0xFFFF_FFFF in REMOTE
    return False
