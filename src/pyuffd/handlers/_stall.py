"""Showing all Python tracebacks from C, when no Python thread can run (layer L4).

`faulthandler` writes them from a signal handler that needs no GIL; the engine's own thread sends
itself the signal.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys

log = logging.getLogger(__name__)


def stall_signal() -> int:
    """Return a signal on which faulthandler shows all tracebacks; 0 where that cannot be."""
    if _chosen:
        return _chosen[0]
    if sys.__stderr__ is None:
        return 0
    for number in range(signal.SIGRTMAX, signal.SIGRTMIN, -1):
        if signal.getsignal(number) is not signal.SIG_DFL:
            continue
        try:
            faulthandler.register(number, file=sys.__stderr__, all_threads=True)
        except (AttributeError, OSError, RuntimeError, ValueError) as error:
            log.debug("no tracebacks of stalled threads: %s", error)  # no stderr to write to
            return 0
        _chosen.append(number)
        return number
    return 0


_chosen: list[int] = []
