"""Types of the arguments that several commands have."""

from __future__ import annotations

import argparse


def pid(text: str) -> int:
    """Return the id of a process."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not the id of a process")
    return value
