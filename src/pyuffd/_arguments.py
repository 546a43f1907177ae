"""Whether an argument is of the kind it must be; an error that names it otherwise (layer L1).

What a value must be besides that, aligned for example, is known where it is used.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Sized
from operator import index
from typing import TypeVar, cast

from pyuffd._describe import short_repr

WORD_LIMIT = 1 << 64
FILE_LIMIT = 1 << 63  # an off_t
FD_LIMIT = 1 << 31  # of descriptors and process ids: an int of C
LONGEST_S = 1e9  # in nanoseconds it fits into 64 bits; some thirty years
SHOWN_MOST = 60
# The last words of names of what is counted.
COUNTS = (
    "backlog",
    "compress",
    "cpus",
    "fd",
    "index",
    "log",
    "pages",
    "pid",
    "port",
    "rate",
    "regions",
    "restores",
    "rounds",
    "s",
    "state",
    "threads",
    "value",
    "workers",
)

_Value = TypeVar("_Value")


def shown(value: object) -> str:
    """Return type and value of something that was given, in one short line."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    if value is None or kind == "ellipsis":
        return repr(value)
    if isinstance(value, (str, bytes, bytearray, float, int)):
        text = repr(value if isinstance(value, float | int) else value[:SHOWN_MOST])
        return f"{kind} {text[:SHOWN_MOST]}"
    if isinstance(value, Sized) and isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"a {kind} of {len(value)}"
    return f"a {kind}"


def check_int(name: str, value: object, least: int | None = None, below: int = WORD_LIMIT) -> int:
    """Return a whole number that is at least `least` (0, 1; None: anything) and below `below`."""
    if not isinstance(value, int):
        if isinstance(value, type) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int, not {shown(value)}")
        try:
            value = index(value)
        except TypeError:
            raise TypeError(f"{name} must be an int, not {shown(value)}") from None
    if least is not None and not least <= value < below:
        if value < least:
            what = "must be above zero" if least == 1 else "is negative"
            raise ValueError(f"{name} {_number(value, name)} {what}")
        limit = _number(below, name)
        raise ValueError(f"{name} {_number(value, name)} is too large: it must be below {limit}")
    return value


def new_buffer(length: int, content: str) -> bytearray:
    """Return a buffer for so many bytes of what `content` names; an error that names both."""
    if length > sys.maxsize:
        raise ValueError(f"length {length:#x}: {content} is never that large")
    try:
        return bytearray(length)
    except MemoryError:
        raise MemoryError(f"no memory for {length:#x} bytes of {content}") from None


def check_bools(**values: object) -> None:
    """Raise TypeError for a value that is neither True nor False, by whatever type says so.

    The truth of anything else is seldom what was meant: that of "no" is true.
    """
    for name, value in values.items():
        if isinstance(value, int) and value in (0, 1):
            continue
        if type(value).__name__ not in ("bool", "bool_"):  # numpy's
            raise TypeError(f"{name} must be True or False, not {shown(value)}")


def check_part(offset: object, length: object) -> None:
    """Raise unless these may be a part of something: below 1 << 63, both and together."""
    offset = check_int("offset", offset, 0, FILE_LIMIT)
    check_int("length", length, 0, FILE_LIMIT - offset)


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raise ValueError for a word that is not one of these."""
    if value not in known:
        words = ", ".join(map(repr, known))
        raise ValueError(f"{name} {short_repr(value)} is not one of {words}")


def check_number(name: str, value: object, most: float = LONGEST_S) -> float:
    """Return a number from 0 to `most`."""
    if isinstance(value, (str, bytes, type)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {shown(value)}")
    number = cast("float", value)
    if number != number:
        raise ValueError(f"{name} is nan: it must be a number")
    if number < 0:
        raise ValueError(f"{name} {_number(number, name)} is negative")
    if number > most:
        raise ValueError(f"{name} {_number(number, name)} is more than {most:g}")
    return number


def check_rate(rate: float | None) -> float | None:
    """Return bytes a second, at least 1, or None for as fast as it goes."""
    if rate is None:
        return None
    if not check_number("rate", rate, float("inf")) >= 1:
        raise ValueError(f"rate {shown(rate)} must be at least 1, in bytes a second")
    return float(rate)


def check_seconds(name: str, value: object) -> float:
    """Return seconds to wait, at most the longest there are; infinity is fine."""
    return min(check_number(name, value, float("inf")), LONGEST_S)


def check_flags(name: str, value: _Value, kind: type[int]) -> _Value:
    """Return bits of a flag class; of a plain number as well."""
    if not isinstance(value, int):
        example = next(iter(kind.__members__), "...")  # type: ignore[attr-defined]
        raise TypeError(
            f"{name} must be a {kind.__name__}, such as {kind.__name__}.{example}, not"
            f" {shown(value)}"
        )
    if not 0 <= value < WORD_LIMIT:
        raise ValueError(f"{name} {_number(value)} is not a number of 64 bits")
    return value


def check_buffer(name: str, value: object) -> None:
    """Raise unless this is a buffer in one piece."""
    try:
        view = memoryview(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} must be a buffer (bytes, a bytearray, a memoryview, an array), not"
            f" {shown(value)}"
        ) from None
    with view:
        if not view.c_contiguous:
            raise BufferError(f"{name} is a buffer with gaps: it must be contiguous")


def check_path(name: str, value: object) -> str:
    """Return a path as text."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(path, str):
        raise TypeError(f"{name} must be a path, a str or a PathLike of one, not {shown(value)}")
    if "\0" in path:
        raise ValueError(f"{name} {shown(path)} has a NUL in it")
    return path


def checked_index(name: str, index: int, count: int) -> int:
    """Return the index of an item, counted from the end if it is negative, or raise IndexError."""
    if not -count <= index < count:
        raise IndexError(f"{name} {index} of {count}")
    return index % count


def check_fd(name: str, value: object) -> int:
    """Return the number of a file descriptor; a bool is none, and was meant as something else."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a descriptor, not {value}")
    return check_int(name, value, 0, FD_LIMIT)


def check_descriptor(name: str, value: object) -> int:
    """Return a file descriptor, from its number or of an open file."""
    if not isinstance(value, int):
        fileno = None if isinstance(value, type) else getattr(value, "fileno", None)
        if not callable(fileno):
            raise TypeError(
                f"{name} must be a path, a descriptor or an open file, not {shown(value)}"
            )
        try:
            value = fileno()
        except io.UnsupportedOperation as error:
            raise TypeError(
                f"{name}: {shown(value)} has no descriptor: pass its content"
            ) from error
    return check_fd(name, value)


def check_pid(name: str, value: int | None) -> None:
    """Raise unless this may be a process id, or None."""
    if value is None:
        return
    check_int(name, value)
    if value < 1 or value >= FD_LIMIT:
        raise ValueError(
            f"{name} {_number(value, name)} is not a process; pass None for an unknown one (it may"
            " be in a PID namespace that hides it)"
        )


def _number(value: float, name: str = "") -> str:
    """Return a number as people read it: counts in decimal, addresses and sizes in hexadecimal."""
    if not isinstance(value, int):
        return str(value)
    if abs(value) > WORD_LIMIT:
        return f"of {value.bit_length()} bits"
    words = name.replace(".", " ").replace("_", " ").split()
    return f"{value}" if words and words[-1] in COUNTS else f"{value:#x}"
