"""How a handler begins to serve many regions at once (layer L4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from pyuffd import _left
from pyuffd._abi import Ioctl, RegisterMode
from pyuffd._describe import short_repr
from pyuffd._errors import UffdError
from pyuffd._overlay import OverlaySource
from pyuffd.handlers._borrowed import Borrowed
from pyuffd.handlers._checks import region_numbers
from pyuffd.handlers._content import Known, content_of
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._overlaps import Range
from pyuffd.handlers._range_spec import Served as Done
from pyuffd.handlers._regions import ServesRegions
from pyuffd.handlers._serving import Served
from pyuffd.handlers._threads import WorkedEngine
from pyuffd.handlers._types import RangeSpec, SourceKind
from pyuffd.regions import Region, RegionKind
from pyuffd.sources import PageSource

# Signals wait for one call in C: some 5 us for each region.
_AT_ONCE = 256
_MODE = RegisterMode.MISSING
_NEEDED = int(Ioctl.COPY)
# Their content is read by C, from files.
_PLAIN = (SourceKind.ZERO, SourceKind.FILE, SourceKind.OVERLAY)
Row = tuple[Region, PageSource]
Texts = dict[tuple[int, int], str]  # of overlays, by their numbers of runs and leaves


class _Plan(NamedTuple):
    """What is known of a region before it is served."""

    region: Region
    source: PageSource
    spec: RangeSpec
    memory: Range


class ServesMany(ServesRegions):
    """The part of `Handler` that serves many regions."""

    def _serve_many(self, rows: Iterable[tuple[object, PageSource]]) -> None:
        """Serve regions for missing faults as `serve` does, most of them by few calls in C.

        Present pages are refused, also of regions that were served before. If one cannot be served,
        those before it are.
        """
        left = list(rows)
        with self._serving_many():
            for at in range(0, len(left), _AT_ONCE):
                some = left[at : at + _AT_ONCE]
                done = 0
                if self._are_plain(some):
                    with self._lock:
                        done = self._serve_plain(some)  # type: ignore[arg-type]
                for region, source in some[done:]:
                    self.serve(region, source, present="refuse")  # type: ignore[arg-type]

    def _are_plain(self, rows: Sequence[tuple[object, PageSource]]) -> bool:
        """Whether these are new anonymous memory of this process, which needs no other checks."""
        return (
            self.driver == "native"
            and type(self._engine) is Engine
            and not isinstance(self._engine, WorkedEngine)
            and not self.uffd.adopted
            and self._owners.are_here(self.uffd)
            and not _left.is_any()
            and all(
                isinstance(region, Region)
                and region.kind is RegionKind.ANONYMOUS
                and not region.was_served
                for region, _ in rows
            )
        )

    def _serve_plain(self, rows: Sequence[Row]) -> int:
        """Serve the first ones of these; return how many. `serve` tells what is wrong otherwise."""
        engine = self._running_engine()
        if not isinstance(engine, Engine):
            return 0
        uffd, space = self.uffd, self._space_of(engine, self.uffd)
        borrowed = Borrowed()
        plans = list(_planned(rows, space, borrowed))
        if not plans or uffd._has_registered(
            min(each.spec.start for each in plans),
            max(each.spec.start + each.spec.length for each in plans),
        ):
            return 0
        self._overlaps.check_many([each.memory for each in plans])
        done = Done(len(plans))
        specs = [each.spec for each in plans]
        begun: list[Served] = []
        try:
            engine.serve_many(space, specs, _NEEDED, done)
            ranges = done.ranges(space, specs)
            uffd._note_registered([(one.start, one.length) for one in ranges], _MODE)
            self._overlaps.add_many([each.memory for each in plans[: len(ranges)]])
            for number, (one, plan) in enumerate(zip(ranges, plans, strict=False)):
                served = Served(
                    one,
                    plan.spec.page_size,
                    _MODE,
                    plan.region,
                    uffd,
                    plan.spec.content.kind,
                    [plan.memory],
                    borrowed,
                    plan.source,
                    ioctls=done.ioctls(number),
                )
                begun.append(served)
                self._follow_close(plan.region, served)
                served.keep_mapped()
                self._served[space, one.start] = served  # last: from here on it is served
        except BaseException:  # a signal handler may raise at any line
            self._take_back_many(engine, plans, done, begun)
            raise
        if ranges:
            self._at_close.keeps = self
            if self._started:
                self._may_move = False
        return len(ranges)

    def _take_back_many(
        self, engine: Engine, plans: Sequence[_Plan], done: Done, begun: Sequence[Served]
    ) -> None:
        """Undo what was done of those that are not served."""
        space = plans[0].spec.space
        specs = [each.spec for each in plans]
        for plan, one in zip(plans, done.ranges(space, specs), strict=False):
            if (space, one.start) in self._served:
                continue
            with suppress(UffdError):
                engine.unserve(one, seal=False)
            self.uffd._note_unregistered(one.start, one.length)
            self._overlaps.remove(plan.memory)
        for served in begun:
            if not self._serves(served):
                for callback in served.on_close:
                    served.region._forget_on_close(callback)  # type: ignore[attr-defined]
                served.let_unmap()
        if any((space, spec.start) in self._served for spec in specs):
            self._at_close.keeps = self
            if self._started:
                self._may_move = False


def _planned(rows: Sequence[Row], space: int, borrowed: Borrowed) -> Iterator[_Plan]:
    """Yield what is to be served, up to the first one that `serve` has to look at."""
    known: Known = {}
    texts: Texts = {}
    for region, source in rows:
        try:
            start, length, page_size = region_numbers(region)
            content = content_of(source, region, known)
        except (UffdError, ValueError, TypeError, OSError):  # `serve` raises it
            return
        if content.kind not in _PLAIN or content.reads_memory:
            return
        spec = RangeSpec(
            space,
            start,
            length,
            page_size,
            _MODE,
            content,
            owner=(borrowed, None, region),
            label=_label(start, length, source, texts),
        )
        yield _Plan(region, source, spec, Range(start, length, _MODE, True, ()))


def _label(start: int, length: int, source: PageSource, known: Texts) -> str:
    """Return what `label_of` does, shorter: two texts for each region are a tenth of the time."""
    if isinstance(source, OverlaySource):
        key = len(source.runs), len(source.leaves)
        content = known.get(key) or known.setdefault(key, short_repr(source))
    else:
        content = short_repr(source)
    return f"<Region [{start:#x}, +{length:#x}) anonymous>, served from {content}"
