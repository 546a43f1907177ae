"""`pyuffd`: where the command begins, so that Ctrl-C ends it silently while it imports the rest."""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_INTERRUPTED = 130


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)  # nothing was done yet, and an exception might end up anywhere


def main() -> int:
    """Import the command line, run it, and return its exit status."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from pyuffd.cli import main as run

    try:
        signal.signal(signal.SIGINT, before)
        return run()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
