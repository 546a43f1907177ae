"""Argument types that several commands use."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def seconds(shortest: float, longest: float) -> Callable[[str], float]:
    """Return the argument type for a time within limits."""

    def convert(text: str) -> float:
        value = float(text)
        if not shortest <= value <= longest:
            raise argparse.ArgumentTypeError(
                f"{text} is not between {shortest:g} and {longest:g} seconds"
            )
        return value

    convert.__name__ = "number of seconds"  # argparse prints it if the text is not a number
    return convert


def pid(text: str) -> int:
    """Convert a process id."""
    value = int(text)
    if not 0 < value < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text} is not the id of a process")
    return value
