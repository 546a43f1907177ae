"""A model of Linux and of the engine: the possible states of a page after each operation.

A `World` is one possible state of a page. An operation replaces a world by those that may follow,
which are several if the outcome is unknown (prefetching, MADV_FREE, reclaim). An observation
removes the worlds that contradict it. If no world is left, the program has found a bug.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from pyuffd import PageState

Content = tuple[bytes, bytes]  # the first HEAD bytes, and the byte that fills the rest
HEAD = 16
ZERO: Content = (bytes(HEAD), b"\0")
LOST = "lost"  # the result of an access to a poisoned page

A, C, D, R, P, S = (
    PageState.ABSENT,
    PageState.CLEAN,
    PageState.DIRTY,
    PageState.REMOVED,
    PageState.POISONED,
    PageState.SAVED,
)
# A page in these states was not written since it was protected.
UNWRITTEN = (A, C, S)


class World(NamedTuple):
    """A page, as the kernel and the engine see it.

    Attributes:
        pte: "none"; "own", a private copy; "cache", a page of the file; "poison", a mark.
        wp: whether it is write-protected, by its entry or by a marker in its place.
        mine: the private copy.
        cache: what the file holds; None: a hole, or there is no file.
        engine: the state that the engine has recorded.
        lazy: the kernel may drop it (MADV_FREE) until it is written to.
        mark: the engine has recorded a write, for the next checkpoint.
    """

    pte: str
    wp: bool
    mine: Content | None
    cache: Content | None
    engine: PageState
    lazy: bool = False
    mark: bool = False

    @property
    def there(self) -> bool:
        """Whether the page table maps a page."""
        return self.pte in ("own", "cache")

    @property
    def content(self) -> Content:
        """The content that an access finds if the page is present."""
        found = self.mine if self.pte == "own" else self.cache
        assert found is not None
        return found


@dataclass(frozen=True)
class Rules:
    """The rules for a program's memory, and what they depend on."""

    has_file: bool
    private: bool
    huge: bool
    missing: bool
    minor: bool
    wp: bool
    writes_cache: bool  # minor faults write the source's content into the file first
    has_source: bool  # with content: not zeros, not none
    removes: bool  # EVENT_REMOVE
    forks: bool  # EVENT_FORK
    unpopulated: bool  # WP_UNPOPULATED

    # Faults

    def _put(self, w: World, content: Content, engine: PageState) -> World:
        """A page that the engine fills."""
        if self.private:
            return w._replace(pte="own", mine=content, wp=self.wp, engine=engine, lazy=False)
        return w._replace(pte="cache", cache=content, wp=self.wp, engine=engine)

    def _fault(self, w: World, source: Content) -> World:
        """Access a page outside the page table: the kernel maps one, or sends a fault."""
        hole = not self.has_file or w.cache is None
        if hole and not self.missing:
            # Linux maps zeros; for private huge pages it does not fill the file.
            if not self.has_file or (self.huge and self.private):
                return w._replace(pte="own", mine=ZERO)
            return w._replace(pte="cache", cache=ZERO)
        if not hole and not self.minor:
            return w._replace(pte="cache")
        if w.engine is P:
            return w._replace(pte="poison", wp=False)
        if w.engine is A and self.writes_cache:
            return w._replace(pte="cache", cache=source, wp=self.wp, engine=C)
        if not hole:
            engine = D if self.wp and w.engine in (D, R) else C
            return w._replace(pte="cache", wp=self.wp, engine=engine)
        return self._put(w, source, C) if w.engine is A else self._put(w, ZERO, R)

    def read(self, w: World, source: Content) -> World:
        """An access of user code or of the kernel."""
        return self._fault(w, source) if w.pte == "none" else w

    def write(self, w: World, source: Content, head: bytes) -> World:
        """A write of a page's head."""
        w = self.read(w, source)
        if w.pte == "poison":
            return w
        if w.wp:
            w = w._replace(wp=False, engine=D)
        new = (head, w.content[1])
        if self.private:
            return w._replace(pte="own", mine=new, lazy=False)
        return w._replace(cache=new)

    def through_file(self, w: World, head: bytes) -> World:
        """A write through another mapping of the file."""
        return w._replace(cache=(head, (w.cache or ZERO)[1]))

    def found(self, w: World) -> Content | str:
        """Return the result of a completed access."""
        return LOST if w.pte == "poison" else w.content

    # What the handler does

    def fill(self, w: World, source: Content) -> Iterator[World]:
        """A page that is filled ahead, by prefetch or populate."""
        yield self._filled(w, source)
        if w.pte == "poison" and self.huge:
            # The page table does not show the mark, so a fill may replace it.
            yield self._filled(w._replace(pte="none"), source)

    def push(self, w: World, content: Content) -> Iterator[World]:
        """fill(): UFFDIO_COPY, which fills holes whatever the range is served for."""
        yield from replace(self, missing=True).fill(w, content)

    def _filled(self, w: World, source: Content) -> World:
        if w.engine is not A or w.pte == "poison":
            return w
        cached = self.has_file and w.cache is not None
        if w.there and not self.missing and w.cache is None:
            return w  # CONTINUE checks the page cache first: EFAULT
        if w.there:
            return w._replace(engine=D if self.wp and not w.wp else C)
        if self.writes_cache:
            return w._replace(pte="cache", cache=source, wp=self.wp, engine=C)
        if self.missing and not cached:
            return self._put(w, source, C)
        if cached and (self.minor or self.private or self.huge):
            return w._replace(pte="cache", wp=self.wp, engine=C)
        if cached:
            return w._replace(engine=D if self.wp and not w.wp else C)
        return w

    def protect(self, w: World, why: str = "states") -> Iterator[tuple[PageState, bool, World]]:
        """Protect a page for "states", a "checkpoint" or to "evict" it.

        Yield each state that may be returned, whether a checkpoint then reports the page, and the
        page afterwards.
        """
        armed = w.there or (w.pte == "none" and (self.has_file or self.unpopulated))
        for seen in self.reported(w):
            if w.engine is A:
                engine = C if w.there else A
            elif w.engine is P:
                engine = P
            else:
                engine = R if seen is R and (self.missing or self.minor) else C
            written = seen not in UNWRITTEN
            if why == "evict":
                mark = w.mark or seen in (D, R)
            else:
                mark = w.mark and why == "states" and not written
            yield seen, written or w.mark, w._replace(wp=w.wp or armed, engine=engine, mark=mark)

    def unprotect(self, w: World) -> Iterator[tuple[PageState, World]]:
        """unprotect(): the states that it may return, each with the page afterwards."""
        for seen, _, after in self.protect(w):
            # Zeros that lose their protection may be overwritten.
            is_loose = after.engine is C or (after.engine is R and w.there)
            engine = D if is_loose else after.engine
            engine = A if w.engine is A else engine
            yield seen, after._replace(wp=False, engine=engine, mark=w.mark)

    def evict(self, w: World) -> Iterator[World]:
        """evict(write_back=None) drops a present page; the source is read again later."""
        if w.engine is P or (w.engine is A and not w.there):
            yield w
            return
        # Dropped, with or without an event; the poison marker outlives the page.
        if not w.there and (self.private or w.engine is R):
            yield w
        if not w.there and w.engine is R:
            return
        # A page that its owner dropped stays zeros: the source has the old content.
        gone = w._replace(pte="none", mine=None, lazy=False, engine=R if w.engine is R else A)
        if not self.private:
            gone = gone._replace(cache=None)
        for seen in self.reported(w):
            mark = w.mark or (self.wp and seen in (D, R))
            yield gone._replace(mark=mark)
            yield gone._replace(mark=mark, wp=False)

    def evict_written_back(self, w: World) -> Iterator[World]:
        """evict(write_back=...) leaves the page, or drops it, after handing it over or not."""
        for seen, _, protected in self.protect(w, "evict"):
            for after in (protected, self.read(protected, ZERO)):
                yield after
                if seen in (A, P):
                    continue
                # Reading it shows that it was dropped.
                mark = after.mark or after.engine is R
                yield from self.evict(after._replace(engine=C, mark=mark))

    def save(self, w: World, *, unprotect: bool) -> World:
        """preserve()."""
        if w.engine is not C:
            return w
        return w._replace(engine=D if unprotect else S, wp=w.wp and not unprotect)

    def stop(self, w: World) -> World:
        """stop() poisons the pages that were never filled, and leaves no page protected."""
        w = w._replace(wp=False)
        marked = (A,) if self.private else (A, P)
        if self.has_source and w.engine in marked and w.pte == "none":
            return w._replace(pte="poison")
        return w

    def serve(self, w: World) -> World:
        """serve(present="keep"), by a new handler."""
        w = w._replace(engine=A if self.missing or self.minor else D, mark=False)
        if w.engine is A and w.pte == "poison" and not self.huge:
            return w._replace(engine=P)
        if w.engine is A and w.there:
            return w._replace(engine=D if self.wp and not w.wp else C)
        return w

    def reported(self, w: World) -> set[PageState]:
        """Return the states that page_states() may return."""
        tracked, state = self.wp, w.engine
        if state is A:
            if w.pte == "poison" and not self.huge:
                return {P}
            if not w.there:
                return {A}
            return {D} if tracked and not w.wp else {C}
        if state is R:
            if not w.there or w.wp:
                return {R}
            if tracked:
                return {D}
            return {R, C} if w.pte == "own" else {R}
        if state in (C, S):
            return {D} if tracked and not w.wp else {state}
        return {state}

    # What the owner does

    def _noticed(self, w: World) -> World:
        return w._replace(engine=R) if self.removes else w

    def dontneed(self, w: World) -> Iterator[World]:
        """MADV_DONTNEED."""
        w = self._noticed(w)
        gone = w._replace(pte="none", mine=None, lazy=False)
        if not self.has_file or not w.wp:
            yield gone._replace(wp=False)
            return
        yield gone
        if self.private or self.huge:
            yield gone._replace(wp=False)

    def punch(self, w: World, *, by_madvise: bool) -> Iterator[World]:
        """MADV_REMOVE, or fallocate(2) of the file, drops everything but private copies."""
        if by_madvise:
            w = self._noticed(w)
        w = w._replace(cache=None)
        if w.pte == "own":
            yield w
            if w.mine == ZERO or self.huge:  # the zero page is not a copy; huge pages always go
                yield w._replace(pte="none", mine=None)
                yield w._replace(pte="none", mine=None, wp=False)
            return
        yield w._replace(pte="none")
        yield w._replace(pte="none", wp=False)
        if w.pte == "poison":
            yield w

    def free(self, w: World) -> World:
        """MADV_FREE of anonymous memory."""
        w = self._noticed(w)
        if w.pte == "own":
            return w._replace(lazy=True)
        return w._replace(pte="none") if w.pte == "poison" else w

    def reclaim(self, w: World) -> Iterator[World]:
        """MADV_PAGEOUT without swap."""
        yield w
        if w.pte == "cache":
            yield w._replace(pte="none")
            if w.cache == ZERO:  # a hole that was read, and never written
                yield w._replace(pte="none", cache=None)

    def by_itself(
        self, w: World, source: Content, *, prefetches: bool, has_faulted: bool
    ) -> Iterator[World]:
        """Yield what may happen at any time after the first fault."""
        yield w
        if w.lazy:
            yield w._replace(pte="none", mine=None, wp=False, lazy=False)
        if prefetches:
            for filled in self.fill(w, source):
                yield filled
                if self.forks and not self.private:  # in the page table of a fork
                    yield w._replace(cache=filled.cache, engine=filled.engine)
                    # We cannot read its page table: a page may be in a run with a present one.
                    if self.wp and w.engine is A and filled.engine is C:
                        yield w._replace(cache=filled.cache, engine=D)
            if w.engine is R and w.pte == "none":  # dropped while a source was reading it
                yield self._fault(w, ZERO)
        around = has_faulted and not (self.wp or self.minor or self.huge)
        if around and w.pte == "none" and w.cache is not None:
            yield w._replace(pte="cache")  # Linux maps cached neighbours of a page that is read

    # Forks

    def child(self, w: World) -> Iterator[World]:
        """The page in a fork."""
        served = self.forks
        wp = w.wp and served
        yield w._replace(wp=wp)
        if self.has_file and not w.mine:
            # Linux may leave out the entries of a file's pages.
            yield w._replace(pte="none", wp=wp)
            yield w._replace(pte="none", wp=False)

    def in_child(self, w: World, source: Content, head: bytes | None) -> World:
        """An access by a fork."""
        if self.forks:
            return self.read(w, source) if head is None else self.write(w, source, head)
        unserved = Rules(**{**self.__dict__, "missing": False, "minor": False, "wp": False})
        w = unserved.read(w, source)
        return w if head is None else unserved.write(w, source, head)

    def after_child(self, w: World, child: World) -> World:
        """The parent's page after a fork has accessed its own."""
        if self.has_file:
            w = w._replace(cache=child.cache)
        return w._replace(engine=child.engine) if self.forks and not self.private else w
