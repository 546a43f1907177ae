"""What `Snapshot.take` takes: processes, memory of this process, and userfaultfds (layer L6)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from pyuffd._abi import Feature, PageCategory
from pyuffd._page_ranges import PageRange
from pyuffd._pages import RangeLike
from pyuffd._uffd import Userfaultfd
from pyuffd.dirty import DirtyTracker, _rows
from pyuffd.remote._process import Process
from pyuffd.snapshot._request import TAKING, Request

Target = Process | Userfaultfd | RangeLike | Iterable[RangeLike]


@contextmanager
def resolved(target: Target, request: Request) -> Iterator[tuple[Process | None, Request]]:
    """Yield the process, None for this one, and the request for it.

    Raises:
        TypeError: no such target.
        ValueError: a target that needs ranges, or has them already; a tracker of memory of this
            process.
    """
    if isinstance(target, Process):
        yield _of_process(target, request)
    elif isinstance(target, Userfaultfd):
        with _of_descriptor(target, request) as found:
            yield found
    else:
        if request.scope is not None:
            raise ValueError("ranges: the target is ranges of memory itself")
        spans = _rows.spans_of_target(target, TAKING)
        yield _of_process(None, replace(request, scope=spans))


def _of_process(process: Process | None, request: Request) -> tuple[Process | None, Request]:
    if process is not None and process.pid != os.getpid():
        return process, request
    if request.tracker is not None:
        raise ValueError(
            "tracker: a snapshot of this process is taken by another one, which has no tracker of"
            " it; parent= alone compares the content"
        )
    return None, request


@contextmanager
def _of_descriptor(uffd: Userfaultfd, request: Request) -> Iterator[tuple[Process | None, Request]]:
    if request.scope is None:
        raise ValueError(f"{uffd!r} needs ranges=: which of its memory?")
    if uffd.owner_pid is None:
        raise ValueError(f"{uffd!r} does not say whose memory it governs: set owner_pid first")
    if uffd.owner_pid == os.getpid():
        yield _of_process(None, request)
        return
    with Process(uffd.owner_pid) as process:
        tracks = request.method in ("auto", "precopy") and request.tracker is None
        if tracks and uffd.features & Feature.WP_ASYNC:
            # The memory is registered with this descriptor, so that no other can track it.
            ranges = [PageRange(*span, PageCategory(0)) for span in request.scope]
            with DirtyTracker(uffd, ranges, method="wp-async") as tracker:
                yield process, replace(request, tracker=tracker)
            return
        yield process, request
