"""An engine in this process that takes over if the helper process is killed (layer L4).

Its C thread waits for the helper's end, since the program's threads may by then wait for pages with
the GIL held. It cannot read the sources, so `on_error` applies to each missing page that is
touched; zeros and write-protection need no source. It knows the ranges as they were served: faults
in what was moved since are those of memory that no handler serves.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Unpack

from pyuffd._errors import ClosedError, HelperLostError, LayoutChangedError
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._served_parts import Part
from pyuffd.handlers._types import (
    PATIENCE_S,
    Content,
    EngineOptions,
    PageState,
    RangeId,
    RangeSpec,
    SourceFailure,
    SourceKind,
    outline_of,
)

_READ = (SourceKind.FILE, SourceKind.OVERLAY)


class StandIn:
    """The engine, and the numbers by which the helper process knows its ranges and spaces."""

    def __init__(
        self, fd: int, helper: tuple[int, int, int], **options: Unpack[EngineOptions]
    ) -> None:
        self.engine = Engine(fd, helper=helper, **options)
        self._ranges: dict[int, RangeId] = {}
        self._page_sizes: dict[int, int] = {}
        self._spaces: dict[int, int] = {0: 0}
        self._is_started = False

    def add_space(self, space: int, fd: int, *, layout_events: int, owner_pid: int) -> None:
        """Stand in for another userfaultfd too."""
        if space not in self._spaces:
            self._spaces[space] = self.engine.add_space(
                fd, layout_events=layout_events, owner_pid=owner_pid
            )

    def remove_space(self, space: int) -> None:
        """Forget a userfaultfd."""
        if space not in self._spaces:
            return
        self.engine.stop()  # a thread that waits for the helper's end removes nothing
        self.engine.remove_space(self._spaces[space])
        del self._spaces[space]
        if self._is_started:
            self.engine.start([])

    def add(self, served: RangeId, spec: RangeSpec) -> None:
        """Put a range in, without its source."""
        kind = spec.content.kind
        # Zeros can be written to the page cache only through `local`, which is not mapped here.
        if kind in _READ or (kind is SourceKind.ZERO and spec.writes_cache):
            kind = SourceKind.REQUEST
        here = replace(
            spec,
            space=self._spaces[spec.space],
            content=Content(kind, outline=outline_of(spec.content)),
            local=0,
            local_file=None,
            owner=None,
        )
        # Only the helper process reads the events: what it has let go may still be here.
        for number, old in list(self._ranges.items()):
            begin, end = spec.start - old.start, spec.start + spec.length - old.start
            if old.space != here.space or begin >= old.length or end <= 0:
                continue
            is_whole = begin <= 0 and end >= old.length
            part = None if is_whole else (max(begin, 0), min(end, old.length))
            self.remove(number, part=part)
        found = self.engine.find(here.space, spec.start)  # an interrupted call put it in
        place = self.engine.add(here) if found is None else found
        self._page_sizes[place.number] = spec.page_size
        self._ranges[served.number] = place

    def set_ioctls(self, served: RangeId, ioctls: int) -> None:
        """Note which ioctls a range supports."""
        if served.number in self._ranges:
            self.engine.set_ioctls(self._ranges[served.number], ioctls)

    def remove(
        self,
        number: int,
        *,
        seal: bool = False,
        unregister: bool = False,
        patience_s: float = PATIENCE_S,
        gently: bool = False,
        part: Part | None = None,
    ) -> bool:
        """Take a range, or a part of it, out; without arguments its memory is left alone."""
        if number not in self._ranges:
            return True
        place = self._ranges[number]
        if not self.engine.unserve(
            place,
            seal=seal,
            unregister=unregister,
            patience_s=patience_s,
            gently=gently,
            part=part,
        ):
            return False
        if part is not None:
            return True
        self._page_sizes.pop(place.number, None)
        del self._ranges[number]
        return True

    def place_of(self, served: RangeId) -> RangeId | None:
        """Return the number of a range here, or None if it is not in here."""
        return self._ranges.get(served.number)

    def failure_at(self, address: int, lost: HelperLostError) -> SourceFailure | None:
        """Return that a page is lost because the helper is, if it is."""
        for place in self._ranges.values():
            offset = address - place.start
            if 0 <= offset < place.length:
                size = self._page_sizes[place.number]
                try:
                    states = self.engine.states(place, offset // size, 1)
                except LayoutChangedError:  # stop() takes the range out just now
                    return SourceFailure(lost, address, size)
                if states[0] == PageState.POISONED:
                    return SourceFailure(lost, address, size)
        return None

    def start(self) -> None:
        """Wait for the helper's end, in a C thread."""
        self.engine.start([])
        self._is_started = True

    def dismiss(self) -> None:
        """Wait no longer: the handler stops."""
        self._is_started = False
        with suppress(ClosedError):
            self.engine.stop()

    def close(self) -> None:
        """End it; it was not needed."""
        self.dismiss()
        with suppress(ClosedError):
            for number in list(self._ranges):
                self.remove(number)
        self.engine.destroy()

    def take_over(self) -> Engine:
        """Resolve faults from now on, whether the helper has ended or not; poison what is missing.

        The caller ends the engine.
        """
        self.engine.stop()
        self.engine.refuse()
        self.engine.start([])
        self.engine.wake_all()
        return self.engine
