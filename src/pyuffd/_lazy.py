"""`lazy`: memory whose pages come from a source when they are touched (layer L4)."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from pyuffd._abi import Feature, RegisterMode
from pyuffd._arguments import check_int, shown
from pyuffd._describe import repr_of, short_repr
from pyuffd._dropped import close_dropped
from pyuffd._errors import HandlerError
from pyuffd._pages import PAGE_SIZE, check_page_size, round_up
from pyuffd._source_like import as_source
from pyuffd._uffd import Userfaultfd
from pyuffd.handlers import Handler
from pyuffd.regions import Region
from pyuffd.sources import FileSource

if TYPE_CHECKING:
    from pyuffd._source_like import SourceLike
    from pyuffd.handlers._checks import Driver, Policy
    from pyuffd.handlers._present import Present
    from pyuffd.sources import PageSource

Kind = Literal["anonymous", "memfd"]
KINDS = ("anonymous", "memfd")


class LazyRegion(Region):
    """A region that is served from a source, with its handler; `lazy` makes one.

    It is a `Region`, and is used as one. close(), which `with` calls, stops the handler, closes the
    userfaultfd and, unless the region was given to `lazy`, unmaps the memory. A memoryview, an
    array or a part of it keeps it alive. After close() an array over it can still be read, except
    pages that were never loaded, which raise SIGBUS: `handler.populate(region)` loads them.

    If a signal handler raises just as the `with` block ends, it stays served until the last
    reference to it, and to its views, is gone.

    Attributes:
        uffd: The userfaultfd.
        handler: The handler, which is running.
    """

    uffd: Userfaultfd
    handler: Handler
    _what = "lazily served region"
    _owned: Region | None = None
    _file: FileSource | None = None  # opened for it

    def __init__(self, *args: object) -> None:
        raise TypeError(f"LazyRegion{args!r}: pyuffd.lazy(source) makes one")

    @classmethod
    def _made(cls, region: Region, uffd: Userfaultfd, handler: Handler) -> LazyRegion:
        self = cls.__new__(cls)
        self.uffd, self.handler = uffd, handler
        self._become_part(region, 0, region.length)
        return self

    def close(self) -> None:
        """Stop the handler, close the userfaultfd, and unmap the memory if `lazy` mapped it.

        Raises:
            HandlerError: the content of a page could not be read, as by `Handler.stop`. All is
                closed in any case.
            HandlerError: called by its page source, or in the thread of the loop that its
                `AsyncSource` runs in: nothing is done, as by `Handler.stop`.

        Blocks: as `Handler.stop`.
        """
        self.handler._refuse_sources_thread()
        try:
            self._begin_to_close()
            self.handler.stop()
        finally:
            try:
                self.uffd.close()
            finally:
                super().close()
                for each in (self._owned, self._file):
                    if each is not None:
                        each.close()

    def _begin_to_close(self) -> None:
        """Tell the handler that the memory goes away, if it does: no page need be poisoned."""
        if self._owned is not None:
            self._owned._begin_close()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop in another thread, so that an `AsyncSource` of this loop can still answer."""
        await self.handler._leave(partial(self.__exit__, exc_type, exc, traceback))

    def __del__(self) -> None:
        if not getattr(self, "_open", False) or self._pid != os.getpid():
            return
        warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        close_dropped(self._close_and_warn)

    def _close_and_warn(self) -> None:
        try:
            self.close()
        except HandlerError as error:
            warnings.warn(f"{self!r}: {error}", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        return f"<LazyRegion by the {self.handler.driver} driver: {super().__repr__()[1:-1]}>"


def lazy(
    source: SourceLike,
    length: int | None = None,
    *,
    kind: Kind = "anonymous",
    shared: bool = True,
    huge_page_size: int | None = None,
    noreserve: bool = False,
    region: Region | None = None,
    driver: Driver = "auto",
    on_error: Policy = "poison",
    stall_timeout_s: float | None = None,
    prefetch: int = 0,
    workers: int = 1,
    fault_log: int = 0,
    mode: RegisterMode = RegisterMode.MISSING,
    present: Present | None = None,
    features: Feature = Feature(0),  # noqa: B008 - an immutable flag
    user_mode_only: bool = False,
) -> LazyRegion:
    """Return memory whose pages come from `source` when they are first touched.

    It opens a userfaultfd, maps memory, and starts a handler that serves it. For more regions with
    one handler, or other options, make the three yourself.

    Args:
        source: The content: a page source, or a buffer, a region, a path, an open file or a
            function, as for `Handler.serve`.
        length: Bytes, rounded up to whole pages; the source's by default.
        kind: The memory to map: "anonymous" or "memfd".
        shared: For a memfd: False maps it copy-on-write.
        huge_page_size: Use hugetlb pages of this size in bytes.
        noreserve: As for `Region.anonymous`.
        region: Serve this region, of any kind, in place of new memory. It stays the caller's, and
            open; it must not be touched before.
        driver: As for `Handler`. "inline" enables Feature.SIGBUS.
        on_error: As for `Handler`.
        stall_timeout_s: As for `Handler`.
        prefetch: As for `Handler`.
        workers: As for `Handler`.
        fault_log: As for `Handler`.
        mode: As for `Handler.serve`.
        present: As for `Handler.serve`.
        features: As for `Userfaultfd`.
        user_mode_only: As for `Userfaultfd`.

    Raises:
        ValueError: options that cannot be combined, no length where the source has none, or a
            source that ends before the last page.
        TypeError: something that is no source; the message names the class to use.
        UffdOSError: what opening the userfaultfd, mapping or registering the memory raises.

    Kernel: as `Userfaultfd`, `Region` and `Handler`.  GIL: as for `Handler`: by default any access
        is fine.  Threads: safe, apart from close().  Blocks: no.

    Example:
        >>> import pyuffd
        >>> with pyuffd.lazy(b"hello" * 1000) as memory:
        ...     memory.read(4995, 5), memory.memoryview()[5000], memory.length
        (b'hello', 0, 8192)
    """
    given, source = source, as_source(source)
    _check_region(
        region,
        kind=kind,
        length=length,
        shared=shared,
        huge=huge_page_size,
        noreserve=noreserve,
    )
    if driver == "inline":
        features |= Feature.SIGBUS
    with ExitStack() as made:
        served = region or made.enter_context(
            _mapped(source, length, kind, shared=shared, huge=huge_page_size, noreserve=noreserve)
        )
        uffd = made.enter_context(Userfaultfd(features=features, user_mode_only=user_mode_only))
        handler = made.enter_context(
            Handler(
                uffd,
                driver=driver,
                on_error=on_error,
                stall_timeout_s=stall_timeout_s,
                prefetch=prefetch,
                workers=workers,
                fault_log=fault_log,
            )
        )
        handler.serve(served, source, mode=mode, present=present)
        found = LazyRegion._made(served, uffd, handler)
        found._owned = served if region is None else None
        if isinstance(source, FileSource) and source is not given:
            found._file = source
        made.pop_all()
    return found


def _mapped(
    source: PageSource,
    length: int | None,
    kind: Kind,
    *,
    shared: bool,
    huge: int | None,
    noreserve: bool,
) -> Region:
    """Map new memory for a source."""
    page_size = PAGE_SIZE if huge is None else check_page_size(huge)
    size = round_up(_length_of(source, length), page_size)
    if kind == "anonymous":
        return Region.anonymous(size, huge_page_size=huge, noreserve=noreserve)
    return Region.memfd(size, shared=shared, huge_page_size=huge, noreserve=noreserve)


def _check_region(
    region: Region | None,
    *,
    kind: str,
    length: int | None,
    shared: bool,
    huge: int | None,
    noreserve: bool,
) -> None:
    if kind not in KINDS:
        raise ValueError(
            f"kind {short_repr(kind)} is not one of {', '.join(map(repr, KINDS))}; pass region= for"
            " memory of another kind"
        )
    if region is None:
        if not shared and kind != "memfd":
            raise ValueError("shared=False needs kind='memfd': anonymous memory is never shared")
        return
    if not isinstance(region, Region):
        raise TypeError(f"region must be a Region, not {shown(region)}")
    mapping = kind != "anonymous" or not shared or noreserve
    if mapping or length is not None or huge is not None:
        raise ValueError("region= has a kind, a length and a page size of its own")


def _length_of(source: PageSource, length: int | None) -> int:
    if length is not None:
        return check_int("length", length, 1)
    if source.length is None:
        raise ValueError(f"length: {repr_of(source)} has no end, so pass a length")
    return source.length
