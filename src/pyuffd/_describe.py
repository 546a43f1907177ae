"""Words for messages; text of other people's exceptions, which may be long or fail (layer L1)."""

from __future__ import annotations

import logging
import sys
import traceback

# More than any message that is meant to be read. A source may raise with a page's content in it.
TEXT_MOST = 2000
REPR_MOST = 120


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 page", "2 pages"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def shortened(text: str, most: int = TEXT_MOST) -> str:
    """Return a text, cut if it is longer than `most`, with the number of characters left out."""
    if len(text) <= most:
        return text
    return f"{text[:most]}... ({len(text) - most} more characters)"


def text_of(error: BaseException) -> str:
    """Return str(error), shortened; what is wrong with it if that raises."""
    try:
        return shortened(str(error))
    except Exception as other:
        return f"<no text: __str__ raises {type(other).__name__}>"


def described(error: BaseException) -> str:
    """Return type and text of an exception, shortened."""
    return f"{type(error).__name__}: {text_of(error)}"


def repr_of(value: object) -> str:
    """Return the repr, shortened, also if it raises."""
    try:
        return shortened(repr(value))
    except Exception as error:
        return f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"


def short_repr(value: object) -> str:
    """Return the repr as one short line, also if it raises."""
    text = " ".join(repr_of(value).split())
    return text if len(text) <= REPR_MOST else f"{text[: REPR_MOST - 3]}..."


def traceback_of(error: BaseException) -> str:
    """Return an exception as Python prints it, each of its texts shortened."""
    return "".join(_lines_of(error)).rstrip()


def _lines_of(error: BaseException) -> list[str]:
    lines = traceback.format_exception(error)
    return [line if len(line) <= TEXT_MOST else f"{shortened(line.rstrip())}\n" for line in lines]


def print_traceback(error: BaseException) -> None:
    """Write an exception to stderr as Python does, each of its texts shortened."""
    print(traceback_of(error), file=sys.stderr)


def log_error(log: logging.Logger, text: str, error: BaseException | None) -> None:
    """Log a failure if logging is set up; its last resort is stderr, where it already appears."""
    _log(log, logging.ERROR, text, error)


def log_debug(log: logging.Logger, text: str, error: BaseException) -> None:
    """Log a failure that is also told elsewhere."""
    _log(log, logging.DEBUG, text, error)


def _log(log: logging.Logger, level: int, text: str, error: BaseException | None) -> None:
    if not log.hasHandlers() or not log.isEnabledFor(level):
        return
    info = None if error is None else (type(error), error, error.__traceback__)
    name, line, function, _ = log.findCaller(stacklevel=3)
    record = log.makeRecord(log.name, level, name, line, "%s", (text,), info, function)
    if error is not None:
        record.exc_text = traceback_of(error)  # what formatters print instead of `exc_info`
    log.handle(record)


def human_size(size: int) -> str:
    """Return a size as people read it."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"
