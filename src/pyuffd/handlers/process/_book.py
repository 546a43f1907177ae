"""The keeper's book: what a worker process needs to continue where another one died (layer L4)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pyuffd._abi import Feature
from pyuffd._describe import counted
from pyuffd.handlers._types import IN_FLIGHT, EngineOptions, Piece, RangeSpec

Range = tuple[int, int]  # start, length
# Bytes of states that are read at a time, one for each page.
STATES_READ = 1 << 20


class AtWork(NamedTuple):
    """What a worker process was working on: pages, and address and size of the first one."""

    pages: int = 0
    start: int = 0
    length: int = 0
    where: str = ""

    def __str__(self) -> str:
        if not self.pages:
            return ""
        first = "" if self.pages == 1 else ", the first"
        return f" while it worked on {counted(self.pages, 'page')}{first} at {self.where}"


@dataclass(slots=True)
class ServedBook:
    """A served range and its descriptors; the last one is the file of its pages' states."""

    spec: RangeSpec
    fds: list[int]
    ioctls: int = 0
    closing_may_hang: bool = False  # closing the source's file may wait for a server


@dataclass(slots=True)
class SpaceBook:
    """An address space: its userfaultfd, and the addresses of the pieces of its ranges."""

    fd: int
    is_fork: bool
    layout_events: int
    owner_pid: int = 0  # 0: unknown, as for every fork
    states_fd: int = -1
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    expected: list[Piece] = field(default_factory=list)  # unmappings whose events are still to come
    registered: set[Range] | None = None  # what the owner has listed; None: not all is known

    def list_registered(self, ranges: Sequence[Range], *, is_all: bool) -> None:
        """Note registered ranges (start, length); `is_all`: no others are."""
        if is_all and self.registered is None:
            self.registered = set()
        if self.registered is not None:
            self.registered.update(ranges)

    def unlist_registered(self, start: int, length: int) -> None:
        """Note that a range is no longer registered; a superfluous entry does little harm."""
        if self.registered is not None:
            self.registered.discard((start, length))

    def note_pieces(self, pieces: Sequence[Piece]) -> None:
        """Note where the pieces are now, after a change of the layout or of a range."""
        self.pieces, self.expected = {}, [piece for piece in pieces if not piece.number]
        for piece in pieces:
            if piece.number:
                self.pieces.setdefault(piece.number, []).append(piece)
        if self.layout_events & Feature.EVENT_REMAP:
            self.registered = None  # memory that is not served may have moved too


@dataclass(slots=True)
class Book:
    """What the keeper knows of the engine, for the successor of a worker process."""

    options: EngineOptions
    workers: int
    spaces: dict[int, SpaceBook] = field(default_factory=dict)
    served: dict[int, ServedBook] = field(default_factory=dict)
    cpus: list[int] | None = None  # of a started engine; None: not started
    refusing: bool = False  # pages that fault are poisoned
    gave_up: bool = False  # refusing because worker processes died, not because the owner asked
    restarts: int = 0
    reported: int = 0  # the last layout event that a worker process reported
    rescued: list[int] = field(default_factory=list)  # forks that the last one had not reported

    def at_work(self) -> AtWork:
        """Return what the worker process is working on, or was when it ended."""
        found = AtWork()
        for served in self.served.values():
            spec = served.spec
            pages, first = _in_flight(served.fds[-1], spec.length // spec.page_size)
            if pages and not found.pages:
                offset = first * spec.page_size
                start = spec.start + offset
                where = f"{start:#x} (offset {offset:#x} of {spec.label or 'a range'})"
                found = AtWork(pages, start, spec.page_size, where)
            elif pages:
                found = found._replace(pages=found.pages + pages)
        return found


def _in_flight(fd: int, pages: int) -> tuple[int, int]:
    """Return how many pages of a file of states are in flight, and the first of them."""
    count = first = 0
    for at in range(0, pages, STATES_READ):
        states = os.pread(fd, min(STATES_READ, pages - at), at)
        found = [states.find(one) for one in IN_FLIGHT if one in states]
        if found and not count:
            first = at + min(found)
        count += sum(map(states.count, IN_FLIGHT))
    return count, first
