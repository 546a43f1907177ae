"""Threads that fetch page content in Python for the C engine (layer L4).

A worker without work runs the engine's loop itself (in C, without the GIL), so that a request
reaches Python with no hand-over between threads.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from pyuffd._errors import HandlerError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyuffd.handlers._engine import Engine
    from pyuffd.sources import PageSource

log = logging.getLogger(__name__)


class SourceFailure(NamedTuple):
    """The first thing that went wrong in a source, and where."""

    error: BaseException
    start: int
    length: int


class Workers:
    """A pool of threads that answer an engine's requests from Python sources."""

    def __init__(self, engine: Engine, count: int, name: str) -> None:
        self._engine = engine
        self._sources: dict[int, PageSource] = {}
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True)
            for index in range(count)
        ]
        self.failure: SourceFailure | None = None

    def set_source(self, number: int, source: PageSource) -> None:
        """Say which source answers for a range; before it is registered."""
        self._sources[number] = source

    def forget_source(self, number: int) -> None:
        """Drop the source of a range that was taken out."""
        self._sources.pop(number, None)

    def start(self) -> None:
        """Start the threads; the engine runs already."""
        for thread in self._threads:
            thread.start()

    def join(self, limit_s: float) -> bool:
        """Wait for the threads, the engine having stopped; False if a source does not return."""
        give_up = time.monotonic() + limit_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, give_up - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (request := self._engine.next_request()) is not None:
            try:
                data = self._fetch(request)
            except BaseException as error:  # whatever it is, the page must not wait
                self._fail(request, error)
            else:
                self._engine.complete(request, data)

    def _fetch(self, request: Any) -> Buffer:
        source = self._sources[request.id]
        data = source.read(request.offset, request.length)
        size = memoryview(data).nbytes
        if size != request.length:
            raise HandlerError(
                f"{source!r} returned {size:#x} bytes for {request.length:#x} at offset"
                f" {request.offset:#x}",
                request.address,
                request.length,
            )
        return data

    def _fail(self, request: Any, error: BaseException) -> None:
        log.debug("source failed", exc_info=error)
        if self.failure is None:
            self.failure = SourceFailure(error, request.address, request.length)
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        self._engine.fail(request, code)
