"""Saying what went wrong, before a thread dies or waits of it: on stderr and in the log (layer L4).

What fails in C is said there (csrc/engine/say.c), since the thread that waits may hold the GIL.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from pyuffd.handlers._types import OnError
from pyuffd.regions import Region

if TYPE_CHECKING:
    from pyuffd._pages import RangeLike
    from pyuffd.handlers._types import Request
    from pyuffd.sources import PageSource

# Each serving has its line, but a program that serves hundreds does not want hundreds.
SAID_MOST = 8
REPR_MOST = 120


def short_repr(value: object) -> str:
    """Return one short line; a user's repr may do anything."""
    try:
        text = " ".join(repr(value).split())
    except Exception as error:
        text = f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= REPR_MOST else f"{text[: REPR_MOST - 3]}..."


def label_of(region: RangeLike, source: PageSource | None) -> str:
    """Name what is served and where its pages come from."""
    if isinstance(region, Region):
        place = short_repr(region)
    else:
        place = f"[{region.start:#x}, +{region.length:#x})"
    return place if source is None else f"{place}, served from {short_repr(source)}"


def say(fd: int, text: str) -> None:
    """Write a line, past whatever replaces sys.stderr."""
    if fd >= 0:
        with suppress(OSError):
            os.write(fd, f"pyuffd: {text}\n".encode(errors="backslashreplace"))


def tell(log: logging.Logger, fd: int, text: str, error: BaseException) -> None:
    """Say it on stderr and in the log; once where the log is shown on stderr."""
    if not _shows_on_stderr(log):
        say(fd, text)
    log_error(log, text, error)


def log_error(log: logging.Logger, text: str, error: BaseException | None) -> None:
    """Log it, unless logging is not set up: its last resort is stderr, which has been told."""
    if log.hasHandlers():
        log.error("%s", text, exc_info=error)


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
    """Describe what a source in Python raised, and what happens now."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    match on_error:
        case OnError.POISON:
            now = "it is poisoned: threads that touch it get SIGBUS"
        case OnError.STALL:
            now = "it stays missing: threads that touch it wait until stop()"
        case OnError.KILL:
            now = 'the process that owns it is killed (on_error="kill")'
    described = " ".join(f"{type(error).__name__}: {error}".split())
    more = "" if on_error is OnError.KILL else " (later ones are only counted; stop() raises it)"
    return (
        f"page {request.address:#x} (offset {request.offset:#x} of {label}): its content could not"
        f" be read: {described}{where}; {now}{more}"
    )
