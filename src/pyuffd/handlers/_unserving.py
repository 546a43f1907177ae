"""`Handler.unserve`: how a handler stops serving a region (layer L4)."""

from __future__ import annotations

from contextlib import suppress

from pyuffd._arguments import check_int
from pyuffd._errors import ClosedError, HandlerError, UffdOSError
from pyuffd._pages import RangeLike, check_range, is_address, start_of
from pyuffd._uffd import Userfaultfd
from pyuffd.handlers._aftermath import describe, held_at, leave_behind, take_out, views_of
from pyuffd.handlers._base import HandlerBase
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._overlaps import overlaps_lock
from pyuffd.handlers._served_parts import Part, reaches, without
from pyuffd.handlers._serving import Served
from pyuffd.handlers._turns import CalledInside, refuse_inside, turn_of
from pyuffd.regions import Region


class Unserves(HandlerBase):
    """The part of `Handler` that stops serving regions, and parts of them."""

    def unserve(
        self,
        region: RangeLike | int,
        offset: int = 0,
        length: int | None = None,
        *,
        uffd: Userfaultfd | None = None,
    ) -> None:
        """Stop serving a region, or a part of one, and unregister it, wherever it was moved to.

        Pages that were never filled are poisoned first, so that a later access raises SIGBUS
        instead of reading zeros. Threads that wait for such a page get that too, and those that
        wait for a page which is being filled get its content. Call `populate` before to get all
        content. With a ZeroSource, where zeros are right, nothing is poisoned. Write-protection is
        lifted. Forks' copies are taken out too.

        The rest of a region stays served, without an instant in which a fault there would find
        nothing. A part may be served again, from another source: with `present="drop"` all of it
        comes from there, otherwise the pages that it holds stay. Those that the owner has dropped
        and nobody has touched since are no pages, and come from the source.

        Args:
            region: A served region or a part of one, `region[a:b]`, or the address where a region
                begins. All that is served of it is taken out, also what was served in parts.
            offset: Where to begin in the region in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.
            uffd: The userfaultfd, if several processes have served memory at this address.

        Raises:
            ValueError: nothing of it is served by this handler, or pages outside the region.
            HandlerError: the source does not return to a thread that is filling a page; the thread
                is left behind and the page is poisoned. Or pages could not be poisoned; the region
                then stays registered. Or a signal handler calls this inside another call,
                and would wait for itself; nothing is done then.

        GIL: released.  Threads: safe.  Blocks: for at most 10 s until no thread works on the pages.

        Example:
            >>> from pyuffd import Handler, Region, Userfaultfd
            >>> with (
            ...     Userfaultfd() as uffd,
            ...     Region.anonymous(12288) as region,
            ...     Handler(uffd) as handler,
            ... ):
            ...     _ = handler.serve(region, b"a" * 12288)
            ...     middle = region[4096:8192]
            ...     handler.unserve(middle)
            ...     _ = handler.serve(middle, b"b" * 4096, present="drop")
            ...     [region.read(offset, 1) for offset in (0, 4096, 8192)]
            [b'a', b'b', b'a']
        """
        self._running_engine()  # before the lock, which a thread of the parent may have held
        with self._turn():
            self._running_engine()
            found = self._served_of(region, offset, length, uffd)
        errors, was_served = list[HandlerError](), False
        for served, part in found:
            try:
                was_served |= self._unserve(served, seal=True, part=part)
            except HandlerError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        if not was_served:
            raise ValueError(
                f"no range at {start_of(region):#x} is served by this handler: another thread has"
                " taken it out meanwhile"
            )

    def _release(self, region: RangeLike) -> None:
        """Stop serving a region whose absent pages are right as the kernel has them.

        Nothing is poisoned. For a caller who has filled all that has content.
        """
        with self._turn():
            self._running_engine()
            served, _ = self._served_of(region, 0, None, None)[0]
        self._unserve(served, seal=False)

    def _served_of(
        self, region: RangeLike | int, offset: int, length: int | None, uffd: Userfaultfd | None
    ) -> list[tuple[Served, Part | None]]:
        """Return the ranges that a region has, each with the part of it, or None for all of it."""
        check_int("offset", offset, 0)
        served, start = self._find(region, uffd), start_of(region)
        if not is_address(region):
            extent = region.length  # type: ignore[union-attr]
        elif served is not None:
            extent = served.id.start + served.id.length - start
        else:
            raise ValueError(f"no range at {start:#x} is served by this handler")
        # Only where it has holes can another range be in it.
        is_whole = served is not None and served.parts == [(0, extent)]
        if (
            served is not None
            and (is_whole or is_address(region))
            and (offset, length) == (0, None)
        ):
            return [(served, None)]
        length = extent - offset if length is None else check_int("length", length, 1)
        if length <= 0 or offset + length > extent:
            raise ValueError(f"offset {offset:#x} + {length:#x} is outside a region of {extent:#x}")
        found = self._served_in(region, start + offset, length, uffd)
        if not found:
            raise ValueError(f"no range at {start + offset:#x} is served by this handler")
        parts = []
        for one in found:
            begin = max(start + offset - one.id.start, 0)
            end = min(start + offset + length - one.id.start, one.id.length)
            check_range(begin, end - begin, one.page_size, name="offset")
            parts.append((one, (begin, end) if without(one.parts, begin, end) else None))
        return parts

    def _served_in(
        self, region: RangeLike | int, start: int, length: int, uffd: Userfaultfd | None
    ) -> list[Served]:
        """Return the ranges that have some of [start, +length), all of one address space."""
        found = [
            one
            for one in list(self._served.values())
            if uffd in (None, one.uffd) and one.has_some_of(start, length)
        ]
        same = [one for one in found if one.region is region]
        here = [one for one in found if one.is_here]
        chosen = same or (here if uffd is None and isinstance(region, Region) else found)
        if len({one.id.space for one in chosen}) > 1:
            raise ValueError(
                f"several ranges at {start:#x} are served: pass the object that was served, or uffd"
            )
        return [one for one in found if chosen and one.id.space == chosen[0].id.space]

    def _unserve(self, served: Served, *, seal: bool, part: Part | None = None) -> bool:
        """Take a range or a part out; return whether any of it was still served.

        A page source may block a thread at one of its pages, so the handler's lock is not held
        meanwhile. If a signal handler raises, the range is served as before.
        """
        begin, end = part or (0, served.id.length)
        refuse_inside("unserve() or close()", served.changing)
        with turn_of(served.changing, self._lock, overlaps_lock()):
            with self._lock:
                engine = self._running_engine()
                if not self._serves(served) or not reaches(served.parts, begin, end):
                    return False
                # Others may have taken out the rest.
                part = part and ((begin, end) if without(served.parts, begin, end) else None)
                views = [] if engine.is_remote else views_of([served])
            try:
                take_out(engine, served, seal=seal, part=part)
                held = held_at(engine, served, part)
            except (UffdOSError, ClosedError) as error:
                with self._lock:
                    if not self._serves(served):
                        return True  # stop() has taken it out meanwhile
                raise HandlerError(
                    f"the region at {served.id.start + begin:#x} stays registered: {error}",
                    served.id.start + begin,
                    end - begin,
                ) from error
            with self._lock:
                self._taken_out(served, part, is_held=bool(held))
        if held and isinstance(engine, Engine):
            leave_behind(engine, held, [served], [served.uffd], views)
            raise HandlerError(
                f"the page source did not answer: {describe(held, [served], is_remote=False)}",
                held[0].start,
                held[0].length,
            )
        return True

    def _taken_out(self, served: Served, part: Part | None, *, is_held: bool) -> None:
        if part is not None:
            self._forget_part(served, *part)
            return
        self._forget(served, is_held=is_held)
        if not is_held:
            served.borrowed.let_go()

    def _region_closes(self, served: Served, *, seal: bool) -> None:
        if self.must_end:
            with suppress(ClosedError):  # stopped meanwhile
                self._unserve(served, seal=seal)

    def _uffd_closes(self, uffd: Userfaultfd) -> None:
        errors: list[HandlerError] = []
        with suppress(ClosedError):  # stopped meanwhile
            while all_served := self._still_served(uffd, errors):
                for served in all_served:
                    try:
                        self._unserve(served, seal=True)
                    except CalledInside:  # the next close() does it
                        raise
                    except HandlerError as error:
                        errors.append(error)
        if errors:
            raise errors[0]

    def _still_served(self, uffd: Userfaultfd, errors: list[HandlerError]) -> list[Served]:
        """Return what is served of a userfaultfd; let it go if that is nothing, or on errors."""
        if not self.must_end:
            return []
        with self._turn():
            engine = self._running_engine()
            found = list(filter(lambda one: one.uffd is uffd, list(self._served.values())))
            if found and not errors:
                return found
            if found:
                # Never undone: pages that stay registered would become zeros.
                uffd._hold_open((id(self), "registered"))
            elif uffd in self._spaces:
                engine.remove_space(self._spaces[uffd])
                uffd._release_events(self)
                self._owners.forget(uffd)
                uffd._let_close(id(self))
                # Last: after an interruption the next call does it again.
                del self._spaces[uffd]
        return []
