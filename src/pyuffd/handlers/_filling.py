"""Filling pages of a served region when asked to (layer L4)."""

from __future__ import annotations

from pyuffd._arguments import check_int
from pyuffd._pages import RangeLike
from pyuffd.handlers._base import HandlerBase
from pyuffd.handlers._types import SourceKind


class FillsPages(HandlerBase):
    """The part of `Handler` that fills pages."""

    def populate(
        self,
        region: RangeLike,
        offset: int = 0,
        length: int | None = None,
        *,
        chunk: int | None = None,
    ) -> int:
        """Fill the absent pages of a region now, and return the bytes filled.

        This thread fills them or, with a source in Python, the workers, so call start() first. If
        the content of a page cannot be read, the page stays absent and no further pages are
        fetched; `on_error` applies only to pages that a thread waits for. With a source in Python,
        stop() raises the failure too.

        Args:
            region: A served region.
            offset: Where to begin in bytes, a multiple of the page size.
            length: Bytes, a multiple of the page size; to the end by default.
            chunk: Ask a source in Python for at most so many bytes at a time; a multiple of the
                page size. None begins with a page and asks for more, up to 1 MiB, as long as an
                answer needs no more than a quarter of `stall_timeout_s`. If a source raises when
                it is asked for several pages, it is asked for half of them, down to one.

        Raises:
            ValueError: not served, pages outside the region, or a bad chunk.
            UffdOSError: EIO - the source raised; its exception is the cause. ETIMEDOUT - it did not
                answer in time. ENOMEM - no huge page became free in time. ENODATA - the file of a
                FileSource was truncated. `start` is the first
                page without content, and `completed` bytes were filled. With several workers some
                of these may lie after `start`.
        """
        engine, served, first, pages = self._pages(region, offset, length)
        if chunk is not None and (check_int("chunk", chunk, 1) <= 0 or chunk % served.page_size):
            raise ValueError(
                f"chunk {chunk:#x} is not a positive multiple of the page size"
                f" {served.page_size:#x}"
            )
        if served.kind is SourceKind.REQUEST and not self._started:
            raise ValueError("populate needs running workers: call start() first")
        size = served.page_size
        return engine.populate(served.id, first * size, pages * size, chunk or 0)
