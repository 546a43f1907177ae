"""Report a failure on stderr and in the log, before a thread dies of it or waits (layer L4).

C reports its own failures (csrc/engine/say.c), since the thread that waits may hold the GIL.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from pyuffd._describe import described, log_error, short_repr
from pyuffd.handlers._types import OnError
from pyuffd.regions import Region

if TYPE_CHECKING:
    from pyuffd._pages import RangeLike
    from pyuffd.handlers._types import Request
    from pyuffd.sources import PageSource

OWN_FOLDER = os.path.dirname(__file__) + os.sep
# One line for each range, but not hundreds for a program that serves hundreds of ranges.
SAID_MOST = 8


def label_of(region: RangeLike, source: PageSource | None) -> str:
    """Return a name of a region and its source, for messages."""
    if isinstance(region, Region):
        place = short_repr(region)
    else:
        place = f"[{region.start:#x}, +{region.length:#x})"
    return place if source is None else f"{place}, served from {short_repr(source)}"


def say(fd: int, text: str) -> None:
    """Write a line to a descriptor, whatever sys.stderr is."""
    if fd >= 0:
        with suppress(OSError):
            os.write(fd, f"pyuffd: {text}\n".encode(errors="backslashreplace"))


def tell(log: logging.Logger, fd: int, text: str, error: BaseException) -> None:
    """Write a failure to stderr and the log, but once if the log goes to stderr."""
    if not _shows_on_stderr(log):
        say(fd, text)
    log_error(log, text, error)


def _shows_on_stderr(log: logging.Logger) -> bool:
    at: logging.Logger | None = log
    while at is not None:
        for handler in at.handlers:
            if (
                isinstance(handler, logging.StreamHandler)
                and handler.stream in (sys.stderr, sys.__stderr__)
                and handler.level <= logging.ERROR
            ):
                return log.isEnabledFor(logging.ERROR)
        at = at.parent if at.propagate else None
    return False


def source_text(request: Request, label: str, error: BaseException, on_error: OnError) -> str:
    """Describe an exception of a source in Python, and what happens to the page."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if frames and frames[-1].filename.startswith(OWN_FOLDER):
        where = ""  # what it returned was wrong, and found to be so here
    match on_error:
        case OnError.POISON:
            now = "it is poisoned: threads that touch it get SIGBUS"
        case OnError.STALL:
            now = "it stays missing: threads that touch it wait until stop()"
        case OnError.KILL:
            now = 'the process that owns it is killed (on_error="kill")'
    what = " ".join(described(error).split())
    more = "" if on_error is OnError.KILL else " (later ones are only counted; stop() raises it)"
    return (
        f"page {request.address:#x} (offset {request.offset:#x} of {label}): its content could not"
        f" be read: {what}{where}; {now}{more}"
    )
